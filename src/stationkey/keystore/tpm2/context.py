"""The context of all commands, as bytes or by ESAPI: it submits a command again while the TPM says "later".

A TPM may answer with a warning instead of doing what it was asked: it is testing itself, its NV memory needs a pause, a
slot is taken for the moment [TPM 2.0 part 2, 6.6.3]. Nothing was done then, and the same command may succeed soon.
tpm2-tss resubmits for three of these codes, five times without a pause. Here each of them is tried again with growing
delays until the deadline of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2.commands import Commands
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.slots import LOADING, Slots
from stationkey.keystore.tpm2.tcti import Tcti
from stationkey.system.backoff import Backoff

if TYPE_CHECKING:
    from stationkey.keystore.tpm2.esapi import Esapi

_FIRST: Final = 0.001
_LIMIT: Final = 1.0
"""Seconds before a command is submitted again, at first and at most; doubled each time."""


class Context:
    """The commands, with marshalled structures, and the other methods of `ESAPI`.

    A command goes out as bytes where it is authorised by an authorisation value, given as bytes, or needs no
    authorisation and has no session. Its handles are then the TPM's own. Otherwise it goes by ESAPI, with its handles;
    ESAPI is loaded with the first such command.

    Args:
        tcti: name and configuration of a TCTI.
        wait: waits some seconds; False if there is no time.

    Every method raises `TpmError`: the TPM refused, or said "later" until there was no time left.
    """

    def __init__(self, tcti: str, wait: Callable[[float], bool]) -> None:
        self._tcti = Tcti(tcti)
        self._commands = Commands(self._tcti)
        self._loaded_esapi: Esapi | None = None
        self._wait = wait
        self._slots: Slots | None = None

    def keep_slots(self, directory: Path | None, *, alone: bool) -> None:
        """Unload objects of ended programs, and record loaded objects from now on: see `Slots`."""
        self._slots = Slots(self, directory, alone=alone)

    def close(self) -> None:
        """Close the context. Loaded objects stay loaded."""
        if self._slots is not None:
            self._slots.close()
        if self._loaded_esapi is not None:
            self._loaded_esapi.close()
        self._tcti.close()

    @property
    def _esapi(self) -> Esapi:
        if self._loaded_esapi is None:
            from stationkey.keystore.tpm2.esapi import Esapi  # noqa: PLC0415 - see there

            self._loaded_esapi = Esapi(self._tcti)
        return self._loaded_esapi

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._submit, name, getattr(self._esapi, name))

    # Authorised by a value, or by a session.

    def create(self, parent: Any, sensitive: bytes, public: bytes, session: Any) -> tuple[bytes, bytes]:
        """Make an object; returns TPM2B_PRIVATE and TPM2B_PUBLIC."""
        made: tuple[bytes, bytes] = self._submit("create", self._by(session).create, parent, sensitive, public, session)
        return made

    def create_loaded(self, parent: Any, sensitive: bytes, template: bytes, session: Any) -> tuple[Any, bytes, bytes]:
        """Make a key; returns its handle, TPM2B_PRIVATE and TPM2B_PUBLIC."""
        made: tuple[Any, bytes, bytes] = self._submit(
            "create_loaded", self._by(session).create_loaded, parent, sensitive, template, session
        )
        return made

    def create_primary(self, *arguments: Any, **session: Any) -> Any:
        """Make a primary key; returns its handle and TPM2B_PUBLIC. As ESAPI, or all of it marshalled, as `Commands`."""
        way = self._commands if isinstance(arguments[0], bytes) else self._esapi
        return self._submit("create_primary", way.create_primary, *arguments, **session)

    def evict_control(self, hierarchy: Any, key: Any, persistent: int, session: Any) -> Any:
        """Keep a key at a persistent handle; returns what ESAPI returns."""
        return self._submit("evict_control", self._by(session).evict_control, hierarchy, key, persistent, session)

    def load(self, parent: Any, private: bytes, public: bytes, session: Any) -> Any:
        """Load a key; returns its handle."""
        return self._submit("load", self._by(session).load, parent, private, public, session)

    def sign(self, key: Any, digest: bytes, scheme: bytes, session: Any) -> bytes:
        """Sign a digest that was made outside the TPM by a TPMT_SIG_SCHEME; returns a TPMT_SIGNATURE."""
        signature: bytes = self._submit("sign", self._by(session).sign, key, digest, scheme, session)
        return signature

    def _by(self, session: Any) -> Any:
        return self._commands if isinstance(session, bytes) else self._esapi

    # Without authorisation. A session authenticates the answer.

    def get_capability(self, capability: int, first: int, count: int, *session: Any) -> tuple[bool, bytes]:
        """Return whether there is more, and the TPMS_CAPABILITY_DATA."""
        way = self._esapi if session else self._commands
        found: tuple[bool, bytes] = self._submit(
            "get_capability", way.get_capability, capability, first, count, *session
        )
        return found

    def test_parms(self, parameters: bytes, *session: Any) -> None:
        """Ask whether the TPM can make keys by a TPMT_PUBLIC_PARMS."""
        self._submit("test_parms", (self._esapi if session else self._commands).test_parms, parameters, *session)

    def public_of(self, handle: int) -> tuple[bytes, bytes]:
        """Return TPM2B_PUBLIC and name of what is at a handle."""
        found: tuple[bytes, bytes] = self._submit("read_public", self._commands.read_public, handle)
        return found

    def boots(self) -> tuple[int, int]:
        """Return how often the TPM was reset, and restarted since."""
        found: tuple[int, int] = self._submit("read_clock", self._commands.read_clock)
        return found

    def start(self) -> None:
        """Send TPM2_Startup."""
        self._submit("startup", self._commands.startup)

    def flush_context(self, handle: Any) -> None:
        """Unload an object or a session."""
        way = self._commands if type(handle) is int else self._esapi
        self._submit("flush_context", way.flush_context, handle)

    def _submit(self, name: str, command: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run a command."""
        slots = self._slots
        if slots is not None and name == "flush_context":
            self._try(slots, command, *arguments)
            slots.unloaded(arguments[0])
            return None
        if slots is None or name not in LOADING:
            return self._try(slots, command, *arguments, **named)

        def load() -> Any:
            slots.before(name, arguments)
            return command(*arguments, **named)

        try:
            result = self._try(slots, load)
        except TpmError as error:
            if not rc.is_lost(error):  # else it may be loaded all the same
                slots.failed()
            raise
        match name:
            case "create_loaded":
                slots.loaded(result[0], result[2])
            case "create_primary":
                slots.loaded(result[0], result[1])
            case "load":
                slots.loaded(result, arguments[2])
            case _:
                slots.loaded(result)
        return result

    def _try(self, slots: Slots | None, command: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        backoff = Backoff(_FIRST, _LIMIT)
        while True:
            try:
                return command(*arguments, **named)
            except TpmError as error:
                code = rc.code(error)
                if code in rc.FULL and slots is not None:
                    slots.relieve()
                    slots = None
                elif code not in rc.PASSING or not self._wait(backoff.next()):
                    raise
