"""The TPM behind the ``tpm2:`` key store: one context, opened on first use, and reopened when lost.

When a TPM is lost, cleared or full: its return codes, and the reaction:

- The TCTI fails (``0xa000a``), and from then on every call on that context (``0x70007``), even when the TPM is back:
  the context is closed and reopened, and the command in hand is retried once.
- ``0x100`` (TPM_RC_INITIALIZE): the TPM was reset and waits for TPM2_Startup, which is sent.
- ``0x910`` (TPM_RC_REFERENCE_H0): it was reset and restarted, and loaded objects are gone: they are reloaded.
- ``0x902``, ``0x903`` and ``0x905`` (TPM_RC_OBJECT_MEMORY, TPM_RC_SESSION_MEMORY, TPM_RC_SESSION_HANDLES): the slots
  are full. Objects of programs that have certainly ended are flushed (`stationkey.keystore.tpm2.slots`); for others
  it waits.
- ``0x918`` (TPM_RC_REFERENCE_S0): as ``0x910``, of a session.
- ``0x128`` (TPM_RC_PCR_CHANGED): a register changed while a policy was being shown: it is shown again.
- A handle error on the SRK: the TPM was cleared meanwhile; a new context finds or creates the SRK.

- Every other warning (``0x922``, TPM_RC_RETRY, and its like) passes: `stationkey.keystore.tpm2.context` tries again.

A wrong authorisation value is not tried again, since each try may count for the TPM's dictionary-attack lockout.
But for what passes, nothing is retried more than once. All of it happens on the one thread that owns the store; a call
that never returns is that thread's to notice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from stationkey.config.settings import TpmTerms
from stationkey.errors import ConfigurationError, KeyStoreError, Scope
from stationkey.keystore.tpm2 import capabilities, errors, templates
from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2.commands import OWNER
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.pcr import Registers
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.sealed import Kept
from stationkey.keystore.tpm2.slots import serves_one_program

if TYPE_CHECKING:
    from stationkey.keystore.tpm2.sessions import Sessions

T = TypeVar("T")
log = logging.getLogger(__name__)

_MAX_AUTH: Final = 32
"""Bytes of an authorisation value: as many as the name algorithm, SHA-256, has [TPM 2.0 part 1, 13.3]."""

_PATIENCE: Final = 5.0
"""Seconds for which a busy command is retried, if the call has no deadline."""
_FOR_TRIES: Final = 0.9
"""The share of a call's time for retries. The rest lets the error reach the caller in time."""

_RESOURCE_MANAGERS: Final = ("device:/dev/tpmrm", "tabrmd")
_PERSISTENT: Final = range(0x81000000, 0x82000000)


def is_shared(tcti: str) -> bool:
    """Whether a resource manager is behind a TCTI, so that several programs can use the TPM at a time."""
    return tcti.startswith(_RESOURCE_MANAGERS)


class Device:
    """A TPM, with the storage keys in it that other keys hang on.

    Args:
        tcti: name and configuration of a TPM command transmission interface.
        terms: storage root key, authorisation values, policy and sessions.
        state_dir: the state directory, where some of these need a file of their own; see
            `stationkey.keystore.tpm2.sealed`.
        guest: unload nothing that others have loaded, as behind a resource manager.
    """

    def __init__(self, tcti: str, terms: TpmTerms, state_dir: Path | None, *, guest: bool = False) -> None:
        self._tcti = tcti
        self._terms = terms
        self._registers = Registers(terms.pcr_bank, terms.pcrs) if terms.pcrs else None
        self._kept = None if state_dir is None else Kept(state_dir)
        self._resource_manager = guest or is_shared(tcti)
        self._esapi: Context | None = None
        self._srk_auth = self._srk_name = b""
        self._begun: Sessions | None = None
        self._parents: set[int] = set()
        self._resources: dict[int, Any] = {}
        # Of each parent: whether the TPM took its authorisation value on this context, and the hash of what was given,
        # and of what was refused.
        self._accepted: set[int] = set()
        self._given: dict[int, bytes] = {}
        self._refused: dict[int, bytes] = {}
        self._give_up = threading.Event()
        self._until = 0.0  # when commands that pass are tried for the last time
        self._timed = False

    def unload(self) -> None:
        """Take out of the TPM what others may need the room for.

        A session that is kept costs nobody anything on a bare TPM. Behind a resource manager the table is everybody's,
        and one that lies there unused for long keeps the others from saving theirs (TPM_RC_CONTEXT_GAP).
        """
        if self._resource_manager and self._begun is not None and not self._abandoned:
            self._begun.close()

    def close(self) -> None:
        """Close the TPM, and leave nothing in it. The next call reopens it."""
        self.unload()
        if self._begun is not None and not self._abandoned:
            self._begun.close()
        self._forget()

    def abandon(self) -> None:
        """Never unload anything again, nor begin a command: see `stationkey.keystore.Abandonable`."""
        self._give_up.set()

    @property
    def _abandoned(self) -> bool:
        return self._give_up.is_set()

    def within(self, seconds: float) -> None:
        """Give the calls from now on so many seconds: see `stationkey.keystore.protocol.Timed`."""
        self._until = time.monotonic() + seconds * _FOR_TRIES
        self._timed = True

    def _wait(self, delay: float) -> bool:
        """Wait before a retry of a command; return False if no time is left."""
        return time.monotonic() + delay < self._until and not self._give_up.wait(delay)

    def _emptied(self) -> None:
        """The TPM has nothing loaded any more."""

    def _unknown(self) -> None:
        """It may be another TPM from now on."""

    def _with_device(self, command: Callable[[], T]) -> T:
        """Run `command` on an open context; where the TPM was lost, cleared, reset or full, mend that and try again."""
        self._refuse_if_abandoned()
        if not self._timed:
            self._until = time.monotonic() + _PATIENCE
        try:
            return self._attempt(command)
        except errors.SessionInDoubtError as doubt:
            try:
                return self._attempt(command)
            except errors.SessionInDoubtError:
                raise doubt.error from None

    def _attempt(self, command: Callable[[], T]) -> T:
        try:
            return self._try(command)
        except MemoryError:  # perhaps between a command and its response, or with something loaded and not recorded
            self._forget()
            raise

    def _try(self, command: Callable[[], T]) -> T:
        if self._esapi is not None:
            try:
                return command()
            except TpmError as error:
                self._refuse_if_abandoned()
                if not self._mend(error):
                    raise self._failure(error) from None
        try:
            if self._esapi is None:
                self._open()
            return command()
        except TpmError as error:
            self._refuse_if_abandoned()
            raise self._failure(error) from None

    @property
    def _context(self) -> Context:
        """The open context, inside `_with_device`."""
        assert self._esapi is not None
        return self._esapi

    def _refuse_if_abandoned(self) -> None:
        if self._abandoned:
            raise KeyStoreError(
                f"the TPM at {self._tcti} answered too late",
                reason="keystore_timeout",
                transient=True,
                scope=Scope.DEVICE,
            )

    def _mend(self, error: TpmError) -> bool:
        """Put the device in order after `error`; True where the command is worth another try."""
        code = rc.code(error)
        if code == rc.PCR_CHANGED:
            return True
        if code == rc.RESPONSE_ALTERED:
            return False
        if rc.is_lost(error) or code in {rc.INITIALIZE, rc.REFERENCE_H0, rc.REFERENCE_S0, rc.HANDLE_1}:
            self._forget()
            return True
        return False

    def _forget(self) -> None:
        """Give up the context. Its transport may be dead; there is nothing left to save on it."""
        esapi, self._esapi, self._begun = self._esapi, None, None
        self._parents.clear()
        self._resources.clear()
        self._accepted.clear()
        self._emptied()
        self._unknown()
        if esapi is not None:
            esapi.close()

    def _failure(self, error: TpmError) -> KeyStoreError:
        """The words for an error that stands."""
        code = f"{error.rc:#x}"
        if rc.code(error) in {rc.TCTI_VALUE, rc.TCTI_UNKNOWN}:
            return KeyStoreError(
                f"tpm2-tss cannot make use of the TCTI {self._tcti!r} ({code})",
                reason="tcti_invalid",
                hint="it is NAME:CONFIGURATION, and the library of that name must be installed; "
                "for example device:/dev/tpmrm0",
                scope=Scope.DEVICE,
            )
        if rc.code(error) == rc.RESPONSE_ALTERED:
            self.close()  # the two ends of the session have lost each other
            return errors.altered(code)
        if rc.is_lost(error):
            self._forget()
            return KeyStoreError(
                f"the TPM at {self._tcti} cannot be reached ({code})",
                reason="tpm_unreachable",
                hint="is it there, and may this user open it? Each request tries again",
                transient=True,
                scope=Scope.DEVICE,
            )
        return errors.of_code(error)

    def _open(self) -> None:
        self._refuse_file()
        esapi = self._esapi = Context(self._tcti, self._wait)
        try:
            self._prepare(esapi)
            if self._registers is not None:
                self._registers.read(esapi, *self._watching())  # whether there are any, before a key is made
            if self._terms.key_auth not in {None, "generated"}:
                self._secret("key_auth")  # the same
        except (TpmError, KeyStoreError):
            self.close()
            raise

    def _refuse_file(self) -> None:
        """Keep a mistaken path from costing a file: tpm2-tss would write its commands into whatever it can open."""
        name, _, path = self._tcti.partition(":")
        if name != "device" or not path:
            return
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - a TCTI's configuration is text, and Path would tidy it up
        except (OSError, ValueError):
            return  # tpm2-tss will say so
        if not stat.S_ISCHR(mode):
            raise KeyStoreError(
                f"{path} is not a device",
                reason="tcti_invalid",
                hint="a TPM is a character device, such as /dev/tpmrm0",
                scope=Scope.DEVICE,
            )

    def _prepare(self, esapi: Context) -> None:
        """Start the TPM and clear its slots where that is needed; find or make the SRK."""
        handle = self._terms.srk_handle
        try:
            # The first command of all: it finds out whether the TPM was started.
            present = capabilities.persistent(esapi, handle)
        except TpmError as error:
            if rc.code(error) != rc.INITIALIZE:
                raise
            esapi.start()
            present = capabilities.persistent(esapi, handle)
        if not self._resource_manager:
            directory = None if self._kept is None else self._kept.directory()
            esapi.keep_slots(directory, alone=serves_one_program(self._tcti))
        self._srk_auth = self._auth_of_parent(handle)
        public = self._find_srk(esapi) if present else self._make_srk(esapi)
        self._srk_name = _name(public)
        if self._terms.session != "none":
            self._pin(esapi, self._resource(handle), public)

    def _find_srk(self, esapi: Context) -> bytes:
        handle = self._terms.srk_handle
        public, name = esapi.public_of(handle)
        if name != _name(public):
            raise errors.altered("two answers differ")
        if wrong := templates.unlike_srk(public):
            raise KeyStoreError(
                f"the TPM holds {wrong} at {handle:#x}, where an ECC P-256 storage root key should be",
                reason="srk_unfit",
                hint=f"if nothing else needs it, remove it with: tpm2_evictcontrol -C o -c {handle:#x}",
                scope=Scope.STORE,
            )
        if not templates.attributes_of(public) & templates.NO_DA:
            # tpm2_createprimary makes it so by default; keys may hang on it, so it is used, and said.
            log.warning("the storage root key lacks noda: three power cuts in a row can lock the TPM for a while")
        return public

    def _make_srk(self, esapi: Context) -> bytes:
        """Make the SRK by the TCG's template, so that any other program would make the same, and keep it in the TPM."""
        handle, owner_auth = self._terms.srk_handle, self._secret("owner_auth")
        parts = templates.sensitive(auth=self._srk_auth), templates.srk()
        try:
            if self._terms.session != "none":
                from stationkey.keystore.tpm2.sessions import make_srk  # noqa: PLC0415 - with ESAPI

                return make_srk(esapi, self._terms.session, *parts, handle, owner_auth)
            primary, public = esapi.create_primary(*parts, OWNER, owner_auth)
            try:
                esapi.evict_control(OWNER, primary, handle, owner_auth)
            finally:
                esapi.flush_context(primary)
        except TpmError as error:
            if rc.code(error) in rc.WRONG_AUTH:
                raise errors.auth_refused(
                    "the owner hierarchy", "owner_auth", self._terms.owner_auth, f"{error.rc:#x}"
                ) from None
            raise
        return bytes(public)

    def _pin(self, esapi: Context, srk: Any, public: bytes) -> None:
        """Salt sessions only with the SRK of the first time: an attacker on the bus could substitute his own.

        It is the public part that tpm2-tss holds which must be right: the bus may tell it otherwise than us.
        """
        handle = self._terms.srk_handle
        assert self._kept is not None
        name = _name(public)
        if bytes(esapi.tr_serialize(srk)) != _serialised(handle, name, public):
            raise errors.altered("two answers differ")
        if self._kept.srk_name(handle, name) != name:
            raise KeyStoreError(
                f"the storage root key at {handle:#x} is not the one that it was: the TPM was cleared or exchanged, or "
                "something on the bus stands between it and this machine",
                reason="srk_changed",
                hint=f"if you know why, remove {self._kept.srk_file(handle)}, and start again",
                scope=Scope.STORE,
            )

    # Storage keys, and how they are authorised.

    @property
    def _sessions(self) -> Sessions:
        """The sessions of the open context; ESAPI is loaded with them."""
        if self._begun is None:
            from stationkey.keystore.tpm2.sessions import Sessions  # noqa: PLC0415 - see above

            salt = None if self._terms.session == "none" else self._resource(self._terms.srk_handle)
            self._begun = Sessions(self._context, self._terms.session, salt)
        return self._begun

    def _watching(self) -> tuple[Any, ...]:
        return () if self._terms.session == "none" else self._sessions.watching()

    def _secret(self, option: str) -> bytes:
        """The value of an option of ``[tpm]``; empty where it is not set."""
        reference = getattr(self._terms, option)
        if reference is None:
            return b""
        try:
            value: bytes = reference.read()
        except ConfigurationError as error:
            raise KeyStoreError(
                f"[tpm] {option}: {error.message}", reason="secret_unreadable", hint=error.hint, scope=Scope.STORE
            ) from None
        if len(value) > _MAX_AUTH:
            wrong = f"is longer than {_MAX_AUTH} bytes, which is as much as the TPM takes"
        elif value.endswith(b"\0"):
            wrong = "ends in a zero byte, which the TPM takes off"
        elif option == "key_auth" and (b"\0" in value or b"\n" in value):
            wrong = "has a zero byte or a line feed in it, where OpenSSL would take it to end"
        else:
            return value
        raise KeyStoreError(
            f"the authorisation value that [tpm] {option} names {wrong}", reason="auth_value_unfit", scope=Scope.STORE
        )

    def _auth_of_parent(self, handle: int) -> bytes:
        """The value of the SRK or of another parent, unless the TPM has refused this very value before."""
        value = self._secret("srk_auth") if handle == self._terms.srk_handle else b""
        self._given[handle] = hashlib.sha256(value).digest()
        if self._refused.get(handle) == self._given[handle]:
            raise errors.parent_refused(handle, self._terms, "not tried again, so that the TPM does not lock itself")
        return value

    @contextmanager
    def _under(self, handle: int, *, plain: bool = False) -> Iterator[Any]:
        """The session for a command that a parent authorises; where it is `plain`, the authorisation value itself."""
        try:
            yield self._password(handle) if plain else self._sessions.authorising()
        except TpmError as error:
            code = rc.code(error)
            if code not in rc.WRONG_AUTH:
                raise
            accepted, with_sessions = handle in self._accepted, self._terms.session != "none"
            self.close()
            if code == rc.AUTH_FAIL and not (accepted and with_sessions):  # it counts
                self._refused[handle] = self._given[handle]
            failure = (
                errors.altered(f"{error.rc:#x}")
                if accepted and with_sessions
                else errors.parent_refused(handle, self._terms, f"{error.rc:#x}")
            )
            if code == rc.BAD_AUTH and with_sessions:  # it does not count
                raise errors.SessionInDoubtError(failure) from None
            raise failure from None
        self._accepted.add(handle)

    def _password(self, handle: int) -> bytes:
        """The authorisation value of a parent. There is an option for that of the SRK only."""
        return self._srk_auth if handle == self._terms.srk_handle else b""

    def _parent(self, handle: int, *, plain: bool = False) -> Any:
        """A storage key by its persistent handle; where it is not `plain`, its ESYS_TR.

        The keys of another SRK than the present one go on being used.
        """
        if handle != self._terms.srk_handle and handle not in self._parents:
            self._auth_of_parent(handle)
            if handle not in _PERSISTENT or not capabilities.persistent(self._context, handle):
                raise KeyStoreError(
                    f"the key's parent at {handle:#x} is missing in the TPM",
                    reason="parent_missing",
                    hint="was the TPM cleared, or that key removed? Then ask for a new certificate",
                    scope=Scope.KEY,
                )
            self._parents.add(handle)
        return handle if plain else self._resource(handle)

    def _resource(self, handle: int) -> Any:
        """The ESYS_TR of a storage key, with its authorisation value."""
        if handle not in self._resources:
            resource = self._context.tr_from_tpmpublic(handle)
            if auth := self._password(handle):
                self._context.tr_set_auth(resource, auth)
            self._resources[handle] = resource
        return self._resources[handle]


def _name(public: bytes) -> bytes:
    """The name of an object by its TPM2B_PUBLIC.

    Raises:
        KeyStoreError: its name algorithm is invalid.
    """
    try:
        return templates.name_of(public)
    except ValueError:
        raise errors.altered("no hash algorithm") from None


def _serialised(handle: int, name: bytes, public: bytes) -> bytes:
    """What tpm2-tss holds of a key, as Esys_TR_Serialize writes it: handle, TPM2B_NAME, a 1 for "key", TPM2B_PUBLIC.

    All of it is compared: a longer public part could end like the right one.
    """
    return b"".join((handle.to_bytes(4, "big"), templates.sized(name), (1).to_bytes(4, "big"), public))
