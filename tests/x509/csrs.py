"""CSRs for the tests."""

from __future__ import annotations

from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from stationkey.contract import messages
from stationkey.contract.messages import GenerateCsrData, GenerateCsrRequest
from stationkey.contract.profiles import (
    Algorithm,
    CertificateProfile,
    CertificateType,
)
from stationkey.x509.csr import PrivateKey, build_csr

REQUEST_ID: Final = "123e4567-e89b-12d3-a456-426614174000"


P256: Final = ec.generate_private_key(ec.SECP256R1())


P521: Final = ec.generate_private_key(ec.SECP521R1())


RSA_KEY: Final = rsa.generate_private_key(65537, 2048)


def request_for(
    certificate_type: CertificateType = CertificateType.CHARGING_STATION_CERTIFICATE,
    algorithm: Algorithm = Algorithm.ECDSA_SHA256,
    **data: Any,
) -> GenerateCsrRequest:
    """A request as it is after decoding."""
    given_data = {
        "common_name": "9783161484100",
        "organization_name": "EcoG",
        "country_name": "DE",
        "evse_id": "DE*SEV*E123456789",
    } | data
    decoded = messages.decode(
        messages.encode(
            messages.generate_csr(
                REQUEST_ID, GenerateCsrData(certificate_type=certificate_type, algorithm=algorithm, **given_data)
            )
        )
    )
    assert isinstance(decoded, GenerateCsrRequest)
    return decoded


def build(request: GenerateCsrRequest, profile: CertificateProfile | None = None) -> bytes:
    """The CSR in DER, by a key in memory."""
    keys: dict[Algorithm, PrivateKey] = {Algorithm.ECDSA_SHA512: P521, Algorithm.RSA_SHA256: RSA_KEY}
    key = keys.get(request.algorithm, P256)
    return build_csr(request, key, profile).public_bytes(serialization.Encoding.DER)
