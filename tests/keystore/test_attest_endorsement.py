"""The endorsement key, and the certificate that its maker gave it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from attested_tpms import NONCE, ak_of, attested, ek_of, new_key
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from peers import Swtpm
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import TPM2_ALG
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
)

from protection import tool
from stationkey.attestation import credential, trust, verifier
from stationkey.attestation.structures import PublicKey, read_public, spki_of
from stationkey.attestation.trust import RecordedKey
from stationkey.contract.profiles import Algorithm
from stationkey.errors import NotVerified
from stationkey.keystore import KeyRef

pytest_plugins = ["attested_tpms"]


# Certificates of endorsement keys.


def certify_ek(ek: PublicKey, ca: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """As the maker of a TPM does: the subject is empty, and a critical subjectAltName names the model."""
    now = datetime.now(UTC)
    model = [
        x509.NameAttribute(x509.ObjectIdentifier(oid), text)
        for oid, text in (("2.23.133.2.1", "id:00001014"), ("2.23.133.2.2", "swtpm"), ("2.23.133.2.3", "id:1"))
    ]
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "TPM maker")]))
        .public_key(ek)
        .serial_number(7)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DirectoryName(x509.Name(model))]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([trust.EK_CERTIFICATE]), critical=False)
        .sign(ca, hashes.SHA256())
    )


def ca_certificate(ca: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "TPM maker")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(ca.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    )
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(
        ca, hashes.SHA256()
    )


def test_a_tpm_that_makes_no_rsa_endorsement_key_tells_of_the_other(
    tpm: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_primary = ESAPI.create_primary

    def refuse_rsa(esapi: ESAPI, sensitive: object, template: TPM2B_PUBLIC, *rest: object, **more: object) -> object:
        if template.publicArea.type == TPM2_ALG.RSA:
            raise TSS2_Exception(0x2C4)  # TPM_RC_VALUE, parameter 2
        return create_primary(esapi, sensitive, template, *rest, **more)

    monkeypatch.setattr(ESAPI, "create_primary", refuse_rsa)

    (told,) = ak_of(tpm).endorsement_keys
    assert told.public is not None
    assert isinstance(read_public(told.public, "EK").key, ec.EllipticCurvePublicKey)


@pytest.mark.parametrize(("kind", "index"), [("RSA", 0x01C00002), ("ECC", 0x01C0000A)])
def test_the_certificate_in_the_tpm_makes_its_endorsement_key_believed(swtpm: Swtpm, kind: str, index: int) -> None:
    key, ca = new_key(swtpm), ec.generate_private_key(ec.SECP256R1())
    certificate = certify_ek(ek_of(ak_of(swtpm), kind), ca).public_bytes(serialization.Encoding.DER)
    (swtpm.directory / "ek.crt").write_bytes(certificate + b"\xff" * 200)  # some makers fill the index up
    attributes = "ownerwrite|authread|ownerread|no_da"
    tool(swtpm, "tpm2_nvdefine", f"{index:#x}", "-C", "o", "-s", str(len(certificate) + 200), "-a", attributes)
    tool(swtpm, "tpm2_nvwrite", f"{index:#x}", "-C", "o", "-i", "ek.crt")

    told = attested(swtpm, key).attestation_key
    assert [ek.certificate for ek in told.endorsement_keys] == [certificate]
    ek, believed = trust.choose_ek(told.endorsement_keys, [ca_certificate(ca)], datetime.now(UTC))
    challenge, secret = credential.make_challenge(ek, read_public(told.public, "AK").name, believed=believed)
    verdict = verifier.verify(attested(swtpm, key, challenge=challenge), secret)

    assert any("certified by CN=TPM maker as an endorsement key" in line for line in verdict.proved)
    whole = {(ek.certificate is not None, ek.public is not None) for ek in ak_of(swtpm).endorsement_keys}
    assert whole == {(True, True), (False, True)}
    stranger = ca_certificate(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(NotVerified):
        trust.choose_ek(told.endorsement_keys, [stranger], datetime.now(UTC))


@pytest.mark.parametrize("content", [b"\x30\x82\xff\xff", b"\x30\x82\x00\x10" + bytes(16), b"junk", bytes(64)])
def test_what_is_no_certificate_where_one_should_be_is_passed_over(swtpm: Swtpm, content: bytes) -> None:
    key = new_key(swtpm)
    (swtpm.directory / "junk").write_bytes(content)
    attributes = "ownerwrite|authread|ownerread|no_da"
    tool(swtpm, "tpm2_nvdefine", "0x01c00002", "-C", "o", "-s", str(len(content)), "-a", attributes)
    tool(swtpm, "tpm2_nvwrite", "0x01c00002", "-C", "o", "-i", "junk")

    assert attested(swtpm, key).attestation_key.endorsement_keys == ()


def test_an_index_that_is_not_for_everybody_is_passed_over(swtpm: Swtpm) -> None:
    key = new_key(swtpm)
    tool(swtpm, "tpm2_nvdefine", "0x01c00002", "-C", "o", "-s", "8", "-a", "ownerwrite|authread", "-p", "secret")
    tool(swtpm, "tpm2_nvdefine", "0x01c0000a", "-C", "o", "-s", "8", "-a", "ownerwrite|authread")

    assert attested(swtpm, key).attestation_key.endorsement_keys == ()


def test_a_key_of_the_endorsement_hierarchy_that_is_recorded_by_its_public_key_is_bound_to_its_attributes(
    tpm: Swtpm, keys: dict[Algorithm, KeyRef]
) -> None:
    evidence: Any = attested(tpm, keys[Algorithm.RSA_SHA256])
    ak = read_public(evidence.attestation_key.public, "AK")

    verdict = verifier.verify(evidence, RecordedKey(spki_of(ak.key), "recorded"), nonce=NONCE)

    assert verdict.spki == keys[Algorithm.RSA_SHA256].public
