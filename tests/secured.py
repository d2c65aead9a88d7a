"""A broker behind TLS, and an authority of the tests' own for both sides of it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from issuing import issue
from peers import Mosquitto, free_port, is_listening

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.mqtt.url import Broker

DOCUMENT = Path(__file__).parent.parent / "docs/broker.md"
NAME = "broker.station.test"
"""In the broker's certificate, beside its address."""


def commands(heading: str) -> str:
    """The first shell block under a heading of docs/broker.md."""
    block = rf"^#+ {re.escape(heading)}$.*?^```sh\n(.*?)^```$"
    found = re.search(block, DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def write_secret(path: Path, content: str | bytes) -> Path:
    """A file for its owner alone."""
    path.touch(mode=0o600)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, in two files."""

    certificate: Path
    key: Path


class Authority:
    """Signs for brokers and for their clients.

    Args:
        directory: where its files are written; its own certificate is `file`.
        key: its private key; an elliptic curve's by default. It is in `key_file`, too.
    """

    def __init__(self, directory: Path, key: Any = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._key = key or ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA {directory.name}")])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = self._sign(self._name, self._key.public_key(), [constraints], age=0)
        self.file = directory / "ca.pem"
        self.file.write_bytes(certificate)
        self.key_file = write_secret(directory / "ca.key", _pem(self._key))

    def elsewhere(self, directory: Path) -> Authority:
        """The same authority, with files in another directory."""
        same = Authority(directory, self._key)
        same._name, same.file = self._name, self.file
        return same

    def _sign(self, subject: x509.Name, public_key: Any, extensions: list[x509.ExtensionType], *, age: int) -> bytes:
        begins = datetime.now(UTC) - timedelta(days=1 + age)
        return issue(
            subject,
            public_key,
            [(extension, True) for extension in extensions],
            issuer=self._name,
            key=self._key,
            begins=begins,
            ends=begins + timedelta(days=30),
        ).public_bytes(serialization.Encoding.PEM)

    def certify(self, name: str, public_key: Any, *, age: int = 0, names: tuple[x509.GeneralName, ...] = ()) -> bytes:
        """A certificate in PEM, of `age` days plus one, for 30 days."""
        extensions: list[x509.ExtensionType] = [x509.SubjectAlternativeName(names)] if names else []
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return self._sign(subject, public_key, extensions, age=age)

    def identity(self, name: str, **options: Any) -> Identity:
        """A certificate and its key, under this name."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = Identity(self._directory / f"{name}.crt", write_secret(self._directory / f"{name}.key", _pem(key)))
        made.certificate.write_bytes(self.certify(name, key.public_key(), **options))
        return made

    def broker(self, *, age: int = 0, address: str = "127.0.0.1") -> Identity:
        """The broker's: `NAME`, and an address."""
        names = (x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address(address)))
        return self.identity("broker", age=age, names=names)


def _pem(key: Any) -> bytes:
    text: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return text


class SecuredMosquitto(Mosquitto):
    """A Mosquitto with a TLS listener beside the plain one.

    Args:
        directory: its own.
        server: its certificate and key.
        clients: the authority of the certificates that clients must show; None for no such.
        extra: more lines of configuration.
    """

    def __init__(self, directory: Path, server: Identity, clients: Authority | None = None, *extra: str) -> None:
        self.tls_port = free_port()
        lines = [f"listener {self.tls_port} 127.0.0.1", f"certfile {server.certificate}", f"keyfile {server.key}"]
        if clients is not None:
            lines += [f"cafile {clients.file}", "require_certificate true", "use_identity_as_username true"]
        super().__init__(directory, *extra, *lines)

    def listening(self) -> bool:
        return super().listening() and is_listening(self.tls_port)  # which it opens after the plain one

    @property
    def tls_url(self) -> str:
        """``mqtts://127.0.0.1:PORT``."""
        return f"mqtts://127.0.0.1:{self.tls_port}"

    @property
    def tls(self) -> Broker:
        """The same, parsed."""
        return Broker("127.0.0.1", self.tls_port, tls=True)


def terms(authority: Authority, identity: Identity | None = None, **others: Any) -> MqttTerms:
    """How to speak to a broker of this authority, as this client."""
    if identity is not None:
        others["certificate_file"] = SecretReference(str(identity.certificate))
        others["key_file"] = SecretReference(str(identity.key))
    return MqttTerms(ca_file=authority.file, **others)
