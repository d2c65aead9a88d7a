"""The authorities for trying: what they sign, judged by `openssl verify`, and what they spoil when told so."""

from __future__ import annotations

import errno
import hashlib
import os
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asn1crypto.csr  # type: ignore[import-untyped]  # ships no type information
import asn1crypto.x509  # type: ignore[import-untyped]  # same
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from stationkey.contract.messages import GenerateCsrData, generate_csr
from stationkey.contract.profiles import PROFILES, SECP256R1, SECP521R1, Algorithm, CertificateType, EllipticCurve
from stationkey.errors import ConfigurationError
from stationkey.simulators.pki import Hierarchy, Misbehaviour, certificate_hash, to_pem
from stationkey.x509.csr import PrivateKey, build_csr

NOW = datetime.now(UTC).replace(microsecond=0)
ORGANIZATION = "Über Strom GmbH"
STATION = CertificateType.CHARGING_STATION_CERTIFICATE
V2G = CertificateType.V2G_CERTIFICATE
V2G20 = CertificateType.V2G20_CERTIFICATE
LEAVES = [
    pytest.param(STATION, SECP256R1, id="charging_station"),
    pytest.param(V2G, SECP256R1, id="iso15118-2"),
    pytest.param(V2G20, SECP521R1, id="iso15118-20"),
]


@pytest.fixture(scope="module")
def hierarchies() -> dict[EllipticCurve, Hierarchy]:
    return {curve: Hierarchy.make(curve, organization=ORGANIZATION, now=NOW) for curve in (SECP256R1, SECP521R1)}


def key_for(curve: EllipticCurve) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1() if curve is SECP256R1 else ec.SECP521R1())


def csr_for(kind: CertificateType, private_key: PrivateKey) -> x509.CertificateSigningRequest:
    algorithm = Algorithm.ECDSA_SHA512 if kind is V2G20 else Algorithm.ECDSA_SHA256
    if isinstance(private_key, rsa.RSAPrivateKey):
        algorithm = Algorithm.RSA_SHA256
    names = {"common_name": "DE-ABC-S-1", "organization_name": ORGANIZATION, "country_name": "DE"}
    data = GenerateCsrData(certificate_type=kind, algorithm=algorithm, **names)
    request = generate_csr("123e4567-e89b-12d3-a456-426614174000", data)
    return build_csr(request, private_key)


def openssl_verify(folder: Path, chain: list[x509.Certificate], root_pem: str, *options: str) -> str:
    """What openssl says of a chain, leaf first, against a root; ends in OK where it is good."""
    (folder / "root.pem").write_text(root_pem)
    (folder / "leaf.pem").write_text(to_pem(chain[:1]))
    (folder / "subs.pem").write_text(to_pem(chain[1:]))
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-CAfile",
        "root.pem",
        "-untrusted",
        "subs.pem",
        *options,
        "leaf.pem",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize(("kind", "curve"), LEAVES)
def test_openssl_verifies_the_chain_strictly_up_to_the_root_that_is_not_in_it(
    kind: CertificateType, curve: EllipticCurve, hierarchies: dict[EllipticCurve, Hierarchy], tmp_path: Path
) -> None:
    hierarchy = hierarchies[curve]
    chain = hierarchy.issue(csr_for(kind, key_for(curve)), PROFILES[kind], now=NOW)
    purpose = {STATION: ["-purpose", "sslclient"], V2G: [], V2G20: ["-purpose", "sslserver"]}[kind]
    assert openssl_verify(tmp_path, chain, hierarchy.trust_anchors_pem(kind), *purpose) == "leaf.pem: OK"
    assert len(chain) == (2 if kind is STATION else 3)
    assert all(certificate.subject != certificate.issuer for certificate in chain)
    assert "unable to get" in openssl_verify(
        tmp_path, chain, hierarchy.trust_anchors_pem(V2G if kind is STATION else STATION)
    )


@pytest.mark.parametrize(("kind", "curve"), LEAVES)
def test_a_leaf_is_as_its_profile_has_it_whatever_the_csr_asks_for(
    kind: CertificateType, curve: EllipticCurve, hierarchies: dict[EllipticCurve, Hierarchy]
) -> None:
    private_key = key_for(curve)
    asks_for_more = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(csr_for(kind, private_key).subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("evil.example")]), critical=False)
        .sign(private_key, hashes.SHA256())
    )
    leaf = hierarchies[curve].issue(asks_for_more, PROFILES[kind], now=NOW)[0]
    digest = leaf.signature_hash_algorithm
    assert digest is not None
    assert digest.name == ("sha512" if curve is SECP521R1 else "sha256")
    critical = {extension.value.__class__: extension.critical for extension in leaf.extensions}
    expected: dict[type[x509.ExtensionType], bool] = {
        x509.SubjectKeyIdentifier: False,
        x509.AuthorityKeyIdentifier: False,
        x509.KeyUsage: True,
        x509.BasicConstraints: True,
        x509.AuthorityInformationAccess: False,
        x509.CRLDistributionPoints: False,
    }
    if kind is not V2G:
        expected[x509.ExtendedKeyUsage] = kind is V2G20
        purposes = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        assert purposes == [ExtendedKeyUsageOID.SERVER_AUTH if kind is V2G20 else ExtendedKeyUsageOID.CLIENT_AUTH]
    assert critical == expected
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_agreement, usage.key_cert_sign) == (True, kind is not STATION, False)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=60)


@pytest.mark.parametrize(("kind", "curve"), LEAVES)
def test_each_certificate_below_the_root_says_where_its_revocation_is_told(
    kind: CertificateType, curve: EllipticCurve, hierarchies: dict[EllipticCurve, Hierarchy]
) -> None:
    chain = hierarchies[curve].issue(csr_for(kind, key_for(curve)), PROFILES[kind], now=NOW)
    issuers = {
        STATION: ["CSMS-Sub-CA", "CSMS-Root-CA"],
        V2G: ["CPO-Sub-CA-2", "CPO-Sub-CA-1", "V2G-Root-CA"],
    }[STATION if kind is STATION else V2G]
    for certificate, issuer in zip(chain, issuers, strict=True):
        (access,) = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
        assert access.access_method == AuthorityInformationAccessOID.OCSP
        assert access.access_location.value == "http://pki.invalid/ocsp"
        (point,) = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
        assert point.full_name == [x509.UniformResourceIdentifier(f"http://pki.invalid/crl/{issuer}.crl")]


def test_the_authorities_are_bounded_in_what_they_may_sign(hierarchies: dict[EllipticCurve, Hierarchy]) -> None:
    for curve, hierarchy in hierarchies.items():
        lengths = {
            "v2g_root": None,
            "cpo_sub_ca_1": 1,
            "cpo_sub_ca_2": 0,
            "csms_root": None,
            "csms_sub_ca": 0,
        }
        for name, length in lengths.items():
            certificate = getattr(hierarchy, name).certificate
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
            assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, length)
            assert certificate.public_key().curve.name == curve.name
            domain = certificate.subject.get_attributes_for_oid(NameOID.DOMAIN_COMPONENT)
            assert [part.value for part in domain] == ([] if name.startswith("csms") else ["V2G"])


def test_the_subject_is_the_csrs_byte_for_byte(hierarchies: dict[EllipticCurve, Hierarchy], tmp_path: Path) -> None:
    """Made by openssl, with PrintableString where this project's own CSRs have UTF8String."""
    config = "[req]\nstring_mask=nombstr\ndistinguished_name=dn\nprompt=no\n[dn]\nC=DE\nO=EcoG\nCN=DE-ABC-S-1\nDC=CPO\n"
    (tmp_path / "req.cnf").write_text(config)
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "key.pem")
    command = ["openssl", "req", "-new", *key, "-config", "req.cnf", "-outform", "DER"]
    der = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    leaf = hierarchies[SECP256R1].issue(x509.load_der_x509_csr(der), PROFILES[V2G], now=NOW)[0]
    asked = asn1crypto.csr.CertificationRequest.load(der)["certification_request_info"]["subject"]
    certified = asn1crypto.x509.Certificate.load(leaf.public_bytes(serialization.Encoding.DER)).subject
    assert certified.dump() == asked.dump()
    assert b"\x13\x04EcoG" in asked.dump()


def test_an_rsa_key_is_certified_too(hierarchies: dict[EllipticCurve, Hierarchy], tmp_path: Path) -> None:
    private_key = rsa.generate_private_key(65537, 3072)
    chain = hierarchies[SECP256R1].issue(csr_for(STATION, private_key), PROFILES[STATION], now=NOW)
    assert openssl_verify(tmp_path, chain, hierarchies[SECP256R1].trust_anchors_pem(STATION)).endswith("OK")
    assert chain[0].public_key() == private_key.public_key()


class TestMisbehaviour:
    """Each spoils one thing and nothing else: openssl is the judge of the rest."""

    @pytest.fixture(params=[pytest.param((kind.values[0], kind.values[1]), id=kind.id) for kind in LEAVES])
    def case(
        self, request: pytest.FixtureRequest, hierarchies: dict[EllipticCurve, Hierarchy], tmp_path: Path
    ) -> tuple[Hierarchy, CertificateType, PrivateKey, Path]:
        kind, curve = request.param
        return hierarchies[curve], kind, key_for(curve), tmp_path

    def issue(
        self, case: tuple[Hierarchy, CertificateType, PrivateKey, Path], misbehaviour: Misbehaviour
    ) -> tuple[list[x509.Certificate], str]:
        hierarchy, kind, private_key, folder = case
        csr = csr_for(kind, private_key)
        chain = hierarchy.issue(csr, PROFILES[kind], now=NOW, misbehaviour=misbehaviour)
        return chain, openssl_verify(folder, chain, hierarchy.trust_anchors_pem(kind))

    def test_wrong_key_is_a_good_certificate_for_another_key(
        self, case: tuple[Hierarchy, CertificateType, PrivateKey, Path]
    ) -> None:
        chain, verdict = self.issue(case, Misbehaviour.WRONG_KEY)
        assert verdict == "leaf.pem: OK"
        assert chain[0].public_key() != case[2].public_key()

    def test_expired_ended_a_day_ago(self, case: tuple[Hierarchy, CertificateType, PrivateKey, Path]) -> None:
        chain, verdict = self.issue(case, Misbehaviour.EXPIRED)
        assert "certificate has expired" in verdict
        assert chain[0].not_valid_after_utc == NOW - timedelta(days=1)

    def test_wrong_dc_is_a_good_certificate_with_another_dc(
        self, case: tuple[Hierarchy, CertificateType, PrivateKey, Path]
    ) -> None:
        chain, verdict = self.issue(case, Misbehaviour.WRONG_DC)
        assert verdict == "leaf.pem: OK"
        domains = [part.value for part in chain[0].subject.get_attributes_for_oid(NameOID.DOMAIN_COMPONENT)]
        assert domains == ["MO"]
        assert [part.oid for part in chain[0].subject][:3] == [
            NameOID.COUNTRY_NAME,
            NameOID.ORGANIZATION_NAME,
            NameOID.COMMON_NAME,
        ]

    def test_root_in_chain_ends_with_the_root(self, case: tuple[Hierarchy, CertificateType, PrivateKey, Path]) -> None:
        chain, verdict = self.issue(case, Misbehaviour.ROOT_IN_CHAIN)
        assert verdict == "leaf.pem: OK"
        assert chain[-1] == case[0].issuers(case[1])[-1].certificate

    def test_chain_too_long_has_more_than_10000_characters_and_would_verify(
        self, case: tuple[Hierarchy, CertificateType, PrivateKey, Path]
    ) -> None:
        chain, verdict = self.issue(case, Misbehaviour.CHAIN_TOO_LONG)
        assert verdict == "leaf.pem: OK"
        assert 10000 < len(to_pem(chain)) < 12000

    @pytest.mark.parametrize(
        "misbehaviour",
        [
            Misbehaviour.ANSWER_FIRST_OF_THREE,
            Misbehaviour.NEVER,
            Misbehaviour.REJECT,
            Misbehaviour.UNKNOWN_REQUEST_ID,
        ],
    )
    def test_bad_manners_do_not_spoil_a_certificate(
        self, case: tuple[Hierarchy, CertificateType, PrivateKey, Path], misbehaviour: Misbehaviour
    ) -> None:
        chain, verdict = self.issue(case, misbehaviour)
        assert verdict == "leaf.pem: OK"
        assert chain[0].public_key() == case[2].public_key()


@pytest.mark.parametrize("curve", [SECP256R1, SECP521R1], ids=str)
def test_what_is_saved_is_loaded_and_its_keys_are_nobody_elses_to_read(
    curve: EllipticCurve, hierarchies: dict[EllipticCurve, Hierarchy], tmp_path: Path
) -> None:
    hierarchies[curve].save(tmp_path / "pki")
    keys = sorted((tmp_path / "pki").glob("*.key"))
    assert len(keys) == 5
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    assert "for trials and tests only" in (tmp_path / "pki" / "README").read_text()
    loaded = Hierarchy.load(tmp_path / "pki")
    assert loaded.trust_anchors_pem() == hierarchies[curve].trust_anchors_pem()
    chain = loaded.issue(csr_for(V2G, key_for(SECP256R1)), PROFILES[V2G], now=NOW)
    assert openssl_verify(tmp_path, chain, hierarchies[curve].trust_anchors_pem(V2G)) == "leaf.pem: OK"


def test_a_directory_that_is_not_whole_is_refused_in_words(
    hierarchies: dict[EllipticCurve, Hierarchy], tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=os.strerror(errno.ENOENT)) as missing:  # words: the system's own
        Hierarchy.load(tmp_path)
    hierarchies[SECP256R1].save(tmp_path)
    (tmp_path / "v2g_root.key").write_bytes((tmp_path / "csms_root.key").read_bytes())
    with pytest.raises(ConfigurationError, match="v2g_root do not belong together") as mixed:  # words: what, of which
        Hierarchy.load(tmp_path)
    (tmp_path / "v2g_root.crt").write_text("nothing")
    with pytest.raises(ConfigurationError, match="v2g_root is damaged") as damaged:  # words: same
        Hierarchy.load(tmp_path)
    assert {fault.value.reason for fault in (missing, mixed, damaged)} == {"pki_unreadable"}


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_csmss_server_certificate_is_good_for_its_names(
    name: str, hierarchies: dict[EllipticCurve, Hierarchy], tmp_path: Path
) -> None:
    hierarchy = hierarchies[SECP256R1]
    chain, private_key = hierarchy.issue_server(["localhost", "127.0.0.1"], now=NOW)
    check = ["-verify_ip" if name[0].isdigit() else "-verify_hostname", name, "-purpose", "sslserver"]
    assert openssl_verify(tmp_path, chain, hierarchy.trust_anchors_pem(STATION), *check) == "leaf.pem: OK"
    assert chain[0].public_key() == private_key.public_key()
    assert "mismatch" in openssl_verify(
        tmp_path, chain, hierarchy.trust_anchors_pem(STATION), "-verify_hostname", "else"
    )


def test_the_trust_anchors_are_what_a_tls_library_takes(hierarchies: dict[EllipticCurve, Hierarchy]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=hierarchies[SECP521R1].trust_anchors_pem())
    assert context.cert_store_stats()["x509_ca"] == 2


def key_bits(certificate: x509.Certificate) -> bytes:
    """The bits of subjectPublicKey, without tag and length."""
    public_key = certificate.public_key()
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return public_key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    assert isinstance(public_key, rsa.RSAPublicKey)
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)


@pytest.mark.parametrize("of_root", [True, False], ids=["root", "leaf"])
def test_a_certificate_hash_is_of_the_issuers_name_and_key(
    of_root: bool, hierarchies: dict[EllipticCurve, Hierarchy]
) -> None:
    hierarchy = hierarchies[SECP256R1]
    issuer = hierarchy.v2g_root.certificate if of_root else hierarchy.cpo_sub_ca_2.certificate
    leaf = hierarchy.issue(csr_for(V2G, key_for(SECP256R1)), PROFILES[V2G], now=NOW)[0]
    certificate = issuer if of_root else leaf
    assert certificate_hash(certificate, issuer) == {
        "hashAlgorithm": "SHA256",
        "issuerNameHash": hashlib.sha256(issuer.subject.public_bytes()).hexdigest(),
        "issuerKeyHash": hashlib.sha256(key_bits(issuer)).hexdigest(),
        "serialNumber": f"{certificate.serial_number:x}",
    }
    assert not of_root or certificate_hash(certificate) == certificate_hash(certificate, issuer)


def test_a_certificate_hash_of_an_rsa_root_is_of_its_key(tmp_path: Path) -> None:
    """A root of somebody else's."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-subj", "/CN=Root"]
    pem = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    root = x509.load_pem_x509_certificate(pem)
    assert certificate_hash(root)["issuerKeyHash"] == hashlib.sha256(key_bits(root)).hexdigest()
