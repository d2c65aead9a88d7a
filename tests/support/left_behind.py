"""What calls leave behind, told from whatever else the process of the tests keeps meanwhile."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import prometheus_client

import stationkey

CALLS: Final = 50
BATCHES: Final = 4
"""The first one fills caches and is not counted."""
OURS: Final = tuple(
    tracemalloc.Filter(inclusive=True, filename_pattern=f"{Path(package.__file__ or '').parent}/*")
    for package in (stationkey, prometheus_client)
)


async def left_behind(call: Callable[[], Awaitable[object]]) -> float:
    """Blocks of memory that a call leaves behind, of those that the package and its library for metrics have allocated.

    A leak grows with every batch of calls. A cache, or a thread of another test, does not: the smallest growth counts.
    Blocks of asyncio are not counted: it keeps the handles of cancelled timers, and drops them a hundred at a time.
    """
    growths, before = [], 0
    tracemalloc.start()
    try:
        for _ in range(BATCHES):
            for _ in range(CALLS):
                await call()
            gc.collect()
            now = len(tracemalloc.take_snapshot().filter_traces(OURS).traces)
            growths.append(now - before)
            before = now
    finally:
        tracemalloc.stop()
    return min(growths[1:]) / CALLS
