"""Queries of keys."""

from __future__ import annotations

from contextlib import closing

import pytest
from ledgers import Place
from recording import (
    ahead,
    answer,
    bring,
)

from parts import E1, V2G, request
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent

pytest_plugins = ["ledgers"]


def test_the_figures_are_those_of_the_keys_on_record(ledger: Ledger) -> None:
    empty = ledger.keys.figures(expiries=8)
    assert (empty.keys, empty.expiries, empty.unknown, empty.destroyed) == ({}, (), 0, 0)
    later, sooner, unknown, _, *gone = (answer(ledger, request(V2G, f"DE*ABC*E{number}")) for number in range(7))
    ahead(ledger)
    for key_id, not_after in ((later, 20), (sooner, 10), (unknown, None)):
        ledger.transitions.activate(
            key_id, chain=None, not_after=not_after, reason="", now=0, grace_due=0, useful_until=0, message_id=None
        )
    for key_id in gone:
        bring(ledger, key_id, KeyEvent.EXPIRED)
    found = ledger.keys.figures(expiries=8)
    assert found.keys == {("active", V2G): 3, ("pre-activation", V2G): 1}
    assert found.expiries == ((V2G, "DE*ABC*E1", 10), (V2G, "DE*ABC*E0", 20))
    assert (found.unknown, found.destroyed) == (1, 3)
    assert found.size > 0
    assert (ledger.keys.figures(expiries=1).expiries, ledger.keys.figures(expiries=1).unknown) == (
        found.expiries[:1],
        2,
    )
    while ledger.retention.forget(keep=1, answered_before=0):
        pass
    assert ledger.keys.figures(expiries=8).destroyed == 1


@pytest.mark.parametrize("deleted", [None, "before", "after"], ids=["kept", "deleted before", "deleted after"])
def test_a_certificate_may_be_installed_still_unless_it_was_deleted_before(ledger: Ledger, deleted: str | None) -> None:
    old, new, elsewhere = answer(ledger), answer(ledger), answer(ledger, request(V2G, E1))
    bring(ledger, elsewhere, KeyEvent.INSTALLED)
    bring(ledger, old, KeyEvent.INSTALLED)
    if deleted == "before":
        bring(ledger, old, KeyEvent.DELETED)
    bring(ledger, new, KeyEvent.INSTALLED)
    if deleted == "after":
        bring(ledger, old, KeyEvent.DELETED)

    assert ledger.keys.others_installed(ledger.keys.all(new)[0]) == (deleted != "before")


def test_pending_keys_are_in_the_order_in_which_they_were_asked_for_and_not_made(ledger: Ledger) -> None:
    early, late = ahead(ledger), ahead(ledger)
    first, second, third = answer(ledger, key=late, taken=True), answer(ledger), answer(ledger, key=early, taken=True)

    pending = ledger.keys.pending(ledger.keys.all(first)[0].certificate_type, None)

    assert [key.key_id for key in pending] == [first, second, third]
    assert [ledger.keys.history(key.key_id)[-1].seq for key in pending] == [key.asked for key in pending]


def test_all_keys_are_streamed_a_part_at_a_time(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.keys._PART", 2)
    assert list(ledger.keys.stream()) == []
    for number in range(5):
        ahead(ledger) if number == 2 else answer(ledger)
    assert list(ledger.keys.stream()) == ledger.keys.all()


def test_a_stream_goes_on_where_keys_come_and_go_and_keeps_no_log_from_being_emptied(
    ledger: Ledger, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationkey.ledger.keys._PART", 2)
    keys = [answer(ledger) for _ in range(4)]
    with closing(place.open()) as beside:
        stream = beside.keys.stream()
        read = [next(stream).key_id for _ in range(2)]
        for key_id in keys[1:3]:
            bring(ledger, key_id, KeyEvent.DESTRUCTION_ORDERED)
        while ledger.retention.forget(keep=0, answered_before=0):
            pass
        last = answer(ledger)
        assert ledger.database.checkpoint()
        read += [key.key_id for key in stream]
    assert read == [*keys[:2], keys[3], last]
