"""The judge: whether what is on disk, what was answered and what the key store can do are one and the same."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import load_pem_x509_csr
from peers import Daemon

from stationkey.contract.messages import GenerateCsrRequest
from stationkey.keystore import Sweeping, key_id_of, keystore_opener
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyState
from stationkey.x509.certificate import prove

STATE_FILES: Final = frozenset(
    {"lock", "ledger.sqlite3", "ledger.sqlite3-wal", "ledger.sqlite3-shm", "active", "tpm", "pkcs11"}
)
"""All that a state directory may hold."""


def key_of(csr: str) -> str:
    """The name of the key that a CSR is for."""
    public = load_pem_x509_csr(csr.encode()).public_key()
    return key_id_of(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def reasons_of(daemon: Daemon) -> list[str]:
    """The reasons that the run in hand gave for what it refused."""
    return [event["reason"] for event in daemon.events() if event["event"].startswith("rejected")]


def judge(state_dir: Path, keystore: str, accepted: Mapping[str, str]) -> None:
    """Hold a state directory that no daemon uses against the accepted answers that anyone received.

    Every CSR received is on record under its id, and its key, loaded from the ledger, signs. Every key on record has
    the answer and the event that say why it was made; but for those made ahead, which have no owner, and sign as well.
    No two CSRs are for one key. Every file is one that the documents name, and ``active/`` shows what the ledger says.
    """
    store = keystore_opener(keystore, allow_software_keys=True, state_dir=state_dir)()
    ledger = Ledger(state_dir / "ledger.sqlite3", make=False)
    try:
        for request_id, csr in accepted.items():
            answered = ledger.answers.find(request_id)
            assert answered is not None, f"{request_id} was answered and is not on record"
            assert answered.csr == csr
            reference = ledger.keys.ref(key_of(csr))
            assert reference is not None, f"{request_id} was answered with a key that is not on record"
            public_key = load_pem_x509_csr(csr.encode()).public_key()
            with store.signer(reference) as private_key:
                prove(private_key, public_key, b"is this the key?")
        assert len({key_of(csr) for csr in accepted.values()}) == len(accepted)
        for reference, _ in ledger.keys.made_ahead():
            with store.signer(reference) as private_key:
                prove(private_key, store.public_key(reference), b"is this the key?")
        keys = ledger.keys.all()
        for key in keys:
            history = ledger.keys.history(key.key_id)
            events = [event.event for event in history]
            if key.has_owner:
                assert events.count("CSR answered") == 1
                assert events.index("CSR answered") == events.count("made ahead") <= 1
                assert len(key.request_ids) == 1
            else:
                assert events == ["made ahead"]
                assert key.request_ids == ()
            assert history[-1].state == key.state
            assert (ledger.keys.ref(key.key_id) is None) == (key.state is KeyState.DESTROYED)
        wanted = ledger.keys.active_files()
    finally:
        ledger.close()
        store.close()
    assert _rows(state_dir, "PRAGMA integrity_check") == [("ok",)]
    assert _rows(state_dir, "SELECT count(*) FROM answer WHERE key_number NOT IN (SELECT number FROM key)") == [(0,)]
    assert {path.name for path in state_dir.iterdir()} <= STATE_FILES
    active = state_dir / "active"
    found = {path.name: path.read_bytes() for path in active.iterdir()} if active.exists() else {}
    found.pop(".lock", None)
    assert found == wanted


def keys_ahead(state_dir: Path) -> list[str]:
    """The keys made ahead that have no owner yet, oldest first."""
    return [
        row[0]
        for row in _rows(
            state_dir,
            "SELECT key_id FROM key WHERE certificate_type = '' AND state = 'pre-activation' ORDER BY number",
        )
    ]


def next_ahead(state_dir: Path, key_type: str) -> str:
    """The key made ahead that the next request gets: of its type, the one that expires first.

    A kill takes back some of the running time, by which keys expire: that need not be the oldest.
    """
    found = _rows(
        state_dir,
        "SELECT key_id FROM key WHERE certificate_type = '' AND state = 'pre-activation'"
        f" AND key_type = '{key_type}' ORDER BY due, number LIMIT 1",
    )
    return str(found[0][0])


def keys_with_an_owner(state_dir: Path) -> list[str]:
    """The keys that were made ahead and that a request has taken since, oldest first."""
    return [
        row[0]
        for row in _rows(
            state_dir,
            "SELECT key_id FROM key JOIN event ON key_number = number"
            " WHERE certificate_type > '' AND event = 'made ahead' ORDER BY number",
        )
    ]


def sweep(state_dir: Path, keystore: str) -> int:
    """Destroy in a token what the ledger does not know; return how many keys it knows."""
    store = keystore_opener(keystore, state_dir=state_dir)()
    ledger = Ledger(state_dir / "ledger.sqlite3", make=False)
    try:
        assert isinstance(store, Sweeping)
        living = ledger.keys.refs("pkcs11")
        store.sweep(living)
        return len(living)
    finally:
        ledger.close()
        store.close()


def events_brought(state_dir: Path, message_ids: Iterable[str]) -> dict[str, int]:
    """How many events each of these messages has brought to keys."""
    return {
        message_id: _rows(
            state_dir, "SELECT count(*) FROM event WHERE message_id = ? AND event != 'CSR answered'", message_id
        )[0][0]
        for message_id in message_ids
    }


def requests_on_record(state_dir: Path, requests: Iterable[GenerateCsrRequest]) -> set[str]:
    """Those of the requests whose ids the ledger has an answer for."""
    on_record = {row[0] for row in _rows(state_dir, "SELECT request_id FROM answer")}
    return {request.id for request in requests} & on_record


def _rows(state_dir: Path, statement: str, *arguments: object) -> list[Any]:
    connection = sqlite3.connect(state_dir / "ledger.sqlite3")
    try:
        return connection.execute(statement, arguments).fetchall()
    finally:
        connection.close()
