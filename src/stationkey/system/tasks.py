"""Long-running tasks, each restarted after an unhandled error.

An unhandled error is counted and logged with its reason, and the task is restarted after a delay. It does not end the
daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from stationkey.errors import StationKeyError
from stationkey.system.backoff import Backoff
from stationkey.system.counters import Counts

log = logging.getLogger(__name__)

RETRY_FIRST: Final = 1.0
RETRY_LAST: Final = 60.0
"""Seconds before a failed task is restarted; doubled each time, and reset after `RETRY_LAST` seconds without a
failure."""

Work = Callable[[], Coroutine[Any, Any, None]]
"""Starts the task's coroutine."""


def note_failure(error: BaseException, task: str, failures: Counts, **about: object) -> None:
    """Count an unhandled error by task and reason, and log it with `about`. Never raises."""
    reason = unforeseen(error).reason
    with suppress(Exception):  # even this may fail without memory
        failures.add(task, reason)
        log.error("task failed", extra={"task": task, "reason": reason, **about}, exc_info=error)


def unforeseen(error: BaseException) -> StationKeyError:
    """Return the `StationKeyError` for an unforeseen exception."""
    match error:
        case StationKeyError():
            return error
        case MemoryError():
            return StationKeyError("out of memory", reason="out_of_memory")
        case _:
            return StationKeyError(f"unexpected {type(error).__name__}", reason="internal_error")


async def keep_running(work: Work, task: str, failures: Counts, *, backoff: Backoff | None = None) -> None:
    """Run `work` to its end; restart it after a delay whenever it fails.

    Args:
        work: starts the task's coroutine.
        task: name of the task.
        failures: counts failures, by task and reason.
        backoff: the delays; `RETRY_FIRST` to `RETRY_LAST` by default.
    """
    backoff = backoff or Backoff(RETRY_FIRST, RETRY_LAST)
    clock = asyncio.get_running_loop().time
    begun, delay = clock(), 0.0
    while True:
        try:
            if delay:
                await asyncio.sleep(delay)
            begun = clock()
            await work()
        except Exception as error:  # noqa: BLE001 - the boundary
            note_failure(error, task, failures)
            if clock() - begun > RETRY_LAST:
                backoff.reset()
            delay = backoff.next()
        else:
            return


@asynccontextmanager
async def background(works: Mapping[str, Work], failures: Counts) -> AsyncIterator[None]:
    """Keep tasks running while the block runs, then cancel them.

    Args:
        works: the tasks, by name.
        failures: counts failures, by task and reason.
    """
    tasks = [asyncio.create_task(keep_running(work, name, failures), name=name) for name, work in works.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
