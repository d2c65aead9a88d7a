"""Values of the ledger, and how rows become values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from stationkey.contract.active_names import Owner
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.contract.profiles import EllipticCurve, KeyType, RsaModulus
from stationkey.errors import LedgerError
from stationkey.ledger.lifecycle import KeyState

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef

DAMAGED: Final = (
    "ledger_damaged",
    "nothing was overwritten; restore a backup of the state directory, or move the file away to start over",
)

MAKING: Final = "seconds to make "
"""Prefix of a name in `meta`; a scheme and a key type follow."""

_YEAR_1: Final = -62_135_596_800
_YEAR_9999: Final = 253_402_300_799
"""The first and last second, in Unix time, of what Python and certificates [RFC 5280 4.1.2.5] can express."""


class Answered(Struct, frozen=True):
    """An accepted answer.

    Attributes:
        request_id: the request's id in its original letter case.
        digest: the `content_digest` of the request.
        csr: the CSR in PEM.
        key_id: the CSR's key.
        station: the station that asked; empty for a single station.
    """

    request_id: str
    digest: bytes
    csr: str
    key_id: str
    station: str = ""

    @property
    def destroyed(self) -> bool:
        """Whether the key is destroyed; the CSR is then deleted."""
        return not self.csr


class KeyRecord(Struct, frozen=True, kw_only=True):
    """A key without its private part.

    Attributes:
        created_at: Unix time in milliseconds by the station's clock, which may have been wrong.
        evse_id: the EVSE of the key, or None.
        public: subjectPublicKeyInfo in DER.
        due: when its time is over, in milliseconds of running time (see `Retention.running`); None where it
            has no end.
        failed: whether an installation of its certificate failed.
        chain: the installed certificate and its chain in PEM, or None if not known.
        not_after: expiry of the certificate, Unix time in seconds, or None if not known.
        asked: sequence number of the event that gave it to its owner; 0 if it was made ahead and has none.
        installed: sequence number of the event that first made it active, or 0.
        root: which root its certificate leads to; empty where roots are not told apart.
        previous: whether it is the deactivated key that its owner can go back to.
        confirmed: whether the station is known to have connected with its certificate.
        request_ids: ids of the requests answered with this key, in their original letter case.
        station: the station it was made for; empty for a single station.
    """

    key_id: str
    scheme: str
    key_type: str
    certificate_type: str
    evse_id: str | None
    algorithm: str
    common_name: str
    organization_name: str
    country_name: str
    state: KeyState
    created_at: int
    public: bytes
    due: int | None
    failed: bool
    chain: str | None
    not_after: int | None
    asked: int
    installed: int
    request_ids: tuple[str, ...]
    root: str = ""
    previous: bool = False
    confirmed: bool = False
    station: str = ""

    @property
    def owner(self) -> Owner:
        """Whose key it is; each owner has one active key at most, or one a root."""
        return Owner(self.station, self.certificate_type, self.evse_id or "")

    @property
    def has_owner(self) -> bool:
        """False for a key made ahead that no request has taken; its certificate type and subject are empty."""
        return bool(self.certificate_type)


class EventRecord(Struct, frozen=True):
    """An event of a key.

    Attributes:
        seq: sequence number over all keys: the order of events.
        at: Unix time in milliseconds by the station's clock, which may have been wrong.
        event: a `KeyEvent`, ``CSR answered`` or ``made ahead``.
        state: the key's state after it.
        reason: why, in words.
        message_id: id of the message that caused it, or None.
    """

    seq: int
    at: int
    event: str
    state: str
    reason: str
    message_id: str | None


class Figures(Struct, frozen=True, kw_only=True):
    """Counts for metrics.

    Attributes:
        keys: number of living keys with an owner, by state and certificate type.
        expiries: certificate type, EVSE ID or an empty text, and certificate expiry in Unix seconds, of active keys
            whose certificate is known; the first to expire first, and of several roots or stations the first alone.
        unknown: number of active keys that are not in `expiries`.
        destroyed: number of destroyed keys on record.
        size: of the database and its write-ahead log, in bytes.
        unconfirmed: number of active keys that are not confirmed, while the key before is kept.
    """

    keys: Mapping[tuple[str, str], int]
    expiries: tuple[tuple[str, str, int], ...]
    unknown: int
    destroyed: int
    size: int
    unconfirmed: int = 0


def read_key_type(text: str) -> KeyType:
    """Return the key type that a text such as ``RSA-3072`` or ``secp256r1`` names."""
    return RsaModulus(int(text.removeprefix("RSA-"))) if text.startswith("RSA-") else EllipticCurve(text)


def content_digest(request: GenerateCsrRequest) -> bytes:
    """Return a digest of a request's content without its id, with the default algorithm filled in.

    Equal digests mean equal requests; fields unknown to this version do not count (decision 5).
    """
    data = request.data
    content = [
        data.certificate_type,
        data.common_name,
        data.organization_name,
        data.country_name,
        request.evse_id,
        request.algorithm,
    ]
    return hashlib.sha256(msgspec.json.encode(content)).digest()


def read_key_ref(scheme: str, key_type: str, public: bytes, private: bytes) -> KeyRef:
    """Return a key with its private part."""
    from stationkey.keystore import KeyRef  # noqa: PLC0415 - `keys list` does without

    try:
        read = read_key_type(key_type)
    except ValueError:
        raise damaged("key type") from None
    return KeyRef(scheme=scheme, key_type=read, public=public, private=private)


# Values that SQLite accepts and this program never writes: the database was tampered with.


def read_state(text: str) -> KeyState:
    """Return a key state."""
    try:
        return KeyState(text)
    except ValueError:
        raise damaged("key state") from None


def read_time(time: int, *, milliseconds: bool = False) -> int:
    """Return a Unix time that Python can format."""
    if not _YEAR_1 <= (time // 1000 if milliseconds else time) <= _YEAR_9999:
        raise damaged("timestamp")
    return time


def damaged(what: str) -> LedgerError:
    """Return the error for an invalid value."""
    reason, hint = DAMAGED
    return LedgerError(f"the ledger is damaged: it contains an invalid {what}", reason=reason, hint=hint)


def read_key(row: tuple[Any, ...]) -> KeyRecord:
    """Return a key; the columns are those of `Keys`."""
    return KeyRecord(
        key_id=row[0],
        scheme=row[1],
        key_type=row[2],
        certificate_type=row[3],
        evse_id=row[4] or None,
        algorithm=row[5],
        common_name=row[6],
        organization_name=row[7],
        country_name=row[8],
        state=read_state(row[9]),
        created_at=read_time(row[10], milliseconds=True),
        public=row[11],
        due=row[12],
        failed=bool(row[13]),
        chain=row[14],
        not_after=None if row[15] is None else read_time(row[15]),
        asked=row[16] or 0,
        installed=row[17] or 0,
        request_ids=() if row[18] is None else (row[18],),
        root=row[19],
        previous=bool(row[20]),
        confirmed=row[21] is not None,
        station=row[22],
    )
