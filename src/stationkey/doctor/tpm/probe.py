"""A program of its own that asks a TPM what it is and how it is, and changes nothing in it.

A process, and not a thread: a TPM command has no time limit, and one that waits in a dead driver cannot be interrupted.
It makes no key, starts no TPM, and unloads nothing but the keys that it loaded itself, to see whether this TPM takes
them. Standard input: ``{"tcti": ..., "srk": HANDLE, "ak": HANDLE or null, "owner_auth": base64 or null,
"try_srk": BOOLEAN, "keys": {NAME: base64 of the wrapped key}}``. An error is a return code; see
`stationkey.doctor.probes`. Judged in `stationkey.doctor.tpm.state`.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from typing import Final, cast

from stationkey.contract.profiles import Algorithm
from stationkey.doctor.probes import asked_by, say
from stationkey.keystore.tpm2 import capabilities, templates
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.return_codes import TpmError

# isort: split
from tpm2_pytss.constants import ESYS_TR, TPM2_CLOCK, TPMA_OBJECT
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.types import TPM2B_PRIVATE, TPM2B_PUBLIC, TPMT_PUBLIC

_PCRS: Final = 0x05
"""TPM_CAP_PCRS [TPM 2.0 part 2, 6.12]."""
_PATIENCE: Final = 0.1
_TRANSIENT: Final = (0x80000000, 0x80FFFFFF)
_A_KEY: Final = TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.SIGN_ENCRYPT
_FORMAT_ONE: Final = 0xBF
"""What is left of a return code without the number of the parameter or session [TPM 2.0 part 2, 6.6.3]."""
_NO_AUTHORISATION: Final = frozenset({0x8E, 0xA2})
"""TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH."""
_OF_PARAMETER: Final = 0xC0
"""The bits that an error about a parameter has."""


def look(part: str, question: Callable[[], object]) -> bool:
    """Ask, and say what came; False where nothing did."""
    try:
        say(part, value=question())
    except TpmError as error:
        say(part, error=error.rc)
        return False
    except Exception as error:  # noqa: BLE001 - of no part may the others depend
        say(part, fault=type(error).__name__)
        return False
    return True


def banks(esapi: Context) -> dict[str, list[int]]:
    """The registers of each bank, by the bank's hash."""
    _, page = esapi.get_capability(_PCRS, 0, 1)
    found, at = {}, 8  # after capability and count
    while at < len(page):  # each: hash, size of the bit map, bit map [TPM 2.0 part 2, 10.6.2]
        octets = page[at + 3 : at + 3 + page[at + 2]]
        found[str(int.from_bytes(page[at : at + 2], "big"))] = [
            number for number in range(8 * len(octets)) if octets[number // 8] >> number % 8 & 1
        ]
        at += 3 + len(octets)
    return found


def _object_at(esapi: Context, handle: int) -> dict[str, object] | None:
    if not capabilities.persistent(esapi, handle):
        return None
    public, _ = esapi.public_of(handle)
    return {"attributes": templates.attributes_of(public), "unlike_srk": templates.unlike_srk(public)}


def loads(esapi: Context, parent: int, wrapped: str) -> int:
    """The return code of loading a key; what was loaded is unloaded at once."""
    try:
        key = TSSPrivKey.from_der(base64.b64decode(wrapped))
    except (ValueError, TypeError):
        return -1
    try:
        parts = key.private.marshal(), key.public.marshal()
        handle = esapi.load(esapi.tr_from_tpmpublic(parent), *parts, ESYS_TR.PASSWORD)
    except TpmError as error:
        return error.rc
    esapi.flush_context(handle)
    return 0


def _srk_takes_no_password(esapi: Context, handle: int) -> bool:
    """Whether the storage root key can be used without a password: by a key that it cannot but refuse.

    A TPM looks at the authorisation before it looks at what is to be loaded [TPM 2.0 part 3, 5.6 and 5.7]. Where wrong
    tries are counted this would be one; so only a key that is exempt from that is tried.
    """
    there = _object_at(esapi, handle)
    if there is None or not cast("int", there["attributes"]) & TPMA_OBJECT.NODA:
        raise LookupError
    public = TPM2B_PUBLIC(publicArea=TPMT_PUBLIC.parse("ecc256:ecdsa", objectAttributes=_A_KEY))
    try:
        parts = TPM2B_PRIVATE(bytes(64)).marshal(), public.marshal()
        esapi.load(esapi.tr_from_tpmpublic(handle), *parts, ESYS_TR.PASSWORD)
    except TpmError as error:
        if error.rc & _FORMAT_ONE in _NO_AUTHORISATION:
            return False
        if error.rc & _OF_PARAMETER == _OF_PARAMETER:
            return True
        raise
    raise LookupError  # which cannot be


def _owner_takes(esapi: Context, value: bytes) -> bool:
    """Whether this is the authorisation value of the owner hierarchy: by a command that changes nothing with it.

    Wrong tries are not counted for this hierarchy [TPM 2.0 part 1, 19.8.2].
    """
    esapi.tr_set_auth(ESYS_TR.OWNER, value)
    esapi.clock_rate_adjust(TPM2_CLOCK.NO_CHANGE, ESYS_TR.OWNER)
    return True


def _wait(seconds: float) -> bool:
    """Try a busy TPM again a few times."""
    time.sleep(seconds)
    return seconds < _PATIENCE


def opens(path: str) -> bool:
    """Whether a device can be opened; says why not, which tpm2-tss does not."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        say("device", error=error.errno)
        return False
    return True


def main() -> None:
    """Ask all of it."""
    asked = asked_by()
    name, _, path = asked["tcti"].partition(":")
    if name == "device" and path and not opens(path):
        return
    opened: list[Context] = []
    if not look("open", lambda: opened.append(Context(asked["tcti"], _wait))):
        return
    esapi = opened[0]
    # The failure mode lets only these through, and the first command tells whether the TPM was started.
    started = look("properties", lambda: capabilities.properties(esapi))
    look("test_result", lambda: int(esapi.get_test_result()[1]))
    if not started:
        return
    look("loaded_sessions", lambda: capabilities.sessions(esapi, saved=False))
    look("transient", lambda: capabilities.handles(esapi, *_TRANSIENT))
    look("algorithms", lambda: sorted(capabilities.algorithms(esapi)))
    look("curves", lambda: sorted(capabilities.curves(esapi)))
    look("supported", lambda: {one: capabilities.support(esapi, one).missing for one in Algorithm})
    look("banks", lambda: banks(esapi))
    look("srk", lambda: _object_at(esapi, asked["srk"]))
    if asked["try_srk"]:
        look("srk_open", lambda: _srk_takes_no_password(esapi, asked["srk"]))
    if asked["ak"]:
        look("ak", lambda: _object_at(esapi, asked["ak"]))
    if asked["owner_auth"]:
        look("owner_auth", lambda: _owner_takes(esapi, base64.b64decode(asked["owner_auth"])))
    look("keys", lambda: {name: loads(esapi, asked["srk"], key) for name, key in asked["keys"].items()})
    esapi.close()


if __name__ == "__main__":
    main()
