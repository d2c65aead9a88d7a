"""A rate limit: an allowance that is spent and grows again. Pure: the clock is passed in."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

MINUTE: Final = 60_000_000_000
"""Nanoseconds."""
_LONG_AGO: Final = -(2**63)
MAX_BUCKETS: Final = 4096
"""Buckets that are remembered, some 200 bytes each."""


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

    @property
    def full_at(self) -> int:
        """When it will be full, nanoseconds of the clock of `take`."""
        return self._full_at


class Allowances:
    """A token bucket for each name. Names may come from the wire, so only so many are remembered.

    A full bucket is like a new one, and can be forgotten. If all are in use, those that will be full first are
    forgotten: the names that have spent least.

    Args:
        per_minute: see `TokenBucket`.
        burst: see `TokenBucket`.
        most: buckets that are remembered.
    """

    def __init__(self, *, per_minute: float, burst: int, most: int = MAX_BUCKETS) -> None:
        self._per_minute = per_minute
        self._burst = burst
        self._most = most
        self._buckets: dict[Hashable, TokenBucket] = {}

    def __len__(self) -> int:
        """Return how many buckets are remembered."""
        return len(self._buckets)

    def take(self, name: Hashable, now: int) -> bool:
        """Take a token from the bucket of a name, if there is one; `now` as for `TokenBucket.take`."""
        bucket = self._buckets.get(name)
        if bucket is None:
            if len(self._buckets) >= self._most:
                self._forget(now)
            bucket = self._buckets[name] = TokenBucket(per_minute=self._per_minute, burst=self._burst)
        return bucket.take(now)

    def _forget(self, now: int) -> None:
        """Forget the full buckets, and at least a quarter of all, so that this is rarely done."""
        by_level = sorted(self._buckets.items(), key=lambda named: named[1].full_at)
        least = max(1, self._most // 4)
        self._buckets = {
            name: bucket for number, (name, bucket) in enumerate(by_level) if number >= least and bucket.full_at > now
        }
