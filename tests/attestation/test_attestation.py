"""The judge of evidence: what it believes, what it refuses, and that nothing makes it stumble.

The evidence here is made in software, by `forgery`: so each thing that is wrong is wrong alone. What a real TPM gives
is in ``test_attest_tpm.py``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import forgery
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from evidence_parts import CA, NONCE, a_certificate, by_key, pem_of, reason_of, refused, rsa_key
from forgery import Object, an_ak, attest, evidence, p256
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # it ships no types

from stationkey.attestation import credential, documents, verifier
from stationkey.attestation.documents import AttestationKey, EndorsementKey, Evidence
from stationkey.attestation.trust import Anchor, RecordedName
from stationkey.errors import NotVerified


def by_name(ak: Object) -> RecordedName:
    return RecordedName(ak.name, "recorded")


# What is right.

RIGHT = [
    pytest.param(Object(), an_ak(), id="P-256 by ECDSA with SHA-256"),
    pytest.param(Object(ec.generate_private_key(ec.SECP384R1())), an_ak(), id="P-384"),
    pytest.param(Object(ec.generate_private_key(ec.SECP521R1())), an_ak(), id="P-521"),
    pytest.param(Object(rsa_key()), an_ak(), id="RSA"),
    pytest.param(Object(), an_ak(rsa_key(), scheme=(forgery.RSASSA, forgery.SHA256)), id="by RSASSA"),
    pytest.param(Object(), an_ak(rsa_key(), scheme=(forgery.RSAPSS, forgery.SHA256)), id="by RSAPSS"),
    pytest.param(
        Object(),
        an_ak(ec.generate_private_key(ec.SECP384R1()), scheme=(forgery.ECDSA, forgery.SHA384), name_alg=forgery.SHA384),
        id="by ECDSA with SHA-384",
    ),
    pytest.param(
        Object(attributes=forgery.KEY_ATTRIBUTES & ~forgery.USER_WITH_AUTH, policy=bytes(32)), an_ak(), id="by policy"
    ),
]


@pytest.mark.parametrize(("key", "ak"), RIGHT)
@pytest.mark.parametrize("anchor", [by_key, by_name])
def test_right_evidence_is_verified(key: Object, ak: Object, anchor: Callable[[Object], Anchor]) -> None:
    verdict = verifier.verify(evidence(key, ak, attestation=partial(attest, nonce=NONCE)), anchor(ak), nonce=NONCE)

    assert verdict.spki == key.spki
    assert any("was made in this TPM and cannot leave it" in line for line in verdict.proved)
    assert any("after the nonce was" in line for line in verdict.proved)


def test_what_was_not_asked_for_is_named_as_not_proved() -> None:
    ak = an_ak()

    verdict = verifier.verify(evidence(ak=ak, about={"common_name": "\x1b[31mred"}), by_key(ak))

    text = "\n".join(verdict.not_proved)
    assert "when the attestation was made" in text
    assert "which CSR or certificate" in text
    assert "not_attested" in text
    assert "\x1b" not in "\n".join((*verdict.proved, *verdict.not_proved))


def a_key(attributes: int, **others: Any) -> Object:
    return Object(attributes=attributes, **others)


WRONG = [
    # A software key that somebody with a general signing key in a TPM writes an attestation for.
    *(
        pytest.param({"ak": an_ak(attributes=forgery.AK_ATTRIBUTES & ~bit)}, "ak_unfit", id=f"AK not {name}")
        for name, bit in [
            ("restricted", forgery.RESTRICTED),
            ("fixedTPM", forgery.FIXED_TPM),
            ("fixedParent", forgery.FIXED_PARENT),
            ("sensitiveDataOrigin", forgery.SENSITIVE_DATA_ORIGIN),
            ("sign", forgery.SIGN),
        ]
    ),
    *(
        pytest.param({"ak": an_ak(attributes=forgery.AK_ATTRIBUTES | bit)}, "ak_unfit", id=f"AK {name}")
        for name, bit in [
            ("decrypts", forgery.DECRYPT),
            ("encryptedDuplication", forgery.ENCRYPTED_DUPLICATION),
            ("signs certificates", forgery.X509_SIGN),
        ]
    ),
    pytest.param({"ak": an_ak(scheme=(forgery.ECDSA, forgery.SHA1))}, "evidence_unsupported", id="AK by SHA-1"),
    pytest.param(
        {"ak": Object(attributes=forgery.AK_ATTRIBUTES), "signature": partial(Object.sign, scheme=(0x18, 0x0B))},
        "ak_unfit",
        id="AK without a scheme",
    ),
    *(
        pytest.param({"key": a_key(forgery.KEY_ATTRIBUTES & ~bit)}, "key_unfit", id=f"key not {name}")
        for name, bit in [
            ("fixedTPM", forgery.FIXED_TPM),
            ("fixedParent", forgery.FIXED_PARENT),
            ("sensitiveDataOrigin", forgery.SENSITIVE_DATA_ORIGIN),
            ("sign", forgery.SIGN),
            ("to be used by anybody", forgery.USER_WITH_AUTH),
        ]
    ),
    *(
        pytest.param({"key": a_key(forgery.KEY_ATTRIBUTES | bit)}, "key_unfit", id=f"key {name}")
        for name, bit in [
            ("restricted", forgery.RESTRICTED),
            ("encryptedDuplication", forgery.ENCRYPTED_DUPLICATION),
            ("x509sign", forgery.X509_SIGN),
        ]
    ),
    pytest.param({"key": a_key(forgery.KEY_ATTRIBUTES | 1 << 25)}, "evidence_unsupported", id="an unknown attribute"),
    pytest.param({"key": Object(name_alg=forgery.SHA1)}, "evidence_unsupported", id="name by SHA-1"),
    pytest.param({"key": Object(policy=bytes(20))}, "evidence_malformed", id="policy of an odd length"),
    pytest.param(
        {"key": Object(ec.generate_private_key(ec.SECP224R1()))}, "evidence_unsupported", id="a curve that is too small"
    ),
    pytest.param({"key": Object(rsa_key(1024))}, "evidence_unsupported", id="RSA that is too small"),
    pytest.param({"attestation": partial(attest, magic=0xFF544346)}, "attest_not_of_a_tpm", id="magic"),
    pytest.param({"attestation": partial(attest, kind=0x8018)}, "attest_of_another_type", id="a quote"),
    pytest.param({"attestation": partial(attest, name=Object().name)}, "attest_of_another_key", id="another key"),
    pytest.param({"attestation": partial(attest, signer=bytes(34))}, "ak_not_bound", id="another signer"),
    pytest.param({"attestation": partial(attest, safe=2)}, "evidence_malformed", id="neither yes nor no"),
    pytest.param({"attestation": partial(attest, behind=b"\0")}, "evidence_malformed", id="a byte behind"),
    pytest.param(
        {"signature": lambda _, data: an_ak().sign(data)}, "attest_signature_invalid", id="signed by another key"
    ),
    pytest.param(
        {"signature": lambda ak, data: ak.sign(data, (forgery.ECDSA, forgery.SHA384))},
        "attest_signature_invalid",
        id="signed with another hash",
    ),
    pytest.param(
        {"signature": lambda ak, data: ak.sign(data, (forgery.ECDSA, forgery.SHA1))},
        "evidence_unsupported",
        id="signed with SHA-1",
    ),
    pytest.param(
        {"signature": lambda ak, data: ak.sign(data) + b"\0"}, "evidence_malformed", id="a byte behind the signature"
    ),
    pytest.param(
        {"signature": lambda *_: struct.pack(">HHHH", 0x18, 0x0B, 0, 0)}, "attest_signature_invalid", id="r and s of 0"
    ),
    pytest.param({"signature": lambda *_: struct.pack(">H", 0x10)}, "attest_signature_invalid", id="no signature"),
    pytest.param(
        {
            "ak": an_ak(rsa_key(), scheme=(forgery.RSASSA, forgery.SHA256)),
            "signature": lambda ak, data: ak.sign(data, (forgery.RSAPSS, forgery.SHA256)),
        },
        "attest_signature_invalid",
        id="signed with another padding",
    ),
    pytest.param(
        {"ak": an_ak(scheme=(forgery.RSASSA, forgery.SHA256))}, "evidence_malformed", id="an RSA scheme on a curve"
    ),
    pytest.param(
        {
            "ak": an_ak(rsa_key(), scheme=(forgery.ECDSA, forgery.SHA256)),
            "signature": lambda _, data: an_ak().sign(data),
        },
        "evidence_malformed",
        id="a curve's scheme on RSA",
    ),
    pytest.param(
        {"key": Object(symmetric=struct.pack(">HHH", 0x0013, 128, 0x0043))},
        "evidence_unsupported",
        id="SM4 for children",
    ),
    pytest.param({"key": Object(scheme=(0x0019, forgery.SHA256))}, "evidence_unsupported", id="a scheme for ECDH"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG)
def test_evidence_with_one_thing_wrong_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason_of(refused(**changes)) == reason


def test_a_software_key_that_claims_to_be_an_attestation_key_is_not_believed() -> None:
    """All of it is consistent; only nobody has recorded that attestation key."""
    forged = evidence()

    assert reason_of(lambda: verifier.verify(forged, by_key(an_ak()))) == "ak_untrusted"
    assert reason_of(lambda: verifier.verify(forged, by_name(an_ak()))) == "ak_untrusted"


def test_the_attributes_of_a_recorded_key_are_not_taken_from_the_evidence() -> None:
    """It is believed by its public key alone, and is not what the evidence says: the TPM's own words show it."""
    ak = an_ak()
    otherwise = dataclasses.replace(ak, attributes=ak.attributes & ~forgery.NO_DA)
    forged = dataclasses.replace(evidence(ak=ak), attestation_key=AttestationKey(public=otherwise.public))

    assert reason_of(lambda: verifier.verify(forged, by_key(ak))) == "ak_not_bound"


def test_the_public_area_of_another_key_is_not_taken_for_the_attested_one() -> None:
    ak = an_ak()
    swapped = dataclasses.replace(evidence(ak=ak), key_public=Object().public)

    assert reason_of(lambda: verifier.verify(swapped, by_key(ak))) == "attest_of_another_key"


@pytest.mark.parametrize("asked", [bytes(32), NONCE + b"\0"], ids=["another nonce", "a longer one"])
def test_evidence_that_answers_another_nonce_is_refused(asked: bytes) -> None:
    ak = an_ak()
    replayed = evidence(ak=ak, attestation=partial(attest, nonce=NONCE))

    assert reason_of(lambda: verifier.verify(replayed, by_key(ak), nonce=asked)) == "nonce_differs"
    assert reason_of(lambda: verifier.verify(evidence(ak=ak), by_key(ak), nonce=asked)) == "nonce_differs"


def a_csr(private: Any) -> x509.CertificateSigningRequest:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "station")])
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(private, hashes.SHA256())


def test_the_csr_and_the_certificate_must_be_for_the_attested_key() -> None:
    key, ak = Object(), an_ak()
    judge = partial(verifier.verify, evidence(key, ak), by_key(ak))
    own, another = a_csr(key.private), a_csr(p256())

    assert "the CSR is for this key, and signed with it" in judge(csr=own).proved
    assert reason_of(lambda: judge(csr=another)) == "key_differs"
    certificate = a_certificate(key.private.public_key(), CA)
    assert "the certificate is for this key" in judge(certificate=certificate).proved
    assert reason_of(lambda: judge(certificate=a_certificate(p256().public_key(), CA))) == "key_differs"


def test_a_csr_that_was_not_signed_with_its_key_is_refused() -> None:
    """Its key may be right: then somebody has copied the public part."""
    key, ak = Object(), an_ak()
    der = bytearray(a_csr(key.private).public_bytes(serialization.Encoding.DER))
    der[der.index(b"station")] ^= 1
    tampered = x509.load_der_x509_csr(bytes(der))

    assert reason_of(lambda: verifier.verify(evidence(key, ak), by_key(ak), csr=tampered)) == "csr_signature_invalid"


def test_the_csr_in_the_evidence_is_held_against_the_key_too() -> None:
    key, ak = Object(), an_ak()

    def judge(csr: str) -> verifier.Verdict:
        return verifier.verify(evidence(key, ak, about={"csr": csr}), by_key(ak))

    assert (
        "the CSR in the evidence is for this key, and signed with it"
        in judge(pem_of(a_csr(key.private)).decode()).proved
    )
    assert reason_of(lambda: judge(pem_of(a_csr(p256())).decode())) == "key_differs"
    assert reason_of(lambda: judge("none")) == "evidence_malformed"
    assert reason_of(lambda: judge("\ud800")) == "evidence_malformed"


def test_an_attestation_key_under_an_endorsement_key_is_found_there() -> None:
    """As tpm2_createak makes it; the endorsement key's public area shows the place."""
    aes = struct.pack(">HHH", 0x0006, 128, 0x0043)
    ek = Object(attributes=forgery.FIXED_TPM | forgery.RESTRICTED | forgery.DECRYPT, symmetric=aes)
    ak = an_ak()
    under = partial(attest, signer=ak.qualified_name(ek.qualified_name(struct.pack(">I", forgery.ENDORSEMENT))))
    told = (EndorsementKey(public=b"\0", certificate=None), EndorsementKey(public=ek.public, certificate=None))

    verdict = verifier.verify(evidence(ak=ak, attestation=under, eks=told), by_key(ak))

    assert "the attestation names it as a child of an endorsement key" in verdict.proved
    assert reason_of(lambda: verifier.verify(evidence(ak=ak, attestation=under), by_key(ak))) == "ak_not_bound"
    verifier.verify(evidence(ak=ak, attestation=under), by_name(ak))


# Every byte.


def attested_fields(found: Evidence) -> tuple[bytes, ...]:
    return found.key_public, found.attestation, found.signature, found.attestation_key.public


@pytest.mark.parametrize(
    ("key", "ak"), [RIGHT[0].values, RIGHT[3].values, RIGHT[4].values], ids=["EC", "RSA", "RSA AK"]
)
@pytest.mark.parametrize("field", ["key_public", "attestation", "signature", "attestation_key"])
def test_no_bit_of_what_is_attested_can_be_changed(key: Object, ak: Object, field: str) -> None:
    right = evidence(key, ak, attestation=partial(attest, nonce=NONCE))
    whole = right.attestation_key.public if field == "attestation_key" else getattr(right, field)
    for at in range(len(whole)):
        for bit in (0x01, 0x80):
            changed = whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
            part: Any = AttestationKey(public=changed) if field == "attestation_key" else changed
            forged = dataclasses.replace(right, **{field: part})
            with pytest.raises(NotVerified):
                verifier.verify(forged, by_key(ak), nonce=NONCE)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_done_to_the_document_it_is_refused_or_says_the_same(data: st.DataObject) -> None:
    text = bytearray(DOCUMENT)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "end"])):
            case "set":
                text[at] = data.draw(st.integers(0, 255))
            case "cut":
                del text[at : at + data.draw(st.integers(1, 40))]
            case "insert":
                text[at:at] = data.draw(st.binary(min_size=1, max_size=20))
            case _:
                del text[at:]
        text = text or bytearray(b" ")
    try:
        found = documents.read_evidence(bytes(text))
        verifier.verify(found, by_key(DOCUMENT_AK), nonce=NONCE)
    except NotVerified as refusal:
        words = refusal.message
    else:
        words = ""
        assert attested_fields(found) == attested_fields(documents.read_evidence(DOCUMENT))
    assert words == "" or words.isprintable()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from(["key_public", "attestation", "signature"]))
def test_any_bytes_in_place_of_a_structure_are_refused_in_words(junk: bytes, field: str) -> None:
    part: Any = junk
    forged = dataclasses.replace(documents.read_evidence(DOCUMENT), **{field: part})

    assert reason_of(lambda: verifier.verify(forged, by_key(DOCUMENT_AK)))


# The document.

DOCUMENT_AK = an_ak()


DOCUMENT = documents.write_evidence(
    evidence(ak=DOCUMENT_AK, attestation=partial(attest, nonce=NONCE), about={"key_id": "00", "common_name": "Ü"})
).encode()


SCHEMA = Draft202012Validator(documents.json_schema("attestation.evidence"))


def changed(**members: object) -> bytes:
    """The document with other members; None takes one out."""
    whole = json.loads(DOCUMENT) | members
    return json.dumps({name: value for name, value in whole.items() if value is not None}).encode()


def test_a_document_reads_as_it_was_written() -> None:
    found = documents.read_evidence(DOCUMENT)

    assert documents.write_evidence(found).encode() == DOCUMENT
    SCHEMA.validate(json.loads(DOCUMENT))


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"[]", id="an array"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="a text"),
        pytest.param(b"\xff\xfe{}", id="no UTF-8"),
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(b'{"a":' * 20_000, id="nested objects"),
        pytest.param(b'{"version": ' + b"9" * 5000 + b"}", id="a number of thousands of digits"),
        pytest.param(DOCUMENT.replace(b'"version": 1', b'"version": NaN'), id="NaN"),
        pytest.param(DOCUMENT.replace(b'"version": 1', b'"version": 1, "version": 1'), id="a member twice"),
        pytest.param(DOCUMENT.replace(b'"public":', b'"public": "AA==", "public":', 1), id="a member twice, inside"),
        pytest.param(DOCUMENT + DOCUMENT, id="two documents"),
        pytest.param(DOCUMENT[:-40], id="cut off"),
        pytest.param(b" " * (documents.MAX_DOCUMENT + 1), id="too large"),
        pytest.param(changed(attestation="A" * 200_000), id="huge base64"),
        pytest.param(changed(attestation=base64.b64encode(bytes(3000)).decode()), id="base64 of too much"),
        pytest.param(changed(attestation="/1RD R4A="), id="base64 with a blank"),
        pytest.param(changed(attestation="/1RDR4B="), id="base64 with bits left over"),
        pytest.param(changed(attestation=""), id="no bytes"),
        pytest.param(changed(attestation="Ü==="), id="base64 that is no ASCII"),
        pytest.param(changed(attestation=7), id="a number for bytes"),
        pytest.param(changed(signature=["AA=="]), id="an array for bytes"),
        pytest.param(changed(key="AA=="), id="a text for an object"),
        pytest.param(changed(key={"public": "AA==", "private": "AA=="}), id="an unknown member inside"),
        pytest.param(changed(extra=1), id="an unknown member"),
        pytest.param(changed(signature=None), id="no signature"),
        pytest.param(changed(not_attested=None), id="nothing for people"),
        pytest.param(changed(not_attested={"common_name": 7}), id="a number for a name"),
        pytest.param(changed(not_attested={"csr": "x" * 20_000}), id="a CSR that is too long"),
        pytest.param(changed(endorsement_keys={}), id="an object for an array"),
        pytest.param(changed(endorsement_keys=[{}] * 17), id="too many endorsement keys"),
        pytest.param(changed(endorsement_keys=[{"certificate": None}]), id="null for a certificate"),
        pytest.param(changed(activation="00"), id="an activation that is too short"),
        pytest.param(changed(activation="AB" * 32), id="an activation in capitals"),
        pytest.param(changed(format="stationkey-challenge"), id="another format"),
        pytest.param(changed(format=["stationkey-attestation"]), id="an array for the format"),
    ],
)
def test_a_document_that_is_not_to_the_format_is_refused_in_words(document: bytes) -> None:
    assert reason_of(lambda: documents.read_evidence(document)) == "evidence_malformed"


@pytest.mark.parametrize("version", [2, 0, True, "1", 1.5, 1.0])
def test_another_version_is_refused(version: object) -> None:
    assert reason_of(lambda: documents.read_evidence(changed(version=version))) == "evidence_version"


@pytest.mark.parametrize(
    "document",
    [
        changed(extra=1),
        changed(signature=None),
        changed(key={"public": "AA==", "private": "AA=="}),
        changed(key="AA=="),
        changed(attestation=7),
        changed(attestation="A" * 20_000),
        changed(attestation="/1RD R4A="),
        changed(endorsement_keys=[{}] * 17),
        changed(activation="AB" * 32),
        changed(not_attested={"private_key": "x"}),
        changed(version=2),
        changed(format="stationkey-challenge"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(document: bytes) -> None:
    assert not SCHEMA.is_valid(json.loads(document))
    assert reason_of(lambda: documents.read_evidence(document))


@pytest.mark.parametrize("name", documents.SCHEMAS)
def test_each_schema_is_json_schema_2020_12(name: str) -> None:
    Draft202012Validator.check_schema(documents.json_schema(name))


def test_challenge_secret_and_attestation_key_read_as_they_were_written() -> None:
    challenge, secret = credential.make_challenge(p256().public_key(), an_ak().name, believed="given")
    key = AttestationKey(public=an_ak().public, endorsement_keys=(EndorsementKey(public=None, certificate=b"0"),))

    assert documents.read_challenge(documents.write_challenge(challenge).encode()) == challenge
    assert documents.read_secret(documents.write_secret(secret).encode()) == secret
    assert documents.read_attestation_key(documents.write_attestation_key(key).encode()) == key
    assert documents.read_either(documents.write_attestation_key(key).encode()) == key
    assert documents.read_either(DOCUMENT).public == DOCUMENT_AK.public
    for name, written in [
        ("attestation.challenge", documents.write_challenge(challenge)),
        ("attestation.attestation_key", documents.write_attestation_key(key)),
    ]:
        Draft202012Validator(documents.json_schema(name)).validate(json.loads(written))


def test_the_secret_shows_in_no_repr() -> None:
    _, secret = credential.make_challenge(p256().public_key(), an_ak().name, believed="given")

    assert secret.secret.hex() not in repr(secret)
    assert repr(secret.secret) not in repr(secret)
