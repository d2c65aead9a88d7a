"""Older databases: migrated whole or not at all, with all their content."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from recording import (
    CSR,
    REQUEST_ID,
    a_key,
    a_marked_key,
    bring,
    on_record,
    states,
    traces,
)

from parts import E1, V2G, C, O, dump
from stationkey.contract.active_names import Owner
from stationkey.errors import LedgerError
from stationkey.keystore import KeyRef
from stationkey.ledger import Ledger
from stationkey.ledger.hints import Hint
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.ledger.migrations import MIGRATIONS, SCHEMA_VERSION

pytest_plugins = ["ledgers"]


def make_version_1(path: Path, key: KeyRef) -> None:
    """A database as version 1 wrote it, with one key and the answer that carries its CSR."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(MIGRATIONS[0])
        connection.execute("PRAGMA user_version=1")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(
            "INSERT INTO key VALUES (?, 'software', 'secp256r1', 'v2g_certificate', ?, 'ECDSA_SHA256', 'CN', ?, ?,"
            " 'pre-activation', 1700000000000, ?, ?)",
            (key.key_id, E1, O, C, key.public, key.private),
        )
        connection.execute(
            "INSERT INTO answer VALUES (?, ?, x'00', ?, ?, 1700000000000, 1)",
            (REQUEST_ID.lower(), REQUEST_ID, key.key_id, CSR),
        )
        connection.execute("INSERT INTO meta VALUES ('mqtt_client_id', 'stationkey-1')")


def test_a_database_of_version_1_is_brought_up_to_date_with_all_that_is_in_it(path: Path) -> None:
    key = a_key()
    make_version_1(path, key)

    with closing(Ledger(path)) as ledger:
        (record,) = ledger.keys.all()
        assert (record.key_id, record.state, record.evse_id) == (key.key_id, KeyState.PRE_ACTIVATION, E1)
        assert record.request_ids == (REQUEST_ID,)
        assert ledger.keys.ref(key.key_id) == key
        assert [(event.event, event.at) for event in ledger.keys.history(key.key_id)] == [
            ("CSR answered", 1700000000000)
        ]
        answered = ledger.answers.find(REQUEST_ID.lower())
        assert answered is not None
        assert (answered.request_id, answered.csr, answered.key_id) == (REQUEST_ID, CSR, key.key_id)
        assert ledger.client_id() == "stationkey-1"
        assert ledger.retention.running == 0


def test_a_pending_key_of_version_1_gets_an_end_and_can_be_activated(path: Path) -> None:
    key = a_key()
    make_version_1(path, key)

    with closing(Ledger(path)) as ledger:
        assert ledger.keys.all()[0].due is None
        ledger.retention.adopt(pending_due=1000, grace_due=10)
        assert ledger.keys.all()[0].due == 1000
        ledger.retention.adopt(pending_due=2000, grace_due=10)
        assert ledger.keys.all()[0].due == 1000
        bring(ledger, key.key_id, KeyEvent.INSTALLED)
        assert states(ledger) == [KeyState.ACTIVE]


def _schema(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        version = connection.execute("PRAGMA user_version").fetchall()
        vacuum = connection.execute("PRAGMA auto_vacuum").fetchall()
        # Without SQLite's own, of which it leaves one behind that nobody uses.
        ours = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'"
        return version + vacuum + sorted(connection.execute(ours))


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_a_database_of_each_version_becomes_what_a_new_one_is(tmp_path: Path, version: int) -> None:
    old, new = tmp_path / "old.sqlite3", tmp_path / "new.sqlite3"
    with closing(sqlite3.connect(old)) as connection:
        for number in range(version):
            connection.executescript(MIGRATIONS[number])
        connection.execute(f"PRAGMA user_version={version}")

    Ledger(old).close()
    Ledger(new).close()

    assert _schema(old) == _schema(new)


@pytest.mark.parametrize("at", range(1, 12))
def test_a_migration_is_done_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    key = a_key()
    make_version_1(path, key)
    statements = MIGRATIONS[1].split(";\n")
    broken = ";\n".join([*statements[:at], "SELECT * FROM power_is_lost_here"])
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.database.MIGRATIONS", (MIGRATIONS[0], broken))
        with pytest.raises(LedgerError):
            Ledger(path)

    with closing(Ledger(path)) as ledger:
        assert ledger.keys.ref(key.key_id) == key
        assert len(ledger.keys.history(key.key_id)) == 1


def make_version_2(path: Path) -> dict[KeyState, KeyRef]:
    """A database as version 2 wrote it, with a key in each state; the keys."""
    keys = {state: a_key() for state in KeyState}
    seq = 0
    with closing(sqlite3.connect(path)) as connection, connection:
        for script in MIGRATIONS[:2]:
            connection.executescript(script)
        connection.execute("PRAGMA user_version=2")
        connection.execute("PRAGMA journal_mode=WAL")
        # Not in the order of their names: in that in which they were made.
        for number, (state, key) in enumerate(keys.items()):
            gone = state is KeyState.DESTROYED
            installed = state in {KeyState.ACTIVE, KeyState.DEACTIVATED, KeyState.DESTROYED}
            due = number if state in {KeyState.PRE_ACTIVATION, KeyState.DEACTIVATED} else None
            chain, not_after = ("chain", 9) if installed else (None, None)
            connection.execute(
                "INSERT INTO key VALUES (?, 'software', 'secp256r1', 'v2g_certificate', ?, 'ECDSA_SHA256', 'CN', ?, ?,"
                " ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(key.key_id, E1, O, C, state, number, key.public, None if gone else key.private),
                    *(due, number == 0, chain, not_after),
                ),
            )
            connection.execute(
                "INSERT INTO answer VALUES (?, ?, x'00', ?, ?, ?, ?, 77)",
                (f"id-{number}", f"ID-{number}", key.key_id, "" if gone else CSR, number, number > 0),
            )
        for key in keys.values():
            seq += 1
            connection.execute(
                "INSERT INTO event VALUES (?, ?, ?, 'CSR answered', 'pre-activation', '', 'ID')", (seq, key.key_id, seq)
            )
        for state, event in (
            (KeyState.DESTROYED, "installed"),
            (KeyState.DESTROYED, "deleted"),
            (KeyState.DEACTIVATED, "installed"),
            (KeyState.ACTIVE, "installed"),
            (KeyState.DEACTIVATED, "replaced"),
            (KeyState.COMPROMISED, "compromise reported"),
        ):
            seq += 1
            connection.execute(
                "INSERT INTO event VALUES (?, ?, ?, ?, ?, 'why', ?)",
                (seq, keys[state].key_id, seq, event, state, f"message {seq}"),
            )
        connection.execute("INSERT INTO rejection VALUES (3, 'id', 'reason', 'message', 4)")
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", [("running", "99"), ("mqtt_client_id", "stationkey-1")]
        )
    return keys


def test_a_database_of_version_2_is_brought_up_to_date_with_all_that_is_in_it(path: Path) -> None:
    keys = make_version_2(path)

    with closing(Ledger(path)) as ledger:
        records = ledger.keys.all()
        assert [(key.key_id, key.state) for key in records] == [(key.key_id, state) for state, key in keys.items()]
        assert [ledger.keys.ref(key.key_id) for key in keys.values()] == [*list(keys.values())[:-1], None]
        assert [key.due for key in records] == [0, None, 2, None, None]
        assert [key.failed for key in records] == [True, False, False, False, False]
        assert [key.chain for key in records] == [None, "chain", "chain", None, "chain"]
        assert [key.not_after for key in records] == [None, 9, 9, None, 9]
        assert [key.request_ids for key in records] == [(f"ID-{number}",) for number in range(5)]
        assert [key.asked for key in records] == [1, 2, 3, 4, 5]
        assert [key.installed for key in records] == [0, 9, 8, 0, 6]
        assert {(key.owner, key.created_at >= 0, key.common_name) for key in records} == {
            (Owner("", V2G, E1), True, "CN")
        }
        assert [(event.seq, event.event, event.message_id) for event in ledger.keys.history(records[2].key_id)] == [
            (3, "CSR answered", "ID"),
            (8, "installed", "message 8"),
            (10, "replaced", "message 10"),
        ]
        assert [answered.request_id for answered in ledger.answers.undelivered()] == ["ID-0"]
        assert ledger.answers.find("id-4") is not None
        assert ledger.transitions.seen("message 8")
        assert not ledger.transitions.seen("ID")
        assert (ledger.retention.running, ledger.client_id()) == (99, "stationkey-1")
        assert ledger.keys.others_installed(ledger.keys.all(keys[KeyState.ACTIVE].key_id)[0])
        assert "INSERT INTO \"rejection\" VALUES(3,'id','reason','message',4,'generate_csr','');" in dump(path)
        bring(ledger, records[0].key_id, KeyEvent.EXPIRED)
        assert ledger.retention.forget(keep=1, answered_before=0) == 1
        assert [key.key_id for key in on_record(ledger)] == [key.key_id for key in records[:-1]]


def leave_pieces_in_version_2(path: Path) -> list[KeyRef]:
    """Fill a database of version 2 with keys, and destroy some as it did: a piece of one is left."""
    make_version_2(path)
    chance = random.Random(27)  # with which SQLite 3.40 leaves one
    live: list[KeyRef] = []
    gone: list[KeyRef] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("PRAGMA synchronous=OFF")
        for _ in range(600):
            if chance.random() < 0.6 or not live:
                key = a_marked_key(chance)
                live.append(key)
                connection.execute(
                    "INSERT INTO key (key_id, scheme, key_type, certificate_type, algorithm, common_name,"
                    " organization_name, country_name, state, created_at, public, private)"
                    " VALUES (?, 'software', 'secp256r1', ?, '', '', '', '', 'pre-activation', 0, ?, ?)",
                    (key.key_id, V2G, key.public, key.private),
                )
                connection.execute(
                    "INSERT INTO event (key_id, at, event, state, reason) VALUES (?, 0, 'CSR answered', '', '')",
                    (key.key_id,),
                )
            elif chance.random() < 0.5:
                key = chance.choice(live)
                connection.execute(
                    "UPDATE key SET chain = ? WHERE key_id = ?", ("z" * chance.randint(500, 6000), key.key_id)
                )
            else:
                gone.append(live.pop(chance.randrange(len(live))))
                connection.execute(
                    "UPDATE key SET private = NULL, state = 'destroyed' WHERE key_id = ?", (gone[-1].key_id,)
                )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return gone


def test_the_migration_leaves_no_trace_of_what_is_no_longer_on_record(path: Path) -> None:
    gone = leave_pieces_in_version_2(path)
    assert traces(path, gone) > 0

    with closing(Ledger(path)) as ledger:
        assert traces(path, gone) == 0
        usable = [ledger.keys.ref(key.key_id) for key in ledger.keys.usable()]
        for key in ledger.keys.usable():
            bring(ledger, key.key_id, KeyEvent.DESTRUCTION_ORDERED)
        ledger.retention.wipe()

        assert traces(path, [key for key in usable if key is not None]) == 0


def test_a_migration_that_ends_before_the_database_is_written_anew_is_made_good_by_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = leave_pieces_in_version_2(path)
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.database._REWRITE", "SELECT * FROM power_is_lost_here")
        with pytest.raises(LedgerError):
            Ledger(path)
    assert _schema(path)[0] == (SCHEMA_VERSION,)

    Ledger(path).close()

    assert traces(path, gone) == 0
    assert _schema(path)[1] == (2,)


@pytest.mark.parametrize("at", range(1, MIGRATIONS[2].count(";\n") + 1))
def test_the_migration_of_version_2_is_done_whole_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    keys = make_version_2(path)
    before = dump(path)
    statements = MIGRATIONS[2].split(";\n")
    broken = ";\n".join([*statements[:at], "SELECT * FROM power_is_lost_here"])
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.database.MIGRATIONS", (*MIGRATIONS[:2], broken))
        with pytest.raises(LedgerError):
            Ledger(path)
    assert dump(path) == before

    with closing(Ledger(path)) as ledger:
        assert {key.state: key.key_id for key in on_record(ledger)} == {
            state: key.key_id for state, key in keys.items()
        }


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
def test_a_command_does_not_migrate_under_a_daemon_of_the_older_version(path: Path, read_only: bool) -> None:
    make_version_1(path, a_key())
    before = path.read_bytes()

    with pytest.raises(LedgerError) as refusal:
        Ledger(path, read_only=read_only, make=False)

    assert refusal.value.reason == "ledger_older"
    assert path.read_bytes() == before


def test_the_key_that_was_replaced_last_is_the_one_to_go_back_to_after_the_migration(path: Path) -> None:
    """Its end stays as it was; the next renewal is the first whose key before waits for a confirmation."""
    keys = make_version_2(path)

    with closing(Ledger(path)) as ledger:
        marked = {key.key_id: (key.previous, key.confirmed, key.due) for key in ledger.keys.all()}
        assert marked.pop(keys[KeyState.DEACTIVATED].key_id) == (True, True, 2)
        assert {(previous, confirmed) for previous, confirmed, _ in marked.values()} == {(False, False)}
        assert len(ledger.keys.active_files()) == 2
        assert ledger.transitions.restore(keys[KeyState.DEACTIVATED].key_id, reason="", now=0) == [
            keys[KeyState.ACTIVE].key_id
        ]


def make_version(path: Path, version: int) -> dict[KeyState, KeyRef]:
    """A database as a later version left it, made of one of version 2; the keys."""
    keys = make_version_2(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stationkey.ledger.database.MIGRATIONS", MIGRATIONS[:version])
        patch.setattr("stationkey.ledger.database.SCHEMA_VERSION", version)
        Ledger(path).close()
    assert _schema(path)[0] == (version,)
    return keys


@pytest.mark.parametrize(
    ("version", "at"),
    [(version, at) for version in (3, 5) for at in range(1, MIGRATIONS[version].count(";\n") + 1)],
)
def test_a_later_migration_is_done_whole_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch, version: int, at: int
) -> None:
    make_version(path, version)
    before = dump(path)
    statements = MIGRATIONS[version].split(";\n")
    broken = ";\n".join([*statements[:at], "SELECT * FROM power_is_lost_here"])
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.database.MIGRATIONS", (*MIGRATIONS[:version], broken))
        with pytest.raises(LedgerError):
            Ledger(path)
    assert dump(path) == before

    Ledger(path).close()

    assert _schema(path)[0] == (SCHEMA_VERSION,)


def test_a_database_of_version_5_is_that_of_the_one_station(path: Path) -> None:
    """With the hints of its active keys, and with no others."""
    keys = make_version(path, 5)
    hint = Hint(not_after=9, expired=False, count=2, running=3)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [(f"renewal hint {key.key_id}", msgspec.json.encode(hint).decode()) for key in keys.values()],
        )

    with closing(Ledger(path)) as ledger:
        assert [key.key_id for key in ledger.keys.stream(station="")] == [key.key_id for key in keys.values()]
        assert ledger.hints.all() == {keys[KeyState.ACTIVE].key_id: hint}
        assert ledger.answers.ids() == [("", f"id-{number}") for number in range(5)]
        assert [one.request_id for one in ledger.answers.undelivered()] == ["ID-0"]
        assert (ledger.keys.figures(expiries=0).destroyed, ledger.retention.running) == (1, 99)
        assert not any("renewal hint" in line for line in dump(path))
        bring(ledger, keys[KeyState.PRE_ACTIVATION].key_id, KeyEvent.EXPIRED)
        assert ledger.retention.forget(keep=1, answered_before=0) == 1
