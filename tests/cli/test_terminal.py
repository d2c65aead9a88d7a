"""``stationkey requests`` and ``status`` on a real terminal of 80 columns, into a pipe, and until Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from recording import answer

from parts import E1, V2G, request
from stationkey.ledger import Ledger
from stationkey.system.state_dir import DATABASE_NAME

REFUSED = "ffeeddcc-0000-4000-8000-000000000000"
HOSTILE = "\x1b[2J\nspoof " + 30 * "and a long tale "


@pytest.fixture
def state(tmp_path: Path) -> list[str]:
    """The option for a state directory of a request that was served and one that was not."""
    with closing(Ledger(tmp_path / DATABASE_NAME)) as ledger:
        answer(ledger, request(V2G, E1))
        ledger.rejections.note(REFUSED, reason="country_name_invalid", message=HOSTILE, now=3_000)
    return ["--state-dir", str(tmp_path)]


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What the command shows on a terminal of 80 columns."""
    leader, follower = pty.openpty()
    with (
        os.fdopen(leader, "rb", buffering=0) as screen,
        subprocess.Popen(
            [sys.executable, "-m", "stationkey", *arguments],
            stdout=follower,
            stderr=follower,
            env=os.environ | {"COLUMNS": "80"} | environment,
        ),
    ):
        os.close(follower)
        shown = b""
        try:
            while part := screen.read(4096):
                shown += part
        except OSError:  # how Linux tells that nobody writes to a terminal any more
            pass
    return shown.decode().replace("\r", "")


@pytest.mark.parametrize("arguments", [["requests"], ["requests", REFUSED], ["status"], ["keys", "list"]])
def test_80_columns_are_enough_and_nobody_else_writes_to_the_terminal(state: list[str], arguments: list[str]) -> None:
    shown = on_a_terminal(*arguments, *state, NO_COLOR="1")

    assert len(shown.splitlines()) > 1
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "\x1b" not in shown
    assert not any(line.startswith("spoof") for line in shown.splitlines())


def test_a_terminal_that_knows_no_colours_gets_none(state: list[str]) -> None:
    assert "\x1b[1m" in on_a_terminal("status", *state, TERM="xterm", NO_COLOR="")
    assert "\x1b" not in on_a_terminal("status", *state, TERM="dumb", NO_COLOR="")


@contextmanager
def following(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on, and ends with the test whatever comes of that."""
    command = [sys.executable, "-m", "stationkey", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_follow_goes_on_with_what_comes_until_ctrl_c(state: list[str]) -> None:
    with following("requests", "--follow", "--json", "--limit", "1", *state) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["id"] == REFUSED
        with closing(Ledger(Path(state[1]) / DATABASE_NAME)) as ledger:
            ledger.rejections.note(REFUSED[:-1] + "9", reason="rate_limited", message="why", now=4_000)
        assert json.loads(process.stdout.readline())["reason"] == "rate_limited"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read() == ""


@pytest.mark.parametrize("arguments", [["requests", "--follow", "--json"], ["status", "--watch", "--json"]])
def test_a_closed_pipe_ends_it_without_a_traceback(state: list[str], arguments: list[str]) -> None:
    with following(*arguments, *state) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        with closing(Ledger(Path(state[1]) / DATABASE_NAME)) as ledger:
            ledger.rejections.note(REFUSED[:-1] + "9", reason="rate_limited", message="why", now=4_000)
        assert process.wait() == 1
        assert "Traceback" not in process.stderr.read()
