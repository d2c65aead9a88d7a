"""OCPP security profile 3 with the key in the TPM: the station is a TLS client, and the CSMS wants its certificate."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from authority import Authority, write
from charging import COMMON_NAME, ChargingStation
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from outside import BOUND
from websockets.sync.server import ServerConnection, serve

from stationkey.contract.profiles import Algorithm, CertificateType

CHARGING_STATION = CertificateType.CHARGING_STATION_CERTIFICATE
LOOPBACK = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])


@dataclass(frozen=True)
class Yard:
    """A station with a charging-station certificate, and what a CSMS needs."""

    station: ChargingStation
    authority: Authority
    csms: Path
    root: Path


@pytest.fixture(scope="module", params=[Algorithm.ECDSA_SHA256, Algorithm.RSA_SHA256])
def yard(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Yard]:
    directory = tmp_path_factory.mktemp("wss")
    authority = Authority(ec.SECP256R1(), "CSMS")
    with ChargingStation(directory) as station:
        asyncio.run(station.install(CHARGING_STATION, authority, request.param))
        csms = authority.software(directory / "csms.pem", "csms", [(LOOPBACK, False)])
        yield Yard(station, authority, csms, write(directory / "csms-root.pem", authority.root))


@contextmanager
def csms(yard: Yard, trusted: str) -> Iterator[str]:
    """A CSMS that takes only stations with a certificate; it tells each what it is called there. Gives its URL."""

    def answer(connection: ServerConnection) -> None:
        presented = connection.socket.getpeercert(binary_form=True)  # type: ignore[attr-defined] # TLS it is
        subject = x509.load_der_x509_certificate(presented).subject.rfc4514_string()
        assert "BootNotification" in connection.recv()
        connection.send(f"{connection.subprotocol} {connection.socket.version()} {subject}")  # type: ignore[attr-defined]

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(yard.csms)
    context.load_verify_locations(cadata=trusted)
    context.verify_mode = ssl.CERT_REQUIRED
    with serve(answer, "127.0.0.1", 0, ssl=context, subprotocols=["ocpp2.0.1"]) as server:  # type: ignore[list-item]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"wss://127.0.0.1:{server.socket.getsockname()[1]}/{COMMON_NAME[CHARGING_STATION]}"
        finally:
            server.shutdown()
            thread.join()


def connect(yard: Yard, url: str, version: str) -> subprocess.CompletedProcess[str]:
    program = Path(__file__).with_name("csms_client.py")
    file = yard.station.active(CHARGING_STATION)
    return subprocess.run(
        [sys.executable, str(program), url, str(file), str(yard.root), version],
        env=yard.station.openssl_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND,
    )


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_the_csms_knows_the_station_by_the_certificate_whose_key_is_in_the_tpm(yard: Yard, version: str) -> None:
    with csms(yard, yard.authority.root) as url:
        done = connect(yard, url, version)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ocpp2.0.1 {version.replace('_', '.')} ")
    assert f"CN={COMMON_NAME[CHARGING_STATION]}" in done.stdout


def test_a_csms_of_another_authority_does_not_let_the_station_in(yard: Yard) -> None:
    with csms(yard, Authority(ec.SECP256R1()).root) as url:
        done = connect(yard, url, "TLSv1_2")
    assert done.returncode != 0
    assert "alert" in done.stderr


def test_the_command_checks_the_key_as_a_tls_client(yard: Yard) -> None:
    arguments = ["--keystore", f"tpm2:{yard.station.tcti}", "--state-dir", str(yard.station.state_dir)]
    done = subprocess.run(
        [sys.executable, "-m", "stationkey", "tls-config", *arguments, "--check", CHARGING_STATION],
        env=yard.station.openssl_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1].split(",")[0] for line in done.stdout.splitlines()] == [
        " TLSv1.2 client",
        " TLSv1.3 client",
    ]
