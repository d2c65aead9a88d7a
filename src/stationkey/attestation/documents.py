"""The JSON documents that go between a station and whoever wants to know where its keys are.

Each says what it is (``format``) and by which rules (``version``), and is read to the letter: a member that is not
known, twice there, missing or of another type is refused, since nothing in a proof may be passed over. `schemas` says
the same in JSON Schema. No cryptography is loaded for it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from stationkey.attestation.refusals import MAX_STRUCTURE, malformed
from stationkey.errors import NotVerified

VERSION: Final = 1
MAX_DOCUMENT: Final = 256 * 1024
"""Bytes. Evidence with a certificate for each kind of endorsement key has some ten thousand."""
MAX_CERTIFICATE: Final = 8192
MAX_ENDORSEMENT_KEYS: Final = 16
MAX_TEXT: Final = 16 * 1024
SECRET_SIZE: Final = 32
"""Bytes: what a challenge hides. Fits the digest of every endorsement key [TPM 2.0 part 3, 12.6]."""
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
"""What evidence tells people of a key, which no TPM has signed."""


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """An endorsement key, as the station tells it.

    Attributes:
        public: TPM2B_PUBLIC, or None where the TPM was not asked for it.
        certificate: its maker's certificate in DER, as it is in the TPM, or None where there is none.
    """

    public: bytes | None
    certificate: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationKey:
    """An attestation key and the TPM that it is in, to be recorded or certified before it is needed.

    Attributes:
        public: TPM2B_PUBLIC of the attestation key.
        endorsement_keys: those of the TPM.
    """

    public: bytes
    endorsement_keys: tuple[EndorsementKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a station gives to prove where a key is.

    Attributes:
        key_public: TPM2B_PUBLIC of the key.
        attestation: TPMS_ATTEST of TPM2_Certify.
        signature: TPMT_SIGNATURE of the attestation key over it.
        attestation_key: TPM2B_PUBLIC of the attestation key, and the endorsement keys of the TPM.
        activation: see `stationkey.attestation.credential.activation`; None where there was no challenge.
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
    """What only one TPM can open, and only with one attestation key in it.

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
    """What the verifier keeps of a challenge until the evidence comes; for one use.

    Attributes:
        secret: what the challenge hides.
        ak_name: the attestation key that was challenged.
        ek: subjectPublicKeyInfo of the endorsement key in DER.
        believed: why the endorsement key is believed to be one, in words.
        nonce: that the evidence must answer.
    """

    secret: bytes = field(repr=False)
    ak_name: bytes
    ek: bytes
    believed: str
    nonce: bytes


class _Members:
    """The members of a JSON object; each is taken once, and what is left over is refused."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise malformed(f"{where} is no JSON object")
        self._left: dict[str, object] = dict(value)
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> object:
        if name not in self._left:
            raise malformed(f"{self._where} has no member {name!r}")
        return self._left.pop(name)

    def text(self, name: str, most: int = MAX_TEXT) -> str:
        value = self.take(name)
        if not isinstance(value, str) or len(value) > most:
            raise self._wrong(name, f"a text of {most} characters at the most")
        return value

    def base64(self, name: str, most: int = MAX_STRUCTURE) -> bytes:
        """Bytes in base64 [RFC 4648 4], in the one way that there is to write them."""
        text = self.text(name, 4 * ((most + 2) // 3))
        try:
            data = base64.b64decode(text.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise self._wrong(name, "base64") from None
        if not data or base64.b64encode(data).decode() != text:
            raise self._wrong(name, "base64")
        return data

    def hexadecimal(self, name: str, sizes: Iterable[int]) -> bytes:
        """Bytes in lower-case hexadecimal."""
        text = self.text(name)
        data = read_hexadecimal(text)
        if data is None or len(data) not in sizes or data.hex() != text:
            raise self._wrong(name, "that many bytes in lower-case hexadecimal")
        return data

    def list(self, name: str, most: int) -> list[object]:
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            raise self._wrong(name, f"an array of {most} at the most")
        return value

    def begin(self, kind: str) -> None:
        """Take the members that say what it is."""
        if self.take("format") != kind:
            raise malformed(f"{self._where} is not of the format {kind!r}")
        version = self.take("version")
        if isinstance(version, bool) or version != VERSION:
            raise NotVerified(
                f"{self._where} is of a version that is not known here; {VERSION} is", reason="evidence_version"
            )

    def end(self) -> None:
        if self._left:
            raise malformed(f"{self._where} has a member {_short(min(self._left))} that is not known")

    def _wrong(self, name: str, what: str) -> NotVerified:
        return malformed(f"the member {name!r} of {self._where} is not {what}")


def read_nonce(text: str) -> bytes | None:
    """A nonce from hexadecimal; None where it is none, or not of a size that is allowed."""
    nonce = read_hexadecimal(text)
    return nonce if nonce is not None and len(nonce) in NONCE_SIZES else None


def read_hexadecimal(text: str) -> bytes | None:
    """Bytes from hexadecimal of either case; None where it is none."""
    return bytes.fromhex(text) if re.fullmatch(r"(?:[0-9A-Fa-f]{2})*", text) else None


def read_evidence(document: bytes) -> Evidence:
    """Read what ``stationkey attest KEY`` wrote.

    Raises:
        NotVerified: it is not to the format.
    """
    members = _Members(_json(document), "the evidence")
    members.begin(EVIDENCE)
    key = _Members(members.take("key"), "the member 'key'")
    about = _Members(members.take("not_attested"), "the member 'not_attested'")
    evidence = Evidence(
        key_public=key.base64("public"),
        attestation=members.base64("attestation"),
        signature=members.base64("signature"),
        attestation_key=_take_attestation_key(members),
        activation=members.hexadecimal("activation", {SECRET_SIZE}) if "activation" in members else None,
        about={name: about.text(name) for name in ABOUT if name in about},
    )
    for part in (key, about, members):
        part.end()
    return evidence


def read_attestation_key(document: bytes) -> AttestationKey:
    """Read what ``stationkey attest --ak --json`` wrote.

    Raises:
        NotVerified: it is not to the format.
    """
    members = _Members(_json(document), "the document of the attestation key")
    members.begin(ATTESTATION_KEY)
    found = _take_attestation_key(members)
    members.end()
    return found


def read_either(document: bytes) -> AttestationKey:
    """The attestation key of a document that is either of the above.

    Raises:
        NotVerified: it is neither.
    """
    value = _json(document)
    if isinstance(value, dict) and value.get("format") == EVIDENCE:
        return read_evidence(document).attestation_key
    return read_attestation_key(document)


def _take_attestation_key(members: _Members) -> AttestationKey:
    ak = _Members(members.take("attestation_key"), "the member 'attestation_key'")
    public = ak.base64("public")
    ak.end()
    found = []
    for value in members.list("endorsement_keys", MAX_ENDORSEMENT_KEYS):
        ek = _Members(value, "an endorsement key")
        found.append(
            EndorsementKey(
                public=ek.base64("public") if "public" in ek else None,
                certificate=ek.base64("certificate", MAX_CERTIFICATE) if "certificate" in ek else None,
            )
        )
        ek.end()
    return AttestationKey(public=public, endorsement_keys=tuple(found))


_NAMES: Final = {34, 50, 66}
"""Bytes of an object's name: the hash's identifier and a SHA-2 digest."""


def read_challenge(document: bytes) -> Challenge:
    """Read what ``stationkey verify-attestation --make-challenge`` wrote for the station.

    Raises:
        NotVerified: it is not to the format.
    """
    members = _Members(_json(document), "the challenge")
    members.begin(CHALLENGE)
    challenge = Challenge(
        ak_name=members.hexadecimal("ak_name", _NAMES),
        ek=members.base64("ek"),
        credential_blob=members.base64("credential_blob"),
        encrypted_secret=members.base64("encrypted_secret"),
        nonce=members.hexadecimal("nonce", NONCE_SIZES),
    )
    members.end()
    return challenge


def read_secret(document: bytes) -> Secret:
    """Read what ``stationkey verify-attestation --secret-out`` wrote for the verifier itself.

    Raises:
        NotVerified: it is not to the format.
    """
    members = _Members(_json(document), "the secret of the challenge")
    members.begin(SECRET)
    secret = Secret(
        secret=members.hexadecimal("secret", {SECRET_SIZE}),
        ak_name=members.hexadecimal("ak_name", _NAMES),
        ek=members.base64("ek"),
        believed=members.text("believed"),
        nonce=members.hexadecimal("nonce", NONCE_SIZES),
    )
    members.end()
    return secret


def write_evidence(evidence: Evidence) -> str:
    """The JSON of `evidence`."""
    return _write(
        EVIDENCE,
        {
            "key": {"public": _base64(evidence.key_public)},
            "attestation": _base64(evidence.attestation),
            "signature": _base64(evidence.signature),
            **_attestation_key(evidence.attestation_key),
            **({} if evidence.activation is None else {"activation": evidence.activation.hex()}),
            "not_attested": dict(evidence.about),
        },
    )


def write_attestation_key(key: AttestationKey) -> str:
    """The JSON of `key`."""
    return _write(ATTESTATION_KEY, _attestation_key(key))


def write_challenge(challenge: Challenge) -> str:
    """The JSON of `challenge`."""
    return _write(
        CHALLENGE,
        {
            "ak_name": challenge.ak_name.hex(),
            "ek": _base64(challenge.ek),
            "credential_blob": _base64(challenge.credential_blob),
            "encrypted_secret": _base64(challenge.encrypted_secret),
            "nonce": challenge.nonce.hex(),
        },
    )


def write_secret(secret: Secret) -> str:
    """The JSON of `secret`; for a file that nobody else may read."""
    return _write(
        SECRET,
        {
            "secret": secret.secret.hex(),
            "ak_name": secret.ak_name.hex(),
            "ek": _base64(secret.ek),
            "believed": secret.believed,
            "nonce": secret.nonce.hex(),
        },
    )


def _attestation_key(key: AttestationKey) -> dict[str, object]:
    return {
        "attestation_key": {"public": _base64(key.public)},
        "endorsement_keys": [
            {
                name: _base64(value)
                for name, value in (("public", ek.public), ("certificate", ek.certificate))
                if value is not None
            }
            for ek in key.endorsement_keys
        ],
    }


def _write(kind: str, members: Mapping[str, object]) -> str:
    return json.dumps({"format": kind, "version": VERSION, **members}, indent=2) + "\n"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _json(document: bytes) -> object:
    """JSON as RFC 8259 and I-JSON [RFC 7493: no duplicate names] have it."""
    if len(document) > MAX_DOCUMENT:
        raise malformed(f"the document has more than {MAX_DOCUMENT} bytes")
    try:
        return json.loads(document.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise malformed("the document is nested too deep") from None
    except ValueError as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise malformed(f"the document is no JSON in UTF-8: {_short(str(error))}") from None


def _once(members: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(members)
    if len(found) != len(members):
        raise malformed("the document has an object with two members of the same name")
    return found


def _no_number(name: str) -> NoReturn:
    raise malformed(f"{name} is not JSON [RFC 8259 6]")


def _short(text: str) -> str:
    return repr(text[:80])
