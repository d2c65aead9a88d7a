"""Fuzz the readers and the daemon's side of MQTT for as long as one likes: ``make fuzz SECONDS=600``.

Half of the time new inputs are drawn as the tests draw them; the other half, what is in the corpus is damaged. An input
that reaches a line of stationkey that none before it reached is kept in ``tests/abuse/corpus``, and so is one that
breaks something: each ``make test`` then tries it again. Exit status 1 if something broke.

The target ``broker`` is another kind: sessions of a hostile broker against the real daemon; see `hostile_broker`.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import targets
from hostile_broker import Untrue, scratch, storm
from hypothesis import HealthCheck, Phase, given, seed, settings
from targets import CORPUS, HOSTILE, TARGETS, Target

import stationkey

PACKAGE = str(Path(stationkey.__file__).parent)
MAX_KEPT = 4096
"""Bytes of an input that is kept because of what it reaches; one that breaks something is kept whatever its size."""
MAX_INPUT = 256 * 1024
ROUND = 200
"""Inputs between two looks at the clock."""

Line = tuple[str, int]


class Fuzzer:
    """Tries inputs of one target, and keeps those that reach something new or break something."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._reached: set[Line] = set()
        self.pool = [path.read_bytes() for path in target.corpus]
        self.tried = self.kept = self.broken = 0
        for content in self.pool:
            self.attempt(content, keep=False)

    def attempt(self, content: bytes, *, keep: bool = True) -> None:
        """Try one input."""
        self.tried += 1
        reached: set[Line] = set()

        def follow(frame: FrameType, event: str, _: Any) -> Any:
            if event == "call" and not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            reached.add((frame.f_code.co_filename, frame.f_lineno))
            return follow

        try:
            sys.settrace(follow)
            self._target.check(content)
        except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
            sys.settrace(None)
            self.broken += 1
            print(f"{self._target.name}: broken by {content[:200]!r}")
            traceback.print_exc()
            self._keep(content)
            return
        finally:
            sys.settrace(None)
        new = reached - self._reached
        self._reached |= reached
        if new and keep and len(content) <= MAX_KEPT:
            self.pool.append(content)
            self._keep(content)

    def _keep(self, content: bytes) -> None:
        self.kept += 1
        (CORPUS / self._target.name / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)

    def draw(self, number: int) -> None:
        """A round of inputs as the tests draw them."""

        @seed(number)
        @settings(
            deadline=None,
            database=None,
            max_examples=ROUND,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(self._target.likely)
        def drawn(content: bytes) -> None:
            self.attempt(content)

        drawn()

    def damage(self, chance: random.Random) -> None:
        """A round of damaged inputs of the corpus."""
        for _ in range(ROUND):
            self.attempt(_damaged(chance.choice(self.pool or [b""]), self.pool, chance))


def _damaged(content: bytes, pool: list[bytes], chance: random.Random) -> bytes:
    """`content` with one to four pieces cut out, put in, doubled, or taken from another input."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(content))
        length = chance.choice([0, 1, 2, 8, 64])
        other = chance.choice(pool or [b""])
        start = chance.randint(0, len(other))
        put = chance.choice(
            [
                chance.randbytes(chance.choice([0, 1, 2, 4])),
                other[start : start + chance.choice([1, 8, 64])],
                content[at : at + length] * 2,
                chance.choice(PIECES),
            ]
        )
        content = content[:at] + put + content[at + length :]
    return content[:MAX_INPUT]


def _pieces() -> Iterator[bytes]:
    """What the hostile names are, as bytes."""
    collected: list[bytes] = []

    @settings(database=None, max_examples=200, phases=[Phase.generate])
    @given(HOSTILE)
    def collect(text: str) -> None:
        collected.append(text.encode("utf-8", "surrogatepass"))

    collect()
    yield from dict.fromkeys(collected)


PIECES = list(_pieces())


BROKER = "broker"


def fuzz_broker(seconds: float, seed: int) -> int:
    """Play sessions of a hostile broker for so many seconds; how many broke something."""
    end, total, most, broken = time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < end:
        with scratch() as folder:
            try:
                played, grown = storm(seed, folder, sessions=200, until=end)
                total, most = total + played, max(most, grown)
            except Untrue as untrue:
                broken += 1
                print(untrue, flush=True)
        seed += 1
    print(f"{BROKER}: {total} sessions, memory grew by {most} KiB at the most, {broken} broke something", flush=True)
    return broken


def main() -> int:
    """Fuzz every target for its part of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", choices=[*TARGETS, BROKER])
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    chosen = [target for name, target in TARGETS.items() if arguments.only in {None, name}]
    share = arguments.seconds / (len(chosen) + (arguments.only is None) or 1)
    broken = 0
    if arguments.only in {None, BROKER}:
        broken += fuzz_broker(share, chance.randrange(2**32))
    for target in chosen:
        fuzzer = Fuzzer(target)
        end = time.monotonic() + share
        while time.monotonic() < end:
            fuzzer.draw(chance.getrandbits(64))
            fuzzer.damage(chance)
        broken += fuzzer.broken
        print(f"{target.name}: {fuzzer.tried} inputs, {fuzzer.kept} kept, {fuzzer.broken} broke something", flush=True)
    targets.close_world()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
