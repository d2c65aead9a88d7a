"""``python -m bench.site``: what a site on PostgreSQL costs beside one on SQLite, and where it goes.

One broker and one database server on this machine, and a token for each side: SoftHSM takes longer the more it has. The
sides are asked in turns, so that what is compared was measured in the same seconds. Writes the tables of docs/site.md
with ``--keep``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import psycopg
from depot import Depot
from peers import Daemon, Mosquitto, Postgresql, SharedToken

from bench import ROOT
from bench.report import number, put
from bench.rows import SITE_ONE, SITE_SQLITE, SITE_THREE, SITE_TWO
from bench.sides import NO_LIMIT, StockMosquitto, processor_time

PAGE: Final = ROOT / "docs/site.md"
SIDES: Final = {SITE_SQLITE: 0, SITE_ONE: 1, SITE_TWO: 2, SITE_THREE: 3}
"""How many daemons share a ledger on PostgreSQL, by the name of the side."""
SHARDS: Final = 6
STATIONS: Final = 30
IN_FLIGHT: Final = 16
ROUNDS: Final = 5
BLOCK: Final = 120
"""Requests of a side in a round, for its rate."""
SINGLE: Final = 20
"""Requests of a side in a round one after the other, for what one takes and costs."""
BOUND: Final = 120.0
CONFIG: Final = """\
client_id = "{name}"
{ledger}
[site]
stations = "{name}/+"
shards = {shards}
[lifecycle]
pending_limit = 100
pending_total = 10000
"""


class Side:
    """Daemons that share a ledger, and the stations that ask them.

    Args:
        name: of the side.
        folder: for its files.
        broker: the broker.
        token: where the keys are.
        postgresql: the server, on which it has a database of its own.
    """

    def __init__(
        self, name: str, folder: Path, broker: Mosquitto, token: SharedToken, postgresql: Postgresql | None
    ) -> None:
        self.name = name
        self.postgresql = postgresql
        self._database = folder.name
        self._folder = folder
        folder.mkdir()
        ledger = ""
        if postgresql is not None:
            self._admin(f"CREATE DATABASE {self._database} OWNER {postgresql.name}", database="postgres")
            self._admin("CREATE EXTENSION pg_stat_statements")
            uri = postgresql.uri.rpartition("/")[0] + f"/{self._database}"
            ledger = f'ledger = "{uri}"\nledger_password_file = "{postgresql.password_file}"'
        self._config = folder / "stationkey.toml"
        shards = 1 if postgresql is None else SHARDS
        self._config.write_text(CONFIG.format(name=folder.name, ledger=ledger, shards=shards) + NO_LIMIT)
        self.daemons = [self._daemon(number, broker, token) for number in range(max(SIDES[name], 1))]
        self.depot = Depot(
            broker, [f"{folder.name}/s{number}" for number in range(STATIONS)], filters=(f"{folder.name}/+",)
        )

    def _daemon(self, number: int, broker: Mosquitto, token: SharedToken) -> Daemon:
        home = self._folder / str(number)
        daemon = Daemon(
            home / "log",
            *("--site", "--broker", broker.url, "--keystore", token.uri),
            *("--state-dir", str(home / "state"), "--config", str(self._config)),
        )
        daemon.environment = token.clients
        return daemon

    def _admin(self, statement: str, *, database: str | None = None) -> list[tuple[float, ...]]:
        assert self.postgresql is not None
        where = self.postgresql.admin_uri.replace(f"/{self.postgresql.name}?", f"/{database or self._database}?")
        with psycopg.connect(where, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def start(self, stack: ExitStack) -> None:
        """Start everything, and wait until each station is served."""
        for daemon in self.daemons:
            stack.callback(daemon.terminate)
            daemon.launch()
        stack.enter_context(self.depot)
        self.depot.keep_up(0)
        for station in self.depot.stations:
            self.depot.publish(station)
        self.depot.wait_for_all(bound=BOUND, again=5.0)

    def rate(self) -> float:
        """Return answers a second, with `IN_FLIGHT` requests in flight."""
        before = len(self.depot.answers)
        started = time.perf_counter()
        self.depot.keep_up(IN_FLIGHT)
        self.depot.wait_for(lambda: len(self.depot.answers) >= before + BLOCK, "a block is answered", bound=BOUND)
        rate = (len(self.depot.answers) - before) / (time.perf_counter() - started)
        self.depot.keep_up(0)
        self.depot.wait_for_all(bound=BOUND)
        return rate

    def single(self) -> float:
        """Return the median time of a request in milliseconds, one after the other."""
        taken = []
        for station in self.depot.stations[:SINGLE]:
            started = time.perf_counter()
            answer = self.depot.ask(station)
            taken.append((answer.at - started) * 1000)
        return statistics.median(taken)

    def spent(self) -> dict[str, float]:
        """Return what has been spent so far, by its name."""
        found = {"daemon": sum(processor_time(daemon) for daemon in self.daemons)}
        if self.postgresql is None:
            return found
        ((wal, stored),) = self._admin(
            "SELECT pg_current_wal_insert_lsn() - '0/0', pg_database_size(current_database())"
        )
        ((calls, executing),) = self._admin(
            "SELECT sum(calls), sum(total_exec_time) FROM pg_stat_statements JOIN pg_database ON oid = dbid"
            " JOIN pg_roles ON pg_roles.oid = userid WHERE datname = current_database() AND rolname = 'stationkey'"
        )
        ((syncs, syncing),) = self._admin("SELECT wal_sync, wal_sync_time FROM pg_stat_wal")
        server = server_time(self.postgresql)
        numbers = {"wal": wal, "stored": stored, "statements": calls, "executing": executing}
        numbers |= {"syncs": syncs, "syncing": syncing}
        return {**found, "server": server, **{name: float(value) for name, value in numbers.items()}}


def server_time(server: Postgresql) -> float:
    """Return the processor time of the server's living processes, in milliseconds."""
    assert server.process is not None
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == server.process.pid:
                total += int(stat.with_name("schedstat").read_text().split()[0]) / 1e6
        except (OSError, ValueError):  # it has just ended
            continue
    return total


def measure(rounds: int = ROUNDS) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, dict[str, float]]]:
    """Return rates and times of each side in some rounds, and what a request costs where there is one daemon."""
    base = ROOT / ".bench"
    base.mkdir(exist_ok=True)
    costed = (SITE_SQLITE, SITE_ONE)
    with tempfile.TemporaryDirectory(dir=base) as name, ExitStack() as stack:
        folder = Path(name)
        settings = (
            "shared_preload_libraries = 'pg_stat_statements'",
            "track_wal_io_timing = on",
            "shared_buffers = '128MB'",
        )
        postgresql = stack.enter_context(Postgresql(folder / "postgresql", settings))
        broker = stack.enter_context(StockMosquitto(folder / "broker"))
        sides = {}
        for number, side in enumerate(SIDES):
            token = stack.enter_context(SharedToken(folder / f"token{number}"))
            one = Side(side, folder / f"side{number}", broker, token, postgresql if SIDES[side] else None)
            one.start(stack)
            sides[side] = one
        rates: dict[str, list[float]] = {side: [] for side in sides}
        times: dict[str, list[float]] = {side: [] for side in costed}
        costs: dict[str, dict[str, float]] = {side: {} for side in costed}
        in_turns(rates, lambda side: sides[side].rate(), rounds)
        for _ in range(rounds):
            for side in costed:
                before, answers = sides[side].spent(), len(sides[side].depot.answers)
                times[side].append(sides[side].single())
                asked = len(sides[side].depot.answers) - answers
                for what, value in sides[side].spent().items():
                    costs[side].setdefault(what, 0.0)
                    costs[side][what] += (value - before[what]) / asked / rounds
        return rates, times, costs


def in_turns(samples: dict[str, list[float]], act: Callable[[str], float], rounds: int) -> None:
    """Take a sample of each side, round after round; the first round only warms up."""
    for round_ in range(rounds + 1):
        for side, taken in samples.items():
            value = act(side)
            if round_:
                taken.append(value)


def tables(rates: dict[str, list[float]], times: dict[str, list[float]], costs: dict[str, dict[str, float]]) -> str:
    """Return the tables of the page, in Markdown."""
    base = statistics.median(rates[SITE_SQLITE])
    lines = ["| | answers a second | beside SQLite |", "|---|---:|---:|"]
    for side, samples in rates.items():
        median = statistics.median(samples)
        lines.append(f"| {side} | {number(median)} | {median / base:.2f} |")
    lines += ["", "| one request | SQLite | PostgreSQL |", "|---|---:|---:|"]
    first, second = (costs[side] for side in times)
    medians = [statistics.median(samples) for samples in times.values()]
    rows = (
        ("from its publication to its answer, ms", medians[0], medians[1]),
        ("processor time of the daemon, ms", first["daemon"], second["daemon"]),
        ("processor time of the database server, ms", None, second["server"]),
        ("statements", None, second["statements"]),
        ("time that the server executes them, ms", None, second["executing"]),
        ("syncs of the write-ahead log", None, second["syncs"]),
        ("time of these, ms", None, second["syncing"]),
        ("write-ahead log, bytes", None, second["wal"]),
        ("the database grows by, bytes", None, second["stored"]),
    )
    for what, ours, others in rows:
        lines.append(f"| {what} | {'' if ours is None else number(ours)} | {number(others)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables, or write them into the page."""
    text = tables(*measure())
    print(text)  # noqa: T201 - what it is for
    if "--keep" in sys.argv:
        PAGE.write_text(put(PAGE.read_text(), "costs", text))


if __name__ == "__main__":
    main()
