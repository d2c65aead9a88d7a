"""From the event loop to the blocking world: to the ledger's thread, and to the key store's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from stationkey.keystore import KeyStore
from stationkey.keystore.thread import KeyStoreThread, overdue
from stationkey.ledger import Ledger

P = ParamSpec("P")
T = TypeVar("T")


class LedgerThread:
    """The thread that the ledger is used on while the event loop runs.

    Args:
        ledger: used by nobody else meanwhile; closed by whoever opened it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    async def __call__(self, call: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``call(ledger, …)`` on the thread. What was begun is finished, even where nobody waits for it any more."""
        return await asyncio.shield(
            asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(self._ledger, *args, **kwargs))
        )

    def close(self) -> None:
        """Wait for what is under way."""
        self._thread.shutdown()


async def on_keystore(keystore: KeyStoreThread, job: Callable[[KeyStore], T], *, timeout: float) -> T:
    """The result of `job` on the key store's thread.

    Raises:
        KeyStoreError: it was not done within `timeout` seconds; what comes later is thrown away.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(keystore.submit(job, timeout=timeout)), timeout)
    except TimeoutError:
        raise overdue() from None
