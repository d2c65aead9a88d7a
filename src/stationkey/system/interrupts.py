"""What Ctrl-C does to a command: it ends with status 130, and never with a traceback."""

from __future__ import annotations

import os
import signal
from typing import Final

EXIT_INTERRUPTED: Final = 130
"""Exit status of a command that SIGINT ended, as shells have it: 128 and the number of the signal."""


def leave_at_once() -> None:
    """Let SIGINT end the process as it is: in an import or at exit, an exception would show as a traceback."""
    _exchange(signal.default_int_handler, _leave)


def clean_up_first() -> None:
    """Let SIGINT raise KeyboardInterrupt again."""
    _exchange(_leave, signal.default_int_handler)


def _leave(*_: object) -> None:
    os._exit(EXIT_INTERRUPTED)


def _exchange(now: object, then: signal._HANDLER) -> None:
    """Set another handler, if it is ours to set: a shell that starts a command in the background ignores SIGINT."""
    if signal.getsignal(signal.SIGINT) is now:
        signal.signal(signal.SIGINT, then)
