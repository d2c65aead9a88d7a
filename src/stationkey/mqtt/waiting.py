"""Blocking calls and coroutines that a connection waits for, within bounds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from stationkey.errors import BrokerError

T = TypeVar("T")

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for a broker to accept a connection, and for every later answer from it that is waited for."""
MAX_CONNECTING: Final = 8
"""How many attempts to connect may hang. What blocks for ever, such as a TPM, must not cost a thread each time."""

_threads: Final = threading.BoundedSemaphore(MAX_CONNECTING)


async def in_thread(call: Callable[[], T], *, name: str) -> T:
    """The result of a blocking call; in a thread that, unlike the event loop's own, a process may end without.

    Raises:
        BrokerError: as many of them as there may be hang, or this machine has no room for another thread.
    """
    future: Future[T] = Future()
    if not _threads.acquire(blocking=False):
        raise BrokerError(
            f"{MAX_CONNECTING} attempts to connect hang, in the look-up of a name or in the TPM",
            reason="broker_unreachable",
        )

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the one who waits is to have it
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            _threads.release()

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except (RuntimeError, MemoryError) as error:
        _threads.release()
        raise BrokerError(f"no thread to connect with: {error}", reason="broker_unreachable") from None
    result = asyncio.wrap_future(future)
    # What comes when nobody waits any more is looked at, so that nobody is told that nobody looked.
    result.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(result)


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
