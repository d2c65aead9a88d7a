"""TLS servers, configured by ``tls-config --for``, serve several cars at a time with a key in the TPM."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from authority import Authority, write
from charging import COMMON_NAME, ChargingStation
from cryptography.hazmat.primitives.asymmetric import ec
from outside import BOUND
from reasons import command
from servers import AT_A_TIME, HANDSHAKES, NODE, PROGRAMS, serving, sixty

from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.openssl import together
from stationkey.openssl.servers import SERVERS

V2G = CertificateType.V2G_CERTIFICATE


@pytest.fixture(scope="module")
def secc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChargingStation, Path]]:
    """A station with a certificate of ISO 15118-2, and the root that cars trust."""
    directory = tmp_path_factory.mktemp("servers")
    authority = Authority(ec.SECP256R1())
    with ChargingStation(directory) as station:
        asyncio.run(station.install(V2G, authority, Algorithm.ECDSA_SHA256))
        yield station, write(directory / "root.pem", authority.root)


ASKED = ["dpkg-query", "--show", "--showformat", "${source:Upstream-Version}", "tpm2-openssl"]
PROVIDER = subprocess.check_output(ASKED, text=True)
CONCURRENT = tuple(map(int, PROVIDER.split("."))) >= (1, 3)
"""Whether tpm2-openssl serves several threads at a time."""
SERVED = [server for server in SERVERS if CONCURRENT or server != "stunnel"]
"""stunnel aborts with tpm2-openssl 1.1.1; haproxy-tcp serves in its place."""


def as_printed(station: ChargingStation, server: str, directory: Path) -> AbstractContextManager[int]:
    """A server as printed; gives its port."""
    return serving(server, SERVERS[server], station.active(V2G), directory, station.openssl_environment())


def test_each_server_is_tried() -> None:
    assert PROGRAMS.keys() == SERVERS.keys()


@pytest.mark.parametrize("server", SERVERS)
def test_its_configuration_is_printed(server: str) -> None:
    done = command("tls-config", "--for", server, "--keystore", "tpm2:device:/dev/tpmrm0")
    assert (done.exit_code, done.stdout) == (0, SERVERS[server])


def test_printing_and_checking_exclude_each_other() -> None:
    assert command("tls-config", "--for", "nginx", "--check", "v2g_certificate").exit_code == 2


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS1.2", "TLS1.3"])
@pytest.mark.parametrize("server", SERVED)
def test_a_server_as_printed_serves_sixty_handshakes_six_at_a_time(
    secc: tuple[ChargingStation, Path], server: str, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    with as_printed(secc[0], server, tmp_path) as port:
        assert sixty(port, secc[1], version) == {"ok": HANDSHAKES}


def gnutls_car(port: int, root: Path) -> str:
    """GnuTLS' own client: "ok", or what it says."""
    names = ("--x509cafile", str(root), "--verify-hostname", COMMON_NAME[V2G])
    done = subprocess.run(
        ["gnutls-cli", "--port", str(port), *names, "127.0.0.1"],
        input="GET / HTTP/1.1\r\nHost: secc\r\nConnection: close\r\n\r\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND,
    )
    trusted = "- Status: The certificate is trusted." in done.stdout and "HTTP/1.1 204" in done.stdout
    return "ok" if trusted else done.stdout + done.stderr


@pytest.mark.parametrize("server", ["nginx", "haproxy"])
def test_a_server_as_printed_serves_gnutls_six_at_a_time(
    secc: tuple[ChargingStation, Path], server: str, tmp_path: Path
) -> None:
    station, root = secc
    with as_printed(station, server, tmp_path) as port, ThreadPoolExecutor(AT_A_TIME) as cars:
        seen = Counter(cars.map(lambda _: gnutls_car(port, root), range(HANDSHAKES)))
        assert seen == {"ok": HANDSHAKES}


NODE_CARS = """
const [port, ca, version, all, atATime] = process.argv.slice(1);
const tls = require("node:tls"), fs = require("node:fs"), seen = {};
const request = "GET / HTTP/1.1\\nHost: secc\\nConnection: close\\n\\n";
const options = {
  port, host: "127.0.0.1", ca: fs.readFileSync(ca), minVersion: version, maxVersion: version,
  checkServerIdentity: () => undefined,
};
const drive = () => new Promise((done) => {
  let answer = "";
  const end = (what) => { seen[what] = (seen[what] ?? 0) + 1; done(); };
  const car = tls.connect(options, () => car.write(request.replaceAll("\\n", "\\r\\n")));
  car.on("data", (data) => { answer += data; }).on("error", ({ message }) => { answer = message; });
  car.on("close", () => end(answer.startsWith("HTTP/1.1 204") ? "ok" : answer));
});
let left = Number(all);
const lane = async () => { while (left-- > 0) await drive(); };
Promise.all(Array.from({ length: Number(atATime) }, lane)).then(() => console.log(JSON.stringify(seen)));
"""


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("server", ["nginx", "haproxy"])
def test_a_server_as_printed_serves_node_six_at_a_time(
    secc: tuple[ChargingStation, Path], server: str, version: str, tmp_path: Path
) -> None:
    station, root = secc
    with as_printed(station, server, tmp_path) as port:
        arguments = map(str, (port, root, version, HANDSHAKES, AT_A_TIME))
        done = subprocess.run([NODE, "-e", NODE_CARS, *arguments], stdout=subprocess.PIPE, check=True, timeout=BOUND)
        assert json.loads(done.stdout) == {"ok": HANDSHAKES}


def check(station: ChargingStation) -> tuple[list[str], str]:
    """``tls-config --check``: its lines for one handshake at a time, and that for several."""
    options = ("--keystore", station.keystore, "--state-dir", str(station.state_dir))
    done = command("tls-config", "--check", V2G, *options, **station.environment)
    assert done.exit_code == 0, done.output
    *one_at_a_time, several = done.stdout.splitlines()
    return one_at_a_time, several


SEVERAL = f"{V2G}.pem: {together.HANDSHAKES} handshakes, {together.AT_A_TIME} at a time: "


def test_the_check_tells_what_comes_of_several_handshakes_at_a_time(secc: tuple[ChargingStation, Path]) -> None:
    """What that is cannot be known beforehand with tpm2-openssl 1.1.1."""
    one_at_a_time, several = check(secc[0])
    assert len(one_at_a_time) == 1
    assert re.fullmatch(re.escape(SEVERAL) + "(ok|warning: [0-9]+ failed; .+)", several)
    if CONCURRENT:
        assert several == SEVERAL + "ok"


@pytest.mark.parametrize("failing", [0, 5, together.HANDSHAKES])
def test_the_check_counts_what_fails_only_several_at_a_time(
    secc: tuple[ChargingStation, Path], failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter([ssl.SSLError("bad signature")] * failing)

    def shake(_use: object, _version: object, _chain: object, port: int, _listener: None) -> None:
        socket.create_connection(("127.0.0.1", port), BOUND).close()
        for fault in faults:
            raise fault

    monkeypatch.setattr(together, "shake", shake)
    _, several = check(secc[0])
    told = several.removeprefix(SEVERAL)
    assert told.startswith(f"warning: {failing} failed; " if failing else "ok")
    assert (f"tpm2-openssl {PROVIDER}," in told) is bool(failing)
