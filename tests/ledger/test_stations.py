"""Several stations in one ledger: what happens to one touches no other, and finds nothing of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from recording import a_key, ahead, answer, bring, stock_of
from scenes import IDS, MESSAGE, OWNER, Scene, happen, told

from parts import E1, E2, V2G, request
from stationkey.config.settings import Bounds
from stationkey.contract.active_names import Owner, read_name
from stationkey.errors import LedgerError
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.hints import Hint
from stationkey.ledger.lifecycle import KeyEvent, KeyState

pytest_plugins = ["ledgers"]

ONE, OTHER = "depot/1", "depot/10"
NEXT_MESSAGE = "10000000-0000-4000-8000-000000000001"


@pytest.fixture
def scene(ledger: Ledger) -> Scene:
    happen(ledger, OTHER)
    return happen(ledger, ONE)


def _record(scene: Scene, **options: Any) -> None:
    answer(scene.ledger, request(*OWNER, request_id=IDS[4]), station=ONE, **options)


def _delivered(scene: Scene) -> None:
    scene.ledger.answers.mark_delivered(IDS[3], station=ONE)
    scene.ledger.retention.write_running(1)


def _taken(scene: Scene) -> None:
    ahead(scene.ledger)
    (key,) = stock_of(scene.ledger)
    _record(scene, key=key, taken=True)


def _activated(scene: Scene) -> None:
    scene.ledger.transitions.activate(
        scene.pending,
        chain=None,
        not_after=None,
        reason="",
        now=0,
        grace_due=7,
        useful_until=8,
        message_id=NEXT_MESSAGE,
        bounds=Bounds(active_limit=1, root_limit=1),
    )


def _forgotten(scene: Scene) -> None:
    bring(scene.ledger, scene.pending, KeyEvent.EXPIRED)
    assert scene.ledger.retention.forget(keep=1, answered_before=0)


def _applied(event: KeyEvent, which: str) -> Callable[[Scene], object]:
    return lambda scene: scene.ledger.transitions.apply(getattr(scene, which), event, reason="", now=0, due=5)


CHANGES: dict[str, Callable[[Scene], object]] = {
    "answers.record": _record,
    "answers.record, beyond the owner's bound": lambda scene: _record(scene, bounds=Bounds(pending_limit=1)),
    "answers.record, beyond the total": lambda scene: _record(scene, bounds=Bounds(pending_total=1)),
    "answers.record, with a key made ahead": _taken,
    "answers.withdraw": lambda scene: scene.ledger.answers.withdraw(IDS[3], now=0, station=ONE),
    "answers.mark_delivered": _delivered,
    "transitions.activate": _activated,
    "transitions.restore": lambda scene: scene.ledger.transitions.restore(scene.before, reason="", now=0, grace_due=3),
    "transitions.confirm": lambda scene: scene.ledger.transitions.confirm(scene.active, reason="", now=0, grace_due=3),
    "transitions.make_ahead": lambda scene: ahead(scene.ledger),
    "transitions.apply, failed": _applied(KeyEvent.INSTALLATION_FAILED, "pending"),
    "transitions.apply, expired": _applied(KeyEvent.EXPIRED, "pending"),
    "transitions.apply, retired": _applied(KeyEvent.RETIRED, "active"),
    "transitions.apply, compromised": _applied(KeyEvent.COMPROMISE_REPORTED, "active"),
    "transitions.apply, deleted": _applied(KeyEvent.DELETED, "active"),
    "transitions.apply, the one before deleted": _applied(KeyEvent.DELETED, "before"),
    "hints.write": lambda scene: scene.ledger.hints.write(scene.active, Hint(9, expired=True, count=9, running=9)),
    "retention.forget": _forgotten,
    "retention.wipe": lambda scene: scene.ledger.retention.wipe(),
    "retention.write_running": lambda scene: scene.ledger.retention.write_running(77),
    "rejections.note": lambda scene: scene.ledger.rejections.note(IDS[5], reason="r", message="m", now=0, station=ONE),
    "rejections.write": lambda scene: scene.ledger.rejections.write(),
}
"""Every call of the ledger that changes something, for one station."""

OF_NO_STATION = {
    *("transitions.make_ahead", "retention.wipe", "retention.write_running", "rejections.note", "rejections.write")
}
"""Changes that are not seen in what the ledger tells of a station."""

ADOPTED = {"retention.adopt", "retention.crowd_out"}
"""What is done to the keys of all stations at once."""


def _found(scene: Scene, station: str) -> str | None:
    answered = scene.ledger.answers.find(IDS[3], station=station)
    return None if answered is None else answered.key_id


def _only(found: list[KeyRecord], key_id: str) -> bool:
    return [(key.key_id, key.station) for key in found] == [(key_id, ONE)]


def _alone(scene: Scene) -> bool:
    """Whether the other station's keys count for nothing, once those before this one's active key are deleted."""
    scene.ledger.transitions.apply(scene.before, KeyEvent.DELETED, reason="", now=0)
    third = answer(scene.ledger, request(*OWNER), station=ONE)
    bring(scene.ledger, scene.active, KeyEvent.DELETED)
    bring(scene.ledger, third, KeyEvent.INSTALLED)
    return not scene.ledger.keys.others_installed(scene.ledger.keys.named(third))


def _seen(scene: Scene) -> bool:
    """Whether a message has been seen by the station that sent it, and by no other."""
    _activated(scene)
    seen = scene.ledger.transitions.seen
    return seen(NEXT_MESSAGE, station=ONE) and not seen(NEXT_MESSAGE, station=OTHER) and seen(MESSAGE, station=OTHER)


QUERIES: dict[str, Callable[[Scene], bool]] = {
    "answers.find": lambda scene: _found(scene, ONE) == scene.pending != _found(scene, OTHER),
    "keys.pending": lambda scene: _only(scene.ledger.keys.pending(*OWNER, station=ONE), scene.pending),
    "keys.active": lambda scene: _only(scene.ledger.keys.active(*OWNER, station=ONE), scene.active),
    "keys.deactivated": lambda scene: _only(scene.ledger.keys.deactivated(*OWNER, station=ONE), scene.before),
    "keys.pending of every EVSE": lambda scene: _only(scene.ledger.keys.pending(V2G, None, station=ONE), scene.pending),
    "keys.active of every EVSE": lambda scene: _only(scene.ledger.keys.active(V2G, None, station=ONE), scene.active),
    "keys.others_installed": _alone,
    "transitions.seen": _seen,
}
"""Every query that is about one station; each says whether it tells all of that, and nothing of the other."""


ALL = {
    *("answers.ids", "answers.undelivered"),
    *("keys.all", "keys.stream", "keys.named", "keys.expiring", "keys.newest_installed", "keys.usable", "keys.ref"),
    *("keys.refs", "keys.made_ahead", "keys.seconds_to_make", "keys.history", "keys.active_files", "keys.figures"),
    "keys.changed_stations",
    *("retention.running", "retention.due", "retention.is_due", "retention.next_due", "hints.all"),
}
"""Queries that are about all stations, or about one key."""


def test_every_call_of_the_ledger_is_in_one_of_the_tables(ledger: Ledger) -> None:
    calls = {
        f"{part}.{name}"
        for part in ("answers", "rejections", "keys", "transitions", "retention", "hints")
        for name in vars(type(getattr(ledger, part)))
        if not name.startswith("_")
    }
    assert {name.partition(",")[0].partition(" of ")[0] for name in (*CHANGES, *QUERIES, *ALL, *ADOPTED)} == calls


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_for_one_station_changes_nothing_of_another(scene: Scene, change: str) -> None:
    before = told(scene.ledger, ONE), told(scene.ledger, OTHER)
    CHANGES[change](scene)
    assert told(scene.ledger, OTHER) == before[1]
    assert (told(scene.ledger, ONE) == before[0]) == (change in OF_NO_STATION)


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_asked_for_one_station_is_told_of_no_other(scene: Scene, query: str) -> None:
    assert QUERIES[query](scene)


def test_what_is_about_all_stations_says_which(scene: Scene) -> None:
    ledger = scene.ledger
    assert ledger.answers.ids() == [(station, request_id) for station in (ONE, OTHER) for request_id in IDS[:4]]
    assert sorted((one.station, one.request_id) for one in ledger.answers.undelivered()) == [
        (station, request_id) for station in (ONE, OTHER) for request_id in IDS[1:4]
    ]
    names = [read_name(name) for name in ledger.keys.active_files()]
    assert {(name.owner, name.previous) for name in names if name} == {
        (Owner(station, *OWNER), previous) for station in (ONE, OTHER) for previous in (False, True)
    }
    figures = ledger.keys.figures(expiries=8)
    assert figures.destroyed == 2
    assert figures.keys == {(state, V2G): 2 for state in ("pre-activation", "active", "deactivated")}
    assert (figures.unconfirmed, figures.expiries) == (2, ((V2G, E1, 100),))
    assert {station for _, _, station in ledger.retention.due(10**6)} == {ONE, OTHER}


def test_a_bound_of_pending_keys_is_that_of_one_station(ledger: Ledger) -> None:
    bounds = Bounds(pending_limit=2, pending_total=3)
    keys = [
        answer(ledger, request(V2G, evse_id), station=station, bounds=bounds)
        for station in ("", ONE, OTHER)
        for evse_id in (E1, E1, E2)
    ]
    assert [key.key_id for key in ledger.keys.usable()] == keys


def test_a_station_makes_room_among_its_own_keys_by_what_it_has_itself(ledger: Ledger) -> None:
    for _ in range(3):
        answer(ledger, request(V2G, E2), station=OTHER)
    activate(ledger, OTHER, E1)
    first, *others = (answer(ledger, request(V2G, evse_id), station=ONE) for evse_id in (E1, E1, E2))
    newest = answer(ledger, request(V2G, E2), station=ONE, bounds=Bounds(pending_total=3))
    assert ledger.keys.named(first).state is KeyState.DESTROYED
    assert [key.key_id for key in ledger.keys.usable() if key.station == ONE] == [*others, newest]
    assert len(ledger.keys.pending(V2G, E2, station=OTHER)) == 3


def test_a_bound_of_a_whole_token_costs_the_station_with_the_most_pending_keys_one(ledger: Ledger) -> None:
    bounds = Bounds(pending_of_shard=4)
    modest = answer(ledger, request(V2G, E1), station=ONE, bounds=bounds)
    flood = [answer(ledger, request(V2G, f"DE*ABC*E{n}"), station=OTHER, bounds=bounds) for n in range(9)]
    newest = answer(ledger, request(V2G, E1), station="depot/s3", bounds=bounds)

    assert {key.key_id for key in ledger.keys.usable()} == {modest, *flood[-2:], newest}


def test_among_stations_with_as_many_pending_keys_one_with_a_key_in_use_loses_none(ledger: Ledger) -> None:
    bounds = Bounds(pending_of_shard=2)
    activate(ledger, ONE, E1)
    renewal = answer(ledger, request(V2G, E1), station=ONE, bounds=bounds)
    answer(ledger, request(V2G, E1), station=OTHER, bounds=bounds)
    newest = answer(ledger, request(V2G, E1), station="depot/s3", bounds=bounds)

    assert [key.key_id for key in ledger.keys.usable() if key.state is KeyState.PRE_ACTIVATION] == [renewal, newest]


def test_a_lowered_bound_of_a_whole_token_is_kept_after_some_requests(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationkey.ledger.answers._AT_ONCE", 2)
    for number in range(6):
        answer(ledger, request(V2G, E1), station=f"depot/s{number}")
    left = []
    for _ in range(4):
        answer(ledger, request(V2G, E2), station=ONE, bounds=Bounds(pending_of_shard=3))
        left.append(len(ledger.keys.usable()))

    assert left == [5, 4, 3, 3]


def activate(ledger: Ledger, station: str, evse_id: str, *, bounds: Bounds | None = None) -> str:
    key_id = answer(ledger, request(V2G, evse_id), station=station)
    ledger.transitions.activate(
        key_id,
        chain=None,
        not_after=None,
        reason="",
        now=0,
        grace_due=0,
        useful_until=9,
        message_id=None,
        bounds=bounds,
    )
    return key_id


def test_a_bound_of_active_keys_is_that_of_one_station(ledger: Ledger) -> None:
    for station in ("", ONE, OTHER):
        activate(ledger, station, E1, bounds=Bounds(active_limit=1))
        with pytest.raises(LedgerError) as refusal:
            activate(ledger, station, E2, bounds=Bounds(active_limit=1))
        assert refusal.value.reason == "too_many_active"


def test_stations_that_are_made_up_get_no_more_active_keys_than_there_may_be(ledger: Ledger) -> None:
    bounds = Bounds(active_of_site=2)
    activate(ledger, ONE, E1, bounds=bounds)
    activate(ledger, OTHER, E1, bounds=bounds)
    for station in ("depot/made-up", ONE):
        with pytest.raises(LedgerError) as refusal:
            activate(ledger, station, E2, bounds=bounds)
        assert refusal.value.reason == "too_many_in_site"

    renewed = activate(ledger, ONE, E1, bounds=bounds)

    assert [key.key_id for key in ledger.keys.active(V2G, E1, station=ONE)] == [renewed]


def test_keys_to_go_back_to_are_bounded_for_each_station(ledger: Ledger) -> None:
    for station in (OTHER, ONE):
        for evse_id in (E1, E2):
            activate(ledger, station, evse_id)
            bring(ledger, activate(ledger, station, evse_id), KeyEvent.DELETED)
    for _ in range(2):
        activate(ledger, ONE, "DE*ABC*E3", bounds=Bounds(active_limit=3))
    kept = [key.station for key in ledger.keys.usable() if key.previous]
    assert (kept.count(ONE), kept.count(OTHER)) == (3, 2)


@pytest.mark.parametrize("seen_at_once", [1, 2, 500])
def test_the_history_of_each_station_is_bounded_however_many_there_are(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, seen_at_once: int
) -> None:
    monkeypatch.setattr("stationkey.ledger.retention._STATIONS", seen_at_once)
    monkeypatch.setattr("stationkey.ledger.retention._BATCH", 3)
    stations = ["", *(f"s{number}" for number in range(4))]
    kept: dict[str, list[str]] = {station: [] for station in stations}
    for number in range(8):
        for station in stations[number // 2 + 1 :]:
            key_id = answer(ledger, station=station)
            bring(ledger, key_id, KeyEvent.EXPIRED)
            kept[station] = [*kept[station], key_id][-2:]

    for _ in range(30):
        ledger.retention.forget(keep=2, answered_before=0)

    assert {station: [key.key_id for key in ledger.keys.stream(station=station)] for station in stations} == kept
    assert ledger.keys.figures(expiries=0).destroyed == sum(map(len, kept.values()))


def test_made_up_stations_cost_no_key_of_a_station_that_has_one_in_use(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As made-up EVSE IDs cost none of an EVSE that has one: the oldest of the others expire."""
    monkeypatch.setattr("stationkey.ledger.retention.MAX_OF_NEW_STATIONS", 3)
    used = [activate(ledger, ONE, E1), answer(ledger, station=ONE), answer(ledger)]
    made_up = [answer(ledger, station=f"depot/{number}", running=100) for number in range(90, 95)]

    assert (ledger.retention.crowd_out(50), ledger.retention.crowd_out(50)) == (2, 0)

    assert {key_id for key_id, _, _ in ledger.retention.due(50)} == set(made_up[:2])
    assert {key.key_id for key in ledger.keys.usable()} == {*used, *made_up}


def test_a_key_made_ahead_is_taken_by_the_station_that_asks(ledger: Ledger) -> None:
    key = ahead(ledger)
    answer(ledger, key=key, taken=True, station=ONE)
    assert ledger.keys.named(key.key_id).owner == Owner(ONE, V2G, "")
    with pytest.raises(LedgerError) as refusal:
        answer(ledger, key=key, taken=True, station=OTHER)
    assert refusal.value.reason == "key_taken"


def test_an_id_is_unique_in_its_station_alone(ledger: Ledger) -> None:
    asked = request(*OWNER)
    for station in ("", ONE, OTHER):
        answer(ledger, asked, station=station)
        with pytest.raises(LedgerError):
            answer(ledger, asked, station=station, key=a_key())
    assert {key.station for key in ledger.keys.all()} == {"", ONE, OTHER}
    assert {key.state for key in ledger.keys.all()} == {KeyState.PRE_ACTIVATION}
