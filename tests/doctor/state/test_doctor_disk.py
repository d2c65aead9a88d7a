"""The doctor on a disk that is full, in memory, and read-only."""

from __future__ import annotations

import sys
from pathlib import Path

from doctors import command_output, read
from small_disk import SmallDisk

from stationkey.doctor.report import Level


def test_a_full_disk_and_one_in_memory_are_told(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk") as disk:
        disk.fill()
        command = [*disk.enter, sys.executable, "-m", "stationkey", "doctor", "--json", "--state-dir", str(disk.path)]
        found = read(command_output(command))
        assert found.level("state.disk") is Level.FAILURE
        assert found.reasons("state.filesystem") == {"memory"}
        disk.run(f"mount -o remount,ro '{disk.path}'")
        assert read(command_output(command)).reasons("state.filesystem") == {"read_only"}
        disk.run(f"mount -o remount,rw '{disk.path}'")
