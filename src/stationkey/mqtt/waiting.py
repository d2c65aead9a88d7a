"""Blocking calls and coroutines that a connection waits for, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, Final, TypeVar

from stationkey.errors import BrokerError
from stationkey.system.threads import Workers

T = TypeVar("T")

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for a broker to accept a connection, and for every later answer from it that is waited for."""
MAX_CONNECTING: Final = 8
"""Attempts to connect that may hang: a call that blocks forever, such as of a TPM, must not cost a thread each time."""


@cache
def _connecting() -> Workers:
    """Return the threads that connect; those of the whole process."""
    return Workers("mqtt-connect", MAX_CONNECTING)


async def in_thread(call: Callable[[], T]) -> T:
    """Return the result of a blocking call, made in a thread without which the process can end.

    Raises:
        BrokerError: `MAX_CONNECTING` of them hang, or this machine has no room for a thread.
    """
    try:
        future = _connecting().submit(call)
    except (RuntimeError, MemoryError) as error:
        raise BrokerError(
            f"no thread to connect with: {error}",
            reason="broker_unreachable",
            hint="does the look-up of a name hang, or the TPM?",
        ) from None
    return await asyncio.wrap_future(future)


async def unless(end: asyncio.Future[Any], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; or None where `end` comes first, and `work` was cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task, end], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
