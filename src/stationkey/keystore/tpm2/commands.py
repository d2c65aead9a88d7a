"""TPM commands as bytes over the TCTI: those of a request, where no session and no policy is involved.

ESAPI and its Python types cost more processor time than some of these commands cost the TPM: half of what there was to
gain in a request (``docs/performance.md``). What needs a session, a policy or attestation stays with ESAPI, on the same
TCTI. The two do not disturb each other: every call of either sends one command and reads its response before it
returns, all on one thread. Only handles differ: here they are the TPM's own [part 2, 7], and in ESAPI ESYS_TR.

Layout of commands and responses: TPM 2.0 part 1, 18; authorisation by password: part 1, 19.4, and part 2, 10.13.
"""

from __future__ import annotations

import hashlib
from typing import Final

from tpm2_pytss import TSS2_Exception
from tpm2_pytss.TCTI import TCTI

MALFORMED: Final = 0x70011
"""What ESAPI raises over a response that it cannot read."""

_NO_SESSIONS: Final = b"\x80\x01"
_SESSIONS: Final = b"\x80\x02"
"""TPM_ST_NO_SESSIONS and TPM_ST_SESSIONS [part 2, 6.9]."""
_LOAD: Final = 0x157
_SIGN: Final = 0x15D
_FLUSH_CONTEXT: Final = 0x165
_CREATE_LOADED: Final = 0x191
"""Command codes [part 2, 6.5.2]."""
_HEADER: Final = 10
_PASSWORD: Final = b"\x40\x00\x00\x09\x00\x00\x00"
"""TPM_RS_PW, an empty nonce, no attributes [part 1, 19.4]."""
_SHA256: Final = b"\x00\x0b"
_TRANSIENT: Final = 0x80
_NO_TICKET: Final = b"\x80\x24\x40\x00\x00\x07\x00\x00"
"""TPMT_TK_HASHCHECK of a digest that was made outside: TPM_ST_HASHCHECK, TPM_RH_NULL, no digest [part 2, 10.7.6]."""


class Commands:
    """The commands, each in one exchange, with marshalled structures.

    `auth` is the authorisation value of what the first handle names.

    Every method raises ``TSS2_Exception``: the TCTI failed, the TPM refused, or its answer is malformed. Warnings such
    as TPM_RC_RETRY are raised, too: `stationkey.keystore.tpm2.context` sends the command again.
    """

    def __init__(self, tcti: TCTI) -> None:
        self._tcti = tcti

    def create_loaded(self, parent: int, sensitive: bytes, template: bytes, auth: bytes) -> tuple[int, bytes, bytes]:
        """TPM2_CreateLoaded [part 3, 12.9] of a TPM2B_SENSITIVE_CREATE and a TPM2B_TEMPLATE.

        Returns:
            Handle, TPM2B_PRIVATE and TPM2B_PUBLIC.
        """
        answer = self._authorised(_CREATE_LOADED, parent, auth, sensitive + template, loads=True)
        private, public = answer.sized(), answer.sized()
        return answer.named(public), private, public

    def load(self, parent: int, private: bytes, public: bytes, auth: bytes) -> int:
        """TPM2_Load [part 3, 12.2]; returns the handle."""
        return self._authorised(_LOAD, parent, auth, private + public, loads=True).named(public)

    def sign(self, key: int, digest: bytes, scheme: bytes, auth: bytes) -> bytes:
        """TPM2_Sign [part 3, 20.2] of a digest by a TPMT_SIG_SCHEME; returns the TPMT_SIGNATURE."""
        answer = self._authorised(_SIGN, key, auth, _sized(digest) + scheme + _NO_TICKET)
        signature = answer.parameters
        if not signature.startswith(scheme):  # each begins with scheme and hash [part 2, 11.3.4]
            raise TSS2_Exception(MALFORMED)
        answer.parameters = signature[len(scheme) :]
        while answer.parameters:  # r and s of ECDSA, one number of RSASSA [part 2, 11.3.1 and 11.3.2]
            answer.sized()
        return signature

    def flush_context(self, handle: int) -> None:
        """TPM2_FlushContext [part 3, 28.4]."""
        if self._exchange(_NO_SESSIONS, _FLUSH_CONTEXT, handle.to_bytes(4, "big")):
            raise TSS2_Exception(MALFORMED)

    def _authorised(self, code: int, handle: int, auth: bytes, parameters: bytes, *, loads: bool = False) -> _Answer:
        password = _PASSWORD + _sized(auth)
        area = handle.to_bytes(4, "big") + len(password).to_bytes(4, "big") + password
        return _Answer(self._exchange(_SESSIONS, code, area + parameters), loads=loads)

    def _exchange(self, tag: bytes, code: int, rest: bytes) -> bytes:
        """Send a command, and return what follows the header of its response."""
        size = _HEADER + len(rest)
        self._tcti.transmit(tag + size.to_bytes(4, "big") + code.to_bytes(4, "big") + rest)
        response: bytes = self._tcti.receive()
        refusal = int.from_bytes(response[6:_HEADER], "big")
        if len(response) < _HEADER or int.from_bytes(response[2:6], "big") != len(response):
            raise TSS2_Exception(MALFORMED)
        if refusal:
            raise TSS2_Exception(refusal)
        if response[:2] != tag:
            raise TSS2_Exception(MALFORMED)
        return response[_HEADER:]


class _Answer:
    """The response to a command with one authorisation: handle, parameters, and the session's part [part 1, 18.2].

    Args:
        body: what follows the header.
        loads: whether a handle comes first.
    """

    def __init__(self, body: bytes, *, loads: bool) -> None:
        begin = 8 if loads else 4
        self._handle = body[: begin - 4]
        end = begin + int.from_bytes(body[begin - 4 : begin], "big")
        self.parameters = body[begin:end]
        session = body[end:]  # nonce and HMAC are empty, one byte of attributes is in between [part 1, 19.4]
        if len(self.parameters) != end - begin or session[:2] + session[3:] != bytes(4):
            raise TSS2_Exception(MALFORMED)

    def sized(self) -> bytes:
        """Take the next structure that begins with its size, a TPM2B."""
        end = 2 + int.from_bytes(self.parameters[:2], "big")
        taken, self.parameters = self.parameters[:end], self.parameters[end:]
        if len(taken) != end:
            raise TSS2_Exception(MALFORMED)
        return taken

    def named(self, public: bytes) -> int:
        """The handle, if the name that comes last is that of `public` [part 1, 16]."""
        name = _SHA256 + hashlib.sha256(public[2:]).digest()
        if self.parameters != _sized(name) or self._handle[0] != _TRANSIENT:
            raise TSS2_Exception(MALFORMED)
        return int.from_bytes(self._handle, "big")


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data
