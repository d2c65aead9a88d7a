"""What the ledger gives back, and the reading of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stationkey.contract.messages import GenerateCsrRequest
from stationkey.contract.profiles import EllipticCurve, KeyType, RsaModulus
from stationkey.errors import LedgerError
from stationkey.ledger.lifecycle import KeyState

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef

DAMAGED: Final = (
    "ledger_damaged",
    "nothing was overwritten; restore a backup of the state directory, or move the file away to begin anew",
)

MAKING: Final = "seconds to make "
"""Begins the name of a value in `meta`; the type of a key follows."""

_YEAR_1: Final = -62_135_596_800
_YEAR_9999: Final = 253_402_300_799
"""The first and last second that a certificate can name [RFC 5280 4.1.2.5], or nearly so, and Python; Unix time."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An accepted answer on record.

    Attributes:
        request_id: the id as it first came.
        digest: of the request's content, see `content_digest`.
        csr: the PEM that was answered.
        key_id: the key that the CSR is for.
    """

    request_id: str
    digest: bytes
    csr: str
    key_id: str

    @property
    def destroyed(self) -> bool:
        """Whether the key is gone; the CSR then is, too."""
        return not self.csr


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key on record, without its private part.

    Attributes:
        created_at: Unix time in milliseconds, by the station's clock, which may have been wrong.
        evse_id: the EVSE that the key is for, or None.
        public: subjectPublicKeyInfo in DER.
        due: when its time is over, in milliseconds of running time (see `Retention.running`); None where it
            has no end.
        failed: whether an installation of its certificate failed.
        chain: the installed certificate and its chain in PEM, or None where they are not known.
        not_after: when the certificate expires, Unix time in seconds, or None.
        asked: the number of the event by which it was given to its owner; 0 where it was made ahead and has none.
        installed: the number of the event by which it became active, or 0.
        request_ids: the requests that were answered with this key, as their ids came.
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

    @property
    def owner(self) -> tuple[str, str]:
        """Certificate type and EVSE ID (or an empty text): what there is one active key for."""
        return self.certificate_type, self.evse_id or ""

    @property
    def has_owner(self) -> bool:
        """False of a key that was made ahead and that no request has taken yet: all its names are empty."""
        return bool(self.certificate_type)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened to a key.

    Attributes:
        at: Unix time in milliseconds, by the station's clock, which may have been wrong; the order is that of `seq`.
        event: a `KeyEvent`, ``CSR answered`` or ``made ahead``.
        state: the key's state after it.
        message_id: of the message that brought it, or None.
    """

    seq: int
    at: int
    event: str
    state: str
    reason: str
    message_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How much there is on record.

    Attributes:
        keys: how many keys that live have an owner, by state and certificate type.
        expiries: of the active keys whose certificate is known: certificate type, EVSE ID or an empty text, and when
            the certificate expires, Unix time in seconds. Those that expire first, and first.
        unknown: of how many more active keys nothing is said in `expiries`.
        destroyed: how many destroyed keys are on record still.
        size: of the database and its write-ahead log, in bytes.
    """

    keys: Mapping[tuple[str, str], int]
    expiries: tuple[tuple[str, str, int], ...]
    unknown: int
    destroyed: int
    size: int


def read_key_type(text: str) -> KeyType:
    """A key type, from the text that it is written down as."""
    return RsaModulus(int(text.removeprefix("RSA-"))) if text.startswith("RSA-") else EllipticCurve(text)


def content_digest(request: GenerateCsrRequest) -> bytes:
    """Fingerprint of what a request asks for, its id left out and its default algorithm filled in.

    Two requests with the same fingerprint ask for the same; fields unknown to this version do not count (decision 5).
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
    """Return a key with its private part, from its columns."""
    from stationkey.keystore import KeyRef  # noqa: PLC0415 - `keys list` does without

    try:
        read = read_key_type(key_type)
    except ValueError:
        raise damaged("a type of key") from None
    return KeyRef(scheme=scheme, key_type=read, public=public, private=private)


# What SQLite takes and this program never writes: something else did, or somebody.


def read_state(text: str) -> KeyState:
    """Return the state that a row names."""
    try:
        return KeyState(text)
    except ValueError:
        raise damaged("a state of a key") from None


def read_time(time: int, *, milliseconds: bool = False) -> int:
    """Return a Unix time of a row, which Python can show as a date."""
    if not _YEAR_1 <= (time // 1000 if milliseconds else time) <= _YEAR_9999:
        raise damaged("a time")
    return time


def damaged(what: str) -> LedgerError:
    """Return the error for a value that only something else can have written."""
    reason, hint = DAMAGED
    return LedgerError(f"the ledger is damaged: {what} in it is none that there can be", reason=reason, hint=hint)


def read_key(row: tuple[Any, ...]) -> KeyRecord:
    """A key, from its row."""
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
    )
