"""Tasks that last as long as the daemon, and the boundary around each of them.

An error that a task does not handle is counted, logged with its reason, and the task is started again after a delay.
It ends neither the task nor the daemon.
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
"""Seconds before a task that failed is started again; doubled in between, and back to the first after `RETRY_LAST`
seconds without a failure."""

Work = Callable[[], Coroutine[Any, Any, None]]
"""Starts the task's coroutine."""


def note_failure(error: BaseException, task: str, failures: Counts, **about: object) -> None:
    """Count an error that a task did not handle, by task and reason, and log it with `about`. Never raises."""
    reason = unforeseen(error).reason
    with suppress(Exception):  # where memory is short, even this may fail
        failures.add(task, reason)
        log.error("task failed", extra={"task": task, "reason": reason, **about}, exc_info=error)


def unforeseen(error: BaseException) -> StationKeyError:
    """Return the error by which one is known that no code foresaw."""
    match error:
        case StationKeyError():
            return error
        case MemoryError():
            return StationKeyError("out of memory", reason="out_of_memory")
        case _:
            return StationKeyError(f"unexpected {type(error).__name__}", reason="internal_error")


async def keep_running(work: Work, task: str, failures: Counts, *, backoff: Backoff | None = None) -> None:
    """Run `work` to its end; start it again, after a delay, whenever it fails.

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
    """Keep tasks running for the length of a block, then cancel them.

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
