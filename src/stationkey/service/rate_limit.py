"""How often something may be done: an allowance that is spent and grows again. Pure: the clock is passed in."""

from __future__ import annotations

from typing import Final

MINUTE: Final = 60_000_000_000
"""Nanoseconds."""
_LONG_AGO: Final = -(2**63)


class TokenBucket:
    """An allowance that is spent at once or bit by bit, and grows again with time.

    In whole nanoseconds, so that years of it add up to no error: kept is when the bucket will be full again, and each
    token puts that off by the time that one takes to grow. So in any span of time no more are given than the burst, and
    what grows in that span.

    Args:
        per_minute: how many tokens grow in a minute; more than 0.
        burst: how many there are at most, and at the beginning.
    """

    def __init__(self, *, per_minute: float, burst: int) -> None:
        numerator, denominator = float(per_minute).as_integer_ratio()
        self._one = -(-MINUTE * denominator // numerator)  # rounded up: never more than was said
        self._all = burst * self._one
        self._now = self._full_at = _LONG_AGO

    def take(self, now: int) -> bool:
        """Take a token, if there is one.

        Args:
            now: nanoseconds, of a clock that never goes back; where it does all the same, time stands still meanwhile.
        """
        self._now = now = max(self._now, now)
        full_at = max(self._full_at, now) + self._one
        if full_at - now > self._all:
            return False
        self._full_at = full_at
        return True
