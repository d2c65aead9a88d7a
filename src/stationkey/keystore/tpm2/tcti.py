"""The way to a TPM: a TCTI of tpm2-tss, by its loader library.

tpm2-pytss has the same, and with it all of ESAPI: 5 MiB, and more time at start than everything else here. So this is a
binding of its own to four functions [TCG TSS 2.0 TPM Command Transmission Interface (TCTI) API].
"""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from typing import Any, Final

from stationkey.keystore.tpm2.return_codes import TpmError

# tpm2-tss prints every TPM error to standard error by itself; here each becomes an exception with its own words, and a
# line of JSON in the log must not be torn apart. Read once, when the library is loaded; an operator's own value wins,
# but for the levels at which the library prints whole commands: an authorisation value may be in them.
os.environ["TSS2_LOG"] = re.sub("debug|trace", "info", os.environ.get("TSS2_LOG", "all+none"), flags=re.IGNORECASE)

_MAX_RESPONSE: Final = 4096
_FOREVER: Final = -1
_CONTEXT: Final = ctypes.c_void_p
_TRANSMIT: Final = ctypes.CFUNCTYPE(ctypes.c_uint32, _CONTEXT, ctypes.c_size_t, ctypes.c_char_p)
_RECEIVE: Final = ctypes.CFUNCTYPE(
    ctypes.c_uint32, _CONTEXT, ctypes.POINTER(ctypes.c_size_t), ctypes.c_void_p, ctypes.c_int32
)


class _Common(ctypes.Structure):
    """The beginning of TSS2_TCTI_CONTEXT_COMMON_V1."""

    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("version", ctypes.c_uint64),
        ("transmit", _TRANSMIT),
        ("receive", _RECEIVE),
    )


class Tcti:
    """A connection to a TPM. A call blocks until the TPM has answered, and lets other threads run.

    Args:
        tcti: name and configuration, as ``device:/dev/tpmrm0``.

    Raises:
        TpmError: there is no such TCTI, or it cannot be opened.
    """

    def __init__(self, tcti: str) -> None:
        name, colon, configuration = tcti.partition(":")
        self._context = _CONTEXT()
        _check(
            _loader().Tss2_TctiLdr_Initialize_Ex(
                name.encode(), configuration.encode() if colon else None, ctypes.byref(self._context)
            )
        )
        common = ctypes.cast(self._context, ctypes.POINTER(_Common)).contents
        self._transmit: Any = common.transmit
        self._receive: Any = common.receive
        self._response = ctypes.create_string_buffer(_MAX_RESPONSE)
        self._size = ctypes.c_size_t()

    @property
    def address(self) -> int:
        """Of the TSS2_TCTI_CONTEXT, for another library; valid until `close`."""
        return self._context.value or 0

    def transmit(self, command: bytes) -> None:
        """Send a command.

        Raises:
            TpmError: the connection is lost.
        """
        _check(self._transmit(self._context, len(command), command))

    def receive(self) -> bytes:
        """Wait for the response to the command, and return it.

        Raises:
            TpmError: the connection is lost.
        """
        self._size.value = _MAX_RESPONSE
        _check(self._receive(self._context, self._size, self._response, _FOREVER))
        return ctypes.string_at(self._response, self._size.value)

    def close(self) -> None:
        """Close the connection. No other method may be called after it."""
        _loader().Tss2_TctiLdr_Finalize(ctypes.byref(self._context))


@cache
def _loader() -> Any:
    library = ctypes.CDLL("libtss2-tctildr.so.0")
    library.Tss2_TctiLdr_Initialize_Ex.restype = ctypes.c_uint32
    library.Tss2_TctiLdr_Initialize_Ex.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_CONTEXT))
    library.Tss2_TctiLdr_Finalize.restype = None
    library.Tss2_TctiLdr_Finalize.argtypes = (ctypes.POINTER(_CONTEXT),)
    return library


def _check(code: int) -> None:
    if code:
        raise TpmError(code)
