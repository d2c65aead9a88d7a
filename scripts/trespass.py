"""Try what the unit forbids: a program that scripts/deb-check starts in the daemon's place, and once without the unit.

For each thing a line, ``failed`` or ``went``, and the setting that should stop it. It stands on Python alone, and is
copied to where it runs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
ELSEWHERE = "192.0.2.1"
"""An address of this machine that is not loopback [RFC 5737]; scripts/deb-check makes it."""
DISCARD = 9
NEW_USER_NAMESPACE = 0x10000000
PERSONALITY_OF_LINUX32 = 0x0008
KEYCTL, IO_URING_SETUP = 250, 425  # x86-64; with other numbers the filter refuses them as well


def call(result: int) -> None:
    """Raise where a call of the C library failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(directory: str) -> None:
    """Leave a file, and take it away."""
    path = Path(directory, ".trespass")
    path.write_text("")
    path.unlink()


def execute(directory: str) -> None:
    """Run what was written there."""
    path = Path(directory, ".trespass")
    path.write_text("#!/bin/sh\n")
    path.chmod(0o700)
    try:
        subprocess.run([str(path)], check=True)
    finally:
        path.unlink()


def become_set_uid() -> None:
    """Leave a file that gives its user's rights to whoever executes it."""
    path = Path("/var/lib/stationkey/.trespass")
    path.write_text("")
    try:
        path.chmod(0o4755)
    finally:
        path.unlink()


def see(path: str) -> None:
    """Raise where it is not there."""
    Path(path).stat()


def speak(family: int, kind: int) -> None:
    """Have a socket."""
    socket.socket(family, kind).close()


def send() -> None:
    """One datagram that does not stay on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.sendto(b"", (ELSEWHERE, DISCARD))


def unshare() -> None:
    """A namespace of its own, in a process of its own: only one that has no threads may have one of users."""
    if child := os.fork():
        call(-os.waitpid(child, 0)[1])
    else:
        os._exit(0 if LIBC.unshare(NEW_USER_NAMESPACE) == 0 else 1)


def multiply() -> None:
    """More threads than TasksMax=."""
    go_on = threading.Event()
    try:
        for _ in range(100):
            threading.Thread(target=go_on.wait).start()
    except RuntimeError as error:
        raise OSError(str(error)) from None
    finally:
        go_on.set()


def write_and_execute() -> None:
    """Memory for injected code."""
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def open_device() -> None:
    """A device file that everybody may open."""
    os.close(os.open("/dev/trespass", os.O_RDONLY | os.O_NONBLOCK))


def grow() -> None:
    """Beyond MemoryMax=; this does not fail, it is the end."""
    kept = [bytearray(os.urandom(1 << 16) * 256) for _ in range(30)]
    print("went MemoryMax", len(kept), flush=True)


TRESPASSES: dict[str, Callable[[], None]] = {
    "IPAddressDeny": send,
    "TasksMax": multiply,
    "DevicePolicy": open_device,
    "MemoryDenyWriteExecute": write_and_execute,
    "RestrictNamespaces": unshare,
    "RestrictSUIDSGID": become_set_uid,
    "LockPersonality": lambda: call(LIBC.personality(PERSONALITY_OF_LINUX32)),
    "RestrictAddressFamilies": lambda: speak(socket.AF_NETLINK, socket.SOCK_RAW),
    "SystemCallFilter=~@keyring": lambda: call(LIBC.syscall(KEYCTL, 0, -3, 0)),
    "SystemCallFilter=~@resources": lambda: os.setpriority(os.PRIO_PROCESS, 0, 5),
    "SystemCallFilter=~@memlock": lambda: call(LIBC.mlock(ctypes.create_string_buffer(64), 64)),
    "SystemCallFilter: io_uring": lambda: call(LIBC.syscall(IO_URING_SETUP, 4, ctypes.create_string_buffer(256))),
    "ProtectSystem": lambda: write("/srv/open"),
    "ReadOnlyPaths": lambda: write("/run/open"),
    "InaccessiblePaths": lambda: write("/dev/shm"),  # noqa: S108 - that is the one
    "NoExecPaths": lambda: execute("/var/lib/stationkey"),
    "PrivateTmp": lambda: see("/tmp/outside"),  # noqa: S108 - that is the one
    "ProtectHome": lambda: see("/run/user/outside"),
    "ProtectProc": lambda: see("/proc/1"),
    "ProcSubset": lambda: see("/proc/meminfo"),
}


def main() -> None:
    """All of it, or only ``grow``."""
    if sys.argv[1:] == ["grow"]:
        grow()
        return
    for setting, trespass in TRESPASSES.items():
        try:
            trespass()
        except OSError as error:
            print("failed", setting, f"({error})", flush=True)
        else:
            print("went", setting, flush=True)


if __name__ == "__main__":
    main()
