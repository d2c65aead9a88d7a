"""The unit file, judged by systemd itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trespass import TRESPASSES
from unit import ROOT, UNIT, Unit

from stationkey.config.settings import Settings

WORST = 1.1
"""The exposure that the unit may have; less is better. From 2.0 on systemd says "MEDIUM", from 5.0 on "EXPOSED"."""
HARDENING = (ROOT / "docs/hardening.md").read_text()


def security(*options: str, unit: Path = UNIT) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", *options, str(unit)]
    variables = {**os.environ, "LC_ALL": "C.UTF-8"}  # it has other marks where there is no UTF-8
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def threshold(unit: Path) -> subprocess.CompletedProcess[str]:
    return security(f"--threshold={WORST * 10:.0f}", unit=unit)


def exposed(unit: Path = UNIT) -> dict[str, str]:
    """What systemd marks as open, and what each counts."""
    return dict(re.findall(r"^✗ (\S+) .*? ([\d.]+)\s*$", security(unit=unit).stdout, re.MULTILINE))


class TestScore:
    def test_the_exposure_is_not_above_the_bound(self) -> None:
        judged = threshold(UNIT)
        assert judged.returncode == 0, judged.stdout + judged.stderr

    @pytest.mark.parametrize("name", ["ProtectSystem", "MemoryDenyWriteExecute", "SystemCallFilter", "PrivateUsers"])
    def test_a_looser_unit_is_above_it(self, tmp_path: Path, name: str) -> None:
        looser = tmp_path / UNIT.name
        looser.write_text(re.sub(rf"^{name}=.*$", "", UNIT.read_text(), flags=re.MULTILINE))
        assert threshold(looser).returncode != 0

    def test_the_document_has_the_score_and_what_keeps_the_rest(self) -> None:
        score = re.search(r"Overall exposure level for stationkey.service: ([\d.]+) (\w+)", security().stdout)
        assert score is not None
        assert f"**{score[1]} {score[2]}**" in HARDENING
        assert f"(exposure {score[1]} by `systemd-analyze security`)" in (ROOT / "README.md").read_text()
        listed = dict(re.findall(r"^\| `([^`]+)` \| ([\d.]+) \|", HARDENING, re.MULTILINE))
        assert {name.replace("\\|", "|"): counts for name, counts in listed.items()} == exposed()


class TestUnit:
    def test_systemd_takes_every_line(self, tmp_path: Path) -> None:
        """The program is not installed where the tests run, so another one stands for it."""
        program = Unit().words("ExecStart")[0]
        unit = tmp_path / UNIT.name
        unit.write_text(UNIT.read_text().replace(f"ExecStart={program}", f"ExecStart={sys.executable}"))
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
        )
        ours = [line for line in verified.stderr.splitlines() if UNIT.name in line]
        assert (verified.returncode, ours) == (0, [])

    def test_every_setting_has_its_reason_above_it(self) -> None:
        """A comment goes before each group of lines."""
        groups = re.split(r"\n\s*\n", UNIT.read_text())
        for group in groups:
            lines = [line for line in group.splitlines() if not line.startswith("[")]
            assert lines[0].startswith(("#", "WantedBy=", "Description=")), group

    def test_every_setting_is_explained_in_the_document(self) -> None:
        explained = set(re.findall(r"`(\w+)=[^`]*`", HARDENING))
        assert {name for section, name, _ in Unit() if section == "Service"} - explained == set()

    def test_what_is_tried_under_it_is_what_it_forbids(self) -> None:
        """scripts/deb-check starts that program in the daemon's place."""
        assert {re.split(r"\W", name)[0] for name in TRESPASSES} <= {name for _, name, _ in Unit()}

    def test_the_directories_are_those_of_the_program(self) -> None:
        unit = Unit()
        assert Path("/var/lib") / unit.one("StateDirectory") == Settings(keystore="software:").state_dir
        assert unit.words("ExecStart")[-1] == f"/etc/{unit.one('ConfigurationDirectory')}/stationkey.toml"
        assert unit.words("ExecStart")[-1] in (ROOT / "packaging/stationkey.toml").read_text()

    def test_systemd_gives_it_longer_to_end_than_it_promises_to_take(self) -> None:
        from stationkey import daemon  # noqa: PLC0415 - loads the TPM stack

        assert int(Unit().one("TimeoutStopSec")) > daemon.DRAIN + 3
