"""The daemon at a broker that wants a client certificate, with the key of that certificate in the TPM.

The TPM stands behind a resource manager, as it does in a station: the daemon is two clients of it, its key store and
the OpenSSL of its TLS. The broker's authority has an RSA key of 4096 bits, which this TPM cannot even verify with.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from outside import BOUND, Station, run, software_station
from peers import ResourceManager, Swtpm

from secured import Authority, SecuredMosquitto, commands, write_secret
from stationkey.contract.profiles import Algorithm
from stationkey.openssl.check import setup_of

MAKE_KEY = """\
import sys
from cryptography.hazmat.primitives import serialization as s
from stationkey.keystore.tpm2.store import Tpm2KeyStore
key = Tpm2KeyStore(sys.argv[1]).generate(sys.argv[2])
public = s.load_der_public_key(key.public)
print(key.pem().decode(), public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode(), sep="\\n")
"""
"""In a process of its own: a process keeps the first D-Bus that it meets."""


@dataclass(frozen=True)
class Site:
    """What stands around the daemon."""

    directory: Path
    tpm: Swtpm
    resource_manager: ResourceManager
    brokers: Authority
    clients: Authority
    broker: SecuredMosquitto

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.resource_manager.environment}

    def make_key(self, algorithm: Algorithm) -> Path:
        """A key in the TPM, with a certificate of the clients' authority for ``stationkey``: one file."""
        command = [sys.executable, "-c", MAKE_KEY, self.resource_manager.tcti, algorithm]
        made = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout
        private, public = made.split("-----BEGIN PUBLIC KEY-----")
        certificate = self.clients.certify(
            "stationkey", load_pem_public_key(f"-----BEGIN PUBLIC KEY-----{public}".encode())
        )
        return write_secret(self.directory / "stationkey.pem", private.encode() + certificate)

    def station(self, key: Path, **environment: str) -> Station:
        """A daemon, not started yet."""
        file = self.directory / "stationkey.toml"
        file.write_text(f'[mqtt]\nca_file = "{self.brokers.file}"\ncertificate_file = "{key}"\n')
        options = ("--broker", self.broker.tls_url, "--keystore", f"tpm2:{self.resource_manager.tcti}")
        environment |= self.resource_manager.environment
        return Station(self.directory, *options, "--config", str(file), **environment)

    def asked(self) -> subprocess.CompletedProcess[str]:
        """Josev asks, over the listener without TLS."""
        data = ("--common-name", "DE-ABC-S-1", "--organization-name", "EcoG", "--country-name", "DE")
        return run("request", "v2g_certificate", *data, "--broker", self.broker.url)


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("brokers"), rsa.generate_private_key(65537, 4096))


@pytest.fixture
def site(tmp_path: Path, brokers: Authority) -> Iterator[Site]:
    clients = Authority(tmp_path / "clients")
    with (
        Swtpm(tmp_path / "swtpm") as tpm,
        ResourceManager(tmp_path / "manager", tpm=tpm.tcti) as resource_manager,
        SecuredMosquitto(tmp_path / "mosquitto", brokers.broker(), clients) as broker,
    ):
        yield Site(tmp_path, tpm, resource_manager, brokers, clients, broker)


@contextmanager
def manager(directory: Path) -> Iterator[socket.socket]:
    """Where a service manager is told of what becomes of the daemon."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(directory / "notify"))
        notified.settimeout(BOUND)
        yield notified


@pytest.mark.parametrize("algorithm", [Algorithm.ECDSA_SHA256, Algorithm.ECDSA_SHA512, Algorithm.RSA_SHA256])
def test_the_broker_knows_the_daemon_by_a_certificate_whose_key_is_in_the_tpm(site: Site, algorithm: Algorithm) -> None:
    key = site.make_key(algorithm)
    assert b"BEGIN TSS2 PRIVATE KEY" in key.read_bytes()
    with manager(site.directory) as notified:
        station = site.station(key, NOTIFY_SOCKET=str(notified.getsockname()))
        with station:
            assert notified.recv(64) == b"READY=1"
            assert "u'stationkey'" in site.broker.log
            assert site.asked().returncode == 0  # its key store has the same TPM
            assert station.stop() == 0
            told = iter(lambda: notified.recv(256), b"STOPPING=1")
            assert all(line.startswith(b"STATUS=") for line in told)
        assert [line for line in station.lines if "level" in line and json.loads(line)["level"] == "error"] == []


def test_a_command_does_so_too(site: Site) -> None:
    key = site.make_key(Algorithm.ECDSA_SHA256)
    data = ("--common-name", "DE-ABC-S-1", "--organization-name", "EcoG", "--country-name", "DE")
    terms = ("--mqtt-ca-file", str(site.brokers.file), "--mqtt-certificate-file", str(key))
    with software_station(site.directory, site.broker):
        done = run(
            *("request", "v2g_certificate", *data, "--broker", site.broker.tls_url, *terms),
            **site.resource_manager.environment,
            TPM2OPENSSL_TCTI=site.resource_manager.tcti,
        )
    assert done.returncode == 0, done.stderr
    assert "u'stationkey'" in site.broker.log


def test_it_does_so_where_openssl_is_told_of_the_tpm_already(site: Site) -> None:
    """Then the TPM verifies as well, so the authority has a key that it knows."""
    variables = setup_of(f"tpm2:{site.resource_manager.tcti}").write(site.directory / "openssl.cnf")
    brokers = Authority(site.directory / "brokers")
    with SecuredMosquitto(site.directory / "another", brokers.broker(), site.clients) as broker:
        here = replace(site, brokers=brokers, broker=broker)
        with here.station(here.make_key(Algorithm.ECDSA_SHA256), **variables) as station:
            assert "u'stationkey'" in broker.log
            assert station.stop() == 0


def test_broker_and_resource_manager_may_die_and_the_daemon_comes_back_by_itself(site: Site) -> None:
    with site.station(site.make_key(Algorithm.ECDSA_SHA256)) as station:
        for ready in (2, 3):
            site.resource_manager.kill()
            site.broker.kill()
            station.wait_for(reason="broker_unreachable", count=ready - 1)
            site.broker.start()
            station.wait_for(reason="tls_tpm_failed", count=ready - 1)
            site.resource_manager.start()
            station.wait_for("ready", count=ready)
        assert site.asked().returncode == 0
        assert station.stop() == 0


def test_a_tpm_that_hangs_in_the_handshake_keeps_no_signal_waiting(site: Site) -> None:
    with site.station(site.make_key(Algorithm.ECDSA_SHA256)) as station:
        site.broker.kill()
        station.wait_for(reason="broker_unreachable")
        site.tpm.freeze()
        site.broker.start()
        station.signal(signal.SIGTERM)
        assert station.ended() == 0
        site.tpm.thaw()


def test_a_tpm_that_hangs_beside_a_connection_keeps_no_signal_waiting(site: Site) -> None:
    with site.station(site.make_key(Algorithm.ECDSA_SHA256)) as station:
        site.tpm.freeze()
        station.signal(signal.SIGTERM)
        assert station.ended() == 0
        site.tpm.thaw()


def test_a_key_that_is_not_the_certificate_s_is_refused_at_the_start(site: Site) -> None:
    certificate = site.make_key(Algorithm.ECDSA_SHA256).read_bytes().partition(b"-----BEGIN CERTIFICATE")
    key, _, _ = site.make_key(Algorithm.ECDSA_SHA256).read_bytes().partition(b"-----BEGIN CERTIFICATE")
    mixed = write_secret(site.directory / "mixed.pem", key + certificate[1] + certificate[2])
    with site.station(mixed).launch() as station:
        station.wait_for(str(mixed))
        assert station.ended() == 1


def test_a_key_of_another_tpm_is_said_and_tried_again(site: Site) -> None:
    key = site.make_key(Algorithm.ECDSA_SHA256)
    site.resource_manager.kill()
    site.tpm.kill()
    site.tpm.new_chip()
    site.tpm.start()
    site.resource_manager.start()
    with site.station(key).launch() as station:
        station.wait_for(reason="tls_tpm_failed", count=2)
        assert station.stop() == 0


def test_a_missing_provider_is_refused_at_the_start(site: Site) -> None:
    (site.directory / "modules").mkdir()
    station = site.station(site.make_key(Algorithm.ECDSA_SHA256), OPENSSL_MODULES=str(site.directory / "modules"))
    with station.launch():
        station.wait_for("tpm2-openssl")  # words: the package that helps
        assert station.ended() == 1


def test_a_key_that_openssl_made_by_the_commands_of_the_document_is_used(site: Site) -> None:
    site.make_key(Algorithm.ECDSA_SHA256)  # and with it the storage root key, as the daemon's first start does
    sign = f"openssl x509 -req -in stationkey.csr -CA {site.clients.file} -CAkey {site.clients.key_file} -days 8"
    subprocess.run(
        ["sh", "-euc", f"{commands('With the key in the TPM')}{sign} >stationkey.crt"],
        cwd=site.directory,
        env={**site.environment, "TPM2OPENSSL_TCTI": site.resource_manager.tcti},
        check=True,
        capture_output=True,
        timeout=BOUND,
    )
    parts = [(site.directory / f"stationkey.{suffix}").read_bytes() for suffix in ("key", "crt")]
    key = write_secret(site.directory / "stationkey.pem", b"".join(parts))
    with site.station(key) as station:
        assert "u'stationkey'" in site.broker.log
        assert station.stop() == 0
