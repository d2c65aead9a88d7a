"""A state directory with something in it, what can be planted there, and another user of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from parts import request
from stationkey.config.settings import Bounds
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateType
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.ledger import Ledger
from stationkey.system.state_dir import DATABASE_NAME
from stationkey.x509.csr import sign_csr, to_pem

NOBODY: Final = 65534
"""A user that has nothing to do with the station."""
AS_ROOT: Final = () if os.geteuid() == 0 else ("sudo", "--non-interactive", "--preserve-env=PYTHONPATH")
"""Who runs the tests is root, or may become root without a password: only root can be another user."""

PRECIOUS: Final = b"precious\n" * 64


def as_user(uid: int, *command: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run a command as another user, with none of the groups and rights of this one."""
    become = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--no-new-privs")
    return subprocess.run(
        [*AS_ROOT, *become, *command], capture_output=True, text=True, timeout=timeout, check=False, cwd="/"
    )


def a_ledger(state_dir: Path) -> str:
    """A state directory with one pending key; its name."""
    state_dir.mkdir(mode=0o700)
    store, asked = SoftwareKeyStore(), request()
    key = store.generate(Algorithm.ECDSA_SHA256)
    with store.signer(key) as private_key:
        csr = to_pem(sign_csr(asked, private_key, PROFILES[CertificateType.V2G_CERTIFICATE]))
    with closing(Ledger(state_dir / DATABASE_NAME)) as ledger:
        ledger.answers.record(asked, key, csr, now=0, running=0, due=10**12, bounds=Bounds())
    return key.key_id


def give_away(directory: Path, uid: int) -> None:
    """Give a directory and all that is in it to another user. Links are given, and not what they lead to."""
    subprocess.run([*AS_ROOT, "chown", "--recursive", "--no-dereference", f"{uid}:{uid}", str(directory)], check=True)


def take_back(directory: Path) -> None:
    """So that it can be looked at, and removed."""
    give_away(directory, os.geteuid())


class Elsewhere:
    """What must stay as it is: a file, a directory with a file in it, and their rights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "shadow"
        self.directory = folder / "etc"
        self.directory.mkdir(parents=True)
        for path in (self.file, self.directory / "passwd"):
            path.write_bytes(PRECIOUS)
            path.chmod(0o640)
        self._before = self._all()

    def _all(self) -> list[tuple[str, int, int, int, bytes]]:
        seen = []
        for path in [self.folder, *sorted(self.folder.rglob("*"))]:
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            seen.append((str(path), status.st_mode, status.st_uid, status.st_gid, content))
        return seen

    @property
    def untouched(self) -> bool:
        return self._all() == self._before


Plant = Callable[[Path, Elsewhere], None]


def _cleared(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


def _link_to_file(path: Path, elsewhere: Elsewhere) -> None:
    _cleared(path).symlink_to(elsewhere.file)


def _link_to_directory(path: Path, elsewhere: Elsewhere) -> None:
    _cleared(path).symlink_to(elsewhere.directory)


def _link_to_nothing(path: Path, elsewhere: Elsewhere) -> None:
    _cleared(path).symlink_to(elsewhere.directory / "not there")


def _link_to_itself(path: Path, _: Elsewhere) -> None:
    _cleared(path).symlink_to(path)


def _second_name(path: Path, elsewhere: Elsewhere) -> None:
    _cleared(path).hardlink_to(elsewhere.file)


def _fifo(path: Path, _: Elsewhere) -> None:
    os.mkfifo(_cleared(path), 0o600)


def _directory(path: Path, _: Elsewhere) -> None:
    _cleared(path).mkdir()


def _full_directory(path: Path, _: Elsewhere) -> None:
    _directory(path, _)
    (path / "file").write_bytes(PRECIOUS)


PLANTS: Final[dict[str, Plant]] = {
    "a link to a file": _link_to_file,
    "a link to a directory": _link_to_directory,
    "a link to nothing": _link_to_nothing,
    "a link to itself": _link_to_itself,
    "a second name of a file": _second_name,
    "a FIFO": _fifo,
    "a directory": _directory,
    "a directory with a file": _full_directory,
}
