"""The daemon that has the state directory: whether it runs, and by which settings."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from stationkey.doctor.host.context import Context, Daemon
from stationkey.doctor.host.files import Facts
from stationkey.doctor.report import RUN_AS, Verdict, failure, not_checked, ok, warning

_TOLERANCE: Final = 2.0
"""Seconds: the kernel counts the start of a process in hundredths, and from another beginning."""
_STARTED: Final = 19
"""Field of /proc/PID/stat behind the name, from 0 [proc(5)]."""


def look_at_daemon(context: Context) -> tuple[Daemon, str]:
    """Look at who holds the lock, and at the state of that process [proc(5), /proc/PID/stat]."""
    try:
        state = "" if context.daemon.pid is None else _stat(context.daemon.pid)[0]
    except OSError:
        state = ""
    return context.daemon, state


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def judge_daemon(daemon: Daemon, state: str) -> Verdict:
    """Judge whether a daemon has the state directory. `state`: of its process, one letter, or an empty text."""
    if state in {"T", "t"}:
        return failure(
            f"the daemon (process {daemon.pid}) is stopped: it holds the state directory, and answers nothing",
            f"kill -CONT {daemon.pid}, or systemctl restart stationkey; who sent SIGSTOP, or is it in a debugger?",
        )
    if daemon.pid is not None:
        return ok(f"the daemon runs, as {daemon.user.name} (process {daemon.pid})")
    if daemon.running:
        return ok("the daemon runs, in a part of this machine that is not visible from here")
    return warning(
        f"no daemon uses this state directory; it would run as {daemon.user.name} ({daemon.known_by})",
        "start it: systemctl start stationkey, or stationkey serve",
    )


def look_at_command(context: Context) -> tuple[str, Path, Facts | None, float] | Verdict:
    """Look at the command line and the environment of the running daemon, and when it was started."""
    pid = context.daemon.pid
    if pid is None:
        return not_checked("no daemon is visible")
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        started = time.time() - (up - int(_stat(pid)[_STARTED]) / os.sysconf("SC_CLK_TCK"))
        return config_of(words, variables), Path(f"/proc/{pid}/cwd").readlink(), context.configured.file, started
    except (OSError, ValueError, IndexError):
        return not_checked(f"user {context.me.name} may not look at the daemon", RUN_AS)


def config_of(words: list[str], variables: list[str]) -> str:
    """Return the configuration file that a command line or an environment names, or an empty text."""
    for number, word in enumerate(words):
        if word == "--config" and number + 1 < len(words):
            return words[number + 1]
        if word.startswith("--config="):
            return word.partition("=")[2]
    named = [variable.partition("=")[2] for variable in variables if variable.startswith("STATIONKEY_CONFIG=")]
    return named[0] if named else ""


def judge_settings(named: str, base: Path, file: Facts | None, started: float) -> Verdict:
    """Judge whether the running daemon has the settings that are examined here.

    Args:
        named: the configuration file that the daemon was given, or an empty text.
        base: the working directory of the daemon.
        file: the one that is examined, or None.
        started: when the daemon was started, Unix time.
    """
    if not named and file is None:
        return ok("the daemon has no configuration file, and none is examined")
    if not named or file is None or os.path.realpath(base / named) != os.path.realpath(file.path):
        return warning(
            f"the daemon has the configuration file {named or 'none'}; examined: {file.path if file else 'none'}",
            f"stationkey doctor --config {named}" if named else "leave --config out, or give it to the daemon",
        )
    if file.modified > started + _TOLERANCE:
        return warning(
            f"{file.path} was changed after the daemon was started: the changes do not apply yet",
            "restart the daemon: systemctl restart stationkey",
        )
    return ok("the running daemon has the settings that are examined")
