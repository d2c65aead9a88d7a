"""Which key a ``certificate_installation_status`` means.

By ``private_key_path`` where it is given; else by the certificate itself, where the directory is known that Josev
installs to; else the newest. Where that leaves a doubt, nothing is guessed: `StatusUnfit` says what would settle it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stationkey.contract.active_names import Owner, owner_of
from stationkey.contract.messages import CertificateInstallationStatus
from stationkey.errors import StationKeyError
from stationkey.keystore import KEY_ID_LENGTH
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyState
from stationkey.x509.certificate import Chain, read_chain

MAX_CERTIFICATE_FILES: Final = 1024
MAX_CERTIFICATE_DIRECTORIES: Final = 256
MAX_CERTIFICATE_SIZE: Final = 64 * 1024
MAX_CERTIFICATES: Final = 4096
"""Bounds of what is read from the certificate directory, so that whoever may write there cannot keep the ledger's
thread from its work. Of a larger file nothing is read."""
MAX_PATH: Final = 4096
"""Characters of a ``private_key_path`` that is looked at; Linux knows no longer ones [limits.h, PATH_MAX]."""


class StatusUnfit(StationKeyError):
    """A status that fits no key. Nothing is guessed."""


@dataclass(frozen=True, slots=True)
class Found:
    """The key that a status means, and its certificate where that can be read."""

    key: KeyRecord
    chain: Chain | None = None


class KeyFinder:
    """Finds the key that a status means. Its methods run on the ledger's thread.

    Args:
        active_path: the directory ``active/``.
        certificate_dir: where Josev puts the certificates that it installs, or None.
    """

    def __init__(self, active_path: Path, certificate_dir: Path | None) -> None:
        self._active_path = active_path
        self._certificate_dir = certificate_dir

    def installed(self, ledger: Ledger, status: CertificateInstallationStatus) -> Found | None:
        """The pending key whose certificate was installed; None where that key is active already.

        Raises:
            StatusUnfit: none fits, or more than one may be meant.
        """
        certificate_type, evse_id = str(status.data.certificate_type), _evse_id(status)
        named = self._named(ledger, status)
        if isinstance(named, KeyRecord):
            if named.state is KeyState.ACTIVE:
                return None
            if named.state is not KeyState.PRE_ACTIVATION:
                raise StatusUnfit(f"key {named.key_id} is {named.state}, not pending", reason="status_fits_no_key")
            pending, evse_id = [named], named.owner[1]
        else:
            if named is not None:
                evse_id = named[1]
            pending = ledger.keys.pending(certificate_type, evse_id)
        # A key that is named is meant, whatever certificates there are for the active one.
        active = [] if isinstance(named, KeyRecord) else ledger.keys.active(certificate_type, evse_id)
        if self._certificate_dir is not None:
            return self._by_certificate(ledger, pending, active)
        if isinstance(named, KeyRecord):
            return Found(named)
        return _newest(_one_owner(pending, evse_id), active)

    def _by_certificate(self, ledger: Ledger, pending: list[KeyRecord], active: list[KeyRecord]) -> Found | None:
        """The pending key with the newest certificate [A02.FR.15].

        One that is older than the certificate of the active key of the same owner is not meant: it was passed over
        when that one was activated, and the message is a repeat.
        """
        chains = self._installed_chains(ledger, complete=False)
        in_use = {key.owner: chains[key.public] for key in active if key.public in chains}
        best: tuple[KeyRecord, Chain] | None = None
        for key in pending:
            chain = chains.get(key.public)
            if chain is None or (key.owner in in_use and chain.not_before < in_use[key.owner].not_before):
                continue
            if best is None or chain.not_before > best[1].not_before:
                best = key, chain
        if best is not None:
            return Found(*best)
        if in_use:
            return None
        raise StatusUnfit(
            f"none of {len(chains)} certificates in {self._certificate_dir} is for one of {len(pending)} pending keys",
            reason="certificate_of_another_key",
            hint="is it the directory that Josev installs to, and may this user read it?",
        )

    def failed(self, ledger: Ledger, status: CertificateInstallationStatus) -> KeyRecord:
        """The pending key whose certificate could not be installed.

        Raises:
            StatusUnfit: none fits, or more than one may be meant.
        """
        certificate_type, evse_id = str(status.data.certificate_type), _evse_id(status)
        named = self._named(ledger, status)
        if isinstance(named, KeyRecord):
            if named.state is not KeyState.PRE_ACTIVATION:
                raise StatusUnfit(f"key {named.key_id} is {named.state}, not pending", reason="status_fits_no_key")
            return named
        if named is not None:
            evse_id = named[1]
        pending = _one_owner(ledger.keys.pending(certificate_type, evse_id), evse_id)
        if not pending:
            raise StatusUnfit("no key of this kind is pending", reason="status_fits_no_key")
        return pending[-1]

    def deleted(self, ledger: Ledger, status: CertificateInstallationStatus) -> KeyRecord:
        """The key whose certificate was deleted.

        Where nothing names it, an active key that came after another is never the one: after a renewal it is the old
        certificate that Josev deletes, be its key kept for a while yet or destroyed since. To destroy the wrong key
        cannot be made good; to keep one too long can.
        """
        certificate_type, evse_id = str(status.data.certificate_type), _evse_id(status)
        named = self._named(ledger, status)
        if isinstance(named, KeyRecord):
            if named.state is KeyState.DESTROYED:
                raise StatusUnfit(f"key {named.key_id} is destroyed already", reason="status_fits_no_key")
            return named
        if named is not None:
            evse_id = named[1]
        active = _one_owner(ledger.keys.active(certificate_type, evse_id), evse_id)
        deactivated = _one_owner(ledger.keys.deactivated(certificate_type, evse_id), evse_id)
        if named is not None:
            deactivated = []  # the file under active/ is the active key's
        elif self._certificate_dir is not None:
            chains = self._installed_chains(ledger, complete=True)
            active = [key for key in active if key.public not in chains]
            deactivated = [key for key in deactivated if key.public not in chains]
        if deactivated:
            return deactivated[-1]
        if active and (named is not None or self._certificate_dir is not None or _only(ledger, active[-1])):
            return active[-1]
        raise StatusUnfit(
            "no key of this kind has a certificate that can have been deleted",
            reason="status_fits_no_key",
            hint="private_key_path in the message, or [josev] certificate_dir, say exactly which is meant",
        )

    def _named(self, ledger: Ledger, status: CertificateInstallationStatus) -> KeyRecord | Owner | None:
        """Whom ``private_key_path`` names: a key by its name, or the owner of a file under ``active/``; None if absent.

        Raises:
            StatusUnfit: it names neither.
        """
        if not isinstance(status.data.private_key_path, str):
            return None
        try:
            if len(status.data.private_key_path) > MAX_PATH:
                raise ValueError("longer than any path")  # noqa: TRY301 - what follows is said of all that names nothing
            named = self._owner_or_key(ledger, Path(status.data.private_key_path))
        except (OSError, ValueError):  # a path with NUL, too long, or in a folder that is closed to us
            named = None
        certificate_type, evse_id = named.owner if isinstance(named, KeyRecord) else named or ("", "")
        if certificate_type == status.data.certificate_type and _evse_id(status) in {None, evse_id}:
            return named
        raise StatusUnfit(
            "private_key_path names no key of this kind",
            reason="status_fits_no_key",
            hint=f"it is {self._active_path}/<certificate_type>[.<evse_id>].pem, or ends in the name of a key",
        )

    def _owner_or_key(self, ledger: Ledger, path: Path) -> KeyRecord | Owner | None:
        keys = ledger.keys.all(path.stem) if len(path.stem) == KEY_ID_LENGTH else []
        if len(keys) == 1:
            return keys[0]
        # Compared by realpath: Josev may know the file by a symbolic link.
        active_path = os.path.realpath(self._active_path)
        if os.path.realpath(path.parent) == active_path:
            return owner_of(path.name)
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            return owner_of(target.name) if str(target.parent) == active_path else None
        return None

    def _installed_chains(self, ledger: Ledger, *, complete: bool) -> dict[bytes, Chain]:
        """What the certificate directory holds: for each subjectPublicKeyInfo the newest certificate, with its chain.

        Args:
            ledger: whose own files are passed over, whatever link leads to them.
            complete: whether a file that cannot be read matters: its certificate would seem to be deleted.

        Raises:
            StatusUnfit: the directory, or a file in it that matters, cannot be read.
        """
        assert self._certificate_dir is not None
        found: list[Chain] = []
        own = ledger.database.own_files()
        try:
            for path in _files(self._certificate_dir):
                with suppress(FileNotFoundError if complete else OSError):
                    if chain := read_chain(_content(path, own)):
                        found += chain.seen_from_each()
                if len(found) > MAX_CERTIFICATES:
                    raise _too_much(self._certificate_dir, f"more than {MAX_CERTIFICATES} certificates")
        except OSError as error:
            raise StatusUnfit(
                f"{error.filename or self._certificate_dir} cannot be read: {error.strerror}",
                reason="certificate_dir_unreadable",
                hint="certificate_dir must exist, hold what Josev installs and no more, and be readable by this user",
            ) from None
        # Of two for one key the newer, and of two files with that one the longer chain.
        found.sort(key=lambda chain: (chain.not_before, len(chain.certificates)))
        return {chain.public: chain for chain in found}


def _files(directory: Path) -> list[Path]:
    """What may be a file in a directory and below it. Links to directories are not followed.

    Raises:
        OSError: a directory cannot be read, or there are too many.
    """
    files: list[Path] = []
    ahead, seen = [directory], 1
    while ahead:
        with os.scandir(ahead.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(Path(entry.path))
                    seen += 1
                elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                    files.append(Path(entry.path))
                if len(files) > MAX_CERTIFICATE_FILES:
                    raise _too_much(directory, f"more than {MAX_CERTIFICATE_FILES} files")
                if seen > MAX_CERTIFICATE_DIRECTORIES:
                    raise _too_much(directory, f"more than {MAX_CERTIFICATE_DIRECTORIES} directories")
    return sorted(files)


def _content(path: Path, own: frozenset[tuple[int, int]]) -> bytes:
    """The content of a regular file that is no larger than `MAX_CERTIFICATE_SIZE`; empty for anything else.

    A place is found first (O_PATH), which opens nothing; then what was found is looked at and opened, whatever has come
    into the place meanwhile. To open a device may do something, and a FIFO would keep us waiting. To close one of the
    ledger's own files would give up the locks that SQLite holds on it, and let the next command that ends take the
    write-ahead log away under the daemon [fcntl(2): all locks go with any descriptor of the process].

    Args:
        path: may be a link.
        own: device and inode of the files that are never opened.

    Raises:
        OSError: it cannot be read.
    """
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link in a circle
            return b""
        raise
    try:
        status = os.fstat(place)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CERTIFICATE_SIZE:
            return b""
        if (status.st_dev, status.st_ino) in own:
            return b""
        descriptor = _opened(place, path)
    finally:
        os.close(place)
    with os.fdopen(descriptor, "rb") as file:
        # A file of /proc says that it is empty, and is not; and some there have nothing yet, which is None.
        content = file.read(MAX_CERTIFICATE_SIZE + 1) or b""
    return content if len(content) <= MAX_CERTIFICATE_SIZE else b""


def _opened(place: int, path: Path) -> int:
    """A descriptor to read from what `place` is; never a `FileNotFoundError`, for it was there.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise OSError(errno.EOPNOTSUPP, "it needs /proc to be mounted", str(path)) from None
    except OSError as error:
        error.filename = str(path)
        raise


def _too_much(directory: Path, what: str) -> OSError:
    return OSError(errno.EFBIG, what, str(directory))


def _only(ledger: Ledger, key: KeyRecord) -> bool:
    """Whether no other certificate of the key's owner can be the one that was deleted."""
    return not ledger.keys.others_installed(key)


def _evse_id(status: CertificateInstallationStatus) -> str | None:
    return status.data.evse_id if isinstance(status.data.evse_id, str) else None


def _one_owner(keys: list[KeyRecord], evse_id: str | None) -> list[KeyRecord]:
    """The keys of the EVSE that is meant.

    A status need not name one, and Josev's first version of the message could not. Then the keys for no EVSE in
    particular are meant, or those of the only EVSE that has any.

    Raises:
        StatusUnfit: several EVSEs have keys, and none is named.
    """
    if evse_id is not None:
        return keys
    unnamed = [key for key in keys if key.evse_id is None]
    if unnamed:
        return unnamed
    if len({key.evse_id for key in keys}) > 1:
        raise StatusUnfit(
            "several EVSEs have keys of this kind, and the message names none",
            reason="status_fits_no_key",
            hint="evse_id in the message, or [josev] certificate_dir, say which is meant",
        )
    return keys


def _newest(pending: Iterable[KeyRecord], active: list[KeyRecord]) -> Found | None:
    """The newest pending key, if it is younger than the active one; None where there is only that one.

    An older one is left where it is: most likely the message is a repeat. A certificate that comes late for an older
    CSR can be told only by itself, in the certificate directory, or by private_key_path.
    """
    candidates = list(pending)
    if not candidates and not active:
        raise StatusUnfit("no key of this kind is pending", reason="status_fits_no_key")
    if not candidates:
        return None
    newest = candidates[-1]
    own = [key for key in active if key.owner == newest.owner]
    if own and newest.asked < own[-1].installed:
        return None
    return Found(newest)
