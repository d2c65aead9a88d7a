"""What the tests of protected TPM keys have in common: terms with their secrets in files, and a second judge."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from peers import Swtpm
from tpm2_pytss import ESAPI

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import TpmTerms
from stationkey.contract.profiles import Algorithm
from stationkey.errors import KeyStoreError
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2 import capabilities
from stationkey.keystore.tpm2.keyfile import KeyFile
from stationkey.keystore.tpm2.store import Tpm2KeyStore

Opener = Callable[..., Tpm2KeyStore]
"""What the fixture `opened` gives: an `Openers`."""

P256 = Algorithm.ECDSA_SHA256
SECRET = "correct horse battery"
SECRETS = frozenset({"owner_auth", "srk_auth", "key_auth"})


class Openers:
    """Opens stores in one TPM by options of ``[tpm]``; each time the one before is closed, for a bare TPM serves one.

    Args:
        tpm: where the keys are.
        directory: for secrets; also the state directory.
    """

    def __init__(self, tpm: Swtpm, directory: Path) -> None:
        self._tpm = tpm
        self._directory = directory
        self._stores: list[Tpm2KeyStore] = []

    def __call__(self, *, tcti: str | None = None, **options: Any) -> Tpm2KeyStore:
        self.close()
        store = Tpm2KeyStore(tcti or self._tpm.tcti, terms=terms(self._directory, **options), state_dir=self._directory)
        self._stores.append(store)
        return store

    def close(self) -> None:
        for store in self._stores:
            store.close()


def write_secret(path: Path, secret: str | bytes) -> Path:
    path.write_bytes(secret if isinstance(secret, bytes) else secret.encode())
    path.chmod(0o600)
    return path


def terms(directory: Path, **options: Any) -> TpmTerms:
    """`TpmTerms` by options of ``[tpm]``, each secret given as it is and written to a file of its name."""
    for name in SECRETS & options.keys() - {name for name, value in options.items() if value == "generated"}:
        options[name] = SecretReference(str(write_secret(directory / name, options[name])))
    return TpmTerms(**options)


def sign(store: Tpm2KeyStore, key: KeyRef | None = None) -> KeyRef:
    """Sign with a key, or a new one, and verify; the key."""
    key = key or store.generate(P256)
    public = store.public_key(key)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    with store.signer(key) as private:
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        signature = private.sign(b"data", ec.ECDSA(hashes.SHA256()))
    public.verify(signature, b"data", ec.ECDSA(hashes.SHA256()))
    return key


def tool(tpm: Swtpm, *command: str, fails: bool = False) -> str:
    """Run a program of tpm2-tools on a TPM that nobody else uses; what it said."""
    done = subprocess.run(
        command,
        cwd=tpm.directory,
        env=os.environ | {"TPM2TOOLS_TCTI": tpm.tcti, "TSS2_LOG": "all+error"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def lockout_counter(tpm: Swtpm) -> int:
    """How many wrong authorisation values the TPM has counted."""
    said = tool(tpm, "tpm2_getcap", "properties-variable")
    line = next(line for line in said.splitlines() if line.startswith("TPM2_PT_LOCKOUT_COUNTER:"))
    return int(line.partition(":")[2].strip(), 16)


def refusal(command: Callable[[], object]) -> KeyStoreError:
    with pytest.raises(KeyStoreError) as caught:
        command()
    return caught.value


def reason_of(command: Callable[[], object]) -> str:
    """Why the store refused."""
    return refusal(command).reason


def sealed_files(directory: Path) -> list[Path]:
    return sorted((directory / "tpm").glob("auth-*"))


def leftovers(tpm: Swtpm) -> list[int]:
    """What a TPM holds that a client should have flushed: objects, and sessions loaded or saved."""
    esapi = ESAPI(tpm.tcti)
    try:
        return capabilities.handles(esapi, 0x80000000, 0x80FFFFFF) + capabilities.sessions(esapi)
    finally:
        esapi.close()


def sign_with_tools(tpm: Swtpm, key: KeyRef, *options: str, fails: bool = False) -> str:
    load_with_tools(tpm, key)
    (tpm.directory / "data").write_bytes(b"data")
    said = tool(tpm, "tpm2_sign", "-c", "key.ctx", "-g", "sha256", "-o", "signature", *options, "data", fails=fails)
    tool(tpm, "tpm2_flushcontext", "-t")
    return said


def load_with_tools(tpm: Swtpm, key: KeyRef) -> None:
    file = KeyFile.read(key.private)
    (tpm.directory / "public").write_bytes(file.public)
    (tpm.directory / "private").write_bytes(file.private)
    tool(tpm, "tpm2_load", "-C", f"{file.parent:#x}", "-u", "public", "-r", "private", "-c", "key.ctx")
    tool(tpm, "tpm2_flushcontext", "-t")
