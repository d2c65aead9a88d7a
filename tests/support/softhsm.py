"""PKCS#11 tokens of SoftHSM for tests, and a module before it that fails or hangs on order."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from peers import Peer, is_listening_at

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "73519284"
SO_PIN = "87654321"


@cache
def _home() -> Path:
    """Where the tokens of this process are. SoftHSM takes its configuration from the environment."""
    home = Path(tempfile.mkdtemp(prefix="softhsm-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "tokens").mkdir()
    (home / "softhsm2.conf").write_text(f"directories.tokendir = {home}/tokens\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(home / "softhsm2.conf")
    return home


@cache
def _shim() -> Path:
    """The module of shim.c; root's, as a module has to be."""
    module = _home() / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", module, source, "-ldl"], check=True)
    # A copy: the module itself may be in use, and takes one C_Initialize.
    os.environ["SHIM_MODULE"] = str(shutil.copy(SOFTHSM, _home() / "behind-the-shim.so"))
    return module


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class _Server(Peer):
    """p11-kit's, which starts a process with SoftHSM for each that connects."""

    program = "p11-kit"

    def __init__(self, token: Token) -> None:
        super().__init__(token.directory / "server")
        self.label = token.label
        self.socket = self.directory / "socket"

    def command(self) -> list[str]:
        where = ("--provider", str(SOFTHSM), "--name", str(self.socket))
        return ["server", "--foreground", *where, f"pkcs11:token={self.label}"]

    def listening(self) -> bool:
        return is_listening_at(self.socket)


@dataclass
class Token:
    """A token that was initialised.

    Attributes:
        label: of it.
        directory: for what is asked of it: the PIN in ``pin``, the orders and the log of the shim.
    """

    label: str
    directory: Path

    @classmethod
    def make(cls, label: str, directory: Path) -> Token:
        """Initialise a token; the directory belongs to it."""
        _home()
        _run("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", SO_PIN, "--pin", PIN)
        (directory / "pin").write_text(PIN)
        (directory / "pin").chmod(0o600)
        return cls(label, directory)

    @property
    def uri(self) -> str:
        """The key store in it."""
        return f"pkcs11:token={self.label}?module-path={SOFTHSM}&pin-source=file:{self.directory}/pin"

    @contextmanager
    def apart(self) -> Iterator[str]:
        """Keep it in a process of its own, which outlives one that uses it, as a device does; the key store in it.

        SoftHSM in a process that is killed while it logs in loses the token: it writes over the file with the PIN.
        """
        with pytest.MonkeyPatch.context() as patch, _Server(self) as server:
            patch.setenv("P11_KIT_SERVER_ADDRESS", f"unix:path={server.socket}")
            [client] = Path("/usr/lib").glob("*/pkcs11/p11-kit-client.so")
            yield self.uri.replace(str(SOFTHSM), str(client))

    @property
    def shimmed(self) -> str:
        """The key store in it, through the shim."""
        os.environ["SHIM_ORDERS"] = str(self.directory / "orders")
        os.environ["SHIM_LOG"] = str(self.directory / "log")
        return self.uri.replace(str(SOFTHSM), str(_shim()))

    def order(self, *lines: str) -> None:
        """Have the shim do something instead of what it is asked; nothing for no more of that."""
        unfinished = self.directory / "orders.new"
        unfinished.write_text("".join(f"{line}\n" for line in lines))
        unfinished.replace(self.directory / "orders")

    def calls(self, function: str) -> int:
        """How often the shim was called."""
        log = self.directory / "log"
        return log.read_text().split().count(function) if log.exists() else 0

    def objects(self) -> dict[tuple[str, str], str]:
        """What another program sees in it: its description by class and label."""
        told = self.tool("--list-objects")
        found: dict[tuple[str, str], str] = {}
        for part in re.split(r"\n(?=\S)", told):
            if label := re.search(r"label: +(.*)", part):
                found[part.split(" ")[0], label[1].strip()] = part
        return found

    def tool(self, *arguments: str) -> str:
        """Use OpenSC's pkcs11-tool on it."""
        return _run(
            "pkcs11-tool", "--module", str(SOFTHSM), "--token-label", self.label, "--login", "--pin", PIN, *arguments
        )

    def remove(self) -> None:
        """Delete every token of this label, with all that is in it."""
        for folder in self._folders():
            shutil.rmtree(folder)

    def present(self) -> bool:
        """Whether it is there."""
        return bool(self._folders())

    def hide(self, drawer: Path) -> Callable[[], None]:
        """Take it away; return the function that brings it back."""
        [folder] = self._folders()
        shutil.move(folder, drawer)

        def bring_back() -> None:
            shutil.move(drawer, folder)

        return bring_back

    def _folders(self) -> list[Path]:
        """SoftHSM's folders of the tokens with this label."""
        label = self.label.encode().ljust(32)
        return [path.parent for path in _home().glob("tokens/*/token.object") if label in path.read_bytes()]
