"""The verdict: what evidence proves about a key, and what it does not.

The steps: an attestation key is trusted (`stationkey.attestation.trust`); it signs only its TPM's own statements; the
TPM states that it holds an object of a certain name; the name is the hash of a public area; that says that the key was
created in the TPM and cannot leave it, and has the public key of the CSR.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from stationkey.attestation.credential import activation
from stationkey.attestation.documents import AttestationKey, Evidence, Secret
from stationkey.attestation.refusals import malformed
from stationkey.attestation.structures import (
    Attest,
    Attribute,
    Public,
    PublicKey,
    check_signature,
    describe_key,
    read_attest,
    read_public,
    spki_of,
    words_of,
)
from stationkey.attestation.trust import UNREADABLE, Anchor, RecordedKey, RecordedName, shown
from stationkey.errors import NotVerified

_NONCE_LABEL: Final = b"stationkey attestation v1\0"

BORN_INSIDE: Final = Attribute.FIXED_TPM | Attribute.FIXED_PARENT | Attribute.SENSITIVE_DATA_ORIGIN
"""Created in the TPM, not imported; not duplicable to another TPM or parent."""
AK_NEEDS: Final = BORN_INSIDE | Attribute.RESTRICTED | Attribute.SIGN
KEY_NEEDS: Final = BORN_INSIDE | Attribute.SIGN
_AK_MUST_NOT: Final = Attribute.DECRYPT | Attribute.ENCRYPTED_DUPLICATION | Attribute.X509_SIGN
_KEY_MUST_NOT: Final = Attribute.RESTRICTED | Attribute.ENCRYPTED_DUPLICATION | Attribute.X509_SIGN

_HIERARCHIES: Final = {
    0x4000000B: "a primary key of the endorsement hierarchy",
    0x40000001: "a primary key of the owner hierarchy",
    0x4000000C: "a primary key of the platform hierarchy",
}
"""Handles of the persistent hierarchies [TPM 2.0 part 2, 7.4]."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict about evidence.

    Attributes:
        proved: one sentence each.
        not_proved: facts that a reader might assume and that are not proved; one line each.
        spki: subjectPublicKeyInfo of the attested key in DER.
    """

    proved: tuple[str, ...]
    not_proved: tuple[str, ...]
    spki: bytes


def qualifying_data(nonce: bytes | None) -> bytes:
    """Return the TPMS_ATTEST.extraData of a nonce: the SHA-256 of a label and the nonce; empty without a nonce.

    A digest, because a TPM accepts at most the size of its largest hash; a label, so that no other protocol can request
    the same.
    """
    return b"" if nonce is None else hashlib.sha256(_NONCE_LABEL + nonce).digest()


def verify(
    evidence: Evidence,
    anchor: Anchor,
    *,
    nonce: bytes | None = None,
    csr: x509.CertificateSigningRequest | None = None,
    certificate: x509.Certificate | None = None,
) -> Verdict:
    """Verify evidence.

    Args:
        evidence: the station's evidence.
        anchor: why its attestation key is trusted.
        nonce: the verifier's nonce; by default that of the challenge, if any.
        csr: the CSR whose key it should be.
        certificate: the certificate whose key it should be.

    Raises:
        NotVerified: the evidence is invalid; the message says why.
    """
    ak = read_ak_public(evidence.attestation_key)
    attest = read_attest(evidence.attestation)
    believed = _believe(ak, attest, evidence, anchor)
    scheme = check_signature(ak, evidence.signature, evidence.attestation)
    key = read_public(evidence.key_public, "the key")
    check_key(key)
    if not hmac.compare_digest(attest.name, key.name):
        raise NotVerified(
            "the TPM attests another object than the key in this evidence", reason="attest_of_another_key"
        )
    if nonce is None and isinstance(anchor, Secret):
        nonce = anchor.nonce
    if nonce is not None and not hmac.compare_digest(attest.extra_data, qualifying_data(nonce)):
        raise NotVerified("the attestation does not answer this nonce", reason="nonce_differs")
    own_csr = _own_csr(evidence)
    for asked, what in ((own_csr, "the CSR in the evidence"), (csr, "the CSR")):
        if asked is not None:
            _check_csr(asked, key, what)
    if certificate is not None:
        _check_same(_public_key_of(certificate, "the certificate"), key, "the certificate")
    proved = [
        *believed,
        f"the signature over the attestation is that key's ({scheme})",
        f"the attested key is {describe_key(key.key)}; its public key has the SHA-256 {_sha256(key.spki)}",
        f"it was made in this TPM and cannot leave it ({words_of(KEY_NEEDS)})",
        *_what_else(key, nonce=nonce, csr=csr, own_csr=own_csr, certificate=certificate),
    ]
    return Verdict(tuple(proved), tuple(_not_proved(key, anchor, nonce, csr, certificate, evidence)), key.spki)


def read_ak_public(key: AttestationKey) -> Public:
    """Return the public area of a valid attestation key: the TPM signs only its own statements with it.

    An unrestricted key would sign anything, for example a forged attestation of a software key.

    Raises:
        NotVerified: it is not restricted, may be imported, or may leave the TPM.
    """
    ak = read_public(key.public, "the attestation key")
    wrong = _unfit(ak, AK_NEEDS, _AK_MUST_NOT) or ("has no signing scheme" if ak.scheme is None else "")
    if wrong:
        raise NotVerified(f"not an attestation key: it {wrong}", reason="ak_unfit")
    return ak


def check_key(key: Public) -> None:
    """Check by its attributes that a key was made in its TPM, cannot leave it, and signs.

    Raises:
        NotVerified: its attributes do not say so.
    """
    wrong = _unfit(key, KEY_NEEDS, _KEY_MUST_NOT)
    if not wrong and Attribute.USER_WITH_AUTH not in key.attributes and not key.policy:
        wrong = "cannot be used: neither by its authorisation value nor by a policy"
    if wrong:
        raise NotVerified(f"the key is not one that stays in the TPM and signs: it {wrong}", reason="key_unfit")


def _unfit(public: Public, needed: Attribute, forbidden: Attribute) -> str:
    """Return the wrong attributes of a key, as text; empty if they are right."""
    if lacking := public.lacking(needed):
        return f"is not {lacking}"
    return f"is {words_of(public.attributes & forbidden)}" if public.attributes & forbidden else ""


def _believe(ak: Public, attest: Attest, evidence: Evidence, anchor: Anchor) -> list[str]:
    """Return why the attestation key is trusted, as text."""
    place = _place(ak, attest, evidence.attestation_key)
    words = [f"the attestation key is {describe_key(ak.key)}, name {ak.name.hex()}"]
    if isinstance(anchor, Secret):
        _check_activation(ak, evidence, anchor)
        words.append(
            f"it is in the TPM that opened the challenge: its endorsement key has the SHA-256 {_sha256(anchor.ek)}"
        )
        words.append(f"that endorsement key is {shown(anchor.believed)}")
    elif isinstance(anchor, RecordedName):
        if not hmac.compare_digest(ak.name, anchor.name):
            raise _another_ak()
        words.append(f"it is the one that was {anchor.why}")
    else:
        if not hmac.compare_digest(ak.spki, anchor.spki):
            raise _another_ak()
        if place is None:
            # With the public key alone, its attributes would be the evidence's own claim.
            raise NotVerified(
                "the attestation does not say that this attestation key made it: its qualified name is another",
                reason="ak_not_bound",
                hint="for one that is neither a primary key nor under an endorsement key, give --ak the JSON document "
                "that stationkey attest --ak --json wrote, or make a challenge",
            )
        words.append(f"it is the one that was {anchor.why}")
    words.append(f"it signs nothing but what its TPM states ({words_of(AK_NEEDS)})")
    if place is not None:
        words.append(f"the attestation names it as {place}")
    return words


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _another_ak() -> NotVerified:
    return NotVerified("the attestation key is another than the one that is believed", reason="ak_untrusted")


def _check_activation(ak: Public, evidence: Evidence, secret: Secret) -> None:
    if not hmac.compare_digest(ak.name, secret.ak_name):
        raise _another_ak()
    if evidence.activation is None:
        raise NotVerified(
            "the evidence does not answer a challenge",
            reason="challenge_unanswered",
            hint="on the station: stationkey attest KEY --challenge FILE",
        )
    if not hmac.compare_digest(evidence.activation, activation(secret.secret, evidence.attestation)):
        raise NotVerified(
            "the evidence answers another challenge, or its TPM did not open this one", reason="challenge_unanswered"
        )


def _place(ak: Public, attest: Attest, told: AttestationKey) -> str | None:
    """Return the parent of the attestation key by its qualified name in the attestation; None if unknown.

    The qualified name is a hash over the attestation key's whole public area, and the TPM puts it there.
    """
    for handle, words in _HIERARCHIES.items():
        if attest.qualified_signer == ak.qualified_name(handle.to_bytes(4, "big")):
            return words
    for ek in told.endorsement_keys:
        if ek.public is None:
            continue
        try:
            parent = read_public(ek.public, "an endorsement key")
        except NotVerified:
            continue  # nothing rests on it
        if attest.qualified_signer == ak.qualified_name(parent.qualified_name(0x4000000B.to_bytes(4, "big"))):
            return "a child of an endorsement key"
    return None


def _own_csr(evidence: Evidence) -> x509.CertificateSigningRequest | None:
    text = evidence.about.get("csr")
    return None if text is None else read_csr(text.encode("utf-8", "replace"), "the CSR in the evidence")


def read_csr(data: bytes, what: str) -> x509.CertificateSigningRequest:
    """Read a CSR in PEM.

    Raises:
        NotVerified: it is invalid.
    """
    try:
        return x509.load_pem_x509_csr(data)
    except UNREADABLE:
        raise malformed(f"{what} is not a PKCS#10 in PEM") from None


def _check_csr(csr: x509.CertificateSigningRequest, key: Public, what: str) -> None:
    public_key = _public_key_of(csr, what)
    try:
        valid = csr.is_signature_valid
    except UNREADABLE:
        valid = False
    if not valid:
        raise NotVerified(f"the signature of {what} does not verify", reason="csr_signature_invalid")
    _check_same(public_key, key, what)


def _public_key_of(document: x509.CertificateSigningRequest | x509.Certificate, what: str) -> object:
    try:
        return document.public_key()
    except UNREADABLE:
        raise malformed(f"{what} has no public key that can be read") from None


def _check_same(public_key: object, key: Public, what: str) -> None:
    if not isinstance(public_key, PublicKey) or not hmac.compare_digest(spki_of(public_key), key.spki):
        raise NotVerified(f"{what} is for another key than the attested one", reason="key_differs")


def _what_else(
    key: Public,
    *,
    nonce: bytes | None,
    csr: x509.CertificateSigningRequest | None,
    own_csr: x509.CertificateSigningRequest | None,
    certificate: x509.Certificate | None,
) -> Iterator[str]:
    if Attribute.USER_WITH_AUTH not in key.attributes:
        yield f"it can only be used under the TPM policy {key.policy.hex()}"
    if csr is not None:
        yield "the CSR is for this key, and signed with it"
    elif own_csr is not None:
        yield "the CSR in the evidence is for this key, and signed with it"
    if certificate is not None:
        yield "the certificate is for this key"
    if nonce is not None:
        yield "the attestation was made after the nonce was"


def _not_proved(
    key: Public,
    anchor: Anchor,
    nonce: bytes | None,
    csr: x509.CertificateSigningRequest | None,
    certificate: x509.Certificate | None,
    evidence: Evidence,
) -> Iterator[str]:
    if isinstance(anchor, RecordedKey):
        yield "that the attestation key is in a TPM and restricted: this rests on its record or certificate"
    elif isinstance(anchor, RecordedName):
        yield "that the attestation key is in a TPM: this rests on its record"
    else:
        yield "that the endorsement key is a TPM's, beyond the above"
    if nonce is None:
        yield "when the attestation was made: no nonce was given"
    if csr is None and certificate is None:
        yield "which CSR or certificate the key belongs to: none was given to compare"
    if certificate is not None:
        yield "who issued the certificate, and that it is valid: only its key was compared"
    if key.policy:
        yield "what its TPM policy requires: only the digest is known"
    if set(evidence.about) - {"csr"}:
        yield "what the evidence says about the key for people (not_attested)"
    yield "that the station is intact: programs on it can have its TPM sign"
