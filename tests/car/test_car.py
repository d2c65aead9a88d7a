"""The circle closed: a certificate for a TPM-held key carries the TLS session of ISO 15118, and a car accepts it.

Key and chain come from ``active/``, where the daemon put them; the CSR was asked for over MQTT, certified by a CA that
is the tests' own, and installed as Josev does. Neither the serving programs nor the car know anything of this project.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from authority import Authority, write
from charging import ChargingStation, serving
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from outside import BOUND

from stationkey.contract.profiles import Algorithm, CertificateType

V2G, V2G20 = CertificateType.V2G_CERTIFICATE, CertificateType.V2G20_CERTIFICATE


@dataclass(frozen=True)
class Dialect:
    """What a car of one edition of ISO 15118 speaks, and nothing else.

    Attributes:
        version: as Python's `ssl` calls it.
        suite: the cipher suite, as OpenSSL calls it.
        options: the same for ``openssl s_client``, with the curve and the signature algorithm.
        curve: for the key exchange.
        domain: DC of the station's certificate.
    """

    version: str
    suite: str
    options: tuple[str, ...]
    curve: str
    domain: str


DIALECTS = {
    # The suite is TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256, of ISO 15118-2 the one that OpenSSL has.
    V2G: Dialect(
        "TLSv1_2",
        "ECDHE-ECDSA-AES128-SHA256",
        ("-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256", "-groups", "P-256", "-sigalgs", "ECDSA+SHA256"),
        "prime256v1",
        "CPO",
    ),
    # All of secp521r1, and both sides with certificates.
    V2G20: Dialect(
        "TLSv1_3",
        "TLS_AES_256_GCM_SHA384",
        ("-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384", "-groups", "P-521", "-sigalgs", "ECDSA+SHA512"),
        "secp521r1",
        "CSO",
    ),
}


@dataclass(frozen=True)
class Roads:
    """The station, and the roots and certificates on both sides.

    Attributes:
        roots: for each certificate type the V2G root that cars trust.
        sub_cas: for each certificate type the Sub-CAs, for a program that wants them in a file of their own.
        vehicle: the car's own certificate and (software) key.
        vehicle_root: the root that the station trusts.
        directory: for files of one test.
    """

    station: ChargingStation
    roots: dict[CertificateType, Path]
    sub_cas: dict[CertificateType, Path]
    vehicle: Path
    vehicle_root: Path
    directory: Path


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roads]:
    """A station with a certificate of ISO 15118-2 and one of -20."""
    directory = tmp_path_factory.mktemp("car")
    authorities = {V2G: Authority(ec.SECP256R1()), V2G20: Authority(ec.SECP521R1())}
    vehicles = Authority(ec.SECP521R1(), "OEM")
    with ChargingStation(directory) as station:
        asyncio.run(station.install(V2G, authorities[V2G], Algorithm.ECDSA_SHA256))
        asyncio.run(station.install(V2G20, authorities[V2G20], Algorithm.ECDSA_SHA512))
        yield Roads(
            station,
            {kind: write(directory / f"{kind}-root.pem", authority.root) for kind, authority in authorities.items()},
            {kind: write(directory / f"{kind}-subs.pem", authority.sub_cas) for kind, authority in authorities.items()},
            vehicles.software(directory / "vehicle.pem", "WMIV1234567890ABCDEX"),
            write(directory / "vehicle-root.pem", vehicles.root),
            directory,
        )


def openssl_secc(roads: Roads, kind: CertificateType) -> list[str]:
    """``openssl s_server``; it takes leaf and key from one file, and the rest of the chain from another."""
    command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-rev"]
    command += ["-cert", str(roads.station.active(kind)), "-cert_chain", str(roads.sub_cas[kind])]
    if kind is V2G:
        return [*command, "-tls1_2"]
    return [*command, "-tls1_3", "-Verify", "4", "-verify_return_error", "-CAfile", str(roads.vehicle_root)]


def python_secc(roads: Roads, kind: CertificateType) -> list[str]:
    """Python's `ssl`; it takes all from the one file."""
    vehicle_root = [str(roads.vehicle_root)] if kind is V2G20 else []
    program = str(Path(__file__).with_name("secc.py"))
    return [sys.executable, program, str(roads.station.active(kind)), DIALECTS[kind].version, *vehicle_root]


@dataclass(frozen=True)
class Session:
    """What a car saw of the station. `reply` is what came back for ``V2GTP``."""

    suite: str
    subject: str
    reply: str


class RefusedError(Exception):
    """There was no session; the text says why."""


def openssl_car(port: int, dialect: Dialect, root: Path, vehicle: Path | None) -> Session:
    """``openssl s_client``, in an environment without this project's configuration."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-brief", "-ign_eof", *dialect.options]
    command += ["-nameopt", "RFC2253"]  # the default differs between versions
    command += ["-CAfile", str(root), "-verify_return_error"]
    if vehicle is not None:
        command += ["-cert", str(vehicle), "-cert_chain", str(vehicle)]
    done = subprocess.run(
        command, input="V2GTP\nCLOSE\n", capture_output=True, text=True, check=False, timeout=BOUND, env=_plain()
    )
    said = dict(re.findall(r"^([\w ]+): (.*)$", done.stderr, re.MULTILINE))
    if done.returncode != 0 or not done.stdout or said.get("Verification") != "OK":
        raise RefusedError(done.stderr)
    return Session(said["Ciphersuite"], said["Peer certificate"], done.stdout.strip())


def python_car(port: int, dialect: Dialect, root: Path, vehicle: Path | None) -> Session:
    """Python's `ssl`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # a car goes by chain and DC, not by a host name
    context.minimum_version = context.maximum_version = ssl.TLSVersion[dialect.version]
    if dialect.version == "TLSv1_2":
        context.set_ciphers(dialect.suite)
    context.set_ecdh_curve(dialect.curve)
    context.load_verify_locations(root)
    if vehicle is not None:
        context.load_cert_chain(vehicle)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), BOUND) as connection,
            context.wrap_socket(connection) as session,
        ):
            session.sendall(b"V2GTP\n")
            with session.makefile("r") as lines:
                reply = lines.readline().strip()
            session.sendall(b"CLOSE\n")
            presented = session.getpeercert(binary_form=True)
            cipher = session.cipher()
            assert cipher is not None
            assert presented is not None
    except (ssl.SSLError, ConnectionError) as error:
        raise RefusedError(str(error)) from error
    subject = x509.load_der_x509_certificate(presented).subject
    return Session(cipher[0], subject.rfc4514_string(), reply)


def _plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("OPENSSL_", "TPM2"))}


Secc = Callable[[Roads, CertificateType], list[str]]
Car = Callable[[int, Dialect, Path, Path | None], Session]

each_secc = pytest.mark.parametrize("secc", [openssl_secc, python_secc], ids=["openssl-serves", "python-serves"])
each_car = pytest.mark.parametrize("car", [openssl_car, python_car], ids=["openssl-drives", "python-drives"])
each_edition = pytest.mark.parametrize(
    "kind", [pytest.param(V2G, id="iso15118-2"), pytest.param(V2G20, id="iso15118-20")]
)


@each_edition
@each_secc
@each_car
def test_a_car_verifies_the_chain_and_charges_over_the_key_in_the_tpm(
    roads: Roads, kind: CertificateType, secc: Secc, car: Car
) -> None:
    """-2: TLS 1.2, secp256r1 and its own cipher suite. -20: TLS 1.3, secp521r1, both sides with certificates."""
    dialect = DIALECTS[kind]
    with serving(secc(roads, kind), roads.station.openssl_environment()) as port:
        session = car(port, dialect, roads.roots[kind], roads.vehicle if kind is V2G20 else None)
    assert session.reply == "PTG2V"
    assert session.suite == dialect.suite
    assert f"DC={dialect.domain}" in session.subject


@each_edition
@each_car
def test_a_car_that_trusts_another_root_refuses_the_station(roads: Roads, kind: CertificateType, car: Car) -> None:
    other = write(roads.directory / "other-root.pem", Authority(ec.SECP256R1()).root)
    with (
        serving(python_secc(roads, kind), roads.station.openssl_environment()) as port,
        pytest.raises(RefusedError, match="verify failed"),
    ):
        car(port, DIALECTS[kind], other, roads.vehicle)


@each_secc
@each_car
def test_a_station_of_iso15118_20_refuses_a_car_without_a_certificate(roads: Roads, secc: Secc, car: Car) -> None:
    with (
        serving(secc(roads, V2G20), roads.station.openssl_environment()) as port,
        pytest.raises(RefusedError, match=r"certificate required|EOF|eof|reset"),
    ):
        car(port, DIALECTS[V2G20], roads.roots[V2G20], None)


@each_edition
def test_the_file_is_useless_without_the_tpm(roads: Roads, kind: CertificateType) -> None:
    """The PEM is a wrapped key: a plain OpenSSL cannot even read it."""
    done = subprocess.run(
        ["openssl", "pkey", "-in", str(roads.station.active(kind)), "-noout"],
        env=_plain(),
        check=False,
        capture_output=True,
    )
    assert done.returncode != 0
