"""Bounded waits of a connection for blocking calls and coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, Final, TypeVar

from stationkey.errors import BrokerError
from stationkey.system.threads import Workers

T = TypeVar("T")

CONNECT_TIMEOUT: Final = 10.0
"""Seconds to wait for a broker to accept a connection, and for each later answer."""
MAX_CONNECTING: Final = 8
"""Attempts to connect that may hang: a call that blocks forever, such as of a TPM, must not cost a thread each time."""


@cache
def _connecting() -> Workers:
    """Return the process's threads for connecting."""
    return Workers("mqtt-connect", MAX_CONNECTING)


async def in_thread(call: Callable[[], T]) -> T:
    """Return the result of a blocking call in a thread that does not keep the process alive.

    Raises:
        BrokerError: `MAX_CONNECTING` calls hang, or no thread can be started.
    """
    try:
        future = _connecting().submit(call)
    except (RuntimeError, MemoryError) as error:
        raise BrokerError(
            f"no thread to connect with: {error}",
            reason="broker_unreachable",
            hint="does name resolution or the TPM hang?",
        ) from None
    return await asyncio.wrap_future(future)


async def unless(end: asyncio.Future[Any], work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of `work`, or cancel it and return None if `end` comes first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task, end], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
