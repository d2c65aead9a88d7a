"""Return codes: the TPM's [TPM 2.0 part 2, 6.6], tpm2-tss's and those of the resource managers in between."""

from __future__ import annotations

from typing import Final

LAYER: Final = 0x00FF0000
MARSHALLING: Final = 0x00090000
_RESOURCE_MANAGER: Final = frozenset({0x000B0000, 0x000C0000})  # the layers of /dev/tpmrm0 and of tpm2-abrmd
_TPM: Final = 0x180  # bits that a code of the TPM has and a code of tpm2-tss has not: version 1 or format one
FORMAT_ONE: Final = 0x080  # it complains about a handle, a session or a parameter [TPM 2.0 part 2, 6.6.2]

TCTI_VALUE: Final = 0xA000B
TCTI_UNKNOWN: Final = 0xA0015
MALFORMED: Final = 0x70011  # what ESAPI raises over a response that it cannot read
RESPONSE_ALTERED: Final = 0x7001B  # the HMAC of a response is wrong
INITIALIZE: Final = 0x100
PCR_CHANGED: Final = 0x128  # between TPM2_PolicyPCR and the command that it allows
COMMAND_CODE: Final = 0x143  # TPM2_CreateLoaded came with revision 1.38 of the specification
HANDLE_1: Final = 0x18B
VALUE_1: Final = 0x1C4
INTEGRITY: Final = 0x1DF  # TPM2_Load, parameter 1: the blob is of another TPM, or of this one before it was cleared
CONTEXT_GAP: Final = 0x901
OBJECT_MEMORY: Final = 0x902
SESSION_MEMORY: Final = 0x903
MEMORY: Final = 0x904
SESSION_HANDLES: Final = 0x905
OBJECT_HANDLES: Final = 0x906
YIELDED: Final = 0x908
CANCELED: Final = 0x909
TESTING: Final = 0x90A
REFERENCE_H0: Final = 0x910
REFERENCE_S0: Final = 0x918
NV_RATE: Final = 0x920
LOCKOUT: Final = 0x921
RETRY: Final = 0x922
NV_UNAVAILABLE: Final = 0x923
AUTH_FAIL: Final = 0x98E  # a wrong authorisation value, which counts for dictionary-attack lockout
POLICY_FAIL: Final = 0x99D
BAD_AUTH: Final = 0x9A2  # the same, and it does not count

WRONG_AUTH: Final = frozenset({AUTH_FAIL, BAD_AUTH})
_SESSIONS_FULL: Final = frozenset({SESSION_MEMORY, SESSION_HANDLES})
FULL: Final = _SESSIONS_FULL | {OBJECT_MEMORY, OBJECT_HANDLES}
BUSY: Final = frozenset({CONTEXT_GAP, MEMORY, YIELDED, CANCELED, TESTING, NV_RATE, RETRY, NV_UNAVAILABLE})
PASSING: Final = FULL | BUSY
"""The command was not done, and the same may succeed soon. A lockout may take hours, and is not among them."""


class TpmError(Exception):
    """What the TPM, or the way to it, answered instead of success.

    Args:
        code: the return code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.rc = code

    def __str__(self) -> str:
        """As tpm2-tss words it."""
        import ctypes  # noqa: PLC0415 - most errors get words of our own

        try:
            decode = ctypes.CDLL("libtss2-rc.so.0").Tss2_RC_Decode
        except OSError:
            return f"{self.rc:#x}"
        decode.restype = ctypes.c_char_p
        return str(decode(ctypes.c_uint32(self.rc)).decode(errors="replace"))


def code(error: TpmError) -> int:
    """The return code of an error.

    Where a resource manager answers in the TPM's place, with the code that the TPM would give: without its layer.
    """
    found = error.rc
    return found & 0xFFFF if found & LAYER in _RESOURCE_MANAGER and found & _TPM else found


def is_lost(error: TpmError) -> bool:
    """Whether the failure is between us and the TPM, in any layer of tpm2-tss, rather than the TPM's own answer."""
    return bool(code(error) & LAYER)
