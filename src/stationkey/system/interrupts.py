"""End a command with status 130 on Ctrl-C, never with a traceback."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # typing takes 25 ms to import, in which Ctrl-C is not handled yet
if TYPE_CHECKING:
    from typing import Final

EXIT_INTERRUPTED: Final = 130
"""Exit status of a command that SIGINT ended, as in shells: 128 plus the signal's number."""


def leave_at_once() -> None:
    """Let SIGINT end the process at once: in an import or at exit, an exception would print a traceback."""
    _exchange(signal.default_int_handler, _leave)


def clean_up_first() -> None:
    """Let SIGINT raise KeyboardInterrupt again."""
    _exchange(_leave, signal.default_int_handler)


def _leave(*_: object) -> None:
    os._exit(EXIT_INTERRUPTED)


def _exchange(now: object, then: signal._HANDLER) -> None:
    """Replace the handler, unless SIGINT is ignored: a shell sets that for a command in the background."""
    if signal.getsignal(signal.SIGINT) is now:
        signal.signal(signal.SIGINT, then)
