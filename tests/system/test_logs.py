"""One event, one line, and nobody but the program writes one."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stationkey.system import logs

FORGED = "2026-01-01T00:00:00.000Z INFO    accepted request_id=forged"
LINE_ENDS = {
    "line feed": "\n",
    "carriage return": "\r",
    "vertical tab": "\v",
    "form feed": "\f",
    "file separator": "\x1c",
    "next line": "\x85",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
}
UNSEEN = {
    "NUL": "\0",
    "escape, which begins a terminal's commands": "\x1b",
    "delete": "\x7f",
    "C1 control sequence introducer": "\x9b",
    "right-to-left override": "\u202e",
    "right-to-left isolate": "\u2067",
    "zero-width space": "\u200b",
    "byte order mark": "\ufeff",
    "half a character": "\ud800",
}
CHARACTERS = [pytest.param(character, id=words) for words, character in (LINE_ENDS | UNSEEN).items()]


def a_record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("stationkey.service", logging.INFO, __file__, 1, message, arguments, None)
    vars(record).update(fields)
    return record


def as_text(message: str, *arguments: object, **fields: object) -> str:
    return logs.TextFormatter().format(a_record(message, *arguments, **fields))


def as_json(message: str, *arguments: object, **fields: object) -> dict[str, Any]:
    line = logs.JsonFormatter().format(a_record(message, *arguments, **fields))
    assert line.isascii()
    assert line.isprintable()
    event: dict[str, Any] = json.loads(line)
    return event


def a_failure(message: str) -> logging.LogRecord:
    """The record of a fault of ours."""
    record = a_record("a fault")
    try:
        raise ValueError(message)  # noqa: TRY301 - a traceback comes of nothing else
    except ValueError:
        record.exc_info = sys.exc_info()
    return record


# Text.


def test_a_line_has_the_time_the_level_the_event_and_its_fields() -> None:
    record = a_record("accepted %s", "it", request_id="123e4567", ms=3.5, evse_id=None)
    record.created = 1_795_514_400.25

    assert logs.TextFormatter().format(record) == (
        "2026-11-24T10:00:00.250Z INFO    accepted it request_id=123e4567 ms=3.5 evse_id=None"
    )


@pytest.mark.parametrize("character", CHARACTERS)
def test_no_message_and_no_field_can_forge_a_line(character: str) -> None:
    line = as_text(f"said{character}{FORGED}", common_name=f"a{character}{FORGED}")

    assert line.isprintable()
    assert line.splitlines() == [line]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("a b", id="space"),
        pytest.param("a request_id=forged", id="another field"),
        pytest.param('a" request_id="forged', id="quote"),
        pytest.param("a=b", id="equals sign"),
        pytest.param("", id="empty"),
        pytest.param("Über", id="letters that are not ASCII"),
    ],
)
def test_a_value_that_is_no_plain_word_is_quoted(value: str) -> None:
    field = as_text("said", common_name=value).partition(" common_name=")[2]

    assert json.loads(field) == value


def test_names_are_readable_in_a_message() -> None:
    assert as_text("Über Strom 国家").endswith("Über Strom 国家")


@pytest.mark.parametrize("character", CHARACTERS)
def test_a_traceback_stands_indented_and_cannot_forge_a_line(character: str) -> None:
    first, *rest = logs.TextFormatter().format(a_failure(f"x{character}{FORGED}")).split("\n")

    assert first.endswith("a fault")
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(row.startswith("    ") and row.isprintable() for row in rest)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_whatever_is_said_is_one_line(text: str) -> None:
    line = as_text("%s", text, common_name=text)

    assert line.isprintable()
    assert as_json("%s", text, common_name=text)["common_name"] == text


# JSON.


def test_an_event_is_one_object_with_its_fields() -> None:
    event = as_json("accepted %s", "it", request_id="123e4567", ms=3.5, evse_id=None, algorithms=["a"])

    assert datetime.fromisoformat(event.pop("time")).tzinfo is not None
    assert event == {
        "level": "info",
        "event": "accepted it",
        "logger": "stationkey.service",
        "request_id": "123e4567",
        "ms": 3.5,
        "evse_id": None,
        "algorithms": ["a"],
    }


@pytest.mark.parametrize("character", CHARACTERS)
def test_an_event_keeps_every_character_and_stays_one_line(character: str) -> None:
    said = f"said{character}{FORGED}"

    event = as_json("%s", said, common_name=said)

    assert (event["event"], event["common_name"]) == (said, said)


def test_a_traceback_is_a_field_of_its_event() -> None:
    line = logs.JsonFormatter().format(a_failure(f"x\n{FORGED}"))

    assert line.isprintable()
    assert "Traceback (most recent call last)" in json.loads(line)["traceback"]


def test_a_value_that_json_does_not_know_is_said_in_its_own_words() -> None:
    assert as_json("said", key_type=pytest)["key_type"] == str(pytest)


# Where it goes.


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, which is put back afterwards."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.mark.usefixtures("root")
def test_json_has_as_many_lines_as_events() -> None:
    stream = io.StringIO()
    logs.set_up("json", stream=stream)
    log = logging.getLogger("stationkey.test")

    log.info("one")
    log.warning("two\n", extra={"request_id": "a\nb"})
    log.debug("not said")

    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(event["level"], event["event"]) for event in events] == [("info", "one"), ("warning", "two\n")]
    assert events[1]["request_id"] == "a\nb"


@pytest.mark.usefixtures("root")
def test_text_goes_to_standard_error_and_standard_output_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("text")
    logging.getLogger("stationkey.test").error("one", extra={"request_id": "7"})
    out, err = capsys.readouterr()

    assert out == ""
    assert err.endswith("Z ERROR   one request_id=7\n")


def test_setting_up_twice_says_each_thing_once(root: logging.Logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.set_up("text", stream=first)
    logs.set_up("text", stream=second)
    root.warning("said")

    assert (first.getvalue(), second.getvalue().count("said")) == ("", 1)


# A flood of lines.


class Heard(io.StringIO):
    """Memory that tells when something is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.news = threading.Condition()

    def write(self, text: str) -> int:
        with self.news:
            self.news.notify_all()
            return super().write(text)


class Lines:
    """A log that is written to memory, as JSON."""

    def __init__(self, *, minute: float = logs.MINUTE) -> None:
        self._stream = Heard()
        self.handler = logs.BoundedHandler(self._stream, minute=minute)
        self.handler.setFormatter(logs.JsonFormatter())

    def say(self, count: int, message: str = "rejected: %s", *, level: int = logging.WARNING, **fields: object) -> None:
        for number in range(count):
            record = a_record(message, number, **fields) if "%" in message else a_record(message, **fields)
            record.levelno, record.levelname = level, logging.getLevelName(level)
            self.handler.handle(record)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        with self._stream.news:
            return self._stream.news.wait_for(condition, 60)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    def said(self) -> list[tuple[str, object]]:
        """Each line, and how many like it are missing."""
        return [(event["event"], event.get("unwritten")) for event in self.events]


def test_of_a_flood_of_refusals_the_first_are_written_and_the_last_with_the_number_that_is_missing() -> None:
    lines = Lines()
    lines.say(1000, reason="not_json")
    assert lines.said() == [(f"rejected: {number}", None) for number in range(20)]
    lines.handler.tell()
    assert lines.said()[20:] == [("rejected: 999", 979)]
    assert lines.events[-1]["reason"] == "not_json"
    lines.say(1)
    assert lines.said()[21:] == [("rejected: 0", None)]


def test_a_flood_of_one_reason_leaves_the_lines_of_another_alone() -> None:
    lines = Lines()
    lines.say(1000, reason="not_json")
    lines.say(2, reason="policy_country")
    lines.say(2, "key active", level=logging.INFO)

    assert [event.get("reason") for event in lines.events[20:]] == ["policy_country"] * 2 + [None] * 2


def test_a_flood_of_one_station_leaves_most_lines_to_others() -> None:
    lines = Lines()
    lines.say(1000, reason="not_json", station="depot7/s1")
    lines.say(3, reason="not_json", station="depot7/s2")
    lines.say(50, reason="not_json")

    stations = [event.get("station") for event in lines.events]
    assert stations == ["depot7/s1"] * 5 + ["depot7/s2"] * 3 + [None] * 12


def test_what_is_served_has_more_lines_and_is_bounded_too() -> None:
    lines = Lines()
    lines.say(5000, "repeated the answer", level=logging.INFO)
    lines.handler.close()

    assert len(lines.events) == 601
    assert lines.said()[-1] == ("repeated the answer", 4399)


def test_a_line_that_was_the_only_one_withheld_is_written_and_none_is_missing() -> None:
    lines = Lines()
    lines.say(21)
    lines.handler.close()

    assert lines.said()[-1] == ("rejected: 20", 0)


def test_faults_are_bounded_by_their_kind_and_the_first_have_their_traceback() -> None:
    lines = Lines()
    for _ in range(50):
        record = a_failure("of ours")
        record.levelno = logging.CRITICAL
        lines.handler.handle(record)
    lines.handler.close()

    assert ["traceback" in event for event in lines.events] == [True] * 20 + [False]


def test_no_number_of_kinds_takes_more_memory_than_there_are_places() -> None:
    lines = Lines()
    for number in range(2000):
        lines.say(1, "said", reason=f"reason_{number}")
    lines.handler.close()

    assert len(lines.events) == logs.MAX_KINDS + 20 + 1
    assert lines.said()[-1] == ("said", 2000 - logs.MAX_KINDS - 20 - 1)


def test_what_was_withheld_is_told_at_the_end_of_the_minute_though_nothing_else_is_said() -> None:
    lines = Lines(minute=0.05)
    lines.say(100)

    def told() -> int:
        return sum(1 + int(event.get("unwritten") or 0) for event in lines.events)

    assert lines.wait_for(lambda: told() == 100)


def test_a_new_minute_has_lines_of_its_own() -> None:
    lines = Lines(minute=0.0)
    lines.say(100)

    assert lines.said() == [(f"rejected: {number}", None) for number in range(100)]


# Standard error that nobody reads.


class Pipe:
    """The log of a process that writes to a pipe, and what is in the pipe."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        fcntl.fcntl(self._writing, fcntl.F_SETPIPE_SZ, 8192)
        self.handler = logs.BoundedHandler(logs.Outlet(self._writing, patience=0.0))  # type: ignore[arg-type] # text is all it takes
        self.handler.setFormatter(logs.JsonFormatter())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.handler.close()
        os.close(self._writing)
        with suppress(OSError):  # a test closes it itself
            os.close(self._reading)

    def say(self, message: str, **fields: object) -> None:
        record = a_record(message, **fields)
        record.levelno, record.levelname = logging.INFO, "INFO"
        self.handler.handle(record)

    def read(self) -> list[str]:
        return os.read(self._reading, 2**20).decode().splitlines()

    def leave(self) -> None:
        """Nobody is there to read any more."""
        os.close(self._reading)


def test_lines_that_nobody_takes_are_lost_and_counted_and_keep_nobody_waiting() -> None:
    with Pipe() as pipe:
        for number in range(500):
            pipe.say(f"line {number}")
        taken = [json.loads(line)["event"] for line in pipe.read()]
        assert taken == [f"line {number}" for number in range(len(taken))]
        assert 0 < len(taken) < 500
        pipe.say("there again")
        lost, again = (json.loads(line) for line in pipe.read())
        assert (lost["level"], lost["unwritten"]) == ("warning", 500 - len(taken))
        assert again["event"] == "there again"


def test_after_a_line_of_which_only_a_part_was_taken_the_next_one_is_whole() -> None:
    with Pipe() as pipe:
        pipe.say("x" * 100_000)
        torn = pipe.read()
        assert [line[:10] for line in torn] == ['{"time": "']
        pipe.say("whole")
        assert [json.loads(line)["event"] for line in pipe.read() if line][-1] == "whole"


def test_where_nobody_is_left_to_read_nothing_is_raised() -> None:
    with Pipe() as pipe:
        pipe.leave()
        for number in range(500):
            pipe.say(f"line {number}")


def test_a_reader_that_is_slow_gets_every_line() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 8192)
    taken: list[bytes] = []

    def read() -> None:
        with os.fdopen(reading, "rb", buffering=0) as stream:
            while data := stream.read(100):
                taken.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    outlet = logs.Outlet(writing, patience=30.0)
    for number in range(2000):
        outlet.write(f"{number}\n")
    os.close(writing)
    reader.join()
    assert outlet.lost == 0
    assert b"".join(taken).split() == [str(number).encode() for number in range(2000)]
