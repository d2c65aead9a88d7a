"""What `stationkey.attestation.documents` reads, as JSON Schema (2020-12), for whoever writes another verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from stationkey.attestation.documents import (
    ABOUT,
    ATTESTATION_KEY,
    CHALLENGE,
    EVIDENCE,
    MAX_CERTIFICATE,
    MAX_ENDORSEMENT_KEYS,
    MAX_TEXT,
    NONCE_SIZES,
    VERSION,
)
from stationkey.attestation.refusals import MAX_STRUCTURE

Json = dict[str, Any]


def _object(properties: Json, *, optional: Iterable[str] = ()) -> Json:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _bytes(description: str, most: int = MAX_STRUCTURE) -> Json:
    return {
        "type": "string",
        "contentEncoding": "base64",
        "pattern": "^[A-Za-z0-9+/]+={0,2}$",
        "maxLength": 4 * ((most + 2) // 3),
        "description": description,
    }


def _hexadecimal(description: str, least: int, most: int) -> Json:
    return {"type": "string", "pattern": f"^(?:[0-9a-f]{{2}}){{{least},{most}}}$", "description": description}


def _text(description: str) -> Json:
    return {"type": "string", "maxLength": MAX_TEXT, "description": description}


def _attestation_key_schema() -> Json:
    ek = {
        "public": _bytes("TPM2B_PUBLIC of the endorsement key."),
        "certificate": _bytes("Its certificate in DER, as it is in the TPM.", MAX_CERTIFICATE),
    }
    return {
        "attestation_key": _object({"public": _bytes("TPM2B_PUBLIC of the attestation key.")}),
        "endorsement_keys": {"type": "array", "maxItems": MAX_ENDORSEMENT_KEYS, "items": _object(ek, optional=ek)},
    }


def _evidence_schema() -> Json:
    return {
        "key": _object({"public": _bytes("TPM2B_PUBLIC of the key.")}),
        "attestation": _bytes("TPMS_ATTEST of TPM2_Certify."),
        "signature": _bytes("TPMT_SIGNATURE of the attestation key over it."),
        **_attestation_key_schema(),
        "activation": _hexadecimal("HMAC-SHA-256 over the attestation by the challenge's secret.", 32, 32),
        "not_attested": _object({name: _text("For people. No TPM has signed it.") for name in ABOUT}, optional=ABOUT),
    }


def _challenge_schema() -> Json:
    return {
        "ak_name": _hexadecimal("Name of the attestation key.", 34, 66),
        "ek": _bytes("subjectPublicKeyInfo of the endorsement key in DER."),
        "credential_blob": _bytes("TPM2B_ID_OBJECT."),
        "encrypted_secret": _bytes("TPM2B_ENCRYPTED_SECRET."),
        "nonce": _hexadecimal("For the evidence.", NONCE_SIZES.start, NONCE_SIZES.stop - 1),
    }


_PROPERTIES: Final[dict[str, tuple[str, Callable[[], Json], tuple[str, ...]]]] = {
    "attestation.evidence": (EVIDENCE, _evidence_schema, ("activation",)),
    "attestation.attestation_key": (ATTESTATION_KEY, _attestation_key_schema, ()),
    "attestation.challenge": (CHALLENGE, _challenge_schema, ()),
}
SCHEMAS: Final = tuple(_PROPERTIES)
"""The documents that leave the side that made them, by the name that ``stationkey schema`` knows them by."""


def json_schema(name: str) -> Json:
    """The JSON Schema (2020-12) of a document, by its name in `SCHEMAS`."""
    kind, properties, optional = _PROPERTIES[name]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        **_object({"format": {"const": kind}, "version": {"const": VERSION}, **properties()}, optional=optional),
    }
