"""The CSR by its profile, judged by OpenSSL and by a second parser (asn1crypto), on every key store."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, Final

import pytest
from asn1crypto import core  # type: ignore[import-untyped] # it ships no types
from asn1crypto import csr as asn1_csr
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from csrs import P256, P521, REQUEST_ID, build, request_for
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from peers import Swtpm

from stationkey.contract import messages
from stationkey.contract.messages import GenerateCsrData, GenerateCsrRequest
from stationkey.contract.profiles import (
    CHARGING_STATION,
    PROFILES,
    RSA_2048,
    RSA_3072,
    SECP256R1,
    SECP521R1,
    V2G,
    Algorithm,
    CertificateProfile,
    CertificateType,
    EvseIdPlacement,
    ExtendedKeyUsage,
    KeyType,
    KeyUsage,
)
from stationkey.errors import KeyStoreError, MessageError, StationKeyError
from stationkey.keystore import KeyRef, KeyStore, keystore_opener
from stationkey.x509.csr import PrivateKey, build_csr, key_type, to_pem

OCPP_CSR_MAX: Final = 5500
"""Length of the field ``csr`` of OCPP's SignCertificate, in every version."""


KEY_TYPES: Final[dict[Algorithm, KeyType]] = {
    Algorithm.ECDSA_SHA256: SECP256R1,
    Algorithm.ECDSA_SHA512: SECP521R1,
    Algorithm.RSA_SHA256: RSA_3072,
    Algorithm.RSA_SHA384: RSA_3072,
}


# What the standards' profiles ask for, written down here a second time: in asn1crypto's words.
CPO_USAGE: Final = {"digital_signature", "key_agreement"}


TYPES: Final[dict[CertificateType, dict[str, Any]]] = {
    CertificateType.CHARGING_STATION_CERTIFICATE: {
        "domain_component": None,
        "key_usage": {"digital_signature"},
        "extended_key_usage": (["client_auth"], False),
    },
    CertificateType.V2G_CERTIFICATE: {
        "domain_component": "CPO",
        "key_usage": CPO_USAGE,
        "extended_key_usage": None,
    },
    CertificateType.V2G20_CERTIFICATE: {
        "domain_component": "CSO",
        "key_usage": CPO_USAGE,
        "extended_key_usage": (["server_auth"], True),
    },
}


SIGNATURES: Final = {
    Algorithm.ECDSA_SHA256: ("1.2.840.10045.4.3.2", "ecdsa-with-SHA256"),
    Algorithm.ECDSA_SHA512: ("1.2.840.10045.4.3.4", "ecdsa-with-SHA512"),
    Algorithm.RSA_SHA256: ("1.2.840.113549.1.1.11", "sha256WithRSAEncryption"),
    Algorithm.RSA_SHA384: ("1.2.840.113549.1.1.12", "sha384WithRSAEncryption"),
}


PUBLIC_KEYS: Final = {
    SECP256R1: "ASN1 OID: prime256v1",
    SECP521R1: "ASN1 OID: secp521r1",
    RSA_3072: "Public-Key: (3072 bit)",
}


ALLOWED: Final = [
    (certificate_type, algorithm)
    for certificate_type, algorithm in itertools.product(CertificateType, Algorithm)
    if certificate_type is not CertificateType.V2G20_CERTIFICATE or algorithm is Algorithm.ECDSA_SHA512
]


class Signers:
    """One key of each kind in one store, made when first asked for: RSA keys take long."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._keys: dict[KeyType, KeyRef] = {}

    def build(self, request: GenerateCsrRequest, profile: CertificateProfile | None = None) -> bytes:
        """The CSR in DER."""
        kind = KEY_TYPES[request.algorithm]
        if kind not in self._keys:
            self._keys[kind] = self._store.generate(request.algorithm)
        with self._store.signer(self._keys[kind]) as private_key:
            return build_csr(request, private_key, profile).public_bytes(serialization.Encoding.DER)


@pytest.fixture(scope="module", params=["software", "tpm2"])
def signers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signers]:
    with ExitStack() as stack:
        uri = "software:"
        if request.param == "tpm2":
            uri = stack.enter_context(Swtpm(tmp_path_factory.mktemp("swtpm"))).uri
        yield Signers(stack.enter_context(closing(keystore_opener(uri, allow_software_keys=True)())))


def openssl_text(der: bytes) -> str:
    """What ``openssl req`` shows of a CSR, once it has verified its signature."""
    done = subprocess.run(
        ["openssl", "req", "-inform", "DER", "-verify", "-text", "-noout", "-nameopt", "utf8,sep_comma_plus_space"],
        input=der,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    assert b"verify OK" in done.stderr + done.stdout
    return done.stdout.decode()


def info_of(der: bytes) -> Any:
    """CertificationRequestInfo [RFC 2986 4.1], read strictly by asn1crypto."""
    return asn1_csr.CertificationRequest.load(der, strict=True)["certification_request_info"]


STRING_TYPES: Final = {12: "UTF8String", 19: "PrintableString", 22: "IA5String"}
"""By their universal tags [X.680 8.4]."""


def subject_of(der: bytes) -> list[tuple[str, str, str]]:
    """Attribute, string type and value of each RDN, in order; each has one attribute only."""
    attributes = []
    for rdn in info_of(der)["subject"].chosen:
        (attribute,) = rdn
        value = attribute["value"]
        text = value.chosen if isinstance(value, core.Choice) else value
        attributes.append((attribute["type"].native, STRING_TYPES[text.tag], text.contents.decode()))
    return attributes


def extensions_of(der: bytes) -> dict[str, tuple[Any, bool]]:
    """Value and criticality of each extension asked for."""
    (attribute,) = info_of(der)["attributes"]
    assert attribute["type"].native == "extension_request"
    (extensions,) = attribute["values"]
    return {
        extension["extn_id"].native: (extension["extn_value"].parsed.native, extension["critical"].native)
        for extension in extensions
    }


RSA = {Algorithm.RSA_SHA256, Algorithm.RSA_SHA384}


@pytest.mark.parametrize(("certificate_type", "algorithm"), ALLOWED, ids=[f"{kind}-{name}" for kind, name in ALLOWED])
def test_the_csr_is_what_its_profile_says(
    signers: Signers, certificate_type: CertificateType, algorithm: Algorithm
) -> None:
    der = signers.build(request_for(certificate_type, algorithm))
    wanted = TYPES[certificate_type]
    oid, signature_name = SIGNATURES[algorithm]

    text = openssl_text(der)
    assert "Version: 1 (0x0)" in text
    assert f"Signature Algorithm: {signature_name}" in text
    assert PUBLIC_KEYS[KEY_TYPES[algorithm]] in text
    domain_component = wanted["domain_component"]
    last = f", DC={domain_component}" if domain_component else ""
    assert f"Subject: C=DE, O=EcoG, CN=9783161484100{last}\n" in text
    assert "X509v3 Key Usage: critical" in text
    assert "X509v3 Basic Constraints: critical CA:FALSE" in " ".join(text.split())

    assert info_of(der)["version"].native == "v1"
    assert info_of(der)["version"].contents == b"\x00"  # version 0 [RFC 2986 4.1]
    subject = [
        ("country_name", "PrintableString", "DE"),
        ("organization_name", "UTF8String", "EcoG"),
        ("common_name", "UTF8String", "9783161484100"),
    ]
    if domain_component:
        subject.append(("domain_component", "IA5String", domain_component))
    assert subject_of(der) == subject

    extensions = extensions_of(der)
    usages = wanted["key_usage"] - ({"key_agreement"} if algorithm in RSA else set())  # RFC 4055 1.2
    assert extensions.pop("key_usage") == (usages, True)
    basic, critical = extensions.pop("basic_constraints")
    assert critical
    assert not basic["ca"]
    assert basic["path_len_constraint"] is None
    if wanted["extended_key_usage"]:
        assert extensions.pop("extended_key_usage") == wanted["extended_key_usage"]
    assert extensions == {}  # no SAN, and nothing else

    signature = asn1_csr.CertificationRequest.load(der)["signature_algorithm"]
    assert signature["algorithm"].dotted == oid
    parameters = core.Sequence.load(signature.dump())
    if algorithm in {Algorithm.ECDSA_SHA256, Algorithm.ECDSA_SHA512}:
        assert len(parameters) == 1  # absent, not NULL [RFC 5758 3.2]
    else:
        assert isinstance(parameters[1], core.Null)  # [RFC 4055 5]


def test_basic_constraints_leave_ca_out_as_der_wants_a_default() -> None:
    assert bytes.fromhex("300c 0603 551d13 0101ff 0402 3000".replace(" ", "")) in build(request_for())


@pytest.mark.parametrize("certificate_type", list(CertificateType), ids=str)
def test_every_certificate_type_is_in_the_table_of_this_test(certificate_type: CertificateType) -> None:
    assert certificate_type in TYPES
    assert certificate_type in PROFILES


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Über Strom GmbH", id="German"),
        pytest.param("Ηλεκτρική Ενέργεια Α.Ε.", id="Greek"),  # noqa: RUF001 - it is Greek
        pytest.param("国家电网有限公司", id="Chinese"),
        pytest.param("שלום חשמל", id="Hebrew"),
        pytest.param("⚡🚗 👩\u200d🔧 Ladestrom", id="emoji-with-joiner"),
        pytest.param("🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", id="emoji-flag"),
        pytest.param("نیرو\u200cگاه", id="Persian-non-joiner"),  # noqa: RUF001 - it is Persian
        pytest.param("e\u0301 is not \u00e9", id="not-normalised"),
        pytest.param("Ω" * 64, id="64-of-two-bytes"),
        pytest.param("電" * 64, id="64-of-three-bytes"),
        pytest.param("🔌" * 64, id="64-of-four-bytes"),
        pytest.param('O=Evil, CN=x + "y" \\ / <#> ;', id="syntax-of-RFC-4514"),
        pytest.param(" leading and trailing ", id="spaces"),
        pytest.param("%s{0}$HOME", id="template-marks"),
    ],
)
def test_a_name_survives_byte_for_byte(name: str) -> None:
    der = build(request_for(organization_name=name, common_name=name[::-1]))
    organization, common = name.encode(), name[::-1].encode()
    assert utf8_string(organization) in der
    assert utf8_string(common) in der
    subject = {attribute: value.encode() for attribute, _, value in subject_of(der)}
    assert (subject["organization_name"], subject["common_name"]) == (organization, common)
    openssl_text(der)


def utf8_string(value: bytes) -> bytes:
    """UTF8String in DER, written by hand."""
    length = len(value)
    head = (
        bytes([length]) if length < 0x80 else bytes([0x81, length]) if length < 0x100 else b"\x82" + length.to_bytes(2)
    )
    return b"\x0c" + head + value


@pytest.mark.parametrize("country", ["DE", "de", "zZ"])
def test_the_country_goes_in_as_it_was_written(country: str) -> None:
    assert subject_of(build(request_for(country_name=country)))[0][1:] == ("PrintableString", country)


# What an operator may have otherwise.


def test_a_profile_may_have_another_domain_component_or_none() -> None:
    other = build(request_for(), replace(CHARGING_STATION, domain_component="CSMS"))
    assert subject_of(other)[-1] == ("domain_component", "IA5String", "CSMS")
    none = build(request_for(CertificateType.V2G_CERTIFICATE), replace(V2G, domain_component=None))
    assert [attribute for attribute, *_ in subject_of(none)] == [
        "country_name",
        "organization_name",
        "common_name",
    ]


def test_a_profile_may_have_other_usages() -> None:
    profile = replace(
        V2G,
        key_usage=(KeyUsage.CONTENT_COMMITMENT, KeyUsage.KEY_ENCIPHERMENT, KeyUsage.DATA_ENCIPHERMENT),
        extended_key_usage=(ExtendedKeyUsage.CLIENT_AUTH, ExtendedKeyUsage.SERVER_AUTH),
        extended_key_usage_critical=True,
    )
    der = build(request_for(CertificateType.V2G_CERTIFICATE), profile)
    extensions = extensions_of(der)
    assert extensions["key_usage"] == ({"non_repudiation", "key_encipherment", "data_encipherment"}, True)
    assert extensions["extended_key_usage"] == (["client_auth", "server_auth"], True)
    openssl_text(der)


def test_an_rsa_key_is_asked_for_key_agreement_by_no_profile() -> None:
    """[RFC 3279 2.3.1, RFC 4055 1.2]."""
    profile = replace(V2G, key_usage=(KeyUsage.DIGITAL_SIGNATURE, KeyUsage.KEY_ENCIPHERMENT, KeyUsage.KEY_AGREEMENT))
    request = request_for(CertificateType.V2G_CERTIFICATE, Algorithm.RSA_SHA256)

    der = build(request, profile)

    assert extensions_of(der)["key_usage"] == ({"digital_signature", "key_encipherment"}, True)


def test_the_evse_id_goes_into_a_uri_where_the_profile_says_so() -> None:
    der = build(request_for(), replace(CHARGING_STATION, evse_id_placement=EvseIdPlacement.SAN_URI))
    assert extensions_of(der)["subject_alt_name"] == (["urn:evse:DE*SEV*E123456789"], False)
    assert "URI:urn:evse:DE*SEV*E123456789" in openssl_text(der)


@pytest.mark.parametrize(
    ("evse_id", "serial_number"), [("DE*SEV*E123456789", "DESEVE123456789"), ("DESEVE1*2*3", "DESEVE123")]
)
def test_the_evse_id_goes_into_the_serial_number_without_its_asterisks_where_the_profile_says_so(
    evse_id: str, serial_number: str
) -> None:
    """PrintableString has no asterisk. Its place is behind CN and before DC."""
    profile = replace(V2G, evse_id_placement=EvseIdPlacement.SERIAL_NUMBER)
    der = build(request_for(CertificateType.V2G_CERTIFICATE, evse_id=evse_id), profile)
    assert subject_of(der)[2:] == [
        ("common_name", "UTF8String", "9783161484100"),
        ("serial_number", "PrintableString", serial_number),
        ("domain_component", "IA5String", "CPO"),
    ]


@pytest.mark.parametrize("placement", [EvseIdPlacement.SAN_URI, EvseIdPlacement.SERIAL_NUMBER], ids=str)
def test_without_an_evse_id_there_is_nothing_to_place(placement: EvseIdPlacement) -> None:
    profile = replace(CHARGING_STATION, evse_id_placement=placement)
    request = messages.generate_csr(
        REQUEST_ID,
        GenerateCsrData(
            certificate_type=CertificateType.CHARGING_STATION_CERTIFICATE,
            common_name="9783161484100",
            organization_name="EcoG",
            country_name="DE",
        ),
    )
    der = build(request, profile)
    assert "subject_alt_name" not in extensions_of(der)
    assert "serial_number" not in {attribute for attribute, *_ in subject_of(der)}


# Any request.

evse_ids = st.from_regex(r"[A-Za-z]{2}\*?[A-Za-z0-9]{3}\*?[Ee][A-Za-z0-9*]{1,30}", fullmatch=True)


names = st.text(st.characters(codec="utf-8"), max_size=70) | st.text("🔌電Ωß ", min_size=60, max_size=64)


profiles = st.builds(
    replace,
    st.sampled_from(list(PROFILES.values())),
    evse_id_placement=st.sampled_from(EvseIdPlacement),
    domain_component=st.none()
    | st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=64),
)


@settings(deadline=None, max_examples=300)
@given(
    common_name=names,
    organization_name=names,
    country_name=st.from_regex(r"[A-Za-z]{2}", fullmatch=True) | st.text(max_size=3),
    evse_id=st.none() | evse_ids,
    profile=profiles,
)
def test_every_request_that_is_accepted_gives_a_csr_with_exactly_its_subject(
    common_name: str, organization_name: str, country_name: str, evse_id: str | None, profile: CertificateProfile
) -> None:
    data = {
        "certificate_type": profile.certificate_type,
        "algorithm": profile.required_algorithm or Algorithm.ECDSA_SHA256,
        "common_name": common_name,
        "organization_name": organization_name,
        "country_name": country_name,
    }
    if evse_id is not None:
        data["evse_id"] = evse_id
    payload = json.dumps({"id": REQUEST_ID, "name": "generate_csr", "type": "request", "data": data}).encode()
    try:
        request = messages.decode(payload)
    except MessageError:
        return
    assert isinstance(request, GenerateCsrRequest)
    der = build(request, profile)

    subject = [country_name, organization_name, common_name]
    if evse_id is not None and profile.evse_id_placement is EvseIdPlacement.SERIAL_NUMBER:
        subject.append(evse_id.replace("*", ""))
    if profile.domain_component is not None:
        subject.append(profile.domain_component)
    assert [value for *_, value in subject_of(der)] == subject
    uris = extensions_of(der).get("subject_alt_name", ([], False))[0]
    placed = evse_id is not None and profile.evse_id_placement is EvseIdPlacement.SAN_URI
    assert uris == ([f"urn:evse:{evse_id}"] if placed else [])


def test_the_longest_csr_fits_into_ocpp(signers: Signers) -> None:
    """The largest key, the longest names, the longest EVSE ID, every extension."""
    profile = replace(
        V2G,
        domain_component="x" * 64,
        key_usage=tuple(KeyUsage),
        extended_key_usage=tuple(ExtendedKeyUsage),
        extended_key_usage_critical=True,
        evse_id_placement=EvseIdPlacement.SAN_URI,
    )
    request = request_for(
        CertificateType.V2G_CERTIFICATE,
        Algorithm.RSA_SHA384,
        common_name="🔌" * 64,
        organization_name="🔌" * 64,
        evse_id="DE*SEV*E" + "1" * 30,
    )
    pem = to_pem(x509.load_der_x509_csr(signers.build(request, profile)))
    assert len(pem) <= OCPP_CSR_MAX
    assert pem.isascii()
    assert pem.startswith("-----BEGIN CERTIFICATE REQUEST-----\n")
    assert pem.endswith("\n-----END CERTIFICATE REQUEST-----\n")


# Keys that are wrong.


class Corrupting(ec.EllipticCurvePrivateKey):
    """A key that spoils each signature on its way."""

    def __init__(self, spoil: Callable[[bytes], bytes]) -> None:
        self._spoil = spoil

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        return self._spoil(P256.sign(data, signature_algorithm))

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return P256.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        return P256.curve

    @property
    def key_size(self) -> int:
        return P256.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        raise NotImplementedError

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        raise NotImplementedError

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,  # noqa: A002 - the name is the interface's
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        raise NotImplementedError

    def __copy__(self) -> Corrupting:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Corrupting:
        return self


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda signature: signature[:-1] + bytes([signature[-1] ^ 1]), id="one-bit"),
        pytest.param(lambda _: P256.sign(b"other data", ec.ECDSA(hashes.SHA256())), id="of-other-data"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: b"\xff" * 64, id="no-DER"),
        pytest.param(lambda signature: signature + b"\x00", id="one-byte-more"),
    ],
)
def test_a_key_that_signs_wrongly_is_found_out_before_its_csr_is_answered(spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(KeyStoreError) as caught:
        build_csr(request_for(), Corrupting(spoil))
    assert caught.value.reason == "signature_invalid"


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        pytest.param(Algorithm.ECDSA_SHA512, P256, id="P-256-for-SHA-512"),
        pytest.param(Algorithm.ECDSA_SHA256, P521, id="P-521-for-SHA-256"),
        pytest.param(Algorithm.ECDSA_SHA256, ec.generate_private_key(ec.SECP256K1()), id="secp256k1"),
        pytest.param(Algorithm.RSA_SHA256, P256, id="EC-for-RSA"),
        pytest.param(Algorithm.RSA_SHA256, rsa.generate_private_key(65537, 1024), id="RSA-1024"),
        pytest.param(Algorithm.RSA_SHA384, rsa.generate_private_key(65537, 2048), id="RSA-2048-for-SHA-384"),
        pytest.param(Algorithm.ECDSA_SHA256, ed25519.Ed25519PrivateKey.generate(), id="Ed25519"),
    ],
)
def test_a_key_of_another_kind_than_the_algorithm_asks_for_is_refused(algorithm: Algorithm, key: PrivateKey) -> None:
    with pytest.raises(StationKeyError) as caught:
        build_csr(request_for(algorithm=algorithm), key)
    assert caught.value.reason == "key_type_wrong"


def test_rsa_2048_is_good_enough_for_sha256_where_a_tpm_can_do_no_more() -> None:
    key = rsa.generate_private_key(65537, 2048)
    csr = build_csr(request_for(algorithm=Algorithm.RSA_SHA256), key)
    assert key_type(csr.public_key()) == RSA_2048
    assert isinstance(csr.signature_algorithm_parameters, padding.PKCS1v15)


def test_an_unknown_certificate_type_is_refused() -> None:
    """A program that builds its request by hand may have any text there."""
    asked = messages.generate_csr(
        REQUEST_ID,
        GenerateCsrData(
            certificate_type="mo_certificate",  # type: ignore[arg-type] # that is the fault
            common_name="x",
            organization_name="x",
            country_name="DE",
        ),
    )
    with pytest.raises(StationKeyError) as refused:
        build_csr(asked, P521)
    assert refused.value.reason == "certificate_type_invalid"
