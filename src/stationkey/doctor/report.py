"""What the doctor finds: one line each, with a stable name, a level, a sentence, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from stationkey.system.text import printable as on_one_line

REPORT_VERSION: Final = 1
"""Of the JSON report. It changes where a program that reads the old one would be misled."""
MAX_TEXT: Final = 600
"""Characters of a message or an advice: what a broker or a file name adds may be long."""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    """As it should be."""
    WARNING = "warning"
    """It works, and somebody should look at it: a promise is weaker than it could be, or it will end soon."""
    FAILURE = "failure"
    """A request is not answered, a key cannot be used, or a door is open."""
    NOT_CHECKED = "not_checked"
    """It could not be looked at from here; the message says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. Whatever texts are put in, what comes out is printable and of bounded length.

    Attributes:
        id: stable name, ``tpm.lockout`` for example; ``docs/doctor.md`` has them all.
        level: how bad it is.
        message: what was seen, in a sentence.
        advice: what to do; empty where there is nothing to do.
    """

    id: str
    level: Level
    message: str
    advice: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))
        object.__setattr__(self, "advice", printable(self.advice))


def ok(name: str, message: str) -> Finding:
    """It is as it should be."""
    return Finding(name, Level.OK, message)


def warning(name: str, message: str, advice: str) -> Finding:
    """It works, and somebody should look at it."""
    return Finding(name, Level.WARNING, message, advice)


def failure(name: str, message: str, advice: str) -> Finding:
    """It does not work, or is not safe."""
    return Finding(name, Level.FAILURE, message, advice)


def not_checked(name: str, because: str, advice: str = "") -> Finding:
    """It could not be looked at, `because`."""
    return Finding(name, Level.NOT_CHECKED, f"not checked, because {because}", advice)


class CannotLookError(Exception):
    """Raised in a check where there is nothing (more) to be seen; says why, as the end of "not checked, because …"."""


@dataclass(frozen=True, slots=True)
class Report:
    """Every finding, in the order of the checks."""

    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        """How many findings are of a level."""
        return sum(finding.level is level for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """1 where there is a failure, else 0."""
        return int(self.count(Level.FAILURE) > 0)

    @property
    def summary(self) -> str:
        """``2 failures, 3 warnings, 31 ok``, and how many were not checked, where some were not."""
        failures, warnings = self.count(Level.FAILURE), self.count(Level.WARNING)
        words = [_counted(failures, "failure"), _counted(warnings, "warning"), f"{self.count(Level.OK)} ok"]
        if unseen := self.count(Level.NOT_CHECKED):
            words.append(f"{unseen} not checked")
        return ", ".join(words)

    def to_json(self) -> dict[str, object]:
        """The report for programs; ``docs/doctor.md`` has its schema."""
        return {
            "version": REPORT_VERSION,
            "summary": {str(level): self.count(level) for level in Level},
            "findings": [
                {"id": found.id, "level": str(found.level), "message": found.message, "advice": found.advice}
                for found in self.findings
            ],
        }


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """The same without anything that could move a terminal's cursor, forge a line or hide a word; cut short."""
    shown = on_one_line(text)
    return shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}…"


def listed(names: Iterable[object], *, most: int = 6) -> str:
    """``a, b and 3 more``."""
    texts = [str(name) for name in names]
    shown = texts[:most]
    if len(texts) > most:
        return f"{', '.join(shown)} and {len(texts) - most} more"
    return ", ".join(shown)
