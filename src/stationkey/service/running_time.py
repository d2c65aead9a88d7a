"""Running time: how long the daemon has run, in which the periods of keys are counted."""

from __future__ import annotations

import time
from collections.abc import Callable


class RunningTime:
    """Running time of all runs together, continued from the ledger's value.

    Args:
        so_far: milliseconds in earlier runs.
        clock: seconds of a clock that never jumps; the default goes on while the machine is suspended.
    """

    def __init__(
        self, so_far: int, clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    ) -> None:
        self._so_far = so_far
        self._clock = clock
        self._started = clock()

    def now(self) -> int:
        """Return the running time in milliseconds."""
        return self._so_far + int((self._clock() - self._started) * 1000)
