"""Which signed certificates `stationkey josev` installs, and what it says of the others."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from parts import CN, C, O, request
from stationkey.contract.profiles import PROFILES, SECP256R1, CertificateType
from stationkey.simulators.pki import Hierarchy, Misbehaviour, to_pem
from stationkey.simulators.verification import CertificateInvalid, read_signed, verify
from stationkey.x509.certificate import Chain, Expected
from stationkey.x509.csr import build_csr

V2G = CertificateType.V2G_CERTIFICATE
STATION = CertificateType.CHARGING_STATION_CERTIFICATE
NOW = datetime.now(UTC)
HIERARCHY, OTHER = (Hierarchy.make(SECP256R1, organization=O, now=NOW) for _ in range(2))


def issued(kind: CertificateType, misbehaviour: Misbehaviour | None = None) -> list[x509.Certificate]:
    csr = build_csr(request(kind), ec.generate_private_key(ec.SECP256R1()))
    return HIERARCHY.issue(csr, PROFILES[kind], now=NOW, misbehaviour=misbehaviour)


def judged(kind: CertificateType, certificates: list[x509.Certificate], hierarchy: Hierarchy = HIERARCHY) -> str:
    """The reason for which a chain is refused, or the warning with which it is taken."""
    try:
        chain: Chain = read_signed(to_pem(certificates))
        profile = PROFILES[kind]
        expected = Expected(profile=profile, common_name=CN, organization_name=O, country_name=C, public=chain.public)
        anchors = hierarchy.trust_anchors_pem().encode()
        return verify(chain, expected, anchors=anchors, root_permitted=not profile.secc_id)
    except CertificateInvalid as error:
        return error.reason


@pytest.mark.parametrize("kind", [V2G, STATION])
def test_a_good_chain_is_taken_without_a_word(kind: CertificateType) -> None:
    assert judged(kind, issued(kind)) == ""


@pytest.mark.parametrize("kind", [V2G, STATION])
def test_a_reversed_chain_is_told_as_that(kind: CertificateType) -> None:
    assert judged(kind, issued(kind)[::-1]) == "chain_reversed"


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        pytest.param(V2G, [0], id="no Sub-CA"),
        pytest.param(V2G, [0, 1], id="Sub-CA 1 missing"),
        pytest.param(V2G, [0, 2], id="Sub-CA 2 missing"),
        pytest.param(STATION, [0], id="a station's"),
    ],
)
def test_a_chain_without_its_sub_cas_is_told_as_that(kind: CertificateType, kept: list[int]) -> None:
    chain = issued(kind)

    assert judged(kind, [chain[number] for number in kept]) == "chain_incomplete"


def test_a_chain_to_another_root_is_untrusted_though_its_names_are_known() -> None:
    assert judged(V2G, issued(V2G), OTHER) == "chain_untrusted"


def test_a_root_in_the_chain_is_permitted_to_a_charging_station_and_to_nobody_else() -> None:
    """TLS permits it [RFC 8446 4.4.2]; the chains of ISO 15118 have none."""
    warning = judged(STATION, issued(STATION, Misbehaviour.ROOT_IN_CHAIN))

    assert "RFC 8446" in warning
    assert judged(V2G, issued(V2G, Misbehaviour.ROOT_IN_CHAIN)) == "root_in_chain"
