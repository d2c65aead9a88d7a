"""TPM commands as bytes over the TCTI: all those that need no session and no policy.

ESAPI and its Python types cost more processor time than some of these commands cost the TPM: half of what there was to
gain in a request (``docs/performance.md``), and 5 MiB. What needs a session, a policy or attestation stays with ESAPI
(`stationkey.keystore.tpm2.esapi`), on the same TCTI. The two do not disturb each other: every call of either sends one
command and reads its response before it returns, all on one thread. Only handles differ: here they are the TPM's own
[part 2, 7], and in ESAPI ESYS_TR.

Layout of commands and responses: TPM 2.0 part 1, 18; authorisation by password: part 1, 19.4, and part 2, 10.13.
"""

from __future__ import annotations

import hashlib
from typing import Final, Protocol

from stationkey.keystore.tpm2.return_codes import INITIALIZE, MALFORMED, TpmError
from stationkey.keystore.tpm2.templates import sized

_NO_SESSIONS: Final = b"\x80\x01"
_SESSIONS: Final = b"\x80\x02"
"""TPM_ST_NO_SESSIONS and TPM_ST_SESSIONS [part 2, 6.9]."""
_EVICT_CONTROL: Final = 0x120
_CREATE_PRIMARY: Final = 0x131
_STARTUP: Final = 0x144
_CREATE: Final = 0x153
_LOAD: Final = 0x157
_SIGN: Final = 0x15D
_FLUSH_CONTEXT: Final = 0x165
_READ_PUBLIC: Final = 0x173
_GET_CAPABILITY: Final = 0x17A
_READ_CLOCK: Final = 0x181
_TEST_PARMS: Final = 0x18A
_CREATE_LOADED: Final = 0x191
"""Command codes [part 2, 6.5.2]."""

OWNER: Final = 0x40000001
"""TPM_RH_OWNER [part 2, 7.4]."""
ALGORITHMS: Final = 0
HANDLES: Final = 1
PROPERTIES: Final = 6
CURVES: Final = 8
"""TPM_CAP [part 2, 6.12]."""
_ENTRY: Final = {ALGORITHMS: 6, HANDLES: 4, PROPERTIES: 8, CURVES: 2}
"""Bytes of an entry of each [part 2, 10.9]."""
_HEADER: Final = 10
_PASSWORD: Final = b"\x40\x00\x00\x09\x00\x00\x00"
"""TPM_RS_PW, an empty nonce, no attributes [part 1, 19.4]."""
_SHA256: Final = b"\x00\x0b"
_TRANSIENT: Final = 0x80
_NO_TICKET: Final = b"\x80\x24\x40\x00\x00\x07\x00\x00"
"""TPMT_TK_HASHCHECK of a digest that was made outside: TPM_ST_HASHCHECK, TPM_RH_NULL, no digest [part 2, 10.7.6]."""
_FROM_OUTSIDE: Final = bytes(2) + bytes(4)
"""No data and no registers go into the creation data: TPM2B_DATA, TPML_PCR_SELECTION."""


class Transport(Protocol):
    """See `stationkey.keystore.tpm2.tcti.Tcti`."""

    def transmit(self, command: bytes) -> None:
        """Send a command."""

    def receive(self) -> bytes:
        """Return the response to it."""
        ...


class Commands:
    """The commands, each in one exchange, with marshalled structures.

    `auth` is the authorisation value of what the first handle names.

    Every method raises `TpmError`: the TCTI failed, the TPM refused, or its answer is malformed. Warnings such as
    TPM_RC_RETRY are raised, too: `stationkey.keystore.tpm2.context` sends the command again.
    """

    def __init__(self, tcti: Transport) -> None:
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
        answer = self._authorised(_SIGN, key, auth, sized(digest) + scheme + _NO_TICKET)
        signature = answer.parameters
        if not signature.startswith(scheme):  # each begins with scheme and hash [part 2, 11.3.4]
            raise TpmError(MALFORMED)
        answer.parameters = signature[len(scheme) :]
        while answer.parameters:  # r and s of ECDSA, one number of RSASSA [part 2, 11.3.1 and 11.3.2]
            answer.sized()
        return signature

    def flush_context(self, handle: int) -> None:
        """TPM2_FlushContext [part 3, 28.4]."""
        _no_more(self._exchange(_NO_SESSIONS, _FLUSH_CONTEXT, handle.to_bytes(4, "big")))

    def create(self, parent: int, sensitive: bytes, public: bytes, auth: bytes) -> tuple[bytes, bytes]:
        """TPM2_Create [part 3, 12.1] of a TPM2B_SENSITIVE_CREATE and a TPM2B_PUBLIC.

        Returns:
            TPM2B_PRIVATE and TPM2B_PUBLIC.
        """
        answer = self._authorised(_CREATE, parent, auth, sensitive + public + _FROM_OUTSIDE)
        private, made = answer.sized(), answer.sized()
        answer.creation()
        _no_more(answer.parameters)
        return private, made

    def create_primary(self, sensitive: bytes, public: bytes, hierarchy: int, auth: bytes) -> tuple[int, bytes]:
        """TPM2_CreatePrimary [part 3, 24.1] of a TPM2B_SENSITIVE_CREATE and a TPM2B_PUBLIC.

        Returns:
            Handle and TPM2B_PUBLIC.
        """
        answer = self._authorised(_CREATE_PRIMARY, hierarchy, auth, sensitive + public + _FROM_OUTSIDE, loads=True)
        made = answer.sized()
        answer.creation()
        return answer.named(made), made

    def evict_control(self, hierarchy: int, key: int, persistent: int, auth: bytes) -> None:
        """TPM2_EvictControl [part 3, 28.5]: keep a key at a persistent handle."""
        answer = self._authorised(_EVICT_CONTROL, hierarchy, auth, persistent.to_bytes(4, "big"), more=key)
        _no_more(answer.parameters)

    # Those that need no authorisation.

    def startup(self) -> None:
        """TPM2_Startup [part 3, 9.3] with TPM_SU_CLEAR; another program may have sent it before."""
        try:
            _no_more(self._exchange(_NO_SESSIONS, _STARTUP, bytes(2)))
        except TpmError as error:
            if error.rc != INITIALIZE:
                raise

    def get_capability(self, capability: int, first: int, count: int) -> tuple[bool, bytes]:
        """TPM2_GetCapability [part 3, 30.2]; returns whether there is more, and the TPMS_CAPABILITY_DATA."""
        asked = b"".join(number.to_bytes(4, "big") for number in (capability, first, count))
        answer = self._exchange(_NO_SESSIONS, _GET_CAPABILITY, asked)
        if answer[:1] not in {b"\0", b"\1"} or answer[1:5] != asked[:4]:
            raise TpmError(MALFORMED)
        return answer[0] == 1, answer[1:]

    def read_public(self, handle: int) -> tuple[bytes, bytes]:
        """TPM2_ReadPublic [part 3, 12.4]; returns TPM2B_PUBLIC and name."""
        answer = _Parameters(self._exchange(_NO_SESSIONS, _READ_PUBLIC, handle.to_bytes(4, "big")))
        public, name, _qualified_name = answer.sized(), answer.sized(), answer.sized()
        _no_more(answer.parameters)
        return public, name[2:]

    def read_clock(self) -> tuple[int, int]:
        """TPM2_ReadClock [part 3, 29.1]; returns how often the TPM was reset, and restarted since."""
        answer = self._exchange(_NO_SESSIONS, _READ_CLOCK, b"")
        if len(answer) != 8 + 8 + 4 + 4 + 1:  # time, clock, the two, and whether the clock is safe [part 2, 10.11]
            raise TpmError(MALFORMED)
        return int.from_bytes(answer[16:20], "big"), int.from_bytes(answer[20:24], "big")

    def test_parms(self, parameters: bytes) -> None:
        """TPM2_TestParms [part 3, 30.3] of a TPMT_PUBLIC_PARMS: it is refused if the TPM cannot make such a key."""
        _no_more(self._exchange(_NO_SESSIONS, _TEST_PARMS, parameters))

    def _authorised(
        self, code: int, handle: int, auth: bytes, parameters: bytes, *, more: int | None = None, loads: bool = False
    ) -> _Answer:
        """Send a command whose first handle needs authorisation; `more` is a second handle, `loads` as in `_Answer`."""
        password = _PASSWORD + sized(auth)
        handles = handle.to_bytes(4, "big") + (b"" if more is None else more.to_bytes(4, "big"))
        area = handles + len(password).to_bytes(4, "big") + password
        return _Answer(self._exchange(_SESSIONS, code, area + parameters), loads=loads)

    def _exchange(self, tag: bytes, code: int, rest: bytes) -> bytes:
        """Send a command, and return what follows the header of its response."""
        size = _HEADER + len(rest)
        self._tcti.transmit(tag + size.to_bytes(4, "big") + code.to_bytes(4, "big") + rest)
        response = self._tcti.receive()
        refusal = int.from_bytes(response[6:_HEADER], "big")
        if len(response) < _HEADER or int.from_bytes(response[2:6], "big") != len(response):
            raise TpmError(MALFORMED)
        if refusal:
            raise TpmError(refusal)
        if response[:2] != tag:
            raise TpmError(MALFORMED)
        return response[_HEADER:]


class _Parameters:
    """The parameters of a response.

    Attributes:
        parameters: those not taken yet.
    """

    def __init__(self, parameters: bytes) -> None:
        self.parameters = parameters

    def sized(self) -> bytes:
        """Take the next structure that begins with its size, a TPM2B."""
        end = 2 + int.from_bytes(self.parameters[:2], "big")
        taken, self.parameters = self.parameters[:end], self.parameters[end:]
        if len(taken) != end:
            raise TpmError(MALFORMED)
        return taken


class _Answer(_Parameters):
    """The response to a command with one authorisation: handle, parameters, and the session's part [part 1, 18.2].

    Args:
        body: what follows the header.
        loads: whether a handle comes first.
    """

    def __init__(self, body: bytes, *, loads: bool) -> None:
        begin = 8 if loads else 4
        self._handle = body[: begin - 4]
        end = begin + int.from_bytes(body[begin - 4 : begin], "big")
        super().__init__(body[begin:end])
        session = body[end:]  # nonce and HMAC are empty, one byte of attributes is in between [part 1, 19.4]
        if len(self.parameters) != end - begin or session[:2] + session[3:] != bytes(4):
            raise TpmError(MALFORMED)

    def creation(self) -> None:
        """Pass over creation data, their hash, and a TPMT_TK_CREATION of tag, hierarchy and digest [part 2, 10.6.3]."""
        self.sized(), self.sized()
        self.parameters = self.parameters[6:]
        self.sized()

    def named(self, public: bytes) -> int:
        """The handle, if the name that comes last is that of `public` [part 1, 16]."""
        name = _SHA256 + hashlib.sha256(public[2:]).digest()
        if self.parameters != sized(name) or self._handle[0] != _TRANSIENT:
            raise TpmError(MALFORMED)
        return int.from_bytes(self._handle, "big")


def entries(capability: int, data: bytes) -> list[bytes]:
    """Return the entries of a TPMS_CAPABILITY_DATA, marshalled.

    Raises:
        TpmError: it is malformed, or of another capability.
    """
    size, count = _ENTRY[capability], int.from_bytes(data[4:8], "big")
    if data[:4] != capability.to_bytes(4, "big") or len(data) != 8 + size * count:
        raise TpmError(MALFORMED)
    return [data[at : at + size] for at in range(8, len(data), size)]


def _no_more(data: bytes) -> None:
    if data:
        raise TpmError(MALFORMED)
