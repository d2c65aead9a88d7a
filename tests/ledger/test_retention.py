"""Deletion of old records, and wiping of private parts."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from ledgers import Place
from recording import (
    a_marked_key,
    ahead,
    answer,
    bring,
    on_record,
    states,
    stock_of,
    traces,
)

from parts import E1, V2G, request, sqlite_of
from stationkey.config.settings import Bounds
from stationkey.keystore import KeyRef
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent, KeyState

pytest_plugins = ["ledgers"]


def test_ten_thousand_unanswered_requests_leave_a_small_database_and_no_stray_file(
    fast_ledger: Ledger, path: Path
) -> None:
    ledger = fast_ledger
    bounds = Bounds(pending_limit=8, pending_total=64, history_limit=200)
    sizes = []
    for round_number in range(10):
        for number in range(1000):
            answer(ledger, request(V2G, f"DE*ABC*E{number % 20}"), bounds=bounds, running=round_number)
        while ledger.retention.forget(keep=bounds.history_limit, answered_before=0):
            pass
        while ledger.database.shrink():
            pass
        ledger.retention.wipe()
        sizes.append(path.stat().st_size)

    assert len(on_record(ledger)) == 64 + 200
    assert states(ledger).count(KeyState.PRE_ACTIVATION) == 64
    assert max(sizes) < 1024 * 1024
    assert abs(sizes[-1] - sizes[0]) <= 64 * 1024
    assert {file.name for file in path.parent.iterdir()} <= {path.name, f"{path.name}-wal", f"{path.name}-shm"}


def test_a_destroyed_key_is_forgotten_when_enough_younger_ones_are_destroyed(ledger: Ledger, place: Place) -> None:
    asked = [request() for _ in range(5)]
    keys = [answer(ledger, one) for one in asked]
    for key_id in (keys[3], keys[0], keys[2]):
        bring(ledger, key_id, KeyEvent.DESTRUCTION_ORDERED)

    while ledger.retention.forget(keep=1, answered_before=0):
        pass

    assert [key.key_id for key in on_record(ledger)] == [keys[1], keys[2], keys[4]]
    assert ledger.answers.find(asked[3].id) is None
    assert not any(f"'{key_id}'" in line for line in place.rows() for key_id in (keys[0], keys[3]))


def test_answers_are_forgotten_by_running_time_but_not_while_their_key_is_pending(ledger: Ledger) -> None:
    old_pending, old_active, young_active = request(), request(V2G, E1), request()
    answer(ledger, old_pending, running=100)
    bring(ledger, answer(ledger, old_active, running=100), KeyEvent.INSTALLED)
    bring(ledger, answer(ledger, young_active, running=200), KeyEvent.INSTALLED)

    while ledger.retention.forget(keep=10, answered_before=200):
        pass

    found = [ledger.answers.find(one.id) is not None for one in (old_pending, old_active, young_active)]
    assert found == [True, False, True]
    assert len(on_record(ledger)) == 3


def test_one_step_of_forgetting_is_small(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.retention._BATCH", 3)
    for _ in range(10):
        bring(ledger, answer(ledger), KeyEvent.EXPIRED)

    assert ledger.retention.forget(keep=0, answered_before=0) == 3


@pytest.mark.parametrize("seed", [5, 18, 96, 116])
def test_no_piece_of_a_destroyed_key_is_left_wherever_its_row_had_been(
    fast_ledger: Ledger, path: Path, seed: int
) -> None:
    """Rows come and go, and others move from page to page for that, and leave pieces of themselves behind.

    The seeds are some with which SQLite 3.40 leaves such a piece, with secure_delete on and the log emptied.
    """
    ledger = fast_ledger
    chance = random.Random(seed)
    live: list[KeyRef] = []
    gone: list[KeyRef] = []
    for _ in range(200):
        if chance.random() < 0.55 or not live:
            live.append(ahead(ledger, a_marked_key(chance)))
        else:
            gone.append(live.pop(chance.randrange(len(live))))
            bring(ledger, gone[-1].key_id, KeyEvent.DESTRUCTION_ORDERED)
    ledger.database.checkpoint()
    assert traces(path, gone) > 0

    assert ledger.retention.wipe()

    assert traces(path, gone) == 0
    assert stock_of(ledger) == live


class Eventful:
    """A ledger that all kinds of things happen to."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger = ledger
        self.chance = random.Random(seed)
        self.live: dict[str, KeyRef] = {}
        self.stock: list[KeyRef] = []
        self.gone: list[KeyRef] = []

    def asked(self, key: KeyRef, *, ahead: bool = False) -> None:
        one = request(
            request_id=str(uuid.UUID(int=self.chance.getrandbits(128))), common_name="x" * self.chance.randint(1, 60)
        )
        csr = "c" * self.chance.randint(500, 900)
        bounds = Bounds(pending_limit=60)
        crowded = self.ledger.answers.record(one, key, csr, now=0, running=0, due=1, bounds=bounds, ahead=ahead)
        self.live[key.key_id] = key
        self.gone += [self.live.pop(key_id) for key_id, _ in crowded]

    def taken(self) -> None:
        if self.stock:
            self.asked(self.stock.pop(self.chance.randrange(len(self.stock))), ahead=True)

    def installed(self) -> None:
        key_id = self.chance.choice(list(self.live))
        if self.ledger.keys.all(key_id)[0].state is KeyState.PRE_ACTIVATION:
            chain = "z" * self.chance.randint(500, 6000)
            self.ledger.transitions.activate(
                key_id, chain=chain, not_after=0, reason="", now=0, grace_due=1, useful_until=1, message_id=None
            )

    def destroyed(self) -> None:
        self.gone.append(self.live.pop(self.chance.choice(list(self.live))))
        bring(self.ledger, self.gone[-1].key_id, KeyEvent.DESTRUCTION_ORDERED)

    def swept(self) -> None:
        self.ledger.retention.forget(keep=20, answered_before=0)
        self.ledger.retention.wipe()
        sqlite_of(self.ledger)._connection.executescript("PRAGMA incremental_vacuum(3)")  # noqa: SLF001 - as `shrink` does, with less to spare
        self.ledger.database.checkpoint()

    def anything(self) -> None:
        """One of all this."""
        moves: list[tuple[int, Callable[[], None]]] = [
            (10, lambda: self.stock.append(ahead(self.ledger, a_marked_key(self.chance)))),
            (10, self.taken),
            (30, lambda: self.asked(a_marked_key(self.chance))),
            (20, self.installed),
            (26, self.destroyed),
            (4, self.swept),
        ]
        weights = [weight if self.live or number == 2 else 0 for number, (weight, _) in enumerate(moves)]
        self.chance.choices([move for _, move in moves], weights)[0]()


@pytest.mark.parametrize("seed", range(4))
def test_no_piece_of_a_destroyed_key_is_left_when_everything_happened_to_the_ledger(
    fast_ledger: Ledger, path: Path, seed: int
) -> None:
    """Of all kinds of rows some grow, some go; pages are moved and taken off the file."""
    ledger = fast_ledger
    eventful = Eventful(ledger, seed)
    for _ in range(4):
        for _ in range(200):
            eventful.anything()
        eventful.swept()
        assert traces(path, eventful.gone) == 0
    while ledger.retention.forget(keep=5, answered_before=0) or ledger.database.shrink():
        pass
    ledger.database.checkpoint()

    assert len(eventful.gone) > 100
    assert traces(path, eventful.gone) == 0
    assert {key.key_id for key in ledger.keys.usable()} == {*eventful.live, *(key.key_id for key in eventful.stock)}
    assert all(ledger.keys.ref(key_id) == key for key_id, key in eventful.live.items())
    assert sqlite_of(ledger)._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]  # noqa: SLF001 - of it all


def test_the_private_parts_are_written_anew_only_if_a_key_was_destroyed(sqlite_ledger: Ledger) -> None:
    ledger = sqlite_ledger
    first, second, third = answer(ledger), answer(ledger), ahead(ledger)
    for key_id in (first, second, third.key_id):
        assert not ledger.retention.wipe()
        bring(ledger, key_id, KeyEvent.EXPIRED)
        assert ledger.retention.wipe()
    assert not ledger.retention.wipe()
