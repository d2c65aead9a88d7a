"""An operator's program: whatever it does, its caller goes on, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest

from stationkey.system import bounded_command
from stationkey.system.bounded_command import ENVIRONMENT, OUTPUT, BoundedCommand, CommandFailed

SHELL = "/bin/sh"


@asynccontextmanager
async def opened(*arguments: str, timeout: float = 30.0) -> AsyncIterator[BoundedCommand]:
    command = BoundedCommand(arguments, timeout=timeout)
    try:
        yield command
    finally:
        command.close()


async def reason_of(*arguments: str, timeout: float = 30.0) -> str:
    async with opened(*arguments, timeout=timeout) as command:
        with pytest.raises(CommandFailed) as failed:
            await command.run({})
    return failed.value.reason


def lives(pid: int) -> bool:
    """Whether a process is there, and not only a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(30):
        while lives(pid):  # noqa: ASYNC110 - nobody tells of the end of somebody else's child
            await asyncio.sleep(0.01)


async def test_it_gets_its_arguments_as_they_are_and_no_environment_but_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials")
    program = "import os, sys; print(sys.argv[1], sorted(os.environ), os.getcwd(), sys.stdin.read() == '')"
    async with opened(sys.executable, "-I", "-c", program, "$HOME;*") as command:
        said = await command.run({"STATIONKEY_STATE": "due"})
    assert said == f"$HOME;* {sorted([*ENVIRONMENT, 'STATIONKEY_STATE'])} / True"


async def test_it_inherits_no_file(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        async with opened(SHELL, "-c", f"test ! -e /proc/self/fd/{secret.fileno()}") as command:
            await command.run({})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(("/does/not/exist",), "command_unstartable", id="missing"),
        pytest.param(("/etc/passwd",), "command_unstartable", id="not-executable"),
        pytest.param((SHELL, "-c", "echo no >&2; exit 3"), "command_failed", id="fails"),
        pytest.param((SHELL, "-c", "kill -9 $$"), "command_failed", id="killed"),
    ],
)
async def test_one_that_cannot_run_or_fails_says_so(arguments: tuple[str, ...], reason: str) -> None:
    assert await reason_of(*arguments) == reason


@pytest.mark.parametrize(
    ("path", "fit"), [(SHELL, True), ("/does/not/exist", False), ("/etc/passwd", False), ("/etc", False)]
)
async def test_one_that_cannot_be_started_is_known_before(path: str, fit: bool) -> None:
    async with opened(path) as command:
        if fit:
            await command.check()
            return
        with pytest.raises(CommandFailed) as failed:
            await command.check()
        assert failed.value.reason == "command_unstartable"


async def test_one_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 1000 & echo $$ $! > {pids}; wait"
    assert await reason_of(SHELL, "-c", script, timeout=0.5) == "command_timeout"
    for pid in map(int, pids.read_text().split()):
        await until_gone(pid)


async def test_children_of_one_that_ends_are_killed_and_their_pipe_is_not_waited_for(
    tmp_path: Path,
) -> None:
    pid = tmp_path / "pid"
    async with opened(SHELL, "-c", f"sleep 1000 & echo $! > {pid}; echo done") as command:
        assert await command.run({}) == "done"
    await until_gone(int(pid.read_text()))


async def test_a_flood_of_output_is_read_and_dropped() -> None:
    async with opened(SHELL, "-c", "head -c 20000000 /dev/zero; printf end") as command:
        said = await command.run({})
    assert said == "\\u0000" * (OUTPUT // 6) + "\\u0000"[: OUTPUT % 6]


async def test_one_that_closes_its_output_is_waited_for() -> None:
    async with opened(SHELL, "-c", "exec >&- 2>&-; sleep 0.2; exit 4") as command:
        with pytest.raises(CommandFailed) as failed:
            await command.run({})
    assert failed.value.reason == "command_failed"


async def test_a_start_that_hangs_does_not_hold_the_loop_and_is_not_tried_again() -> None:
    """The file may be on a mount that hangs; the thread then waits in the kernel for ever."""
    release = threading.Event()

    def hang(*_: object, **__: object) -> None:
        release.wait(30)
        raise FileNotFoundError(2, "gone")

    with (
        mock.patch("subprocess.Popen", hang),
        mock.patch.object(bounded_command, "_GRACE", 0.0),
    ):
        async with opened("/mnt/hangs", timeout=0.1) as command:
            for _ in range(2):
                with pytest.raises(CommandFailed) as failed:
                    await command.run({})
                assert failed.value.reason == "command_hangs"
            release.set()


async def test_closing_kills_one_that_runs(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = BoundedCommand((SHELL, "-c", f"echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 1000"), timeout=3000)
    running = asyncio.create_task(command.run({}))
    async with asyncio.timeout(30):
        while not pid.exists() and not running.done():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
    command.close()
    with pytest.raises(CommandFailed):
        await running
    await until_gone(int(pid.read_text()))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # nothing else in this process was changed
