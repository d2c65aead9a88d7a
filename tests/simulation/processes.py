"""The simulation in a process of its own, for the tests: it cannot be in theirs, whose clocks go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

_TESTS: Final = Path(__file__).parent.parent


def simulate(folder: Path, *arguments: object) -> str:
    """Run the simulation, with its library in `folder`; return what it says."""
    environment = {**os.environ, "PYTHONPATH": str(_TESTS), "STATIONKEY_SIMULATION": str(folder)}
    command = [sys.executable, "-m", "simulation", *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not ended.stderr
    return ended.stdout


def outcomes(folder: Path, first: int, count: int, *arguments: object) -> list[dict[str, Any]]:
    """Run seeds; return what came of each."""
    said = simulate(folder, "--seeds", first, count, *arguments)
    return [json.loads(line) for line in said.splitlines()]
