"""How long the daemon has run, which is what the time of a key is counted in."""

from __future__ import annotations

import time
from collections.abc import Callable


class RunningTime:
    """How long the daemon has run, all runs together; goes on from what the ledger says.

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
        """Milliseconds."""
        return self._so_far + int((self._clock() - self._started) * 1000)
