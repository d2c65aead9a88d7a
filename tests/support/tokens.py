"""PKCS#11 tokens by other hands than SoftHSM's: opencryptoki's soft token, and tpm2-pkcs11 in a TPM simulator."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from namespaces import own_namespaces
from peers import Peer, ResourceManager, Swtpm, is_listening_at
from softhsm import PIN, SO_PIN

from stationkey.contract.profiles import Algorithm

_LABEL: Final = "other"
_SLOT: Final = 3
"""Of the soft token, in Debian's configuration."""


@dataclass(frozen=True)
class OtherToken:
    """A token that was initialised, of another module than SoftHSM.

    Attributes:
        uri: the key store in it.
        restart: powers it off and on.
        refused: the reason why no key is made for an algorithm.
        by_engine: for what OpenSSL can use it through its pkcs11 engine.
    """

    uri: str
    restart: Callable[[], None]
    refused: dict[Algorithm, str]
    by_engine: frozenset[Algorithm] = frozenset(Algorithm)


def _module(name: str) -> Path:
    [module] = Path("/usr/lib").glob(f"*/pkcs11/{name}.so")
    return module


def _run(*command: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _tool(module: Path, *arguments: str) -> str:
    """Use OpenSC's pkcs11-tool."""
    return _run("pkcs11-tool", "--module", str(module), *arguments)


def _initialised(module: Path, directory: Path, *slot: str) -> str:
    """Initialise a token and its PIN; return the URI of the key store."""
    _tool(module, *slot, "--init-token", "--label", _LABEL, "--so-pin", SO_PIN)
    _tool(module, *slot, "--init-pin", "--login", "--so-pin", SO_PIN, "--pin", PIN)
    (directory / "pin").write_text(PIN)
    (directory / "pin").chmod(0o600)
    return f"pkcs11:token={_LABEL}?module-path={module}&pin-source=file:{directory}/pin"


class _Pkcsslotd(Peer):
    """opencryptoki's daemon. The places of its socket and of its tokens are built in."""

    program = "pkcsslotd"

    def command(self) -> list[str]:
        return ["-f"]

    def listening(self) -> bool:
        # A connection that ends at once breaks it. The place that is built in may be said as /var/run.
        return any(
            is_listening_at(said)
            for path in Path("/run").rglob("pkcsslotd.socket")
            for said in (path, Path(f"/var{path}"))
        )

    def kill(self) -> None:
        """End it, and the processes that it has started or become."""
        super().kill()
        ours = Path("/proc/thread-self/ns/ipc").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if (process / "comm").read_text() == "pkcsslotd\n" and (process / "ns/ipc").readlink() == ours:
                    os.kill(int(process.name), signal.SIGKILL)
        for path in Path("/run").rglob("pkcsslotd*"):
            path.unlink()


@contextmanager
def opencryptoki(directory: Path) -> Iterator[OtherToken]:
    """The soft token, in namespaces of this thread's own."""
    places = (Path("/run"), Path("/dev/shm"), Path("/var/lib/opencryptoki"))
    with own_namespaces(empty=places):
        # Debian's daemon becomes this user, since 13.
        user = next((entry.pw_name for entry in pwd.getpwall() if entry.pw_name == "pkcsslotd"), "root")
        for made in ("/run/lock/opencryptoki", "/run/opencryptoki", "/var/lib/opencryptoki/swtok/TOK_OBJ"):
            Path(made).mkdir(parents=True)
            shutil.chown(made, user, "pkcs11")
        with _Pkcsslotd(directory) as daemon:
            module = _module("libopencryptoki")
            uri = _initialised(module, directory, "--slot", str(_SLOT))
            curves = "ECDSA" in _tool(module, "--slot", str(_SLOT), "--list-mechanisms")  # since 3.15
            missing = () if curves else (Algorithm.ECDSA_SHA256, Algorithm.ECDSA_SHA512)
            yield OtherToken(uri, daemon.restart, dict.fromkeys(missing, "algorithm_unsupported_by_token"))


@contextmanager
def tpm2_pkcs11(directory: Path) -> Iterator[OtherToken]:
    """A TPM's keys by PKCS#11, behind a resource manager as in a station. Its P-521 keys do not sign."""
    tpm = Swtpm(directory / "tpm")
    manager = ResourceManager(directory / "manager", tpm=tpm.tcti)

    def restart() -> None:
        manager.kill()
        tpm.kill()
        tpm.start()
        manager.start()

    with ExitStack() as running:
        for peer in (tpm, manager):
            running.enter_context(peer)
        # Each loss of power counts as a wrong value: after three the TPM would be locked.
        lockout = ("--setup-parameters", "--max-tries=100", "--recovery-time=9", "--lockout-recovery-time=9")
        _run("tpm2_dictionarylockout", "--tcti", manager.tcti, *lockout, environment=manager.environment)
        (directory / "store").mkdir()
        places = {"TPM2_PKCS11_STORE": f"{directory}/store", "TPM2_PKCS11_TCTI": manager.tcti}
        patch = running.enter_context(pytest.MonkeyPatch.context())
        for name, value in {**places, **manager.environment, "TPM2_PKCS11_LOG_LEVEL": "0"}.items():
            patch.setenv(name, value)
        uri = _initialised(_module("libtpm2_pkcs11"), directory)
        # It needs OpenSSL itself, and up to Debian 12 gets the engine for that. For RSA the engine wants a key that
        # decrypts.
        curves = int(_run("pkg-config", "--modversion", "tss2-esys").partition(".")[0]) >= 4
        by_engine = frozenset({Algorithm.ECDSA_SHA256} if curves else ())
        yield OtherToken(uri, restart, {Algorithm.ECDSA_SHA512: "pkcs11_refused"}, by_engine)
