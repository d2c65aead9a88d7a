"""nginx and haproxy, configured by ``tls-config --for``, serve several cars at a time with a key in the TPM."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from authority import Authority, write
from charging import ChargingStation
from cryptography.hazmat.primitives.asymmetric import ec
from outside import BOUND
from peers import free_port
from reasons import command

from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.openssl.servers import PORT, SERVERS

V2G = CertificateType.V2G_CERTIFICATE
HANDSHAKES, AT_A_TIME = 60, 6
CREDENTIAL = "/run/credentials/{}.service/secc.pem"
"""Where systemd puts it [systemd.exec(5), LoadCredential=]."""


@pytest.fixture(scope="module")
def secc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChargingStation, Path]]:
    """A station with a certificate of ISO 15118-2, and the root that cars trust."""
    directory = tmp_path_factory.mktemp("servers")
    authority = Authority(ec.SECP256R1())
    with ChargingStation(directory) as station:
        asyncio.run(station.install(V2G, authority, Algorithm.ECDSA_SHA256))
        yield station, write(directory / "root.pem", authority.root)


def nginx(directory: Path, text: str) -> list[str]:
    paths = "".join(f"{name}_temp_path {directory};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    write(directory / "server.conf", text.replace("http {", f"http {{\naccess_log off;\n{paths}"))
    more = f"daemon off; pid {directory / 'pid'}; error_log stderr;"
    return ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "server.conf"), "-g", more]


def haproxy(directory: Path, text: str) -> list[str]:
    write(directory / "server.conf", text)
    return ["haproxy", "-db", "-f", str(directory / "server.conf")]


PROGRAMS = {"nginx": nginx, "haproxy": haproxy}


def handshake(port: int, root: Path, version: ssl.TLSVersion) -> str:
    """One new session; "ok", or what went wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = context.maximum_version = version
    context.load_verify_locations(root)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), BOUND) as connection,
            context.wrap_socket(connection) as session,
        ):
            session.sendall(b"GET / HTTP/1.1\r\nHost: secc\r\nConnection: close\r\n\r\n")
            return "ok" if session.recv(64).startswith(b"HTTP/1.1 204") else "no answer"
    except OSError as error:
        return str(error)


def listens(port: int, server: subprocess.Popen[bytes]) -> bool:
    for _ in range(int(BOUND * 10)):
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) == 0:
                return True
        if server.poll() is not None:
            return False
        time.sleep(0.1)
    return False


def test_each_server_is_tried() -> None:
    assert PROGRAMS.keys() == SERVERS.keys()


@pytest.mark.parametrize("server", SERVERS)
def test_its_configuration_is_printed(server: str) -> None:
    done = command("tls-config", "--for", server, "--keystore", "tpm2:device:/dev/tpmrm0")
    assert (done.exit_code, done.stdout) == (0, SERVERS[server])


def test_printing_and_checking_exclude_each_other() -> None:
    assert command("tls-config", "--for", "nginx", "--check", "v2g_certificate").exit_code == 2


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS1.2", "TLS1.3"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_server_as_printed_serves_sixty_handshakes_six_at_a_time(
    secc: tuple[ChargingStation, Path], server: str, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    station, root = secc
    port = free_port()
    file = tmp_path / "secc.pem"
    shutil.copy(station.active(V2G), file)
    text = SERVERS[server].replace(str(PORT), str(port)).replace(CREDENTIAL.format(server), str(file))
    log = tmp_path / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(
            PROGRAMS[server](tmp_path, text), env=station.openssl_environment(), stdout=said, stderr=said
        ) as running,
    ):
        try:
            assert listens(port, running), log.read_text()
            with ThreadPoolExecutor(AT_A_TIME) as cars:
                seen = Counter(cars.map(lambda _: handshake(port, root, version), range(HANDSHAKES)))
        finally:
            running.terminate()
            running.wait(BOUND)
    assert seen == {"ok": HANDSHAKES}, log.read_text()
