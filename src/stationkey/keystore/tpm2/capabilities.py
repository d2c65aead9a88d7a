"""What a TPM says it has [TPM 2.0 part 3, 30.2]. Functions of an open context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from stationkey.contract.profiles import ALGORITHMS, Algorithm, EllipticCurve, KeyType
from stationkey.keystore.protocol import Support
from stationkey.keystore.tpm2 import commands, templates
from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.signing import ECDSA, HASHES, RSASSA

_TRANSIENT: Final = 0x80000000
_PAGE: Final = 64  # entries asked for at a time; the TPM may give fewer
_FIXED: Final = 0x100
_VARIABLE: Final = 0x200
"""The first property of each group [TPM 2.0 part 2, 6.13]."""
_MANUFACTURER: Final = 0x105
_VENDOR: Final = (0x106, 0x107, 0x108, 0x109)
_FIRMWARE: Final = 0x10B


def _page(esapi: Any, capability: int, first: int, session: tuple[Any, ...]) -> tuple[bool, list[bytes]]:
    more, data = esapi.get_capability(capability, first, _PAGE, *session)
    return more, commands.entries(capability, data if isinstance(data, bytes) else bytes(data.marshal()))


def _entries(
    esapi: Any, capability: int, first: int, session: tuple[Any, ...] = (), *, size: int = 4
) -> Iterator[bytes]:
    """Every entry of a capability from `first` on, which begins with its number; a TPM may hand them out in pages.

    Args:
        esapi: an open context.
        capability: which.
        first: number.
        session: authenticates the answers; empty for none.
        size: bytes of the number.
    """
    more = True
    while more:
        more, page = _page(esapi, capability, first, session)
        yield from page
        if not page:
            return
        first = _number(page[-1][:size]) + 1


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def handles(esapi: Any, first: int, last: int) -> list[int]:
    """Those in use from `first` to `last`."""
    found = map(_number, _entries(esapi, commands.HANDLES, first))
    return [handle for handle in found if handle <= last]


def persistent(esapi: Any, handle: int) -> bool:
    """Whether there is an object at a persistent handle."""
    return handle in handles(esapi, handle, handle)


def loaded(esapi: Any) -> list[int]:
    """Every loaded object."""
    _, page = _page(esapi, commands.HANDLES, _TRANSIENT, ())  # a TPM has 64 at the most
    return [handle for handle in map(_number, page) if handle >> 24 == _TRANSIENT >> 24]


def sessions(esapi: Any, *, saved: bool = True) -> list[int]:
    """Every session that is loaded and, with `saved`, those that were saved.

    The first byte of a handle says that it is one of HMAC (0x02) or of a policy (0x03). That of the question says
    loaded (0x02) or saved (0x03) instead, so an answer may begin otherwise than its question [TPM 2.0 part 2, 7.2].
    """
    found: list[int] = []
    for first in (0x02000000, 0x03000000) if saved else (0x02000000,):
        _, page = _page(esapi, commands.HANDLES, first, ())  # a TPM has 64 at the most
        found += [handle for handle in map(_number, page) if handle >> 24 in {0x02, 0x03}]
    return list(dict.fromkeys(found))


def algorithms(esapi: Any, *session: Any) -> set[int]:
    """As TPM_ALG_IDs. A session authenticates the answer."""
    return {_number(entry[:2]) for entry in _entries(esapi, commands.ALGORITHMS, 0, session, size=2)}


def curves(esapi: Any, *session: Any) -> set[int]:
    """As TPM_ECC_CURVEs. A session authenticates the answer."""
    return {_number(entry) for entry in _entries(esapi, commands.CURVES, 0, session)}


def properties(esapi: Any) -> dict[int, int]:
    """Fixed and variable properties, by number [TPM 2.0 part 2, 6.13]."""
    found: dict[int, int] = {}
    for first in (_FIXED, _VARIABLE):
        found |= {_number(entry[:4]): _number(entry[4:]) for entry in _entries(esapi, commands.PROPERTIES, first)}
    return found


def description(esapi: Any) -> str:
    """Vendor and firmware version, as the fixed properties tell them."""
    told = properties(esapi)
    vendor = b"".join(told.get(number, 0).to_bytes(4, "big") for number in _VENDOR)
    manufacturer = told.get(_MANUFACTURER, 0).to_bytes(4, "big")
    firmware = told.get(_FIRMWARE, 0)
    return f"TPM 2.0 {_printable(manufacturer)} {_printable(vendor)} firmware {firmware >> 16}.{firmware & 0xFFFF}"


def _printable(text: bytes) -> str:
    return "".join(chr(byte) for byte in text if chr(byte).isprintable() and chr(byte).isascii())


def support(esapi: Any, algorithm: Algorithm, session: Callable[[], tuple[Any, ...]] = tuple) -> Support:
    """Return what key this TPM can make for an algorithm, or what it lacks.

    Args:
        esapi: an open context.
        algorithm: of the signature.
        session: returns one for a command, to authenticate the answer, or none.
    """
    profile = ALGORITHMS[algorithm]
    known = algorithms(esapi, *session())
    if HASHES[profile.hash_name] not in known:
        return Support(None, f"this TPM has no {profile.hash_name.upper().replace('SHA', 'SHA-')}")
    missing = []
    for kind in profile.key_types:
        scheme = ECDSA if isinstance(kind, EllipticCurve) else RSASSA
        if scheme not in known:
            return Support(None, f"this TPM has no {'ECDSA' if isinstance(kind, EllipticCurve) else 'RSASSA'}")
        if _can_make(esapi, kind, session):
            return Support(kind)
        missing.append(str(kind))
    return Support(None, f"this TPM has no {' and no '.join(missing)}")


def _can_make(esapi: Any, kind: KeyType, session: Callable[[], tuple[Any, ...]]) -> bool:
    if isinstance(kind, EllipticCurve):
        return templates.CURVES[kind] in curves(esapi, *session())
    try:
        esapi.test_parms(templates.rsa_parameters(kind), *session())
    except TpmError as error:
        if rc.is_lost(error) or not rc.code(error) & rc.FORMAT_ONE:
            raise
        return False  # TPM_RC_VALUE, TPM_RC_KEY_SIZE: the TPM knows RSA, but not this size
    return True
