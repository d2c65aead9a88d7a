"""Take samples of each side of a group in turns, on one TPM and one broker.

In turns, because a machine is not equally fast from one second to the next: what is compared was measured in the same
seconds.
"""

from __future__ import annotations

import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from peers import Mosquitto, Swtpm

from bench import board, rows
from bench.history import fill_with_destroyed
from bench.rows import FLOOR, IMPORTS, KINDS, LOOP, LOOP_AHEAD, OURS, POOLED, PROCESSOR, PROGRAMS, Series
from bench.sides import (
    GAP,
    KIND,
    LIFECYCLE,
    POOL,
    POOL_SIZE,
    Act,
    Floor,
    Station,
    StockMosquitto,
    Unavailable,
    command,
    composite,
    processor_time,
    programs,
    resident,
    serve_arguments,
    start_once,
    station,
)
from stationkey.system.state_dir import DATABASE_NAME

WARM_UP: Final = 10
"""Requests before the first sample: a daemon's first ones load modules and fill caches."""
SLOW: Final = 2.0
"""Ratio of the TPM's time in a round to that in the best one, above which the machine is in a slow phase."""
SETTLE: Final = 1.0
"""Seconds after which a daemon without requests is called idle."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: of each kind of key; a round has `in_a_row` samples of each side, and one of each program.
        blocks: of sustained load.
        block: requests in one such block; together so few that the ports for connections to swtpm do not run short,
            which would slow down whoever is quickest.
        ledger: samples for each size of ledger.
        starts: of a daemon, or of a command.
        idle: seconds of watching an idle daemon.
        many: requests between the two looks at the memory.
        site: rounds of the sides of a site.
    """

    rounds: dict[str, int]
    blocks: int
    block: int
    ledger: int
    starts: int
    idle: float
    many: int
    site: int


FULL: Final = Effort(
    {"P-256": 40, "P-521": 40, "RSA-3072": 20},
    blocks=5,
    block=200,
    ledger=400,
    starts=30,
    idle=60.0,
    many=10_000,
    site=5,
)
QUICK: Final = Effort(
    {"P-256": 6, "P-521": 6, "RSA-3072": 3}, blocks=3, block=150, ledger=60, starts=7, idle=10.0, many=1_000, site=1
)


@dataclass(slots=True)
class Measured:
    """The samples of a measurement, by side.

    Attributes:
        samples: in the unit of the group.
        missing: why there are no samples.
        faults: what is wrong whatever the samples say.
        slow: how many rounds were taken again, because the machine was in a slow phase.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    slow: int = 0

    def take(self, side: str, act: Act) -> None:
        """Take one more sample of a side. A side that fails loses its samples, and is not measured again."""
        if side not in self.missing:
            with self.told(side):
                self.samples.setdefault(side, []).append(act())

    @contextmanager
    def told(self, side: str) -> Iterator[None]:
        """Note why a side cannot be measured, and go on with the others."""
        try:
            yield
        except Unavailable as error:
            self.samples.pop(side, None)
            self.missing[side] = str(error)


def take_rounds(
    count: int, once: Callable[[Measured], None], measured: Measured, *, rate: bool = False, steady: bool = True
) -> None:
    """Take rounds of samples; take a round again that fell into a slow phase of the machine.

    Slow is a round in which the TPM alone took twice as long as in the best one. At most as many are taken again as
    there are to be.

    Args:
        count: how many rounds.
        once: takes a round.
        measured: where the samples go.
        rate: whether the samples are rates, and not times.
        steady: whether the TPM alone always takes about as long, so that it tells how fast the machine is.
    """
    rounds: list[Measured] = []

    def pace(one: Measured) -> float:
        median = statistics.median(one.samples[FLOOR])
        return 1 / median if rate else median

    good: list[Measured] = []
    while len(good) < count and len(rounds) < 2 * count:
        one = Measured(missing=measured.missing)
        once(one)
        rounds.append(one)
        best = min((pace(each) for each in rounds if FLOOR in each.samples), default=0.0)
        good = [each for each in rounds if not steady or FLOOR not in each.samples or pace(each) <= SLOW * best]
    measured.slow += len(rounds) - len(good)
    for each in good:
        for side, samples in each.samples.items():
            if side not in measured.missing:
                measured.samples.setdefault(side, []).extend(samples)


@dataclass(frozen=True, slots=True)
class World:
    """Where a measurement takes place."""

    folder: Path
    broker: Mosquitto
    tpm: Swtpm
    effort: Effort


@contextmanager
def _world(base: Path, effort: Effort) -> Iterator[World]:
    """Start a broker and a TPM, with a temporary folder below `base`."""
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir=base) as name,
        StockMosquitto(Path(name) / "broker") as broker,
        Swtpm(Path(name) / "tpm") as tpm,
    ):
        yield World(Path(name), broker, tpm, effort)


def measure(group: str, sides: Collection[str], base: Path, effort: Effort) -> Measured:
    """Measure `sides` of a group beside each other.

    Args:
        group: of a `Series`.
        sides: of the series wanted.
        base: a directory on a real disk.
        effort: how much.
    """
    measured = Measured()
    try:
        with _world(base, effort) as world:
            _MEASUREMENTS[group](world, sides, measured)
    except (Unavailable, RuntimeError, OSError, subprocess.SubprocessError) as error:
        words = str(error).replace(str(base.parent), "")
        measured.missing.update({side: words for side in sides if side not in measured.missing})
    return measured


def _make(kind: str, world: World, sides: Collection[str], measured: Measured) -> None:
    """Time a key and its CSR, one at a time."""
    in_a_row = min(POOL_SIZE[kind], 8)
    with ExitStack() as stack:
        # Also where only others are measured: it is the one that puts a storage root key into the TPM.
        plain = stack.enter_context(station(world.folder, world.broker, world.tpm, "plain", configuration=LIFECYCLE))
        floor = Floor(world.tpm)
        stack.callback(floor.close)
        single = {FLOOR: floor.act(KIND[kind])} if FLOOR in sides else {}
        loops = _loops(world, sides, measured, stack)
        asked = {side: one for side, one in {OURS: plain, **loops}.items() if {side, PROCESSOR.get(side)} & {*sides}}
        single |= {side: one.asker.act(KIND[kind]) for side, one in asked.items()}
        whole = _programs(kind, world, sides, measured)
        pooled = stack.enter_context(_pooled(world, measured)) if POOLED in sides else None
        for act in single.values():
            for _ in range(1 if kind.startswith("RSA") else WARM_UP):
                act()

        def once(taken: Measured) -> None:
            with _processor(asked, in_a_row, taken):
                for _ in range(in_a_row):
                    for side, act in single.items():
                        taken.take(side, act)
                        time.sleep(GAP)
            if pooled is not None:
                _draw(pooled, kind, in_a_row, taken)
            for side, act in whole.items():
                taken.take(side, act)
                floor.flush()

        # How long an RSA key takes is luck.
        take_rounds(world.effort.rounds[kind], once, measured, steady=not kind.startswith("RSA"))


@contextmanager
def _processor(asked: dict[str, Station], count: int, taken: Measured) -> Iterator[None]:
    """Take the processor time of daemons that get `count` requests each in the block."""
    before = {side: processor_time(asked[side].daemon) for side in PROCESSOR.keys() & asked.keys()}
    yield
    for side, spent in before.items():
        taken.samples[PROCESSOR[side]] = [(processor_time(asked[side].daemon) - spent) / count]


def _loops(world: World, sides: Collection[str], measured: Measured, stack: ExitStack) -> dict[str, Station]:
    """Start the composite floors among the sides."""
    found = {}
    for side in (LOOP, LOOP_AHEAD):
        if side in sides or PROCESSOR.get(side) in sides:
            with measured.told(side):
                name = "loop-ahead" if side == LOOP_AHEAD else "loop"
                one = composite(world.folder, world.broker, world.tpm, name, ahead=side == LOOP_AHEAD)
                found[side] = stack.enter_context(one)
    return found


def _programs(kind: str, world: World, sides: Collection[str], measured: Measured) -> dict[str, Act]:
    """Return the sides that are whole commands."""
    found: dict[str, Act] = {}
    for side in sides:
        if side in PROGRAMS:
            with measured.told(side):
                found[side] = programs(side, KIND[kind], world.tpm, world.folder / "programs")
    return found


@contextmanager
def _pooled(world: World, measured: Measured) -> Iterator[Station | None]:
    """Start a daemon with a full pool; None, with the reason noted, if that fails."""
    with ExitStack() as stack:
        pooled = None
        with measured.told(POOLED):
            one = stack.enter_context(
                station(world.folder, world.broker, world.tpm, "pooled", configuration=LIFECYCLE + POOL)
            )
            one.until_full(0)
            pooled = one
        yield pooled


def _draw(pooled: Station, kind: str, count: int, measured: Measured) -> None:
    """Time requests for as many keys as are ready, then wait until the pool is full again."""
    if POOLED in measured.missing:
        return
    seen = pooled.times_full()
    act = pooled.asker.act(KIND[kind])
    for _ in range(count):
        measured.take(POOLED, act)
        time.sleep(GAP)
    with measured.told(POOLED):
        pooled.until_full(seen)


def _sustain(kind: str, world: World, sides: Collection[str], measured: Measured) -> None:
    """Measure answers a second under load, beside keys a second of the TPM alone, unloading included."""
    with station(world.folder, world.broker, world.tpm, "plain", configuration=LIFECYCLE) as plain:
        floor = Floor(world.tpm)
        make = floor.act(KIND[kind])

        def alone() -> float:
            started = time.perf_counter()
            for _ in range(world.effort.block):
                make()
            return world.effort.block / (time.perf_counter() - started)

        acts: dict[str, Act] = {FLOOR: alone, OURS: partial(plain.asker.rate, KIND[kind], world.effort.block)}
        plain.asker.rate(KIND[kind], 4 * WARM_UP)

        def once(taken: Measured) -> None:
            for side in sides:
                time.sleep(10 * GAP)
                taken.take(side, acts[side])

        take_rounds(world.effort.blocks, once, measured, rate=True)
        floor.close()


def _grow(world: World, sides: Collection[str], measured: Measured) -> None:
    """Time a request with ledgers of several sizes, of keys that were used and destroyed."""
    sizes = {rows.keys(size): size for size in rows.SIZES if rows.keys(size) in sides}
    with ExitStack() as stack:
        template = world.folder / "template"
        with station(world.folder, world.broker, world.tpm, template.name, configuration=LIFECYCLE) as first:
            first.asker.act(KIND["P-256"])()

        def with_history(name: str, size: int) -> Path:
            shutil.copytree(template / "state", world.folder / name / "state")
            database = world.folder / name / "state" / DATABASE_NAME
            fill_with_destroyed(database, size)
            return database

        acts = {}
        for number, (side, size) in enumerate(sizes.items()):
            with_history(f"ledger{number}", size)
            daemon = stack.enter_context(
                station(world.folder, world.broker, world.tpm, f"ledger{number}", configuration=LIFECYCLE)
            )
            acts[side] = daemon.asker.act(KIND["P-256"])
        for act in acts.values():
            for _ in range(WARM_UP):
                act()
        time.sleep(SETTLE)  # the sweep that each daemon begins with
        for _ in range(world.effort.ledger):
            for side, act in acts.items():
                measured.take(side, act)
                time.sleep(GAP)
        if rows.SWEPT in sides:
            quiet = rows.keys(rows.SIZES[-1])
            _sweep(world, with_history("swept", rows.SIZES[-1]), {quiet: acts[quiet]}, measured)


def _sweep(world: World, database: Path, acts: Mapping[str, Act], measured: Measured) -> None:
    """Time a request while the daemon forgets most of its history, in turns with other acts."""
    keeping = LIFECYCLE.replace("history_limit = 100000", "history_limit = 1000")
    with station(world.folder, world.broker, world.tpm, "swept", configuration=keeping) as sweeping:
        before = _count(database)
        acts = {rows.SWEPT: sweeping.asker.act(KIND["P-256"]), **acts}
        for _ in range(world.effort.ledger // 4):
            for side, act in acts.items():
                measured.take(side, act)
        left = _count(database)
    if not rows.SIZES[0] < left < before:
        raise RuntimeError(f"no sweep was going on: {before} keys before, {left} after")


def _count(database: Path) -> int:
    """Return how many keys are on record."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM key").fetchone()
        return int(count)


def _start(world: World, sides: Collection[str], measured: Measured) -> None:
    """Time a start from exec to ready, with TPM and broker up, a storage root key and a ledger."""
    home = world.folder / "plain"
    arguments = serve_arguments(home, world.broker, world.tpm, home.name, configuration="")
    words = (sys.executable, "-c", "import cryptography.x509, tpm2_pytss")
    acts = {OURS: partial(start_once, home, arguments), IMPORTS: partial(command, words)}
    _in_turns(acts, sides, world.effort.starts, measured)


def _remember(world: World, sides: Collection[str], measured: Measured) -> None:
    """Measure resident memory after few requests and after many, with the default bounds."""
    with station(world.folder, world.broker, world.tpm, "plain") as plain:
        act = plain.asker.act(KIND["P-256"])
        for _ in range(100):
            act()
        time.sleep(SETTLE)
        idle = resident(plain.daemon)
        measured.samples[rows.IDLE] = [idle]
        if rows.GROWTH in sides:
            plain.asker.rate(KIND["P-256"], world.effort.many)
            time.sleep(SETTLE)
            measured.samples[rows.GROWTH] = [resident(plain.daemon) - idle]


def _share(world: World, sides: Collection[str], measured: Measured) -> None:
    """Measure answers a second of a site on PostgreSQL beside one on SQLite."""
    from bench import site  # noqa: PLC0415 - it needs PostgreSQL

    rates, _, _ = site.measure(world.effort.site)
    measured.samples |= {side: rates[side] for side in sides}


def _command(world: World, sides: Collection[str], measured: Measured) -> None:
    """Time commands, beside the start of a Python with the modules that they need."""
    with station(world.folder, world.broker, world.tpm, "plain") as plain:
        act = plain.asker.act(KIND["P-256"])
        for _ in range(WARM_UP):
            act()
        listing = ("-m", "stationkey", "keys", "list", "--state-dir", str(world.folder / "plain" / "state"))
        schema = ("-m", "stationkey", "schema")
        imports = ("-c", "import asyncio, sqlite3")
        words = {rows.KEYS_LIST: listing, rows.SCHEMA: schema, IMPORTS: imports}
        for side in (rows.KEYS_LIST, rows.SCHEMA):
            if heavy := _imported(words[side]) & {"tpm2_pytss", "cryptography"}:
                measured.faults[side] = f"imports {', '.join(sorted(heavy))}"
        acts = {side: partial(command, (sys.executable, *words[side])) for side in words}
        _in_turns(acts, sides, world.effort.starts, measured)


def _imported(words: tuple[str, ...]) -> set[str]:
    """Return the packages that a Python command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def _in_turns(acts: dict[str, partial[float]], sides: Collection[str], count: int, measured: Measured) -> None:
    wanted = {side: act for side, act in acts.items() if side in sides}
    for act in wanted.values():
        with suppress(Unavailable):  # told with the first sample
            act()  # the first run reads files from the disk, and compiles them
    for _ in range(count):
        for side, act in wanted.items():
            measured.take(side, act)


_MEASUREMENTS: Final[dict[str, Callable[[World, Collection[str], Measured], None]]] = {
    **{kind: partial(_make, kind) for kind in KINDS},
    **{rows.sustained(kind): partial(_sustain, kind) for kind in ("P-256", "P-521")},
    rows.LEDGER: _grow,
    rows.START: _start,
    rows.COMMANDS: _command,
    rows.BOARD: board.stay_idle,
    rows.DISK: board.write_little,
    rows.LISTS: board.list_many,
    rows.SLOW: board.run_slowly,
    rows.SITE: _share,
    # Last: each TPM command is a TCP connection here, and the port of one stays taken for a minute. After so many,
    # there are few ports left.
    rows.MEMORY: _remember,
}

GROUPS: Final = tuple(_MEASUREMENTS)
"""The groups, in the order in which they are measured."""


def sides_of(group: str, wanted: Collection[Series]) -> list[str]:
    """Return the sides of a group among the series wanted, each once, in their order."""
    return list(dict.fromkeys(series.side for series in wanted if series.group == group))
