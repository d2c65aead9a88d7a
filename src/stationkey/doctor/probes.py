"""Programs of their own that ask a device, and what they answer: one that hangs or crashes can be killed.

What is found out is printed part by part, so that whoever waits has it even if the next answer never comes: lines of
``{"part": NAME, "value": ...}`` or ``{"part": NAME, "error": ...}``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from stationkey.doctor.runner import ask

_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a program told.

    Attributes:
        values: by part.
        errors: why a part is not there, by part.
        hung: whether an answer did not come.
        said: what else it printed last.
    """

    values: dict[Any, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    hung: bool = False
    said: str = ""

    @classmethod
    def read(cls, status: int | None, output: str) -> Answers:
        """Read what it printed before its end, or until it was killed (None)."""
        found: dict[str, dict[Any, Any]] = {"value": {}, "error": {}}
        said = ""
        for line in filter(str.strip, output.splitlines()):
            try:
                part = json.loads(line)
            except ValueError:
                said = line
                continue
            if isinstance(part, dict):
                for kind in found.keys() & part.keys():
                    found[kind][part["part"]] = part[kind]
        return cls(values=found["value"], errors=found["error"], hung=status is None, said=said)


def ask_device(module: str, asked: Mapping[str, object], *, seconds: float) -> Answers:
    """Run a module as a program that begins with `asked_by`."""
    # -P: no module of the working directory.
    command = [sys.executable, "-P", "-m", module, str(os.getpid())]
    return Answers.read(*ask(command, seconds=seconds, given=json.dumps(asked)))


def asked_by() -> dict[str, Any]:
    """Return what is asked; `say` is how to answer.

    If it says as which user (UID, GID, then groups), this process goes on as that. The kernel ends it with the one
    that started it, also where that has ended already: a device that hangs would hold it for ever [prctl(2)].
    """
    asked: dict[str, Any] = json.load(sys.stdin)
    if user := asked.get("user"):
        os.setgroups(user[2:])
        os.setgid(user[1])
        os.setuid(user[0])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
    return asked


def say(part: str, **what: object) -> None:
    """Print one line, at once."""
    print(json.dumps({"part": part, **what}), flush=True)  # noqa: T201 - how it answers
