"""The key to go back to: which one it is, how long it is kept, and what ends the keeping."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from recording import answer, bring, states

from parts import E1, E2, STATION, V2G, new_id, request
from stationkey.config.settings import Bounds
from stationkey.contract.active_names import Owner
from stationkey.contract.profiles import CertificateType
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import IllegalTransition, KeyEvent, KeyState

pytest_plugins = ["ledgers"]

GRACE, USEFUL = 100, 5000
ACTIVE, DEACTIVATED, DESTROYED = KeyState.ACTIVE, KeyState.DEACTIVATED, KeyState.DESTROYED


def install(ledger: Ledger, evse_id: str | None = E1, *, root: str = "", useful_until: int = USEFUL) -> str:
    """Record a key and activate it at running time 0."""
    key_id = answer(ledger, request(V2G, evse_id))
    activate(ledger, key_id, root=root, useful_until=useful_until)
    return key_id


def activate(
    ledger: Ledger, key_id: str, *, root: str = "", useful_until: int = USEFUL, bounds: Bounds | None = None
) -> list[str]:
    return ledger.transitions.activate(
        key_id,
        chain="chain",
        not_after=9,
        useful_until=useful_until,
        reason="",
        now=0,
        grace_due=GRACE,
        message_id=new_id(),
        root=root,
        bounds=bounds,
    )


def restore(ledger: Ledger, key_id: str) -> list[str]:
    return ledger.transitions.restore(key_id, reason="", now=0, grace_due=GRACE)


def previous(ledger: Ledger) -> dict[str, int | None]:
    """The keys that owners can go back to, each with its end."""
    return {key.key_id: key.due for key in ledger.keys.all() if key.previous}


def test_the_key_before_is_kept_until_its_certificate_has_certainly_expired(ledger: Ledger) -> None:
    old, new = install(ledger, useful_until=USEFUL), install(ledger)

    assert previous(ledger) == {old: USEFUL}
    assert [(key.state, key.confirmed) for key in ledger.keys.all()] == [(DEACTIVATED, True), (ACTIVE, False)]
    assert ledger.keys.all(new)[0].due is None


def test_a_key_whose_certificate_has_expired_has_its_grace_period_all_the_same(ledger: Ledger) -> None:
    old = install(ledger, useful_until=1)
    install(ledger)

    assert previous(ledger) == {old: GRACE}


def test_its_grace_period_begins_when_the_new_key_is_confirmed(ledger: Ledger) -> None:
    old, new = install(ledger), install(ledger)

    ledger.transitions.confirm(new, reason="", now=0, grace_due=777)

    assert previous(ledger) == {old: 777}
    assert ledger.keys.all(new)[0].confirmed


def test_a_command_leaves_the_beginning_of_the_grace_period_to_the_daemon(ledger: Ledger) -> None:
    old, new = install(ledger), install(ledger)

    ledger.transitions.confirm(new, reason="", now=0)
    ledger.retention.adopt(pending_due=1, grace_due=888)

    assert previous(ledger) == {old: 888}


def test_a_command_that_restores_leaves_a_grace_period_where_the_certificate_has_expired(ledger: Ledger) -> None:
    ledger.retention.write_running(USEFUL)
    retired = install(ledger)
    bring(ledger, retired, KeyEvent.RETIRED)
    other = install(ledger)

    ledger.transitions.restore(retired, reason="", now=0)

    assert previous(ledger) == {other: None}


def test_josev_deletes_the_key_before_only_after_it_has_connected_with_the_new_one(ledger: Ledger) -> None:
    old, new = install(ledger), install(ledger)

    ledger.transitions.apply(old, KeyEvent.DELETED, reason="", now=0)

    assert states(ledger) == [DESTROYED, ACTIVE]
    assert previous(ledger) == {}
    assert [event.event for event in ledger.keys.history(new)] == ["CSR answered", "installed", "confirmed"]


@pytest.mark.parametrize("end", [KeyEvent.DESTRUCTION_ORDERED, KeyEvent.EXPIRED, KeyEvent.COMPROMISE_REPORTED])
def test_no_other_end_of_the_key_before_confirms_the_new_one(ledger: Ledger, end: KeyEvent) -> None:
    old, new = install(ledger), install(ledger)

    bring(ledger, old, end)

    assert not ledger.keys.all(new)[0].confirmed
    assert previous(ledger) == {}


def test_an_active_key_counts_as_unconfirmed_while_there_is_one_to_go_back_to(ledger: Ledger) -> None:
    old = install(ledger)
    assert ledger.keys.figures(expiries=1).unconfirmed == 0
    new = install(ledger)
    assert ledger.keys.figures(expiries=1).unconfirmed == 1
    restore(ledger, old)
    assert ledger.keys.figures(expiries=1).unconfirmed == 0
    restore(ledger, new)
    ledger.transitions.confirm(new, reason="", now=0)
    assert ledger.keys.figures(expiries=1).unconfirmed == 0


def test_going_back_exchanges_the_two_keys(ledger: Ledger) -> None:
    old, new = install(ledger), install(ledger)

    assert restore(ledger, old) == [new]

    assert states(ledger) == [ACTIVE, DEACTIVATED]
    assert previous(ledger) == {new: GRACE}  # the confirmed key is active: the other is not kept any longer
    assert restore(ledger, new) == [old]
    assert previous(ledger) == {old: USEFUL}
    assert ledger.keys.all(old)[0].chain == "chain"


def test_a_renewal_after_going_back_goes_back_to_the_key_that_was_restored(ledger: Ledger) -> None:
    old, refused = install(ledger), install(ledger)
    restore(ledger, old)
    install(ledger)

    assert previous(ledger) == {old: USEFUL}
    assert ledger.keys.all(refused)[0].due == GRACE


def test_an_unconfirmed_key_does_not_take_the_place_of_the_one_before_it(ledger: Ledger) -> None:
    first, middle = install(ledger), install(ledger)
    install(ledger)
    install(ledger)

    assert previous(ledger) == {first: USEFUL}
    assert ledger.keys.all(middle)[0].due == GRACE


def test_a_confirmed_key_takes_the_place_of_the_one_before_it(ledger: Ledger) -> None:
    first, second = install(ledger), install(ledger)
    ledger.transitions.confirm(second, reason="", now=0, grace_due=777)
    install(ledger)

    assert previous(ledger) == {second: USEFUL}
    assert ledger.keys.all(first)[0].due == GRACE


def test_where_no_better_one_is_known_the_key_that_is_renewed_counts_as_confirmed(ledger: Ledger) -> None:
    first, second = install(ledger), install(ledger)
    bring(ledger, first, KeyEvent.EXPIRED)
    install(ledger)

    assert previous(ledger) == {second: USEFUL}
    assert ledger.keys.all(second)[0].confirmed


def test_the_key_before_stays_where_the_new_one_is_deleted(ledger: Ledger) -> None:
    old, new = install(ledger), install(ledger)

    ledger.transitions.apply(new, KeyEvent.DELETED, reason="", now=0)
    assert previous(ledger) == {old: USEFUL}

    restore(ledger, old)
    assert states(ledger) == [ACTIVE, DESTROYED]


@pytest.mark.parametrize("state", [KeyState.PRE_ACTIVATION, ACTIVE, KeyState.COMPROMISED, DESTROYED])
def test_only_a_deactivated_key_is_restored(ledger: Ledger, state: KeyState) -> None:
    into = {ACTIVE: KeyEvent.INSTALLED, KeyState.COMPROMISED: KeyEvent.COMPROMISE_REPORTED, DESTROYED: KeyEvent.EXPIRED}
    key_id = answer(ledger)
    if state in into:
        bring(ledger, key_id, into[state])

    with pytest.raises(IllegalTransition):
        restore(ledger, key_id)

    assert states(ledger) == [state]


def test_the_keys_of_owners_and_of_roots_are_apart(ledger: Ledger) -> None:
    keys = [install(ledger, evse_id, root=root) for evse_id in (E1, E2) for root in ("a", "b") for _ in range(2)]

    assert list(previous(ledger)) == keys[::2]
    assert Counter(states(ledger)) == {ACTIVE: 4, DEACTIVATED: 4}
    assert len(ledger.keys.active_files()) == len(keys)


def test_a_key_of_an_unknown_root_is_replaced_by_one_of_any_root(ledger: Ledger) -> None:
    unknown, known = install(ledger), install(ledger, root="a")

    assert states(ledger) == [DEACTIVATED, ACTIVE]
    assert previous(ledger) == {unknown: USEFUL}
    restore(ledger, unknown)
    assert {(key.root, key.previous) for key in ledger.keys.all()} == {("a", False), ("a", True)}
    assert previous(ledger) == {known: GRACE}


def test_keys_to_go_back_to_without_an_active_one_are_bounded(ledger: Ledger) -> None:
    """Else whoever may publish could leave one for each EVSE ID that he makes up."""
    kept = []
    for number in range(4):
        old, new = (answer(ledger, request(V2G, f"DE*ABC*E{number}")) for _ in range(2))
        for key_id in (old, new):
            activate(ledger, key_id, bounds=Bounds(active_limit=3))
        kept.append(old)
        if number < 3:
            ledger.transitions.apply(new, KeyEvent.DELETED, reason="", now=0)
    assert list(previous(ledger)) == kept[1:]
    assert ledger.keys.all(kept[0])[0].due == GRACE


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_one_key_is_active_and_one_is_kept_for_each_owner_and_root(
    fast_ledger: Ledger, seed: int
) -> None:
    chance, ledger = random.Random(seed), fast_ledger
    owners = [(kind, evse_id, root) for kind in (V2G, STATION) for evse_id in (None, E1) for root in ("a", "b", "")]
    for _ in range(300):
        kind, evse_id, root = chance.choice(owners)
        _anything(chance, ledger, kind, evse_id, root)
        living = [key for key in ledger.keys.all() if key.state is not DESTROYED]
        active = Counter((key.owner, key.root) for key in living if key.state is ACTIVE)
        kept = Counter((key.owner, key.root) for key in living if key.previous)
        assert set(active.values()) | set(kept.values()) <= {1}
        assert all(key.state is DEACTIVATED for key in living if key.previous)
        assert len(ledger.keys.active_files()) == active.total() + kept.total()


def _anything(chance: random.Random, ledger: Ledger, kind: CertificateType, evse_id: str | None, root: str) -> None:
    """Something that can happen to the keys of an owner."""
    keys = [key for key in ledger.keys.usable() if key.owner == Owner("", kind, evse_id or "")]
    match chance.choice(["install", "install", "restore", "confirm", "end"]):
        case "install":
            activate(ledger, answer(ledger, request(kind, evse_id)), root=root)
        case "restore":
            for key in [key for key in keys if key.state is DEACTIVATED][:1]:
                restore(ledger, key.key_id)
        case "confirm":
            for key in (key for key in keys if key.state is ACTIVE):
                ledger.transitions.confirm(key.key_id, reason="", now=0, grace_due=GRACE)
        case "end":
            event = chance.choice([KeyEvent.DELETED, KeyEvent.DESTRUCTION_ORDERED, KeyEvent.RETIRED])
            for key in chance.sample(keys, min(1, len(keys))):
                if event is not KeyEvent.RETIRED or key.state is ACTIVE:
                    bring(ledger, key.key_id, event)
