"""What needs tpm2-pytss, which is loaded with this module: sessions, policies, attestation, sealed values.

Most stations need none of it, and it would cost them 5 MiB, and time at start. The rest is in
`stationkey.keystore.tpm2.commands`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.tcti import Tcti  # first: it says what tpm2-tss prints

# isort: split
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss._libtpm2_pytss import ffi
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_ECC, TPM2_RH, TPM2_ST, TPMA_OBJECT
from tpm2_pytss.TCTI import TCTI
from tpm2_pytss.types import (
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_TEMPLATE,
    TPMT_PUBLIC_PARMS,
    TPMT_SIG_SCHEME,
    TPMT_TK_HASHCHECK,
)

_NO_TICKET: Final = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)  # the digest was made outside


class Esapi:
    """An ESAPI context on an open TCTI, with the methods of `ESAPI`; those below take and return marshalled structures.

    Args:
        tcti: closed by its owner, after this.

    Every method raises `TpmError`.
    """

    def __init__(self, tcti: Tcti) -> None:
        self._esapi = ESAPI(TCTI(ffi.cast("TSS2_TCTI_CONTEXT *", tcti.address)))

    def close(self) -> None:
        """Close the context. Loaded objects stay loaded."""
        self._esapi.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._esapi, name)

        def called(*arguments: Any, **named: Any) -> Any:
            try:
                return method(*arguments, **named)
            except TSS2_Exception as error:
                raise TpmError(int(error.rc)) from None

        return called

    def create(self, parent: ESYS_TR, sensitive: bytes, public: bytes, session: ESYS_TR) -> tuple[bytes, bytes]:
        """Return TPM2B_PRIVATE and TPM2B_PUBLIC."""
        secret, template = _read(TPM2B_SENSITIVE_CREATE, sensitive), _read(TPM2B_PUBLIC, public)
        private, made, *_ = self.__getattr__("create")(parent, secret, template, session1=session)
        return private.marshal(), made.marshal()

    def create_loaded(
        self, parent: ESYS_TR, sensitive: bytes, template: bytes, session: ESYS_TR
    ) -> tuple[ESYS_TR, bytes, bytes]:
        """Return handle, TPM2B_PRIVATE and TPM2B_PUBLIC."""
        secret, wanted = _read(TPM2B_SENSITIVE_CREATE, sensitive), TPM2B_TEMPLATE(template[2:])
        handle, private, public = self.__getattr__("create_loaded")(parent, secret, wanted, session)
        return handle, private.marshal(), public.marshal()

    def load(self, parent: ESYS_TR, private: bytes, public: bytes, session: ESYS_TR) -> ESYS_TR:
        """Return the handle."""
        parts = _read(TPM2B_PRIVATE, private), _read(TPM2B_PUBLIC, public)
        return self.__getattr__("load")(parent, *parts, session)

    def sign(self, key: ESYS_TR, digest: bytes, scheme: bytes, session: ESYS_TR) -> bytes:
        """Sign by a TPMT_SIG_SCHEME; return the TPMT_SIGNATURE."""
        signature = self.__getattr__("sign")(key, digest, _read(TPMT_SIG_SCHEME, scheme), _NO_TICKET, session)
        return bytes(signature.marshal())

    def get_capability(self, capability: int, first: int, count: int, session: ESYS_TR) -> tuple[bool, bytes]:
        """Return whether there is more, and the TPMS_CAPABILITY_DATA."""
        more, found = self.__getattr__("get_capability")(capability, first, count, session)
        return bool(more), bytes(found.marshal())

    def test_parms(self, parameters: bytes, session: ESYS_TR) -> None:
        """Ask about a TPMT_PUBLIC_PARMS."""
        self.__getattr__("test_parms")(_read(TPMT_PUBLIC_PARMS, parameters), session)


def public_of(marshalled: bytes) -> TPM2B_PUBLIC:
    """Read a TPM2B_PUBLIC."""
    return _read(TPM2B_PUBLIC, marshalled)


def sensitive_of(marshalled: bytes) -> TPM2B_SENSITIVE_CREATE:
    """Read a TPM2B_SENSITIVE_CREATE."""
    return _read(TPM2B_SENSITIVE_CREATE, marshalled)


def marshalled_again(private: bytes, public: bytes) -> tuple[bytes, bytes]:
    """Return a TPM2B_PRIVATE and a TPM2B_PUBLIC as tpm2-tss reads them.

    Raises:
        TpmError: it cannot.
    """
    try:
        return _read(TPM2B_PRIVATE, private).marshal(), _read(TPM2B_PUBLIC, public).marshal()
    except TSS2_Exception as error:  # read, but with a value that is none
        raise TpmError(int(error.rc)) from None


def words_of(public: bytes, *, needed: int) -> str:
    """Return what the key of a TPM2B_PUBLIC is instead of an ECC P-256 key with the attributes `needed`."""
    area = _read(TPM2B_PUBLIC, public).publicArea
    attributes = area.objectAttributes
    if area.type != TPM2_ALG.ECC:
        return f"a key of type {str(area.type).upper()}"
    if area.parameters.eccDetail.curveID != TPM2_ECC.NIST_P256:
        return f"a key on the curve {str(area.parameters.eccDetail.curveID).upper().replace('NIST_P', 'P-')}"
    return "" if attributes & needed == needed else f"a key with the attributes {TPMA_OBJECT(attributes)}"


def _read(structure: Any, marshalled: bytes) -> Any:
    try:
        return structure.unmarshal(marshalled)[0]
    except TSS2_Exception as error:
        raise TpmError(int(error.rc)) from None
