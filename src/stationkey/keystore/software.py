"""The ``software:`` key store: keys without protection, for trials without a TPM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from stationkey.config.settings import TpmTerms
from stationkey.contract.profiles import ALGORITHMS, SECP256R1, SECP521R1, Algorithm, EllipticCurve
from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.protocol import KeyRef, KeyStore, Support
from stationkey.keystore.refusal import refuse_foreign, refuse_tpm_terms
from stationkey.x509.csr import PrivateKey, PublicKey

_CURVES: Final = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}
_SCHEME: Final = "software"


class SoftwareKeyStore:
    """Keys made and used by OpenSSL in this process. Anyone who can read the ledger has them."""

    uri = "software:"
    identity = "software:"
    description = "software keys, NOT PROTECTED: anyone who can read the state directory can copy them"

    def supports(self, algorithm: Algorithm) -> Support:
        return Support(ALGORITHMS[algorithm].key_types[0])

    def generate(self, algorithm: Algorithm) -> KeyRef:
        kind = ALGORITHMS[algorithm].key_types[0]
        private_key: PrivateKey
        if isinstance(kind, EllipticCurve):
            private_key = ec.generate_private_key(_CURVES[kind])
        else:
            private_key = rsa.generate_private_key(public_exponent=65537, key_size=kind.bits)
        return KeyRef(
            scheme=_SCHEME,
            key_type=kind,
            public=private_key.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
            private=private_key.private_bytes(
                serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    @contextmanager
    def signer(self, key: KeyRef) -> Iterator[PrivateKey]:
        yield _load(key)

    def public_key(self, key: KeyRef) -> PublicKey:
        return _load(key).public_key()

    def destroy(self, key: KeyRef) -> None:
        """Nothing to do: the ledger has the only copy."""

    def unload(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def opener(
    location: str,  # noqa: ARG001 - there is none, see the registry
    *,
    terms: TpmTerms | None,
    state_dir: Path | None,  # noqa: ARG001 - no file is needed
    guest: bool,  # noqa: ARG001 - nor a device
) -> Callable[[], KeyStore]:
    """See `stationkey.keystore.keystore_opener`.

    Raises:
        ConfigurationError: options that need a TPM, and would not protect software keys.
    """
    refuse_tpm_terms(terms, _SCHEME)
    return SoftwareKeyStore


def _load(key: KeyRef) -> PrivateKey:
    refuse_foreign(key, _SCHEME)
    try:
        private_key = serialization.load_der_private_key(key.private, password=None)
    except (ValueError, TypeError, CryptographyUnsupported):
        raise KeyStoreError(
            f"the private part of key {key.key_id} is not valid PKCS#8", reason="key_damaged", scope=Scope.KEY
        ) from None
    assert isinstance(private_key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)  # this store makes no other
    return private_key
