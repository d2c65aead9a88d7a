"""Answers: with their key or not at all, and the bounds on pending keys."""

from __future__ import annotations

from contextlib import closing

import pytest
from ledgers import Place
from recording import (
    REQUEST_ID,
    ahead,
    answer,
    bring,
    on_record,
    states,
    stock_of,
)

from parts import E1, E2, STATION, V2G, V2G20, request
from stationkey.config.settings import Bounds
from stationkey.contract.active_names import Owner
from stationkey.errors import LedgerError
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent, KeyState

pytest_plugins = ["ledgers"]


@pytest.mark.parametrize("again", [False, True], ids=["in the run that made it", "in a later run"])
def test_a_key_made_ahead_gets_its_owner_with_its_answer(place: Place, again: bool) -> None:
    with closing(place.open()) as ledger:
        key = ahead(ledger)
        if not again:
            answer(ledger, request(V2G, E1, request_id=REQUEST_ID), key=key, taken=True)
    if again:
        with closing(place.open()) as ledger:
            answer(ledger, request(V2G, E1, request_id=REQUEST_ID), key=key, taken=True)

    with closing(place.open()) as ledger:
        (record,) = ledger.keys.all()
        other = answer(ledger, request(V2G, E1))
        assert (record.key_id, record.owner, record.has_owner) == (key.key_id, Owner("", V2G, E1), True)
        assert (record.request_ids, record.due, record.created_at) == ((REQUEST_ID,), 1000, 5)
        fresh = ledger.keys.all(other)[0]
        assert (record.algorithm, record.common_name, record.organization_name, record.country_name) == (
            fresh.algorithm,
            fresh.common_name,
            fresh.organization_name,
            fresh.country_name,
        )
        assert [event.event for event in ledger.keys.history(key.key_id)] == ["made ahead", "CSR answered"]
        assert ledger.keys.ref(key.key_id) == key
        assert stock_of(ledger) == []


def test_an_answer_that_could_not_be_written_leaves_the_key_to_the_next_request(ledger: Ledger) -> None:
    key, asked = ahead(ledger), request()
    answer(ledger, asked)
    with pytest.raises(LedgerError):
        answer(ledger, asked, key=key, taken=True)

    assert stock_of(ledger) == [key]
    answer(ledger, key=key, taken=True)
    assert stock_of(ledger) == []


def test_the_ids_that_were_answered_are_read_a_part_at_a_time(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.answers._PART", 2)
    asked = [request() for _ in range(5)]
    for one in asked:
        answer(ledger, one)
    read: list[tuple[str, str]] = []
    while part := ledger.answers.ids(after=read[-1] if read else ("", "")):
        assert len(part) <= 2
        read += part
    assert read == sorted(("", one.id) for one in asked)


def test_the_oldest_pending_key_of_an_owner_makes_room(ledger: Ledger) -> None:
    others = [answer(ledger, request(V2G, E1)) for _ in range(3)]
    keys = [answer(ledger, bounds=Bounds(pending_limit=3)) for _ in range(5)]

    left = {key.key_id for key in on_record(ledger) if key.state is KeyState.PRE_ACTIVATION}
    assert left == {*others, *keys[2:]}
    assert [event.event for event in ledger.keys.history(keys[0])] == ["CSR answered", "expired"]


def test_the_oldest_pending_key_of_all_makes_room_where_there_are_many_evses(ledger: Ledger) -> None:
    keys = [answer(ledger, request(V2G, f"DE*ABC*E{number}"), bounds=Bounds(pending_total=20)) for number in range(50)]

    assert [key.key_id for key in on_record(ledger) if key.state is KeyState.PRE_ACTIVATION] == keys[30:]


def pending(ledger: Ledger) -> list[str]:
    return [key.key_id for key in on_record(ledger) if key.state is KeyState.PRE_ACTIVATION]


def test_a_flood_of_one_certificate_type_costs_another_no_pending_key(ledger: Ledger) -> None:
    bounds = Bounds(pending_total=9)
    others = [answer(ledger, request(kind, evse_id), bounds=bounds) for kind in (V2G, V2G20) for evse_id in (None, E1)]
    flood = [answer(ledger, request(STATION, f"DE*ABC*E{number}"), bounds=bounds) for number in range(30)]

    assert pending(ledger) == [*others, *flood[-5:]]


def test_made_up_evse_ids_cost_no_pending_key_of_an_evse_that_has_one_in_use(ledger: Ledger) -> None:
    bounds = Bounds(pending_total=6)
    known = {E1: V2G, E2: V2G}
    for evse_id in known:
        bring(ledger, answer(ledger, request(V2G, evse_id), bounds=bounds), KeyEvent.INSTALLED)
    renewals = [answer(ledger, request(V2G, evse_id), bounds=bounds) for evse_id in known]
    flood = [answer(ledger, request(V2G, f"DE*ABC*E9{number}"), bounds=bounds) for number in range(30)]

    assert pending(ledger) == [*renewals, *flood[-4:]]


def test_whoever_has_the_most_pending_keys_of_a_type_loses_the_oldest_of_them(ledger: Ledger) -> None:
    bounds = Bounds(pending_total=6)
    modest = answer(ledger, request(V2G, E1), bounds=bounds)
    greedy = [answer(ledger, request(V2G, E2), bounds=bounds) for _ in range(5)]
    newest = [answer(ledger, request(V2G, f"DE*ABC*E{number}"), bounds=bounds) for number in (3, 4)]

    assert pending(ledger) == [modest, *greedy[2:], *newest]


def test_the_key_that_was_just_made_is_never_the_one_that_makes_room(ledger: Ledger) -> None:
    bounds = Bounds(pending_total=1)
    bring(ledger, answer(ledger, request(V2G, E1), bounds=bounds), KeyEvent.INSTALLED)
    answer(ledger, request(V2G, E1), bounds=bounds)
    unknown = answer(ledger, request(V2G, E2), bounds=bounds)
    assert pending(ledger) == [unknown]
    last = answer(ledger, request(STATION), bounds=bounds)
    assert pending(ledger) == [last]


def test_nobody_makes_room_where_an_owner_has_made_it(ledger: Ledger) -> None:
    bounds = Bounds(pending_limit=2, pending_total=4)
    eldest = answer(ledger, request(V2G, E1), bounds=bounds)
    answer(ledger, request(V2G, E1), bounds=bounds)
    for _ in range(5):
        answer(ledger, request(), bounds=bounds)

    assert ledger.keys.all(eldest)[0].state is KeyState.PRE_ACTIVATION
    assert states(ledger).count(KeyState.PRE_ACTIVATION) == 4


def test_pending_keys_are_bounded_also_after_some_ended_and_commits_failed(ledger: Ledger, place: Place) -> None:
    bounds = Bounds(pending_total=4)
    asked = request(V2G, E1)
    keys = [answer(ledger, asked, bounds=bounds), *(answer(ledger, request(V2G, E1), bounds=bounds) for _ in range(3))]
    for _ in range(3):
        with pytest.raises(LedgerError):
            answer(ledger, asked, bounds=bounds)
    for key_id in keys[:2]:
        bring(ledger, key_id, KeyEvent.INSTALLED)
    keys = keys[2:] + [answer(ledger, request(V2G, E1), bounds=bounds) for _ in range(3)]
    assert pending(ledger) == keys[-4:]

    with closing(place.open()) as later:
        keys.append(answer(later, request(V2G, E1), bounds=bounds))
        assert pending(later) == keys[-4:]


def test_keys_made_ahead_are_no_pending_keys(ledger: Ledger, place: Place) -> None:
    bounds = Bounds(pending_limit=2, pending_total=2)
    stock = [ahead(ledger) for _ in range(5)]
    place.execute("UPDATE key SET due = NULL")
    keys = [answer(ledger, bounds=bounds) for _ in range(4)]
    ledger.retention.adopt(pending_due=7, grace_due=8)

    assert stock_of(ledger) == stock
    assert [key.due for key in on_record(ledger) if not key.has_owner] == [None] * 5
    assert [key.key_id for key in ledger.keys.usable() if key.has_owner] == keys[2:]


def test_a_mark_of_delivery_is_written_with_the_next_transaction_whichever_it_is(ledger: Ledger, place: Place) -> None:
    first, second = request(), request()
    key_id = answer(ledger, first)
    answer(ledger, second)
    ledger.answers.mark_delivered(first.id.upper())
    assert undelivered(place) == [first.id, second.id]
    bring(ledger, key_id, KeyEvent.INSTALLED)
    assert undelivered(place) == [second.id]
    ledger.answers.mark_delivered(second.id)
    ledger.close()
    assert undelivered(place) == []


def test_a_transaction_that_fails_before_its_end_keeps_the_marks_of_delivery(ledger: Ledger, place: Place) -> None:
    asked = request()
    answer(ledger, asked)
    ledger.answers.mark_delivered(asked.id)
    with pytest.raises(LedgerError):
        bring(ledger, "0" * 20, KeyEvent.EXPIRED)
    assert undelivered(place) == [asked.id]
    ledger.close()
    assert undelivered(place) == []


def undelivered(place: Place) -> list[str]:
    """The answers that are on disk as not delivered."""
    with closing(place.open()) as beside:
        return [answered.request_id for answered in beside.answers.undelivered()]
