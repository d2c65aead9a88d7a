"""Configuration files for the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from stationkey.config.options import options_of
from stationkey.config.settings import (
    CsrOverrides,
)

OVERRIDES = {option.name: option for option in options_of(CsrOverrides)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "stationkey.toml"
