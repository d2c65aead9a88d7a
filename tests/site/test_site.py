"""Daemons share the stations of a site; whatever becomes of one of them, every request is answered, by one CSR."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from asker import until
from asking import BOUND
from line import Line
from siterig import SiteRig

SHARDS = 8


class Site(SiteRig):
    """A site of two daemons, and what PostgreSQL and the daemons say of it."""

    def epochs(self) -> list[int]:
        """How often each shard was taken."""
        return [int(epoch) for (epoch,) in self.rows("SELECT epoch FROM stationkey.shard WHERE of > 0 ORDER BY number")]

    def shares(self) -> list[int]:
        """How many shards each living daemon has, by PostgreSQL's locks."""
        found = self.rows(
            "SELECT presence.pid, shard.objid FROM pg_locks presence LEFT JOIN pg_locks shard"
            " ON shard.pid = presence.pid AND shard.locktype = 'advisory' AND shard.classid = x'534B0002'::int"
            " WHERE presence.locktype = 'advisory' AND presence.classid = x'534B0001'::int"
        )
        return sorted(Counter(pid for pid, shard in found if shard is not None).values())

    def sessions(self) -> list[int]:
        """The number of shards of each MQTT session that may exist."""
        return [int(of) for (of,) in self.rows("SELECT of FROM stationkey.session ORDER BY of, number")]

    def recorded(self) -> set[str]:
        """The topic filters on record, of all MQTT sessions."""
        return {str(filters) for (filters,) in self.rows("SELECT filters FROM stationkey.session")}

    def wait_for_shares(self, *shares: int) -> None:
        until(lambda: self.shares() == sorted(shares), f"the shares are {shares}, not {self.shares()}")

    def subscriptions(self, daemon: int) -> int:
        """How often a daemon has subscribed, in all its runs of a test."""
        return self.daemons[daemon].log.count('"event": "ready"')

    def serve(self) -> None:
        """Start the daemons, and wait until each has its share and every station can ask."""
        for daemon in self.daemons:
            daemon.launch()
        self.wait_for_shares(4, 4)
        until(lambda: self.subscriptions(0) + self.subscriptions(1) >= SHARDS, "each shard has subscribed")

    def serve_alone(self) -> None:
        """Start one daemon, and wait until every station can ask."""
        self.daemons[0].launch()
        self.wait_for_shares(SHARDS)
        until(lambda: self.subscriptions(0) == SHARDS, "each shard has subscribed")

    def forget(self) -> None:
        """Begin anew: no tables, no logs, the configuration of all tests."""
        self.execute("DROP SCHEMA IF EXISTS stationkey CASCADE")
        self.lease, self.shards, self.filters = 3.0, SHARDS, ("depot7/+",)
        for number, line in enumerate(self.lines):
            self.daemons[number] = made = self.daemon(number, port=line.port)
            (made.directory / "log").unlink(missing_ok=True)

    def end(self) -> None:
        """End the daemons, whatever became of them, and be whole again."""
        self.depot.keep_up(0)
        self.kill()
        for line in self.lines:
            line.mend()
        if self.postgresql.process is None:
            self.postgresql.start()

    def execute(self, statement: str) -> None:
        """Run a statement that returns no rows."""
        with psycopg.connect(self.postgresql.admin_uri, autocommit=True) as connection:
            connection.execute(statement.encode())

    def ask_all(self) -> None:
        """Have each station ask once, and be answered."""
        for station in self.depot.stations:
            self.depot.publish(station)
        self.depot.wait_for_all()
        assert not self.depot.rejected
        assert self.depot.accepted.keys() == self.depot.requests.keys()


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """PostgreSQL, broker, token and stations, which these tests share."""
    with Site(tmp_path_factory.mktemp("site"), daemons=2, shards=SHARDS, stations=12) as rig:
        yield rig


@pytest.fixture
def site(peers: Site) -> Iterator[Site]:
    """A site that nobody has served yet."""
    peers.forget()
    yield peers
    peers.end()


def test_one_daemon_serves_all_and_shares_with_a_second(site: Site) -> None:
    site.serve_alone()
    other = site.daemons[1]
    site.ask_all()

    other.launch()
    site.wait_for_shares(4, 4)
    site.ask_all()

    other.terminate()
    site.wait_for_shares(8)
    site.ask_all()


def test_a_killed_daemon_is_replaced_and_nothing_is_lost(site: Site) -> None:
    site.serve()
    site.depot.keep_up(16)
    site.depot.wait_for(lambda: len(site.depot.answers) > 40, "there is load")

    site.daemons[0].kill()

    site.wait_for_shares(8)
    answered = len(site.depot.answers)
    site.depot.wait_for(lambda: len(site.depot.answers) > answered + 40, "the other answers")
    site.depot.keep_up(0)
    site.depot.wait_for_all()
    assert site.depot.accepted.keys() == site.depot.requests.keys()


def test_a_stopped_daemon_is_replaced_and_writes_nothing_when_it_comes_back(site: Site) -> None:
    site.serve()
    site.depot.keep_up(16)
    site.depot.wait_for(lambda: len(site.depot.answers) > 40, "there is load")

    site.daemons[0].freeze()
    site.wait_for_shares(8)
    site.daemons[0].thaw()

    site.wait_for_shares(4, 4)
    site.depot.keep_up(0)
    site.depot.wait_for_all()
    assert site.depot.accepted.keys() == site.depot.requests.keys()
    assert site.daemons[0].log.count("shard_lost") >= 4


def test_an_ending_daemon_hands_over_without_waiting_for_a_heartbeat(site: Site) -> None:
    site.lease = 200.0
    for number, line in enumerate(site.lines):
        site.configure(site.folder / f"daemon-{number}", port=line.port)
    site.serve_alone()
    one, other = site.daemons
    other.launch()
    until(lambda: "keystore" in other.log, "the second has begun")
    site.depot.keep_up(16)

    one.terminate()

    site.wait_for_shares(8)
    site.depot.keep_up(0)
    site.depot.wait_for_all()
    assert site.depot.accepted.keys() == site.depot.requests.keys()
    assert '"event": "stopped"' in one.log


def test_a_restart_of_postgresql_moves_nothing(site: Site) -> None:
    site.serve()
    site.ask_all()
    epochs = site.epochs()

    site.postgresql.terminate()
    site.postgresql.start()

    site.wait_for_shares(4, 4)
    site.ask_all()
    assert site.epochs() == epochs


def test_a_cut_lease_connection_moves_nothing(site: Site) -> None:
    site.serve_alone()

    ((pid,),) = site.rows("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'stationkey lease%'")
    site.rows("SELECT pg_terminate_backend(%s)", pid)
    until(lambda: site.rows("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid) == [(0,)], "it is gone")

    site.wait_for_shares(8)
    site.ask_all()
    assert set(site.epochs()) == {1}
    assert site.subscriptions(0) == SHARDS


def test_a_daemon_behind_a_silent_network_is_replaced_and_comes_back(site: Site) -> None:
    site.serve()
    site.depot.keep_up(8)

    site.lines[0].silence()
    site.wait_for_shares(8)
    site.lines[0].mend()

    site.wait_for_shares(4, 4)
    site.depot.keep_up(0)
    site.depot.wait_for_all(again=5.0)
    assert "shard_lost" in site.daemons[0].log


def test_a_daemon_waits_for_postgresql_and_ends_meanwhile_at_once(site: Site) -> None:
    site.postgresql.terminate()
    one = site.daemons[0]
    one.launch()
    until(lambda: "ledger_unreachable" in one.log, "it says so")

    one.terminate()

    one.launch()
    site.postgresql.start()
    site.wait_for_shares(8)
    until(lambda: site.subscriptions(0) == SHARDS, "each shard has subscribed")
    site.ask_all()


def test_another_number_of_shards_waits_for_the_old_one_and_then_answers_what_it_left(site: Site) -> None:
    site.serve_alone()
    old, new = site.daemons
    site.shards = 3
    site.configure(site.folder / "daemon-1", port=site.lines[1].port)
    new.launch()
    until(lambda: "shard_count_differs" in new.log, "it says so")
    site.ask_all()
    new.terminate()
    old.terminate()
    for station in site.depot.stations:
        site.depot.publish(station)

    new.launch()
    until(lambda: "adopting" in new.log, "it begins")
    new.kill()
    new.launch()

    site.depot.wait_for_all()
    site.wait_for_shares(3)
    until(lambda: site.sessions() == [3, 3, 3], "the old sessions have ended")
    site.ask_all()
    assert not site.depot.rejected


def test_a_daemon_that_the_broker_cannot_hear_leaves_its_shards_and_gets_them_back(site: Site) -> None:
    with Line(site.broker.port) as line:
        lonely = site.daemons[0]
        lonely.arguments = tuple(
            f"mqtt://127.0.0.1:{line.port}" if one == site.broker.url else one for one in lonely.arguments
        )
        site.serve()
        site.depot.keep_up(8)

        line.cut()
        site.wait_for_shares(8)
        site.depot.keep_up(0)
        site.depot.wait_for_all()
        line.mend()

        site.wait_for_shares(4, 4)
        site.ask_all()
        lonely.kill()


def test_a_daemon_that_the_broker_cannot_hear_leaves_a_new_number_of_shards_to_others(site: Site) -> None:
    site.serve_alone()
    lonely, other = site.daemons
    lonely.terminate()
    for station in site.depot.stations:
        site.depot.publish(station)
    site.shards = 3
    with Line(site.broker.port) as line:
        line.cut()
        for number, network in enumerate(site.lines):
            site.configure(site.folder / f"daemon-{number}", port=network.port)
        lonely.arguments = tuple(
            f"mqtt://127.0.0.1:{line.port}" if one == site.broker.url else one for one in lonely.arguments
        )
        lonely.launch()
        until(lambda: "adopting" in lonely.log, "it begins")

        other.launch()

        site.wait_for_shares(3)
        until(lambda: site.sessions() == [3, 3, 3], "the old sessions have ended")
        site.depot.wait_for_all()
        assert not site.depot.rejected
        lonely.kill()


def test_a_lost_broker_moves_nothing_for_long(site: Site) -> None:
    site.serve()

    site.broker.terminate()
    site.broker.start()

    until(lambda: site.subscriptions(0) + site.subscriptions(1) >= 2 * SHARDS, "each shard has subscribed again")
    site.wait_for_shares(4, 4)
    site.ask_all()


def test_topics_that_are_no_longer_configured_are_unsubscribed(site: Site) -> None:
    site.filters = ("depot7/+", "depot8/+")
    site.configure(site.folder / "daemon-0", port=site.lines[0].port)
    site.serve_alone()
    site.daemons[0].terminate()
    site.filters = ("depot7/+",)
    site.configure(site.folder / "daemon-0", port=site.lines[0].port)

    site.daemons[0].launch()

    until(lambda: site.subscriptions(0) == 2 * SHARDS, "each shard has subscribed again")
    until(lambda: site.recorded() == {'["depot7/+/josev/cs"]'}, "that is on record")
    site.ask_all()


def test_daemons_with_different_stations_say_so(site: Site) -> None:
    site.serve()
    one, other = site.daemons
    one.terminate()
    site.filters = ("depot7/+", "depot8/+")
    site.configure(site.folder / "daemon-0", port=site.lines[0].port)

    one.launch()

    until(lambda: "stations_differ" in one.log and "stations_differ" in other.log, "both say so")
    assert "stations_differ" not in one.log.partition('"event": "stopped"')[0]


def test_a_standby_is_ready_for_its_service_manager_without_a_shard(site: Site, tmp_path: Path) -> None:
    site.shards = 1
    for number, line in enumerate(site.lines):
        site.configure(site.folder / f"daemon-{number}", port=line.port)
    site.daemons[0].launch()
    site.wait_for_shares(1)
    until(lambda: site.subscriptions(0) == 1, "the shard has subscribed")
    standby = site.daemons[1]

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(BOUND)
        standby.environment = {**standby.environment, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        standby.launch()

        assert manager.recv(1024) == b"READY=1"

    site.daemons[0].kill()
    site.ask_all()
    assert site.subscriptions(1) == 1
