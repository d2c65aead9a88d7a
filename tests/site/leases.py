"""Daemons of a site as far as their leases go: the connection to PostgreSQL, and nothing that serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from secrets import token_hex

import pytest
from postgresql import Database, database, own_postgresql, session_postgresql

from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import Connection, connect, explained
from stationkey.site.connection import Cut, Identity, LeaseConnection

__all__ = ["Daemons", "daemons", "database", "own_postgresql", "restarting", "session_postgresql"]

LEASE = 2.0
"""Seconds: the shortest that the configuration allows."""


class Daemons:
    """Makes daemons that share one database."""

    def __init__(self, database: Database, opened: ExitStack) -> None:
        self.database = database
        self._opened = opened
        with connect(database.uri, database.password, name="test") as connection:
            schema.prepare(connection)

    def cut(
        self,
        shards: int = 4,
        *,
        client_id: str = "stationkey-x",
        filters: tuple[str, ...] = ("+/josev/cs",),
        lease: float = LEASE,
    ) -> Cut:
        return Cut(shards, client_id, filters, lease)

    def open(
        self,
        cut: Cut | None = None,
        *,
        instance: str = "",
        name: str = "",
        present: bool = True,
        set_back: bool = False,
    ) -> LeaseConnection:
        """Open a lease connection; by default of a new daemon. It may find the clock of the test for the server's."""

        def connected(label: str) -> Connection:
            connection = connect(self.database.uri, self.database.password, name=label)
            if set_back:
                connection.execute("SET search_path = stationkey, pg_catalog")
            return connection

        instance = instance or token_hex(8)
        connection = LeaseConnection(
            connected,
            explained=explained,
            identity=Identity(instance, name or f"daemon-{instance}", "here", 1, schema.version()),
            cut=cut or self.cut(),
            present=present,
        )
        self._opened.callback(connection.close)
        return connection

    @contextmanager
    def holding(self, number: int, *, name: str = "test", pipeline: bool = False) -> Iterator[None]:
        """Keep a transaction open that has a shard's row, as a daemon that was stopped in the middle of one does.

        Args:
            number: of the shard.
            name: of the connection.
            pipeline: whether it is stopped within a pipeline; the server then does not take it for idle.
        """
        with closing(connect(self.database.uri, self.database.password, name=name)) as connection:
            connection.execute("BEGIN")
            statement, values = b"SELECT epoch FROM shard WHERE number = $1 FOR UPDATE", [str(number).encode()]
            if pipeline:
                connection.pgconn.enter_pipeline_mode()
                connection.pgconn.send_query_params(statement, values)
                connection.pgconn.send_flush_request()
                connection.pgconn.flush()
                connection.pgconn.get_result()  # it is done, and the row is locked
            else:
                connection.pgconn.exec_params(statement, values)
            yield

    def epochs(self) -> dict[int, int]:
        """Return the epoch of each shard."""
        return {
            int(str(n)): int(str(epoch))
            for n, epoch in self.database.admin("SELECT number, epoch FROM stationkey.shard")
        }

    def sessions(self) -> dict[str, str]:
        """Return the recorded topic filters of each MQTT session."""
        return {
            str(one): str(filters)
            for one, filters in self.database.admin("SELECT client_id, filters FROM stationkey.session")
        }


@pytest.fixture
def restarting(own_postgresql: Database) -> Iterator[Daemons]:
    """Daemons on a server of their own, which the test may restart."""
    with ExitStack() as opened:
        yield Daemons(own_postgresql, opened)


@pytest.fixture
def daemons(database: Database) -> Iterator[Daemons]:
    with ExitStack() as opened:
        yield Daemons(database, opened)
