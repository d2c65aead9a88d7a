"""A PostgreSQL server for the tests of a worker, and a database of its own for each test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from peers import Postgresql

from stationkey.config.secrets import SecretReference

_numbers = count()
_PATH = "-c search_path=stationkey"


class CopiedPostgresql(Postgresql):
    """A server whose data were made once for all tests of a worker: that takes as long as a short test."""

    _made: tuple[TemporaryDirectory[str], str] | None = None
    """Where those data are, and the password in them."""

    def __init__(self, directory: Path, settings: Iterable[str] = ()) -> None:
        super().__init__(directory, settings)
        if self._made is not None:
            self.password = self._made[1]
            self.password_file.write_text(self.password)

    def _make_data(self) -> None:
        if self._made is None:
            super()._make_data()
            folder = TemporaryDirectory(prefix="stationkey-postgresql-")
            _copy(self.data, Path(folder.name, "data"))
            CopiedPostgresql._made = folder, self.password
        else:
            _copy(Path(self._made[0].name, "data"), self.data)


def _copy(data: Path, to: Path) -> None:
    subprocess.run(
        ["cp", "--archive", str(data), str(to)], check=True
    )  # four times as fast as Python, and keeps owners


class Database:
    """A database on a running server, and the superuser's hands on it.

    Attributes:
        server: the server, which other tests may share.
        uri: what ``ledger`` takes.
        password: what ``ledger_password_file`` refers to.
    """

    def __init__(self, server: Postgresql, name: str) -> None:
        self.server = server
        self.name = name
        self.uri = server.uri.rpartition("/")[0] + f"/{name}"
        self.password = SecretReference(str(server.password_file))

    def admin(self, statement: str, *arguments: object) -> list[tuple[object, ...]]:
        """Run a statement as the superuser, in this database; return its rows."""
        head, _, rest = self.server.admin_uri.partition(f"/{self.server.name}?")
        with psycopg.connect(f"{head}/{self.name}?{rest}", autocommit=True, options=_PATH) as connection:
            cursor = connection.execute(statement.encode(), arguments or None)
            return cursor.fetchall() if cursor.description else []

    def backends(self) -> list[int]:
        """Return the process ids of the sessions in this database, but the superuser's."""
        rows = self.admin(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s AND usename = %s", self.name, self.server.name
        )
        return [int(str(pid)) for (pid,) in rows]

    def end_sessions(self) -> None:
        """End every session in this database, as an operator or a restart does."""
        for pid in self.backends():
            self.admin("SELECT pg_terminate_backend(%s, 5000)", pid)

    def signal(self, number: int) -> None:
        """Send a signal to the processes of the sessions in this database."""
        for pid in self.backends():
            os.kill(pid, number)


def make(server: Postgresql) -> Database:
    """Make an empty database on a server."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server.admin_uri, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} OWNER {server.name} TEMPLATE template0".encode())
    return Database(server, name)


@pytest.fixture(scope="session")
def session_postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgresql]:
    """A running server that the tests of a worker share: to be used and left as it was found."""
    server = CopiedPostgresql(tmp_path_factory.mktemp("postgresql"))
    server.environment = {"LANGUAGE": "de"}  # unused while lc_messages is C
    with server:
        yield server


@pytest.fixture
def database(session_postgresql: Postgresql) -> Iterator[Database]:
    """An empty database of this test's own."""
    made = make(session_postgresql)
    yield made
    with psycopg.connect(session_postgresql.admin_uri, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {made.name} WITH (FORCE)".encode())


@pytest.fixture
def own_postgresql(database: Database) -> Iterator[Database]:
    """A database on a server that this test may kill: it runs again afterwards."""
    yield database
    if database.server.process is None:
        database.server.start()
