"""Delays between retries."""

from __future__ import annotations

import random


class Backoff:
    """Delays that double from `first` to `limit`.

    Args:
        first: first delay in seconds.
        limit: longest delay in seconds.
        jitter: share of a delay by which it may be shortened at random, so that many clients do not retry together.
    """

    def __init__(self, first: float, limit: float, *, jitter: float = 0.0) -> None:
        self._first = first
        self._limit = limit
        self._jitter = jitter
        self.delay = first
        """Next delay in seconds, without jitter."""

    def next(self) -> float:
        """Return the seconds to wait now."""
        delay = self.delay
        self.delay = min(2 * delay, self._limit)
        return delay * random.uniform(1.0 - self._jitter, 1.0)  # noqa: S311 - spreads load, guards nothing

    def lower(self, delay: float) -> None:
        """Let the next delay be `delay` seconds at most."""
        self.delay = min(self.delay, delay)

    def reset(self) -> None:
        """Start over with the first delay."""
        self.delay = self._first
