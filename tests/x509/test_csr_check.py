"""The check that the CSMS makes of a CSR before it signs."""

from __future__ import annotations

import ssl
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asn1crypto.algos  # type: ignore[import-untyped]  # ships no type information
import asn1crypto.core  # type: ignore[import-untyped]  # same
import asn1crypto.csr  # type: ignore[import-untyped]  # same
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from csms_parts import ORGANIZATION, STATION, V2G, csr_for, new_key

from stationkey.contract.profiles import CertificateType
from stationkey.x509.csr import to_pem
from stationkey.x509.csr_check import CsrRefused, check_csr

# --- What it refuses -------------------------------------------------------------------------------------------------

GOOD_NAMES = {"C": "DE", "O": ORGANIZATION, "CN": "DE-ABC-S-STATION42", "DC": "CPO"}
OIDS = {
    "C": NameOID.COUNTRY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "CN": NameOID.COMMON_NAME,
    "DC": NameOID.DOMAIN_COMPONENT,
}


def named(**changes: str | None) -> str:
    """A CSR for an ISO 15118-2 certificate whose subject is changed; None leaves an attribute out."""
    names = [(OIDS[label], value) for label, value in (GOOD_NAMES | changes).items() if value is not None]
    return request_of(x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in names]))


def request_of(
    subject: x509.Name | None = None,
    private_key: Any = None,
    hash_algorithm: Any = hashes.SHA256(),  # noqa: B008 - a constant
    *extensions: x509.ExtensionType,
) -> str:
    names = [x509.NameAttribute(OIDS[label], value) for label, value in GOOD_NAMES.items()]
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject or x509.Name(names))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return to_pem(builder.sign(private_key or new_key(), hash_algorithm))


def spoiled(spoil: Callable[[Any], None], *, sign_again: bool) -> str:
    """A good CSR, changed in its ASN.1 structure, and signed again where the change is in what is signed."""
    private_key = new_key()
    der = x509.load_pem_x509_csr(csr_for(V2G, private_key).encode()).public_bytes(serialization.Encoding.DER)
    request = asn1crypto.csr.CertificationRequest.load(der)
    spoil(request)
    if sign_again:
        information = request["certification_request_info"].dump(force=True)
        request["signature"] = private_key.sign(information, ec.ECDSA(hashes.SHA256()))
    return ssl.DER_cert_to_PEM_cert(request.dump(force=True)).replace("CERTIFICATE", "CERTIFICATE REQUEST")


def _version_2(request: Any) -> None:
    request["certification_request_info"]["version"] = 2


def _null_parameters(request: Any) -> None:
    request["signature_algorithm"]["parameters"] = asn1crypto.core.Null()


def _unknown_signature(request: Any) -> None:
    request["signature_algorithm"] = asn1crypto.algos.SignedDigestAlgorithm({"algorithm": "1.2.3.4"})


def _other_subject(request: Any) -> None:
    request["certification_request_info"]["subject"] = request["certification_request_info"]["subject"].build(
        {"country_name": "DE", "organization_name": ORGANIZATION, "common_name": "another"}
    )


def _key_usage(*, cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


CA = x509.BasicConstraints(ca=True, path_length=None)
REFUSED = {
    # What a CSMS of the field takes, and this one does not: proof of possession, CA:TRUE and RSA-1024 among them.
    # words: which value of which field; where it is empty, the reason says it all.
    "no_pem": (lambda: "CSR", "csr_unreadable", r"PKCS#10"),
    "a_certificate": (lambda: csr_for(V2G).replace(" REQUEST", ""), "csr_unreadable", r"PKCS#10"),
    "cut_off": (lambda: csr_for(V2G)[:200], "csr_unreadable", r"PKCS#10"),
    "version_2": (lambda: spoiled(_version_2, sign_again=True), "csr_version", ""),
    "null_parameters": (
        lambda: spoiled(_null_parameters, sign_again=False),
        "csr_signature_parameters",
        "",
    ),
    "no_proof": (lambda: spoiled(_other_subject, sign_again=False), "csr_signature", ""),
    "rsa_1024": (lambda: request_of(None, rsa.generate_private_key(65537, 1024)), "csr_key_weak", "RSA-1024"),
    "secp192r1": (lambda: request_of(None, ec.generate_private_key(ec.SECP192R1())), "csr_key_weak", "secp192r1"),
    "ed25519": (lambda: request_of(None, ed25519.Ed25519PrivateKey.generate(), None), "csr_key_kind", "Ed25519"),
    "other_organization": (lambda: named(O="EcoG"), "csr_organization_name", "O is 'EcoG'"),
    "mangled_organization": (lambda: named(O="Uber Strom GmbH"), "csr_organization_name", "O is 'Uber"),
    "no_organization": (lambda: named(O=None), "csr_organization_name", "0 O"),
    "country_of_three": (lambda: named(C="GER"), "csr_country_name", "C is 'GER'"),
    "no_country": (lambda: named(C=None), "csr_country_name", "0 C"),
    "long_name": (lambda: named(CN="x" * 65), "csr_common_name", "CN has 65 characters"),
    "no_name": (lambda: named(CN=None), "csr_common_name", "0 CN"),
    "other_domain": (lambda: named(DC="CSO"), "csr_domain_component", "DC is CSO"),
    "no_domain": (lambda: named(DC=None), "csr_domain_component", "none"),
    "unknown_signature": (lambda: spoiled(_unknown_signature, sign_again=False), "csr_hash_weak", "unknown"),
    "ca": (lambda: request_of(None, None, hashes.SHA256(), CA), "csr_wants_ca", "CA:TRUE"),
    "cert_sign": (
        lambda: request_of(None, None, hashes.SHA256(), _key_usage(cert_sign=True)),
        "csr_wants_ca",
        "keyCertSign",
    ),
    "crl_sign": (
        lambda: request_of(None, None, hashes.SHA256(), _key_usage(crl_sign=True)),
        "csr_wants_ca",
        "cRLSign",
    ),
}


@pytest.mark.parametrize(("csr", "reason", "words"), [pytest.param(*row, id=name) for name, row in REFUSED.items()])
def test_a_csr_that_should_never_be_signed_is_refused_and_told_why(
    csr: Callable[[], str], reason: str, words: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cryptography's own opinion of what these tests make
        pem = csr()
        with pytest.raises(CsrRefused, match=words) as refusal:
            check_csr(pem, certificate_type=V2G, organization=ORGANIZATION)
    assert refusal.value.reason == reason


def test_a_csr_signed_with_sha_1_is_refused(tmp_path: Path) -> None:
    """Made by openssl: cryptography makes none."""
    subject = f"/C=DE/O={ORGANIZATION}/CN=DE-ABC-S-1/DC=CPO"
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem")
    command = ["openssl", "req", "-new", *key, "-sha1", "-utf8", "-subj", subject]
    pem = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    with pytest.raises(CsrRefused, match="sha1") as refusal:  # words: which hash
        check_csr(pem, certificate_type=V2G, organization=ORGANIZATION)
    assert refusal.value.reason == "csr_hash_weak"


def test_a_subject_in_an_encoding_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A T61String of openssl's with a letter beyond ASCII."""
    config = (
        f"[req]\nstring_mask=nombstr\nutf8=yes\ndistinguished_name=d\nprompt=no\n[d]\nC=DE\nO={ORGANIZATION}\nCN=x\n"
    )
    (tmp_path / "c").write_text(config)
    command = ["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "k", "-config", "c"]
    pem = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    with pytest.raises(CsrRefused) as refusal:
        check_csr(pem, certificate_type=V2G, organization=ORGANIZATION)
    assert refusal.value.reason == "csr_unreadable"


@pytest.mark.parametrize("common_name", ["https://cs.example", "192.0.2.7", "2001:db8::7"])
def test_a_charging_stations_cn_is_no_url_and_no_address(common_name: str) -> None:
    """A00.FR.511; a SECC's CN is another matter."""
    with pytest.raises(CsrRefused, match=r"A00\.FR\.511") as refusal:  # words: the rule
        check_csr(named(CN=common_name, DC=None), certificate_type=STATION, organization=ORGANIZATION)
    assert refusal.value.reason == "csr_common_name"
    check_csr(named(CN=common_name), certificate_type=V2G, organization=ORGANIZATION)


@pytest.mark.parametrize("kind", CertificateType)
def test_a_good_csr_passes(kind: CertificateType) -> None:
    csr = check_csr(csr_for(kind), certificate_type=kind, organization=ORGANIZATION)
    assert csr.is_signature_valid
    with pytest.raises(CsrRefused):
        check_csr(csr_for(kind), certificate_type=kind, organization="EcoG")


@pytest.mark.parametrize("bits", [2048, 3072])
def test_rsa_of_2048_bits_is_strong_enough(bits: int) -> None:
    pem = request_of(None, rsa.generate_private_key(65537, bits))
    check_csr(pem, certificate_type=V2G, organization=ORGANIZATION)
