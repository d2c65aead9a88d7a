"""Runs the checks: all at once, each after those it depends on, all until one deadline, none able to stop another."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Generic, TypeAlias, TypeVar, TypeVarTuple

from stationkey.doctor.report import Finding, failure, unknown
from stationkey.system.bounded_command import CommandFailed, run_bounded
from stationkey.system.threads import Worker

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
DEADLINE: Final = 9.5
"""Seconds for all checks. Looks have shorter deadlines of their own; this one is for what has none: a dead disk."""
_MAX_OUTPUT: Final = 1024 * 1024
_GRACE: Final = 0.5
"""Seconds for the kernel to end a program: one in a system call that nothing interrupts is not waited for."""


@dataclass(frozen=True, slots=True)
class Check(Generic[*Ts]):
    """One row of the table.

    Attributes:
        id: stable name, in every report.
        look: takes what there is to see, from the context; or gives the finding itself if there is nothing to judge.
        judge: pure function from what was seen to one finding or several.
        after: ids of earlier checks that it depends on. If one of them stops, it is not checked, because of that one.
        reads: top-level names of the configuration file that say where to look. If one of them cannot be read, it is
            not checked, because of ``config.file``.
        about: which of several things of a kind it looks at; each message begins with it.
    """

    id: str
    look: Callable[[Any], tuple[*Ts] | Finding]
    judge: Callable[[*Ts], Finding | Iterable[Finding]]
    after: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    about: str = ""


AnyCheck: TypeAlias = Check[*tuple[Any, ...]]


class _Running:
    """A check on its own thread, which is left behind if it does not end."""

    def __init__(
        self, check: AnyCheck, context: object, earlier: Mapping[str, _Running], unread: Collection[str]
    ) -> None:
        self.check = check
        self.because = check.id
        """The check that those after this one are not checked because of."""
        self._context = context
        self._before = [earlier[name] for name in check.after]
        self._unread = unread
        self.future = _submit(check.id, self._find)

    def _find(self) -> list[Finding]:
        if any(name in self._unread for name in self.check.reads):
            return self._blocked_by("config.file")
        for before in self._before:
            if any(finding.stops for finding in before.future.result()):
                return self._blocked_by(before.because)
        try:
            seen = self.check.look(self._context)
            found = seen if isinstance(seen, Finding) else self.check.judge(*seen)
            return [found] if isinstance(found, Finding) else list(found)
        except BaseException as error:  # noqa: BLE001 - a fault of one check must not affect the others
            # Not the message: that of an unforeseen exception may contain a secret.
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            return [unknown(f"the check itself failed ({where})", "please report it", "check_failed")]

    def _blocked_by(self, name: str) -> list[Finding]:
        self.because = name
        return [unknown(f"it depends on {name}", "", "depends")]

    def findings(self, end: float) -> list[Finding]:
        """Wait until `end` at most, then return what was found."""
        try:
            found = self.future.result(max(0.0, end - time.monotonic()))
        except TimeoutError:
            found = [failure("deadline", "no result in time", "a disk or a name server that does not answer?")]
            if hung := [before.because for before in self._before if not before.future.done()]:
                found = self._blocked_by(hung[0])
        about = f"{self.check.about}: " if self.check.about else ""
        return [replace(finding, id=self.check.id, message=about + finding.message) for finding in found]


def run(
    checks: Iterable[AnyCheck], context: object, *, unread: Collection[str] = (), deadline: float = DEADLINE
) -> tuple[list[Finding], bool]:
    """Run all checks.

    Args:
        checks: each after those it depends on; of several with the same id, on the latest before it.
        context: what they may look at.
        unread: top-level names of the configuration file that cannot be read.
        deadline: seconds for all of them.

    Returns:
        The findings, in the order of the checks; and whether a thread that never ended was left behind.
    """
    end, latest, running = time.monotonic() + deadline, dict[str, _Running](), list[_Running]()
    for check in checks:
        latest[check.id] = _Running(check, context, latest, unread)
        running.append(latest[check.id])
    found = [finding for one in running for finding in one.findings(end)]
    return found, not all(one.future.done() for one in running)


def within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """Return what `call` returns, or `otherwise` if that takes longer than `seconds`. Exceptions are passed on."""
    future = _submit("look", call)
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # its own
            raise
        return otherwise


def _submit(name: str, call: Callable[[], T]) -> Future[T]:
    worker = Worker(f"doctor-{name}")
    future = worker.submit(call)
    worker.close(0)
    return future


def ask(command: Sequence[str], *, seconds: float, given: str = "") -> tuple[int | None, str]:
    """Run a program of this environment; return its exit status, -1 where it did not start, and all that it said."""
    try:
        status, output = run_bounded(
            command, os.environ, timeout=seconds, limit=_MAX_OUTPUT, given=given.encode(), grace=_GRACE
        )
    except CommandFailed as error:
        return -1, error.message
    return status, output.decode(errors="replace")
