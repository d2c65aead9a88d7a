"""Read Josev's files: the certificates that it installed, and the target of a ``private_key_path``.

Another user's directory may hang, for example a mount whose server is gone. So the files are read on their own thread,
with a deadline, and the result, including what could not be read, is passed on as a value.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct, field, structs

from stationkey.contract.active_names import ActiveName, percent_encoded, read_name
from stationkey.contract.messages import CertificateInstallationStatus
from stationkey.system.threads import Worker
from stationkey.x509.certificate import Chain, Unparsed, read_certificates
from stationkey.x509.lenient import Certificate
from stationkey.x509.path import complete

_Result = TypeVar("_Result")

MAX_CERTIFICATE_FILES: Final = 1024
MAX_CERTIFICATE_DIRECTORIES: Final = 256
MAX_CERTIFICATE_SIZE: Final = 64 * 1024
MAX_CERTIFICATES: Final = 4096
"""Bounds of the certificate directory. A larger file is not read at all."""
MAX_UNREAD: Final = 64
"""Number of unreadable things that are kept apart."""
MAX_PATH: Final = 4096
"""Longest ``private_key_path`` in characters; Linux allows no longer one [limits.h, PATH_MAX]."""
LOOKS: Final = 3
"""Attempts to read a directory that changes meanwhile."""
DEADLINE: Final = 30.0
"""Seconds allowed for reading everything."""
STATION: Final = "{station}"
"""In the certificate directory of a site: the name of the station, percent-encoded."""


class Unread(Struct, frozen=True):
    """Something in the certificate directory that may hide a certificate."""

    path: str
    part: Unparsed

    def __str__(self) -> str:
        return f"{self.path}, because: {self.part.cause}"


class Snapshot(Struct, frozen=True):
    """Content of the certificate directory at one moment.

    Attributes:
        directory: its path.
        chains: by subjectPublicKeyInfo, the newest certificate for it, with its chain.
        unread: unreadable parts that may hide a certificate; empty if the whole directory was read.
        certificates: all certificates, those of CAs included.
    """

    directory: Path
    chains: Mapping[bytes, Chain] = field(default_factory=dict)
    unread: tuple[Unread, ...] = ()
    certificates: tuple[Certificate, ...] = ()

    def doubt(self, public: bytes) -> Unread | None:
        """Return the unreadable part that may hide a key's certificate; None if it was read, or is certainly absent."""
        if public in self.chains:
            return None
        return next((unread for unread in self.unread if unread.part.may_hold(public)), None)


class Look(Struct, frozen=True):
    """The result of reading for one status.

    Attributes:
        name: of the file under ``active/`` that the ``private_key_path`` leads to, or None.
        not_followed: why the path could not be followed; else empty.
        certificates: the certificate directory; None if unknown or not needed.
    """

    name: ActiveName | None = None
    not_followed: str = ""
    certificates: Snapshot | None = None


class JosevFiles:
    """Reads Josev's files for one status at a time.

    Args:
        active_path: the directory ``active/``.
        certificate_dir: where Josev puts the certificates that it installs, or None. In a site it contains `STATION`;
            else it is not known whose certificates are in it, and it is not used for any station.
        own: device and inode of the ledger's files, which are never opened.
        deadline: seconds allowed for one status.
        worker: makes the thread.
    """

    def __init__(
        self,
        active_path: Path,
        certificate_dir: Path | None,
        own: frozenset[tuple[int, int]] = frozenset(),
        *,
        deadline: float = DEADLINE,
        worker: type[Worker] = Worker,
    ) -> None:
        self._active_path = active_path
        self._certificate_dir = certificate_dir
        self._own = own
        self._deadline = deadline
        self._worker = worker("josev-files")
        self._reading: Future[Any] | None = None
        self._turn = asyncio.Lock()

    async def look(self, status: CertificateInstallationStatus, station: str = "") -> Look:
        """Read what a station's status needs, on a thread. Never raises: the value names what cannot be read."""
        path, directory = _path_of(status), self._needed(status, station)
        if path is None and directory is None:
            return Look()
        try:
            return await self._on_thread(partial(self.read, status, station))
        except TimeoutError:
            cause = f"no answer within {self._deadline:g} s"
        if directory is None:
            return Look(not_followed=cause)
        return Look(None, cause, Snapshot(directory, unread=(Unread(str(directory), Unparsed(cause)),)))

    def read(self, status: CertificateInstallationStatus, station: str = "") -> Look:
        """Read what a station's status needs; may block."""
        path, directory = _path_of(status), self._needed(status, station)
        name = None if path is None else self._name(path)
        return Look(name, "", None if directory is None else read_directory(directory, self._own))

    def _needed(self, status: CertificateInstallationStatus, station: str) -> Path | None:
        """Return the certificate directory of a station if it decides which key is meant."""
        by_certificate = {"installed": True, "deleted": _path_of(status) is None}
        directory = self._certificate_dir if by_certificate.get(status.data.status) else None
        if directory is None or not station:
            return directory
        return Path(str(directory).replace(STATION, percent_encoded(station))) if STATION in str(directory) else None

    async def complete(self, chain: Chain, look: Look) -> tuple[Chain, str]:
        """Complete a chain from the certificate directory, on the thread: signatures may cost time (`path.complete`).

        The chain is returned unchanged if that takes longer than the deadline.
        """
        known = () if look.certificates is None else look.certificates.certificates
        try:
            return await self._on_thread(partial(complete, chain, known))
        except TimeoutError:
            return chain, ""

    async def _on_thread(self, read: Callable[[], _Result]) -> _Result:
        """Return the result of a call that may hang, in turn. While one hangs, no other is started.

        Raises:
            TimeoutError: it took longer than the deadline, or an earlier call hangs.
        """
        async with self._turn:
            if self._reading is not None and not self._reading.done():
                raise TimeoutError
            reading = self._reading = self._worker.submit(read)
            async with asyncio.timeout(self._deadline):
                return await asyncio.wrap_future(reading)

    def close(self) -> None:
        """End the thread as soon as its call returns."""
        self._worker.close(0)

    def _name(self, text: str) -> ActiveName | None:
        """Return the name of the file under ``active/`` that a path leads to."""
        if len(text) > MAX_PATH:
            return None
        path = Path(text)
        try:
            # Compared by realpath: Josev may know the file by a symbolic link.
            active_path = os.path.realpath(self._active_path)
            if os.path.realpath(path.parent) == active_path:
                return read_name(path.name)
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                return read_name(target.name) if str(target.parent) == active_path else None
        except (OSError, ValueError):  # a path with NUL, too long, or in a folder that is closed to us
            pass
        return None


def _path_of(status: CertificateInstallationStatus) -> str | None:
    path = status.data.private_key_path
    return path if isinstance(path, str) else None


def read_directory(directory: Path, own: frozenset[tuple[int, int]] = frozenset()) -> Snapshot:
    """Read all certificates in a directory and below it. Links to files are followed, links to directories are not.

    If the directory changes meanwhile, it is read again, because a renamed file could be missed under both names.

    Args:
        directory: where Josev installs certificates.
        own: device and inode of the files that are never opened.
    """
    for _ in range(LOOKS):
        reading = _Reading(directory, own)
        snapshot = reading.snapshot()
        if not reading.changed():
            return snapshot
    return structs.replace(snapshot, unread=(*snapshot.unread, Unread(str(directory), Unparsed("keeps changing"))))


class _Reading:
    """One pass over a directory."""

    def __init__(self, directory: Path, own: frozenset[tuple[int, int]]) -> None:
        self._directory = directory
        self._own = own
        self._unread: list[Unread] = []
        self._folders: set[tuple[int, int]] = set()
        self._files: dict[Path, int] = {}
        self._certificates: list[Certificate] = []
        self._stable = True

    def snapshot(self) -> Snapshot:
        """Read every file that is listed."""
        chains: list[Chain] = []
        try:
            self._list()
            for path in sorted(self._files):
                chains += self._chains(path)
                if len(self._certificates) > MAX_CERTIFICATES:
                    raise _too_much(f"{MAX_CERTIFICATES} certificates")
        except _TooMuchError as error:
            self._doubt(self._directory, Unparsed(str(error)))
            chains = []
        # For one key the newer certificate, and of two files with that one the longer chain.
        chains.sort(key=lambda chain: (chain.not_before, len(chain.certificates)))
        unread = self._unread[:MAX_UNREAD]
        if len(self._unread) > MAX_UNREAD:
            unread.append(Unread(str(self._directory), Unparsed(f"more than {MAX_UNREAD} files that cannot be read")))
        by_key = {chain.public: chain for chain in chains}
        return Snapshot(self._directory, by_key, tuple(unread), tuple(self._certificates))

    def changed(self) -> bool:
        """Return whether a file was added, removed or written meanwhile."""
        if not self._stable:
            return True
        again = _Reading(self._directory, self._own)
        try:
            again._list()
        except _TooMuchError:
            return False  # it was too much the first time, or will be the next
        return again._files != self._files

    def _doubt(self, path: Path, part: Unparsed) -> None:
        self._unread.append(Unread(str(path), part))

    def _list(self) -> None:
        """List the files in all folders, each with its inode.

        Raises:
            _TooMuchError: too many files or directories.
        """
        ahead, seen = [self._directory], 1
        while ahead:
            folder = ahead.pop()
            try:
                status = folder.stat()
                self._folders.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            ahead.append(Path(entry.path))
                            seen += 1
                        else:
                            self._files[Path(entry.path)] = entry.inode()
                        if len(self._files) > MAX_CERTIFICATE_FILES:
                            raise _too_much(f"{MAX_CERTIFICATE_FILES} files")
                        if seen > MAX_CERTIFICATE_DIRECTORIES:
                            raise _too_much(f"{MAX_CERTIFICATE_DIRECTORIES} directories")
            except OSError as error:
                self._doubt(folder, Unparsed(error.strerror or str(error)))

    def _chains(self, path: Path) -> list[Chain]:
        """Return the certificates of a file, each as the leaf of a chain."""
        try:
            content = self._content(path)
        except FileNotFoundError:
            if not path.is_symlink():
                self._stable = False
            self._doubt(path, Unparsed("it vanished, or a link leads nowhere"))
            return []
        except OSError as error:
            self._doubt(path, Unparsed(error.strerror or str(error)))
            return []
        if content is None or (not content and path.name.startswith(".")):  # .keep and the like
            return []
        chain, unparsed = read_certificates(content)
        for part in unparsed:
            self._doubt(path, part)
        if chain is None:
            return []
        self._certificates += chain.certificates
        return structs.replace(chain, path=str(path)).seen_from_each()

    def _content(self, path: Path) -> bytes | None:
        """Return the content of a regular file; None for a link to a folder that is read anyway.

        The file is located by O_PATH, which opens nothing, then examined, then opened by that descriptor, so that it
        cannot be exchanged in between. Opening a device may have effects, and opening a FIFO blocks. Closing one of the
        ledger's own files would release the locks that SQLite holds on it, and the next command that ends would remove
        the write-ahead log under the daemon [fcntl(2): closing any descriptor releases all locks of the process].

        Raises:
            OSError: it cannot or must not be read.
        """
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            before = os.fstat(place)
            where = (before.st_dev, before.st_ino)
            if stat.S_ISDIR(before.st_mode):
                if where in self._folders:
                    return None
                raise OSError(errno.EISDIR, "a link to a directory, which is not followed")
            if not stat.S_ISREG(before.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if where in self._own:
                raise OSError(errno.EINVAL, "a file of the ledger")
            if before.st_size > MAX_CERTIFICATE_SIZE:
                raise _too_large()
            descriptor = _opened(place)
        finally:
            os.close(place)
        with os.fdopen(descriptor, "rb") as file:
            # A file of /proc has size 0 although it has content; reading one without content yet returns None.
            content = file.read(MAX_CERTIFICATE_SIZE + 1) or b""
            after = os.fstat(descriptor)
        if len(content) > MAX_CERTIFICATE_SIZE:
            raise _too_large()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            self._stable = False
        return content


class _TooMuchError(Exception):
    """The directory exceeds the bounds."""


def _too_much(what: str) -> _TooMuchError:
    return _TooMuchError(f"more than {what}")


def _too_large() -> OSError:
    return OSError(errno.EFBIG, f"larger than {MAX_CERTIFICATE_SIZE} bytes")


def _opened(place: int) -> int:
    """Return a descriptor to read the file of an O_PATH descriptor; never raise `FileNotFoundError`.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise OSError(errno.EOPNOTSUPP, "/proc is not mounted") from None
