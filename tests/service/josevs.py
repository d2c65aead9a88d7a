"""Stations and what Josev installs, for the tests of matching."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from parts import NOW, Authority, Station, key_id_in, pem, station
from stationkey.ledger.lifecycle import KeyState

PENDING, ACTIVE, DEACTIVATED, DESTROYED = (
    KeyState.PRE_ACTIVATION,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.DESTROYED,
)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    """A station that cannot see Josev's certificates."""
    async with station(tmp_path / "state") as made:
        yield made


class Josev:
    """What installs certificates into a directory, as Josev does."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.authority = Authority()

    def install(self, csr: str, *, name: str | None = None, age: timedelta = timedelta(days=1)) -> Path:
        certificate = self.authority.sign(csr, begins=NOW - age)
        return self.put(name or f"{key_id_in(csr)}.pem", pem(certificate, self.authority.sub))

    def put(self, name: str, content: bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path


@pytest.fixture
def josev(tmp_path: Path) -> Josev:
    return Josev(tmp_path / "certificates")


@pytest.fixture
async def seeing(tmp_path: Path, josev: Josev) -> AsyncIterator[Station]:
    """A station that can."""
    async with station(tmp_path / "state", certificate_dir=josev.path) as made:
        yield made
