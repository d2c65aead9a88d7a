"""Forms of a CSR that parsers are kind to and standards are not: what `stationkey csms` says of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

from stationkey.contract.profiles import CertificateType
from stationkey.x509.csr import to_pem
from stationkey.x509.csr_check import CsrRefused, check_csr

SUBJECT = {"C": "DE", "O": "O", "CN": "DE-ABC-S-1", "DC": "CPO"}
OIDS = (NameOID.COUNTRY_NAME, NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME, NameOID.DOMAIN_COMPONENT)


def reason(pem: str) -> str:
    try:
        check_csr(pem, certificate_type=CertificateType.V2G_CERTIFICATE, organization="O")
    except CsrRefused as error:
        return error.reason
    return ""


def by_openssl(folder: Path, *options: str) -> str:
    """A CSR that openssl makes, with a key by these options."""
    subject = "".join(f"/{label}={value}" for label, value in SUBJECT.items())
    key = str(folder / "key.pem")
    command = ["openssl", "req", "-new", "-newkey", *options, "-nodes", "-keyout", key, "-subj", subject]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
@pytest.mark.parametrize(
    ("encoding", "expected"),
    [pytest.param("named_curve", "", id="named"), pytest.param("explicit", "csr_key_parameters", id="explicit")],
)
def test_a_curve_given_by_its_parameters_is_refused(tmp_path: Path, curve: str, encoding: str, expected: str) -> None:
    """RFC 5480 2.1.1: only named curves. The parser gives explicit ones their name, if it knows it."""
    options = ("-pkeyopt", f"ec_paramgen_curve:{curve}", "-pkeyopt", f"ec_param_enc:{encoding}")

    assert reason(by_openssl(tmp_path, "ec", *options)) == expected


def test_an_rsa_key_has_no_curve(tmp_path: Path) -> None:
    assert reason(by_openssl(tmp_path, "rsa:2048")) == ""


def with_san(der: bytes) -> str:
    names = [x509.NameAttribute(oid, value) for oid, value in zip(OIDS, SUBJECT.values(), strict=True)]
    extension = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, der)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    return to_pem(
        builder.add_extension(extension, critical=False).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a3023000", id="x400Address"),
        pytest.param("a506a1040c024142", id="ediPartyName"),
        pytest.param("8703010203", id="an IP address of three bytes"),
        pytest.param("8902ffff", id="an unknown tag"),
        pytest.param("82", id="cut off"),
    ],
)
def test_a_name_that_no_certificate_may_have_is_refused_in_words(name: str) -> None:
    """And is no internal error: a CSMS answers."""
    content = bytes.fromhex(name)

    assert reason(with_san(bytes([0x30, len(content)]) + content)) == "csr_unreadable"
