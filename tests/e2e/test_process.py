"""What another process, or a crash, gets to see of the daemon's memory: nothing."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from outside import STATIONKEY, Station
from peers import Mosquitto

from stationkey.system import hardening

SAME_USER = ("setpriv", "--bounding-set=-sys_ptrace") if os.geteuid() == 0 else ()
"""Makes root such a user as every other is, who may look into his own processes and no others."""
OPEN_PROGRAM = "import sys; print('here', flush=True); sys.stdin.read()"
"""A process that anybody of its user may look into."""


@pytest.fixture
def station(tmp_path: Path, mosquitto: Mosquitto) -> Station:
    """A station that a user of that kind runs, in a directory that a core would be left in."""
    options = ("--broker", mosquitto.url, "--keystore", "software:", "--allow-software-keys")
    station = Station(tmp_path, *options)
    station.run_by("env", f"--chdir={tmp_path}", *SAME_USER, *STATIONKEY)
    return station


def may_read_memory_of(pid: int) -> bool:
    """Whether another process of the same user may read a process's memory, as a debugger does [ptrace(2)]."""
    program = f"open('/proc/{pid}/mem', 'rb')"
    tried = subprocess.run([*SAME_USER, sys.executable, "-c", program], capture_output=True, check=False)
    assert tried.returncode == 0 or b"PermissionError" in tried.stderr
    return tried.returncode == 0


def test_no_process_of_the_same_user_can_read_the_memory_of_the_daemon(station: Station) -> None:
    command = [*SAME_USER, sys.executable, "-c", OPEN_PROGRAM]
    with station, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert may_read_memory_of(other.pid)
        assert station.process is not None
        assert not may_read_memory_of(station.process.pid)


def test_a_daemon_that_is_aborted_leaves_no_core(station: Station, tmp_path: Path) -> None:
    with station:
        assert station.process is not None
        limits = Path(f"/proc/{station.process.pid}/limits").read_text()
        [core] = [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size")]
        assert core == ["0", "0"]
        station.signal(signal.SIGABRT)
        ended = os.waitid(os.P_PID, station.process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert (ended.si_status, ended.si_code) == (signal.SIGABRT, os.CLD_KILLED)  # and not CLD_DUMPED
    assert [path.name for path in tmp_path.iterdir() if "core" in path.name] == []


def test_what_the_system_does_not_allow_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    class Libc:
        def prctl(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(resource, "setrlimit", refused)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc())
    with caplog.at_level(logging.WARNING):
        hardening.close_to_others()
    assert len(caplog.records) == 2


def test_a_system_without_prctl_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    hardening.close_to_others()
    assert len(caplog.records) == 1
