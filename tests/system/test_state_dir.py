"""A state directory on a container's volume: what is open to others there, and what only looks so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

USER = 1000
VOLUME_GROUP = 2000
PROGRAM = """
import json, sys
from pathlib import Path
from stationkey.errors import StationKeyError
from stationkey.system.state_dir import StateDirectory
try:
    StateDirectory(Path(sys.argv[1])).close()
except StationKeyError as error:
    print(json.dumps({"reason": error.reason, "hint": error.hint}))
else:
    print(json.dumps({"reason": None, "hint": ""}))
"""
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--propagation", "unchanged", "--kill-child")
"""A PID namespace of its own, as a container has. In a chroot there is no root mount whose propagation could change."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@dataclass(frozen=True)
class Volume:
    """A directory that root made, as an orchestrator does."""

    path: Path
    groups: tuple[int, ...] = field(default=())

    def opened(self, name: str = "state", *, contained: bool = True, group: int = USER) -> dict[str, Any]:
        """What a process of `USER` says of a state directory in the volume."""
        groups = ["--groups", ",".join(map(str, self.groups))] if self.groups else ["--clear-groups"]
        become = ["setpriv", "--reuid", str(USER), "--regid", str(group), *groups]
        command = [*(NAMESPACE if contained else ()), *become, sys.executable, "-c", PROGRAM, str(self.path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        said: dict[str, Any] = json.loads(done.stdout)
        return said


@pytest.fixture
def path() -> Iterator[Path]:
    """A directory that others can reach, as they cannot reach pytest's: its next run would close them again."""
    with tempfile.TemporaryDirectory(prefix="stationkey-volume-") as name:
        Path(name).chmod(0o755)
        volume = Path(name) / "data"
        volume.mkdir()
        yield volume


def made(path: Path, *, mode: int, group: int) -> Path:
    os.chown(path, 0, group)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("mode", "group", "groups"),
    [
        pytest.param(0o2775, USER, (), id="of the process's own group"),
        pytest.param(0o2775, VOLUME_GROUP, (VOLUME_GROUP,), id="fsGroup"),
        pytest.param(0o777, 0, (), id="emptyDir"),
        pytest.param(0o2777, VOLUME_GROUP, (VOLUME_GROUP,), id="emptyDir with fsGroup"),
    ],
)
def test_a_containers_volume_is_used(path: Path, mode: int, group: int, groups: tuple[int, ...]) -> None:
    volume = Volume(made(path, mode=mode, group=group), groups)

    assert volume.opened()["reason"] is None
    assert volume.opened()["reason"] is None, "a second start"
    assert (path / "state").stat().st_mode & 0o777 == 0o700


def test_a_volume_of_the_daemons_own_group_is_used_outside_a_container_too(path: Path) -> None:
    assert Volume(made(path, mode=0o2775, group=USER)).opened(contained=False)["reason"] is None


@pytest.mark.parametrize(
    ("mode", "group", "contained"),
    [
        pytest.param(0o2775, VOLUME_GROUP, True, id="of a group that the process is not in"),
        pytest.param(0o777, 0, False, id="open to all, where others are"),
    ],
)
def test_what_others_can_exchange_is_refused(path: Path, mode: int, group: int, *, contained: bool) -> None:
    (path / "state").mkdir(mode=0o700)
    os.chown(path / "state", USER, USER)

    assert Volume(made(path, mode=mode, group=group)).opened(contained=contained)["reason"] == "state_dir_exchangeable"


def test_a_group_that_others_are_in_by_name_is_open_to_them(path: Path) -> None:
    """Debian's games (60) is the primary group of the user games (5); a process that has it is not alone in it."""
    games = Volume(made(path, mode=0o2775, group=60), (60,))

    assert games.opened(contained=False)["reason"] == "state_dir_exchangeable"


def test_the_volume_itself_is_roots_and_the_hint_names_a_directory_in_it(path: Path) -> None:
    said = Volume(made(path, mode=0o2775, group=USER)).opened(".")

    assert said["reason"] == "state_dir_foreign"
    assert str(path / "stationkey") in said["hint"]  # words: the directory that helps
