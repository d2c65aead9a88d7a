"""A TPM without a resource manager, and a second program in it: what is unloaded there, and what is not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from peers import Swtpm, free_port
from tpm2_pytss import ESAPI
from tpm2_pytss.types import TPM2B_SENSITIVE_CREATE

from protection import P256, Opener, Openers, leftovers, refusal, sign
from stationkey.config.settings import TpmTerms
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2.slots import serves_one_program
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.openssl.check import setup_of
from wire import Wire

ROUNDS: Final = 5


@contextmanager
def tls_server(tpm: Swtpm, folder: Path, key: KeyRef, store: Tpm2KeyStore) -> Iterator[Callable[[], None]]:
    """``openssl s_server`` with a key of the TPM; makes a handshake with it, which fails if another key signed."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "secc")])
    now = datetime.now(UTC)
    with store.signer(key) as private:
        certificate = (
            x509.CertificateBuilder(name, name, store.public_key(key), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .sign(private, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )
    store.close()
    file = folder / "secc.pem"
    file.write_bytes(key.pem() + certificate)
    port = free_port()
    context = ssl.create_default_context(cadata=certificate.decode())
    context.check_hostname = False
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN

    def shake() -> None:
        with (
            socket.create_connection(("127.0.0.1", port), 30) as connection,
            context.wrap_socket(connection) as session,
        ):
            assert session.version()

    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(file), "-key", str(file)]
    environment = os.environ | setup_of(tpm.uri).write(folder / "openssl.cnf")
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        try:
            assert server.stdout is not None
            while (line := server.stdout.readline()) and b"ACCEPT" not in line:
                pass
            assert line, "it did not start"
            yield shake
        finally:
            server.kill()


@pytest.mark.parametrize("session", ["none", "hmac"])
def test_a_tls_server_on_a_bare_tpm_signs_with_its_own_key_beside_a_store(
    swtpm: Swtpm, opened: Openers, tmp_path: Path, session: str
) -> None:
    """With the key that is under ``active/``, whose name tells nobody who has loaded it."""
    store = opened(session=session)
    key = sign(store)
    with tls_server(swtpm, tmp_path, key, store) as shake:
        shake()
        for _ in range(3):
            store = opened(session=session)
            sign(store)
            shake()
            sign(store, key)
            shake()


def test_a_tls_server_that_began_after_a_store_that_was_killed_keeps_its_key(
    swtpm: Swtpm, opened: Openers, tmp_path: Path
) -> None:
    """The store that died had the very key loaded, and what it had is unloaded."""
    store = opened()
    key = sign(store)
    store.close()
    die(swtpm, tmp_path, key)
    assert len(leftovers(swtpm)) == 2  # the key and a session
    with tls_server(swtpm, tmp_path, key, Tpm2KeyStore(swtpm.tcti, guest=True)) as shake:
        store = opened()
        shake()
        sign(store)
        shake()
        store.close()
        assert len(leftovers(swtpm)) == 1  # the server's


# A store that is killed.


def _load_and_die(tcti: str, directory: Path, key: KeyRef) -> None:
    store = Tpm2KeyStore(tcti, terms=TpmTerms(session="hmac"), state_dir=directory)
    with store.signer(key):
        os.kill(os.getpid(), signal.SIGKILL)


def die(tpm: Swtpm, directory: Path, key: KeyRef) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_load_and_die, args=(tpm.tcti, directory, key))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_store_that_is_killed_with_a_key_loaded_takes_no_slot_from_the_next(
    swtpm: Swtpm, opened: Opener, tmp_path: Path
) -> None:
    """However often: there are three slots, and three sessions."""
    store = opened()
    key = sign(store)
    for _ in range(ROUNDS):
        store.close()
        die(swtpm, tmp_path, key)
        assert leftovers(swtpm)
        store = opened()
        sign(store, key)
    store.close()
    assert leftovers(swtpm) == []


def _make_keys(tcti: str, directory: Path) -> None:
    store = Tpm2KeyStore(tcti, terms=TpmTerms(session="hmac", pcrs=(0,)), state_dir=directory)
    while True:
        key = store.generate(P256)
        store.unload()
        store.check(key)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(0x191, id="CreateLoaded"),
        pytest.param(0x157, id="Load"),
        pytest.param(0x176, id="StartAuthSession"),
        pytest.param(0x131, id="CreatePrimary"),
    ],
)
def test_a_store_that_is_killed_within_a_command_takes_no_slot_from_the_next(
    swtpm: Swtpm, opened: Opener, tmp_path: Path, code: int
) -> None:
    """Before the TPM has told it the handle."""
    if code != 0x131:
        opened(session="hmac").generate(P256)
    for _ in range(ROUNDS):
        with Wire(swtpm) as wire:
            process = multiprocessing.get_context("spawn").Process(target=_make_keys, args=(wire.tcti, tmp_path))

            def kill(message: bytes) -> bytes:
                if wire.exchanges[-1].code == code:
                    os.kill(process.pid or 0, signal.SIGKILL)  # noqa: B023 - called in here only
                return message

            wire.responses = kill
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        if code == 0x131:
            continue
        assert leftovers(swtpm)
    store = opened(session="hmac")
    sign(store)
    store.close()
    assert leftovers(swtpm) == []


def test_what_others_have_loaded_in_a_bare_tpm_is_left_alone_and_told(swtpm: Swtpm, opened: Opener) -> None:
    store = opened()
    key = sign(store)
    store.close()
    with closing(ESAPI(swtpm.tcti)) as esapi:
        for _ in range(3):
            esapi.create_primary(TPM2B_SENSITIVE_CREATE(), "ecc")
    others = leftovers(swtpm)
    store = opened()
    store.within(0.1)
    error = refusal(lambda: sign(store, key))
    assert (error.reason, error.transient) == ("tpm_full", True)
    assert leftovers(swtpm) == others


def test_a_record_of_another_boot_or_of_another_object_unloads_nothing(
    swtpm: Swtpm, opened: Opener, tmp_path: Path
) -> None:
    store = opened()
    key = sign(store)
    store.close()
    die(swtpm, tmp_path, key)
    swtpm.kill()
    swtpm.start()
    with closing(Tpm2KeyStore(swtpm.tcti, guest=True)) as other, other.signer(key):
        loaded = leftovers(swtpm)
        sign(opened())
        opened.close()  # type: ignore[attr-defined] # an `Openers`
        assert leftovers(swtpm) == loaded


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"boot": 1}', b'{"boot": [1, 0], "loaded": 3}'])
def test_a_damaged_record_keeps_nothing_from_working(opened: Opener, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tpm").mkdir(mode=0o700)
    (tmp_path / "tpm" / "loaded-0").write_bytes(content)
    sign(opened())


def test_only_the_character_device_serves_one_program() -> None:
    told = {
        tcti: serves_one_program(tcti)
        for tcti in ("device:/dev/tpm0", "device:/dev/tpm12", "device:/dev/tpmrm0", "device", "device:", "tabrmd:")
    }
    assert [tcti for tcti, one in told.items() if one] == ["device:/dev/tpm0", "device:/dev/tpm12"]
    assert not serves_one_program("swtpm:host=127.0.0.1,port=2321")
