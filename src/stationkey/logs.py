"""Logs: one readable line an event, or one JSON object an event. Values are escaped, so that no name can forge a line.

Plain `logging` with two formatters: structlog would cost 60 ms at start and 5 MiB (see ``docs/architecture.md``).
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Final, TextIO

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


def printable(text: str) -> str:
    """`text` on one line: what would move a cursor, turn the writing round or hide itself is shown as its number."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else f"\\u{ord(character):04x}" for character in text)


class TextFormatter(logging.Formatter):
    """``2026-11-23T10:00:00.000Z INFO accepted request_id=… key_id=…``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback, which only a fault of ours has, follows on indented lines of its own."""
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


def set_up(log_format: str, *, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the logs of this process to `stream` (default: standard error), as ``text`` or ``json``."""
    # What no format of ours shows need not be found out; the caller's line alone is a third of what a record costs.
    logging._srcfile = None  # noqa: SLF001 - the way that Python's "Logging HOWTO" gives
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # What a library warns of, such as a certificate with a negative serial number, is a line like every other.
    logging.captureWarnings(capture=True)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
