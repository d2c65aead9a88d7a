"""One thread of control: an event loop in virtual time, and workers whose calls run when the scheduler says so.

A worker's calls run on a thread of the system, so that one may stop in the middle of what it does, as a call to a TPM
or a disk that hangs. But just one thread runs at a time: the scheduler hands control to one and waits until it stops or
is done.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio.base_events import BaseEventLoop
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final

from simulation.machine import Machine
from stationkey.system.threads import Worker

NEVER: Final = 1 << 62
"""Nanoseconds: a call that hangs until somebody wakes it."""
_NANOSECONDS: Final = 10**9


class Killed(BaseException):
    """Ends what a thread was doing when its process ended."""


class _Hand:
    """A thread of the system that runs what it is given, and is used again."""

    spare: ClassVar[list[_Hand]] = []

    def __init__(self) -> None:
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._job: Callable[[], None] = lambda: None
        self.busy = False
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    @classmethod
    def take(cls) -> _Hand:
        return cls.spare.pop() if cls.spare else cls()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            try:
                self._job()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 - it is the scheduler's
                self._error = error
            self.busy = False
            self._back.release()

    def run(self, job: Callable[[], None]) -> None:
        """Run a job until it stops or is done."""
        self._job, self.busy = job, True
        self.go_on()

    def go_on(self) -> None:
        """Go on with the job that has stopped."""
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def stop(self) -> None:
        """Let the scheduler go on; called within the job."""
        self._back.release()
        self._go.acquire()


class SimulatedWorker(Worker):
    """A worker whose calls run, or go on, at each `turn`."""

    scheduler: ClassVar[Scheduler]

    def __init__(self, name: str, *, clock: Callable[[], float] | None = None) -> None:
        self.name = name
        self._clock = clock or self.scheduler.seconds
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._queued = 0
        self._begun: float | None = None
        self._hand = _Hand.take()
        self._killed = False
        self.wakes = 0
        self.scheduler.workers.append(self)

    def put(self, call: Callable[[], None]) -> None:
        if self not in self.scheduler.workers:
            return  # its process has ended
        self._queued += 1
        self._waiting.append(call)

    @property
    def ready(self) -> bool:
        """Whether a turn would do something."""
        return self._queued > 0 and self.wakes <= self.scheduler.machine.now

    @property
    def in_hand(self) -> bool:
        """Whether it stands in the middle of a call."""
        return self._hand.busy

    def turn(self) -> None:
        """Run the next call, or go on with the one that has stopped."""
        self.wakes = 0
        self.scheduler.running, before = self, self.scheduler.running
        try:
            if self._hand.busy:
                self._hand.go_on()
            else:
                self._begun = self._clock()
                self._hand.run(self._waiting.popleft())
        finally:
            self.scheduler.running = before
        if not self._hand.busy:
            self._begun = None
            self._queued -= 1

    def stop_until(self, wakes: int) -> None:
        """Stop in the middle of the call in hand; called within it."""
        self.wakes = wakes
        self._hand.stop()
        if self._killed:
            raise Killed

    def close(self, timeout: float | None = None) -> bool:
        """Run what is queued, as far as the time allows."""
        machine = self.scheduler.machine
        end = NEVER if timeout is None else machine.now + int(timeout * _NANOSECONDS)
        while self._queued and not self.scheduler.ended:
            if self.wakes > end or (timeout is not None and timeout <= 0):
                return False
            machine.pass_by(self.wakes - machine.now)
            self.turn()
        return True

    def kill(self) -> None:
        """End it with its process."""
        self._killed = True
        self._waiting.clear()
        while self._hand.busy:
            self.scheduler.running = self
            self._hand.go_on()
        self.scheduler.running = None
        _Hand.spare.append(self._hand)


class _NoSelector:
    """Nothing comes from outside."""

    def select(self, _timeout: float | None) -> list[Any]:
        return []

    def close(self) -> None:
        pass


class _Task(asyncio.Task[Any]):
    """A task whose place in a set is the same in each run."""

    count: ClassVar[int] = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _Task.count += 1
        self._number = _Task.count
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self._number

    __eq__ = object.__eq__


class VirtualLoop(BaseEventLoop):
    """An event loop that waits for nobody: `turn` runs what is ready."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine
        self._selector = _NoSelector()
        self.faults: list[str] = []
        self.set_exception_handler(self._note)
        _Task.count = 0
        self.set_task_factory(lambda loop, coroutine, **options: _Task(coroutine, loop=loop, **options))

    def _note(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), asyncio.CancelledError | Killed):
            self.faults.append(f"{context['message']}: {context.get('exception')!r}")

    def _process_events(self, _events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def time(self) -> float:
        return self._machine.now / _NANOSECONDS

    @property
    def wakes(self) -> int:
        """When something is ready, in nanoseconds; 0 for now."""
        if self._ready:  # type: ignore[attr-defined] # as long as asyncio has had a loop
            return 0
        timers = self._scheduled  # type: ignore[attr-defined] # a heap
        if timers and timers[0].cancelled():
            return 0  # a turn takes it away
        return -int(-timers[0].when() * _NANOSECONDS // 1) if timers else NEVER

    def turn(self) -> None:
        """Run what is ready now, and nothing that becomes ready by it."""
        self.stop()
        self.run_forever()


class Scheduler:
    """The loop and the workers of one process.

    Args:
        machine: whose clock it is.

    Attributes:
        running: the worker that has control, or None for the loop.
        ended: whether the process has ended.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.loop = VirtualLoop(machine)
        self.workers: list[SimulatedWorker] = []
        self.running: SimulatedWorker | None = None
        self.ended = False
        SimulatedWorker.scheduler = self
        machine.sleep = self.pause

    def seconds(self) -> float:
        return self.machine.now / _NANOSECONDS

    def pause(self, nanoseconds: int) -> None:
        """Let time pass for the one who has control, and others go on meanwhile. The loop stops for nobody."""
        if self.running is None:
            self.machine.pass_by(min(nanoseconds, 600 * _NANOSECONDS))
        else:
            self.running.stop_until(min(NEVER, self.machine.now + nanoseconds))

    def turns(self) -> list[Callable[[], None]]:
        """What can run now."""
        found: list[Callable[[], None]] = [worker.turn for worker in self.workers if worker.ready]
        if self.loop.wakes <= self.machine.now:
            found.append(self.loop.turn)
        return found

    @property
    def wakes(self) -> int:
        """When the next one can run, in nanoseconds."""
        return min([self.loop.wakes, *(worker.wakes for worker in self.workers if worker._queued)])  # noqa: SLF001

    def end(self) -> None:
        """End the process: whatever stands in the middle of something goes no further."""
        self.ended = True
        for worker in self.workers:
            worker.kill()
        self.workers.clear()
        for _ in range(3):
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            for _ in range(4 if tasks else 0):
                self.loop.turn()
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined] # noqa: SLF001 - it was killed
        self.loop.close()
