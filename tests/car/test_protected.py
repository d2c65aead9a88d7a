"""A key with an authorisation value, under another root key and spoken to in sessions, carries TLS all the same.

The daemon makes and installs it, OpenSSL serves with it, and gets the value as docs/tls.md says.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from authority import Authority, write
from charging import ChargingStation, serving
from cryptography.hazmat.primitives.asymmetric import ec
from outside import BOUND

from protection import SECRET, write_secret
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.keystore.tpm2.keyfile import read_pem

V2G = CertificateType.V2G_CERTIFICATE


@dataclass(frozen=True)
class Protected:
    """A station with a certificate, and the root that cars trust."""

    station: ChargingStation
    root: Path
    sub_cas: Path
    generated: bool

    @property
    def options(self) -> list[str]:
        """Of every command."""
        options = ["--config", str(self.station.directory / "stationkey.toml")]
        options += ["--state-dir", str(self.station.state_dir)]
        return [*options, "--keystore", f"tpm2:{self.station.tcti}"]


@pytest.fixture(scope="module", params=["file", "generated"])
def protected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    directory = tmp_path_factory.mktemp("protected")
    generated = request.param == "generated"
    secret = "generated" if generated else str(write_secret(directory / "secret", SECRET + "\n"))
    more = f'[tpm]\nkey_auth = "{secret}"\nsession = "encrypted"\nsrk_handle = 0x81000010\n'
    authority = Authority(ec.SECP256R1())
    with ChargingStation(directory, more) as station:
        asyncio.run(station.install(V2G, authority, Algorithm.ECDSA_SHA256))
        root, sub_cas = write(directory / "root.pem", authority.root), write(directory / "subs.pem", authority.sub_cas)
        yield Protected(station, root, sub_cas, generated)


def test_the_active_key_has_the_protection_that_was_asked_for(protected: Protected) -> None:
    key = read_pem(protected.station.active(V2G).read_bytes())
    assert key is not None
    assert (key.empty_auth, key.parent, key.policy) == (False, 0x81000010, ())


def test_tls_config_checks_it_with_the_value_from_where_the_daemon_has_it(protected: Protected) -> None:
    done = stationkey(protected, "tls-config", "--check", str(V2G))
    first = done.stdout.splitlines()[0]  # the next may be a warning, of handshakes several at a time
    assert (done.returncode, first.rpartition(b": ")[2]) == (0, b"ok"), done.stderr


def stationkey(protected: Protected, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "stationkey", *words, *protected.options],
        env=os.environ | protected.station.environment,
        capture_output=True,
        timeout=BOUND,
        check=False,
    )


def test_openssl_serves_a_car_with_it(protected: Protected) -> None:
    """The value comes by a descriptor, from ``stationkey key-auth``.

    ``s_server`` would ask on the terminal for a second time where ``-cert`` names a file with the key in it.
    """
    value = stationkey(protected, "key-auth", str(V2G)).stdout
    assert len(value) == (32 if protected.generated else len(SECRET))
    reading, writing = os.pipe()
    os.write(writing, value)
    os.close(writing)
    active = protected.station.active(V2G)
    _, mark, rest = active.read_text().partition("-----BEGIN CERTIFICATE-----")
    leaf = write(protected.station.directory / "leaf.pem", mark + rest)
    command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-rev", "-tls1_2"]
    command += ["-key", str(active), "-cert", str(leaf), "-cert_chain", str(protected.sub_cas)]
    command += ["-pass", f"fd:{reading}"]
    try:
        with serving(command, protected.station.openssl_environment(), descriptors=(reading,)) as port:
            assert "Verification: OK" in drive(port, protected.root)
    finally:
        os.close(reading)


def drive(port: int, root: Path) -> str:
    car = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-brief", "-CAfile", str(root)]
    done = subprocess.run(
        [*car, "-verify_return_error"], input="Q\n", capture_output=True, text=True, timeout=BOUND, check=False
    )
    return done.stdout + done.stderr
