"""Create TPM-protected keys on an EV charging station, and answer Josev's ``generate_csr`` with CSRs.

The public names, by task:

- messages: `decode`, `encode`, `generate_csr`, `accepted`, `rejected`, `GenerateCsrRequest`, `GenerateCsrData`,
  `GenerateCsrResponse`, `CertificateInstallationStatus`
- certificate types and algorithms: `PROFILES`, `ALGORITHMS`, `CertificateProfile`, `CertificateType`, `Algorithm`
- CSRs: `build_csr`, `inspect_csr`, `CsrSummary`, `to_pem`
- a request over MQTT: `ask`, `Broker`, `MqttTerms`
- the service: `StationKeyService`, `Policy`, `PolicyTerms`, `MqttEdge`, `Ledger`, `StateDirectory`
- key stores: `keystore_opener`, `KeyStore`, `KeyStoreThread`, `KeyStores`, `KeyRef`, `TpmTerms`
- errors: `StationKeyError` and its kinds `BrokerError`, `ConfigurationError`, `KeyStoreError`, `LedgerError`,
  `MessageError`, `RequestRefused`, `UnsupportedAlgorithm`

Each is imported on first use, so a program loads only the libraries that it needs.
"""

from __future__ import annotations

from stationkey._version import __version__

TYPE_CHECKING = False  # typing takes 25 ms to import, in which Ctrl-C would still end a command in a traceback
if TYPE_CHECKING:
    from typing import Any, Final

    from stationkey.config.settings import MqttTerms, PolicyTerms, TpmTerms
    from stationkey.contract.messages import (
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
    from stationkey.contract.profiles import ALGORITHMS, PROFILES, Algorithm, CertificateProfile, CertificateType
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
    from stationkey.keystore import KeyRef, KeyStore, keystore_opener
    from stationkey.keystore.stores import KeyStores
    from stationkey.keystore.worker import KeyStoreThread
    from stationkey.ledger import Ledger
    from stationkey.mqtt.client import ask
    from stationkey.mqtt.gateway import MqttEdge
    from stationkey.mqtt.url import Broker
    from stationkey.service.policy import Policy
    from stationkey.service.requests import StationKeyService
    from stationkey.system.state_dir import StateDirectory
    from stationkey.x509.csr import CsrSummary, build_csr, inspect_csr, to_pem

_HOME: Final = {
    "x509.csr": ("CsrSummary", "build_csr", "inspect_csr", "to_pem"),
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
    "mqtt.gateway": ("MqttEdge",),
    "mqtt.client": ("ask",),
    "keystore": ("KeyRef", "KeyStore", "keystore_opener"),
    "keystore.stores": ("KeyStores",),
    "keystore.worker": ("KeyStoreThread",),
    "ledger": ("Ledger",),
    "contract.messages": (
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
    "mqtt.url": ("Broker",),
    "service.policy": ("Policy",),
    "contract.profiles": ("ALGORITHMS", "PROFILES", "Algorithm", "CertificateProfile", "CertificateType"),
    "service.requests": ("StationKeyService",),
    "system.state_dir": ("StateDirectory",),
    "config.settings": ("MqttTerms", "PolicyTerms", "TpmTerms"),
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
    "KeyStores",
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
    from importlib import import_module  # noqa: PLC0415 - as above

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
