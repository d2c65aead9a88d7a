"""Key stores, which contain the private keys.

A store makes a key, signs with it, returns its public part and destroys it; before a key is made, it reports whether it
supports the key type. Stores are named by URI, see `stationkey.keystore.registry`:

- ``tpm2:<TCTI>``, for example ``tpm2:device:/dev/tpmrm0`` or ``tpm2:swtpm:host=127.0.0.1,port=2321``;
- ``pkcs11:<token>?module-path=<module>`` [RFC 7512], a token: a secure element, an HSM;
- ``software:``, unprotected keys in memory and on disk. For trials only; never a fallback.
"""

from __future__ import annotations

from stationkey.keystore.protocol import (
    KEY_ID_LENGTH,
    Abandonable,
    KeyRef,
    KeyStore,
    Lending,
    Locking,
    Protecting,
    Support,
    Sweeping,
    Swept,
    Timed,
    Trying,
    check_key,
    key_id_of,
)
from stationkey.keystore.registry import KeyStoreUri, keystore_opener

__all__ = [
    "KEY_ID_LENGTH",
    "Abandonable",
    "KeyRef",
    "KeyStore",
    "KeyStoreUri",
    "Lending",
    "Locking",
    "Protecting",
    "Support",
    "Sweeping",
    "Swept",
    "Timed",
    "Trying",
    "check_key",
    "key_id_of",
    "keystore_opener",
]
