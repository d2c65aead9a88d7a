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
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Any

import forgery
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from forgery import Object, an_ak, attest, evidence, p256
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # it ships no types

from stationkey.attestation import credential, documents, trust, verifier
from stationkey.attestation.documents import AttestationKey, EndorsementKey, Evidence, Secret
from stationkey.attestation.trust import Anchor, RecordedKey, RecordedName
from stationkey.errors import ConfigurationError, NotVerified

NONCE = bytes(range(32))
NOW = datetime(2026, 3, 1, tzinfo=UTC)


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def by_key(ak: Object) -> RecordedKey:
    return RecordedKey(ak.spki, "recorded")


def by_name(ak: Object) -> RecordedName:
    return RecordedName(ak.name, "recorded")


def reason_of(judge: Callable[[], object]) -> str:
    """Why the evidence was refused; anything but a refusal fails the test."""
    with pytest.raises(NotVerified) as refused:
        judge()
    assert refused.value.exit_code == 3
    return refused.value.reason


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


# What is wrong, one thing at a time.


def refused(**changes: Any) -> Callable[[], object]:
    """Evidence with something wrong in it, its attestation key believed."""
    ak: Object = changes.pop("ak", None) or an_ak()
    return lambda: verifier.verify(evidence(ak=ak, **changes), by_key(ak), nonce=None)


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


def pem_of(document: x509.CertificateSigningRequest | x509.Certificate) -> bytes:
    return document.public_bytes(serialization.Encoding.PEM)


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


# Certificates.


def a_certificate(
    public_key: Any,
    issuer: tuple[Any, x509.Name],
    *,
    subject: str = "leaf",
    usages: tuple[x509.ObjectIdentifier, ...] = (trust.AK_CERTIFICATE,),
    ca: bool = False,
    key_cert_sign: bool = False,
    starts: datetime = NOW - timedelta(days=1),
    ends: datetime = NOW + timedelta(days=1),
    extra: tuple[x509.ExtensionType, ...] = (),
) -> x509.Certificate:
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name_of(subject))
        .issuer_name(issuer[1])
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=key_cert_sign,
                encipher_only=False,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    for extension in extra:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(issuer[0], hashes.SHA256())


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


CA = (p256(), name_of("factory CA"))
CA_CERTIFICATE = a_certificate(CA[0].public_key(), CA, subject="factory CA", usages=(), ca=True, key_cert_sign=True)


def test_an_attestation_key_is_believed_that_a_ca_has_certified() -> None:
    ak = an_ak()
    anchor = trust.read_ak(pem_of(a_certificate(ak.private.public_key(), CA)), authorities=[CA_CERTIFICATE], now=NOW)

    verdict = verifier.verify(evidence(ak=ak), anchor)

    assert any("certified by CN=factory CA as an attestation key" in line for line in verdict.proved)


IMPOSTOR = (p256(), name_of("factory CA"))
NO_CA = a_certificate(CA[0].public_key(), CA, subject="factory CA", usages=())
NO_CERT_SIGN = a_certificate(CA[0].public_key(), CA, subject="factory CA", usages=(), ca=True)
OLD_CA = a_certificate(
    CA[0].public_key(), CA, subject="factory CA", usages=(), ca=True, key_cert_sign=True, ends=NOW - timedelta(hours=1)
)
CRITICAL = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")


@pytest.mark.parametrize(
    ("issuer", "options", "authority"),
    [
        pytest.param(IMPOSTOR, {}, CA_CERTIFICATE, id="by somebody of the CA's name"),
        pytest.param((p256(), name_of("other CA")), {}, CA_CERTIFICATE, id="by another CA"),
        pytest.param(CA, {"usages": ()}, CA_CERTIFICATE, id="for no use"),
        pytest.param(CA, {"usages": (ExtendedKeyUsageOID.CLIENT_AUTH,)}, CA_CERTIFICATE, id="for TLS"),
        pytest.param(CA, {"usages": (trust.EK_CERTIFICATE,)}, CA_CERTIFICATE, id="for an endorsement key"),
        pytest.param(CA, {"ends": NOW - timedelta(seconds=1)}, CA_CERTIFICATE, id="that is over"),
        pytest.param(CA, {"starts": NOW + timedelta(seconds=1)}, CA_CERTIFICATE, id="that has not begun"),
        pytest.param(CA, {"ca": True}, CA_CERTIFICATE, id="of a CA"),
        pytest.param(CA, {"extra": (CRITICAL,)}, CA_CERTIFICATE, id="with an unknown critical extension"),
        pytest.param(CA, {}, NO_CA, id="by what is no CA"),
        pytest.param(CA, {}, NO_CERT_SIGN, id="by a CA without keyCertSign"),
        pytest.param(CA, {}, OLD_CA, id="by a CA that is over"),
    ],
)
def test_a_certificate_is_not_believed(
    issuer: tuple[Any, x509.Name], options: dict[str, Any], authority: x509.Certificate
) -> None:
    """A CA signs certificates for software keys as well: it has to have signed this one, and for this use."""
    certificate = pem_of(a_certificate(p256().public_key(), issuer, **options))

    assert reason_of(lambda: trust.read_ak(certificate, authorities=[authority], now=NOW)) == "certificate_untrusted"


def test_a_certificate_without_a_ca_to_ask_stands_for_its_key() -> None:
    ak = an_ak()
    anchor = trust.read_ak(pem_of(a_certificate(ak.private.public_key(), CA, usages=())), now=NOW)

    verifier.verify(evidence(ak=ak), anchor)


def test_the_station_s_document_pins_the_attestation_key_by_its_name() -> None:
    ak = an_ak()
    document = documents.write_attestation_key(AttestationKey(public=ak.public)).encode()

    assert trust.read_ak(document, now=NOW) == RecordedName(ak.name, "recorded before, by its name")


@pytest.mark.parametrize(
    ("data", "authorities"),
    [
        pytest.param(b"", [], id="nothing"),
        pytest.param(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", [], id="no certificate"),
        pytest.param(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", [], id="no public key"),
        pytest.param(an_ak().pem, [CA_CERTIFICATE], id="a CA, and a key without a certificate"),
        pytest.param(
            documents.write_attestation_key(AttestationKey(public=an_ak().public)).encode(),
            [CA_CERTIFICATE],
            id="a CA, and a document",
        ),
    ],
)
def test_a_file_that_says_no_attestation_key_is_the_operator_s_to_mend(
    data: bytes, authorities: list[x509.Certificate]
) -> None:
    with pytest.raises(ConfigurationError) as mistaken:
        trust.read_ak(data, authorities=authorities, now=NOW)
    assert mistaken.value.reason == "anchor_unreadable"


def test_the_endorsement_key_is_the_first_that_a_ca_has_certified() -> None:
    def told(*certificates: bytes | None) -> list[EndorsementKey]:
        return [EndorsementKey(public=None, certificate=certificate) for certificate in certificates]

    def der(certificate: x509.Certificate) -> bytes:
        return certificate.public_bytes(serialization.Encoding.DER)

    right, wrong = p256(), p256()
    good = der(a_certificate(right.public_key(), CA, usages=(trust.EK_CERTIFICATE,)))
    bad = der(a_certificate(wrong.public_key(), IMPOSTOR, usages=(trust.EK_CERTIFICATE,)))

    key, words = trust.choose_ek(told(None, b"junk", bad, good), [CA_CERTIFICATE], NOW)

    assert key == right.public_key()
    assert words == "certified by CN=factory CA as an endorsement key"
    for found in (told(), told(None), told(bad), told(b"junk")):
        assert reason_of(partial(trust.choose_ek, found, [CA_CERTIFICATE], NOW)) == "certificate_untrusted"


# The challenge.


def answered(secret: Secret, ak: Object) -> Evidence:
    plain = evidence(ak=ak, attestation=partial(attest, nonce=secret.nonce))
    return dataclasses.replace(plain, activation=credential.activation(secret.secret, plain.attestation))


def test_an_attestation_key_is_believed_that_opened_the_challenge() -> None:
    ak = an_ak()
    _, secret = credential.make_challenge(p256().public_key(), ak.name, believed="the one that was given")

    verdict = verifier.verify(answered(secret, ak), secret)

    assert any("it is in the TPM that opened the challenge" in line for line in verdict.proved)
    assert "the attestation was made after the nonce was" in verdict.proved


def test_a_challenge_that_was_not_opened_proves_nothing() -> None:
    ak = an_ak()
    ek = p256().public_key()
    _, secret = credential.make_challenge(ek, ak.name, believed="given")
    _, other = credential.make_challenge(ek, ak.name, believed="given")
    right = answered(secret, ak)
    earlier = dataclasses.replace(right, activation=answered(other, ak).activation)
    none = dataclasses.replace(right, activation=None)
    moved = dataclasses.replace(evidence(ak=ak, attestation=partial(attest, nonce=NONCE)), activation=right.activation)
    old = evidence(ak=ak)
    old = dataclasses.replace(old, activation=credential.activation(secret.secret, old.attestation))

    assert reason_of(lambda: verifier.verify(earlier, secret)) == "challenge_unanswered"
    assert reason_of(lambda: verifier.verify(none, secret)) == "challenge_unanswered"
    assert reason_of(lambda: verifier.verify(moved, secret)) == "challenge_unanswered"
    assert reason_of(lambda: verifier.verify(old, secret)) == "nonce_differs"


def test_another_attestation_key_than_the_challenged_one_is_not_believed() -> None:
    """The TPM has opened the challenge for its own key; the evidence comes from a key in software."""
    _, secret = credential.make_challenge(p256().public_key(), an_ak().name, believed="given")

    assert reason_of(lambda: verifier.verify(answered(secret, an_ak()), secret)) == "ak_untrusted"


def test_no_challenge_is_made_for_what_is_no_attestation_key() -> None:
    unrestricted = AttestationKey(public=an_ak(attributes=forgery.KEY_ATTRIBUTES).public)

    assert reason_of(lambda: verifier.read_ak_public(unrestricted)) == "ak_unfit"


@pytest.mark.parametrize("ek", [rsa_key(1024), ec.generate_private_key(ec.SECP224R1())], ids=["RSA-1024", "P-224"])
def test_no_challenge_is_made_for_a_key_of_no_template(ek: Any) -> None:
    ak_name = an_ak().name

    assert reason_of(lambda: credential.make_challenge(ek.public_key(), ak_name, believed="given")) == (
        "evidence_unsupported"
    )
