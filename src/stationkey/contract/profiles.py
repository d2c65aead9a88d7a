"""Key, subject and extensions of each certificate type, as data.

A new certificate type is one `CertificateProfile` in `PROFILES` and one row in the tests. This module computes nothing
and imports no cryptographic library.

Sources: ISO 15118-2 Annex F and ISO 15118-20 Annex B by their public descriptions, OCPP 2.0.1 part 2 (A00, A02),
RFC 2986, RFC 5280, RFC 5758. If public sources disagree, the field's comment says so, and the operator can override the
value (see `stationkey.config.file`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from msgspec import Struct


class CertificateType(StrEnum):
    """``data.certificate_type`` of ``generate_csr``."""

    CHARGING_STATION_CERTIFICATE = "charging_station_certificate"
    """TLS client certificate towards the CSMS; OCPP ``ChargingStationCertificate``."""
    V2G_CERTIFICATE = "v2g_certificate"
    """SECC leaf of ISO 15118-2, TLS 1.2 server towards the EV; OCPP ``V2GCertificate``."""
    V2G20_CERTIFICATE = "v2g20_certificate"
    """SECC leaf of ISO 15118-20, TLS 1.3 server towards the EV; OCPP ``V2G20Certificate``."""


class Algorithm(StrEnum):
    """``data.algorithm`` of ``generate_csr``: the key and the signature of the CSR, in one name."""

    ECDSA_SHA256 = "ECDSA_SHA256"
    ECDSA_SHA512 = "ECDSA_SHA512"
    RSA_SHA256 = "RSA_SHA256"
    RSA_SHA384 = "RSA_SHA384"


DEFAULT_ALGORITHM: Final = Algorithm.ECDSA_SHA256
"""The algorithm of a request without ``algorithm`` (contract, decision 2)."""


class EllipticCurve(Struct, frozen=True):
    """A named curve, spelled as in SEC 2 and RFC 5480."""

    name: str

    def __str__(self) -> str:
        return self.name


class RsaModulus(Struct, frozen=True):
    """An RSA key size.

    Attributes:
        bits: length of the modulus in bits; OCPP A00.FR.503 requires at least 2048.
    """

    bits: int

    def __str__(self) -> str:
        return f"RSA-{self.bits}"


KeyType = EllipticCurve | RsaModulus
"""The type of a key pair: a curve, or an RSA size."""

SECP256R1: Final = EllipticCurve("secp256r1")
SECP521R1: Final = EllipticCurve("secp521r1")
RSA_2048: Final = RsaModulus(2048)
RSA_3072: Final = RsaModulus(3072)


class AlgorithmProfile(Struct, frozen=True):
    """Key type and signature of an `Algorithm`.

    Attributes:
        algorithm: the name on the wire.
        key_types: acceptable key types, best first; a key store uses the first that its device supports.
        hash_name: hash of the CSR's signature, in hashlib's spelling.
        signature_oid: ``signatureAlgorithm`` of the CSR, dotted. Of the ECDSA ones RFC 5758 3.2 says that the
            AlgorithmIdentifier has no parameters.
    """

    algorithm: Algorithm
    key_types: tuple[KeyType, ...]
    hash_name: str
    signature_oid: str


ALGORITHMS: Final[Mapping[Algorithm, AlgorithmProfile]] = MappingProxyType(
    {
        profile.algorithm: profile
        for profile in (
            AlgorithmProfile(Algorithm.ECDSA_SHA256, (SECP256R1,), "sha256", "1.2.840.10045.4.3.2"),
            AlgorithmProfile(Algorithm.ECDSA_SHA512, (SECP521R1,), "sha512", "1.2.840.10045.4.3.4"),
            AlgorithmProfile(Algorithm.RSA_SHA256, (RSA_3072, RSA_2048), "sha256", "1.2.840.113549.1.1.11"),
            AlgorithmProfile(Algorithm.RSA_SHA384, (RSA_3072,), "sha384", "1.2.840.113549.1.1.12"),
        )
    }
)


class KeyUsage(StrEnum):
    """The bits of keyUsage that a station's certificate may carry [RFC 5280 4.2.1.3]."""

    DIGITAL_SIGNATURE = "digitalSignature"
    CONTENT_COMMITMENT = "contentCommitment"
    KEY_ENCIPHERMENT = "keyEncipherment"
    DATA_ENCIPHERMENT = "dataEncipherment"
    KEY_AGREEMENT = "keyAgreement"


class ExtendedKeyUsage(StrEnum):
    """The purposes of extendedKeyUsage that a station's certificate may carry [RFC 5280 4.2.1.12]."""

    SERVER_AUTH = "serverAuth"
    CLIENT_AUTH = "clientAuth"


class EvseIdPlacement(StrEnum):
    """The place of ``evse_id`` in the CSR. The public profiles have none, so the default is none."""

    NONE = "none"
    SAN_URI = "san_uri"
    """subjectAltName, a uniformResourceIdentifier ``urn:evse:<EVSE ID>``."""
    SERIAL_NUMBER = "serial_number"
    """The subject's serialNumber attribute (2.5.4.5), a PrintableString, after CN."""


class TlsUse(Struct, frozen=True):
    """How a service uses a key and its certificate in TLS.

    Attributes:
        role: its side of the connection.
        versions: of TLS, by their names in `ssl.TLSVersion`.
        suites: for TLS 1.2, as the peer offers them, or None for OpenSSL's.
    """

    role: Literal["server", "client"]
    versions: tuple[Literal["TLSv1_2", "TLSv1_3"], ...]
    suites: str | None = None


class CertificateProfile(Struct, frozen=True, kw_only=True):
    """The content of the CSR for one certificate type.

    Subject order is C, O, CN, then DC if the profile has one. basicConstraints is always critical with CA:false, and
    keyUsage is always critical; neither can be changed.

    Attributes:
        certificate_type: the certificate type.
        title: its name for people.
        domain_component: DC of the subject, or None. ``CPO`` in ISO 15118-2 [V2G2-925, V2G2-875]; ``CSO`` in -20.
        key_usage: bits of keyUsage. keyAgreement is disputed in public texts about -2; peers include it. An RSA key
            never gets it [RFC 3279 2.3.1, RFC 4055 1.2].
        extended_key_usage: purposes; empty means no such extension.
        extended_key_usage_critical: whether extendedKeyUsage is critical.
        required_algorithm: the only algorithm for this type, which a request must name [the API page's note on
            ``v2g20_certificate``]; None if all are allowed.
        preferred_algorithm: the profile's algorithm; another one is served, with a warning.
        tls_use: the use of the certificate in TLS.
        secc_id: whether CN should be a SECC ID; another CN gets a warning (the API page's example is not a SECC ID).
        evse_id_placement: the place of ``evse_id``.
    """

    certificate_type: CertificateType
    title: str
    domain_component: str | None
    key_usage: tuple[KeyUsage, ...]
    extended_key_usage: tuple[ExtendedKeyUsage, ...]
    extended_key_usage_critical: bool
    required_algorithm: Algorithm | None
    preferred_algorithm: Algorithm | None
    tls_use: TlsUse
    secc_id: bool
    evse_id_placement: EvseIdPlacement = EvseIdPlacement.NONE


CHARGING_STATION: Final = CertificateProfile(
    certificate_type=CertificateType.CHARGING_STATION_CERTIFICATE,
    title="Charging station",
    domain_component=None,
    key_usage=(KeyUsage.DIGITAL_SIGNATURE,),
    extended_key_usage=(ExtendedKeyUsage.CLIENT_AUTH,),
    extended_key_usage_critical=False,
    required_algorithm=None,
    preferred_algorithm=None,
    tls_use=TlsUse("client", ("TLSv1_2", "TLSv1_3")),  # OCPP requires TLS 1.2 or later
    secc_id=False,  # A00.FR.511: the serial number of the station
)

V2G: Final = CertificateProfile(
    certificate_type=CertificateType.V2G_CERTIFICATE,
    title="V2G (ISO 15118-2)",
    domain_component="CPO",  # [V2G2-925], [V2G2-875]
    key_usage=(KeyUsage.DIGITAL_SIGNATURE, KeyUsage.KEY_AGREEMENT),
    extended_key_usage=(),
    extended_key_usage_critical=False,
    required_algorithm=None,
    preferred_algorithm=Algorithm.ECDSA_SHA256,  # ISO 15118-2 Annex F: secp256r1 with SHA-256
    # Of the suites of ISO 15118-2 the one that OpenSSL has: the other, with static ECDH, left it with 1.1.0.
    tls_use=TlsUse("server", ("TLSv1_2",), "ECDHE-ECDSA-AES128-SHA256"),
    secc_id=True,
)

V2G20: Final = CertificateProfile(
    certificate_type=CertificateType.V2G20_CERTIFICATE,
    title="V2G (ISO 15118-20)",
    domain_component="CSO",  # ISO 15118-20 Annex B, by its public descriptions
    key_usage=(KeyUsage.DIGITAL_SIGNATURE, KeyUsage.KEY_AGREEMENT),
    extended_key_usage=(ExtendedKeyUsage.SERVER_AUTH,),
    extended_key_usage_critical=True,
    required_algorithm=Algorithm.ECDSA_SHA512,
    preferred_algorithm=Algorithm.ECDSA_SHA512,
    tls_use=TlsUse("server", ("TLSv1_3",)),
    secc_id=True,
)

PROFILES: Final[Mapping[CertificateType, CertificateProfile]] = MappingProxyType(
    {profile.certificate_type: profile for profile in (CHARGING_STATION, V2G, V2G20)}
)
"""The standards' profile of every certificate type, before the operator's overrides."""

COUNTRY_NAME_PATTERN: Final = r"^[A-Za-z]{2}$"
"""Two letters [ISO 3166-1 alpha-2]. The CA checks whether the code is assigned."""

NAME_MAX_LENGTH: Final = 64
"""Upper bound of CN and O, in characters [RFC 5280 appendix A.1, ub-common-name and ub-organization-name]."""

EVSE_ID_PATTERN: Final = r"^[A-Za-z]{2}\*?[A-Za-z0-9]{3}\*?[Ee][A-Za-z0-9*]{1,30}$"
"""EVSE ID [ISO 15118-2 Annex H]."""

SECC_ID_PATTERN: Final = r"^[A-Za-z]{2}(-?)[A-Za-z0-9]{3}\1[Ss]\1[A-Za-z0-9]{1,32}(\1[A-Za-z0-9])?$"
"""SECC ID, with or without its separators [ISO 15118-20 Annex B, by its public descriptions]."""

_SECC_ID: Final = re.compile(SECC_ID_PATTERN)


def is_secc_id(common_name: str) -> bool:
    """Return whether `common_name` has the form of a SECC ID (`SECC_ID_PATTERN`)."""
    return len(common_name) <= NAME_MAX_LENGTH and _SECC_ID.fullmatch(common_name) is not None
