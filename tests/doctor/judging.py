"""What tests of judges share: settings, users, files, and the worst of several verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stationkey.config.file import Given, read_file, settle
from stationkey.config.settings import Settings
from stationkey.doctor.examination import CHECKS
from stationkey.doctor.host.files import Facts, User
from stationkey.doctor.report import Finding, Level

OK, WARNING, FAILURE, NOT_CHECKED = Level.OK, Level.WARNING, Level.FAILURE, Level.NOT_CHECKED


ROOT, STATION, STRANGER = User(0, 0), User(990, 990, frozenset({109})), User(1234, 1234)


def settings(text: str = "", tmp_path: Path | None = None, *, keystore: str = "tpm2:device:/dev/tpmrm0") -> Settings:
    file: Given = {}
    if tmp_path is not None:
        (tmp_path / "c.toml").write_text(text)
        file = read_file(tmp_path / "c.toml")
    return settle(file, keystore=keystore)


_ROWS = {check.id: check for rows in CHECKS.values() for check in rows}


def judge(check: str, *seen: Any) -> list[Finding]:
    """What a check finds in what its look has seen."""
    found = _ROWS[check].judge(*seen)
    return [found] if isinstance(found, Finding) else list(found)


def look_of(check: str) -> Any:
    """The look of a check."""
    return _ROWS[check].look


def worst(findings: Iterable[Finding]) -> Level:
    order = [FAILURE, WARNING, OK, NOT_CHECKED]
    return min((finding.level for finding in findings), key=order.index)


def reasons(findings: Iterable[Finding]) -> set[str]:
    """The reasons of what is not as it should be."""
    return {finding.reason for finding in findings} - {"ok"}


def facts(**changes: Any) -> Facts:
    return dataclasses.replace(Facts(path=Path("/x/y"), kind="file", mode=0o600, uid=990, gid=990), **changes)
