"""TLS with a key in a PKCS#11 token: the rows of docs/tls.md, and ``tls-config --check``.

Debian 12 has the engine of libp11, Debian 13 pkcs11-provider besides, which is taken where both are.
"""

from __future__ import annotations

import asyncio
import platform
import re
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from authority import Authority, write
from charging import TokenStation
from cryptography.hazmat.primitives.asymmetric import ec
from peers import free_port
from reasons import Ended, command
from servers import handshake, running, serving, sixty
from softhsm import PIN, SOFTHSM

from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.openssl import check, failures, together
from stationkey.openssl.servers import TOKEN_BY_ENGINE, TOKEN_BY_PROVIDER

CHARGING_STATION, V2G, V2G20 = CertificateType
HAS_PROVIDER = int(platform.freedesktop_os_release()["VERSION_ID"]) >= 13
PRINTED = TOKEN_BY_PROVIDER if HAS_PROVIDER else TOKEN_BY_ENGINE
VERSIONS = {V2G: ssl.TLSVersion.TLSv1_2, V2G20: ssl.TLSVersion.TLSv1_3}
ALGORITHMS = {
    CHARGING_STATION: Algorithm.ECDSA_SHA256,
    V2G: Algorithm.ECDSA_SHA256,
    V2G20: Algorithm.ECDSA_SHA512,
}
each_type = pytest.mark.parametrize("kind", VERSIONS, ids=["TLS1.2-P256", "TLS1.3-P521"])


@dataclass(frozen=True)
class Secc:
    """A station with a certificate of each type, whose keys are in one token; and the authorities."""

    station: TokenStation
    authorities: dict[CertificateType, Authority]

    def renew(self, kind: CertificateType) -> Path:
        return asyncio.run(self.station.install(kind, self.authorities[kind], ALGORITHMS[kind]))

    def root(self, kind: CertificateType) -> Path:
        return self.station.directory / f"{kind}.root.pem"

    @property
    def pin(self) -> Path:
        return self.station.token.directory / "pin"

    def named(self, file: Path) -> str:
        """The URI of a key with the path of the PIN, as docs/tls.md has it."""
        return f"{file.read_text().splitlines()[0]}?pin-source={self.pin}"

    def chain(self, file: Path) -> list[str]:
        """Options of OpenSSL's programs for the chain in a file."""
        return ["-cert", str(file), "-cert_chain", str(file)]

    @property
    def environment(self) -> dict[str, str]:
        return self.station.openssl_environment()


@pytest.fixture(scope="module")
def secc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secc]:
    p256, p521 = Authority(ec.SECP256R1()), Authority(ec.SECP521R1())
    with TokenStation(tmp_path_factory.mktemp("secc")) as station:
        made = Secc(station, {CHARGING_STATION: p256, V2G: p256, V2G20: p521})
        for kind, authority in made.authorities.items():
            made.renew(kind)
            write(made.root(kind), authority.root)
        yield made


def by_engine(secc: Secc, file: Path, port: int) -> list[str]:
    key = ["-engine", "pkcs11", "-keyform", "engine", "-key", secc.named(file)]
    return ["openssl", "s_server", "-accept", str(port), "-www", *secc.chain(file), *key]


def by_provider(secc: Secc, file: Path, port: int) -> list[str]:
    return ["openssl", "s_server", "-accept", str(port), "-www", *secc.chain(file), "-key", str(file)]


def by_gnutls(secc: Secc, file: Path, port: int) -> list[str]:
    key = ["--x509certfile", str(file), "--x509keyfile", secc.named(file)]
    return ["gnutls-serv", "--provider", str(SOFTHSM), "--http", "--quiet", "--port", str(port), *key]


NAMING = {"s_server": by_provider if HAS_PROVIDER else by_engine, "gnutls-serv": by_gnutls}
"""Servers that take file and key on their command line."""


def started(secc: Secc, server: str, file: Path, directory: Path) -> tuple[int, AbstractContextManager[None]]:
    port = free_port()
    return port, running(NAMING[server](secc, file, port), port, directory, secc.environment)


@each_type
@pytest.mark.parametrize("server", NAMING)
def test_a_server_that_names_the_key_serves(secc: Secc, server: str, kind: CertificateType, tmp_path: Path) -> None:
    port, runs = started(secc, server, secc.station.active(kind), tmp_path)
    with runs:
        assert sixty(port, secc.root(kind), VERSIONS[kind]) == {"ok": 60}


def as_on_this_system(text: str, directory: Path) -> str:
    """A printed configuration: SoftHSM has its own in the environment, and its tokens are root's."""
    if start := re.search(r"(?m)^#   ExecStartPre=(sed .*)$", text):
        subprocess.run(start[1].replace("%d", str(directory)), shell=True, cwd=directory, check=True)
        text = text.replace("/run/secc", str(directory))
    return text.replace("worker_processes", "user root; env SOFTHSM2_CONF; worker_processes")


@each_type
@pytest.mark.parametrize("server", PRINTED)
def test_a_server_as_printed_serves_sixty_handshakes_six_at_a_time(
    secc: Secc, server: str, kind: CertificateType, tmp_path: Path
) -> None:
    options = ("--keystore", secc.station.keystore, "--state-dir", str(secc.station.state_dir))
    printed = command("tls-config", "--for", server, *options)
    assert (printed.exit_code, printed.stdout) == (0, PRINTED[server])
    file = secc.station.active(kind)
    for name, content in {"secc.pem": file.read_text(), "pin": PIN}.items():
        write(tmp_path / name, content)
    text = as_on_this_system(printed.stdout, tmp_path)
    with serving(server, text, file, tmp_path, secc.environment) as port:
        if server == "stunnel":  # pkcs11-provider logs in once for each of its threads that begin at once: docs/tls.md
            assert handshake(port, secc.root(kind), VERSIONS[kind]) == "ok"
        assert sixty(port, secc.root(kind), VERSIONS[kind]) == {"ok": 60}


def test_python_needs_the_provider(secc: Secc) -> None:
    """Where it is, see the server in Python above."""
    done = command("tls-config", "--for", "python", "--keystore", secc.station.keystore)
    assert done.exit_code == (0 if HAS_PROVIDER else 1)
    assert HAS_PROVIDER or done.reason == "server_unsupported"


def test_the_key_before_serves_after_a_renewal_until_it_is_confirmed(secc: Secc, tmp_path: Path) -> None:
    """As with a key in a TPM: docs/lifecycle.md."""
    earlier = secc.station.active(V2G).read_bytes()
    active = secc.renew(V2G)
    previous = active.with_suffix(".previous.pem")
    secc.station.station.wait_for(file=str(previous))
    assert previous.read_bytes() == earlier
    for server in NAMING:
        for file in (active, previous):
            port, runs = started(secc, server, file, tmp_path)
            with runs:
                assert handshake(port, secc.root(V2G), VERSIONS[V2G]) == "ok"


def test_the_pin_is_given_to_a_service_through_a_pipe(secc: Secc) -> None:
    options = ("--keystore", secc.station.keystore, "--state-dir", str(secc.station.state_dir))
    done = command("key-auth", V2G, *options)
    assert (done.exit_code, done.stdout) == (0, PIN)


def test_the_pin_is_in_nothing_that_the_station_writes(secc: Secc) -> None:
    kinds = [[], *(["--for", server] for server in PRINTED)]
    printed = [command("tls-config", *kind, "--keystore", secc.station.keystore).stdout for kind in kinds]
    written = [path.read_bytes() for path in secc.station.state_dir.rglob("*") if path.is_file()]
    assert len(written) > len(ALGORITHMS)
    assert not [content for content in (*written, *map(str.encode, printed)) if PIN.encode() in content]


# tls-config --check.


def checked(secc: Secc, kind: CertificateType, *options: str, keystore: str = "", **environment: str) -> Ended:
    options = options or ("--keystore", keystore or secc.station.keystore)
    done = command("tls-config", "--check", kind, "--state-dir", str(secc.station.state_dir), *options, **environment)
    assert PIN not in done.output
    return done


SEVERAL = f"{together.HANDSHAKES} handshakes, {together.AT_A_TIME} at a time: ok"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param(V2G, ["TLSv1.2 server, ECDHE-ECDSA-AES128-SHA256: ok", SEVERAL], id="iso15118-2"),
        pytest.param(V2G20, ["TLSv1.3 server, TLS_AES_256_GCM_SHA384: ok", SEVERAL], id="iso15118-20"),
        pytest.param(
            CHARGING_STATION,
            ["TLSv1.2 client, ECDHE-ECDSA-AES256-GCM-SHA384: ok", "TLSv1.3 client, TLS_AES_256_GCM_SHA384: ok"],
            id="client",
        ),
    ],
)
def test_a_good_key_is_checked_as_a_car_or_a_csms_would(secc: Secc, kind: CertificateType, said: list[str]) -> None:
    done = checked(secc, kind)
    assert (done.exit_code, done.output) == (0, "".join(f"{kind}.pem: {line}\n" for line in said))


def test_the_key_store_is_the_one_that_the_key_is_in(secc: Secc, tmp_path: Path) -> None:
    lines = ['keystore = "tpm2:device:/dev/null/none"', f'keystores.se = "{secc.station.keystore}"']
    file = write(tmp_path / "stationkey.toml", "\n".join([*lines, 'keystore_for.v2g20_certificate = "se"', ""]))
    done = checked(secc, V2G20, "--config", str(file))
    assert done.exit_code == 0, done.output


def test_a_missing_module_of_openssl_is_told_with_the_packages(secc: Secc, tmp_path: Path) -> None:
    nowhere = {"OPENSSL_MODULES": str(tmp_path), "OPENSSL_ENGINES": str(tmp_path)}
    done = checked(secc, V2G, **nowhere)
    assert (done.exit_code, done.reason) == (failures.EXIT_MODULE, "tls_provider_missing")
    assert "pkcs11-provider" in done.stderr  # words: the packages
    assert "libengine-pkcs11-openssl" in done.stderr  # words: same


def test_a_wrong_pin_is_not_tried_by_openssl(secc: Secc, tmp_path: Path) -> None:
    """The token of the check refuses it once, and is asked no more."""
    write(tmp_path / "pin", "00000000").chmod(0o600)
    wrong = secc.station.keystore.replace(str(secc.pin), str(tmp_path / "pin"))
    for _ in range(2):
        done = checked(secc, V2G, keystore=wrong)
        assert (done.exit_code, done.reason) == (failures.EXIT_KEY, "pkcs11_pin_wrong")


def test_a_token_that_is_away_is_told(secc: Secc, tmp_path: Path) -> None:
    bring_back = secc.station.token.hide(tmp_path / "drawer")
    done = checked(secc, V2G)
    bring_back()
    assert (done.exit_code, done.reason) == (failures.EXIT_DEVICE, "pkcs11_token_missing")


@pytest.mark.parametrize("function", ["C_FindObjectsInit", "C_Sign"], ids=["asked first", "in the handshake"])
def test_a_token_that_hangs_is_told_within_the_bound(
    secc: Secc, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = secc.station.token
    monkeypatch.setattr(check, "TIMEOUT", 1.0)
    keystore = token.shimmed
    token.order(f"{function} hang")
    done = checked(secc, V2G, keystore=keystore)
    token.order()
    assert (done.exit_code, done.reason) == (failures.EXIT_DEVICE, "tls_token_failed")


def test_a_path_cannot_add_lines_to_the_configuration() -> None:
    done = command("tls-config", "--keystore", "pkcs11:token=a?module-path=/lib/a%0A.so")
    assert (done.exit_code, done.reason) == (1, "keystore_uri_invalid")
