"""The tables of a site: made once, and migrated by a rule that lets two versions run side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from depots import take
from postgresql import Database

from stationkey.errors import LedgerError
from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import Connection, connect
from stationkey.ledger.postgresql.schema import MIGRATIONS, PRESENCE, Migration
from stationkey.ledger.postgresql.slots import SLOTS, shard_of, slot_of, slots_of

pytest_plugins = ["depots"]

ADDED = "ALTER TABLE rejection ADD COLUMN later text NOT NULL DEFAULT '';"


def steps(*readable_from: int) -> tuple[Migration, ...]:
    """The migrations of a version to come: each adds a column."""
    added = [Migration(ADDED.replace("later", f"later_{number}"), step) for number, step in enumerate(readable_from)]
    return (*MIGRATIONS, *added)


def opened(database: Database) -> Connection:
    return connect(database.uri, database.password, name="test")


def prepare(database: Database) -> None:
    with closing(opened(database)) as connection:
        schema.prepare(connection)


def check(database: Database) -> None:
    with closing(opened(database)) as connection:
        schema.check(connection)


def columns(database: Database) -> list[str]:
    rows = database.admin("SELECT column_name FROM information_schema.columns WHERE column_name LIKE 'later%%'")
    return sorted(str(name) for (name,) in rows)


@contextmanager
def living(database: Database, *, version: int, name: str = "one") -> Iterator[None]:
    """A daemon of a version, which holds the lock of those that live."""
    with closing(opened(database)) as lease:
        lease.execute("SELECT pg_advisory_lock_shared(%s, 1)", (PRESENCE,))
        lease.execute(
            "INSERT INTO daemon (instance, name, host, pid, version, schema, shards, lease, backend)"
            " VALUES (%s, %s, 'here', 1, '0.1', %s, 1, 10, pg_backend_pid())",
            (name, name, version),
        )
        yield


def test_a_command_does_not_make_the_tables(database: Database) -> None:
    with pytest.raises(LedgerError) as caught:
        check(database)

    assert caught.value.reason == "ledger_missing"


def test_the_tables_are_made_once_though_daemons_start_together(database: Database) -> None:
    threads = [threading.Thread(target=prepare, args=(database,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    check(database)


def test_a_user_who_may_not_make_tables_is_told(database: Database) -> None:
    database.admin(f"ALTER DATABASE {database.name} OWNER TO {database.server.admin}")

    with pytest.raises(LedgerError) as caught:
        prepare(database)

    assert caught.value.reason == "ledger_unusable"


def test_an_older_daemon_works_on_a_newer_schema_that_it_can_read(
    new_depot: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer, living(new_depot, version=1):
        newer.setattr(schema, "MIGRATIONS", steps(1, 1))
        prepare(new_depot)

    assert columns(new_depot) == ["later_0", "later_1"]
    check(new_depot)
    prepare(new_depot)


def test_a_migration_that_an_older_daemon_cannot_work_on_waits_for_its_end(
    new_depot: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = take(new_depot)
    monkeypatch.setattr(schema, "MIGRATIONS", steps(2))
    with living(new_depot, version=1), living(new_depot, version=2, name="two"):
        with pytest.raises(LedgerError) as caught:
            prepare(new_depot)
        assert (caught.value.reason, caught.value.transient) == ("ledger_in_use", True)
        assert columns(new_depot) == []
    with living(new_depot, version=2, name="three"):
        prepare(new_depot)

    assert columns(new_depot) == ["later_0"]
    assert take(new_depot).epoch == shard.epoch + 2  # one of the version before, which starts just then, is fenced
    monkeypatch.setattr(schema, "MIGRATIONS", MIGRATIONS)
    with pytest.raises(LedgerError) as older:
        prepare(new_depot)
    assert older.value.reason == "ledger_newer"


def test_a_command_does_not_migrate(new_depot: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MIGRATIONS", steps(2))

    with pytest.raises(LedgerError) as caught:
        check(new_depot)

    assert caught.value.reason == "ledger_older"


def test_a_migration_that_fails_changes_nothing(new_depot: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Migration("CREATE TABLE broken (); DROP TABLE nothing;", 1)
    monkeypatch.setattr(schema, "MIGRATIONS", (*steps(1), broken))

    with pytest.raises(LedgerError):
        prepare(new_depot)

    assert columns(new_depot) == []
    monkeypatch.undo()
    check(new_depot)


STATIONS = ["", "depot7/s1", "é/ü", "\U0001f50c", "a" * 64, "%2F", "'; DROP TABLE key", "\\x00"]


def test_the_database_and_the_daemon_agree_on_the_slot_of_a_station(depot: Database) -> None:
    with closing(opened(depot)) as connection:
        for station in STATIONS:
            connection.execute(
                "INSERT INTO rejection (station, request_id, reason, message, at) VALUES (%s, '', '', '', 0)",
                (station,),
            )
        rows = connection.execute("SELECT station, slot FROM rejection").fetchall()

    assert dict(rows) == {station: slot_of(station) for station in STATIONS}


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 100, 255, 256])
def test_each_slot_is_in_the_shard_of_its_stations(shards: int) -> None:
    ranges = [slots_of(shard, shards) for shard in range(shards)]

    assert [slot for each in ranges for slot in each] == list(range(SLOTS))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    for number in range(300):
        station = f"depot/{number}"
        assert slot_of(station) in ranges[shard_of(station, shards)]
