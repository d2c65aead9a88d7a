"""What a TPM says it has [TPM 2.0 part 3, 30.2]. Functions of an open ESAPI context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_PT, TPM2_PT_FIRMWARE, TPM2_PT_VENDOR
from tpm2_pytss.types import TPMT_PUBLIC_PARMS

from stationkey.contract.profiles import ALGORITHMS, Algorithm, EllipticCurve, KeyType
from stationkey.keystore.protocol import Support
from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2 import templates
from stationkey.keystore.tpm2.signing import HASHES

_PAGE: Final = 64  # entries asked for at a time; the TPM may give fewer


def _pages(
    esapi: ESAPI,
    capability: Any,
    member: str,
    number: Callable[[Any], int],
    first: int,
    session: Any = ESYS_TR.NONE,
) -> Iterator[Any]:
    """Every entry of a capability from `first` on; a TPM may hand them out in pages."""
    more = True
    while more:
        more, page = esapi.get_capability(capability, first, _PAGE, session)
        entries = list(getattr(page.data, member))
        yield from entries
        if not entries:
            return
        first = number(entries[-1]) + 1


def handles(esapi: ESAPI, first: int, last: int) -> list[int]:
    """Those in use from `first` to `last`."""
    found = (int(handle) for handle in _pages(esapi, TPM2_CAP.HANDLES, "handles", int, first))
    return [handle for handle in found if handle <= last]


def persistent(esapi: ESAPI, handle: int) -> bool:
    """Whether there is an object at a persistent handle."""
    return handle in handles(esapi, handle, handle)


def sessions(esapi: ESAPI, *, saved: bool = True) -> list[int]:
    """Every session that is loaded and, with `saved`, those that were saved.

    The first byte of a handle says that it is one of HMAC (0x02) or of a policy (0x03). That of the question says
    loaded (0x02) or saved (0x03) instead, so an answer may begin otherwise than its question [TPM 2.0 part 2, 7.2].
    """
    found: list[int] = []
    for first in (0x02000000, 0x03000000) if saved else (0x02000000,):
        _, page = esapi.get_capability(TPM2_CAP.HANDLES, first, _PAGE)  # a TPM has 64 at the most
        found += [int(handle) for handle in page.data.handles if int(handle) >> 24 in {0x02, 0x03}]
    return list(dict.fromkeys(found))


def algorithms(esapi: ESAPI, session: Any = ESYS_TR.NONE) -> set[int]:
    """As TPM_ALG_IDs. The session authenticates the answer."""
    pages = _pages(esapi, TPM2_CAP.ALGS, "algorithms", lambda entry: int(entry.alg), 0, session)
    return {int(entry.alg) for entry in pages}


def curves(esapi: ESAPI, session: Any = ESYS_TR.NONE) -> set[int]:
    """As TPM_ECC_CURVEs. The session authenticates the answer."""
    return {int(curve) for curve in _pages(esapi, TPM2_CAP.ECC_CURVES, "eccCurves", int, 0, session)}


def properties(esapi: ESAPI) -> dict[int, int]:
    """Fixed and variable properties, by number [TPM 2.0 part 2, 6.13]."""
    found: dict[int, int] = {}
    for first in (TPM2_PT.FIXED, TPM2_PT.VAR):
        pages = _pages(esapi, TPM2_CAP.TPM_PROPERTIES, "tpmProperties", lambda entry: int(entry.property), int(first))
        found |= {int(entry.property): int(entry.value) for entry in pages}
    return found


def description(esapi: ESAPI) -> str:
    """Vendor and firmware version, as the fixed properties tell them."""
    told = properties(esapi)
    names = (TPM2_PT_VENDOR.STRING_1, TPM2_PT_VENDOR.STRING_2, TPM2_PT_VENDOR.STRING_3, TPM2_PT_VENDOR.STRING_4)
    vendor = b"".join(told.get(int(name), 0).to_bytes(4, "big") for name in names)
    manufacturer = told.get(int(TPM2_PT.MANUFACTURER), 0).to_bytes(4, "big")
    firmware = told.get(int(TPM2_PT_FIRMWARE.VERSION_1), 0)
    return f"TPM 2.0 {_printable(manufacturer)} {_printable(vendor)} firmware {firmware >> 16}.{firmware & 0xFFFF}"


def _printable(text: bytes) -> str:
    return "".join(chr(byte) for byte in text if chr(byte).isprintable() and chr(byte).isascii())


def support(esapi: Any, algorithm: Algorithm, session: Callable[[], Any] = lambda: ESYS_TR.NONE) -> Support:
    """Return what key this TPM can make for an algorithm, or what it lacks.

    Args:
        esapi: an open context.
        algorithm: of the signature.
        session: returns one for a command, to authenticate the answer.
    """
    profile = ALGORITHMS[algorithm]
    known = algorithms(esapi, session())
    if int(HASHES[profile.hash_name]) not in known:
        return Support(None, f"this TPM has no {profile.hash_name.upper().replace('SHA', 'SHA-')}")
    missing = []
    for kind in profile.key_types:
        scheme = TPM2_ALG.ECDSA if isinstance(kind, EllipticCurve) else TPM2_ALG.RSASSA
        if int(scheme) not in known:
            return Support(None, f"this TPM has no {'ECDSA' if isinstance(kind, EllipticCurve) else 'RSASSA'}")
        if _can_make(esapi, kind, session):
            return Support(kind)
        missing.append(str(kind))
    return Support(None, f"this TPM has no {' and no '.join(missing)}")


def _can_make(esapi: Any, kind: KeyType, session: Callable[[], Any]) -> bool:
    if isinstance(kind, EllipticCurve):
        return int(templates.CURVES[kind]) in curves(esapi, session())
    try:
        wanted = TPMT_PUBLIC_PARMS(type=TPM2_ALG.RSA, parameters=templates.key_parameters(kind))
        esapi.test_parms(wanted, session())
    except TSS2_Exception as error:
        if rc.is_lost(error) or not rc.code(error) & rc.FORMAT_ONE:
            raise
        return False  # TPM_RC_VALUE, TPM_RC_KEY_SIZE: the TPM knows RSA, but not this size
    return True
