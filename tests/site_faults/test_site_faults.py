"""What may befall a site: database, network, broker, HSM, clocks and configuration. Each test ends with the judge."""

from __future__ import annotations

import os
import random
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest
from asker import until
from line import Line
from peers import Daemon
from siterig import SiteRig
from sitetruth import PATIENCE, settle
from standby import Standby

from stationkey.ledger.postgresql.slots import shard_of

LOAD = 8


class WrongClockDaemon(Daemon):
    """`wrong_clock_daemon.py`, in the place of ``stationkey serve``; its first argument is the file of its clock."""

    def command(self) -> list[str]:
        return [str(Path(__file__).parents[1] / "faults" / "wrong_clock_daemon.py"), *self.arguments]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[SiteRig]:
    """Two daemons, four shards and twelve stations."""
    with SiteRig(tmp_path, daemons=2, shards=4, stations=12) as opened:
        yield opened


def answered_everywhere(rig: SiteRig) -> None:
    """Let each station ask once more, and have its answer."""
    asked = [rig.depot.publish(station) for station in rig.depot.stations]
    rig.depot.wait_for(lambda: all(rig.depot.answers[each] for each in asked), "each station", bound=PATIENCE)


def serve(rig: SiteRig) -> None:
    """Ask all the while, and wait until so many more are answered as are asked at a time."""
    before = len(rig.depot.answers)
    rig.depot.keep_up(LOAD)
    rig.depot.wait_for(lambda: len(rig.depot.answers) > before + LOAD, "they serve", bound=PATIENCE)


def crash_a_process(rig: SiteRig) -> None:
    """End a process of the database server, which ends all others then and recovers."""
    query = "SELECT max(pid) FROM pg_stat_activity WHERE application_name LIKE 'stationkey shard%'"
    [(pid,)] = rig.rows(query)
    os.kill(pid, signal.SIGKILL)
    until(lambda: f"PID {pid}) was terminated" in rig.postgresql.log, "the server has noticed")


def accepted(rig: SiteRig, station: str) -> bool:
    """Whether a new request of a station is accepted."""
    return rig.depot.ask(station, bound=PATIENCE).response.data.status == "accepted"


class TestDaemons:
    def test_stations_with_the_same_id_get_keys_of_their_own(self, rig: SiteRig) -> None:
        rig.start()
        same = rig.depot.request(request_id=str(uuid.uuid4()))
        answers = [rig.depot.ask(station, same, bound=PATIENCE).response.data for station in rig.depot.stations]
        assert {answer.status for answer in answers} == {"accepted"}
        assert len({answer.csr for answer in answers}) == len(answers)
        settle(rig)

    def test_a_daemon_that_was_stopped_while_its_shards_moved_writes_nothing_more(self, rig: SiteRig) -> None:
        """It has requests in hand when it goes on, and the token had made their keys."""
        rig.start()
        serve(rig)
        stopped, other = rig.daemons
        rig.token.freeze()  # so that requests are in hand
        held = rig.stations_of(stopped)
        asked = [rig.depot.publish(min(names)) for names in held.values() if names]
        stopped.freeze()
        rig.token.thaw()
        until(lambda: rig.held_by(other) == set(range(rig.shards)), "its shards moved", bound=PATIENCE)
        rig.depot.wait_for(lambda: all(rig.depot.answers[each] for each in asked), "they are answered", bound=PATIENCE)
        stopped.thaw()
        until(lambda: rig.held_by(stopped), "it takes its share again", bound=PATIENCE)
        settle(rig)
        assert "ledger_unreachable" not in reasons(rig)


class TestNetwork:
    @pytest.mark.parametrize("how", [Line.silence, Line.silence_answers, Line.cut])
    def test_a_daemon_without_a_database_loses_its_shards_and_takes_its_share_again(
        self, rig: SiteRig, how: Callable[[Line], None]
    ) -> None:
        rig.start()
        serve(rig)
        (line, _), (lonely, other) = rig.lines, rig.daemons
        how(line)
        until(lambda: rig.held_by(other) == set(range(rig.shards)), "its shards moved", bound=PATIENCE)
        answered_everywhere(rig)
        line.mend()
        until(lambda: rig.held_by(lonely), "it takes its share again", bound=PATIENCE)
        settle(rig)


class TestDatabase:
    def test_a_server_that_is_restarted_under_load_costs_no_request(self, rig: SiteRig) -> None:
        rig.start()
        for _ in range(3):
            serve(rig)
            rig.postgresql.restart()
        settle(rig)
        assert "ledger_unreachable" not in reasons(rig)

    def test_connections_that_the_server_ends_cost_no_request(self, rig: SiteRig) -> None:
        chance = random.Random(1)
        rig.start()
        for _ in range(5):
            serve(rig)
            rig.cut_backends(chance)
        settle(rig)
        assert "ledger_unreachable" not in reasons(rig)

    def test_a_process_of_the_server_that_crashes_costs_no_request(self, rig: SiteRig) -> None:
        """The server ends all the others, and recovers: transactions that nobody heard of give their numbers back."""

        def is_back() -> bool:
            with suppress(psycopg.OperationalError):  # it is recovering, or about to
                return rig.held() == set(range(rig.shards))
            return False

        rig.start()
        for _ in range(4):
            serve(rig)
            crash_a_process(rig)
            until(is_back, "it is back", bound=PATIENCE)
        settle(rig)
        assert not rig.depot.rejected

    @pytest.mark.long
    def test_a_standby_that_takes_the_place_of_a_server_that_hangs_has_lost_nothing(self, rig: SiteRig) -> None:
        """The daemons try the server that hangs first, each time: that takes longer than a heartbeat of this lease."""
        first = rig.postgresql
        with Standby(rig.folder / "standby", first) as standby:
            for daemon in rig.daemons:
                rig.configure(rig.home(daemon), port=f"{first.port},127.0.0.1:{standby.port}")
            rig.start()
            serve(rig)
            first.freeze()
            standby.promote()
            rig.postgresql = standby
            serve(rig)
            settle(rig)
        rig.postgresql = first

    @pytest.mark.long
    def test_a_server_that_is_away_rejects_in_words_and_heals(self, rig: SiteRig) -> None:
        rig.start()
        answered_everywhere(rig)
        rig.postgresql.kill()
        station = rig.depot.stations[0]
        assert not accepted(rig, station)
        assert "ledger_unreachable" in reasons(rig)
        rig.postgresql.start()
        rig.wait_until_held(bound=PATIENCE)
        until(
            lambda: rig.depot.ask(station, bound=PATIENCE).response.data.status == "accepted",
            "it heals",
            bound=PATIENCE,
        )
        settle(rig)


class TestBroker:
    def test_a_broker_that_is_restarted_under_load_costs_a_site_no_request_that_it_took(self, rig: SiteRig) -> None:
        rig.start()
        serve(rig)
        rig.broker.terminate()
        rig.broker.start()
        settle(rig, again=10.0)  # what paho had not sent when the connection ended

    def test_a_broker_that_is_killed_under_load_gets_no_second_csr_for_an_id_of_a_station(self, rig: SiteRig) -> None:
        rig.start()
        for _ in range(3):
            serve(rig)
            rig.broker.kill()
            rig.broker.start()
            rig.depot.ask_again(after=2.0)
        settle(rig, again=5.0)


class TestHsm:
    @pytest.mark.parametrize("how", ["killed", "hung"])
    def test_a_token_that_is_lost_rejects_in_words_and_heals(self, rig: SiteRig, how: str) -> None:
        for daemon, line in zip(rig.daemons, rig.lines, strict=True):
            rig.configure(rig.home(daemon), port=line.port, config="[deadlines]\nec = 2.0\n")
        rig.start()
        answered_everywhere(rig)
        (rig.token.kill if how == "killed" else rig.token.freeze)()
        station = rig.depot.stations[0]
        assert not accepted(rig, station)
        (rig.token.start if how == "killed" else rig.token.thaw)()
        until(
            lambda: rig.depot.ask(station, bound=PATIENCE).response.data.status == "accepted",
            "it heals",
            bound=PATIENCE,
        )
        settle(rig)


class TestClocks:
    def test_machines_whose_clocks_differ_serve_alike(self, rig: SiteRig) -> None:
        """One is an hour ahead, the other thirty years back: shards move between them, and no key ends by a clock."""
        for number, ahead in enumerate((3600.0, -1e9)):
            clock = rig.folder / f"ahead-{number}"
            clock.write_text(str(ahead))
            port = rig.lines[number].port
            rig.daemons[number] = rig.daemon(number, port=port, program=WrongClockDaemon, first=(str(clock),))
        rig.start()
        for dying in rig.daemons:
            dying.kill()
            rig.wait_until_held(bound=PATIENCE)
            answered_everywhere(rig)
            dying.launch()
            until(partial(rig.held_by, dying), "it takes its share again", bound=PATIENCE)
        settle(rig)
        assert rig.rows("SELECT count(*) FROM key WHERE state = 'destroyed'") == [(0,)]


class TestConfiguration:
    def test_what_the_broker_held_for_another_shard_count_is_answered(self, rig: SiteRig) -> None:
        rig.start()
        answered_everywhere(rig)
        rig.terminate()
        for station in rig.depot.stations:
            rig.depot.publish(station)
        rig.shards = 7
        for daemon, line in zip(rig.daemons, rig.lines, strict=True):
            rig.configure(rig.home(daemon), port=line.port)
        rig.start()
        settle(rig)
        assert "ledger_unreachable" not in reasons(rig)
        assert any(shard_of(name, 4) != shard_of(name, 7) for name in rig.depot.stations)

    def test_a_station_that_moves_to_another_pattern_keeps_its_answers(self, rig: SiteRig) -> None:
        """Its name is the text that matches, whatever the pattern."""
        rig.start()
        answered_everywhere(rig)
        before = dict(rig.depot.accepted)
        rig.terminate()
        first, *others = rig.depot.stations
        rig.filters = (first, "depot8/+")
        for daemon, line in zip(rig.daemons, rig.lines, strict=True):
            rig.configure(rig.home(daemon), port=line.port)
        rig.start(first)
        for asked, csr in before.items():
            if asked.station == first:
                again = rig.depot.ask(first, rig.depot.requests[asked], bound=PATIENCE)
                assert again.response.data.csr == csr
        outside = rig.depot.publish(others[0])
        rig.depot.ask(first, bound=PATIENCE)
        assert outside in rig.depot.open  # nobody hears it any more
        rig.depot.forget(outside)
        settle(rig)


def reasons(rig: SiteRig) -> set[str]:
    """The reasons that the daemons gave for what they rejected."""
    events = [event for daemon in rig.daemons for event in daemon.events()]
    return {str(event["reason"]) for event in events if event["event"].startswith("rejected")}
