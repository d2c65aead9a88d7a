"""Which attestation key is believed: by a certificate, a recorded name, or a challenge."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from functools import partial
from typing import Any

import forgery
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from evidence_parts import CA, NONCE, NOW, a_certificate, name_of, pem_of, reason_of, rsa_key
from forgery import Object, an_ak, attest, evidence, p256

from stationkey.attestation import credential, documents, trust, verifier
from stationkey.attestation.documents import AttestationKey, EndorsementKey, Evidence, Secret
from stationkey.attestation.trust import RecordedName
from stationkey.errors import ConfigurationError

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
