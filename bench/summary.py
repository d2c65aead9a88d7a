"""From samples to the few numbers that are kept of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from msgspec import Struct


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that `percent` of all are not above (nearest rank)."""
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)[max(math.ceil(len(samples) * percent / 100), 1) - 1]


class Summary(Struct, frozen=True, kw_only=True):
    """What is kept of a series of samples; all but `count` in the unit of the series.

    Attributes:
        count: how many samples there were.
        p99: with less than 100 samples it is the largest of them.
    """

    count: int
    median: float
    p10: float
    p90: float
    p99: float


def summarize(samples: Sequence[float]) -> Summary:
    """Summary of a series, rounded to four significant digits: the rest is noise."""
    return Summary(
        count=len(samples),
        median=_rounded(statistics.median(samples)),
        p10=_rounded(percentile(samples, 10)),
        p90=_rounded(percentile(samples, 90)),
        p99=_rounded(percentile(samples, 99)),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
