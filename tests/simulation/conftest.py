"""What the tests of the simulation share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the machine's library is built, once for all tests of a worker."""
    return tmp_path_factory.mktemp("machine")
