"""Protect the process's memory from the rest of the machine.

Private parts that no TPM wraps, authorisation values and passwords are in the memory of the daemon. A core file would
put them on the disk, and a debugger would show them to every program of the same user.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from typing import Final

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h


def close_to_others() -> None:
    """Leave no core file, and let no other process of this user read the memory. What cannot be done is logged.

    ``RLIMIT_CORE`` stops core files; not those that go through a pipe to a program, such as systemd-coredump
    [core(5)]. So the process is made undumpable besides [PR_SET_DUMPABLE(2const)]: then there is no core at all,
    ``ptrace`` is refused, and its files under ``/proc`` belong to root. Root can do all of it still. A program that
    this one executes (``[renewal] command``) starts with none of this memory.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        log.warning("disabling core files failed: %s", error)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # Variadic, and so each argument must have the size that prctl(2) reads: unsigned long.
        refused = libc.prctl(_PR_SET_DUMPABLE, *(ctypes.c_ulong(0),) * 4)
    except (OSError, AttributeError) as error:
        log.warning("keeping out debuggers of the same user failed: %s", error)
        return
    if refused:
        log.warning("keeping out debuggers of the same user failed: %s", os.strerror(ctypes.get_errno()))
