"""A second PostgreSQL server that has every commit of the first before it is confirmed, and can take its place."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

import psycopg
from asker import until
from peers import Postgresql

NAME: Final = "standby"


class Standby(Postgresql):
    """A synchronous standby of another server, which commits nothing without it from its start on.

    Args:
        directory: for its log.
        primary: the server, which is running.
    """

    def __init__(self, directory: Path, primary: Postgresql) -> None:
        directory.mkdir()
        super().__init__(directory)
        self.password, self.password_file = primary.password, primary.password_file
        self._primary = primary

    def _make(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stationkey-postgresql-")
        if self.user is not None:
            shutil.chown(self._home, self.user)
        socket, port, user = self._primary.data.parent, self._primary.port, self.admin
        reached = ("--host", str(socket), "--port", str(port), "--username", user)
        self._run("pg_basebackup", *reached, "--pgdata", str(self.data), "--write-recovery-conf", "--checkpoint=fast")
        with (self.data / "postgresql.auto.conf").open("a") as configuration:
            configuration.write(
                f"primary_conninfo = 'host={socket} port={port} user={user} application_name={NAME}'\n"
                f"port = {self.port}\nunix_socket_directories = '{self._home}'\n"
            )

    def listening(self) -> bool:
        if "ready to accept read-only connections" not in self.log:
            return False
        with psycopg.connect(self._primary.admin_uri, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{NAME}'".encode())
            connection.execute("SELECT pg_reload_conf()")
            query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            until(lambda: connection.execute(query).fetchone() == (1,), "it has each commit")
        return True

    def promote(self) -> None:
        """Take the place of the other server."""
        with psycopg.connect(self.admin_uri, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
