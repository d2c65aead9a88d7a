"""Threads for calls that may block forever: a device, a disk, a name server.

A hung call costs its thread only: callers stop waiting, and the process ends without it.

Start workers before they are needed, and not on the event loop: `threading.Thread.start` waits for the thread's first
instruction, forever if memory is short.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Final, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
log = logging.getLogger(__name__)

_TRIES: Final = 200
_PAUSE: Final = 0.01
"""Seconds between tries to complete a future without memory."""


class Reply(Generic[T]):
    """A future of the running event loop, completed by another thread as a `concurrent.futures.Future` is.

    To wrap one of those takes two locks, and turns of the loop, for each call.

    Attributes:
        future: the future.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()

    def set_running_or_notify_cancel(self) -> bool:
        """Return whether somebody still waits."""
        return not self.future.done()

    def set_result(self, result: T) -> None:
        """Complete the future, unless nobody waits any more."""
        self._tell(self.future.set_result, result)

    def set_exception(self, error: BaseException) -> None:
        """Let the future fail, unless nobody waits any more."""
        self._tell(self.future.set_exception, error)

    def _tell(self, complete: Callable[[U], None], value: U) -> None:
        for _ in range(_TRIES):
            try:
                self._loop.call_soon_threadsafe(self._complete, complete, value)
            except MemoryError:  # that moment may pass; a lost reply would be waited for
                time.sleep(_PAUSE)
            except RuntimeError:  # the loop is closed
                return
            else:
                return

    def _complete(self, complete: Callable[[U], None], value: U) -> None:
        if not self.future.done():
            complete(value)


class Worker:
    """A daemon thread that runs calls one after another, and knows how long the current call has been running.

    Users take this class as an argument: the tests' simulation passes its own, which runs calls in virtual time.

    Args:
        name: of the thread.
        clock: seconds of a monotonic clock.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued = 0  # calls, the current one included
        self._begun: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        """Queue a call that handles its own errors."""
        with self._lock:
            self._calls.put(call)
            self._queued += 1

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call, and return a future with its result or its error.

        Cancelling the future only cancels the wait: the call is made.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        self.put(partial(_settle, future, call))
        return future

    def ask(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Queue a call as `submit` does, and return a future of the running event loop."""
        reply: Reply[T] = Reply()
        self.put(partial(_settle, reply, call))
        return reply.future

    @property
    def idle(self) -> bool:
        """Return whether no call runs or waits."""
        return not self._queued

    @property
    def running_for(self) -> float:
        """Return the seconds since the current call began; 0 between calls."""
        begun = self._begun
        return 0.0 if begun is None else self._clock() - begun

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._begun = self._clock()
                call()
            except BaseException:
                with suppress(Exception):  # the log line may fail without memory
                    log.exception("a call on the thread %s failed", self.name)
            self._begun = None
            with self._lock:
                self._queued -= 1

    def close(self, timeout: float | None = None) -> bool:
        """End the thread after the calls queued so far.

        Args:
            timeout: seconds to wait for that, or None for no limit.

        Returns:
            Whether it has ended. A hung thread is abandoned.
        """
        self._calls.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()


class Workers:
    """Up to `limit` workers with one call each, so that a hung call blocks no other.

    A worker that takes a call first starts the next worker if none is idle: the caller never starts a thread.

    Args:
        name: of the threads, before their number.
        limit: most calls that may hang.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._lock = threading.Lock()
        self._started = 1
        self._workers = [Worker(f"{name}-1")]

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call on an idle worker.

        Raises:
            RuntimeError: all workers are busy.
        """
        with self._lock:
            worker = next((worker for worker in self._workers if worker.idle), None)
            if worker is None:
                raise RuntimeError(f"{len(self._workers)} calls hang")
            worker.put(self._start_next)
            return worker.submit(call)

    def close(self) -> None:
        """End the threads as soon as their calls return."""
        with self._lock:
            for worker in self._workers:
                worker.close(0)

    def _start_next(self) -> None:
        with self._lock:
            if self._started >= self._limit or any(worker.idle for worker in self._workers):
                return
            self._started += 1
            number = self._started
        try:
            worker = Worker(f"{self._name}-{number}")  # without the lock, which the caller takes
        except (RuntimeError, MemoryError) as error:
            log.warning("thread %s-%d not started: %s", self._name, number, error)
            with self._lock:
                self._started -= 1
        else:
            with self._lock:
                self._workers.append(worker)


def _settle(future: Future[T] | Reply[T], call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - passed to the caller who waits
        future.set_exception(error)
