"""The thread that runs the ledger's blocking calls for the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Concatenate, Final, ParamSpec, TypeVar

from stationkey.ledger import Ledger

P = ParamSpec("P")
T = TypeVar("T")

LEDGER_PATIENCE: Final = 120.0
"""Seconds that a call on the ledger's thread may take. Most take milliseconds; other users of it are waited for 5 s."""


class LedgerThread:
    """The thread that the ledger is used on while the event loop runs.

    Args:
        ledger: used by nobody else meanwhile; closed by whoever opened it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._closed = False
        self._begun: float | None = None  # when the call in hand began; None between calls
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def __call__(
        self, call: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Begin ``call(ledger, …)`` on the thread. It is finished, even where nobody waits for it any more.

        Raises:
            RuntimeError: the thread was closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                settle = partial(_succeed, future, call(self._ledger, *args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the waiter's, and the thread goes on
                settle = partial(_fail, future, error)
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(settle)

        if self._closed:
            raise RuntimeError("the ledger's thread has ended")
        self._calls.put(run)
        return future

    @property
    def trouble(self) -> str:
        """See `Database.trouble`."""
        return self._ledger.database.trouble

    @property
    def stuck(self) -> bool:
        """Whether the call in hand seems never to return: the disk, or a file system that is looked at, hangs."""
        begun = self._begun
        return begun is not None and time.monotonic() - begun > LEDGER_PATIENCE

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self._begun = time.monotonic()
            call()
            self._begun = None

    def close(self) -> None:
        """Wait for what is under way."""
        self._closed = True
        self._calls.put(None)
        self._thread.join()


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
