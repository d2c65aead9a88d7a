"""Files and directories as the doctor sees them: what is there, whose it is, and who may do what with it."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

Kind = Literal["file", "directory", "link", "character device", "other", "missing", "unseen"]
READ: Final = 4
WRITE: Final = 2
ENTER: Final = 1
_KINDS: Final[dict[int, Kind]] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "character device",
}


@dataclass(frozen=True, slots=True)
class User:
    """A user of this machine.

    Attributes:
        uid: its number; 0 may do everything.
        gid: its own group.
        groups: the others that it is in.
    """

    uid: int
    gid: int
    groups: frozenset[int] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        """Name, or number where there is none: as a command takes it."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except (KeyError, OverflowError):
            return str(self.uid)

    @classmethod
    def present(cls) -> User:
        """Who runs this."""
        return cls(os.geteuid(), os.getegid(), frozenset(os.getgroups()))

    @classmethod
    def named(cls, name: str) -> User | None:
        """A user by its name, or None where there is none."""
        try:
            entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
            return cls(entry.pw_uid, entry.pw_gid, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))
        except (KeyError, OSError, OverflowError):
            return None

    @classmethod
    def numbered(cls, uid: int) -> User:
        """A user by its number; one without a name is in no group."""
        return cls.named(str(uid)) or cls(uid, uid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What there is at a path.

    Attributes:
        kind: ``unseen`` where this user may not look.
        mode: permission bits.
        special: number of the device that a device file stands for.
        acl: whether it has an access control list, which is not read: it is taken to permit what it may.
        exposed: the first directory on the way in which other users could exchange what is there, or None.
        closed: the first directory on the way that the user asked about may not enter, or None.
    """

    path: Path
    kind: Kind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    modified: float = 0.0
    device: int = 0
    inode: int = 0
    special: int = 0
    acl: bool = False
    exposed: Path | None = None
    closed: Path | None = None

    @property
    def there(self) -> bool:
        """Whether something was seen."""
        return self.kind not in {"missing", "unseen"}

    @property
    def replaceable(self) -> Path | None:
        """Where every user may write, and so exchange what is there: this, or a directory on the way, or None."""
        return self.exposed or (self.path if self.mode & 0o002 else None)

    def barred(self, user: User, wanted: int) -> Path | None:
        """Return what keeps a user from what is `wanted`: a directory on the way, this, or nothing (None)."""
        return self.closed or (None if permits(self, user, wanted) else self.path)


def look_at(path: Path, *, follow: bool = False, user: User | None = None) -> Facts:
    """Look at what there is at a path, and for a `user` at the way there. Never raises."""
    closed = None if user is None else _closed_on_the_way(path, user)
    try:
        seen = path.stat() if follow else path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Facts(path=path, kind="missing", closed=closed)
    except (OSError, ValueError) as error:
        # A link to itself, and a name that is too long, lead nowhere for everybody, root included.
        nowhere = getattr(error, "errno", None) in {errno.ELOOP, errno.ENAMETOOLONG}
        return Facts(path=path, kind="missing" if nowhere else "unseen", closed=closed)
    return Facts(
        path=path,
        kind=_KINDS.get(stat.S_IFMT(seen.st_mode), "other"),
        mode=stat.S_IMODE(seen.st_mode),
        uid=seen.st_uid,
        gid=seen.st_gid,
        size=seen.st_size,
        modified=seen.st_mtime,
        device=seen.st_dev,
        inode=seen.st_ino,
        special=seen.st_rdev,
        acl=_has_acl(path),
        exposed=_exposed(path),
        closed=closed,
    )


def _has_acl(path: Path) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:  # of another user, or a file system without
        return False


def _exposed(path: Path) -> Path | None:
    for directory in path.absolute().parents:
        try:
            seen = directory.stat()
        except OSError:
            continue
        if seen.st_mode & stat.S_IWOTH and not seen.st_mode & stat.S_ISVTX:
            return directory
    return None


def permits(facts: Facts, user: User, wanted: int) -> bool:
    """Whether the mode lets a user do what is `wanted`, the way to it aside."""
    if user.uid == 0 or facts.acl:
        return True
    if facts.uid == user.uid:
        given = facts.mode >> 6
    elif facts.gid == user.gid or facts.gid in user.groups:
        given = facts.mode >> 3
    else:
        given = facts.mode
    return given & wanted == wanted


def _closed_on_the_way(path: Path, user: User) -> Path | None:
    """The first directory on the way to `path` that a user may not enter, or None."""
    if user.uid == 0:
        return None
    for directory in reversed(path.absolute().parents):
        facts = look_at(directory, follow=True)
        if facts.kind == "directory" and not permits(facts, user, ENTER):
            return directory
    return None


def octal(mode: int) -> str:
    """``0640``."""
    return f"{mode:04o}"
