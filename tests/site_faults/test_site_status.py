"""``stationkey status --site``, of a database that a test has put there."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from urllib.request import urlopen

import pytest
from asker import until
from peers import free_port
from postgresql import Database
from reasons import Ended, command
from siterig import PATIENCE, SiteRig

from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import Connection, connect
from stationkey.ledger.postgresql.slots import shard_of
from stationkey.observability.status import SiteGlance
from stationkey.site.locks import LockClass
from stationkey.site.overview import Looking, look

pytest_plugins = ["postgresql"]

SHARDS = 4


@dataclass
class Site:
    """A site in a database: three daemons, of which one has ended without a word, and four shards."""

    database: Database
    config: Path
    connections: list[Connection]

    def status(self, *arguments: str) -> Ended:
        return command("status", "--site", "--config", str(self.config), *arguments)


def daemon(connection: Connection, name: str, *shards: int) -> None:
    """Let a daemon live by this connection, and hold these shards."""
    connection.execute("SELECT pg_advisory_lock_shared(%s, 7)", (int(LockClass.PRESENCE),))
    connection.execute(
        "INSERT INTO daemon (instance, name, host, pid, version, schema, shards, lease, backend)"
        " VALUES (%s, %s, 'host', 1, '0.1.0', 1, 4, 10, pg_backend_pid())",
        (f"instance of {name}", name),
    )
    for number in shards:
        connection.execute("SELECT pg_advisory_lock(%s, %s)", (int(LockClass.SHARD), number))
        connection.execute(
            "UPDATE shard SET epoch = epoch + 1, holder = %s, since = clock_timestamp() WHERE number = %s",
            (f"instance of {name}", number),
        )


def station(connection: Connection, name: str, *, delivered: int) -> None:
    """Let a station have a key and its answer."""
    (number,) = connection.execute(
        "INSERT INTO key (key_id, scheme, key_type, station, state, created_at, public)"
        " VALUES (%s, 'pkcs11', 'secp256r1', %s, 'pre-activation', 0, '') RETURNING number",
        (name, name),
    ).fetchone() or (0,)
    connection.execute(
        "INSERT INTO answer (key_number, station, canonical_id, request_id, digest, csr, answered_at, running,"
        " delivered) VALUES (%s, %s, %s, %s, '', '', 0, 0, %s)",
        (number, name, name, name, delivered),
    )


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Iterator[Site]:
    connections = [connect(database.uri, database.password, name=name) for name in ("a", "b", "c")]
    first, second, gone = connections
    schema.prepare(first)
    first.execute("INSERT INTO shard (number, of) SELECT number, 4 FROM generate_series(0, 3) number")
    first.execute("INSERT INTO session (client_id, number, of, in_hand, waiting) VALUES ('x-4-0', 0, 4, 3, 5)")
    daemon(first, "a", 0, 1)
    daemon(second, "b", 2)
    daemon(gone, "c", 3)
    backend = gone.info.backend_pid
    gone.close()
    until(lambda: backend not in database.backends(), "the server has noticed")
    config = tmp_path / "stationkey.toml"
    config.write_text(
        f'ledger = "{database.uri}"\nledger_password_file = "{database.server.password_file}"\n'
        f'[site]\nstations = "depot7/+"\nshards = {SHARDS}\n'
    )
    yield Site(database, config, connections)
    for connection in connections:
        connection.close()


class TestLook:
    def test_a_shard_is_held_while_a_connection_has_its_lock(self, site: Site) -> None:
        seen = look(site.connections[0])
        assert [(shard.holder, shard.held) for shard in seen.shards] == [
            ("a", True),
            ("a", True),
            ("b", True),
            ("", False),
        ]
        assert not seen.healthy

    def test_a_daemon_that_has_ended_without_a_word_is_gone(self, site: Site) -> None:
        seen = look(site.connections[0])
        assert [(one.name, one.living, one.shards) for one in seen.daemons] == [
            ("a", True, 2),
            ("b", True, 1),
            ("c", False, 0),
        ]

    def test_the_backlog_is_that_of_the_holder(self, site: Site) -> None:
        first, *others = look(site.connections[0]).shards
        assert (first.in_hand, first.waiting) == (3, 5)
        assert [(shard.in_hand, shard.waiting) for shard in others] == [(0, 0)] * 3

    def test_stations_and_undelivered_answers_are_counted_by_shard(self, site: Site) -> None:
        names = [f"depot7/s{number}" for number in range(40)]
        for number, name in enumerate(names):
            station(site.connections[0], name, delivered=number % 2)
        seen = look(site.connections[0])
        for shard in seen.shards:
            own = [number for number, name in enumerate(names) if shard_of(name, SHARDS) == shard.number]
            assert (shard.stations, shard.undelivered) == (len(own), sum(1 for number in own if number % 2 == 0))
        assert [shard.stations for shard in look(site.connections[0], stations=False).shards] == [0] * SHARDS

    def test_a_lock_in_another_database_holds_nothing_here(self, site: Site) -> None:
        elsewhere = connect(site.database.server.uri, site.database.password, name="elsewhere")
        try:
            elsewhere.execute("SELECT pg_advisory_lock(%s, 3)", (int(LockClass.SHARD),))
            assert not look(site.connections[0]).shards[3].held
        finally:
            elsewhere.close()


class TestCommand:
    def test_it_fails_while_a_shard_has_no_holder(self, site: Site) -> None:
        assert site.status().exit_code == 1
        daemon(site.connections[1], "d", 3)
        assert site.status().exit_code == 0

    def test_it_fits_into_80_columns_and_names_every_shard_and_daemon(self, site: Site) -> None:
        shown = site.status().stdout.splitlines()
        assert max(map(len, shown)) <= 80
        table = shown[[line.startswith("SHARD") for line in shown].index(True) :]
        assert [line.split()[:2] for line in table[1 : SHARDS + 1]] == [
            ["0", "a"],
            ["1", "a"],
            ["2", "b"],
            ["3", "NONE"],
        ]
        assert {line.split()[0] for line in table[SHARDS + 3 :]} == {"a", "b", "c"}

    def test_for_programs_it_says_the_same(self, site: Site) -> None:
        found = json.loads(site.status("--json").stdout)
        assert [shard["holder"] for shard in found["shards"]] == ["a", "a", "b", None]
        assert [daemon["name"] for daemon in found["daemons"] if daemon["living"]] == ["a", "b"]
        assert found["healthy"] is False

    def test_a_database_that_does_not_answer_is_told(self, site: Site) -> None:
        site.config.write_text(site.config.read_text().replace(f"/{site.database.name}", "/nowhere"))
        ended = site.status("--json")
        found = json.loads(ended.stdout)
        assert (ended.exit_code, found["healthy"], found["shards"]) == (1, False, [])
        assert found["ledger_trouble"]

    def test_a_site_of_one_daemon_has_no_shards(self, tmp_path: Path) -> None:
        config = tmp_path / "stationkey.toml"
        config.write_text('[site]\nstations = "depot7/+"\n')
        assert command("status", "--site", "--config", str(config)).reason == "site_local"


class TestPage:
    async def test_those_who_ask_while_a_look_hangs_wait_for_the_same(self) -> None:
        goes_on, looks = Event(), list[None]()
        glance = SiteGlance(shards=(), daemons=())

        def act() -> SiteGlance:
            looks.append(None)
            assert goes_on.wait(30)
            return glance

        looking = Looking(act)
        asked = [asyncio.create_task(looking()) for _ in range(3)]
        await asyncio.sleep(0)  # each has asked
        asked[0].cancel()  # the page has given up
        goes_on.set()
        assert [await each for each in asked[1:]] == [glance, glance]
        assert len(looks) == 1
        looking.close()


class TestRunning:
    def test_each_daemon_shows_every_shard_with_its_holder(self, tmp_path: Path) -> None:
        address = f"127.0.0.1:{free_port()}"
        with SiteRig(
            tmp_path, daemons=1, shards=SHARDS, stations=4, config=f'[metrics]\nlisten = "{address}"\n'
        ) as rig:
            rig.start()
            with urlopen(f"http://{address}/", timeout=PATIENCE) as response:
                page = response.read().decode()
            with urlopen(f"http://{address}/metrics", timeout=PATIENCE) as response:
                figures = response.read().decode()
        numbers = [str(number) for number in range(SHARDS)]
        assert re.findall(r'data-label="Shard"><span>(\d+)<', page) == numbers
        assert re.findall(r'stationkey_shard_held\{shard="(\d+)"\} 1', figures) == numbers
