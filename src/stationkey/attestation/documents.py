"""The JSON documents between a station and a verifier of its keys.

Each has a ``format`` and a ``version``, and is read strictly: a member that is unknown, repeated, missing or of another
type is refused. One table, `_DOCUMENTS`, defines reading, writing and JSON Schema. No cryptography is loaded.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NoReturn

from stationkey.attestation.refusals import MAX_STRUCTURE, malformed
from stationkey.errors import NotVerified

VERSION: Final = 1
MAX_DOCUMENT: Final = 256 * 1024
"""Largest document in bytes. Evidence with a certificate for each type of endorsement key has some ten thousand."""
MAX_CERTIFICATE: Final = 8192
MAX_ENDORSEMENT_KEYS: Final = 16
MAX_TEXT: Final = 16 * 1024
SECRET_SIZE: Final = 32
"""Bytes of the secret in a challenge. Fits the digest of every endorsement key [TPM 2.0 part 3, 12.6]."""
NONCE_SIZES: Final = range(8, 65)
"""Bytes, as RFC 9711 4.1 has it."""

EVIDENCE: Final = "stationkey-attestation"
ATTESTATION_KEY: Final = "stationkey-attestation-key"
CHALLENGE: Final = "stationkey-challenge"
SECRET: Final = "stationkey-challenge-secret"  # noqa: S105 - the name of a format

ABOUT: Final = (
    *("key_id", "state", "certificate_type", "evse_id", "algorithm"),
    *("common_name", "organization_name", "country_name", "csr"),
)
"""Information for people in evidence, which is not signed by the TPM."""


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """An endorsement key, as reported by the station.

    Attributes:
        public: TPM2B_PUBLIC, or None if unknown.
        certificate: its maker's certificate in DER, as in the TPM, or None.
    """

    public: bytes | None
    certificate: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationKey:
    """An attestation key and its TPM's endorsement keys, to be recorded or certified in advance.

    Attributes:
        public: TPM2B_PUBLIC of the attestation key.
        endorsement_keys: those of the TPM.
    """

    public: bytes
    endorsement_keys: tuple[EndorsementKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A station's evidence that a key is in its TPM.

    Attributes:
        key_public: TPM2B_PUBLIC of the key.
        attestation: TPMS_ATTEST of TPM2_Certify.
        signature: TPMT_SIGNATURE of the attestation key over it.
        attestation_key: TPM2B_PUBLIC of the attestation key, and the endorsement keys of the TPM.
        activation: see `stationkey.attestation.credential.activation`; None without a challenge.
        about: members of `ABOUT`, for people.
    """

    key_public: bytes
    attestation: bytes
    signature: bytes
    attestation_key: AttestationKey
    activation: bytes | None = None
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """A challenge that only one TPM can open, and only with one attestation key in it.

    Attributes:
        ak_name: name of the attestation key.
        ek: subjectPublicKeyInfo of the endorsement key in DER.
        credential_blob: TPM2B_ID_OBJECT.
        encrypted_secret: TPM2B_ENCRYPTED_SECRET.
        nonce: for the evidence.
    """

    ak_name: bytes
    ek: bytes
    credential_blob: bytes
    encrypted_secret: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """The verifier's part of a challenge, kept until the evidence comes; for one use.

    Attributes:
        secret: the secret in the challenge.
        ak_name: the attestation key that was challenged.
        ek: subjectPublicKeyInfo of the endorsement key in DER.
        believed: why the endorsement key is trusted.
        nonce: that the evidence must answer.
    """

    secret: bytes = field(repr=False)
    ak_name: bytes
    ek: bytes
    believed: str
    nonce: bytes


Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Form:
    """How a value is represented in a document.

    Attributes:
        schema: in JSON Schema.
        read: parses the JSON value; the second argument is its place, for the error.
        write: returns the JSON value.
    """

    schema: Json
    read: Callable[[object, str], Any]
    write: Callable[[Any], object]


def _constant(value: object, refuse: Callable[[str], NotVerified]) -> _Form:
    """Return the form of a constant that identifies a document; `refuse` returns the error for another value."""

    def read(found: object, where: str) -> object:
        if type(found) is not type(value) or found != value:  # neither true nor 1.0 is 1
            raise refuse(where)
        return found

    return _Form({"const": value}, read, lambda _: value)


def _text(description: str, most: int = MAX_TEXT) -> _Form:
    def read(value: object, where: str) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise malformed(f"{where} is not a text of {most} characters at the most")
        return value

    return _Form({"type": "string", "maxLength": most, "description": description}, read, str)


def _bytes(description: str, most: int = MAX_STRUCTURE) -> _Form:
    """Bytes in canonical base64 [RFC 4648 4]."""
    text = _text(description, 4 * ((most + 2) // 3))

    def read(value: object, where: str) -> bytes:
        try:
            data = base64.b64decode(text.read(value, where).encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            data = b""
        if not data or write(data) != value:
            raise malformed(f"{where} is not base64")
        return data

    def write(data: bytes) -> str:
        return base64.b64encode(data).decode()

    schema = {"type": "string", "contentEncoding": "base64", "pattern": "^[A-Za-z0-9+/]+={0,2}$"}
    return _Form(schema | text.schema, read, write)


def _hexadecimal(description: str, sizes: Collection[int]) -> _Form:
    """Bytes in lower-case hexadecimal."""
    text = _text(description)

    def read(value: object, where: str) -> bytes:
        data = read_hexadecimal(text.read(value, where))
        if data is None or len(data) not in sizes or data.hex() != value:
            raise malformed(f"{where} is not that many bytes in lower-case hexadecimal")
        return data

    pattern = f"^(?:[0-9a-f]{{2}}){{{min(sizes)},{max(sizes)}}}$"
    return _Form({"type": "string", "pattern": pattern, "description": description}, read, bytes.hex)


def _array(item: _Form, most: int) -> _Form:
    def read(value: object, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise malformed(f"{where} is not an array of {most} at the most")
        return [item.read(each, f"an item of {where}") for each in value]

    schema = {"type": "array", "maxItems": most, "items": item.schema}
    return _Form(schema, read, lambda values: [item.write(value) for value in values])


def _object(members: Mapping[str, _Form], *, optional: Collection[str] = ()) -> _Form:
    """An object with exactly these members; an optional one may be absent (None)."""

    def read(value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise malformed(f"{where} is not a JSON object")
        found = {}
        for name, form in members.items():
            if name in value:
                found[name] = form.read(value[name], f"the member {name!r} of {where}")
            elif name not in optional:
                raise malformed(f"{where} has no member {name!r}")
        if unknown := value.keys() - members.keys():
            raise malformed(f"{where} has the unknown member {_short(min(unknown))}")
        return found

    def write(values: Mapping[str, Any]) -> Json:
        return {name: form.write(values[name]) for name, form in members.items() if values.get(name) is not None}

    schema = {
        "type": "object",
        "properties": {name: form.schema for name, form in members.items()},
        "required": [name for name in members if name not in optional],
        "additionalProperties": False,
    }
    return _Form(schema, read, write)


def _document(kind: str, members: Mapping[str, _Form], *, optional: Collection[str] = ()) -> _Form:
    first = {
        "format": _constant(kind, lambda where: malformed(f"{where} is not {kind!r}")),
        "version": _constant(
            VERSION,
            lambda where: NotVerified(f"{where} is unsupported; {VERSION} is supported", reason="evidence_version"),
        ),
    }
    return _object({**first, **members}, optional=optional)


_EK: Final = {
    "public": _bytes("TPM2B_PUBLIC of the endorsement key."),
    "certificate": _bytes("Its certificate in DER, as it is in the TPM.", MAX_CERTIFICATE),
}
_AK: Final = {
    "attestation_key": _object({"public": _bytes("TPM2B_PUBLIC of the attestation key.")}),
    "endorsement_keys": _array(_object(_EK, optional=_EK), MAX_ENDORSEMENT_KEYS),
}
_AK_NAME: Final = _hexadecimal("Name of the attestation key.", {34, 50, 66})
"""The hash's identifier and a SHA-2 digest."""
_EK_SPKI: Final = _bytes("subjectPublicKeyInfo of the endorsement key in DER.")
_NONCE: Final = _hexadecimal("For the evidence.", NONCE_SIZES)

_DOCUMENTS: Final = {
    EVIDENCE: _document(
        EVIDENCE,
        {
            "key": _object({"public": _bytes("TPM2B_PUBLIC of the key.")}),
            "attestation": _bytes("TPMS_ATTEST of TPM2_Certify."),
            "signature": _bytes("TPMT_SIGNATURE of the attestation key over it."),
            **_AK,
            "activation": _hexadecimal("HMAC-SHA-256 over the attestation by the challenge's secret.", {SECRET_SIZE}),
            "not_attested": _object(
                {name: _text("For people. No TPM has signed it.") for name in ABOUT}, optional=ABOUT
            ),
        },
        optional={"activation"},
    ),
    ATTESTATION_KEY: _document(ATTESTATION_KEY, _AK),
    CHALLENGE: _document(
        CHALLENGE,
        {
            "ak_name": _AK_NAME,
            "ek": _EK_SPKI,
            "credential_blob": _bytes("TPM2B_ID_OBJECT."),
            "encrypted_secret": _bytes("TPM2B_ENCRYPTED_SECRET."),
            "nonce": _NONCE,
        },
    ),
    SECRET: _document(
        SECRET,
        {
            "secret": _hexadecimal("The secret in the challenge.", {SECRET_SIZE}),
            "ak_name": _AK_NAME,
            "ek": _EK_SPKI,
            "believed": _text("Why the endorsement key is believed to be one."),
            "nonce": _NONCE,
        },
    ),
}
SCHEMAS: Final = {
    "attestation.evidence": EVIDENCE,
    "attestation.attestation_key": ATTESTATION_KEY,
    "attestation.challenge": CHALLENGE,
}
"""The documents that are exchanged, by their name in ``stationkey schema``."""


def json_schema(name: str) -> Json:
    """Return the JSON Schema (2020-12) of a document, by its name in `SCHEMAS`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        **_DOCUMENTS[SCHEMAS[name]].schema,
    }


def read_nonce(text: str) -> bytes | None:
    """Parse a nonce in hexadecimal; None if it is invalid, or not of an allowed size."""
    nonce = read_hexadecimal(text)
    return nonce if nonce is not None and len(nonce) in NONCE_SIZES else None


def read_hexadecimal(text: str) -> bytes | None:
    """Parse hexadecimal of either case; None if it is invalid."""
    return bytes.fromhex(text) if re.fullmatch(r"(?:[0-9A-Fa-f]{2})*", text) else None


def read_evidence(document: bytes) -> Evidence:
    """Read what ``stationkey attest KEY`` wrote.

    Raises:
        NotVerified: it is not to the format.
    """
    found = _read(EVIDENCE, _json(document))
    return Evidence(
        key_public=found["key"]["public"],
        attestation=found["attestation"],
        signature=found["signature"],
        attestation_key=_attestation_key(found),
        activation=found.get("activation"),
        about=found["not_attested"],
    )


def read_attestation_key(document: bytes) -> AttestationKey:
    """Read what ``stationkey attest --ak --json`` wrote.

    Raises:
        NotVerified: it is not to the format.
    """
    return _attestation_key(_read(ATTESTATION_KEY, _json(document)))


def read_either(document: bytes) -> AttestationKey:
    """Return the attestation key of either document.

    Raises:
        NotVerified: it is neither.
    """
    value = _json(document)
    evidence = isinstance(value, dict) and value.get("format") == EVIDENCE
    return _attestation_key(_read(EVIDENCE if evidence else ATTESTATION_KEY, value))


def read_challenge(document: bytes) -> Challenge:
    """Read what ``stationkey verify-attestation --make-challenge`` wrote for the station.

    Raises:
        NotVerified: it is not to the format.
    """
    return Challenge(**_read(CHALLENGE, _json(document)))


def read_secret(document: bytes) -> Secret:
    """Read what ``stationkey verify-attestation --secret-out`` wrote for the verifier itself.

    Raises:
        NotVerified: it is not to the format.
    """
    return Secret(**_read(SECRET, _json(document)))


def write_evidence(evidence: Evidence) -> str:
    """The JSON of `evidence`."""
    return _write(
        EVIDENCE,
        {
            "key": {"public": evidence.key_public},
            "attestation": evidence.attestation,
            "signature": evidence.signature,
            **_told(evidence.attestation_key),
            "activation": evidence.activation,
            "not_attested": evidence.about,
        },
    )


def write_attestation_key(key: AttestationKey) -> str:
    """The JSON of `key`."""
    return _write(ATTESTATION_KEY, _told(key))


def write_challenge(challenge: Challenge) -> str:
    """The JSON of `challenge`."""
    return _write(CHALLENGE, asdict(challenge))


def write_secret(secret: Secret) -> str:
    """Return the JSON of `secret`, for a private file."""
    return _write(SECRET, asdict(secret))


def _attestation_key(found: Json) -> AttestationKey:
    eks = (EndorsementKey(ek.get("public"), ek.get("certificate")) for ek in found["endorsement_keys"])
    return AttestationKey(public=found["attestation_key"]["public"], endorsement_keys=tuple(eks))


def _told(key: AttestationKey) -> Json:
    return {"attestation_key": {"public": key.public}, "endorsement_keys": map(asdict, key.endorsement_keys)}


def _read(kind: str, value: object) -> Json:
    found: Json = _DOCUMENTS[kind].read(value, f"the document {kind}")
    del found["format"], found["version"]
    return found


def _write(kind: str, values: Json) -> str:
    return json.dumps(_DOCUMENTS[kind].write({"format": kind, "version": VERSION, **values}), indent=2) + "\n"


def _json(document: bytes) -> object:
    """Parse JSON strictly by RFC 8259 and I-JSON [RFC 7493: no duplicate names]."""
    if len(document) > MAX_DOCUMENT:
        raise malformed(f"the document has more than {MAX_DOCUMENT} bytes")
    try:
        return json.loads(document.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise malformed("the document is nested too deep") from None
    except ValueError as error:  # no UTF-8, no JSON, a number of thousands of digits
        where = f", line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise malformed(f"the document is not JSON in UTF-8{where}") from None


def _once(members: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(members)
    if len(found) != len(members):
        raise malformed("the document has an object with two members of the same name")
    return found


def _no_number(name: str) -> NoReturn:
    raise malformed(f"{name} is not JSON [RFC 8259 6]")


def _short(text: str) -> str:
    return repr(text[:80])
