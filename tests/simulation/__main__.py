"""``python -m simulation``; see the package."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from pathlib import Path

from simulation.machine import enter


def main() -> int:
    """Run by the arguments; return the exit status."""
    parser = argparse.ArgumentParser(prog="simulation", description="Simulate stations by their seeds.")
    parser.add_argument("--hours", type=float, default=0.0, help="for how long; until Ctrl-C without")
    parser.add_argument("--seed", type=int, help="this one, with all that happens in it; shrunk if it breaks a truth")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "COUNT"), help="these; a line of JSON for each")
    parser.add_argument(
        "--mutant", help="a fault that is planted first; --seeds then ends with the first that finds it"
    )
    arguments = parser.parse_args()
    folder = Path(os.environ.get("STATIONKEY_SIMULATION", Path.cwd() / ".simulation"))
    folder.mkdir(exist_ok=True)
    enter(["-m", "simulation", *sys.argv[1:]], folder)

    from simulation import mutants, runner  # noqa: PLC0415 - on the machine only, by its clocks

    said = sys.stdout  # commands print, too, and are not heard

    def say(words: str) -> None:
        said.write(f"{words}\n")
        said.flush()

    with mutants.planted(arguments.mutant) if arguments.mutant else contextlib.nullcontext():
        if arguments.seed is not None:
            found = runner.run(arguments.seed, trace=say)
            if found.broken:
                runner.explain(found, say)
            return int(bool(found.broken))
        if arguments.seeds is not None:
            for seed in range(arguments.seeds[0], sum(arguments.seeds)):
                one = runner.run(seed)
                say(json.dumps({name: getattr(one, name) for name in ("seed", "steps", "digest", "broken", "words")}))
                if one.broken and arguments.mutant:
                    break
            return 0
        first = int.from_bytes(os.urandom(4))
        say(f"seeds from {first}")
        until = runner.real_clock() + arguments.hours * 3600 if arguments.hours else math.inf
        return int(runner.search(itertools.count(first), until=until, say=say, clock=runner.real_clock) > 0)


if __name__ == "__main__":
    sys.exit(main())
