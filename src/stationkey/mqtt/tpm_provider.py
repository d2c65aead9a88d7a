"""tpm2-openssl in the OpenSSL that Python's `ssl` uses, for a TLS client whose key is in a TPM.

Other programs load it by a configuration file when they start (`docs/tls.md`). Here it is loaded when needed, by
OpenSSL's own functions, and can be reloaded after the TPM was away. Its key import functions are hidden, so that
OpenSSL uses it for keys in the TPM only. Otherwise the TPM would also verify the peer's signatures, which fails for a
broker whose authority has an RSA-4096 key if the TPM lacks such keys.

Structures and numbers are those of OpenSSL 3's core_dispatch.h and core.h, its stable interface for providers.
"""

from __future__ import annotations

import _ssl
import ctypes
import os
import ssl
from collections.abc import Callable, Iterator
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_void_p
from typing import Any, Final

from stationkey.errors import BrokerError, ConfigurationError

MAX_OPENED: Final = 100
"""How often a process reloads the provider. OpenSSL never frees the earlier ones."""
MAX_VAIN: Final = 4
"""How often, if the provider never worked before."""
DEFAULT_TCTI: Final = "device:/dev/tpmrm0"

_QUERY_OPERATION: Final = 1027
_UNQUERY_OPERATION: Final = 1028
_KEY_MANAGEMENT: Final = 10
_IMPORT: Final = {40, 41}
"""OSSL_FUNC_PROVIDER_QUERY_OPERATION, OSSL_FUNC_PROVIDER_UNQUERY_OPERATION, OSSL_OP_KEYMGMT, OSSL_FUNC_KEYMGMT_IMPORT
and OSSL_FUNC_KEYMGMT_IMPORT_TYPES."""
_MODULES_DIRECTORY: Final = 1003
"""OPENSSL_INFO_MODULES_DIR [OPENSSL_info(3)]."""


class _Dispatch(ctypes.Structure):
    """OSSL_DISPATCH: a function and its purpose. A list of them ends with 0."""

    _fields_ = (("number", c_int), ("function", c_void_p))


class _Algorithm(ctypes.Structure):
    """OSSL_ALGORITHM: names and functions of an algorithm. A list of them ends without names."""

    _fields_ = (
        ("names", c_void_p),
        ("properties", c_void_p),
        ("implementation", POINTER(_Dispatch)),
        ("description", c_void_p),
    )


_Init: Final = CFUNCTYPE(c_int, c_void_p, c_void_p, POINTER(POINTER(_Dispatch)), POINTER(c_void_p))
_Query: Final = CFUNCTYPE(c_void_p, c_void_p, c_int, POINTER(c_int))
_Unquery: Final = CFUNCTYPE(None, c_void_p, c_int, c_void_p)


class TpmProvider:
    """The provider in this process's OpenSSL. Not thread-safe; `TPM_PROVIDER` is the only instance."""

    def __init__(self) -> None:
        self._kept: list[object] = []  # objects that OpenSSL has pointers to
        self._opened = 0
        self._name = b""
        self._handle: int | None = None
        self._worked = False
        self._vain = 0

    def open(self, tcti: str | None) -> None:
        """Load it and connect it to the TPM, unless it is loaded already, also by ``OPENSSL_CONF``.

        Args:
            tcti: TCTI of the TPM; None for ``TPM2OPENSSL_TCTI`` of the environment, or else `DEFAULT_TCTI`.

        Raises:
            ConfigurationError: it is not installed.
            BrokerError: the TPM cannot be reached.
        """
        if self._handle is not None:
            return
        openssl = _openssl()
        if openssl.OSSL_PROVIDER_available(None, b"tpm2"):
            return  # by OPENSSL_CONF, which names the TPM
        # Always set: else tpm2-tss takes the first TPM it finds, a simulator included.
        os.environ["TPM2OPENSSL_TCTI"] = tcti or os.environ.get("TPM2OPENSSL_TCTI") or DEFAULT_TCTI
        os.environ.setdefault("TSS2_LOG", "all+none")  # the use of the key reports the error
        # A new name each time: for a known name OpenSSL returns the old provider, whose connection to the TPM may have
        # ended.
        name = f"stationkey-tpm2-{self._opened}".encode()
        if self._name != name:
            start = self._narrowed(_entry(openssl))
            openssl.OSSL_PROVIDER_add_builtin(None, name, ctypes.cast(start, c_void_p))
            self._name = name
        # This order and this query: see docs/tls.md.
        openssl.OSSL_PROVIDER_load(None, b"default")
        self._handle = openssl.OSSL_PROVIDER_load(None, name)
        openssl.EVP_set_default_properties(None, b"?tpm2.signature=yes")
        if self._handle is None:
            raise BrokerError(
                "the TPM that has the private key for the broker cannot be reached",
                reason="tls_tpm_failed",
                hint="is it the TPM of --keystore, behind a resource manager, and may this user open it (group tss)?",
            )
        self._opened += 1

    def works(self) -> None:
        """Note that it has loaded a key."""
        self._worked = True

    def close(self) -> bool:
        """Give it up, to load it again: its connection to the TPM may have ended.

        OpenSSL keeps a connection that still works until the process ends. A resource manager has few connections, so
        a provider that never worked is given up only `MAX_VAIN` times.

        Returns:
            Whether it can be loaded again.
        """
        if self._handle is None:
            return True
        if self._opened >= MAX_OPENED or (not self._worked and self._vain >= MAX_VAIN):
            return False
        self._vain += not self._worked
        self._worked = False
        _openssl().OSSL_PROVIDER_unload(self._handle)
        self._handle = None
        return True

    def _narrowed(self, entry: Callable[..., int]) -> Any:
        """Return the provider's start function, with key import hidden."""

        def start(handle: int, core: int, functions: Any, context: Any) -> int:
            if not entry(handle, core, functions, context):
                return 0
            functions[0] = self._keep(_table(_Dispatch, self._hide(dict(_dispatch(functions[0]))).items()))
            return 1

        return self._keep(_Init(start))

    def _hide(self, functions: dict[int, int]) -> dict[int, int]:
        """Return the provider's functions, with the two replaced by which OpenSSL queries its algorithms."""
        ask, give_back = _Query(functions[_QUERY_OPERATION]), _Unquery(functions[_UNQUERY_OPERATION])
        shown: list[ctypes.Array[_Algorithm]] = []

        def query(context: int, operation: int, no_cache: Any) -> int | None:
            found: int | None = ask(context, operation, no_cache)
            if operation != _KEY_MANAGEMENT or found is None:
                return found
            if not shown:
                algorithms = [
                    (one.names, one.properties, self._without_import(one.implementation), one.description)
                    for one in _rows(ctypes.cast(found, POINTER(_Algorithm)), "names")
                ]
                shown.append(_table(_Algorithm, algorithms))
            give_back(context, operation, found)
            return ctypes.addressof(shown[0])

        def unquery(context: int, operation: int, algorithms: int) -> None:
            if operation != _KEY_MANAGEMENT:
                give_back(context, operation, algorithms)

        changed = {_QUERY_OPERATION: _Query(query), _UNQUERY_OPERATION: _Unquery(unquery)}
        self._kept += changed.values()
        return functions | {number: ctypes.cast(new, c_void_p).value or 0 for number, new in changed.items()}

    def _without_import(self, functions: Any) -> Any:
        left = [(number, function) for number, function in _dispatch(functions) if number not in _IMPORT]
        return self._keep(_table(_Dispatch, left))

    def _keep(self, what: Any) -> Any:
        self._kept.append(what)
        return what


TPM_PROVIDER: Final = TpmProvider()


def _rows(table: Any, field: str) -> Iterator[Any]:
    """Yield the rows of an OpenSSL table, up to the one without `field`."""
    number = 0
    while getattr(table[number], field):
        yield table[number]
        number += 1


def _dispatch(table: Any) -> list[tuple[int, int]]:
    return [(row.number, row.function) for row in _rows(table, "number")]


def _table(kind: type[Any], rows: Any) -> Any:
    """Return an OpenSSL table of the rows, with its end mark."""
    made = [kind(*row) for row in rows]
    return (kind * (len(made) + 1))(*made)


def _entry(openssl: ctypes.CDLL) -> Any:
    """Return the start function of tpm2-openssl."""
    try:
        directory = os.environ.get("OPENSSL_MODULES") or openssl.OPENSSL_info(_MODULES_DIRECTORY).decode()
        return _Init(("OSSL_provider_init", ctypes.CDLL(f"{directory}/tpm2.so")))
    except (OSError, AttributeError):
        raise _missing("install tpm2-openssl, or set OPENSSL_MODULES to where tpm2.so is") from None


def _openssl() -> ctypes.CDLL:
    """Return the library that Python's `ssl` uses; dlsym(3) on the module also searches its dependencies."""
    openssl = ctypes.CDLL(getattr(_ssl, "__file__", None))
    try:
        openssl.OPENSSL_info.restype = c_char_p
        openssl.OSSL_PROVIDER_available.argtypes = [c_void_p, c_char_p]
        openssl.OSSL_PROVIDER_add_builtin.argtypes = [c_void_p, c_char_p, c_void_p]
        openssl.OSSL_PROVIDER_load.argtypes = [c_void_p, c_char_p]
        openssl.OSSL_PROVIDER_load.restype = c_void_p
        openssl.OSSL_PROVIDER_unload.argtypes = [c_void_p]
        openssl.EVP_set_default_properties.argtypes = [c_void_p, c_char_p]
    except AttributeError:
        raise _missing("use a Python that has OpenSSL 3 as a shared library, such as Debian's") from None
    return openssl


def _missing(hint: str) -> ConfigurationError:
    return ConfigurationError(
        "the private key for the broker is in a TPM, and OpenSSL's tpm2 provider is missing",
        reason="tls_provider_missing",
        hint=f"{hint}; this is {ssl.OPENSSL_VERSION}",
    )
