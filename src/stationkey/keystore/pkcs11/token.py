"""A session with a token: the module is loaded once in a process, and one thread at a time uses it."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import pkcs11
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pkcs11 import TokenFlag

from stationkey.errors import ConfigurationError, KeyStoreError, Scope
from stationkey.keystore.pkcs11 import errors
from stationkey.keystore.pkcs11.uri import TokenUri
from stationkey.system.files import exchange, read_regular

T = TypeVar("T")

_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_SALT: Final = 16
_MARK: Final = 48
"""Bytes of the record of a refused PIN: the salt, and scrypt's output."""

_users: dict[Path, threading.Lock] = {}


def safe_module(path: Path) -> Path:
    """Return the real path of a module that only root can have put there.

    Raises:
        ConfigurationError: it is missing, or others than root can replace it.
    """
    try:
        module = path.resolve(strict=True)
        places = [(place, place.stat()) for place in (module, *module.parents)]
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"cannot use the PKCS#11 module {path}: {getattr(error, 'strerror', None) or 'too many links'}",
            reason="pkcs11_module_unsafe",
            hint="module-path is the path of the module of the token's maker",
        ) from None
    for place, status in places:
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_uid != 0 or (status.st_mode & _OTHERS and not sticky):
            raise ConfigurationError(
                f"the PKCS#11 module {path} is unsafe: others than root can write {place}",
                reason="pkcs11_module_unsafe",
                hint=f"chown root {place} && chmod go-w {place}",
            )
    if not stat.S_ISREG(places[0][1].st_mode):
        raise ConfigurationError(f"the PKCS#11 module {path} is not a file", reason="pkcs11_module_unsafe")
    return module


class Connection:
    """A token, with a session opened when it is needed.

    Args:
        uri: of the token.
        refused: file that remembers a PIN that was refused.

    A method raises `KeyStoreError` if the token cannot be used, `ConfigurationError` if the module or the PIN cannot.
    """

    def __init__(self, uri: TokenUri, refused: Path) -> None:
        self._uri = uri
        self._refused = refused
        self._module: Any = None
        self._session: Any = None
        self._lock: threading.Lock | None = None
        self._given_up = threading.Event()
        self.token: Any = None

    def give_up(self) -> None:
        """Send the module nothing more. May be called from any thread."""
        self._given_up.set()

    def call(self, doing: str, use: Callable[[Any], T], *, again: bool = True) -> T:
        """Use the session; once more with a new one if it was lost and `again` says that this does no harm.

        Args:
            doing: the function of PKCS #11, for the error.
            use: what to do with the session.
            again: whether `use` may be called twice.
        """
        try:
            return use(self._open())
        except errors.LOST as error:
            self._drop()
            if not again:
                raise errors.of(error, doing=doing) from None
        except pkcs11.PKCS11Error as error:
            raise errors.of(error, doing=doing) from None
        try:
            return use(self._open())
        except pkcs11.PKCS11Error as error:
            self._drop()
            raise errors.of(error, doing=doing) from None

    def close(self) -> None:
        """Close the session, and leave the module to others, who see the tokens that are there then."""
        if self._module is not None and not self._given_up.is_set():
            with suppress(pkcs11.PKCS11Error):
                self._module.finalize()
        self._module = self._session = self.token = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def names(self) -> dict[str, str]:
        """Return what names the token, by attribute of its URI [RFC 7512 2.3]."""
        token = self.token
        return {
            "token": token.label,
            "manufacturer": token.manufacturer_id,
            "serial": token.serial.decode(errors="replace"),
            "model": token.model,
        }

    def pin(self) -> bytes:
        """Return the PIN; empty if the token needs none."""
        return self._uri.pin.read().encode() if self._uri.pin is not None else b""

    def _open(self) -> Any:
        if self._given_up.is_set():
            raise KeyStoreError(
                "a call to the PKCS#11 module hangs", reason="pkcs11_failed", transient=True, scope=Scope.DEVICE
            )
        if self._session is None:
            module = self._loaded()
            self.token = self._found(module)
            self._session = self._logged_in()
        return self._session

    def _loaded(self) -> Any:
        path = safe_module(self._uri.module)
        if self._lock is None:
            lock = _users.setdefault(path, threading.Lock())
            if not lock.acquire(blocking=False):
                raise KeyStoreError(
                    f"another call to the PKCS#11 module {path} hangs",
                    reason="pkcs11_failed",
                    hint="the module is for one thread; each request retries",
                    transient=True,
                    scope=Scope.DEVICE,
                )
            self._lock = lock
        if self._module is None:
            try:
                self._module = pkcs11.lib(str(path))
            except pkcs11.PKCS11Error as error:
                if type(error) is not pkcs11.PKCS11Error:
                    raise  # the module was loaded, and does not work now
                raise ConfigurationError(
                    f"cannot load the PKCS#11 module {path}: {str(error) or type(error).__name__}",
                    reason="pkcs11_module_unsafe",
                ) from None
        return self._module

    def _found(self, module: Any) -> Any:
        wanted = self._uri.wanted
        tokens = []
        for slot in module.get_slots(token_present=True):
            with suppress(pkcs11.TokenNotPresent, pkcs11.TokenNotRecognised):
                self.token = token = slot.get_token()
                names = self.names()
                if all(names[name] == value for name, value in wanted.items()):
                    tokens.append(token)
        if len(tokens) > 1:
            raise KeyStoreError(
                f"{len(tokens)} tokens fit the key store's URI",
                reason="pkcs11_token_ambiguous",
                hint="name it by its serial number as well",
                scope=Scope.STORE,
            )
        if not tokens:
            raise pkcs11.TokenNotPresent
        return tokens[0]

    def _logged_in(self) -> Any:
        pin = None
        if self._uri.pin is not None:
            flags = self.token.flags
            if flags & TokenFlag.USER_PIN_LOCKED:
                raise pkcs11.PinLocked
            if flags & TokenFlag.USER_PIN_FINAL_TRY:
                raise errors.pin_kept_back("one more wrong PIN locks the token")
            pin = self._uri.pin.read()
            if was_refused(self._refused, pin):
                raise errors.pin_kept_back("the token refused it before")
        try:
            try:
                session = self.token.open(rw=True, user_pin=pin)
            except pkcs11.UserAlreadyLoggedIn:  # by another session, and a login is one for all of them
                session = self.token.open(rw=True)
        except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange):
            assert pin is not None
            self._remember(pin)
            self._drop()
            raise
        except pkcs11.PKCS11Error as error:
            self._drop()  # python-pkcs11 leaves the session open that it could not log in
            raise errors.of(error, doing="C_Login") from None  # no second try: a token may count any failure
        if pin is not None:
            self._refused.unlink(missing_ok=True)
        return session

    def _drop(self) -> None:
        """Forget the session, and have the module start again, so that it looks at its slots."""
        self._session = None
        if self._module is not None:
            with suppress(pkcs11.PKCS11Error):
                self._module.finalize()
            self._module = None

    def _remember(self, pin: str) -> None:
        salt = os.urandom(_SALT)
        self._refused.parent.mkdir(mode=0o700, exist_ok=True)
        exchange(self._refused, salt + _digest(pin, salt))


def was_refused(record: Path, pin: str) -> bool:
    """Return whether a token refused this PIN before, by the file that remembers it."""
    try:
        mark = read_regular(record, limit=_MARK, follow=False)
    except OSError:
        return False
    return len(mark) == _MARK and secrets.compare_digest(mark[_SALT:], _digest(pin, mark[:_SALT]))


def _digest(pin: str, salt: bytes) -> bytes:
    """Digest a PIN that is wrong, slowly: it may be close to the right one."""
    # Not hashlib's, which a daemon without TLS has no OpenSSL for: see `stationkey.system.spared`.
    return Scrypt(salt=salt, length=_MARK - _SALT, n=2**14, r=8, p=1).derive(pin.encode())
