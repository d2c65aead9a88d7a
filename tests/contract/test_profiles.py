"""What each certificate type asks for, row by row; and that it is asked nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import stationkey
from stationkey.contract.profiles import (
    ALGORITHMS,
    DEFAULT_ALGORITHM,
    PROFILES,
    RSA_2048,
    RSA_3072,
    SECP256R1,
    SECP521R1,
    Algorithm,
    AlgorithmProfile,
    CertificateProfile,
    CertificateType,
    EvseIdPlacement,
    ExtendedKeyUsage,
    KeyUsage,
    RsaModulus,
    TlsUse,
    is_secc_id,
)

SOURCES = sorted(Path(stationkey.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    "expected",
    [
        pytest.param(
            CertificateProfile(
                certificate_type=CertificateType.CHARGING_STATION_CERTIFICATE,
                title="Charging station",
                domain_component=None,
                key_usage=(KeyUsage.DIGITAL_SIGNATURE,),
                extended_key_usage=(ExtendedKeyUsage.CLIENT_AUTH,),
                extended_key_usage_critical=False,
                required_algorithm=None,
                preferred_algorithm=None,
                tls_use=TlsUse("client", ("TLSv1_2", "TLSv1_3")),
                secc_id=False,
                evse_id_placement=EvseIdPlacement.NONE,
            ),
            id="charging_station_certificate",
        ),
        pytest.param(
            CertificateProfile(
                certificate_type=CertificateType.V2G_CERTIFICATE,
                title="V2G (ISO 15118-2)",
                domain_component="CPO",
                key_usage=(KeyUsage.DIGITAL_SIGNATURE, KeyUsage.KEY_AGREEMENT),
                extended_key_usage=(),
                extended_key_usage_critical=False,
                required_algorithm=None,
                preferred_algorithm=Algorithm.ECDSA_SHA256,
                tls_use=TlsUse("server", ("TLSv1_2",), "ECDHE-ECDSA-AES128-SHA256"),
                secc_id=True,
                evse_id_placement=EvseIdPlacement.NONE,
            ),
            id="v2g_certificate",
        ),
        pytest.param(
            CertificateProfile(
                certificate_type=CertificateType.V2G20_CERTIFICATE,
                title="V2G (ISO 15118-20)",
                domain_component="CSO",
                key_usage=(KeyUsage.DIGITAL_SIGNATURE, KeyUsage.KEY_AGREEMENT),
                extended_key_usage=(ExtendedKeyUsage.SERVER_AUTH,),
                extended_key_usage_critical=True,
                required_algorithm=Algorithm.ECDSA_SHA512,
                preferred_algorithm=Algorithm.ECDSA_SHA512,
                tls_use=TlsUse("server", ("TLSv1_3",)),
                secc_id=True,
                evse_id_placement=EvseIdPlacement.NONE,
            ),
            id="v2g20_certificate",
        ),
    ],
)
def test_a_certificate_type_asks_for_what_its_standard_says(expected: CertificateProfile) -> None:
    assert PROFILES[expected.certificate_type] == expected


@pytest.mark.parametrize(
    ("algorithm", "key_types", "hash_name", "signature_oid"),
    [
        pytest.param("ECDSA_SHA256", (SECP256R1,), "sha256", "1.2.840.10045.4.3.2", id="ecdsa-with-SHA256"),
        pytest.param("ECDSA_SHA512", (SECP521R1,), "sha512", "1.2.840.10045.4.3.4", id="ecdsa-with-SHA512"),
        pytest.param("RSA_SHA256", (RSA_3072, RSA_2048), "sha256", "1.2.840.113549.1.1.11", id="sha256WithRSA"),
        pytest.param("RSA_SHA384", (RSA_3072,), "sha384", "1.2.840.113549.1.1.12", id="sha384WithRSA"),
    ],
)
def test_an_algorithm_names_a_key_and_a_signature(
    algorithm: str, key_types: tuple[object, ...], hash_name: str, signature_oid: str
) -> None:
    profile = ALGORITHMS[Algorithm(algorithm)]

    assert profile.key_types == key_types
    assert (profile.hash_name, profile.signature_oid) == (hash_name, signature_oid)


def test_every_certificate_type_has_a_profile_and_every_algorithm_too() -> None:
    assert list(PROFILES) == list(CertificateType)
    assert list(ALGORITHMS) == list(Algorithm)


def test_the_names_on_the_wire_are_the_pages() -> None:
    assert list(CertificateType) == ["charging_station_certificate", "v2g_certificate", "v2g20_certificate"]
    assert list(Algorithm) == ["ECDSA_SHA256", "ECDSA_SHA512", "RSA_SHA256", "RSA_SHA384"]
    assert DEFAULT_ALGORITHM == "ECDSA_SHA256"


@pytest.mark.parametrize("profile", ALGORITHMS.values(), ids=str)
def test_no_algorithm_uses_a_weak_key(profile: AlgorithmProfile) -> None:
    """A00.FR.501-503: 112 bit of security, RSA of 2048 bits at least. Both curves have more."""
    assert profile.hash_name in {"sha256", "sha384", "sha512"}
    assert all(kind.bits >= 2048 for kind in profile.key_types if isinstance(kind, RsaModulus))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.certificate_type)
def test_every_profile_lets_the_key_sign(profile: CertificateProfile) -> None:
    """Each of these certificates is for TLS, where the key's one act is a digital signature [RFC 8446 4.4.2.2]."""
    assert KeyUsage.DIGITAL_SIGNATURE in profile.key_usage


def test_no_key_usage_lets_a_station_sign_certificates() -> None:
    assert not {"keyCertSign", "cRLSign"} & set(KeyUsage)


def test_profiles_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PROFILES[CertificateType.V2G_CERTIFICATE] = PROFILES[CertificateType.V2G20_CERTIFICATE]  # type: ignore[index] # shown at run time too
    with pytest.raises(AttributeError):
        PROFILES[CertificateType.V2G_CERTIFICATE].secc_id = False  # type: ignore[misc] # as above


@pytest.mark.parametrize(
    ("common_name", "expected"),
    [
        pytest.param("DE-ABC-S-1", True, id="separators"),
        pytest.param("DEABCS1", True, id="no separators"),
        pytest.param("de-abc-s-1", True, id="lower case"),
        pytest.param("DE-ABC-S-123456789-7", True, id="check digit"),
        pytest.param("DE-ABC-S-" + "1" * 32, True, id="longest"),
        pytest.param("9783161484100", False, id="the API page's own example"),
        pytest.param("DE-ABC-E-1", False, id="an EVSE, no SECC"),
        pytest.param("DE*ABC*S*1", False, id="the separator of EVSE IDs"),
        pytest.param("DE-ABCS1", False, id="separators in part"),
        pytest.param("D1-ABC-S-1", False, id="no country"),
        pytest.param("DE-ABC-S-" + "1" * 33, False, id="too long"),
        pytest.param("DE-ABC-S-1\n", False, id="line feed behind it"),
        pytest.param("", False, id="empty"),
    ],
)
def test_a_secc_id_is_known_by_its_form(common_name: str, *, expected: bool) -> None:
    assert is_secc_id(common_name) is expected


# A certificate type is a value, not a branch.

PARTICULAR = {*CertificateType.__members__, "CHARGING_STATION", "V2G", "V2G20"}


def particular_types(tree: ast.AST) -> list[str]:
    """Where a source names one certificate type rather than taking whichever it is given."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(value)) if value in set(CertificateType):
                found.append(f"line {node.lineno}: {value!r}")
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in PARTICULAR:
                found.append(f"line {node.lineno}: {name}")
            case ast.Compare(left=left, comparators=rights) if any(
                isinstance(side, ast.Attribute | ast.Name)
                and (side.attr if isinstance(side, ast.Attribute) else side.id) == "certificate_type"
                and isinstance(other, ast.Constant)
                and other.value is not None  # whether there is one at all
                for side, other in [(left, right) for right in rights] + [(right, left) for right in rights]
            ):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    [path for path in SOURCES if path.name != "profiles.py"],
    ids=lambda path: str(path.relative_to(Path(stationkey.__file__).parent)),
)
def test_no_module_but_profiles_knows_one_certificate_type_from_another(source: Path) -> None:
    found = particular_types(ast.parse(source.read_text()))
    # What OCPP and TLS make of each type is a table as well, and stands with the rest of what they are.
    assert found == [] or source.name in {"ocpp.py", "check.py"}


@pytest.mark.parametrize(
    "code",
    [
        "if certificate_type == 'v2g_certificate': pass",
        "if data.certificate_type is CertificateType.V2G20_CERTIFICATE: pass",
        "x = 1 if 'x' != request.data.certificate_type else 2",
        "match certificate_type:\n case CertificateType.V2G_CERTIFICATE: pass",
        "{'v2g_certificate': 1}[certificate_type]",
        "profile is V2G",
    ],
)
def test_a_branch_on_a_certificate_type_would_be_seen(code: str) -> None:
    assert particular_types(ast.parse(code))
