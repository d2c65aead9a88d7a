"""Two shards of a site in one database: a sweep of one finds and changes nothing of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from depots import open_engine, take
from postgresql import Database
from recording import answer, bring
from scenes import Scene, happen, told

from stationkey.config.settings import Bounds
from stationkey.contract.active_names import read_name
from stationkey.ledger import Ledger, messages
from stationkey.ledger.lifecycle import CSR_ANSWERED, INITIAL, KeyEvent
from stationkey.ledger.overview import look
from stationkey.ledger.postgresql.slots import shard_of
from stationkey.ledger.transitions import note

pytest_plugins = ["depots"]

LATE = 10**12


class Shards(NamedTuple):
    """The ledgers of two shards, with a station in each that has had the same happen to it."""

    ledgers: tuple[Ledger, Ledger]
    stations: tuple[str, str]
    scenes: tuple[Scene, Scene]


@pytest.fixture
def shards(depot: Database, tmp_path: Path) -> Iterator[Shards]:
    names = [f"depot/{number}" for number in range(20)]
    one, other = (next(name for name in names if shard_of(name, 2) == number) for number in range(2))
    with (
        closing(Ledger.on(open_engine(depot, tmp_path, shard=take(depot, 0, 2)))) as first,
        closing(Ledger.on(open_engine(depot, tmp_path, shard=take(depot, 1, 2)))) as second,
    ):
        yield Shards((first, second), (one, other), (happen(first, one), happen(second, other)))


FOUND: dict[str, Callable[[Ledger], set[str]]] = {
    "answers.ids": lambda ledger: {station for station, _ in ledger.answers.ids()},
    "answers.undelivered": lambda ledger: {one.station for one in ledger.answers.undelivered()},
    "keys.expiring": lambda ledger: {key.station for key in ledger.keys.expiring(until=LATE, limit=9)},
    "keys.newest_installed": lambda ledger: {key.station for key in [ledger.keys.newest_installed()] if key},
    "keys.usable": lambda ledger: {key.station for key in ledger.keys.usable()},
    "keys.active_files": lambda ledger: {
        name.owner.station for name in map(read_name, ledger.keys.active_files()) if name
    },
    "keys.changed_stations, all": lambda ledger: ledger.keys.changed_stations(None)[0],
    "keys.changed_stations": lambda ledger: ledger.keys.changed_stations(0)[0],
    "retention.due": lambda ledger: {station for _, _, station in ledger.retention.due(LATE)},
    "hints.all": lambda ledger: {ledger.keys.named(key_id).station for key_id in ledger.hints.all()},
    "messages.newest": lambda ledger: {one.station for one in messages.newest(ledger.database, 99)[0]},
    "overview.look, keys": lambda ledger: {one.station for one in look(ledger.database, keys=9, happenings=9).keys},
    "overview.look, happenings": lambda ledger: {
        one.station for one in look(ledger.database, keys=9, happenings=99).happenings
    },
}


@pytest.mark.parametrize("query", FOUND)
def test_a_query_of_all_stations_finds_those_of_its_shard(shards: Shards, query: str) -> None:
    assert [FOUND[query](ledger) for ledger in shards.ledgers] == [{station} for station in shards.stations]


def test_figures_are_those_of_a_shard(shards: Shards) -> None:
    for ledger in shards.ledgers:
        figures = ledger.keys.figures(expiries=9)
        assert (sum(figures.keys.values()), figures.destroyed, figures.unconfirmed) == (3, 1, 1)
        assert (len(figures.expiries), figures.unknown) == (1, 0)


def test_the_next_expiry_is_that_of_a_shard(shards: Shards) -> None:
    first, second = shards.ledgers
    bring(first, shards.scenes[0].pending, KeyEvent.EXPIRED)
    assert (first.retention.next_due(), second.retention.next_due()) == (9000, 1003)


def test_a_quiet_shard_shows_its_last_events_beside_a_busy_one(shards: Shards) -> None:
    quiet, busy = shards.ledgers
    newest = answer(quiet, station=shards.stations[0])
    for _ in range(15):
        answer(busy, station=shards.stations[1])

    assert [one.key_id for one in look(quiet.database, keys=1, happenings=1).happenings] == [newest]


def test_an_event_that_is_committed_after_the_next_one_was_read_is_read_too(
    shards: Shards, depot: Database, tmp_path: Path
) -> None:
    first, second = shards.ledgers
    with closing(open_engine(depot, tmp_path)) as site:
        with first.database.transaction() as sql:
            (number,) = sql.execute("SELECT max(number) FROM key WHERE station = ?", (shards.stations[0],)).fetchone()
            note(sql, number, CSR_ANSWERED, INITIAL, reason="", now=0, message_id="late")
            answer(second, station=shards.stations[1])
            _, place = messages.newest(site, 99)
        late, place = messages.newest(site, 99, after=place)
        nothing, _ = messages.newest(site, 99, after=place)

    assert ([one.message_id for one in late], nothing) == (["late"], [])


def _forgotten(ledger: Ledger) -> None:
    while ledger.retention.forget(keep=0, answered_before=LATE):
        pass


def _rejected(ledger: Ledger) -> None:
    station = next(name for name in map(str, range(20)) if ledger.database.owns(name))
    for _ in range(5):
        ledger.rejections.note("", reason="", message="", now=0, station=station)
    ledger.rejections.write()


def _crowded_out(ledger: Ledger) -> None:
    assert ledger.retention.crowd_out(1)


def _one_too_many(ledger: Ledger) -> None:
    for station in filter(ledger.database.owns, map(str, range(20))):
        answer(ledger, station=station, bounds=Bounds(pending_of_shard=2))
    assert [key.installed for key in ledger.keys.usable()].count(0) == 2


SWEEPS: dict[str, Callable[[Ledger], object]] = {
    "answers.record, beyond the shard's bound": _one_too_many,
    "retention.adopt": lambda ledger: ledger.retention.adopt(pending_due=1, grace_due=1),
    "retention.crowd_out": _crowded_out,
    "retention.forget": _forgotten,
    "retention.wipe": lambda ledger: ledger.retention.wipe(),
    "rejections.write": _rejected,
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_changes_nothing_of_another_shard(
    shards: Shards, depot: Database, monkeypatch: pytest.MonkeyPatch, sweep: str
) -> None:
    monkeypatch.setattr("stationkey.ledger.rejections.MAX_REJECTIONS", 1)
    monkeypatch.setattr("stationkey.ledger.retention.MAX_OF_NEW_STATIONS", 0)
    for number, ledger in enumerate(shards.ledgers):
        new = next(name for name in map(str, range(20)) if shard_of(name, 2) == number)
        answer(ledger, station=new, running=5)
    answer(shards.ledgers[1], station=shards.stations[1])
    if sweep == "retention.adopt":
        depot.admin("UPDATE key SET due = NULL WHERE state = 'pre-activation'")
    queries = [f"SELECT * FROM {table} WHERE slot >= 2048 ORDER BY 1" for table in ("key", "answer", "rejection")]
    before = told(shards.ledgers[1], shards.stations[1]), [depot.admin(query) for query in queries]

    SWEEPS[sweep](shards.ledgers[0])

    assert (told(shards.ledgers[1], shards.stations[1]), [depot.admin(query) for query in queries]) == before


def test_strays_are_judged_by_the_keys_of_all_shards(shards: Shards) -> None:
    first, second = (ledger.keys.refs("software") for ledger in shards.ledgers)
    assert len(first) == len(second) == 6
