"""Measure what a small board notices: an idle daemon, bytes written to flash, long lists, a tenth of a core."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peers import Daemon

from bench import rows
from bench.history import fill_with_destroyed
from bench.sides import (
    KIND,
    LIFECYCLE,
    Station,
    Unavailable,
    serve_arguments,
    start_once,
    station,
)
from stationkey.system.state_dir import DATABASE_NAME

if TYPE_CHECKING:
    from bench.measure import Measured, World

_REQUESTS: Final = 100
_PAGE: Final = 4096
_SETTLED: Final = 70.0
"""Seconds after a request within which the daemon has moved its log into the database."""
_CONTROLLERS: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu"))
"""Where cgroups of version 2 and 1 can be made, as root."""
_MEASURED: Final = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True);"
    " used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
)
"""A program that runs a command and prints what it used: seconds, and KiB."""
_PERIOD: Final = 10_000
"""Microseconds; of each the slow core has a tenth. Short, so that one request is throttled, too."""


def stay_idle(world: World, sides: Collection[str], measured: Measured) -> None:
    """Count wake-ups and written bytes of an idle minute, some time after 100 requests."""
    with station(world.folder, world.broker, world.tpm, "plain") as plain:
        _ask(plain, _REQUESTS)
        time.sleep(_SETTLED)
        before = _switches(plain.daemon), _written(plain.daemon)
        time.sleep(world.effort.idle)
        after = _switches(plain.daemon), _written(plain.daemon)
        found = {
            rows.WAKE_UPS: (after[0] - before[0]) / world.effort.idle,
            rows.IDLE_BYTES: after[1] - before[1],
        }
        measured.samples |= {side: [found[side]] for side in sides}


def write_little(world: World, sides: Collection[str], measured: Measured) -> None:
    """Count the pages that a request writes: with room for each key, and with an older key destroyed for each."""
    ending = "[lifecycle]\npending_total = 1\n"
    for number, side in enumerate(sides):
        settings = ending if side == rows.ENDING_PAGES else LIFECYCLE
        with station(world.folder, world.broker, world.tpm, f"disk{number}", configuration=settings) as plain:
            _ask(plain, _REQUESTS)
            if side == rows.REQUEST_SYNCS:
                with measured.told(side):
                    measured.samples[side] = [_syncs(plain, world.folder / "syncs") / _REQUESTS]
                continue
            before = _written(plain.daemon)
            _ask(plain, _REQUESTS)
            measured.samples[side] = [(_written(plain.daemon) - before) / _PAGE / _REQUESTS]


def list_many(world: World, sides: Collection[str], measured: Measured) -> None:
    """Measure processor time and memory of ``keys list`` with a long history."""
    home = world.folder / "many"
    with station(world.folder, world.broker, world.tpm, home.name, configuration=LIFECYCLE) as first:
        _ask(first, 1)
    database = home / "state" / DATABASE_NAME
    fill_with_destroyed(database, rows.SIZES[-1])
    for time_side, memory_side, more in (
        (rows.LIST_TIME, rows.LIST_MEMORY, ()),
        (rows.JSON_TIME, rows.JSON_MEMORY, ("--json",)),
    ):
        words = (sys.executable, "-m", "stationkey", "keys", "list", "--state-dir", str(database.parent), *more)
        for _ in range(3):
            used, memory = _usage(words)
            for side, value in ((time_side, used), (memory_side, memory)):
                if side in sides:
                    measured.samples.setdefault(side, []).append(value)


def run_slowly(world: World, sides: Collection[str], measured: Measured) -> None:
    """Time request and start of a daemon with a tenth of a core; broker, asker and simulated TPM have the rest."""
    with _tenth_of_a_core() as group:
        if rows.SLOW_START in sides:
            home = world.folder / "slow-start"
            arguments = serve_arguments(home, world.broker, world.tpm, home.name, configuration="")
            enter = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group))
            measured.samples[rows.SLOW_START] = [start_once(home, arguments, before=enter) for _ in range(5)]
        with station(world.folder, world.broker, world.tpm, "slow", configuration=LIFECYCLE) as slow:
            assert slow.daemon.process is not None
            act = slow.asker.act(KIND["P-256"])
            act()
            group.write_text(str(slow.daemon.process.pid))
            samples = [act() for _ in range(30)]
            measured.samples |= {side: samples for side in sides if side == rows.SLOW_REQUEST}


def _ask(plain: Station, count: int) -> None:
    act = plain.asker.act(KIND["P-256"])
    for _ in range(count):
        act()


def _syncs(plain: Station, log: Path) -> int:
    """Return how often the daemon syncs files in `_REQUESTS` requests.

    Raises:
        Unavailable: strace is missing, or may not look.
    """
    if (strace := shutil.which("strace")) is None:
        raise Unavailable("strace is not installed")
    assert plain.daemon.process is not None
    words = (strace, "-f", "-e", "trace=fsync,fdatasync", "-o", str(log), "-p", str(plain.daemon.process.pid))
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        if "attached" not in tracer.stderr.readline():
            raise Unavailable("strace may not attach to the daemon")
        try:
            _ask(plain, _REQUESTS)
        finally:
            tracer.terminate()
    return sum("sync(" in line for line in log.read_text().splitlines())


def _usage(words: tuple[str, ...]) -> tuple[float, float]:
    """Return seconds of processor time and the most MiB of a command."""
    # By way of a small process: a child begins with the peak memory of the one that started it.
    done = subprocess.run((sys.executable, "-c", _MEASURED, *words), capture_output=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(words[2:5])} failed")
    used, kilobytes = map(float, done.stdout.split())
    return used, kilobytes / 1024


def _switches(daemon: Daemon) -> int:
    """Return how often the daemon's threads have gone to sleep [proc(5), voluntary_ctxt_switches]."""
    assert daemon.process is not None
    lines = [
        line
        for task in Path(f"/proc/{daemon.process.pid}/task").iterdir()
        for line in (task / "status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def _written(daemon: Daemon) -> int:
    """Return the bytes that the daemon has sent to the disk, in blocks of the page cache [proc(5), write_bytes]."""
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


@contextmanager
def _tenth_of_a_core() -> Iterator[Path]:
    """Make a cgroup with a tenth of a core while the block runs; give its file for process ids.

    Raises:
        Unavailable: no cgroup can be made here.
    """
    home = next((one for one in _CONTROLLERS if any(one.glob("cpu.*")) or (one / "cgroup.controllers").exists()), None)
    if home is None or os.geteuid() != 0:
        raise Unavailable("a slow core needs root and the cpu controller of cgroups")
    group = home / f"stationkey-bench-{os.getpid()}"
    try:
        group.mkdir()
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{_PERIOD // 10} {_PERIOD}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(_PERIOD // 10))
    except OSError as error:
        raise Unavailable(f"a slow core needs the cpu controller of cgroups: {error}") from None
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()
