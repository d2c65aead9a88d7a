"""The thread that makes the ledger's blocking calls for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Concatenate, Final, ParamSpec, TypeVar

from stationkey.ledger import Ledger
from stationkey.ledger.messages import REQUEST
from stationkey.system.threads import Worker

P = ParamSpec("P")
T = TypeVar("T")

LEDGER_PATIENCE: Final = 120.0
"""Seconds after which a call counts as stuck. Most take milliseconds; another process with a lock is waited for 5 s."""


class LedgerThread:
    """Makes calls on a ledger, one at a time and in order, on one daemon thread.

    The thread is not an executor's: the interpreter joins those at exit, and a hung disk must not block that.

    Args:
        ledger: the ledger; not closed by this class, and not used elsewhere until `close`.
        worker: makes the thread.
    """

    def __init__(self, ledger: Ledger, *, worker: type[Worker] = Worker) -> None:
        self._ledger = ledger
        self._closed = False
        self._worker = worker("ledger")

    def __call__(
        self, call: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Queue ``call(ledger, ...)``. It is made even if its future is cancelled.

        Returns:
            A future of the running loop, with the call's result or error.

        Raises:
            RuntimeError: the thread is closed.
        """
        if self._closed:
            raise RuntimeError("the ledger's thread is closed")
        made = partial(call, self._ledger, *args, **kwargs)
        return self._worker.ask(partial(self._ledger.database.attempt, made))

    # Notes in memory: made by the caller's thread, because they wait for nothing.

    def mark_delivered(self, request_id: str, *, station: str = "") -> None:
        """Note that the broker has an answer; see `Answers.mark_delivered`."""
        self._ledger.answers.mark_delivered(request_id, station=station)

    def note_rejection(
        self, request_id: str, *, reason: str, message: str, now: int, name: str = REQUEST, station: str = ""
    ) -> None:
        """Note a rejected request or an ignored status; see `Rejections.note`."""
        self._ledger.rejections.note(request_id, reason=reason, message=message, now=now, name=name, station=station)

    @property
    def local(self) -> bool:
        """Whether this machine alone has the ledger; see `Engine.local`."""
        return self._ledger.database.local

    @property
    def trouble(self) -> str:
        """Reason of the last failure until the next successful write, or an empty text."""
        return self._ledger.database.trouble

    @property
    def stuck(self) -> bool:
        """Whether the current call has taken longer than `LEDGER_PATIENCE`: the disk or a mount hangs."""
        return self._worker.running_for > LEDGER_PATIENCE

    def close(self) -> None:
        """Wait for the queued calls and end the thread."""
        self._closed = True
        self._worker.close()
