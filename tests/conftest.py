"""The peers that several test files use: a broker and a TPM, each real, each alone in its own folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import Mosquitto, Swtpm


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running broker of this test's own."""
    with Mosquitto(tmp_path / "mosquitto") as broker:
        yield broker


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[Swtpm]:
    """A running TPM of this test's own: to be killed, frozen and filled."""
    with Swtpm(tmp_path / "swtpm") as tpm:
        yield tpm


@pytest.fixture(scope="session")
def session_swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    """A running TPM that many tests share: to be used and left as it was found."""
    with Swtpm(tmp_path_factory.mktemp("swtpm")) as tpm:
        yield tpm
