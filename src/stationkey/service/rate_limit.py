"""A rate limit: an allowance that is spent and grows again. Pure: the clock is passed in."""

from __future__ import annotations

from typing import Final

MINUTE: Final = 60_000_000_000
"""Nanoseconds."""
_LONG_AGO: Final = -(2**63)


class TokenBucket:
    """A token bucket.

    Calculates in whole nanoseconds, so that no error accumulates. The state is the time when the bucket will be full
    again; each token postpones it by the time that one takes to grow. So no period gets more tokens than the burst plus
    those that grow in it.

    Args:
        per_minute: tokens that grow in a minute; more than 0.
        burst: tokens of a full bucket, which it is at first.
    """

    def __init__(self, *, per_minute: float, burst: int) -> None:
        numerator, denominator = float(per_minute).as_integer_ratio()
        self._one = -(-MINUTE * denominator // numerator)  # rounded up: never more than configured
        self._all = burst * self._one
        self._now = self._full_at = _LONG_AGO

    def take(self, now: int) -> bool:
        """Take a token, if there is one.

        Args:
            now: nanoseconds of a monotonic clock; if it goes back, time stands still meanwhile.
        """
        self._now = now = max(self._now, now)
        full_at = max(self._full_at, now) + self._one
        if full_at - now > self._all:
            return False
        self._full_at = full_at
        return True
