"""CSMSs for the tests of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import websockets
from cryptography import x509
from csms_parts import (
    ORGANIZATION,
)

from stationkey.contract.profiles import SECP256R1, SECP521R1
from stationkey.simulators.csms.server import Csms
from stationkey.simulators.pki import Hierarchy
from stationkey.simulators.pki import to_pem as chain_to_pem


@pytest.fixture(scope="module")
def hierarchies() -> dict[str, Hierarchy]:
    now = Csms(organization=ORGANIZATION)._clock()  # noqa: SLF001 - the time as it takes it
    return {
        "hierarchy": Hierarchy.make(SECP256R1, organization=ORGANIZATION, now=now),
        "hierarchy_20": Hierarchy.make(SECP521R1, organization=ORGANIZATION, now=now),
    }


Make = Callable[..., Csms]


@pytest.fixture
def make(hierarchies: dict[str, Hierarchy]) -> Make:
    """A CSMS with authorities that need not be made again for each test."""
    return lambda **options: Csms(organization=ORGANIZATION, **(hierarchies | options))


def openssl_verify(folder: Path, chain_pem: str, root_pem: str) -> str:
    """What openssl says of a chain, leaf first."""
    leaf, *subs = x509.load_pem_x509_certificates(chain_pem.encode())
    (folder / "root.pem").write_text(root_pem)
    (folder / "leaf.pem").write_text(chain_to_pem([leaf]))
    (folder / "subs.pem").write_text(chain_to_pem(subs))
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "root.pem", "-untrusted", "subs.pem", "leaf.pem"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


# --- Who is let in ---------------------------------------------------------------------------------------------------


def basic(name: str, password: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": websockets.headers.build_authorization_basic(name, password)}}
