"""What a CSR says, told to a person."""

from __future__ import annotations

import pytest
from asn1crypto import pem as asn1_pem  # type: ignore[import-untyped] # ships none
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from csrs import P521, build, request_for
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from stationkey.contract.profiles import (
    PROFILES,
    Algorithm,
    CertificateType,
    EvseIdPlacement,
)
from stationkey.errors import StationKeyError
from stationkey.x509.csr import CsrSummary, build_csr, inspect_csr, to_pem

# Reading a CSR.


def test_a_csr_is_told_to_a_person() -> None:
    profile = replace(PROFILES[CertificateType.V2G20_CERTIFICATE], evse_id_placement=EvseIdPlacement.SAN_URI)
    request = request_for(
        CertificateType.V2G20_CERTIFICATE, Algorithm.ECDSA_SHA512, organization_name="Über Strom GmbH"
    )
    summary = inspect_csr(to_pem(build_csr(request, P521, profile)))
    assert summary == CsrSummary(
        subject="C=DE, O=Über Strom GmbH, CN=9783161484100, DC=CSO",
        key="secp521r1",
        signature="ecdsa-with-SHA512",
        extensions=(
            "keyUsage digitalSignature+keyAgreement (critical)",
            "extendedKeyUsage serverAuth (critical)",
            "basicConstraints CA:false (critical)",
            "subjectAltName urn:evse:DE*SEV*E123456789",
        ),
        signature_valid=True,
    )


def test_a_csr_of_others_is_told_as_it_is() -> None:
    """SHA-384, another curve, an authority's constraints, an extension that this program does not know."""
    key = ec.generate_private_key(ec.SECP384R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=False)
        .add_extension(x509.OCSPNoCheck(), critical=False)
        .sign(key, hashes.SHA384())
    )
    summary = inspect_csr(to_pem(csr).encode())
    assert (summary.key, summary.signature) == ("secp384r1", "ecdsa-with-SHA384")
    assert summary.extensions == ("basicConstraints CA:true", "1.3.6.1.5.5.7.48.1.5")


def test_a_csr_whose_signature_is_wrong_is_told_so() -> None:
    der = bytearray(build(request_for()))
    der[der.index(b"EcoG")] ^= 1
    pem = to_pem(x509.load_der_x509_csr(bytes(der)))
    assert not inspect_csr(pem).signature_valid


def pem_of(der: bytes, label: str = "CERTIFICATE REQUEST") -> bytes:
    pem: bytes = asn1_pem.armor(label, der)
    return pem


def changed(before: bytes, after: bytes) -> bytes:
    """A CSR with a few bytes changed, in PEM."""
    der = build(request_for())
    assert before in der
    return pem_of(der.replace(before, after, 1))


@pytest.mark.parametrize(
    "pem",
    [
        pytest.param("", id="empty"),
        pytest.param("no CSR", id="text"),
        pytest.param("\udc80", id="lone-surrogate"),
        pytest.param(b"\xff\xfe", id="bytes"),
        pytest.param("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", id="no-DER"),
        pytest.param("-----BEGIN CERTIFICATE REQUEST-----\n?\n-----END CERTIFICATE REQUEST-----\n", id="no-base64"),
        pytest.param(pem_of(build(request_for()))[:200], id="cut-short"),
        pytest.param(pem_of(build(request_for())[:-1]), id="DER-cut-short"),
        pytest.param(pem_of(build(request_for()) + b"\x00"), id="DER-with-more"),
        pytest.param(pem_of(build(request_for()), "CERTIFICATE"), id="called-a-certificate"),
        pytest.param(changed(b"\x02\x01\x00", b"\x02\x01\x02"), id="version-3"),
        pytest.param(changed(b"EcoG", b"\xff\xfe\xfd\xfc"), id="subject-not-UTF-8"),
        pytest.param(changed(bytes.fromhex("551d13"), bytes.fromhex("551d0f")), id="extension-twice"),
        pytest.param(changed(bytes.fromhex("551d0f"), bytes.fromhex("551d11")), id="extension-of-another-form"),
        pytest.param(changed(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030102")), id="unknown-curve"),
        pytest.param(changed(bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0209")), id="unknown-key"),
        pytest.param(changed(bytes.fromhex("06035504030c"), bytes.fromhex("060355040303")), id="cn-bit-string"),
    ],
)
def test_what_is_no_csr_is_refused_in_words(pem: str | bytes) -> None:
    with pytest.raises(StationKeyError, match="not a PKCS#10 request") as caught:
        inspect_csr(pem)
    assert caught.value.reason == "csr_unreadable"
    assert "ParseError" not in str(caught.value)  # the parser's own words


@settings(deadline=None, max_examples=300)
@given(at=st.integers(0, len(build(request_for())) - 1), value=st.integers(0, 255))
def test_a_csr_with_any_byte_changed_is_read_or_refused(at: int, value: int) -> None:
    """And is not said to be signed unless nothing was changed that is signed."""
    original = build(request_for())
    unused_bits = len(original) - len(x509.load_der_x509_csr(original).signature) - 1  # of the signature's BIT STRING
    der = original[:at] + bytes([value]) + original[at + 1 :]
    try:
        summary = inspect_csr(pem_of(der))
    except StationKeyError:
        assert der != original
    else:
        assert summary.signature_valid == (der == original or at == unused_bits)
