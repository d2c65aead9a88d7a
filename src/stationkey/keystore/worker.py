"""The one thread that owns the key store, and its replacement when a call hangs.

A TPM command has no timeout, and a context must not be used from two threads. So every use of a store is a job for this
thread, with a deadline that the caller enforces: a late result is discarded, key included.

A TPM cannot be interrupted, but the next job can be chosen: short jobs go before long ones, and keys are made ahead
only when no job waits. So a request for an EC key waits for at most the one RSA key that is being made.

If a call exceeds its deadline, the next job does not wait for it: another thread, which exists from the start, takes
over with its own store. The old store is abandoned, because cleaning up might unload keys that the new one has loaded.
When the call returns, its store is closed, and its thread can take over next time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import IntEnum, StrEnum
from typing import Any, Final, TypeVar

from msgspec import Struct

from stationkey.errors import KeyStoreError, Scope, StationKeyError
from stationkey.keystore.protocol import Abandonable, KeyStore, Timed
from stationkey.system.counters import OTHER, Durations
from stationkey.system.threads import Reply, Worker

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_ABANDONED: Final = 1
"""How many threads may be stuck in a call at a time, besides the one in use. Each holds a connection to the TPM, and is
there from the start."""

FAIR_SHARE: Final = 16
"""Short jobs that may precede a waiting long one: no flood of short ones starves the long ones."""


MAX_JOBS: Final = 4096
"""Most waiting jobs, those with a caller that gave up included: more than messages can be in flight. They stay queued
while the device hangs."""


class Turn(IntEnum):
    """When a job is done, among those that wait."""

    SHORT = 0
    """Milliseconds: an EC key, a signature, a proof."""
    LONG = 1
    """An RSA key: seconds, tens of seconds in a chip. After the short ones, but see `FAIR_SHARE`."""
    SPARE = 2
    """No request waits for it: done when idle."""


class Task(StrEnum):
    """What a job is for, where its time is counted apart from that of others."""

    NEW_EC_KEY = "new_ec_key"
    """A key and its CSR."""
    NEW_RSA_KEY = "new_rsa_key"
    POOLED_KEY = "pooled_key"
    """The CSR of a key that was made ahead."""
    MAKE_AHEAD = "make_ahead"
    PROOF = "proof"
    """A signature before a key becomes active."""
    LOAD = "load"
    """Whether a key can be loaded still."""
    LOOK = "look"
    """Return the algorithms that the key store supports."""
    DESTROY = "destroy"
    PROBE = "probe"
    """Whether it answers at all."""
    OTHER = OTHER


class _Job(Struct, frozen=True):
    run: Callable[[KeyStore], Any]
    expires: float
    timeout: float
    future: Future[Any] | Reply[Any]
    turn: Turn
    task: str


class Outcome(Struct, frozen=True):
    """How a job ended.

    Attributes:
        reason: of its error; empty where there was none.
        scope: of its error; None where there was none.
    """

    reason: str = ""
    scope: Scope | None = None

    @classmethod
    def of(cls, error: BaseException) -> Outcome:
        """The outcome of a job that failed with `error`."""
        if isinstance(error, StationKeyError):
            return cls(error.reason, error.scope)
        return cls("internal_error", Scope.REQUEST)


_SUCCESS: Final = Outcome()


class _Jobs:
    """The jobs that wait for the thread, and its idle time.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[Turn, deque[_Job]] = {turn: deque() for turn in Turn}
        self._lock = threading.Lock()
        self._short_in_a_row = 0
        self._wanted = 0  # jobs with a waiting caller, in hand or queued
        self._last_done = clock()
        self._durations: dict[str, Durations] = {}
        self.last: tuple[float, Outcome] | None = None  # when it ended, on the clock, and how

    def put(self, job: _Job) -> None:
        with self._lock:
            self._waiting[job.turn].append(job)
            self._wanted += job.turn is not Turn.SPARE

    def get(self) -> _Job:
        """Take the job whose turn it is. There is one for each `put`."""
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

    def note(self, job: _Job, begun: float, outcome: Outcome) -> None:
        """Count how long a job had the store, and remember how it ended."""
        now = self._clock()
        with self._lock:
            self._durations.setdefault(job.task, Durations()).add(now - begun)
            self.last = (now, outcome)

    @property
    def idle(self) -> float:
        with self._lock:
            return 0.0 if self._wanted else self._clock() - self._last_done

    @property
    def count(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def waiting(self) -> dict[Turn, int]:
        return {turn: len(waiting) for turn, waiting in self._waiting.items()}

    def durations(self) -> dict[str, tuple[list[int], float]]:
        with self._lock:
            return {task: (one.cumulative(), one.sum) for task, one in self._durations.items()}


class _Shift:
    """The jobs of one worker with its own store, until it is abandoned.

    Args:
        worker: whose thread it is.
        open_store: opens the store; called on that thread, when the first job comes.
        jobs: the shared queue.
        clock: seconds.
    """

    def __init__(
        self, worker: Worker, open_store: Callable[[], KeyStore], jobs: _Jobs, clock: Callable[[], float]
    ) -> None:
        self.worker = worker
        self.ended = False
        self._open_store = open_store
        self._jobs = jobs
        self._clock = clock
        self._store: KeyStore | None = None
        self._timed: Timed | None = None  # the same; to ask a protocol for each job takes longer than the call
        self._turn = threading.Lock()  # a job ends, or its shift is given up: never both at once
        self._abandoned = False
        self._expires: float | None = None  # when the job in hand is overdue; None between jobs
        self._stuck_from: float | None = None  # when it has had the store for its whole time; None between jobs

    @property
    def hung(self) -> bool:
        """Whether the job in hand is past its deadline."""
        expires = self._expires
        return expires is not None and self._clock() > expires

    @property
    def busy(self) -> bool:
        """Whether a job is in hand."""
        return self._expires is not None

    @property
    def stuck(self) -> bool:
        """Whether the job in hand has had the store for longer than its whole time, the wait before it left out."""
        stuck_from = self._stuck_from
        return stuck_from is not None and self._clock() > stuck_from

    def give_up(self) -> bool:
        """Do no further job after the overdue one; return False, and do nothing, if no job is overdue."""
        with self._turn:
            self._abandoned = self.hung
            store: object = self._store
            if self._abandoned and isinstance(store, Abandonable):
                store.abandon()
            return self._abandoned

    def do_next(self) -> None:
        """Do the job whose turn it is; on the worker's thread."""
        if self.ended:  # another shift does it
            return
        job = self._jobs.get()
        if not job.future.set_running_or_notify_cancel():
            self._jobs.done(job)
            return
        begun = self._clock()
        if begun >= job.expires:
            self._jobs.done(job)
            job.future.set_exception(overdue())
            return
        self._do(job, begun)
        self._jobs.done(job)
        with self._turn:
            self._expires = self._stuck_from = None
        if self._abandoned:
            self.end()

    def _do(self, job: _Job, begun: float) -> None:
        self._stuck_from = begun + job.timeout
        self._expires = job.expires
        outcome = _SUCCESS
        try:
            store = self._open()
            if self._timed is not None:
                self._timed.within(job.expires - begun)
            result = job.run(store)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the waiter's, and the thread goes on
            outcome = Outcome.of(error)
            # Given up, its words may only tell how the one that took over cleared its key away.
            job.future.set_exception(overdue() if self._abandoned else error)
        else:
            job.future.set_result(result)
        self._tidy()
        if not self._abandoned:
            self._jobs.note(job, begun, outcome)

    def end(self) -> None:
        """Close the store; on the worker's thread."""
        try:
            if self._store is not None:
                self._store.close()
        finally:
            self.ended = True

    def _tidy(self) -> None:
        """Unload the job's objects after its result was returned, still within its time."""
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
                self._timed = store if isinstance(store, Timed) else None
        return self._store


def overdue() -> KeyStoreError:
    """The error of a job that was not done in time."""
    return KeyStoreError(
        "the key store did not answer in time",
        reason="keystore_timeout",
        hint="it is busy with other requests, or the TPM is hung and needs a reset; nothing was kept of this one",
        transient=True,
        scope=Scope.DEVICE,
    )


class KeyStoreThread:
    """Runs jobs on the key store, one at a time, on its own thread.

    Args:
        open_store: opens the store; called in the thread that will own it, when the first job comes.
        clock: seconds, from any beginning; never set back.
        worker: makes the threads.
    """

    def __init__(
        self,
        open_store: Callable[[], KeyStore],
        *,
        clock: Callable[[], float] = time.monotonic,
        worker: type[Worker] = Worker,
    ) -> None:
        self._open_store = open_store
        self._clock = clock
        self._jobs = _Jobs(clock)
        self._lock = threading.Lock()
        self._abandoned: list[_Shift] = []
        self._workers = [worker(f"keystore-{number}", clock=clock) for number in range(1, 2 + MAX_ABANDONED)]
        self._shift = self._begin(self._workers[0])

    def _begin(self, worker: Worker) -> _Shift:
        return _Shift(worker, self._open_store, self._jobs, self._clock)

    def submit(
        self, run: Callable[[KeyStore], T], *, timeout: float, turn: Turn = Turn.SHORT, task: str = Task.OTHER
    ) -> Future[T]:
        """Queue a job.

        Args:
            run: the job; it gets the store.
            timeout: seconds from now after which the job is not begun any more, and counts as hung if it was.
            turn: which jobs go before it, and which after.
            task: its purpose, by which its time is counted.

        Returns:
            A future with the job's result or its error, which is a `StationKeyError` unless there is a fault in the
            job itself. The caller must give up after `timeout`: a hung call never completes it.
        """
        future: Future[T] = Future()
        self._queue(run, future, timeout=timeout, turn=turn, task=task)
        return future

    def ask(
        self, run: Callable[[KeyStore], T], *, timeout: float, turn: Turn = Turn.SHORT, task: str = Task.OTHER
    ) -> asyncio.Future[T]:
        """Queue a job as `submit` does, and return a future of the running event loop."""
        reply: Reply[T] = Reply()
        self._queue(run, reply, timeout=timeout, turn=turn, task=task)
        return reply.future

    def _queue(
        self, run: Callable[[KeyStore], T], future: Future[T] | Reply[T], *, timeout: float, turn: Turn, task: str
    ) -> None:
        now = self._clock()
        if self._jobs.count >= MAX_JOBS:
            future.set_exception(overdue())
            return
        with self._lock:
            self._take_over_if_hung()
            self._jobs.put(_Job(run, now + timeout, timeout, future, turn, task))
            self._shift.worker.put(self._shift.do_next)

    def _take_over_if_hung(self) -> None:
        """Give up the shift whose job is overdue, if a worker is free; that one does the jobs that wait."""
        self._abandoned = [shift for shift in self._abandoned if not shift.ended]
        taken = [shift.worker for shift in (self._shift, *self._abandoned)]
        spare = next((worker for worker in self._workers if worker not in taken), None)
        if spare is not None and self._shift.give_up():
            self._abandoned.append(self._shift)
            self._shift = self._begin(spare)
            for _ in range(sum(self.waiting.values())):
                spare.put(self._shift.do_next)

    @property
    def idle(self) -> float:
        """Return the seconds since the last job with a waiting caller; 0 during one, or while one is stuck."""
        return self._jobs.idle

    @property
    def hung(self) -> bool:
        """Whether the job in hand is past its deadline."""
        return self._shift.hung

    @property
    def stuck(self) -> bool:
        """Whether a call seems never to return: of the shift in use, or of one that was given up.

        Not the same as `hung`, which counts from when a job was asked for. Where many wait for a slow device, the one
        in hand may be overdue as soon as it begins, and the next one too; but each of them ends. Here a job has all of
        its time from when it began.
        """
        with self._lock:
            return any(shift.stuck for shift in (self._shift, *self._abandoned))

    @property
    def busy(self) -> bool:
        """Whether a job is in hand."""
        return self._shift.busy

    @property
    def abandoned(self) -> int:
        """How many shifts were given up whose call has not returned yet."""
        with self._lock:
            return sum(not shift.ended for shift in self._abandoned)

    @property
    def waiting(self) -> dict[Turn, int]:
        """How many jobs wait for their turn."""
        return self._jobs.waiting

    def durations(self) -> dict[str, tuple[list[int], float]]:
        """How long the jobs of each task had the store: see `Durations.cumulative`, and seconds in all."""
        return self._jobs.durations()

    @property
    def last(self) -> tuple[float, Outcome] | None:
        """How many seconds ago the last job ended, and how; None before the first.

        The caller may have given up before.
        """
        if self._jobs.last is None:
            return None
        at, outcome = self._jobs.last
        return self._clock() - at, outcome

    def close(self, timeout: float = 1.0) -> bool:
        """End the thread after the jobs queued so far, and close the store.

        Args:
            timeout: seconds to wait for it.

        Returns:
            Whether it ended in time. One that is stuck in a call is left behind.
        """
        with self._lock:
            shift = self._shift
            shift.worker.put(shift.end)
        for worker in self._workers:
            if worker is not shift.worker:
                worker.close(0)
        return shift.worker.close(timeout)


async def on_keystore(
    keystore: KeyStoreThread,
    job: Callable[[KeyStore], T],
    *,
    timeout: float,
    turn: Turn = Turn.SHORT,
    task: str = Task.OTHER,
) -> T:
    """The result of `job` on the key store's thread.

    Raises:
        KeyStoreError: it was not done within `timeout` seconds; a late result is discarded.
    """
    answer = keystore.ask(job, timeout=timeout, turn=turn, task=task)
    deadline = answer.get_loop().call_later(timeout, _give_up, answer)
    try:
        return await answer
    finally:
        deadline.cancel()


def _give_up(answer: asyncio.Future[T]) -> None:
    if not answer.done():
        answer.set_exception(overdue())
