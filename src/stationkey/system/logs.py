"""Logs: one text line or one JSON object for each event. Values are escaped, so that no name can forge a line.

Plain `logging` with two formatters: structlog would cost 60 ms at start and 5 MiB (see ``docs/architecture.md``).

A client of the broker can cause thousands of log lines a second. So the lines of each kind are limited per minute, and
the suppressed ones are counted: see `BoundedHandler`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from datetime import UTC, datetime
from typing import Final, TextIO, cast

from msgspec import Struct, field

from stationkey.system.text import printable

MINUTE: Final = 60.0
"""Seconds."""
LINES_A_MINUTE: Final[Mapping[int, int]] = {logging.DEBUG: 600, logging.INFO: 600, logging.WARNING: 20}
"""Most lines of one kind per minute, by level; higher levels as the highest. Served and repeated requests get more
lines than refused ones."""
STATION_SHARE: Final = 4
"""Divisor of these lines that one station of a site gets: its flood must not hide what happens to others."""
MAX_KINDS: Final = 256
"""Kinds that are distinguished in a minute; the others count as one."""
PATIENCE: Final = 0.5
"""Seconds to wait, once, for the reader of standard error to make room."""

_ATOMIC: Final = select.PIPE_BUF
"""Bytes that a writable pipe or socket accepts at once [poll(2), pipe(7)]: 4,096 on Linux."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN: Final = re.compile(r"[\x21\x23-\x3c\x3e-\x7e]+")


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields given as ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class TextFormatter(logging.Formatter):
    """``2026-11-23T10:00:00.000Z INFO accepted request_id=… key_id=…``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line; the traceback of an internal error follows on indented lines."""
        pairs = "".join(f" {name}={_value(value)}" for name, value in fields_of(record).items())
        line = f"{_timestamp(record)} {record.levelname:<7} {printable(record.getMessage())}{pairs}"
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).splitlines()
        return "\n".join([line, *(f"    {printable(row)}" for row in trace)])


class JsonFormatter(logging.Formatter):
    """One JSON object: ``time``, ``level``, ``event``, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of ASCII."""
        event: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
            **fields_of(record),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


class _Kind(Struct):
    """The lines of one kind in the current minute, and those of each station of a site: no more than are written."""

    written: int = 0
    of_station: Counter[str] = field(default_factory=Counter)
    withheld: int = 0
    last: logging.LogRecord | None = None


class Outlet(io.TextIOBase):
    """Standard error, without blocking.

    An unread pipe, a stopped terminal (Ctrl-S) or a hung journal would block the event loop, and all requests, at the
    first line without room. Here lines without room are lost and counted.

    Args:
        descriptor: the file descriptor; it is not closed.
        encoding: of the text; characters outside it are escaped.
        patience: seconds to wait with the first line without room, so that a burst before a slow reader is not lost.
    """

    def __init__(self, descriptor: int, *, encoding: str = "utf-8", patience: float = PATIENCE) -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._patience = patience
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)
        self._torn = False
        self.lost = 0

    def write(self, text: str) -> int:
        """Write all of `text`, or count it as lost."""
        data = text.encode(self._encoding, "backslashreplace")
        if self._torn:  # the previous line is incomplete
            data = b"\n" + data
        for begin in range(0, len(data), _ATOMIC):
            if not self.has_room():
                self.lost += 1
                self._torn = self._torn or begin > 0
                break
            piece = data[begin : begin + _ATOMIC]
            with suppress(OSError):  # closed by the reader: go on
                os.write(self._descriptor, piece)
        else:
            self._torn = False
        return len(text)

    def has_room(self) -> bool:
        """Return whether `_ATOMIC` bytes can be written at once, or within the patience that is left."""
        return bool(self._room.poll(0 if self.lost else self._patience * 1000))


class BoundedHandler(logging.StreamHandler[TextIO]):
    """Writes at most `LINES_A_MINUTE` of each kind, and then the last one with the number of suppressed lines.

    Lines of one kind have the same text apart from their values, and the same ``reason``; one station of a site gets a
    quarter of them. The last suppressed line of a minute is written at its end (or at `close`), with the field
    ``unwritten``: the number of others. Memory is bounded.

    Args:
        stream: where the lines go.
        minute: length of a minute in seconds.
    """

    def __init__(self, stream: TextIO, *, minute: float = MINUTE) -> None:
        super().__init__(stream)
        self._minute = minute
        self._kinds: dict[object, _Kind] = {}
        self._ends = 0.0  # the current minute
        self._withheld = threading.Event()
        self._ending = threading.Event()
        # From the start: `emit` is called on the event loop, which must not start a thread; see `system.threads`.
        self._teller = threading.Thread(target=self._tell_in_time, name="log-minute", daemon=True)
        self._teller.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it. Called with the handler's lock held."""
        if time.monotonic() >= self._ends:
            self.tell()
            self._ends = time.monotonic() + self._minute
        kind = self._kind(record)
        most = LINES_A_MINUTE.get(record.levelno, LINES_A_MINUTE[logging.WARNING])
        station = str(vars(record).get("station", ""))
        if kind.written < most and (not station or kind.of_station[station] < most // STATION_SHARE):
            kind.written += 1
            if station:
                kind.of_station[station] += 1
            self._write(record)
            return
        kind.withheld += 1
        # As text, so that the exception and its causes are not kept in memory.
        kind.last = copy(record)
        kind.last.msg, kind.last.args, kind.last.exc_info = record.getMessage(), (), None
        self._withheld.set()

    def _tell_in_time(self) -> None:
        """Wait for the end of each minute with suppressed lines, because there may be no later line."""
        while not self._ending.is_set():
            self._withheld.wait()
            if not self._ending.wait(max(0.0, self._ends - time.monotonic())):
                with suppress(Exception):  # a moment without memory must not end the thread
                    self.tell()

    def _kind(self, record: logging.LogRecord) -> _Kind:
        key: object = (record.name, record.levelno, record.msg, getattr(record, "reason", None))
        if key not in self._kinds and len(self._kinds) >= MAX_KINDS:
            key = record.levelno
        return self._kinds.setdefault(key, _Kind())

    def tell(self) -> None:
        """End the minute: write the number of suppressed lines."""
        assert self.lock is not None
        with self.lock:
            self._withheld.clear()
            self._ends = 0.0
            kinds, self._kinds = self._kinds, {}
            for kind in kinds.values():
                if kind.last is not None:
                    kind.last.unwritten = kind.withheld - 1
                    self._write(kind.last)

    def _write(self, record: logging.LogRecord) -> None:
        outlet = self.stream
        if isinstance(outlet, Outlet) and outlet.lost and outlet.has_room():
            lost, outlet.lost = outlet.lost, 0
            words = "standard error was not read: lines lost"
            told = logging.LogRecord(__name__, logging.WARNING, "", 0, words, (), None)
            told.unwritten = lost
            super().emit(told)
        super().emit(record)

    def close(self) -> None:
        """Write the number of suppressed lines, and nothing afterwards."""
        self.tell()
        self._ending.set()
        self._withheld.set()
        super().close()


def set_up(log_format: str, *, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the logs of this process to `stream` (default: standard error), as ``text`` or ``json``."""
    # Skip fields that our formats do not show: finding the caller's line alone is a third of a record's cost.
    logging._srcfile = None  # noqa: SLF001 - as in Python's "Logging HOWTO"
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # Log warnings of libraries, such as a certificate with a negative serial number.
    logging.captureWarnings(capture=True)
    handler = BoundedHandler(stream or _standard_error())
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def _standard_error() -> TextIO:
    """Return standard error as an `Outlet` if it can be polled; else unchanged."""
    try:
        return cast("TextIO", Outlet(sys.stderr.fileno(), encoding=sys.stderr.encoding))
    except (AttributeError, OSError, ValueError):  # closed at the start, or without a descriptor
        return sys.stderr
