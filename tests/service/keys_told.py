"""What the tests of keys and of their ends share: certificates, and a station with each key store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from peers import Swtpm

from parts import (
    Authority,
    Station,
    station,
)
from stationkey.config.settings import DAY
from stationkey.keystore import KeyRef
from stationkey.ledger.lifecycle import KeyState

PENDING, ACTIVE, DEACTIVATED, COMPROMISED, DESTROYED = (
    KeyState.PRE_ACTIVATION,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.COMPROMISED,
    KeyState.DESTROYED,
)
YEAR = 365 * DAY
AUTHORITY = Authority()


@pytest.fixture
def certificate_dir(tmp_path: Path) -> Path:
    path = tmp_path / "certificates"
    path.mkdir()
    return path


@pytest.fixture(params=["software", "tpm2"])
async def either_store(
    request: pytest.FixtureRequest, tmp_path: Path, certificate_dir: Path, session_swtpm: Swtpm
) -> AsyncIterator[Station]:
    """A station that can see Josev's certificates, once with each key store."""
    uri = session_swtpm.uri if request.param == "tpm2" else "software:"
    async with station(tmp_path / "state", keystore=uri, certificate_dir=certificate_dir) as made:
        yield made


def reference(here: Station, key_id: str) -> KeyRef:
    found = here.ledger.keys.ref(key_id)
    assert found is not None
    return found


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


async def until(said: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not said():  # noqa: ASYNC110 - neither a log nor a database has an event to wait for
            await asyncio.sleep(0.01)
