"""Gives an EV charging station its keys: answers Josev's ``generate_csr`` with a CSR for a key born in the TPM.

The public names are those of `__all__`. They are imported when first used, so that a program which needs only one pays
for no cryptographic library, broker client or TPM stack that it does not use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stationkey.csr import CsrSummary, build_csr, inspect_csr, to_pem
    from stationkey.edge import MqttEdge
    from stationkey.errors import (
        BrokerError,
        ConfigurationError,
        KeyStoreError,
        LedgerError,
        MessageError,
        RequestRefused,
        StationKeyError,
        UnsupportedAlgorithm,
    )
    from stationkey.josev import ask
    from stationkey.keystore import KeyRef, KeyStore, keystore_opener
    from stationkey.keystore.thread import KeyStoreThread
    from stationkey.ledger import Ledger
    from stationkey.messages import (
        CertificateInstallationStatus,
        GenerateCsrData,
        GenerateCsrRequest,
        GenerateCsrResponse,
        accepted,
        decode,
        encode,
        generate_csr,
        rejected,
    )
    from stationkey.mqtt import Broker
    from stationkey.policy import Policy
    from stationkey.profiles import ALGORITHMS, PROFILES, Algorithm, CertificateProfile, CertificateType
    from stationkey.service import StationKeyService
    from stationkey.state import StateDirectory
    from stationkey.terms import MqttTerms, PolicyTerms, TpmTerms

_HOME: Final = {
    "csr": ("CsrSummary", "build_csr", "inspect_csr", "to_pem"),
    "errors": (
        "BrokerError",
        "ConfigurationError",
        "KeyStoreError",
        "LedgerError",
        "MessageError",
        "RequestRefused",
        "StationKeyError",
        "UnsupportedAlgorithm",
    ),
    "edge": ("MqttEdge",),
    "josev": ("ask",),
    "keystore": ("KeyRef", "KeyStore", "keystore_opener"),
    "keystore.thread": ("KeyStoreThread",),
    "ledger": ("Ledger",),
    "messages": (
        "CertificateInstallationStatus",
        "GenerateCsrData",
        "GenerateCsrRequest",
        "GenerateCsrResponse",
        "accepted",
        "decode",
        "encode",
        "generate_csr",
        "rejected",
    ),
    "mqtt": ("Broker",),
    "policy": ("Policy",),
    "profiles": ("ALGORITHMS", "PROFILES", "Algorithm", "CertificateProfile", "CertificateType"),
    "service": ("StationKeyService",),
    "state": ("StateDirectory",),
    "terms": ("MqttTerms", "PolicyTerms", "TpmTerms"),
}
_MODULES: Final = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ALGORITHMS",
    "PROFILES",
    "Algorithm",
    "Broker",
    "BrokerError",
    "CertificateInstallationStatus",
    "CertificateProfile",
    "CertificateType",
    "ConfigurationError",
    "CsrSummary",
    "GenerateCsrData",
    "GenerateCsrRequest",
    "GenerateCsrResponse",
    "KeyRef",
    "KeyStore",
    "KeyStoreError",
    "KeyStoreThread",
    "Ledger",
    "LedgerError",
    "MessageError",
    "MqttEdge",
    "MqttTerms",
    "Policy",
    "PolicyTerms",
    "RequestRefused",
    "StateDirectory",
    "StationKeyError",
    "StationKeyService",
    "TpmTerms",
    "UnsupportedAlgorithm",
    "__version__",
    "accepted",
    "ask",
    "build_csr",
    "decode",
    "encode",
    "generate_csr",
    "inspect_csr",
    "keystore_opener",
    "rejected",
    "to_pem",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
