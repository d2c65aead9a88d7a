"""Changes of keys: legal, illegal, and of keys made ahead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import product

import pytest
from ledgers import Place
from msgspec.structs import replace
from recording import (
    INTO,
    a_key,
    ahead,
    answer,
    bring,
    on_record,
    states,
    stock_of,
)

from parts import new_id, request
from stationkey.contract.profiles import RSA_3072, SECP256R1, KeyType
from stationkey.errors import LedgerError
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import TRANSITIONS, IllegalTransition, KeyEvent, KeyState

pytest_plugins = ["ledgers"]


@pytest.mark.parametrize(
    ("state", "event"),
    [
        pytest.param(state, event, id=f"{state}, {event}")
        for state, event in product(KeyState, KeyEvent)
        if (state, event) not in TRANSITIONS
    ],
)
def test_an_illegal_step_changes_nothing(ledger: Ledger, place: Place, state: KeyState, event: KeyEvent) -> None:
    key_id = answer(ledger)
    bring(ledger, key_id, *INTO[state])
    before = place.rows()

    with pytest.raises(IllegalTransition):
        ledger.transitions.apply(key_id, event, reason="", now=0)

    assert place.rows() == before
    assert states(ledger) == [state]


def test_an_activation_that_fails_deactivates_nothing(ledger: Ledger, place: Place) -> None:
    active, gone = answer(ledger), answer(ledger)
    bring(ledger, active, KeyEvent.INSTALLED)
    bring(ledger, gone, KeyEvent.EXPIRED)
    before = place.rows()

    with pytest.raises(IllegalTransition):
        ledger.transitions.activate(
            gone, chain=None, not_after=None, reason="", now=0, grace_due=0, useful_until=0, message_id=None
        )

    assert place.rows() == before


def test_an_event_of_a_key_that_is_not_on_record_is_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as refusal:
        ledger.transitions.apply("0" * 20, KeyEvent.EXPIRED, reason="", now=0)

    assert refusal.value.reason == "key_not_found"


def test_a_key_made_ahead_is_on_record_without_an_owner(ledger: Ledger) -> None:
    key = ahead(ledger)

    (record,) = ledger.keys.all()
    assert (record.key_id, record.has_owner, record.owner) == (key.key_id, False, ("", "", ""))
    assert (record.state, record.created_at, record.due, record.request_ids) == (
        KeyState.PRE_ACTIVATION,
        5,
        1000,
        (),
    )
    assert [(event.event, event.state) for event in ledger.keys.history(key.key_id)] == [
        ("made ahead", "pre-activation")
    ]
    assert ledger.keys.usable() == [record]
    assert ledger.keys.ref(key.key_id) == key


def test_keys_made_ahead_are_there_after_a_restart_oldest_first(place: Place) -> None:
    with closing(place.open()) as ledger:
        keys = [ahead(ledger) for _ in range(5)]
        answer(ledger, key=keys[2], taken=True)
        bring(ledger, keys[3].key_id, KeyEvent.EXPIRED)

    with closing(place.open()) as ledger:
        assert stock_of(ledger) == [keys[0], keys[1], keys[4]]


def test_a_key_cannot_be_made_ahead_twice(ledger: Ledger, place: Place) -> None:
    key = ahead(ledger)
    before = place.rows()

    with pytest.raises(LedgerError):
        ahead(ledger, key)

    assert place.rows() == before


def test_how_long_the_last_key_of_each_type_took_to_make_is_on_record(ledger: Ledger) -> None:
    scheme = a_key().scheme
    assert ledger.keys.seconds_to_make(scheme) == {}
    made: list[tuple[float, KeyType]] = [(0.25, SECP256R1), (31.5, RSA_3072), (29.25, RSA_3072)]
    for seconds, key_type in made:
        ledger.transitions.make_ahead(replace(a_key(), key_type=key_type), now=0, due=1, seconds=seconds)
    assert ledger.keys.seconds_to_make(scheme) == {"secp256r1": 0.25, "RSA-3072": 29.25}
    assert ledger.keys.seconds_to_make("pkcs11") == {}


def test_a_key_made_ahead_ages_out_and_leaves_no_record(ledger: Ledger, place: Place) -> None:
    old, young = ahead(ledger, due=100), ahead(ledger, due=200)
    destroyed = answer(ledger)
    bring(ledger, destroyed, KeyEvent.EXPIRED)
    assert (ledger.retention.next_due(), ledger.retention.due(99), ledger.retention.due(100)) == (
        100,
        [],
        [(old.key_id, "", "")],
    )

    state = ledger.transitions.apply(old.key_id, KeyEvent.EXPIRED, reason="made ahead, and not needed in time", now=0)

    assert state is KeyState.DESTROYED
    assert [key.key_id for key in on_record(ledger)] == [young.key_id, destroyed]
    assert not any(old.key_id in line for line in place.rows())
    assert ledger.keys.history(old.key_id) == []
    assert not any(old.private.hex() in line.lower() for line in place.rows())
    assert ledger.retention.forget(keep=1, answered_before=0) == 0


@pytest.mark.parametrize("event", [KeyEvent.INSTALLED, KeyEvent.INSTALLATION_FAILED])
def test_a_key_that_no_request_has_taken_has_no_certificate(ledger: Ledger, place: Place, event: KeyEvent) -> None:
    key = ahead(ledger)
    before = place.rows()

    with pytest.raises(IllegalTransition):
        bring(ledger, key.key_id, event)

    assert place.rows() == before


def test_a_message_counts_as_a_repeat_once_it_has_brought_an_event(ledger: Ledger) -> None:
    message_id = new_id()
    asked = request()
    key_id = answer(ledger, asked)
    assert not ledger.transitions.seen(message_id)
    assert not ledger.transitions.seen(asked.id)

    ledger.transitions.apply(key_id, KeyEvent.INSTALLED, reason="", now=0, message_id=message_id)

    assert ledger.transitions.seen(message_id)


def _activated(ledger: Ledger, key_id: str) -> None:
    bring(ledger, key_id, KeyEvent.INSTALLED)


def _destroyed(ledger: Ledger, key_id: str) -> None:
    bring(ledger, key_id, KeyEvent.DESTRUCTION_ORDERED)


def _compromised(ledger: Ledger, key_id: str) -> None:
    bring(ledger, key_id, KeyEvent.COMPROMISE_REPORTED)


@pytest.mark.parametrize("after", [None, _activated, _destroyed, _compromised])
@pytest.mark.parametrize("pooled", [True, False], ids=["made ahead", "made for its request"])
def test_a_key_is_never_handed_out_twice(
    ledger: Ledger, place: Place, pooled: bool, after: Callable[[Ledger, str], None] | None
) -> None:
    key = ahead(ledger) if pooled else a_key()
    answer(ledger, key=key, taken=pooled)
    if after is not None:
        after(ledger, key.key_id)
    before = place.rows()

    with pytest.raises(LedgerError) as refusal:
        answer(ledger, key=key, taken=pooled)

    assert refusal.value.reason == "key_taken"
    assert place.rows() == before


@pytest.mark.parametrize("again", [False, True], ids=["in the run that made it", "in a later run"])
@pytest.mark.parametrize("end", [KeyEvent.EXPIRED, KeyEvent.DESTRUCTION_ORDERED, KeyEvent.COMPROMISE_REPORTED])
def test_a_key_made_ahead_that_is_gone_is_never_handed_out(place: Place, end: KeyEvent, again: bool) -> None:
    """Also where another process has ended it, and the daemon has not been told."""
    with ExitStack() as opened:
        ledger = opened.enter_context(closing(place.open()))
        key = ahead(ledger)
        if again:
            ledger.close()
            ledger = opened.enter_context(closing(place.open()))  # the run after it
            assert stock_of(ledger) == [key]
        with closing(place.open()) as command:
            bring(command, key.key_id, end)
        before = place.rows()

        for _ in range(2):
            with pytest.raises(LedgerError) as refusal:
                answer(ledger, key=key, taken=True)
            assert refusal.value.reason == "key_taken"

        assert place.rows() == before
        assert stock_of(ledger) == []
