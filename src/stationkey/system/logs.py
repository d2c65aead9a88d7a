"""Logs: one readable line an event, or one JSON object an event. Values are escaped, so that no name can forge a line.

Plain `logging` with two formatters: structlog would cost 60 ms at start and 5 MiB (see ``docs/architecture.md``).

Anybody who reaches the broker can make the daemon say something, thousands of times a second. So of each kind of line
only so many are written in a minute, and then one that says how many more there were: see `BoundedHandler`.
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
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from datetime import UTC, datetime
from typing import Final, TextIO, cast

from msgspec import Struct

from stationkey.system.text import printable

MINUTE: Final = 60.0
"""Seconds."""
LINES_A_MINUTE: Final[Mapping[int, int]] = {logging.DEBUG: 600, logging.INFO: 600, logging.WARNING: 20}
"""How many lines of one kind are written in a minute, by their level; above these as many as at the highest. What is
served, or comes again, is worth more lines than what is refused."""
MAX_KINDS: Final = 256
"""Kinds that are distinguished in a minute; the others count as one."""
PATIENCE: Final = 0.5
"""Seconds that the reader of standard error has, once, to make room."""

_ATOMIC: Final = select.PIPE_BUF
"""Bytes that a pipe or socket which is ready to be written to takes at once [poll(2), pipe(7)]: 4,096 on Linux."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN: Final = re.compile(r"[\x21\x23-\x3c\x3e-\x7e]+")


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What was given as ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class TextFormatter(logging.Formatter):
    """``2026-11-23T10:00:00.000Z INFO accepted request_id=… key_id=…``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; the traceback of an internal error follows on indented lines."""
        pairs = "".join(f" {name}={_value(value)}" for name, value in fields_of(record).items())
        line = f"{_timestamp(record)} {record.levelname:<7} {printable(record.getMessage())}{pairs}"
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).splitlines()
        return "\n".join([line, *(f"    {printable(row)}" for row in trace)])


class JsonFormatter(logging.Formatter):
    """One JSON object: ``time``, ``level``, ``event``, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, ASCII."""
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
    """What was said of one kind in the minute under way."""

    written: int = 0
    withheld: int = 0
    last: logging.LogRecord | None = None


class Outlet(io.TextIOBase):
    """Standard error, without blocking.

    A pipe that nobody reads, a terminal that was stopped (Ctrl-S) or a journal that hangs would stop the event loop,
    and all requests, with the first line that has no room. Here that line is lost, and so are those that come until
    there is room again; how many they are is counted.

    Args:
        descriptor: the file descriptor; it is not closed.
        encoding: of the text; characters outside it are escaped.
        patience: seconds that the first line is kept for, so that a burst before a slow reader is not lost.
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
        """Write `text` whole, or count it as lost."""
        data = text.encode(self._encoding, "backslashreplace")
        if self._torn:  # the line before has no end
            data = b"\n" + data
        for begin in range(0, len(data), _ATOMIC):
            if not self.has_room():
                self.lost += 1
                self._torn = self._torn or begin > 0
                break
            piece = data[begin : begin + _ATOMIC]
            with suppress(OSError):  # closed by the reader: no reason to end
                os.write(self._descriptor, piece)
        else:
            self._torn = False
        return len(text)

    def has_room(self) -> bool:
        """Whether `_ATOMIC` bytes are taken without waiting, or at least within the patience that is left."""
        return bool(self._room.poll(0 if self.lost else self._patience * 1000))


class BoundedHandler(logging.StreamHandler[TextIO]):
    """Writes at most `LINES_A_MINUTE` of each kind, and then the last of the minute, with the number that is missing.

    Of one kind are lines with the same words around what is filled in, and the same ``reason``. The last one of the
    minute that was withheld is written at the minute's end (or at `close`), with a field ``unwritten``: how many like
    it were not. What this remembers is bounded, too.

    Args:
        stream: where the lines go.
        minute: how long a minute is, in seconds.
    """

    def __init__(self, stream: TextIO, *, minute: float = MINUTE) -> None:
        super().__init__(stream)
        self._minute = minute
        self._kinds: dict[object, _Kind] = {}
        self._ends = 0.0  # when the minute under way does
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
        if kind.written < LINES_A_MINUTE.get(record.levelno, LINES_A_MINUTE[logging.WARNING]):
            kind.written += 1
            self._write(record)
            return
        kind.withheld += 1
        # As text, so that the error and its causes are not kept for a minute.
        kind.last = copy(record)
        kind.last.msg, kind.last.args, kind.last.exc_info = record.getMessage(), (), None
        self._withheld.set()

    def _tell_in_time(self) -> None:
        """Wait for the end of each minute in which lines were withheld: there may be no later line to tell at."""
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
        """End the minute: write the number of withheld lines."""
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
        """Write what was withheld; nothing is written after it."""
        self.tell()
        self._ending.set()
        self._withheld.set()
        super().close()


def set_up(log_format: str, *, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the logs of this process to `stream` (default: standard error), as ``text`` or ``json``."""
    # What no format of ours shows need not be found out; the caller's line alone is a third of what a record costs.
    logging._srcfile = None  # noqa: SLF001 - the way that Python's "Logging HOWTO" gives
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # What a library warns of, such as a certificate with a negative serial number, is a line like every other.
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
    except (AttributeError, OSError, ValueError):  # closed at the start; or in memory, and no descriptor
        return sys.stderr
