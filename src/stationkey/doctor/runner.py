"""Runs the checks: all at once, each with a deadline, none able to stop another."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, ParamSpec, TypeVar

from stationkey.doctor.report import CannotLookError, Finding, failure, not_checked

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")
DEADLINE: Final = 5.0
"""Seconds that a check has. Its questions have deadlines of their own; this one is for what has none: a dead disk."""


@dataclass(frozen=True, slots=True)
class Check(Generic[S]):
    """A check, or several that share one look.

    Attributes:
        area: heading that it stands under.
        ids: of the findings that it may give. Each is in every report, if only as "not checked".
        run: looks and judges. Raises `CannotLookError` where the rest cannot be looked at.
        deadline: seconds; what has not been found by then is a failure, because a thing that should answer does not.
    """

    area: str
    ids: tuple[str, ...]
    run: Callable[[S], Iterator[Finding]]
    deadline: float = DEADLINE


class _Running(Generic[S]):
    """A check on a thread of its own, which is left behind where it does not end."""

    def __init__(self, check: Check[S], subject: S) -> None:
        self._check = check
        self._subject = subject
        self._found: list[Finding] = []
        self._because: str | None = None
        self.left_behind = False
        self._thread = threading.Thread(target=self._run, name=f"doctor-{check.ids[0]}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for finding in self._check.run(self._subject):
                self._found.append(finding)
        except CannotLookError as unseen:
            self._because = str(unseen)
        except BaseException as error:  # noqa: BLE001 - a fault of one check must not take the others with it
            self._because = _fault(error)
        else:
            self._because = "there is nothing to be seen of it here"

    def findings(self, end: float) -> list[Finding]:
        """What was found, and for each thing of which nothing was, why."""
        self._thread.join(max(0.0, end - time.monotonic()))
        self.left_behind = self._thread.is_alive()
        found = list(self._found)
        missing = [name for name in self._check.ids if all(one.id != name for one in found)]
        if self.left_behind:
            said = f"this took longer than {self._check.deadline:g} s, and was given up"
            advice = "something that it asks does not answer: a disk, a name server, a device"
            found += [failure(name, said, advice) for name in missing[:1]]
            missing, because = missing[1:], "the check before it was given up"
        else:
            because = self._because or ""
        return found + [not_checked(name, because) for name in missing]


def _fault(error: BaseException) -> str:
    """Where, and not what: the words of an exception that nobody foresaw may have a secret in them."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"the check itself failed ({type(error).__name__} at {where}); please report it"


def judged(judges: Mapping[str, Callable[P, Iterator[Finding]]], *seen: P.args, **more: P.kwargs) -> Iterator[Finding]:
    """What each judge says of what was seen; none of them can stop another."""
    for name, judge in judges.items():
        try:
            yield from judge(*seen, **more)
        except CannotLookError as unseen:
            yield not_checked(name, str(unseen))
        except Exception as error:  # noqa: BLE001 - as in `_Running`
            yield not_checked(name, _fault(error))


def run(checks: Sequence[Check[S]], subject: S) -> tuple[list[Finding], bool]:
    """The findings of all checks, in their order; and whether a thread was left behind in one that never came back."""
    begin = time.monotonic()
    running = [_Running(check, subject) for check in checks]
    found = [finding for one in running for finding in one.findings(begin + one._check.deadline)]  # noqa: SLF001 - this module's own
    return found, any(one.left_behind for one in running)


def within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """What `call` gives, or `otherwise` where it gives nothing within `seconds`. Exceptions of `call` are raised."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=work, name="doctor-look", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return results[0] if results else otherwise


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program said.

    Attributes:
        status: exit status; None where it was killed at its deadline, and -1 where it could not be started.
    """

    status: int | None
    out: str
    error: str


def ask(command: Sequence[str], *, seconds: float, given: str | None = None) -> Answer:
    """Run a program without a shell; kill it after `seconds`, and wait no longer for one that cannot be killed."""
    try:
        process = subprocess.Popen(  # noqa: S603 - no shell, and no word of it comes from outside
            command,
            stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,  # with what it starts itself: a TCTI may be a program
        )
    except OSError as error:
        return Answer(-1, "", error.strerror or "")
    try:
        out, said = process.communicate(given, timeout=seconds)
        return Answer(process.returncode, out, said)
    except subprocess.TimeoutExpired as late:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            out, said = process.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:  # in a system call that nothing interrupts
            out, said = _text(late.stdout), _text(late.stderr)
        return Answer(None, out, said)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
