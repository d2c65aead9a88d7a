"""Engines on a database of PostgreSQL for tests: of a shard, and of a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from peers import Postgresql
from postgresql import Database, make

from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import connect
from stationkey.ledger.postgresql.engine import PostgresqlDatabase, Shard

pytest_plugins = ["postgresql"]

Opener = Callable[..., PostgresqlDatabase]


def prepared(database: Database) -> Database:
    """Make the tables."""
    with closing(connect(database.uri, database.password, name="schema")) as connection:
        schema.prepare(connection)
    return database


def take(database: Database, number: int = 0, of: int = 1) -> Shard:
    """Take a shard, as a daemon does when it has its lock."""
    [(epoch,)] = database.admin(
        "INSERT INTO shard (number, of, epoch) VALUES (%s, %s, 1)"
        " ON CONFLICT (number) DO UPDATE SET epoch = shard.epoch + 1 RETURNING epoch",
        *(number, of),
    )
    return Shard(number, of, int(str(epoch)))


def open_engine(database: Database, folder: Path, **options: object) -> PostgresqlDatabase:
    return PostgresqlDatabase(database.uri, database.password, directory=folder, name="test", **options)  # type: ignore[arg-type] # those of the class


@pytest.fixture(scope="session")
def session_depot(session_postgresql: Postgresql) -> Database:
    """A database with the tables of a site, which the tests of a worker share. No test makes statistics for another."""
    database = prepared(make(session_postgresql))
    for (table,) in database.admin("SELECT tablename::text FROM pg_tables WHERE schemaname = 'stationkey'"):
        database.admin(f"ALTER TABLE stationkey.{table} SET (autovacuum_enabled = off)")
    return database


_EMPTY = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND usename = '{user}';
SET session_replication_role = replica;  -- no triggers, and no order of tables
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT relname, relkind FROM pg_class WHERE relnamespace = 'stationkey'::regnamespace LOOP
        IF one.relkind = 'S' THEN
            PERFORM setval(format('stationkey.%I', one.relname), 1, false);
        ELSIF one.relkind = 'r' AND one.relname = 'meta' THEN
            DELETE FROM stationkey.meta WHERE name NOT IN ('schema', 'readable_from');
        ELSIF one.relkind = 'r' THEN
            EXECUTE format('DELETE FROM stationkey.%I', one.relname);  -- TRUNCATE takes ten times as long
        END IF;
    END LOOP;
END $$
"""


@pytest.fixture
def depot(session_depot: Database) -> Database:
    """A database with the tables of a site, empty and without sessions. Making one takes a second, emptying it less."""
    session_depot.admin(_EMPTY.format(user=session_depot.server.name))
    return session_depot


@pytest.fixture
def new_depot(database: Database) -> Database:
    """The same, made for this test: for one that changes the tables."""
    return prepared(database)


@pytest.fixture
def own_depot(own_postgresql: Database) -> Database:
    """The same on a server that this test may kill."""
    return prepared(own_postgresql)


@pytest.fixture
def engine_of(tmp_path: Path) -> Iterator[Opener]:
    """Opens engines, which end with the test."""
    with ExitStack() as opened:

        def opener(database: Database, **options: object) -> PostgresqlDatabase:
            engine = open_engine(database, tmp_path, **options)
            opened.callback(engine.close)
            opened.callback(engine.abandon)
            return engine

        yield opener
