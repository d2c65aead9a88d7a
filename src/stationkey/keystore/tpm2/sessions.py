"""Sessions: how commands are authorised, and how they are protected on their way to the TPM [TPM 2.0 part 1, 17 to 19].

A session's secret is a salt that only the TPM can decrypt, with its storage root key. From it come the keys of the HMAC
over each command and each response, and those that encrypt the first parameter. Starting one takes the TPM a
key agreement, so one of each kind is kept as long as the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_SESSION

from stationkey.config.settings import TpmSession
from stationkey.keystore.tpm2 import templates
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.esapi import public_of, sensitive_of
from stationkey.keystore.tpm2.return_codes import TpmError

_CIPHER: Final = "aes128cfb"
_KEPT: Final = TPMA_SESSION.CONTINUESESSION
_ENCRYPTING: Final = _KEPT | TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT


class Sessions:
    """The sessions of one ESAPI context.

    Args:
        esapi: the context.
        how: ``none``, ``hmac`` or ``encrypted``.
        salt: the loaded key that the salts are encrypted to; not needed for ``none``.
    """

    def __init__(self, esapi: Context, how: TpmSession, salt: Any = None) -> None:
        self._esapi = esapi
        self._how = how
        self._salt = salt if how != "none" else ESYS_TR.NONE
        self._hmac: Any = None
        self._policy: Any = None

    def authorising(self) -> Any:
        """The session that commands are authorised by; for ``none`` the password itself, in the clear."""
        if self._how == "none":
            return ESYS_TR.PASSWORD
        return self._with(_ENCRYPTING if self._how == "encrypted" else _KEPT)

    def watching(self) -> tuple[Any, ...]:
        """The session that authenticates the response to a command that needs no authorisation; for ``none``, none."""
        if self._how == "none":
            return ()
        return (self._with(_KEPT | TPMA_SESSION.AUDIT),)

    def _with(self, attributes: Any) -> Any:
        if self._hmac is None:
            self._hmac = self._start(TPM2_SE.HMAC)
        self._esapi.trsess_set_attributes(self._hmac, attributes)
        return self._hmac

    def policy(self) -> Any:
        """A policy session that nothing has been shown to yet."""
        if self._policy is None:
            self._policy = self._start(TPM2_SE.POLICY)
            self._esapi.trsess_set_attributes(self._policy, _ENCRYPTING if self._how == "encrypted" else _KEPT)
        else:
            self._esapi.policy_restart(self._policy)
        return self._policy

    def _start(self, kind: Any) -> Any:
        return self._esapi.start_auth_session(self._salt, ESYS_TR.NONE, kind, _CIPHER, TPM2_ALG.SHA256)

    def forget(self) -> None:
        """The TPM does not have them any more."""
        self._hmac = self._policy = None

    def close(self) -> None:
        """Flush them. A TPM that is lost holds none."""
        for session in (self._hmac, self._policy):
            if session is not None:
                with suppress(TpmError):
                    self._esapi.flush_context(session)
        self.forget()


@contextmanager
def before_the_srk(esapi: Context, how: TpmSession) -> Iterator[Any]:
    """Yield a session to create the storage root key, when no key exists yet to encrypt a salt to.

    The salt is encrypted to a primary key of the null hierarchy, which is new at each power-on and cannot be verified.
    So this protects secrets against a listener, not against an active attacker.
    """
    if how == "none":
        yield ESYS_TR.PASSWORD
        return
    primary = esapi.create_primary(sensitive_of(templates.sensitive()), public_of(templates.srk()), ESYS_TR.NULL)[0]
    try:
        sessions = Sessions(esapi, how, primary)
        try:
            yield sessions.authorising()
        finally:
            sessions.close()
    finally:
        esapi.flush_context(primary)


def make_srk(
    esapi: Context, how: TpmSession, sensitive: bytes, template: bytes, handle: int, owner_auth: bytes
) -> bytes:
    """Make the storage root key with a session, and keep it at a persistent handle; return its TPM2B_PUBLIC."""
    esapi.tr_set_auth(ESYS_TR.OWNER, owner_auth)
    with before_the_srk(esapi, how) as session:
        primary, public, *_ = esapi.create_primary(
            sensitive_of(sensitive), public_of(template), ESYS_TR.OWNER, session1=session
        )
        try:
            esapi.evict_control(ESYS_TR.OWNER, primary, handle, session)
        finally:
            esapi.flush_context(primary)
    return bytes(public.marshal())
