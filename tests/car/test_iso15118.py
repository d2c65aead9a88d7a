"""A whole charging session by a stack that nobody here wrote: EcoG's `iso15118`, its SECC on the active file.

SECC and EVCC run in a network namespace of their own, with link-local addresses on a pair of virtual Ethernet devices:
SDP by multicast, TLS, SupportedAppProtocol, and every message up to SessionStop, in EXI. The SECC's key and chain are
symbolic links to the file under ``active/``. The private key of -2 is in a TPM, that of -20 in a PKCS#11 token: no TPM
chip has its curve.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from authority import Authority, write
from charging import ChargingStation, TokenStation
from cryptography.hazmat.primitives.asymmetric import ec

from stationkey.contract.profiles import Algorithm, CertificateType

PYTHON = Path(__file__).parents[2] / ".venv" / "iso15118" / "bin" / "python"
BOUND = 120.0
"""Seconds after which a session has failed. It takes some 20: the EXI codec is a Java program."""
# Root needs no user namespace, and in a chroot could have none.
OWN_USER = () if os.geteuid() == 0 else ("--user", "--map-current-user", "--keep-caps")
SAME_USER = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
NAMESPACE = ("unshare", *OWN_USER, "--net")
NETWORK = """
ip link set lo up
ip link add veth0 type veth peer name veth1
ip link set veth0 addrgenmode none
ip addr add fe80::1/64 dev veth0 nodad
ip link set veth1 up
ip link set veth0 up
exec "$@"
"""


def run(module: str, before: str = "") -> tuple[str, ...]:
    return (str(PYTHON), "-c", f"{before}\nfrom iso15118.{module}.main import run; run()")


@contextmanager
def spoken(command: tuple[str, ...], environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A program, and what it says."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        guard = threading.Timer(BOUND, process.kill)
        guard.start()
        try:
            yield process, []
        finally:
            guard.cancel()
            process.terminate()
            process.communicate()


def wait_for(program: tuple[subprocess.Popen[str], list[str]], text: str) -> str:
    """Read up to `text`; gives all that was said so far."""
    process, said = program
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if text in line:
            return "".join(said)
    raise AssertionError(f"no {text!r} in:\n{''.join(said)}")


@pytest.mark.parametrize(
    ("station_of", "kind", "algorithm", "curve", "protocol", "loop"),
    [
        pytest.param(
            ChargingStation,
            CertificateType.V2G_CERTIFICATE,
            Algorithm.ECDSA_SHA256,
            ec.SECP256R1(),
            "ISO_15118_2",
            "ChargingStatus",
            id="iso15118-2",
        ),
        pytest.param(
            TokenStation,
            CertificateType.V2G20_CERTIFICATE,
            Algorithm.ECDSA_SHA512,
            ec.SECP521R1(),
            "ISO_15118_20_AC",
            "ACChargeLoop",
            id="iso15118-20",
        ),
    ],
)
def test_a_car_charges_from_sdp_to_session_stop(
    tmp_path: Path,
    station_of: type[ChargingStation | TokenStation],
    kind: CertificateType,
    algorithm: Algorithm,
    curve: ec.EllipticCurve,
    protocol: str,
    loop: str,
) -> None:
    """-2 by TLS 1.2; -20 by TLS 1.3, in which the SECC asks for the car's certificate and verifies it."""
    authority, oem = Authority(curve), Authority(ec.SECP521R1(), "OEM")
    certificates, keys = tmp_path / "pki" / "iso15118_2" / "certs", tmp_path / "pki" / "iso15118_2" / "private_keys"
    certificates.mkdir(parents=True)
    keys.mkdir()
    for side in ("secc", "oem"):
        write(keys / f"{side}LeafPassword.txt", "")
    write(certificates / "v2gRootCACert.pem", authority.root)
    write(certificates / "oemRootCACert.pem", oem.root)
    vehicle = oem.software(certificates / "oemCertChain.pem", "WMIV1234567890ABCDEX")
    (keys / "oemLeaf.key").symlink_to(vehicle)
    car = {
        "supportedProtocols": [protocol],
        "supportedEnergyServices": ["AC"],
        "isCertInstallNeeded": False,
        "useTls": True,
        "enforceTls": True,
        "chargeLoopCycle": 1,
    }
    write(tmp_path / "car.json", json.dumps(car))
    settings = {
        "PKI_PATH": f"{tmp_path}/pki/",
        "NETWORK_INTERFACE": "veth0",
        "SECC_ENFORCE_TLS": "true",
        "ENABLE_TLS_1_3": str(kind is CertificateType.V2G20_CERTIFICATE).lower(),
        "PROTOCOLS": protocol,
        "AUTH_MODES": "EIM",
        "EVCC_CONFIG_PATH": str(tmp_path / "car.json"),
        "PYTHONUNBUFFERED": "1",
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",  # short runs, few cores
    }
    with station_of(tmp_path / "station") as station:
        active = asyncio.run(station.install(kind, authority, algorithm))
        (certificates / "cpoCertChain.pem").symlink_to(active)
        (keys / "seccLeaf.key").symlink_to(active)
        in_namespace = (*NAMESPACE, "sh", "-ec", NETWORK, "sh", *run("secc", station.python_needs))
        with spoken(in_namespace, {**station.openssl_environment(), **settings}) as secc:
            wait_for(secc, "UDP server started")
            beside = ("nsenter", "--target", str(secc[0].pid), "--net", *SAME_USER)
            with spoken((*beside, *run("evcc")), {**os.environ, **settings}) as evcc:
                seen = wait_for(evcc, "SessionStopRes received")
            assert "Security: TLS" in wait_for(secc, "Sending SDPResponse")
    assert "Starting TLS client" in seen
    assert "OK_SuccessfulNegotiation" in seen
    assert f"Entered state {loop}" in seen
