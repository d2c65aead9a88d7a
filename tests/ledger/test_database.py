"""The database file: damage, versions, size, readers, backup."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from recording import (
    a_key,
    answer,
    bring,
    on_record,
    states,
)

from parts import sqlite_of
from stationkey.config.settings import Bounds
from stationkey.errors import LedgerError
from stationkey.ledger import Ledger, database
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.ledger.migrations import SCHEMA_VERSION

pytest_plugins = ["ledgers"]

PAGE = 1024
"""Bytes of a page of a new ledger."""


def test_what_a_flood_has_left_is_taken_off_the_file_in_steps(fast_ledger: Ledger, path: Path) -> None:
    for _ in range(1200):
        answer(fast_ledger)
    fast_ledger.database.checkpoint()
    while fast_ledger.retention.forget(keep=0, answered_before=0):
        pass
    large, steps = path.stat().st_size, 1
    while fast_ledger.database.shrink():
        steps += 1
    fast_ledger.database.checkpoint()

    assert path.stat().st_size < large - 256 * PAGE
    assert 1 < steps < 10
    assert sqlite_of(fast_ledger)._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]  # noqa: SLF001 - of it all


def test_a_reader_that_never_ends_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite would wait in the checkpoint, with the write lock held; here that would be an hour."""
    monkeypatch.setattr(database, "_PATIENCE", 3_600_000)
    with closing(Ledger(path)) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        first, second = answer(ledger), answer(ledger)
        select = reader.execute("SELECT * FROM key")
        select.fetchone()
        bring(ledger, first, KeyEvent.DESTRUCTION_ORDERED)
        ledger.retention.wipe()
        bring(ledger, second, KeyEvent.DESTRUCTION_ORDERED)
        assert not ledger.database.checkpoint()
        (patience,) = sqlite_of(ledger)._connection.execute("PRAGMA busy_timeout").fetchone()  # noqa: SLF001 - as set
        select.close()

        assert ledger.database.checkpoint()
        assert patience == 3_600_000
        assert states(ledger) == [KeyState.DESTROYED] * 2


def test_a_reader_in_the_way_keeps_no_key_from_being_destroyed(sqlite_ledger: Ledger, path: Path) -> None:
    key = a_key()
    answer(sqlite_ledger, key=key)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM key").fetchall()
        bring(sqlite_ledger, key.key_id, KeyEvent.DESTRUCTION_ORDERED)
        assert not sqlite_ledger.database.checkpoint()

    assert sqlite_ledger.database.checkpoint()
    assert states(sqlite_ledger) == [KeyState.DESTROYED]
    assert key.private not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_a_start_that_lost_its_power_before_write_ahead_logging_is_made_good_by_the_next(
    path: Path, tmp_path: Path
) -> None:
    """SQLite switches to it under a rollback journal, which only a connection that may write can undo."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size=1")
        connection.execute("CREATE TABLE filler (value BLOB)")
        connection.execute("BEGIN")
        for _ in range(50):  # more than the cache holds, so that the journal is synced and pages are written
            connection.execute("INSERT INTO filler VALUES (zeroblob(4000))")
        left = tmp_path / "left" / path.name
        left.parent.mkdir()
        for name in (path.name, f"{path.name}-journal"):
            (left.parent / name).write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(sqlite3.OperationalError), closing(sqlite3.connect(f"{left.as_uri()}?mode=ro", uri=True)) as it:
        it.execute("SELECT 1 FROM sqlite_schema").fetchone()

    with closing(Ledger(left)) as ledger:
        answer(ledger)
        assert states(ledger) == [KeyState.PRE_ACTIVATION]
    assert not Path(f"{left}-journal").exists()


def test_a_database_that_was_not_switched_to_write_ahead_logging_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite keeps silent about a sync that failed in the switch; the next process would then do it."""
    asked = tuple(pragma.replace("=WAL", "=DELETE") for pragma in database._CONNECTION)  # noqa: SLF001 - the fault
    with monkeypatch.context() as failing:
        failing.setattr(database, "_CONNECTION", asked)
        with pytest.raises(LedgerError) as refused:
            Ledger(path)
    assert refused.value.reason == "ledger_unusable"

    with closing(Ledger(path)) as ledger:
        answer(ledger)


def test_a_backup_made_while_it_is_written_has_every_key_so_far(sqlite_ledger: Ledger, tmp_path: Path) -> None:
    keys = [a_key() for _ in range(3)]
    for key in keys:
        answer(sqlite_ledger, key=key)

    with (
        closing(sqlite3.connect(sqlite_of(sqlite_ledger).path)) as source,
        closing(sqlite3.connect(tmp_path / "copy.sqlite3")) as copy,
    ):
        source.backup(copy)
    answer(sqlite_ledger)

    with closing(Ledger(tmp_path / "copy.sqlite3")) as restored:
        assert [restored.keys.ref(key.key_id) for key in keys] == keys
        assert len(on_record(restored)) == 3


def _content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.glob("ledger.sqlite3*") if file.suffix != "-shm"}


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
@pytest.mark.parametrize("crashed", [False, True], ids=["closed in order", "with a log left by a crash"])
def test_a_newer_database_is_refused_and_not_a_byte_of_it_changed(
    tmp_path: Path, path: Path, read_only: bool, crashed: bool
) -> None:
    original = tmp_path / "newer" / path.name
    original.parent.mkdir()
    Ledger(original).close()
    with closing(sqlite3.connect(original, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        connection.execute("CREATE TABLE something_new (x)")
        left = ("", "-wal") if crashed else ()
        for suffix in left:
            Path(f"{path}{suffix}").write_bytes(Path(f"{original}{suffix}").read_bytes())
    if not crashed:
        path.write_bytes(original.read_bytes())
    before = {name: content for name, content in _content(path).items() if not name.endswith("-shm")}

    with pytest.raises(LedgerError) as refusal:
        Ledger(path, read_only=read_only)

    assert refusal.value.reason == "ledger_newer"
    assert str(SCHEMA_VERSION + 1) in refusal.value.message
    after = {name: content for name, content in _content(path).items() if content and not name.endswith("-shm")}
    assert after == before


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
@pytest.mark.parametrize("name", ["none.sqlite3", "no folder/ledger.sqlite3", "x" * 300])
def test_a_ledger_that_is_not_there_is_refused_and_not_made(tmp_path: Path, name: str, read_only: bool) -> None:
    with pytest.raises(LedgerError) as refusal:
        Ledger(tmp_path / name, read_only=read_only, make=False)

    assert refusal.value.reason in {"ledger_missing", "ledger_unusable"}
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_database_is_refused_and_not_a_byte_of_it_changed(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        for _ in range(50):
            answer(ledger, bounds=Bounds(pending_limit=100))
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 4] = b"\xa5" * 4096
    path.write_bytes(content)

    with pytest.raises(LedgerError) as refusal:
        Ledger(path)

    assert refusal.value.reason == "ledger_damaged"
    assert path.read_bytes() == bytes(content)


def damage_the_history(path: Path) -> None:
    """Overwrite a page of the table `event`, which holds nothing that is needed to open a ledger."""
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'event'").fetchone()
    content = bytearray(path.read_bytes())
    content[PAGE * (page - 1) : PAGE * page] = b"\xa5" * PAGE
    path.write_bytes(content)


def test_a_large_database_is_checked_whole_only_after_an_end_that_was_not_in_order(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationkey.ledger.database._CHECKED_WHOLE", 5 * PAGE)
    with closing(Ledger(path)) as ledger:
        key_id = answer(ledger)
    damage_the_history(path)

    with closing(Ledger(path)) as ledger:
        assert ledger.keys.ref(key_id) is not None
        with pytest.raises(LedgerError) as met:
            ledger.keys.history(key_id)
        assert met.value.reason == "ledger_damaged"

    Path(f"{path}-wal").touch()
    with pytest.raises(LedgerError) as refusal:
        Ledger(path)
    assert refusal.value.reason == "ledger_damaged"


def test_a_small_database_is_always_checked_whole(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        answer(ledger)
    damage_the_history(path)

    with pytest.raises(LedgerError) as refusal:
        Ledger(path)

    assert refusal.value.reason == "ledger_damaged"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content, _: b"garbage" * 3 + content[21:], id="the header"),
        pytest.param(lambda content, _: content[: len(content) // 2], id="the length"),
        pytest.param(
            lambda content, page: content[: PAGE * (page - 1)] + bytes(PAGE) + content[PAGE * page :],
            id="the private parts",
        ),
    ],
)
def test_a_large_database_that_is_damaged_where_it_matters_most_is_refused_always(
    path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes, int], bytes]
) -> None:
    monkeypatch.setattr("stationkey.ledger.database._CHECKED_WHOLE", 5 * PAGE)
    with closing(Ledger(path)) as ledger:
        answer(ledger)
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'secret'").fetchone()
    path.write_bytes(damage(path.read_bytes(), page))

    with pytest.raises(LedgerError) as refusal:
        Ledger(path)

    assert refusal.value.reason == "ledger_damaged"


@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        pytest.param("journal_mode", "wal", id="readers do not wait for writers"),
        pytest.param("synchronous", 2, id="a commit survives a loss of power"),
        pytest.param("page_size", PAGE, id="little is written for an answer"),
        pytest.param("secure_delete", 1, id="what is deleted is zeroed"),
        pytest.param("auto_vacuum", 2, id="the file can become smaller"),
        pytest.param("temp_store", 2, id="no copy goes to a temporary file"),
        pytest.param("foreign_keys", 1, id="no answer without its key"),
    ],
)
def test_the_promises_of_sqlite_are_asked_for(sqlite_ledger: Ledger, pragma: str, value: object) -> None:
    assert sqlite_of(sqlite_ledger)._connection.execute(f"PRAGMA {pragma}").fetchone() == (value,)  # noqa: SLF001 - of this connection
