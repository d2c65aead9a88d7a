"""The one thread that owns the key store, and what happens when a call on it never returns.

A TPM command blocks without a time limit, and a context must not be used from two threads. So every use of a store is a
job for this thread, each with a deadline that the one who waits enforces: what comes too late is thrown away, key
included.

A TPM cannot be interrupted, but what comes next can be chosen: short jobs go before long ones, and keys are made ahead
only when nobody waits. So a request for an EC key waits for one RSA key at the most, the one in hand.

Where a call is still out past its deadline, the next job is not made to wait for it for ever: the thread is
given up, a new one with a store of its own takes over, and the old one ends as soon as its call returns. From then on
the old store is abandoned: were it to tidy up in the TPM, it might unload what the new one has just loaded.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, TypeVar

from stationkey.errors import KeyStoreError
from stationkey.keystore import Abandonable, KeyStore

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_ABANDONED: Final = 1
"""How many threads may be stuck in a call at a time, besides the one in use. Each holds a connection to the TPM."""

FAIR_SHARE: Final = 16
"""How many short jobs may go before a long one that waits: no flood of the ones keeps the others out for ever."""


class Turn(IntEnum):
    """When a job is done, among those that wait."""

    SHORT = 0
    """Milliseconds: an EC key, a signature, a proof."""
    LONG = 1
    """An RSA key: seconds, tens of seconds in a chip. After the short ones, but see `FAIR_SHARE`."""
    SPARE = 2
    """Nobody waits for it: when there is nothing else to do."""


@dataclass(frozen=True, slots=True)
class _Job:
    run: Callable[[KeyStore], Any]
    expires: float
    future: Future[Any]
    turn: Turn


class _Jobs:
    """What waits for the thread, and how long nobody has wanted anything of it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[Turn, deque[_Job]] = {turn: deque() for turn in Turn}
        # One entry for each job, and None for the end: to wait on this is quicker than on a threading.Condition.
        self._arrivals: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._short_in_a_row = 0
        self._wanted = 0  # jobs that somebody waits for, in hand or not yet
        self._last_done = clock()

    def put(self, job: _Job) -> None:
        with self._lock:
            self._waiting[job.turn].append(job)
            self._wanted += job.turn is not Turn.SPARE
        self._arrivals.put(True)

    def end(self) -> None:
        """Let `get` give None once the jobs that are here now are done."""
        self._arrivals.put(None)

    def get(self) -> _Job | None:
        if self._arrivals.get() is None:
            return None
        with self._lock:
            turns = [turn for turn in Turn if self._waiting[turn]]
            turn = turns[0]
            if turn is Turn.SHORT and turns[1:2] == [Turn.LONG] and self._short_in_a_row >= FAIR_SHARE:
                turn = Turn.LONG
            self._short_in_a_row = self._short_in_a_row + 1 if turn is Turn.SHORT else 0
            return self._waiting[turn].popleft()

    def done(self, job: _Job) -> None:
        if job.turn is not Turn.SPARE:
            with self._lock:
                self._wanted -= 1
                self._last_done = self._clock()

    @property
    def idle(self) -> float:
        with self._lock:
            return 0.0 if self._wanted else self._clock() - self._last_done


class _Worker(threading.Thread):
    """Takes jobs from the shared queue until it is told to stop or given up."""

    def __init__(
        self,
        name: str,
        open_store: Callable[[], KeyStore],
        jobs: _Jobs,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(name=name, daemon=True)  # a call that never returns must not keep the process from ending
        self._open_store = open_store
        self._jobs = jobs
        self._clock = clock
        self._store: KeyStore | None = None
        self._turn = threading.Lock()  # a job ends, or its worker is given up: never both at once
        self._abandoned = False
        self._expires: float | None = None  # when the job in hand is overdue; None between jobs

    @property
    def hung(self) -> bool:
        """Whether the job in hand is past its deadline."""
        expires = self._expires
        return expires is not None and self._clock() > expires

    def give_up(self) -> bool:
        """End the thread as soon as its overdue job returns; False, and nothing done, where there is no such job."""
        with self._turn:
            self._abandoned = self.hung
            store: object = self._store
            if self._abandoned and isinstance(store, Abandonable):
                store.abandon()
            return self._abandoned

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                break
            if not job.future.set_running_or_notify_cancel():
                self._jobs.done(job)
                continue
            if self._clock() >= job.expires:
                self._jobs.done(job)
                job.future.set_exception(overdue())
                continue
            self._expires = job.expires
            try:
                result = job.run(self._open())
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the waiter's, and the thread goes on
                # Given up, its words may only tell how the one that took over cleared its key away.
                job.future.set_exception(overdue() if self._abandoned else error)
            else:
                job.future.set_result(result)
            self._tidy()
            self._jobs.done(job)
            with self._turn:
                self._expires = None
                if self._abandoned:
                    break
        if self._store is not None:
            self._store.close()

    def _tidy(self) -> None:
        """Unload what the job used, with its result on the way, and still within its time."""
        try:
            if self._store is not None:
                self._store.unload()
        except Exception:
            # It never fails, says the protocol. A store for which that is not true must not end the thread.
            log.exception("a fault of the key store: its keys could not be unloaded")

    def _open(self) -> KeyStore:
        if self._store is None:
            store = self._open_store()
            with self._turn:
                if self._abandoned:
                    raise overdue()
                self._store = store
        return self._store


def overdue() -> KeyStoreError:
    """The error of a job that was not done in time."""
    return KeyStoreError(
        "the key store did not answer in time",
        reason="keystore_timeout",
        hint="it is busy with other requests, or the TPM is hung and needs a reset; nothing was kept of this one",
    )


class KeyStoreThread:
    """Runs jobs on the key store, one at a time, on a thread of its own.

    Args:
        open_store: opens the store; called in the thread that will own it, when the first job comes.
        clock: seconds, from any beginning; never set back.
    """

    def __init__(self, open_store: Callable[[], KeyStore], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._open_store = open_store
        self._clock = clock
        self._jobs = _Jobs(clock)
        self._lock = threading.Lock()
        self._abandoned: list[_Worker] = []
        self._count = 0
        self._worker = self._start()

    def _start(self) -> _Worker:
        self._count += 1
        worker = _Worker(f"keystore-{self._count}", self._open_store, self._jobs, self._clock)
        worker.start()
        return worker

    def submit(self, run: Callable[[KeyStore], T], *, timeout: float, turn: Turn = Turn.SHORT) -> Future[T]:
        """Queue a job.

        Args:
            run: the job; it gets the store.
            timeout: seconds from now after which the job is not begun any more, and counts as hung if it was.
            turn: which jobs go before it, and which after.

        Returns:
            A future with the job's result or its error, which is a `StationKeyError` unless there is a fault in the
            job itself. Whoever waits for it must give up after `timeout` on his own: a hung call fulfils nothing.
        """
        future: Future[T] = Future()
        now = self._clock()
        with self._lock:
            self._abandoned = [worker for worker in self._abandoned if worker.is_alive()]
            if len(self._abandoned) < MAX_ABANDONED and self._worker.give_up():
                self._abandoned.append(self._worker)
                self._worker = self._start()
        self._jobs.put(_Job(run, now + timeout, future, turn))
        return future

    @property
    def idle(self) -> float:
        """Seconds since the last job ended that somebody waited for; 0 while there is one, or while one is stuck."""
        return self._jobs.idle

    @property
    def hung(self) -> bool:
        """Whether the job in hand is past its deadline."""
        return self._worker.hung

    def close(self, timeout: float = 1.0) -> bool:
        """End the thread after the jobs queued so far, and close the store.

        Args:
            timeout: seconds to wait for it.

        Returns:
            Whether it ended in time. One that is stuck in a call is left behind.
        """
        self._jobs.end()
        self._worker.join(timeout)
        return not self._worker.is_alive()
