"""The alerts, judged by Prometheus' own promtool: each fires when it should, and is silent when it should be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml  # type: ignore[import-untyped] # comes without types
from unit import ROOT

RULES = ROOT / "packaging/prometheus/alerts.yml"
CASES = ROOT / "tests/packaging/alerts.yml"
PROMTOOL = Path(sys.executable).with_name("promtool")
"""Where scripts/setup puts it."""


def test_each_alert_fires_when_it_should_and_else_does_not() -> None:
    for command in (("check", "rules", RULES), ("test", "rules", CASES)):
        judged = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, check=False)
        assert judged.returncode == 0, judged.stdout + judged.stderr


def test_each_alert_has_a_case_in_which_it_fires() -> None:
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    assert set(re.findall(r"Stationkey\w+", CASES.read_text())) == alerts
