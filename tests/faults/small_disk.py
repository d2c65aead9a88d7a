"""A file system of one MiB of a test's own, to be filled, emptied and made read-only; it ends with the test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final, Self

from peers import Daemon

SIZE: Final = 1024 * 1024


class SmallDisk:
    """A tmpfs in a mount namespace of its own, which a shell keeps open: no right to mount elsewhere is needed.

    Args:
        path: where it is mounted, for who runs inside.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self._shell: subprocess.Popen[str]

    def __enter__(self) -> Self:
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        # In a chroot, / is no mount point whose propagation could be changed; so it is taken off by hand at the end.
        apart = subprocess.run(["unshare", *user, "--mount", "true"], capture_output=True, check=False).returncode == 0
        propagation = [] if apart else ["--propagation", "unchanged"]
        self._shell = subprocess.Popen(
            ["unshare", *user, "--mount", *propagation, "sh", "-e"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.run(f"mount -t tmpfs -o size={SIZE},mode=700 none '{self.path}'")
        except BaseException:
            self._shell.communicate()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.run(f"umount -l '{self.path}'")
        self._shell.communicate()  # the end of its input is its end

    def run(self, command: str) -> None:
        """Run a shell command inside."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command}\necho done\n")
        self._shell.stdin.flush()
        assert self._shell.stdout.readline() == "done\n", f"failed: {command}"

    @property
    def enter(self) -> list[str]:
        """What a command line begins with that is to run inside; the process stays the same."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self._shell.pid), "--mount", "--root", *user]

    @property
    def outside(self) -> Path:
        """The same directory, as it is seen from outside. Not for SQLite, which resolves the path."""
        return Path(f"/proc/{self._shell.pid}/root{self.path}")

    def fill(self) -> None:
        """Leave no room for one more page."""
        with (self.outside / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass

    def make_room(self) -> None:
        """Take the filling out again."""
        (self.outside / "filler").unlink()


class DaemonOnDisk(Daemon):
    """``stationkey serve`` on a small disk."""

    def __init__(self, directory: Path, disk: SmallDisk, *arguments: str) -> None:
        super().__init__(directory, *arguments)
        self.program, *self._enter = disk.enter

    def command(self) -> list[str]:
        return [*self._enter, Daemon.program, *super().command()]
