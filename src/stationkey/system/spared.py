"""Have libraries do without what they only look for, so that a station never loads it.

- OpenSSL: asyncio looks for it when it is first imported, for a TLS of its own, and hashlib for another SHA-256.
  Without TLS to the broker nothing here uses it. That is a tenth of the start, and 4.6 MiB of memory.
- ``typing_extensions``, which msgspec takes instead of `typing` if it is installed for something else.

In a Python without it, each of them goes on without it, and here they are told the same. It can be imported afterwards.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing takes 25 ms to import
if TYPE_CHECKING:
    from typing import Final

_SPARED: Final = ("ssl", "_hashlib", "typing_extensions")
_USERS: Final = ("asyncio", "hashlib", "hmac", "msgspec")


def spare() -> None:
    """Import what looks for it, while it is not there. Without effect if any of that is imported already."""
    if any(name in sys.modules for name in (*_SPARED, *_USERS)):
        return
    sys.modules.update(dict.fromkeys(_SPARED))  # type: ignore[arg-type] # the import of a module that is None fails
    try:
        for name in _USERS:
            __import__(name)
    finally:
        for name in _SPARED:
            del sys.modules[name]
