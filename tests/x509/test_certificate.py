"""A certificate held against what was asked for: what is read of a file, what differs, and what proves a key."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec.structs import replace

from parts import CN, NOW, STATION, V2G, V2G20, Authority, C, O, pem, request, software_key
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateType
from stationkey.errors import KeyStoreError
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.x509.certificate import MAX_CHAIN, Chain, Expected, differences, prove, read_chain
from stationkey.x509.csr import build_csr, to_pem
from stationkey.x509.lenient import read_certificate

AUTHORITY = Authority()
KEYS = {
    certificate_type: software_key(PROFILES[certificate_type].required_algorithm or Algorithm.ECDSA_SHA256)
    for certificate_type in CertificateType
}
CSRS = {certificate_type: to_pem(build_csr(request(certificate_type), key)) for certificate_type, key in KEYS.items()}


def expected(certificate_type: CertificateType = V2G) -> Expected:
    return Expected(
        profile=PROFILES[certificate_type],
        common_name=CN,
        organization_name=O,
        country_name=C,
        public=KEYS[certificate_type]
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    )


def chain_of(*certificates: x509.Certificate, position: int = 0) -> Chain:
    parsed = (read_certificate(each.public_bytes(serialization.Encoding.DER)) for each in certificates)
    return Chain(tuple(parsed), position)


def chain(*certificates: x509.Certificate, position: int = 0) -> Chain:
    return chain_of(*certificates, AUTHORITY.sub, AUTHORITY.root, position=position)


def names(**instead: str | None) -> x509.Name:
    """The subject of a ``v2g_certificate``, with what is said otherwise."""
    values = {"C": C, "O": O, "CN": CN, "DC": "CPO"} | instead
    oids = {
        "C": NameOID.COUNTRY_NAME,
        "O": NameOID.ORGANIZATION_NAME,
        "CN": NameOID.COMMON_NAME,
        "DC": NameOID.DOMAIN_COMPONENT,
    }
    return x509.Name([x509.NameAttribute(oids[name], value) for name, value in values.items() if value is not None])


def usage(**bits: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: bits.get(name, False) for name in names})


# Differences.


@pytest.mark.parametrize("certificate_type", list(CertificateType), ids=str)
def test_a_certificate_as_it_was_asked_for_differs_in_nothing(certificate_type: CertificateType) -> None:
    certificate = AUTHORITY.sign(CSRS[certificate_type])

    assert differences(chain(certificate), expected(certificate_type), now=NOW.timestamp()) == []


DIFFERENT: list[tuple[str, CertificateType, Callable[[], x509.Certificate], str]] = [
    ("another key", V2G, lambda: AUTHORITY.sign(CSRS[V2G], public_key=KEYS[STATION].public_key()), "key: "),
    ("another CN", V2G, lambda: AUTHORITY.sign(CSRS[V2G], subject=names(CN="DE-ABC-S-2")), "CN: "),
    ("no CN", V2G, lambda: AUTHORITY.sign(CSRS[V2G], subject=names(CN=None)), "CN: "),
    ("O misspelt", V2G, lambda: AUTHORITY.sign(CSRS[V2G], subject=names(O="Uber Strom GmbH")), "O: "),
    ("another C", V2G, lambda: AUTHORITY.sign(CSRS[V2G], subject=names(C="AT")), "C: "),
    ("another DC", V2G, lambda: AUTHORITY.sign(CSRS[V2G], subject=names(DC="CSO")), "DC: "),
    ("no DC", V2G, lambda: AUTHORITY.sign(CSRS[V2G], subject=names(DC=None)), "DC: "),
    ("a DC that none asked for", STATION, lambda: AUTHORITY.sign(CSRS[STATION], subject=names()), "DC: "),
    ("no keyUsage", V2G, lambda: AUTHORITY.sign(CSRS[V2G], without=[x509.KeyUsage]), "usage: no keyUsage"),
    (
        "keyUsage without keyAgreement",
        V2G,
        lambda: AUTHORITY.sign(CSRS[V2G], instead=[usage(digital_signature=True)]),
        "usage: keyUsage lacks keyAgreement",
    ),
    (
        "CA:true",
        V2G,
        lambda: AUTHORITY.sign(CSRS[V2G], instead=[x509.BasicConstraints(ca=True, path_length=None)]),
        "usage: CA:true",
    ),
    (
        "no extendedKeyUsage",
        V2G20,
        lambda: AUTHORITY.sign(CSRS[V2G20], without=[x509.ExtendedKeyUsage]),
        "usage: no extendedKeyUsage",
    ),
    (
        "a client's extendedKeyUsage for a server",
        V2G20,
        lambda: AUTHORITY.sign(CSRS[V2G20], instead=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])]),
        "usage: extendedKeyUsage lacks serverAuth",
    ),
    (
        "a time still to come",
        V2G,
        lambda: AUTHORITY.sign(CSRS[V2G], begins=NOW + timedelta(hours=1)),
        "validity: begins at 2026-03-01T13:00:00Z",
    ),
    (
        "a time that is over",
        V2G,
        lambda: AUTHORITY.sign(CSRS[V2G], ends=NOW - timedelta(hours=1)),
        "validity: ended at 2026-03-01T11:00:00Z",
    ),
]


@pytest.mark.parametrize(
    ("certificate_type", "certificate", "named"),
    [pytest.param(*case[1:], id=case[0]) for case in DIFFERENT],
)
def test_each_difference_is_named_and_nothing_else_is(
    certificate_type: CertificateType, certificate: Callable[[], x509.Certificate], named: str
) -> None:
    (found,) = differences(chain(certificate()), expected(certificate_type), now=NOW.timestamp())

    assert found.startswith(named)


def test_an_rsa_key_is_not_missed_key_agreement_and_may_have_it() -> None:
    key = rsa.generate_private_key(65537, 2048)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    wanted = replace(expected(V2G), public=public)

    for bits in ({"digital_signature": True}, {"digital_signature": True, "key_agreement": True}):
        certificate = AUTHORITY.sign(CSRS[V2G], public_key=key.public_key(), instead=[usage(**bits)])
        assert differences(chain(certificate), wanted, now=NOW.timestamp()) == []


def test_a_certificate_of_any_purpose_serves_every_purpose() -> None:
    any_purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
    certificate = AUTHORITY.sign(CSRS[V2G20], instead=[any_purpose])

    assert differences(chain(certificate), expected(V2G20), now=NOW.timestamp()) == []


LEAF = AUTHORITY.sign(CSRS[V2G])


@pytest.mark.parametrize(
    ("found", "in_order"),
    [
        pytest.param(chain_of(LEAF), True, id="the leaf alone"),
        pytest.param(chain_of(LEAF, AUTHORITY.sub), True, id="leaf, sub"),
        pytest.param(chain_of(LEAF, AUTHORITY.sub, AUTHORITY.root), True, id="leaf, sub, root"),
        pytest.param(chain_of(LEAF, AUTHORITY.root), False, id="sub left out"),
        pytest.param(chain_of(LEAF, AUTHORITY.root, AUTHORITY.sub), False, id="root before sub"),
        pytest.param(chain_of(AUTHORITY.root, AUTHORITY.sub, LEAF, position=2), False, id="leaf last"),
        pytest.param(chain_of(LEAF, Authority().sub), False, id="sub of another authority"),
    ],
)
def test_a_chain_is_in_order_if_each_certificate_is_followed_by_its_issuer(found: Chain, in_order: bool) -> None:
    told = differences(found, expected(), now=NOW.timestamp())

    assert [text.partition(":")[0] for text in told] == ([] if in_order else ["chain order"])


def test_a_chain_that_is_too_long_is_told_and_its_signatures_are_not_verified() -> None:
    """The root is its own issuer, and could follow itself for ever."""
    leaf = chain(AUTHORITY.sign(CSRS[V2G])).certificates
    found = Chain((*leaf, *chain_of(AUTHORITY.root).certificates * MAX_CHAIN))

    told = differences(found, expected(V2G), now=NOW.timestamp())

    assert len(told) == 1
    assert told[0].startswith(f"chain order: of {len(leaf) + MAX_CHAIN} certificates")


# Files.


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(pem(LEAF, AUTHORITY.sub), id="PEM"),
        pytest.param(b"Subject: text before it\n" + pem(LEAF, AUTHORITY.sub), id="PEM after text"),
        pytest.param(pem(LEAF, AUTHORITY.sub).replace(b"\n", b"\r\n"), id="PEM with CR LF"),
    ],
)
def test_a_chain_in_pem_is_read(content: bytes) -> None:
    found = read_chain(content)

    assert found is not None
    assert found == chain_of(LEAF, AUTHORITY.sub)
    assert found.public == expected().public
    assert found.not_after == int((NOW + timedelta(days=90)).timestamp())


def test_a_certificate_in_der_is_read() -> None:
    assert read_chain(LEAF.public_bytes(serialization.Encoding.DER)) == chain_of(LEAF)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 100, id="zeros"),
        pytest.param(CSRS[V2G].encode(), id="a CSR"),
        pytest.param(pem(LEAF)[:300], id="PEM cut short"),
        pytest.param(pem(LEAF)[:300] + b"\n-----END CERTIFICATE-----\n", id="PEM with half a certificate"),
        pytest.param(LEAF.public_bytes(serialization.Encoding.DER)[:-1], id="DER cut short"),
    ],
)
def test_what_is_no_certificate_is_none(content: bytes) -> None:
    assert read_chain(content) is None


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # negative, and read all the same for now
def test_a_certificate_with_a_broken_part_is_none_and_no_fault() -> None:
    der = LEAF.public_bytes(serialization.Encoding.DER)

    for position in range(len(der)):
        broken = read_chain(der[:position] + bytes([der[position] ^ 0xFF]) + der[position + 1 :])
        if broken is not None:
            differences(broken, expected(), now=NOW.timestamp())


def test_the_leaf_is_written_first_wherever_it_was() -> None:
    assert chain_of(AUTHORITY.sub, LEAF, position=1).pem().encode() == pem(LEAF, AUTHORITY.sub)


# Proof.


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=str)
def test_a_key_proves_itself(algorithm: Algorithm) -> None:
    store = SoftwareKeyStore()
    key = store.generate(algorithm)

    with store.signer(key) as private_key:
        prove(private_key, store.public_key(key), b"challenge")


@pytest.mark.parametrize(
    "public_key",
    [
        pytest.param(software_key().public_key(), id="of the same kind"),
        pytest.param(ec.generate_private_key(ec.SECP521R1()).public_key(), id="of another curve"),
        pytest.param(ed25519.Ed25519PrivateKey.generate().public_key(), id="of another kind"),
    ],
)
def test_a_key_proves_nothing_for_another(public_key: object) -> None:
    with pytest.raises(KeyStoreError) as refusal:
        prove(KEYS[V2G], public_key, b"challenge")

    assert refusal.value.reason == "certificate_of_another_key"
