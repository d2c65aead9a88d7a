"""Run an operator's program without a shell, with a timeout and bounded output, and kill its process group in the end.

It is started on a separate thread, because the start blocks forever if its file is on a hung mount.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from stationkey.errors import StationKeyError
from stationkey.system.text import printable
from stationkey.system.threads import Worker

T = TypeVar("T")

ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
"""Environment of a program, besides the caller's variables."""
OUTPUT: Final = 512
"""Characters of its output that are kept; the rest is discarded."""
_GRACE: Final = 5.0
"""Seconds after SIGKILL after which a program, or its start, counts as hung."""
_LOOK: Final = 0.05
"""Seconds between two checks whether the program has ended: its output stays open if a child has it."""
_PART: Final = 65_536

# vfork, the default, blocks every thread until the program is started. This is the documented switch.
subprocess._USE_VFORK = False  # type: ignore[misc]  # noqa: SLF001 - see above


class CommandFailed(StationKeyError):
    """The program could not be started, failed, or took too long."""


class BoundedCommand:
    """A program with its arguments, one run at a time.

    Args:
        arguments: the program's absolute path, then its arguments.
        timeout: seconds allowed for a run. Then the program is killed, with its process group.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(self, arguments: Sequence[str], *, timeout: float) -> None:
        self._arguments = tuple(arguments)
        self._timeout = timeout
        self._worker = Worker("command")
        self._stopping = threading.Event()

    async def run(self, environment: Mapping[str, str]) -> str:
        """Run the program to its end.

        Args:
            environment: added to `ENVIRONMENT`.

        Returns:
            The beginning of its output, standard error included, as one printable line.

        Raises:
            CommandFailed: it could not be started, failed, or took too long.
        """
        return await self._on_thread(partial(self._run, environment))

    async def check(self) -> None:
        """Check that the program can be started, without starting it.

        Raises:
            CommandFailed: it is missing, or this user may not execute it.
        """
        await self._on_thread(self._check)

    def close(self) -> None:
        """Kill a running program, and end the thread."""
        self._stopping.set()
        self._worker.close(1.0)

    async def _on_thread(self, call: Callable[[], T]) -> T:
        if not self._worker.idle:
            raise CommandFailed("the previous run still hangs", reason="command_hangs")
        try:
            async with asyncio.timeout(self._timeout + _GRACE):
                return await asyncio.wrap_future(self._worker.submit(call))
        except TimeoutError:
            raise CommandFailed(
                f"{self._arguments[0]} can be neither started nor killed", reason="command_hangs"
            ) from None

    def _check(self) -> None:
        path = self._arguments[0]
        if not os.access(path, os.X_OK) or Path(path).is_dir():
            why = "this user may not execute it" if Path(path).exists() else "No such file or directory"
            raise _unstartable(path, why)

    def _run(self, environment: Mapping[str, str]) -> str:
        name = self._arguments[0]
        status, output = run_bounded(
            self._arguments,
            {**ENVIRONMENT, **environment},
            timeout=self._timeout,
            limit=4 * OUTPUT,
            stop=self._stopping.is_set,
        )
        said = printable(" ".join(output.decode("utf-8", "replace").split()))[:OUTPUT]
        if status is None:
            raise CommandFailed(f"{name} took longer than {self._timeout:g} s: {said}", reason="command_timeout")
        if status != 0:
            raise CommandFailed(f"{name} ended with {status}: {said}", reason="command_failed")
        return said


def run_bounded(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    timeout: float,
    limit: int,
    with_errors: bool = True,
    stop: Callable[[], bool] = lambda: False,
    given: bytes = b"",
    grace: float = _GRACE,
) -> tuple[int | None, bytes]:
    """Run a program without a shell, and kill its process group in the end. Blocks.

    Args:
        arguments: its absolute path, then its arguments.
        environment: its whole environment.
        timeout: seconds.
        limit: bytes of its output that are kept; the rest is discarded.
        with_errors: whether to include its standard error.
        stop: polled; returns whether to kill it at once.
        given: its standard input.
        grace: seconds to wait for its end after SIGKILL.

    Returns:
        Its exit status, negative for a signal, or None after the timeout; and its output.

    Raises:
        CommandFailed: it could not be started.
    """
    try:
        with open(os.memfd_create("given"), "w+b") as stdin:  # noqa: PTH123 - a descriptor
            stdin.write(given)
            stdin.seek(0)
            program = subprocess.Popen(  # noqa: S603 - the operator's own list, without a shell
                arguments,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if with_errors else subprocess.DEVNULL,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
    except OSError as error:
        raise _unstartable(arguments[0], str(error.strerror)) from None
    output = bytearray()
    ended = _watch(program, output, until=time.monotonic() + timeout, limit=limit, stop=stop)
    # Before the program is reaped: its group's number cannot be reused yet.
    with suppress(OSError):
        os.killpg(program.pid, signal.SIGKILL)
    assert program.stdout is not None
    program.stdout.close()
    with suppress(subprocess.TimeoutExpired):
        program.wait(grace)
    return program.returncode if ended else None, bytes(output)


def _watch(
    program: subprocess.Popen[bytes], output: bytearray, *, until: float, limit: int, stop: Callable[[], bool]
) -> bool:
    """Read the program's output until it ends; return False after the timeout."""
    assert program.stdout is not None
    descriptor = program.stdout.fileno()
    os.set_blocking(descriptor, False)
    open_ = True
    while time.monotonic() < until and not stop():
        if open_ and select.select([descriptor], [], [], _LOOK)[0]:
            part = os.read(descriptor, _PART)
            open_ = bool(part)
            output += part[: max(0, limit - len(output))]
        elif not open_:
            time.sleep(_LOOK)
        # Ended, and not reaped yet.
        if os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            with suppress(BlockingIOError):  # output between the last read and its end
                output += os.read(descriptor, _PART)[: max(0, limit - len(output))]
            return True
    return False


def _unstartable(path: str, why: str) -> CommandFailed:
    return CommandFailed(
        f"{path} cannot be started: {why}",
        reason="command_unstartable",
        hint="is the path right, and may the daemon's user execute it, under its unit's sandbox?",
    )
