"""Protect the process's memory from other processes.

The daemon's memory contains software keys, authorisation values and passwords. A core file would write them to the
disk, and a debugger would show them to every program of the same user.
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
    """Disable core files, and reading of the memory by other processes of this user. A failure is logged.

    ``RLIMIT_CORE`` stops core files, but not those that are piped to a program such as systemd-coredump [core(5)]. So
    the process is also made undumpable [PR_SET_DUMPABLE(2const)]: then there is no core at all, ``ptrace`` is refused,
    and its files under ``/proc`` belong to root. Root can still do all of it. An executed program (``[renewal]
    command``) starts without this memory.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        log.warning("disabling core files failed: %s", error)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # prctl(2) is variadic, so each argument must be an unsigned long.
        refused = libc.prctl(_PR_SET_DUMPABLE, *(ctypes.c_ulong(0),) * 4)
    except (OSError, AttributeError) as error:
        log.warning("keeping out debuggers of the same user failed: %s", error)
        return
    if refused:
        log.warning("keeping out debuggers of the same user failed: %s", os.strerror(ctypes.get_errno()))
