"""File systems and System V IPC of this thread's own, for a program whose places are built into it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

# linux/sched.h, linux/mount.h
_NEWNS: Final = 0x00020000
_NEWIPC: Final = 0x08000000
_RECURSIVE, _PRIVATE = 0x4000, 0x40000
_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


@contextmanager
def own_namespaces(*, empty: tuple[Path, ...]) -> Iterator[None]:
    """Let this thread, and what it starts, see some directories `empty`, and no shared memory. Takes root."""
    with ExitStack() as way_back:

        def opened(path: str) -> int:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            way_back.callback(os.close, descriptor)
            return descriptor

        namespaces = [opened(f"/proc/thread-self/ns/{name}") for name in ("mnt", "ipc")]
        root, here = opened("/"), Path.cwd()
        _call("unshare", _NEWNS | _NEWIPC)

        def return_to_the_others() -> None:
            for namespace in namespaces:
                _call("setns", namespace, 0)
            os.fchdir(root)  # the namespace's own root may be another: a chroot
            os.chroot(".")
            os.chdir(here)

        way_back.callback(return_to_the_others)
        with suppress(OSError):  # in a chroot / need not be a mount point
            _call("mount", b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
        for place in empty:
            _call("mount", b"none", bytes(place), b"tmpfs", 0, None)
            way_back.callback(_call, "umount2", bytes(place), _DETACH)
        yield
