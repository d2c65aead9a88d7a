"""A unit file of systemd, read as far as the tests need it [systemd.syntax(7)]."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
UNIT = ROOT / "packaging/systemd/stationkey.service"

_SIZES = {"K": 1024, "M": 1024**2, "G": 1024**3}


class Unit:
    """The settings of a unit, each a list of what its lines say, in their order."""

    def __init__(self, path: Path = UNIT) -> None:
        self.path = path
        self._lines: list[tuple[str, str, str]] = []
        section = ""
        for raw in path.read_text().splitlines():
            line = raw.strip()
            if line.startswith("["):
                section = line.strip("[]")
            elif line and line[0] not in "#;":
                name, _, value = line.partition("=")
                self._lines.append((section, name, value))

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """Section, name and value of each line."""
        return iter(self._lines)

    def all(self, name: str) -> list[str]:
        """The values of every line of that name; there is one at least."""
        found = [value for _, known, value in self._lines if known == name]
        assert found, f"{self.path.name} has no {name}="
        return found

    def one(self, name: str) -> str:
        """The value of the one line of that name."""
        (value,) = self.all(name)
        return value

    def words(self, name: str) -> list[str]:
        """The words of every line of that name."""
        return [word for value in self.all(name) for word in shlex.split(value)]

    def size(self, name: str) -> int:
        """A number of bytes, or a bare number."""
        value = self.one(name)
        return int(value[:-1]) * _SIZES[value[-1]] if value[-1] in _SIZES else int(value)

    @property
    def system_calls(self) -> set[str]:
        """The names of the system calls that SystemCallFilter= lets through."""
        allowed: set[str] = set()
        for line in self.all("SystemCallFilter"):
            names = {call for word in line.removeprefix("~").split() for call in _members(word)}
            allowed = allowed - names if line.startswith("~") else allowed | names
        return allowed


def _members(name: str) -> set[str]:
    """The system calls of a set such as ``@system-service``, as this machine's systemd knows it."""
    if not name.startswith("@"):
        return {name}
    said = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", name], capture_output=True, text=True, check=True
    ).stdout
    listed = re.findall(r"^    ([@\w-]+)$", said, re.MULTILINE)
    return {call for word in listed for call in _members(word)}
