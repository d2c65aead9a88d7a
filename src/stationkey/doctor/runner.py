"""Runs the checks: all at once, each after those it depends on, all until one deadline, none able to stop another."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeAlias, TypeVar, TypeVarTuple

from stationkey.doctor.report import Finding, Verdict, failure, not_checked
from stationkey.system.threads import Worker

C = TypeVar("C")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
DEADLINE: Final = 9.5
"""Seconds for all checks. Looks have shorter deadlines of their own; this one is for what has none: a dead disk."""


@dataclass(frozen=True, slots=True)
class Check(Generic[C, *Ts]):
    """One row of the table.

    Attributes:
        id: stable name, in every report.
        look: takes what there is to see, from the context; or gives the verdict itself if there is nothing to judge.
        judge: pure function from what was seen to one verdict or several.
        after: ids of earlier checks that it depends on. If one of them stops, it is not checked, because of that one.
        reads: top-level names of the configuration file that say where to look. If one of them cannot be read, it is
            not checked, because of ``config.file``.
    """

    id: str
    look: Callable[[C], tuple[*Ts] | Verdict]
    judge: Callable[[*Ts], Verdict | Iterable[Verdict]]
    after: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


AnyCheck: TypeAlias = Check[C, *tuple[Any, ...]]


class _Running(Generic[C]):
    """A check on its own thread, which is left behind if it does not end."""

    def __init__(self, check: AnyCheck[C], context: C, before: Sequence[_Running[C]], unread: Collection[str]) -> None:
        self.check = check
        self.because = check.id
        """The check that those after this one are not checked because of."""
        self.verdicts: list[Verdict] = []
        self._context = context
        self._before = before
        self._unread = unread
        self.thread = threading.Thread(target=self._run, name=f"doctor-{check.id}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        if any(name in self._unread for name in self.check.reads):
            self.blocked_by("config.file")
            return
        for before in self._before:
            before.thread.join()
            if any(verdict.stops for verdict in before.verdicts):
                self.blocked_by(before.because)
                return
        try:
            seen = self.check.look(self._context)
            verdicts = seen if isinstance(seen, Verdict) else self.check.judge(*seen)
            self.verdicts = [verdicts] if isinstance(verdicts, Verdict) else list(verdicts)
        except BaseException as error:  # noqa: BLE001 - a fault of one check must not affect the others
            # Not the message: that of an unforeseen exception may contain a secret.
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            self.verdicts = [not_checked(f"the check itself failed ({where}); please report it")]

    def blocked_by(self, name: str) -> None:
        """Report that it is not checked, because of another check."""
        self.because, self.verdicts = name, [not_checked(f"of {name}")]

    def findings(self, end: float) -> list[Finding]:
        """Wait until `end` at most, then return what was found."""
        self.thread.join(max(0.0, end - time.monotonic()))
        if self.thread.is_alive():
            self.verdicts = [
                failure("no result before the deadline", "something it asks does not answer: a disk, a name server")
            ]
            if hung := [before.because for before in self._before if before.thread.is_alive()]:
                self.blocked_by(hung[0])
        return [Finding(self.check.id, one.level, one.message, one.advice) for one in self.verdicts]


def run(
    checks: Iterable[AnyCheck[C]], context: C, *, unread: Collection[str] = (), deadline: float = DEADLINE
) -> tuple[list[Finding], bool]:
    """Run all checks.

    Args:
        checks: each after those it depends on.
        context: what they may look at.
        unread: top-level names of the configuration file that cannot be read.
        deadline: seconds for all of them.

    Returns:
        The findings, in the order of the checks; and whether a thread that never ended was left behind.
    """
    end, running = time.monotonic() + deadline, dict[str, _Running[C]]()
    for check in checks:
        running[check.id] = _Running(check, context, [running[name] for name in check.after], unread)
    found = [finding for one in running.values() for finding in one.findings(end)]
    return found, any(one.thread.is_alive() for one in running.values())


class Once(Generic[T]):
    """A look that is taken once, by the first who asks; the others get the same value, or the same error."""

    def __init__(self, look: Callable[[], T]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._values: list[T] = []
        self._errors: list[Exception] = []

    def __call__(self) -> T:
        """Take the look, or return what was seen before."""
        with self._lock:
            if not self._values and not self._errors:
                try:
                    self._values.append(self._look())
                except Exception as error:  # noqa: BLE001 - raised below, to each who asks
                    self._errors.append(error)
            if self._errors:
                raise self._errors[0]
            return self._values[0]


def within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """Return what `call` returns, or `otherwise` if that takes longer than `seconds`. Exceptions are passed on."""
    worker = Worker("doctor-look")
    future = worker.submit(call)
    worker.close(0)
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # its own
            raise
        return otherwise


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program said.

    Attributes:
        status: exit status; None if it was killed at its deadline, -1 if it could not be started.
    """

    status: int | None
    out: str
    error: str


def ask(command: Sequence[str], *, seconds: float, given: str | None = None) -> Answer:
    """Run a program without a shell; kill it after `seconds`, and do not wait for one that cannot be killed."""
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
