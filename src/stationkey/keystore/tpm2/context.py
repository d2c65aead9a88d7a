"""The context of all commands, by ESAPI or as bytes: it submits a command again while the TPM says "later".

A TPM may answer with a warning instead of doing what it was asked: it is testing itself, its NV memory needs a pause, a
slot is taken for the moment [TPM 2.0 part 2, 6.6.3]. Nothing was done then, and the same command may succeed soon.
tpm2-tss resubmits for three of these codes, five times without a pause. Here each of them is tried again with growing
delays until the deadline of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_RH, TPM2_ST
from tpm2_pytss.types import TPM2B_PRIVATE, TPM2B_PUBLIC, TPMT_SIG_SCHEME, TPMT_SIGNATURE, TPMT_TK_HASHCHECK

from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2.commands import Commands
from stationkey.keystore.tpm2.slots import LOADING, Slots
from stationkey.system.backoff import Backoff

_FIRST: Final = 0.01
_LIMIT: Final = 1.0
_NO_TICKET: Final = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)  # the digest was made outside


class Context:
    """An ESAPI context with the methods of `ESAPI`.

    Args:
        tcti: name and configuration of a TCTI.
        wait: waits some seconds; False if there is no time.
    """

    def __init__(self, tcti: str, wait: Callable[[float], bool]) -> None:
        self._esapi = ESAPI(tcti)
        self._commands = Commands(self._esapi.tcti)
        self._wait = wait
        self._slots: Slots | None = None

    def keep_slots(self, directory: Path | None, *, alone: bool) -> None:
        """Unload objects of ended programs, and record loaded objects from now on: see `Slots`."""
        self._slots = Slots(self, directory, alone=alone)

    def close(self) -> None:
        """Close the context. Loaded objects stay loaded."""
        if self._slots is not None:
            self._slots.close()
        self._esapi.close()

    def __getattr__(self, name: str) -> Any:
        return partial(self._submit, name, getattr(self._esapi, name))

    # The commands of a request. Where they are authorised by a password, as bytes, they go out as bytes.

    def create_loaded(self, parent: Any, sensitive: Any, template: Any, session: Any) -> tuple[Any, bytes, bytes]:
        """Make a key; returns its handle, TPM2B_PRIVATE and TPM2B_PUBLIC."""
        if isinstance(session, bytes):
            parts = self._esapi.tr_get_tpm_handle(parent), sensitive.marshal(), template.marshal(), session
            made: tuple[int, bytes, bytes] = self._submit("create_loaded", self._commands.create_loaded, *parts)
            return made
        arguments = parent, sensitive, template, session
        handle, private, public = self._submit("create_loaded", self._esapi.create_loaded, *arguments)
        return handle, private.marshal(), public.marshal()

    def load(self, parent: Any, private: TPM2B_PRIVATE, public: TPM2B_PUBLIC, session: Any) -> Any:
        """Load a key; returns its handle."""
        if isinstance(session, bytes):
            parts = self._esapi.tr_get_tpm_handle(parent), private.marshal(), public.marshal(), session
            return self._submit("load", self._commands.load, *parts)
        return self._submit("load", self._esapi.load, parent, private, public, session)

    def sign(self, key: Any, digest: bytes, scheme: TPMT_SIG_SCHEME, session: Any) -> bytes:
        """Sign a digest that was made outside the TPM; returns a TPMT_SIGNATURE."""
        if isinstance(session, bytes):
            signature: bytes = self._submit("sign", self._commands.sign, key, digest, scheme.marshal(), session)
            return signature
        signed: TPMT_SIGNATURE = self._submit("sign", self._esapi.sign, key, digest, scheme, _NO_TICKET, session)
        return bytes(signed.marshal())

    def flush_context(self, handle: Any) -> None:
        """Unload an object or a session."""
        way = self._esapi if isinstance(handle, ESYS_TR) else self._commands
        self._submit("flush_context", way.flush_context, handle)

    def _submit(self, name: str, command: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run a command.

        Raises:
            TSS2_Exception: the TPM refused, or said "later" until there was no time left.
        """
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
        except TSS2_Exception as error:
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
            except TSS2_Exception as error:
                code = rc.code(error)
                if code in rc.FULL and slots is not None:
                    slots.relieve()
                    slots = None
                elif code not in rc.PASSING or not self._wait(backoff.next()):
                    raise
