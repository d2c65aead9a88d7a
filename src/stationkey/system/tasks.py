"""Tasks that run as long as the daemon does, whatever happens in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from stationkey.system.backoff import Backoff

log = logging.getLogger(__name__)

_FIRST: Final = 1.0
_LIMIT: Final = 60.0
"""Seconds before a task that failed runs again; doubled in between."""


@asynccontextmanager
async def kept_running(
    tasks: Mapping[str, Callable[[], Awaitable[None]]], *, failed: Callable[[str], None]
) -> AsyncIterator[None]:
    """Run tasks until the block is left, then cancel them.

    An exception that escapes a task is a fault of this program. It costs that run of the task and nothing else: it is
    logged with its traceback, and the task runs again.

    Args:
        tasks: functions that start a run, by name. One that returns is done.
        failed: told the name of a task that failed.
    """
    running = [asyncio.create_task(_keep_running(name, start, failed), name=name) for name, start in tasks.items()]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _keep_running(name: str, start: Callable[[], Awaitable[None]], failed: Callable[[str], None]) -> None:
    backoff = Backoff(_FIRST, _LIMIT)
    while True:
        try:
            await start()
        except Exception:
            log.exception("task failed, a fault of stationkey", extra={"task": name, "reason": "internal_error"})
            failed(name)
        else:
            return
        await asyncio.sleep(backoff.next())
