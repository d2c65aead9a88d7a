"""Runs simulations by their seeds, says what it found, and shrinks it."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from simulation.checks import Violation
from simulation.world import World

STEPS: Final = 400
"""Steps of one simulation before everything is put right."""
MEMORY: Final = Path("/dev/shm")
_TELL: Final = 10.0
"""Seconds between two lines about the progress."""
_TRIES: Final = 400
"""Runs that shrinking may take."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a seed.

    Attributes:
        seed: the seed.
        steps: how many were taken.
        acted: those that brought something about.
        digest: see `World`.
        broken: which truth was broken, in words; empty if none.
        words: the same, with the details.
    """

    seed: int
    steps: int
    acted: tuple[int, ...]
    digest: int
    broken: str = ""
    words: str = ""


@contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory for one simulation."""
    path = Path(tempfile.mkdtemp(prefix="simulation-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def run(
    seed: int, *, steps: int = STEPS, left_out: Collection[int] = (), trace: Callable[[str], None] | None = None
) -> Outcome:
    """Run one simulation."""
    logging.getLogger("asyncio").disabled = logging.getLogger("concurrent.futures").disabled = True
    with folder() as root:
        world = World(seed, root, left_out=left_out, trace=trace)
        broken = words = ""
        try:
            world.run(steps)
        except Violation as violation:
            broken, words = violation.what, str(violation)
        except Exception as error:  # noqa: BLE001 - a fault of the simulation, or one of ours that came through it
            broken, words = f"unexpected {type(error).__name__}", repr(error)
        return Outcome(seed, world.steps, tuple(world.acted), world.digest, broken, words)


def shrink(found: Outcome, *, steps: int = STEPS) -> tuple[Outcome, frozenset[int]]:
    """Leave out what is not needed to break the same truth.

    Returns:
        The shortest run that was found, and the steps in which nothing is brought about.
    """
    best, left_out = found, frozenset[int]()
    needed, part, tries = list(found.acted), max(1, len(found.acted) // 2), 0
    steps = min(steps, found.steps)
    while tries < _TRIES:
        start, shorter = 0, False
        while start < len(needed) and tries < _TRIES:
            tried = left_out | set(needed[start : start + part])
            outcome = run(found.seed, steps=steps, left_out=tried)
            tries += 1
            if outcome.broken == found.broken:
                best, left_out, shorter = outcome, tried, True
                needed = [step for step in outcome.acted if step not in left_out]
            else:
                start += part
        if part == 1 and not shorter:
            break
        part = max(1, part // 2)
    return best, left_out


def explain(found: Outcome, say: Callable[[str], None], *, steps: int = STEPS) -> None:
    """Say how a truth is broken, as shortly as was found."""
    best, left_out = shrink(found, steps=steps)
    say(f"seed {found.seed}, step {found.steps}: {found.words}")
    say(f"replay: make simulate SEED={found.seed}")
    say(f"shrunk from {len(found.acted)} acts to {len(best.acted)}:")
    run(found.seed, steps=min(steps, found.steps), left_out=left_out, trace=say)
    say(best.words)


def search(seeds: Iterator[int], *, until: float, say: Callable[[str], None], clock: Callable[[], float]) -> int:
    """Run seeds until the time is over; say how fast, and what is found.

    Returns:
        How many broke a truth.
    """
    begun = told = clock()
    count = steps = broken = 0
    stopped: list[int] = []  # by a signal; raised in a call from C, an exception would be lost
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        for seed in seeds:
            outcome = run(seed)
            count, steps = count + 1, steps + outcome.steps
            if outcome.broken:
                broken += 1
                explain(outcome, say)
            now = clock()
            if now - told >= _TELL:
                told = now
                say(f"{count} seeds, {steps} steps, {steps / (now - begun):.0f} a second, {broken} broken")
            if now >= until or stopped:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    now = clock()
    say(f"{count} seeds, {steps} steps in {now - begun:.0f} s, {broken} broken")
    return broken


def real_clock() -> float:
    """Seconds by the machine's own clock: between simulations, the process has it."""
    return time.monotonic()
