"""A site between its peers: PostgreSQL, a broker, a token that all daemons reach, the daemons, and their stations."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from asker import until
from depot import Depot
from line import Line
from peers import Daemon, Mosquitto, Postgresql, SharedToken
from postgresql import CopiedPostgresql

from stationkey.ledger.postgresql.slots import shard_of
from stationkey.site.locks import LockClass

CONFIG: Final = """\
ledger = "{ledger}"
ledger_password_file = "{password}"
[site]
stations = [{stations}]
shards = {shards}
lease_seconds = {lease}
[policy]
requests_per_minute = 0
[lifecycle]
pending_limit = 100
pending_total = 10000
"""
"""Bounds so wide that no key of a test has to make room for another, and no limit on how often a test may ask."""


PATIENCE: Final = 60.0
"""Seconds after which a site that does not serve has failed."""


class SiteRig:
    """Everything of a site, on this machine; the daemons are started by the test and ended with the rig.

    Args:
        folder: where all of it keeps its files.
        daemons: how many there are.
        shards: into how many shards the stations are cut.
        stations: how many stations ask.
        lease: seconds of a lease.
        filters: what ``[site] stations`` says.
        config: further lines of each daemon's configuration.

    Attributes:
        lines: the network between each daemon and the database.
        depot: asks for the stations.
    """

    def __init__(
        self,
        folder: Path,
        *,
        daemons: int = 3,
        shards: int = 8,
        stations: int = 24,
        lease: float = 2.0,
        filters: Sequence[str] = ("depot7/+",),
        config: str = "",
    ) -> None:
        self.folder = folder
        self.lease, self.shards, self.filters, self._config = lease, shards, tuple(filters), config
        self.broker = Mosquitto(folder / "broker", "max_queued_messages 0", "max_inflight_messages 0")
        self.postgresql: Postgresql = CopiedPostgresql(folder / "postgresql")
        self.token = SharedToken(folder / "token")
        self.depot = Depot(self.broker, [f"depot7/s{number}" for number in range(stations)], filters=self.filters)
        self.daemons: list[Daemon] = []
        self.lines: list[Line] = []
        self._count = daemons
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            for peer in (self.postgresql, self.broker, self.token, self.depot):
                opening.enter_context(peer)
            for number in range(self._count):
                line = opening.enter_context(Line(self.postgresql.port))
                self.lines.append(line)
                self.daemons.append(self.daemon(number, port=line.port))
            opening.callback(self.kill)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def home(self, daemon: Daemon) -> Path:
        """Where a daemon has its configuration and its state directory."""
        return daemon.directory.parent

    def daemon(self, number: int, *, port: int, program: type[Daemon] = Daemon, first: tuple[str, ...] = ()) -> Daemon:
        """A daemon, with its configuration and its state directory.

        Args:
            number: which.
            port: where it reaches the database.
            program: what is started.
            first: what it is told before the options.
        """
        home = self.folder / f"daemon-{number}"
        home.mkdir(exist_ok=True)
        self.configure(home, port=port)
        made = program(
            home / "log",
            *first,
            *("--site", "--broker", self.broker.url, "--keystore", self.token.uri),
            *("--state-dir", str(home / "state"), "--config", str(home / "stationkey.toml")),
        )
        made.environment = self.token.clients
        return made

    def configure(self, home: Path, *, port: int | str, config: str = "") -> None:
        """Write the configuration of a daemon, for its next start."""
        name = self.postgresql.name
        text = CONFIG.format(
            ledger=f"postgresql://{name}@127.0.0.1:{port}/{name}",
            password=self.postgresql.password_file,
            stations=", ".join(f'"{each}"' for each in self.filters),
            shards=self.shards,
            lease=self.lease,
        )
        (home / "stationkey.toml").write_text(text + self._config + config)

    def start(self, *stations: str) -> None:
        """Start every daemon, and wait until each station has an answer: then the broker knows each shard.

        Args:
            stations: those that are served; all, if none is named.
        """
        for daemon in self.daemons:
            daemon.launch()
        self.wait_until_held()
        for station in stations or self.depot.stations:
            self.depot.publish(station)
        self.depot.wait_for_all(bound=PATIENCE, again=2.0)

    def kill(self) -> None:
        """End every daemon as a loss of power would."""
        for daemon in self.daemons:
            if daemon.process is not None:
                daemon.thaw()
            daemon.kill()

    def terminate(self) -> None:
        """End every daemon in its own good order."""
        for daemon in self.daemons:
            daemon.terminate()

    # The database, as its superuser sees it.

    def rows(self, statement: str, *arguments: object) -> list[Any]:
        """What a query returns."""
        with psycopg.connect(
            self.postgresql.admin_uri, autocommit=True, options="-c search_path=stationkey"
        ) as connection:
            return connection.execute(statement, arguments or None).fetchall()

    def held_by(self, daemon: Daemon) -> set[int]:
        """The shards that a daemon holds, by the locks of its connection."""
        query = (
            "SELECT objid FROM pg_locks JOIN daemon ON backend = pg_locks.pid WHERE locktype = 'advisory' AND granted"
            " AND objsubid = 2 AND classid = %s AND daemon.pid = %s"
        )
        assert daemon.process is not None
        return {int(number) for (number,) in self.rows(query, int(LockClass.SHARD), daemon.process.pid)}

    def stations_of(self, daemon: Daemon) -> dict[int, frozenset[str]]:
        """The stations of each shard that a daemon holds."""
        return {
            number: frozenset(name for name in self.depot.stations if shard_of(name, self.shards) == number)
            for number in self.held_by(daemon)
        }

    def wait_until_held(self, *, bound: float = PATIENCE) -> None:
        """Wait until each shard is held by a connection that lives."""
        until(lambda: self.held() == set(range(self.shards)), "each shard has a holder", bound=bound)

    def held(self) -> set[int]:
        """The shards that a living connection has locked."""
        query = "SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = %s"
        return {int(number) for (number,) in self.rows(query, int(LockClass.SHARD))}

    def cut_backends(self, chance: random.Random, *, share: float = 1.0) -> int:
        """End connections of the daemons at the server, each by chance; how many."""
        query = "SELECT pid FROM pg_stat_activity WHERE usename = %s"
        chosen = [pid for (pid,) in self.rows(query, self.postgresql.name) if chance.random() < share]
        for pid in chosen:
            self.rows("SELECT pg_terminate_backend(%s)", pid)
        return len(chosen)

    # The token, as another program sees it.

    def objects(self) -> dict[str, set[str]]:
        """The CKA_IDs in the token, by class of object."""
        told = self.token.run(
            *("pkcs11-tool", "--module", str(self.token.module), "--token-label", self.token.label),
            *("--login", "--pin", self.token.pin, "--list-objects"),
        )
        found: dict[str, set[str]] = {"Private": set(), "Public": set()}
        for part in told.replace("\nPublic", "\n\0Public").replace("\nPrivate", "\n\0Private").split("\0"):
            kind = part.partition(" ")[0]
            for line in part.splitlines():
                name, _, value = line.strip().partition(":")
                if name == "ID" and kind in found:
                    found[kind].add(value.strip())
        return found
