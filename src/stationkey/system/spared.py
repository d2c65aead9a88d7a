"""Have asyncio and hashlib do without OpenSSL, so that a station without TLS never loads it.

Each of them looks for it when it is first imported, to find that this program does not use it: asyncio for a TLS of its
own, hashlib for another SHA-256. That takes a tenth of the start, and 4.6 MiB of memory. In a Python that was built
without OpenSSL both go on without it, and here they are told the same. `ssl` itself can be imported afterwards.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing takes 25 ms to import
if TYPE_CHECKING:
    from typing import Final

_OPENSSL: Final = ("ssl", "_hashlib")
_USERS: Final = ("asyncio", "hashlib", "hmac")


def spare_openssl() -> None:
    """Import what looks for OpenSSL, while there is none. Without effect if any of it is imported already."""
    if any(name in sys.modules for name in (*_OPENSSL, *_USERS)):
        return
    sys.modules.update(dict.fromkeys(_OPENSSL))  # type: ignore[arg-type] # the import of a module that is None fails
    try:
        for name in _USERS:
            __import__(name)
    finally:
        for name in _OPENSSL:
            del sys.modules[name]
