"""One simulation: a station, its peers, and a choice at every step of what happens next.

A step lets one of those who can run do so (the event loop, a worker, the broker), lets time pass, or brings something
about: a message, a fault, a command, a kill. The choice of step n is drawn from the seed and n alone, so a step can be
left out and the others stay what they are: that is how a failure is shrunk.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import random
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from simulation.broker import Broker, Ears, Entry
from simulation.checks import Checks, Violation
from simulation.josev import OWNERS, Josev
from simulation.keystores import CODES, Tpm
from simulation.machine import BOOT, CHANGES, Image, Machine, Operation
from simulation.scheduler import SimulatedWorker
from simulation.station import Setting, Station
from stationkey.cli.keys import keys as keys_command
from stationkey.errors import StationKeyError
from stationkey.ledger.lifecycle import KeyState

_SECOND: Final = 10**9
_MAY_FAIL: Final = (CHANGES | {Operation.OPEN}) - {Operation.CREATED}  # which is told once it is done
_QUIET: Final = 400
"""Virtual seconds of the quiet time at the end, after everything was put right."""
_REST: Final = 90
"""Virtual seconds after which no call hangs any more."""
_QUIET_STEPS: Final = 4000

FAULTS: Final[dict[str, tuple[int, str]]] = {
    "tpm": (6, "TPM: a return code, gone, hung, slow, and well again"),
    "keys": (1, "TPM: cleared, or one key lost"),
    "connection": (4, "broker: the connection is cut"),
    "broker": (3, "broker: down, up, crashed, session lost, answers refused"),
    "full": (3, "disk: full, and room again"),
    "disk": (5, "disk: the n-th operation from now fails, is slow, or is the last before the power goes"),
    "power": (3, "the power goes, or the daemon is killed"),
    "stop": (1, "the daemon is stopped and started"),
    "clock": (1, "the clock on the wall jumps"),
    "time": (2, "minutes to an hour pass"),
    "files": (8, "Josev's directory: files half written, moved, linked, unreadable, also while it is read"),
    "command": (2, "keys retire, restore, confirm, destroy or mark-compromised, beside the daemon"),
}
"""What may go wrong: how often, and what it is. Each seed has some of them."""
_COMMANDS: Final = (["retire"], ["restore"], ["confirm"], ["destroy", "--yes"], ["mark-compromised", "--yes"])
_LIFE: Final = {"ask": 10, "install": 10, "delete": 4, "again": 1, "nonsense": 1}


class World:
    """One simulation.

    Args:
        seed: of every choice.
        root: a folder for it alone, in memory.
        left_out: steps in which nothing is brought about.
        trace: told of each thing that happens.

    Attributes:
        steps: how many were taken.
        acted: those that brought something about.
        digest: of who could run at each step, who did, and when: equal for runs that are the same.
    """

    def __init__(
        self, seed: int, root: Path, *, left_out: Collection[int] = (), trace: Callable[[str], None] | None = None
    ) -> None:
        self.seed = seed
        self.steps = 0
        self._left_out = left_out
        self._trace = trace
        random.seed(seed)
        rng = random.Random(seed)
        self.machine = Machine(root, seed)
        self.machine.set_wall(rng.choice((0, 1_790_000_000 * _SECOND)))
        self.setting = Setting.of(rng)
        certificates = root / "certificates"
        certificates.mkdir()
        self.tpm = Tpm(random.Random(seed + 1))
        self.broker = Broker(random.Random(seed + 2), Ears(self._answered, self._acknowledging))
        owners = rng.sample(OWNERS, rng.choice((1, 1, 2, 5)))
        state_dir = self.machine.disk / "state"
        self.josev = Josev(random.Random(seed + 3), certificates, state_dir, owners, self.broker.take)
        self.checks = Checks(self.machine, self.setting, self.josev, self.tpm)
        self.station: Station | None = None
        self._violation: Violation | None = None
        self._died: Image | None = None
        self._wounded = False  # whether the disk failed since the daemon was started
        self._fault: tuple[int, str] | None = None  # in so many operations of the disk, what
        self._files_fault = 0
        self._before = self.machine.now
        self._looked = False, 0  # as `_after` would; and the changes of the disk when it was last looked at
        enabled = [name for name in FAULTS if rng.random() < 0.5]
        self._acts = [(getattr(self, f"_{name}"), weight) for name, weight in _LIFE.items()]
        self._acts += [(getattr(self, f"_{name}"), FAULTS[name][0]) for name in enabled]
        self._rate = rng.choice((0.05, 0.1, 0.2, 0.4))
        self.acted: list[int] = []
        self.digest = 0
        self.machine.watch = self._watch

    # Running.

    def run(self, steps: int) -> None:
        """Take so many steps, then put everything right, and see that nothing is left.

        Raises:
            Violation: something that must be true is not.
        """
        said = io.StringIO()  # what commands print
        with (
            _logged(self._fail, self._say if self._trace else None),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            try:
                for _ in range(steps):
                    self.step()
                self._quiet()
            finally:
                self._end()

    def _end(self) -> None:
        if self.station is not None:
            self.machine.dead = True
            self.station.end()
            self.station = None
        self.machine.end()

    def step(self) -> None:
        """Take one step."""
        number, rng = self.steps, random.Random(self.seed * 1_000_003 + self.steps)
        self.steps += 1
        if rng.random() < self._rate:
            acts, weights = zip(*self._acts, strict=True)
            act = rng.choices(acts, weights)[0]
            if number not in self._left_out:
                self.acted.append(number)
                self._say(f"step {number}: {act.__name__[1:]}")
                with self.machine.unwatched() if act not in self._on_machine else contextlib.nullcontext():
                    act(rng)
                self._after(acted=True)
                return
        self._go_on(rng)
        self._after()

    @property
    def _on_machine(self) -> tuple[Callable[[random.Random], None], ...]:
        return (self._command, self._time)

    def _go_on(self, rng: random.Random) -> None:
        """Let one of those run who can; else let time pass until one can."""
        if self.station is None:
            self.machine.pass_by(int(rng.random() * 5 * _SECOND))
            self._start()
            return
        turns = [*self.station.scheduler.turns(), *self.broker.turns()]
        if self.josev.unsaid and self.broker.up and self.broker.session:
            turns.append(self.josev.flush)
        if turns:
            chosen = rng.randrange(len(turns))
            self.digest = zlib.crc32(b"%d %d %d" % (len(turns), chosen, self.machine.now), self.digest)
            turns[chosen]()
            return
        wakes = self.station.scheduler.wakes
        left = min(wakes - self.machine.now, 120 * _SECOND)
        late = int(rng.random() * _SECOND) if rng.random() < 0.1 else 0
        self.machine.pass_by(left + late)

    def _after(self, *, acted: bool = False) -> None:
        """Look at what must be true: at the disk when it has changed, or when something was brought about."""
        station = self.station
        if self._violation is not None:
            raise self._violation
        if station is None:
            return
        self.checks.ran += max(0, self.machine.now - self._before) // 10**6
        self._before += (self.machine.now - self._before) // 10**6 * 10**6
        if self._died is not None:
            self._bury(self._died)
            return
        if station.scheduler.loop.faults:
            raise Violation("no task fails in a way that nobody expects", station.scheduler.loop.faults[0])
        if station.task is not None and station.task.done():
            self._ended(station)
            return
        if station.ledger is not None and not station.busy and self._looked != (acted, self.machine.changes):
            self._looked = False, self.machine.changes
            self.checks.look(station.ledger)
            self.checks.active()
        if station.edge is not None and station.edge.in_hand > station.setting.queue:
            raise Violation("no more messages are in hand than may be", station.edge.in_hand)

    def _say(self, words: str) -> None:
        if self._trace is not None:
            self._trace(f"{(self.machine.now - BOOT) / _SECOND:10.3f} {words}")

    def _fail(self, violation: Violation) -> None:
        self._violation = self._violation or violation

    def _answered(self, payload: bytes) -> None:
        try:
            self.checks.answered(payload)
        except Violation as violation:
            self._fail(violation)

    def _acknowledging(self, entry: Entry, heard: bool) -> None:
        if self.station is None:
            return
        if not heard:
            self.checks.done.add(entry.about)
            return
        try:
            self.checks.acknowledging(self.station, entry, self.broker.queue)
        except Violation as violation:
            self._fail(violation)

    # The daemon's life.

    def _start(self) -> None:
        self._before = self.machine.now
        self._wounded = self.machine.full
        self.station = station = Station(self.machine, self.setting, self.broker, self.tpm, self.josev.folder)
        try:
            station.start()
        except StationKeyError as error:
            self._say(f"start failed: {error.reason}")
            if self._died is None:
                self._not_started(error)

    def _not_started(self, error: StationKeyError) -> None:
        if not self._wounded or error.reason in {"ledger_damaged", "state_file_foreign", "ledger_newer"}:
            raise Violation("the daemon starts on what a fault has left", error)
        self._stop_dead()

    def _ended(self, station: Station) -> None:
        task = station.task
        assert task is not None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, StationKeyError):
            self._say(f"ended: {error.reason}")
            self._not_started(error)
        elif error is not None:
            raise Violation("the daemon ends by a signal", repr(error)) from error
        elif not station.stopping.is_set():
            raise Violation("the daemon ends by a signal", "it just ended")
        else:
            self._say("stopped")
            self._stop_dead()

    def _stop_dead(self) -> None:
        """The process is gone, and the disk as it left it."""
        self._bury(self.machine.image(None))

    def _bury(self, image: Image) -> None:
        self.machine.dead = True
        station, self.station = self.station, None
        assert station is not None
        self.broker.cut("the station is gone")
        self.broker.knocking.clear()
        station.end()
        self.tpm.wake()
        lost = self._died is not None
        self.machine.power_up(image)
        if lost:
            self.checks.power_lost()
        self._died = self._fault = None
        self._files_fault = 0
        self.machine.sleep = self.machine.pass_by

    def _die(self, rng: random.Random, *, power: bool) -> None:
        self._died = self.machine.image(rng if power else None)
        self.machine.dead = True
        self._say("the power goes" if power else "killed")

    # The disk.

    def _watch(self, operation: Operation, path: str) -> int:
        """Decide what becomes of an operation on a file."""
        if path.startswith(str(self.josev.folder)):
            return self._watch_certificates(operation, path)
        outcome = self._draw(operation, path)
        if operation is Operation.SYNC_DIRECTORY and path.endswith("/active"):
            self.checks.unsynced = outcome != 0
        return outcome

    def _draw(self, operation: Operation, path: str) -> int:
        """Do what was drawn for the disk when its turn comes; return the error, or 0."""
        if self._fault is None or operation not in _MAY_FAIL:
            return 0
        left, what = self._fault
        if left > 0:
            self._fault = (left - 1, what)
            return 0
        self._fault = None
        self._say(f"{what} at {operation.name} {path.rpartition('/')[2]}")
        match what:
            case "power" | "kill":
                self._die(random.Random(self.seed + self.steps), power=what == "power")
            case "slow":
                self._wounded = True  # what waits for its lock may have waited long enough
                assert self.station is not None
                self.station.scheduler.pause(int(random.Random(self.steps).choice((0.2, 3, 8, 40)) * _SECOND))
            case "fail":
                self._wounded = self.checks.disturbed = True
                return errno.EIO
            case _:
                self._wounded = self.checks.disturbed = True
                return errno.EIO if operation in {Operation.SYNC, Operation.OPEN} else errno.ENOSPC
        return 0

    def _watch_certificates(self, operation: Operation, path: str) -> int:
        if self._files_fault:
            self._files_fault -= 1
            if not self._files_fault:
                self.josev.mischief(random.Random(self.seed + self.steps))
        if path in self.josev.unreadable and operation is Operation.OPEN:
            return errno.EACCES
        return 0

    # What is brought about. Each takes the random numbers of its step.

    def _ask(self, rng: random.Random) -> None:
        self.josev.ask(rng)

    def _nonsense(self, rng: random.Random) -> None:
        self.josev.nonsense(rng)

    def _install(self, rng: random.Random) -> None:
        self.josev.install(rng)

    def _delete(self, rng: random.Random) -> None:
        self.josev.delete(rng)

    def _again(self, rng: random.Random) -> None:
        self.josev.again(rng)

    def _files(self, rng: random.Random) -> None:
        choice = rng.random()
        if choice < 0.6:
            self.josev.mischief(rng)
        elif choice < 0.9:
            self._files_fault = rng.randint(1, 12)
        else:
            self.josev.mend()

    def _tpm(self, rng: random.Random) -> None:
        choice = rng.random()
        self.tpm.wake()
        self.tpm.trouble, self.tpm.slow = 0, 0.0
        if choice < 0.25:
            self.tpm.trouble = rng.choice(CODES)
        elif choice < 0.35:
            self.tpm.trouble = "gone"
        elif choice < 0.5:
            self.tpm.hangs = True
        elif choice < 0.65:
            self.tpm.slow = rng.choice((0.05, 1.0, 20.0))

    def _keys(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            self.tpm.clear()
        else:
            self.tpm.lose()

    def _connection(self, _: random.Random) -> None:
        self.broker.cut()

    def _broker(self, rng: random.Random) -> None:
        match rng.randrange(6):
            case 0:
                self.broker.cut()
                self.broker.up = False
            case 1 | 2:
                self.broker.up, self.broker.refuses = True, False
                self.broker.remember()
            case 3:
                self._lost(self.broker.crash())
            case 4:
                self._lost(self.broker.forget())
            case _:
                self.broker.refuses = not self.broker.refuses

    def _lost(self, entries: list[Entry]) -> None:
        """What the broker itself lost can be asked again: it was never taken."""
        for entry in entries:
            if (asked := self.josev.asked.get(entry.about)) is not None:
                asked.taken = False

    def _full(self, rng: random.Random) -> None:
        self.machine.full = rng.random() < 0.5
        self._wounded |= self.machine.full
        self.checks.disturbed |= self.machine.full

    def _disk(self, rng: random.Random) -> None:
        what = rng.choice(("power", "kill", "slow", "fail", "full"))
        self._fault = (min(int(rng.expovariate(0.1)), 200), what)

    def _power(self, rng: random.Random) -> None:
        if self.station is not None:
            self._die(rng, power=rng.random() < 0.6)

    def _stop(self, _: random.Random) -> None:
        if self.station is not None:
            self.station.stopping.set()

    def _clock(self, rng: random.Random) -> None:
        self.machine.set_wall(rng.choice((-999_999 * _SECOND, 0, 1_790_000_000 * _SECOND, 2_200_000_000 * _SECOND)))

    def _time(self, rng: random.Random) -> None:
        self.machine.pass_by(int(rng.choice((2, 30, 600, 1200, 3600)) * _SECOND * rng.random()))

    def _command(self, rng: random.Random) -> None:
        """Give a ``keys`` command, which runs beside the daemon."""
        by_state: dict[str, list[str]] = {}
        for key_id, key in sorted(self.checks.seen.keys.items()):
            by_state.setdefault(key.state, []).append(key_id)
        by_state.pop(KeyState.DESTROYED, None)
        if not by_state:
            return
        key_id = rng.choice(by_state[rng.choice(sorted(by_state))])
        what = rng.choice(_COMMANDS)
        if what[0] == "destroy":
            self.checks.ordered.add(key_id)
        self._say(" ".join([*what, key_id]))
        call = [*what, "--state-dir", str(self.machine.disk / "state"), key_id]

        def run() -> None:
            try:
                keys_command.main(call, standalone_mode=False)
            except StationKeyError as error:
                self._say(f"command: {error.reason}")
                self.checks.disturbed = True

        if self.station is None:
            run()
            return
        SimulatedWorker("command").put(run)

    # The end.

    def _quiet(self) -> None:
        """Put everything right, and let it come to rest."""
        self._say("everything is put right")
        self.machine.full = self.broker.refuses = False
        self.broker.up = True
        self._fault, self._files_fault = None, 0
        self.tpm.wake()
        self.tpm.trouble, self.tpm.slow = 0, 0.0
        with self.machine.unwatched():
            self.josev.mend()
        rng = random.Random(self.seed)
        if self.station is not None and self.station.stopping.is_set():
            self._until(rng, lambda: self.station is None)
        rested = self.machine.now + _REST * _SECOND
        self._until(rng, lambda: self.machine.now >= rested and self.broker.session and not self.josev.unsaid)
        probe = self.josev.probe()
        self._until(rng, lambda: self.josev.asked[probe].taken and not self.broker.queue)
        if not self.josev.asked[probe].csr:
            raise Violation("requests are accepted again once nothing is wrong any more", probe)
        end = self.machine.now + _QUIET * _SECOND
        self._until(rng, lambda: self.machine.now >= end and not self.broker.queue)
        self._until(rng, lambda: self.station is not None and self.station.task is not None)
        assert self.station is not None
        self.checks.wiped()
        self.station.stopping.set()
        self._until(rng, lambda: self.station is None)
        self.checks.settled()

    def _until(self, rng: random.Random, done: Callable[[], bool]) -> None:
        for _ in range(_QUIET_STEPS):
            if done():
                return
            self.steps += 1
            self._go_on(rng)
            self._after()
        raise Violation("everything comes to rest once nothing is wrong any more", len(self.broker.queue))


class _Log(logging.Handler):
    """Takes each logged traceback for what it is, a fault of the program; the lines go into the trace."""

    def __init__(self, fail: Callable[[Violation], None], say: Callable[[str], None] | None) -> None:
        super().__init__(logging.DEBUG if say else logging.ERROR)
        self._fail, self._say = fail, say

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, StationKeyError):
            self._fail(Violation("no fault of stationkey is logged", repr(error)))
        if self._say is not None:
            names = ("request_id", "message_id", "key_id", "reason")
            about = {name: getattr(record, name) for name in names if hasattr(record, name)}
            self._say(f"    {record.getMessage()} {about}")


@contextlib.contextmanager
def _logged(fail: Callable[[Violation], None], say: Callable[[str], None] | None) -> Iterator[None]:
    logger, handler = logging.getLogger("stationkey"), _Log(fail, say)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if say else logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
