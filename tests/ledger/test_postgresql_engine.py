"""The ledger's connection to PostgreSQL: the fence of a shard, and what becomes of a transaction that is cut off."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
from between import Between
from depots import Opener, take
from peers import free_port
from postgresql import Database

from stationkey.errors import LedgerError
from stationkey.ledger.engine import Sql
from stationkey.ledger.postgresql import connection as connection_module
from stationkey.ledger.postgresql import engine as module
from stationkey.ledger.postgresql.connection import Connection
from stationkey.ledger.postgresql.engine import PostgresqlDatabase, Shard
from stationkey.ledger.postgresql.slots import shard_of
from stationkey.ledger.postgresql.statements import PostgresqlSql, translated

pytest_plugins = ["depots"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a test can wait for; what they bound is the same."""
    monkeypatch.setattr(module, "PATIENCE", 5.0)
    monkeypatch.setattr(module, "_PAUSE", 0.02)
    monkeypatch.setattr(module, "_REST", 0.2)


def note(sql: Sql, what: str) -> None:
    sql.execute("INSERT INTO meta (name, value) VALUES (?, 'x')", (what,))


def write(engine: PostgresqlDatabase, what: str) -> None:
    with engine.transaction() as sql:
        note(sql, what)


def noted(database: Database) -> set[str]:
    return {str(name) for (name,) in database.admin("SELECT name FROM meta WHERE value = 'x'")}


def failing(call: Callable[[], object]) -> LedgerError:
    with pytest.raises(LedgerError) as caught:
        call()
    return caught.value


# Placeholders.


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT ?, ':no ? %', :one_2", "SELECT %s, ':no ? %%', %(one_2)s"),
        ("a % b = ? AND c = 'it''s ?'", "a %% b = %s AND c = 'it''s ?'"),
        ("x::text", "x::text"),
    ],
)
def test_placeholders_are_those_of_psycopg(statement: str, expected: str) -> None:
    assert translated(statement) == expected.encode()


def test_values_go_in_and_out_as_with_sqlite(depot: Database, engine_of: Opener) -> None:
    with engine_of(depot).reading() as sql:
        row = sql.execute(
            "SELECT :text, CAST(:number AS bigint) + 1, sum(n), :none, :bytes"
            " FROM (SELECT CAST(1 AS bigint) AS n UNION ALL SELECT 2) AS a",
            {"text": "a\0b\ud800", "number": 1 << 40, "none": None, "bytes": b"\0", "unused": 1},
        ).fetchone()

    assert row == ("a\ufffdb?", (1 << 40) + 1, 3, None, b"\0")
    assert type(row[2]) is int


# The fence.


def test_a_daemon_whose_shard_was_taken_writes_nothing_more(depot: Database, engine_of: Opener) -> None:
    told: list[str] = []
    slow = engine_of(depot, shard=take(depot), on_lost=lambda: told.append("lost"))
    write(slow, "before")

    other = engine_of(depot, shard=take(depot))
    write(other, "by the other")
    errors = [failing(lambda: write(slow, "after")) for _ in range(2)]

    assert [(error.reason, error.transient) for error in errors] == [("shard_lost", True)] * 2
    assert told == ["lost"]
    assert slow.trouble == "shard_lost"
    assert noted(depot) == {"before", "by the other"}


def test_an_epoch_that_comes_again_after_a_restore_is_not_taken_for_ones_own(
    depot: Database, engine_of: Opener
) -> None:
    """The backup was older than the taking, and another daemon has taken the shard since."""
    number, of, epoch, _ = take(depot)
    depot.admin("UPDATE shard SET holder = 'one'")
    stopped = engine_of(depot, shard=Shard(number, of, epoch, "one"))
    write(stopped, "before")

    depot.admin("UPDATE shard SET holder = 'other'")

    write(engine_of(depot, shard=Shard(number, of, epoch, "other")), "by the other")
    assert failing(lambda: write(stopped, "after")).reason == "shard_lost"


def test_who_takes_a_shard_waits_for_a_transaction_that_has_begun(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))
    taken = threading.Event()

    def take_over() -> None:
        take(depot)
        taken.set()

    thread = threading.Thread(target=take_over)
    with engine.transaction() as sql:
        thread.start()
        wait_for(lambda: waiting(depot))
        assert not taken.is_set()
        note(sql, "before it was taken")
    thread.join()

    assert noted(depot) == {"before it was taken"}
    assert failing(lambda: write(engine, "after")).reason == "shard_lost"


def test_a_shard_that_nobody_ever_took_is_nobodys(depot: Database, engine_of: Opener) -> None:
    assert failing(lambda: write(engine_of(depot, shard=Shard(3, 4, 0)), "no")).reason == "shard_lost"


def test_a_command_and_a_daemon_do_not_change_a_key_at_once(depot: Database, engine_of: Opener) -> None:
    shards = [engine_of(depot, shard=take(depot, number, 2)) for number in range(2)]
    command = engine_of(depot)
    threads = [threading.Thread(target=write, args=(engine, f"shard {n}")) for n, engine in enumerate(shards)]
    with command.transaction() as sql:
        for thread in threads:
            thread.start()
        wait_for(lambda: waiting(depot) == 2)
        note(sql, "by the command")
    for thread in threads:
        thread.join()

    assert noted(depot) == {"by the command", "shard 0", "shard 1"}


def test_shards_do_not_wait_for_each_other(depot: Database, engine_of: Opener) -> None:
    one, other = (engine_of(depot, shard=take(depot, number, 2)) for number in range(2))

    with one.transaction() as sql:
        note(sql, "first")
        write(other, "second")

    assert noted(depot) == {"first", "second"}


def test_a_lock_that_is_not_given_up_is_waited_for_so_long(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))
    with engine.reading() as sql:
        sql.execute("SELECT set_config('lock_timeout', '50ms', false)")
    command = engine_of(depot)
    with command.transaction():
        error = failing(lambda: write(engine, "no"))
    write(engine, "then")

    assert (error.reason, error.transient) == ("ledger_busy", True)
    assert noted(depot) == {"then"}


def test_a_daemon_that_is_stopped_among_many_statements_is_idle_for_the_server(
    depot: Database, engine_of: Opener
) -> None:
    """So its timeout ends the transaction; in the middle of a pipeline it would not."""
    states: list[object] = []

    def names() -> Iterator[tuple[str]]:
        for name in "abc":
            yield (name,)
            states.extend(depot.admin("SELECT state FROM pg_stat_activity WHERE backend_xid IS NOT NULL"))

    with engine_of(depot, shard=take(depot)).transaction() as sql:
        sql.executemany("INSERT INTO meta (name, value) VALUES (?, 'x')", names())

    assert states == [("idle in transaction",)] * 3
    assert noted(depot) == {"a", "b", "c"}


def test_an_engine_serves_the_stations_of_its_shard(depot: Database, engine_of: Opener) -> None:
    engines = [engine_of(depot, shard=take(depot, number, 3)) for number in range(3)]
    stations = [f"depot/{number}" for number in range(30)]
    with engine_of(depot).transaction() as sql:
        sql.executemany(
            "INSERT INTO rejection (station, request_id, reason, message, at) VALUES (?, '', '', '', 0)",
            [(station,) for station in stations],
        )

    for number, engine in enumerate(engines):
        mine = [station for station in stations if shard_of(station, 3) == number]
        with engine.reading() as sql:
            rows = sql.execute(f"SELECT station FROM rejection WHERE 1 = 1{sql.mine('rejection')}").fetchall()
        assert sorted(row[0] for row in rows) == sorted(mine)
        assert [station for station in stations if engine.owns(station)] == mine


# Deferred statements, and failures of one transaction.


def test_what_was_deferred_comes_with_the_next_transaction(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)
    engine.defer("INSERT INTO meta (name, value) VALUES (?, 'x')", "deferred")
    write(engine, "now")
    engine.defer("INSERT INTO meta (name, value) VALUES (?, 'x')", "at the end")
    engine.close()

    assert noted(depot) == {"deferred", "now", "at the end"}


def test_a_deferred_statement_that_fails_fails_once(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)
    engine.defer("INSERT INTO nothing VALUES (1)")

    failing(lambda: write(engine, "first"))
    write(engine, "second")

    assert noted(depot) == {"second"}
    assert engine.trouble == ""


def test_a_statement_is_deferred_while_others_are_executed(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)
    execute = PostgresqlSql.execute

    def and_defer(sql: PostgresqlSql, *arguments: Any) -> Any:
        if "late" not in str(arguments):
            engine.defer("INSERT INTO meta (name, value) VALUES (?, 'x')", f"late {arguments}")
        return execute(sql, *arguments)

    for what in ("first", "second"):
        engine.defer("INSERT INTO meta (name, value) VALUES (?, 'x')", what)
    with mock.patch.object(PostgresqlSql, "execute", and_defer), engine.transaction():
        pass
    assert noted(depot) == {"first", "second"}
    write(engine, "third")

    assert len(noted(depot)) == 5


def test_a_deferred_statement_outlives_a_lost_connection(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)
    engine.defer("INSERT INTO meta (name, value) VALUES (?, 'x')", "deferred")

    def cut_off() -> None:
        with engine.transaction():
            depot.end_sessions()

    failing(cut_off)
    write(engine, "second")

    assert noted(depot) == {"deferred", "second"}


def test_a_transaction_that_fails_changes_nothing_and_the_next_goes_on(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)

    def half(fault: Exception | None) -> None:
        with engine.transaction() as sql:
            note(sql, "half")
            if fault is not None:
                raise fault
            sql.execute("SELECT 1 / 0")

    assert failing(lambda: half(None)).reason == "ledger_error"
    assert engine.trouble == "ledger_error"
    with pytest.raises(ZeroDivisionError):
        half(ZeroDivisionError())
    write(engine, "whole")

    assert noted(depot) == {"whole"}
    assert engine.trouble == ""


def test_an_error_that_somebody_swallowed_is_no_commit(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)

    def swallowing() -> None:
        with engine.transaction() as sql:
            note(sql, "lost")
            with pytest.raises(psycopg.Error):
                sql.execute("SELECT 1 / 0")

    assert failing(swallowing).reason == "ledger_error"
    assert noted(depot) == set()


# A lost connection.


def test_between_calls_a_lost_connection_is_made_again_unnoticed(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))

    for number in range(3):
        depot.end_sessions()
        with engine.reading() as sql:
            assert sql.execute("SELECT 1").fetchone() == (1,)
        depot.end_sessions()
        write(engine, str(number))

    assert noted(depot) == {"0", "1", "2"}


def test_in_the_middle_of_a_transaction_nothing_was_written(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))

    def cut_off(*later: str) -> None:
        with engine.transaction() as sql:
            note(sql, "before")
            depot.end_sessions()
            for what in later:
                note(sql, what)

    for error in (failing(cut_off), failing(lambda: cut_off("after"))):
        assert (error.reason, error.transient) == ("ledger_unreachable", True)
    write(engine, "next")

    assert noted(depot) == {"next"}


def test_a_reading_inside_does_not_go_on_over_another_connection(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)

    def cut_off() -> None:
        with engine.transaction() as sql:
            depot.end_sessions()
            with pytest.raises(LedgerError), engine.reading() as inside:
                inside.execute("SELECT 1")
            with pytest.raises(psycopg.Error):
                note(sql, "outside of it")

    assert failing(cut_off).reason == "ledger_unreachable"
    assert noted(depot) == set()


def test_what_was_cut_off_before_its_commit_is_done_again(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))
    cuts = iter([depot.end_sessions, depot.end_sessions])

    def twice_cut_off() -> str:
        with engine.transaction() as sql:
            next(cuts, lambda: None)()
            note(sql, "once")
        return "done"

    assert engine.attempt(twice_cut_off) == "done"
    assert noted(depot) == {"once"}


def test_what_has_committed_something_is_not_done_again(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)

    def first_and_second() -> None:
        write(engine, "first")
        with engine.transaction() as sql:
            depot.end_sessions()
            note(sql, "second")

    assert failing(lambda: engine.attempt(first_and_second)).reason == "ledger_unreachable"
    assert noted(depot) == {"first"}


@contextmanager
def lost_at_commit(*, executed: bool, then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Lose the connection at the next COMMIT, before or after the server has executed it, and then do something."""
    execute = Connection.execute

    def lose(connection: Connection, query: Any, *arguments: Any, **options: Any) -> object:
        if query != "COMMIT":
            return execute(connection, query, *arguments, **options)
        if executed:
            execute(connection, query, **options)
        connection.hang_up()
        then()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    with mock.patch.object(Connection, "execute", lose):
        yield


def test_a_commit_that_was_not_told_is_found(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))

    with lost_at_commit(executed=True):
        write(engine, "committed")

    assert noted(depot) == {"committed"}
    assert engine.trouble == ""


def test_after_a_restart_of_the_server_the_number_of_a_transaction_tells_nothing(
    own_depot: Database, engine_of: Opener
) -> None:
    """After a crash, it may be that of another one."""
    engine = engine_of(own_depot, shard=take(own_depot))

    with lost_at_commit(executed=True, then=own_depot.server.restart):
        error = failing(lambda: write(engine, "committed"))

    assert (error.reason, error.transient) == ("commit_unknown", True)
    assert noted(own_depot) == {"committed"}


def test_a_commit_that_never_came_is_known_not_to_be(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))

    with lost_at_commit(executed=False):
        error = failing(lambda: write(engine, "never"))
    write(engine, "next")

    assert (error.reason, error.transient) == ("ledger_unreachable", True)
    assert noted(depot) == {"next"}


def test_while_the_server_is_away_the_outcome_is_unknown(own_depot: Database, engine_of: Opener) -> None:
    engine = engine_of(own_depot, shard=take(own_depot))

    away = lost_at_commit(executed=True, then=own_depot.server.kill)
    with mock.patch.object(module, "PATIENCE", 0.5), away:
        error = failing(lambda: write(engine, "committed"))
    own_depot.server.start()

    assert (error.reason, error.transient) == ("commit_unknown", True)
    wait_for(lambda: not fails(lambda: write(engine, "next")))
    assert noted(own_depot) == {"committed", "next"}


@contextmanager
def absent_standby(database: Database) -> Iterator[None]:
    """Let each commit wait for a standby that is not there."""

    def reload(*changes: str) -> None:
        for change in changes:
            database.admin(change)
        database.admin("SELECT pg_reload_conf()")

    reload("ALTER SYSTEM SET synchronous_standby_names = 'absent'")
    try:
        wait_for(lambda: database.admin("SHOW synchronous_standby_names") == [("absent",)])
        yield
    finally:
        reload("ALTER SYSTEM RESET synchronous_standby_names")
        wait_for(lambda: database.admin("SHOW synchronous_standby_names") == [("",)])


def test_a_commit_that_no_standby_has_is_not_taken_for_one(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))
    write(engine, "before")
    with (
        mock.patch.object(module, "PATIENCE", 0.5),
        mock.patch.object(connection_module, "HANG", 0.3),
        absent_standby(depot),
    ):
        error = failing(lambda: write(engine, "waiting"))
        meanwhile = noted(depot)
    wait_for(lambda: noted(depot) == {"before", "waiting"})

    assert (error.reason, error.transient) == ("commit_unknown", True)
    assert meanwhile == {"before"}


def test_a_backend_that_is_ended_at_its_commit_has_committed(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))
    thread = threading.Thread(target=write, args=(engine, "ended"))
    with absent_standby(depot):
        thread.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        wait_for(lambda: depot.admin(waits) == [(1,)])
        depot.end_sessions()
        thread.join()

    assert engine.trouble == ""
    assert noted(depot) == {"ended"}


def test_a_backend_that_crashes_takes_all_along_and_the_call_is_made_again(
    own_depot: Database, engine_of: Opener
) -> None:
    engine = engine_of(own_depot, shard=take(own_depot))
    crashes = iter([lambda: own_depot.signal(signal.SIGKILL)])

    def crashed() -> None:
        with engine.transaction() as sql:
            next(crashes, lambda: None)()
            note(sql, "once")

    with mock.patch.object(module, "PATIENCE", 30):
        engine.attempt(crashed)

    assert noted(own_depot) == {"once"}


def test_the_server_restarts_in_the_middle_of_everything(own_depot: Database, engine_of: Opener) -> None:
    engine = engine_of(own_depot, shard=take(own_depot))
    with mock.patch.object(module, "PATIENCE", 30):
        for end in (own_depot.server.kill, own_depot.server.terminate):
            write(engine, f"before {end.__name__}")
            end()
            own_depot.server.start()
            write(engine, f"after {end.__name__}")

    assert noted(own_depot) == {"before kill", "after kill", "before terminate", "after terminate"}


def test_a_server_that_stays_away_is_waited_for_once_and_then_fails_at_once(
    own_depot: Database, engine_of: Opener
) -> None:
    engine = engine_of(own_depot, shard=take(own_depot))
    own_depot.server.kill()
    connects = mock.patch.object(module, "connect", wraps=connection_module.connect)

    with mock.patch.object(module, "PATIENCE", 0.5), connects as patient:
        first = failing(lambda: write(engine, "first"))
        waited = patient.call_count
    with mock.patch.object(module, "_REST", 60), connects as resting:
        wait_for(lambda: time.monotonic() > engine._rest_until)  # noqa: SLF001 - there is no other sign
        for _ in range(5):
            failing(lambda: write(engine, "more"))
    tries = resting.call_count
    own_depot.server.start()
    engine._rest_until = 1.0  # noqa: SLF001 - the time that it rests is over
    write(engine, "again")

    assert (first.reason, first.transient) == ("ledger_unreachable", True)
    assert waited > 2
    assert tries == 1
    assert noted(own_depot) == {"again"}


def test_a_stopped_backend_holds_nobody_up_for_long(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)
    with mock.patch.object(connection_module, "HANG", 0.3):
        with engine.reading() as sql:
            sql.execute("SELECT 1")
        stopped = depot.backends()
        depot.signal(signal.SIGSTOP)
        try:
            write(engine, "over another connection")
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    assert noted(depot) == {"over another connection"}


def test_a_network_that_drops_everything_holds_nobody_up_for_long(depot: Database, engine_of: Opener) -> None:
    silent = threading.Event()

    def there(program: socket.socket, peer: socket.socket) -> None:
        while data := program.recv(65536):
            if not silent.is_set():
                peer.sendall(data)

    def back(program: socket.socket, peer: socket.socket) -> None:
        while data := peer.recv(65536):
            if not silent.is_set():
                program.sendall(data)

    with Between() as between:
        port = between.listen(free_port(), depot.server.port, there, back)
        through = Database(depot.server, depot.name)
        through.uri = depot.uri.replace(f":{depot.server.port}/", f":{port}/")
        engine = engine_of(through, shard=take(depot))
        write(engine, "before")
        silent.set()
        with (
            mock.patch.object(connection_module, "HANG", 0.2),
            mock.patch.dict(connection_module.PARAMETERS, connect_timeout=2),
            mock.patch.object(module, "PATIENCE", 0.1),
        ):
            error = failing(lambda: write(engine, "meanwhile"))
        silent.clear()
        engine._rest_until = 1.0  # noqa: SLF001 - the time that it rests is over
        write(engine, "after")

    assert (error.reason, error.transient) == ("ledger_unreachable", True)
    assert noted(depot) == {"before", "after"}


def test_an_open_transaction_of_a_stopped_daemon_is_ended_by_the_server(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot, shard=take(depot))

    def stopped() -> None:
        with engine.transaction() as sql:
            sql.execute("SELECT set_config('idle_in_transaction_session_timeout', '50ms', false)")
            note(sql, "before")
            take(depot)  # waits for the row

    assert failing(stopped).reason == "ledger_unreachable"
    assert noted(depot) == set()


def test_what_is_abandoned_ends_at_once_and_stays_so(depot: Database, engine_of: Opener) -> None:
    engine = engine_of(depot)
    threading.Timer(0.1, engine.abandon).start()

    def sleep() -> None:
        with engine.reading() as sql:
            sql.execute("SELECT pg_sleep(5)")

    failing(sleep)
    assert failing(lambda: write(engine, "no")).reason == "shard_lost"
    engine.close()
    assert noted(depot) == set()


def test_what_is_abandoned_while_the_server_is_away_waits_no_more(own_depot: Database, engine_of: Opener) -> None:
    engine = engine_of(own_depot)
    own_depot.server.kill()
    with mock.patch.object(module, "PATIENCE", 600):
        threading.Timer(0.1, engine.abandon).start()
        assert failing(lambda: write(engine, "no")).reason == "shard_lost"


def test_a_schema_that_is_too_new_is_found_at_the_next_connection(new_depot: Database, engine_of: Opener) -> None:
    engine = engine_of(new_depot)
    new_depot.admin("UPDATE meta SET value = 99 WHERE name IN ('schema', 'readable_from')")
    new_depot.end_sessions()

    assert failing(lambda: write(engine, "no")).reason == "ledger_newer"


def test_the_size_is_that_of_the_database(depot: Database, engine_of: Opener, tmp_path: Path) -> None:
    engine = engine_of(depot)

    assert engine.size() > 1_000_000
    assert engine.directory == tmp_path
    assert engine.own_files() == frozenset()
    assert (engine.checkpoint(), engine.shrink(), engine.wipe()) == (True, False, False)


# The hands of these tests.


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)  # there is no event to wait for: the server is asked


def waiting(database: Database) -> int:
    """How many sessions wait for a lock."""
    [(count,)] = database.admin("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    return int(str(count))


def fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except LedgerError:
        return True
    return False
