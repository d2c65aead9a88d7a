"""A program of its own that asks a PKCS#11 token what it is and how it is, and changes nothing in it.

A process, and not a thread: a module is a foreign library, and may hang or crash. It runs as the daemon's user, so that
it sees what the daemon would see, and what it writes is the daemon's. It does not log in, and tries no PIN, unless keys
are to be tried. Standard input: ``{"uri": of the key store, "directory": of our records, "user": [UID, GID,
GROUP...], "pin_file": PATH or null, "algorithms": [...], "try_keys": BOOLEAN}``. An error has reason, message and hint;
see `stationkey.doctor.probes`. Judged in `stationkey.doctor.pkcs11.checks`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace
from pkcs11 import Attribute, ObjectClass

from stationkey.contract.profiles import Algorithm
from stationkey.doctor.probes import asked_by, say
from stationkey.errors import StationKeyError
from stationkey.keystore.pkcs11.inventory import LABEL, FileInventory, refused_pin
from stationkey.keystore.pkcs11.store import Pkcs11KeyStore
from stationkey.keystore.pkcs11.token import Connection, safe_module, was_refused
from stationkey.keystore.pkcs11.uri import PinSource, TokenUri, identifier_of

_LABEL: Final = LABEL.partition("{")[0]
_GET_TOKEN_INFO: Final = 6
"""Place of C_GetTokenInfo in CK_FUNCTION_LIST, after its version [PKCS #11 3.6]."""
_TEXTS: Final = 96
"""Octets before the numbers of CK_TOKEN_INFO; the last four of eleven are of memory [PKCS #11 3.2]."""


def _look(part: str, question: Callable[[], object]) -> bool:
    """Ask, and say what came; False where nothing did."""
    try:
        say(part, value=question())
    except StationKeyError as error:
        say(part, error={"reason": error.reason, "message": error.message, "hint": error.hint})
        return False
    except Exception as error:  # noqa: BLE001 - of no part may the others depend
        say(part, fault=type(error).__name__)
        return False
    return True


def _memory(module: Path, slot: int) -> list[int]:
    """Return total and free octets of public, then of private memory, which python-pkcs11 does not tell."""
    library, listed, info = ctypes.CDLL(str(module)), ctypes.c_void_p(), ctypes.create_string_buffer(256)
    library.C_GetFunctionList(ctypes.byref(listed))
    functions = (ctypes.c_void_p * (_GET_TOKEN_INFO + 2)).from_address(listed.value or 0)
    call = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p)(functions[_GET_TOKEN_INFO + 1] or 0)
    return [] if call(slot, info) else list(struct.unpack_from("11L", info, _TEXTS)[7:])


def _ours(session: Any) -> list[str]:
    """Return the CKA_IDs of what has our label, as far as it is seen without a login: the public parts."""
    labels = (key[Attribute.LABEL] for key in session.get_objects({Attribute.CLASS: ObjectClass.PUBLIC_KEY}))
    return [label.removeprefix(_LABEL) for label in labels if label.startswith(_LABEL)]


def _pin(uri: TokenUri, refused: Path) -> bool | None:
    """Whether the token has refused the PIN before; None where it is not in a file that is at hand."""
    return was_refused(refused, uri.pin.read()) if uri.pin is not None and uri.pin.source.startswith("file:") else None


def _support(store: Pkcs11KeyStore, algorithm: Algorithm, *, tried: bool) -> str:
    return (store.try_out if tried else store.supports)(algorithm).missing


def main() -> None:
    """Ask all of it."""
    asked = asked_by()
    uri, inventory = TokenUri.parse(asked["uri"].partition(":")[2]), FileInventory(Path(asked["directory"]))
    refused = refused_pin(inventory.directory, asked["uri"])
    if asked["pin_file"]:
        uri = replace(uri, pin=PinSource(f"file:{asked['pin_file']}"))
    _look("pin", lambda: _pin(uri, refused))
    if not _look("module", lambda: str(safe_module(uri.module))):
        return
    open_to_all = replace(uri, pin=None)
    connection = Connection(open_to_all, refused)
    if not _look("token", lambda: connection.call("C_OpenSession", lambda _: connection.names())):
        return
    _look("flags", lambda: int(connection.token.flags))
    _look("memory", lambda: _memory(uri.module, connection.token.slot.slot_id))
    _look("objects", lambda: connection.call("C_FindObjects", lambda session: len(list(session.get_objects()))))
    _look("ours", lambda: connection.call("C_FindObjects", _ours))
    connection.close()
    _look("recorded", lambda: [identifier_of(one).hex() for one in inventory.uris()])
    for kind, token in (("supported", open_to_all), *((("tried", uri),) if asked["try_keys"] else ())):
        store = Pkcs11KeyStore(asked["uri"], token, inventory, refused)
        names = map(Algorithm, asked["algorithms"])
        _look(kind, lambda: {one: _support(store, one, tried=kind == "tried") for one in names})  # noqa: B023 - at once
        store.close()
    say("end", value=True)


if __name__ == "__main__":
    main()
