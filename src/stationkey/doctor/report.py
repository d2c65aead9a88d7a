"""What the doctor reports: findings, each with its level, a reason for programs, and words for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from stationkey.errors import StationKeyError
from stationkey.system.text import printable as on_one_line

_REPORT_VERSION: Final = 1
"""Of the JSON report. Changes only where a program that reads the old one would be misled."""
MAX_TEXT: Final = 600
"""Characters of a message or an advice: a broker or a file name may add long text."""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    """As it should be."""
    WARNING = "warning"
    """It works, but a promise is weaker than it could be, or it will end soon."""
    FAILURE = "failure"
    """A request is not answered, a key cannot be used, or access is open to others."""
    NOT_CHECKED = "not_checked"
    """It could not be looked at; the message says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: printable and of bounded length, whatever texts are put in.

    Attributes:
        reason: stable word for it; docs/doctor.md lists them all.
        advice: what to do; empty where there is nothing to do.
        stops: whether the checks that depend on this one cannot be made.
        id: stable name of the check, such as ``tpm.lockout``; the runner sets it.
    """

    level: Level
    reason: str
    message: str
    advice: str = ""
    stops: bool = False
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))
        object.__setattr__(self, "advice", printable(self.advice))

    @property
    def matters(self) -> bool:
        """Whether there is something to do: a problem, or a check that another user could make."""
        return self.level is not Level.OK and bool(self.advice)

    def to_json(self) -> dict[str, str]:
        """Return the finding for programs."""
        return {name: str(getattr(self, name)) for name in ("id", "level", "reason", "message", "advice")}


def ok(message: str, *, stops: bool = False) -> Finding:
    """As it should be."""
    return Finding(Level.OK, "ok", message, stops=stops)


def warning(reason: str, message: str, advice: str, *, stops: bool = False) -> Finding:
    """It works, and somebody should look at it."""
    return Finding(Level.WARNING, reason, message, advice, stops)


def failure(reason: str, message: str, advice: str, *, stops: bool = True) -> Finding:
    """It does not work, or is not safe."""
    return Finding(Level.FAILURE, reason, message, advice, stops)


def refusal(error: StationKeyError, otherwise: str = "", *, stops: bool = True) -> Finding:
    """The daemon's own rules refuse it; with their advice, or `otherwise` where they have none."""
    return failure(error.reason, error.message, error.hint or otherwise, stops=stops)


def unknown(because: str, advice: str = "", reason: str = "unknown", *, stops: bool = True) -> Finding:
    """It could not be looked at, `because`."""
    return Finding(Level.NOT_CHECKED, reason, f"not checked: {because}", advice, stops)


def hidden(what: object) -> Finding:
    """It could not be looked at by the user who runs the doctor."""
    return unknown(f"this user may not look at {what}", "run it as root, or as the daemon's user", "hidden")


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        """Count the findings of a level."""
        return sum(finding.level is level for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """1 if there is a failure, else 0."""
        return int(self.count(Level.FAILURE) > 0)

    @property
    def summary(self) -> str:
        """``2 failures, 3 warnings, 31 ok``, and how many were not checked, if any."""
        counts = (self.count(Level.FAILURE), "failure"), (self.count(Level.WARNING), "warning")
        words = [f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counts]
        words.append(f"{self.count(Level.OK)} ok")
        if unseen := self.count(Level.NOT_CHECKED):
            words.append(f"{unseen} not checked")
        return ", ".join(words)

    def to_json(self) -> dict[str, object]:
        """Return the report for programs; docs/doctor.md has its schema."""
        return {
            "version": _REPORT_VERSION,
            "summary": {str(level): self.count(level) for level in Level},
            "findings": [finding.to_json() for finding in self.findings],
        }


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor, forge a line or hide a word; shorten what is too long."""
    shown = on_one_line(text)
    return shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}…"


def listed(names: Iterable[object], *, most: int = 6) -> str:
    """Join names: ``a, b and 3 more``."""
    texts = [str(name) for name in names]
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest
