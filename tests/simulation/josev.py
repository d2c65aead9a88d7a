"""Josev and its CSMS: asks for CSRs, installs certificates, and tells what became of them.

Remembers what it meant by each message: that is what the checks compare with. Its certificate directory is somebody
else's disk, where anything may happen at any moment.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stationkey.contract.active_names import Owner, file_name
from stationkey.keystore.protocol import key_id_of

OWNERS: Final = (
    ("v2g_certificate", None),
    ("v2g_certificate", "DE*ABC*E1"),
    ("v2g_certificate", "DE*ABC*E2"),
    ("charging_station_certificate", None),
    ("charging_station_certificate", "DE*ABC*E1"),
    ("v2g20_certificate", None),
)
_NOW: Final = datetime(2026, 3, 1, tzinfo=UTC)
_CA: Final = ec.derive_private_key(4711, ec.SECP256R1())
_CA_NAME: Final = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sub-CA")])
_HASH: Final = hashes.SHA256()


@dataclass(slots=True)
class Asked:
    """A request, and what became of it.

    Attributes:
        payload: what was said.
        owner: certificate type and EVSE.
        other: whether the same id was used with other content, too.
        taken: whether the broker took it.
        answers: how often it was answered, rejections included.
        csr: the accepted answer.
    """

    payload: bytes
    owner: tuple[str, str]
    other: bool = False
    taken: bool = False
    answers: int = 0
    csr: str = ""


@dataclass(slots=True)
class Told:
    """A status.

    Attributes:
        verb: what it says.
        owner: certificate type, and EVSE where one is named.
        key_id: the key that Josev means.
        named: whether the message itself names the key.
        by_file: whether it names the file under ``active/``.
        number: its place in what Josev said.
        last: where it was last said.
    """

    verb: str
    owner: tuple[str, str | None]
    key_id: str
    named: bool
    by_file: bool
    number: int
    last: int
    payload: bytes


@dataclass(slots=True)
class Installed:
    """A certificate that Josev has.

    Attributes:
        pem: leaf and issuer.
        path: its file.
        removed: whether Josev took it away, every piece of it.
    """

    owner: tuple[str, str]
    pem: bytes
    path: Path
    removed: bool = False


@dataclass(slots=True)
class Josev:
    """Josev, with what it knows.

    Attributes:
        rng: makes what is not a choice of the simulation: ids.
        folder: its certificate directory.
        owners: what it asks CSRs for: certificate type and EVSE.
        say: gives a message to the broker; False where it did not take it.
        unreadable: files that cannot be opened now.
    """

    rng: random.Random
    folder: Path
    state_dir: Path
    owners: list[tuple[str, str | None]]
    say: Callable[[bytes, str, int], bool]
    asked: dict[str, Asked] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    certificates: dict[str, Installed] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    unsaid: list[tuple[bytes, str, int]] = field(default_factory=list)
    number: int = 0
    _serial: int = 0
    _since: int = 0  # how often it has asked since it installed

    # Messages.

    def _id(self) -> str:
        digits = f"{self.rng.getrandbits(128):032x}"
        text = f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
        return text.upper() if self.rng.random() < 0.1 else text

    def _send(self, payload: bytes, about: str) -> None:
        self.number += 1
        self.unsaid.append((payload, about, self.number))
        self.flush()

    def flush(self) -> None:
        """Give the broker what it did not take before, in order."""
        while self.unsaid and self.say(*self.unsaid[0]):
            _, about, _ = self.unsaid.pop(0)
            if about in self.asked:
                self.asked[about].taken = True

    def ask(self, rng: random.Random) -> None:
        """Ask for a CSR; now and then once more, or by the id of another request."""
        if self._since >= 3 and rng.random() < 0.8:
            self.install(rng)
            return
        self._since += 1
        known = sorted(self.asked)
        if known and rng.random() < 0.25:
            request_id = known[-1 - min(int(rng.expovariate(0.7)), len(known) - 1)]
            if rng.random() < 0.8:
                self._send(self.asked[request_id].payload, request_id)
                return
            self.asked[request_id].other = True
            self._send(_request(request_id, "v2g_certificate", None, "another name"), request_id)
            return
        request_id = self._id()
        kind, evse = rng.choice(self.owners)
        payload = _request(request_id, kind, evse, "DE-ABC-S-1", algorithm=rng.choices((None, "RSA_SHA256"), (9, 1))[0])
        self.asked[request_id] = Asked(payload, (kind, evse or ""))
        self._send(payload, request_id)

    def probe(self) -> str:
        """Ask for a CSR that nothing speaks against; return the id."""
        request_id = self._id()
        payload = _request(request_id, "v2g_certificate", None, "DE-ABC-S-1")
        self.asked[request_id] = Asked(payload, ("v2g_certificate", ""))
        self._send(payload, request_id)
        return request_id

    def nonsense(self, rng: random.Random) -> None:
        """Say something that is no request."""
        payload = rng.choice((b"", b"{", b"[]", b'{"name": "cs_status_and_limits"}', b"\xff" * 40, b"9" * 3000))
        self._send(payload, "")

    def heard(self, payload: bytes) -> dict[str, Any]:
        """Read an answer."""
        answer: dict[str, Any] = json.loads(payload)
        asked = self.asked.get(answer["id"])
        if asked is not None:
            asked.answers += 1
            asked.csr = asked.csr or answer["data"].get("csr", "")
        return answer

    # Certificates.

    def install(self, rng: random.Random) -> None:
        """Have the newest or another CSR signed, put the certificate into the directory, and tell."""
        known = [(one.owner, one.csr) for one in self.asked.values() if one.csr]
        fresh = [(owner, csr) for owner, csr in known if key_id_in(csr) not in self.certificates]
        if not fresh:
            return
        self._since = 0
        owner, csr = fresh[-1] if rng.random() < 0.7 else rng.choice(fresh)
        key_id = key_id_in(csr)
        if rng.random() < 0.15:
            self._tell(rng, "failed_installation", owner, key_id)
            return
        self._serial += 1
        pem = _certificate(csr, self._serial)
        path = self.folder / f"{rng.choice('abc')}{self._serial}.pem"
        old = [one for one in self.certificates.values() if one.owner == owner and not one.removed]
        if old and rng.random() < 0.3:  # written over the one before
            self._gone(old[-1])
            path = self.folder / old[-1].path.name
        self.certificates[key_id] = Installed(owner, pem, path)
        path.write_bytes(pem)
        self._tell(rng, "installed", owner, key_id)

    def delete(self, rng: random.Random) -> None:
        """Take a certificate away, most of the time an older one of its owner, and tell."""
        there = [(key_id, one) for key_id, one in self.certificates.items() if not one.removed]
        if not there:
            return
        key_id, one = there[0] if rng.random() < 0.6 else rng.choice(there)
        self._gone(one)
        self._tell(rng, "deleted", one.owner, key_id)

    def _gone(self, one: Installed) -> None:
        """Take a certificate away: its file, whatever is in it, and what leads to it."""
        one.removed = True
        for path in sorted(self.folder.rglob("*")):
            if path == one.path or (path.is_symlink() and path.readlink() == one.path):
                path.unlink()
        self.unreadable.discard(str(one.path))

    def again(self, rng: random.Random) -> None:
        """Say a status once more, with its own id."""
        if self.told:
            message_id = rng.choice(sorted(self.told))
            told = self.told[message_id]
            told.last = self.number + 1
            self._send(told.payload, message_id)

    def _tell(self, rng: random.Random, verb: str, owner: tuple[str, str], key_id: str) -> None:
        message_id = self._id()
        way = rng.choices(("", "key", "file"), (6, 3, 1))[0]
        path = ""
        if way == "key":
            path = f"/somewhere/{key_id}.pem"
        elif way == "file" and verb == "deleted":
            path = str(self.state_dir / "active" / file_name(Owner("", owner[0], owner[1])))
        named = (owner[0], owner[1] if owner[1] or path else None)
        payload = _status(message_id, verb, named, path)
        by_file = bool(path) and way == "file"
        self.told[message_id] = Told(
            verb, named, key_id, way == "key", by_file, self.number + 1, self.number + 1, payload
        )
        self._send(payload, message_id)

    # What happens to the directory.

    def mischief(self, rng: random.Random) -> None:
        """Do something to a file of the directory that leaves its certificate somewhere in it, or in doubt."""
        there = [one for one in self.certificates.values() if not one.removed and one.path.exists()]
        if not there:
            return
        one = rng.choice(there)
        match rng.choice((0, 0, 1, 2, 3, 4, 4, 5)):
            case 0:
                one.path.write_bytes(one.pem[: rng.randrange(len(one.pem))])
            case 1:
                self._move(one, self.folder / f"{rng.choice('xyz')}{one.path.name}")
            case 2:
                kept = self.folder / "sub"
                kept.mkdir(exist_ok=True)
                self._move(one, kept / one.path.name)
            case 3:
                link = self.folder / f"link-{one.path.name}"
                if not link.is_symlink():
                    link.symlink_to(one.path)
            case 4:
                self.unreadable.add(str(one.path))
            case _:
                one.path.write_bytes(one.pem)

    def _move(self, one: Installed, path: Path) -> None:
        one.path.rename(path)
        one.path = path

    def mend(self) -> None:
        """Make each file whole."""
        self.unreadable.clear()
        shutil.rmtree(self.folder / "sub", ignore_errors=True)
        for path in self.folder.iterdir():
            if path.is_symlink():
                path.unlink()
        for one in self.certificates.values():
            if not one.removed:
                one.path = self.folder / one.path.name
                one.path.write_bytes(one.pem)


def key_id_in(csr: str) -> str:
    """The name of the key that a CSR is for."""
    return key_id_of(_public(csr))


@cache
def _public(csr: str) -> bytes:
    return (
        x509.load_pem_x509_csr(csr.encode())
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def _certificate(csr: str, serial: int) -> bytes:
    asked = x509.load_pem_x509_csr(csr.encode())
    begins = _NOW + timedelta(seconds=serial)
    leaf = (
        x509.CertificateBuilder(_CA_NAME, asked.subject, asked.public_key(), serial, begins, begins + timedelta(90))
        .sign(_CA, _HASH, ecdsa_deterministic=True)
        .public_bytes(serialization.Encoding.PEM)
    )
    return leaf + _issuer()


@cache
def _issuer() -> bytes:
    begins = _NOW - timedelta(days=400)
    return (
        x509.CertificateBuilder(_CA_NAME, _CA_NAME, _CA.public_key(), 1, begins, begins + timedelta(4000))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(_CA, _HASH, ecdsa_deterministic=True)
        .public_bytes(serialization.Encoding.PEM)
    )


def _request(request_id: str, kind: str, evse: str | None, name: str, *, algorithm: str | None = None) -> bytes:
    data: dict[str, str] = {
        "certificate_type": kind,
        "common_name": name,
        "organization_name": "EcoG",
        "country_name": "DE",
    }
    if kind == "v2g20_certificate":
        data["algorithm"] = "ECDSA_SHA512"
    elif algorithm is not None:
        data["algorithm"] = algorithm
    if evse is not None:
        data["evse_id"] = evse
    return json.dumps({"id": request_id, "name": "generate_csr", "type": "request", "data": data}).encode()


def _status(message_id: str, verb: str, owner: tuple[str, str | None], path: str) -> bytes:
    data = {"certificate_type": owner[0], "status": verb}
    if owner[1]:
        data["evse_id"] = owner[1]
    if path:
        data["private_key_path"] = path
    name = "certificate_installation_status"
    return json.dumps({"id": message_id, "name": name, "type": "update", "data": data}).encode()
