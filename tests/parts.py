"""What several test files build a station of: requests, a certificate authority, and a service on a real ledger."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from issuing import issue
from msgspec import UNSET

from stationkey.config.settings import Terms, TpmTerms
from stationkey.contract import messages
from stationkey.contract.messages import CertificateInstallationStatus, GenerateCsrRequest
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.keystore import key_id_of, keystore_opener
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import KeyStoreThread
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.database import Database
from stationkey.ledger.lifecycle import KeyState
from stationkey.service.requests import StationKeyService
from stationkey.service.running_time import RunningTime
from stationkey.system.state_dir import DATABASE_NAME
from stationkey.x509.csr import PublicKey

V2G = CertificateType.V2G_CERTIFICATE
V2G20 = CertificateType.V2G20_CERTIFICATE
STATION = CertificateType.CHARGING_STATION_CERTIFICATE
E1, E2 = "DE*ABC*E1", "DE*ABC*E2"
CN, O, C = "DE-ABC-S-1", "Über Strom GmbH", "DE"  # noqa: E741 - the attributes' own names

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
"""What the station's clock says, unless a test sets it otherwise."""

Verb = Literal["installed", "deleted", "failed_installation"]


def sqlite_of(ledger: Ledger) -> Database:
    """Its database, which must be SQLite's."""
    assert isinstance(ledger.database, Database)
    return ledger.database


def new_id() -> str:
    return str(uuid.uuid4())


def request(
    certificate_type: CertificateType = V2G,
    evse_id: str | None = None,
    *,
    request_id: str | None = None,
    algorithm: Algorithm | None = None,
    common_name: str = CN,
) -> GenerateCsrRequest:
    if certificate_type is V2G20:
        algorithm = Algorithm.ECDSA_SHA512
    return messages.generate_csr(
        request_id or new_id(),
        messages.GenerateCsrData(
            certificate_type=certificate_type,
            common_name=common_name,
            organization_name=O,
            country_name=C,
            evse_id=UNSET if evse_id is None else evse_id,
            algorithm=UNSET if algorithm is None else algorithm,
        ),
    )


def status(
    verb: Verb,
    certificate_type: CertificateType = V2G,
    evse_id: str | None = None,
    *,
    private_key_path: Path | str | None = None,
    message_id: str | None = None,
) -> CertificateInstallationStatus:
    return CertificateInstallationStatus(
        id=message_id or new_id(),
        name="certificate_installation_status",
        type="update",
        data=messages.CertificateInstallationStatusData(
            certificate_type=certificate_type,
            status=verb,
            private_key_path=UNSET if private_key_path is None else str(private_key_path),
            evse_id=UNSET if evse_id is None else evse_id,
        ),
    )


def key_id_in(csr: str) -> str:
    """The name of the key that a CSR is for."""
    public_key = x509.load_pem_x509_csr(csr.encode()).public_key()
    return key_id_of(
        public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


class Authority:
    """A certificate authority with one certificate between its root and what it signs."""

    def __init__(self, name: str = "") -> None:
        self._root_key = ec.generate_private_key(ec.SECP256R1())
        self._sub_key = ec.generate_private_key(ec.SECP256R1())
        self.root = _ca(f"{name}root", self._root_key, f"{name}root", self._root_key)
        self.sub = _ca(f"{name}sub", self._sub_key, f"{name}root", self._root_key)

    def sign(
        self,
        csr: str,
        *,
        public_key: PublicKey | None = None,
        subject: x509.Name | None = None,
        without: Iterable[type[x509.ExtensionType]] = (),
        instead: Iterable[x509.ExtensionType] = (),
        begins: datetime = NOW - timedelta(days=1),
        ends: datetime = NOW + timedelta(days=90),
    ) -> x509.Certificate:
        """The certificate that a CSR asks for, but for what is said otherwise."""
        asked = x509.load_pem_x509_csr(csr.encode())
        assert asked.is_signature_valid
        own = asked.public_key()
        assert isinstance(own, PublicKey)
        others = tuple(instead)
        left_out = (*without, *(type(extension) for extension in others))
        kept = [(each.value, each.critical) for each in asked.extensions if not isinstance(each.value, left_out)]
        return issue(
            asked.subject if subject is None else subject,
            public_key or own,
            [*kept, *((value, True) for value in others)],
            issuer=self.sub.subject,
            key=self._sub_key,
            begins=begins,
            ends=ends,
        )


def _ca(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    subject, above = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer))
    return issue(
        subject,
        key.public_key(),
        [(x509.BasicConstraints(ca=True, path_length=None), True)],
        issuer=above,
        key=signer,
        begins=NOW - timedelta(days=400),
        ends=NOW + timedelta(days=4000),
    )


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


@dataclass
class Clocks:
    """The clock on the wall, which somebody may set, and the one that only counts."""

    wall: float = NOW.timestamp()
    machine: float = 0.0

    def pass_by(self, milliseconds: float) -> None:
        """Let time go by, on both."""
        self.wall += milliseconds / 1000
        self.machine += milliseconds / 1000


@dataclass
class Station:
    """A service in this process, on a real ledger and a real key store."""

    service: StationKeyService
    ledger: Ledger
    keystores: KeyStores
    clocks: Clocks

    @property
    def keystore(self) -> KeyStoreThread:
        """The thread of its one key store."""
        [store] = self.keystores
        return store.thread

    @property
    def counts(self) -> Counter[str]:
        return self.service.counters.outcomes()

    @property
    def state_dir(self) -> Path:
        return sqlite_of(self.ledger).path.parent

    @property
    def active_dir(self) -> Path:
        return self.state_dir / "active"

    async def csr(
        self, certificate_type: CertificateType = V2G, evse_id: str | None = None, *, station: str = ""
    ) -> str:
        """Ask for a CSR with a new id."""
        response = await self.service.answer(request(certificate_type, evse_id), station=station)
        assert isinstance(response.data.csr, str)
        return response.data.csr

    async def key(
        self, certificate_type: CertificateType = V2G, evse_id: str | None = None, *, station: str = ""
    ) -> str:
        """Ask for a CSR with a new id; the name of its key."""
        return key_id_in(await self.csr(certificate_type, evse_id, station=station))

    async def told(
        self,
        verb: Verb,
        certificate_type: CertificateType = V2G,
        evse_id: str | None = None,
        *,
        private_key_path: Path | str | None = None,
        message_id: str | None = None,
        station: str = "",
    ) -> None:
        """Be told by Josev what became of a certificate."""
        told = status(verb, certificate_type, evse_id, private_key_path=private_key_path, message_id=message_id)
        await self.service.note_status(told, station=station)

    def record(self, key_id: str) -> KeyRecord:
        (found,) = self.ledger.keys.all(key_id)
        return found

    def states(self, *key_ids: str) -> list[KeyState]:
        return [self.record(key_id).state for key_id in key_ids]

    def events(self, key_id: str) -> list[str]:
        return [event.event for event in self.ledger.keys.history(key_id)]

    def shown(self) -> dict[str, str]:
        """The files under ``active/``, each with the name of the key in it."""
        references = [self.ledger.keys.ref(key.key_id) for key in self.ledger.keys.usable()]
        return {
            path.name: reference.key_id
            for path in self.active_dir.glob("*.pem")
            for reference in references
            if reference is not None and path.read_bytes().startswith(reference.pem())
        }

    def dump(self) -> list[str]:
        """All that is in the ledger, but for the running time."""
        return dump(sqlite_of(self.ledger).path)

    async def pass_by(self, milliseconds: float) -> None:
        """Let time go by, and sweep."""
        self.clocks.pass_by(milliseconds)
        await self.service.expiry.sweep()


def dump(database: Path) -> list[str]:
    """All that is in a database, but for the running time."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        return [line for line in connection.iterdump() if "'running'" not in line]


@asynccontextmanager
async def station(
    state_dir: Path,
    *,
    keystore: str | KeyStores = "software:",
    tpm: TpmTerms | None = None,
    terms: Terms | None = None,
    certificate_dir: Path | None = None,
    clocks: Clocks | None = None,
    on_change: Callable[[], None] = lambda: None,
) -> AsyncIterator[Station]:
    """A station that ends with the block; its state directory stays, and so it can be started again."""
    clocks = clocks or Clocks()
    state_dir.mkdir(mode=0o700, exist_ok=True)  # noqa: ASYNC240 - nothing else runs yet
    with closing(Ledger(state_dir / DATABASE_NAME)) as ledger:
        if isinstance(keystore, str):
            opener = keystore_opener(keystore, allow_software_keys=True, terms=tpm, state_dir=state_dir)
            keystore = KeyStores.only(keystore, KeyStoreThread(opener))
        keystores = keystore
        # The service takes the machine's own clock, which no test could wait for.
        with mock.patch("stationkey.service.requests.RunningTime", partial(RunningTime, clock=lambda: clocks.machine)):
            service = StationKeyService(
                keystores,
                ledger,
                terms=terms,
                certificate_dir=certificate_dir,
                clock=lambda: clocks.wall,
                on_change=on_change,
            )
        await service.custody.show_active()
        try:
            yield Station(service, ledger, keystores, clocks)
        finally:
            await service.aclose()
            await asyncio.to_thread(keystores.close)


def software_key(algorithm: Algorithm = Algorithm.ECDSA_SHA256) -> ec.EllipticCurvePrivateKey:
    """A private key of the software store."""
    store = SoftwareKeyStore()
    with store.signer(store.generate(algorithm)) as private_key:
        assert isinstance(private_key, ec.EllipticCurvePrivateKey)
        return private_key
