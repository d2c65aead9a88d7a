"""The ledger: its versions, its bounds, and that what is refused changes nothing."""

from __future__ import annotations

import random
import re
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from parts import E1, E2, STATION, V2G, V2G20, C, O, dump, new_id, request
from stationkey.config.settings import Bounds
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.contract.profiles import RSA_3072, SECP256R1, KeyType
from stationkey.errors import LedgerError
from stationkey.keystore import KeyRef
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import TRANSITIONS, IllegalTransition, KeyEvent, KeyState
from stationkey.ledger.migrations import MIGRATIONS, SCHEMA_VERSION

CSR = "-----BEGIN CERTIFICATE REQUEST-----\n" + "x" * 600
REQUEST_ID = "123E4567-e89b-12d3-a456-426614174000"
RANDOM = random.Random(1)

INTO: dict[KeyState, tuple[KeyEvent, ...]] = {
    KeyState.PRE_ACTIVATION: (),
    KeyState.ACTIVE: (KeyEvent.INSTALLED,),
    KeyState.DEACTIVATED: (KeyEvent.INSTALLED, KeyEvent.RETIRED),
    KeyState.COMPROMISED: (KeyEvent.COMPROMISE_REPORTED,),
    KeyState.DESTROYED: (KeyEvent.EXPIRED,),
}
"""What brings a new key into each state."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path)) as opened:
        yield opened


@pytest.fixture
def fast_ledger(ledger: Ledger) -> Ledger:
    """One that does not wait for the disk, for tests of thousands of steps in which no power is lost."""
    ledger.database._connection.execute("PRAGMA synchronous=OFF")  # noqa: SLF001 - nobody else should be able to
    return ledger


def a_key() -> KeyRef:
    """What a key store might give, without the time that it would take. As long as a TPM's."""
    return KeyRef(scheme="software", key_type=SECP256R1, public=RANDOM.randbytes(91), private=RANDOM.randbytes(230))


def answer(
    ledger: Ledger,
    asked: GenerateCsrRequest | None = None,
    *,
    key: KeyRef | None = None,
    running: int = 0,
    bounds: Bounds | None = None,
    taken: bool = False,
) -> str:
    """Record an answer, with a key made for it or with one `taken` from those made ahead; the name of its key."""
    key = key or a_key()
    ledger.answers.record(
        asked or request(),
        key,
        CSR,
        now=0,
        running=running,
        due=running + 1000,
        bounds=bounds or Bounds(),
        ahead=taken,
    )
    return key.key_id


def bring(ledger: Ledger, key_id: str, *events: KeyEvent) -> None:
    for event in events:
        ledger.transitions.apply(key_id, event, reason="", now=0)


def stock_of(ledger: Ledger) -> list[KeyRef]:
    """The keys made ahead."""
    return [key for key, _ in ledger.keys.made_ahead()]


def ahead(ledger: Ledger, key: KeyRef | None = None, *, due: int = 1000) -> KeyRef:
    """Put a key on record that has no owner yet."""
    key = key or a_key()
    ledger.transitions.make_ahead(key, now=5, due=due, seconds=0.5)
    return key


def on_record(ledger: Ledger) -> list[KeyRecord]:
    return ledger.keys.all()


def states(ledger: Ledger) -> list[KeyState]:
    return [key.state for key in on_record(ledger)]


# Steps.


@pytest.mark.parametrize(
    ("state", "event"),
    [
        pytest.param(state, event, id=f"{state}, {event}")
        for state, event in product(KeyState, KeyEvent)
        if (state, event) not in TRANSITIONS
    ],
)
def test_an_illegal_step_changes_nothing(ledger: Ledger, path: Path, state: KeyState, event: KeyEvent) -> None:
    key_id = answer(ledger)
    bring(ledger, key_id, *INTO[state])
    before = dump(path)

    with pytest.raises(IllegalTransition):
        ledger.transitions.apply(key_id, event, reason="", now=0)

    assert dump(path) == before
    assert states(ledger) == [state]


def test_an_activation_that_fails_deactivates_nothing(ledger: Ledger, path: Path) -> None:
    active, gone = answer(ledger), answer(ledger)
    bring(ledger, active, KeyEvent.INSTALLED)
    bring(ledger, gone, KeyEvent.EXPIRED)
    before = dump(path)

    with pytest.raises(IllegalTransition):
        ledger.transitions.activate(gone, chain=None, not_after=None, reason="", now=0, grace_due=0, message_id=None)

    assert dump(path) == before


def test_an_event_of_a_key_that_is_not_on_record_is_refused_in_words(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as refusal:
        ledger.transitions.apply("0" * 20, KeyEvent.EXPIRED, reason="", now=0)

    assert refusal.value.reason == "key_not_found"


# Bounds.


def test_the_oldest_pending_key_of_an_owner_makes_room(ledger: Ledger) -> None:
    others = [answer(ledger, request(V2G, E1)) for _ in range(3)]
    keys = [answer(ledger, bounds=Bounds(pending_limit=3)) for _ in range(5)]

    left = {key.key_id for key in on_record(ledger) if key.state is KeyState.PRE_ACTIVATION}
    assert left == {*others, *keys[2:]}
    assert ledger.keys.history(keys[0])[-1].reason == "too many keys were pending"


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


def test_a_destroyed_key_is_forgotten_when_enough_younger_ones_are_destroyed(ledger: Ledger, path: Path) -> None:
    asked = [request() for _ in range(5)]
    keys = [answer(ledger, one) for one in asked]
    for key_id in (keys[3], keys[0], keys[2]):
        bring(ledger, key_id, KeyEvent.DESTRUCTION_ORDERED)

    while ledger.retention.forget(keep=1, answered_before=0):
        pass

    assert [key.key_id for key in on_record(ledger)] == [keys[1], keys[2], keys[4]]
    assert ledger.answers.find(asked[3].id) is None
    assert not any(f"'{key_id}'" in line for line in dump(path) for key_id in (keys[0], keys[3]))


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


# Rejections.


def note(ledger: Ledger, *names: str) -> None:
    for name in names:
        ledger.rejections.note(name, reason="r", message="m", now=0)


def rejected(ledger: Ledger) -> list[str]:
    """Whose rejections are on disk."""
    with closing(sqlite3.connect(ledger.database.path)) as connection:
        return [row[0] for row in connection.execute("SELECT request_id FROM rejection ORDER BY seq")]


def test_a_rejection_is_noted_at_once_and_written_with_the_others(ledger: Ledger) -> None:
    note(ledger, "a", "b")
    answer(ledger)
    assert rejected(ledger) == []
    assert not ledger.rejections.write()
    assert rejected(ledger) == ["a", "b"]
    assert not ledger.rejections.write()
    note(ledger, "c")
    ledger.close()
    assert rejected(ledger) == ["a", "b", "c"]


def test_one_step_of_writing_rejections_is_small(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.rejections._PART", 2)
    note(ledger, *"abcde")
    assert [ledger.rejections.write() for _ in range(3)] == [True, True, False]
    assert rejected(ledger) == list("abcde")


def test_of_rejections_the_newest_are_kept_in_memory_and_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.rejections.MAX_REJECTIONS", 3)
    with closing(Ledger(path)) as ledger:
        note(ledger, *"abcde")
        ledger.rejections.write()
        assert rejected(ledger) == list("cde")
        note(ledger, *"fg")
        ledger.rejections.write()
        assert rejected(ledger) == list("efg")


def test_rejections_that_cannot_be_written_are_kept_and_the_oldest_make_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationkey.ledger.rejections.MAX_REJECTIONS", 4)
    with closing(Ledger(path)) as ledger:
        note(ledger, *"ab")
        with closing(sqlite3.connect(path)) as other:
            ledger.database._connection.execute("PRAGMA busy_timeout=0")  # noqa: SLF001 - or it would be waited for
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError) as failure:
                ledger.rejections.write()
            assert failure.value.reason == "ledger_busy"
            note(ledger, *"cde")
            with pytest.raises(LedgerError):
                ledger.rejections.write()
        ledger.rejections.write()
        assert rejected(ledger) == list("bcde")


def test_a_ledger_that_takes_no_rejections_any_more_is_closed_all_the_same(ledger: Ledger, path: Path) -> None:
    note(ledger, "a")
    with closing(sqlite3.connect(path)) as other:
        ledger.database._connection.execute("PRAGMA busy_timeout=0")  # noqa: SLF001 - or it would be waited for
        other.execute("BEGIN IMMEDIATE")
        ledger.close()
    assert rejected(ledger) == []


# Growth.

OWNER = (V2G, E1)
ASKED = "00000000-0000-4000-8000-000000000001"
INSTALLED = "00000000-0000-4000-8000-000000000002"


def with_history(ledger: Ledger, destroyed: int) -> str:
    """Fill a ledger with destroyed keys, and with a few that live, always as many; the active one's name.

    The EVSE IDs are always the same: how many steps SQLite sorts them in depends on their order.
    """
    before = None
    for _ in range(destroyed):
        key_id = answer(ledger, request(*OWNER))
        ledger.transitions.activate(
            key_id, chain="c", not_after=0, reason="", now=0, grace_due=5000, message_id=new_id()
        )
        if before is not None:
            bring(ledger, before, KeyEvent.EXPIRED)
        before = key_id
    assert before is not None
    for number in range(5):
        bring(ledger, answer(ledger), KeyEvent.EXPIRED)
        answer(ledger, request(V2G, f"DE*ABC*E{number}"))
        answer(ledger, request(*OWNER))
        ahead(ledger)
    ledger.retention.wipe()
    return before


def _delivered(ledger: Ledger, _: str) -> None:
    ledger.answers.mark_delivered(ASKED)
    ledger.retention.write_running(1)


def _rejected(ledger: Ledger, _: str) -> None:
    ledger.rejections.note(ASKED, reason="r", message="m", now=0)
    ledger.rejections.write()


def _destroyed_and_wiped(ledger: Ledger, key_id: str) -> None:
    ledger.transitions.apply(key_id, KeyEvent.DELETED, reason="", now=0)
    assert ledger.retention.wipe()


OPERATIONS: dict[str, Callable[[Ledger, str], object]] = {
    "find_answer": lambda ledger, _: ledger.answers.find(ASKED),
    "record_answer": lambda ledger, _: answer(ledger, request(*OWNER, request_id=ASKED)),
    "record_answer that makes room": lambda ledger, _: answer(
        ledger, request(*OWNER), bounds=Bounds(pending_limit=3, pending_total=2)
    ),
    "record_answer with a key made ahead": lambda ledger, _: answer(
        ledger, request(*OWNER), key=stock_of(ledger)[0], taken=True
    ),
    "write_rejections": _rejected,
    "mark_delivered": _delivered,
    "undelivered": lambda ledger, _: ledger.answers.undelivered(),
    "make_ahead": lambda ledger, _: ahead(ledger),
    "made_ahead": lambda ledger, _: ledger.keys.made_ahead(),
    "pending": lambda ledger, _: ledger.keys.pending(*OWNER),
    "active of every EVSE": lambda ledger, _: ledger.keys.active(V2G, None),
    "deactivated": lambda ledger, _: ledger.keys.deactivated(*OWNER),
    "others_installed": lambda ledger, key_id: ledger.keys.others_installed(ledger.keys.all(key_id)[0]),
    "keys by name": lambda ledger, key_id: ledger.keys.all(key_id),
    "usable": lambda ledger, _: ledger.keys.usable(),
    "key_ref": lambda ledger, key_id: ledger.keys.ref(key_id),
    "history": lambda ledger, key_id: ledger.keys.history(key_id),
    "counts_as_repeat": lambda ledger, _: ledger.transitions.seen(INSTALLED),
    "active_files": lambda ledger, _: ledger.keys.active_files(),
    "figures": lambda ledger, _: ledger.keys.figures(expiries=8),
    "is_due": lambda ledger, key_id: ledger.retention.is_due(key_id, 0),
    "due": lambda ledger, _: ledger.retention.due(10),
    "next_due": lambda ledger, _: ledger.retention.next_due(),
    "adopt": lambda ledger, _: ledger.retention.adopt(pending_due=1, grace_due=1),
    "apply": lambda ledger, key_id: ledger.transitions.apply(key_id, KeyEvent.RETIRED, reason="", now=0),
    "activate": lambda ledger, _: ledger.transitions.activate(
        ledger.keys.pending(*OWNER)[0].key_id,
        chain="c",
        not_after=0,
        reason="",
        now=0,
        grace_due=0,
        message_id=INSTALLED,
    ),
    "destruction": lambda ledger, key_id: ledger.transitions.apply(key_id, KeyEvent.DELETED, reason="", now=0),
    "destruction and wipe": _destroyed_and_wiped,
    "forget, nothing": lambda ledger, _: ledger.retention.forget(keep=10**6, answered_before=0),
    "forget, a batch of keys": lambda ledger, _: ledger.retention.forget(keep=5, answered_before=0),
    "forget, a batch of answers": lambda ledger, _: ledger.retention.forget(keep=10**6, answered_before=1),
}
"""All that is done with a ledger while requests wait, but for listing it."""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_done_while_requests_wait_costs_no_more_with_a_long_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Counted in instructions of SQLite's virtual machine, which are the same on every machine."""
    monkeypatch.setattr("stationkey.ledger.retention._BATCH", 10)
    steps = [0, 0]
    for number, destroyed in enumerate((40, 400)):
        with closing(Ledger(tmp_path / f"{destroyed}.sqlite3")) as ledger:
            connection = ledger.database._connection  # noqa: SLF001 - what it is given to do is the point
            connection.execute("PRAGMA synchronous=OFF")
            active = with_history(ledger, destroyed)

            def count(number: int = number) -> int:
                steps[number] += 1
                return 0

            connection.set_progress_handler(count, 1)
            OPERATIONS[operation](ledger, active)
            connection.set_progress_handler(None, 0)

    assert steps[0] > 10
    assert abs(steps[1] - steps[0]) <= 20


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_query_goes_through_a_table_that_grows(fast_ledger: Ledger, operation: str) -> None:
    active = with_history(fast_ledger, 3)
    statements: list[str] = []
    connection = fast_ledger.database._connection  # noqa: SLF001 - what it is given to do is the point
    connection.set_trace_callback(statements.append)
    OPERATIONS[operation](fast_ledger, active)
    connection.set_trace_callback(None)

    queries = [text for text in statements if re.match("SELECT|INSERT|UPDATE|DELETE", text)]
    plans = [row[3] for text in queries for row in connection.execute(f"EXPLAIN QUERY PLAN {text}")]
    assert queries
    through_all = [plan for plan in plans if re.match(r"SCAN (key|answer|event)\b", plan)]
    assert set(through_all) <= {"SCAN key USING COVERING INDEX key_living", "SCAN key USING INDEX key_living"}


def test_the_figures_are_those_of_the_keys_on_record(ledger: Ledger) -> None:
    empty = ledger.keys.figures(expiries=8)
    assert (empty.keys, empty.expiries, empty.unknown, empty.destroyed) == ({}, (), 0, 0)
    later, sooner, unknown, _, *gone = (answer(ledger, request(V2G, f"DE*ABC*E{number}")) for number in range(7))
    ahead(ledger)
    for key_id, not_after in ((later, 20), (sooner, 10), (unknown, None)):
        ledger.transitions.activate(
            key_id, chain=None, not_after=not_after, reason="", now=0, grace_due=0, message_id=None
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


def test_what_a_flood_has_left_is_taken_off_the_file_in_steps(fast_ledger: Ledger, path: Path) -> None:
    for _ in range(1200):
        answer(fast_ledger)
    fast_ledger.database.checkpoint()
    while fast_ledger.retention.forget(keep=0, answered_before=0):
        pass
    large, steps = path.stat().st_size, 1
    while fast_ledger.database.shrink():
        steps += 1
    fast_ledger.database.checkpoint()

    assert path.stat().st_size < large - 64 * 4096
    assert 1 < steps < 10
    assert fast_ledger.database._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]  # noqa: SLF001 - of it all


# Wiping.


def on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def a_marked_key(chance: random.Random) -> KeyRef:
    """One whose private part is 8 bytes over and over, so that no piece of it is overlooked. As long as a TPM's."""
    mark = chance.randbytes(8)
    return KeyRef(
        scheme="software",
        key_type=SECP256R1,
        public=chance.randbytes(91),
        private=mark * chance.choice([17, 29, 43, 150]),
    )


def traces(path: Path, keys: list[KeyRef]) -> int:
    """Of how many keys a piece is on the disk; one of 23 bytes is certain to be seen."""
    raw = on_disk(path)
    return sum(key.private[:16] in raw for key in keys)


@pytest.mark.parametrize("seed", [7, 15, 37, 44])
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
        self.gone += [self.live.pop(key_id) for key_id in crowded]

    def taken(self) -> None:
        if self.stock:
            self.asked(self.stock.pop(self.chance.randrange(len(self.stock))), ahead=True)

    def installed(self) -> None:
        key_id = self.chance.choice(list(self.live))
        if self.ledger.keys.all(key_id)[0].state is KeyState.PRE_ACTIVATION:
            chain = "z" * self.chance.randint(500, 6000)
            self.ledger.transitions.activate(
                key_id, chain=chain, not_after=0, reason="", now=0, grace_due=1, message_id=None
            )

    def destroyed(self) -> None:
        self.gone.append(self.live.pop(self.chance.choice(list(self.live))))
        bring(self.ledger, self.gone[-1].key_id, KeyEvent.DESTRUCTION_ORDERED)

    def swept(self) -> None:
        self.ledger.retention.forget(keep=20, answered_before=0)
        self.ledger.retention.wipe()
        self.ledger.database._connection.executescript("PRAGMA incremental_vacuum(3)")  # noqa: SLF001 - as `shrink` does, with less to spare
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
    assert ledger.database._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]  # noqa: SLF001 - of it all


def test_the_private_parts_are_written_anew_only_if_a_key_was_destroyed(ledger: Ledger) -> None:
    first, second, third = answer(ledger), answer(ledger), ahead(ledger)
    for key_id in (first, second, third.key_id):
        assert not ledger.retention.wipe()
        bring(ledger, key_id, KeyEvent.EXPIRED)
        assert ledger.retention.wipe()
    assert not ledger.retention.wipe()


def test_a_reader_in_the_way_keeps_no_key_from_being_destroyed(ledger: Ledger, path: Path) -> None:
    key = a_key()
    answer(ledger, key=key)
    ledger.database._connection.execute("PRAGMA busy_timeout=0")  # noqa: SLF001 - so that nobody waits for what cannot come
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM key").fetchall()
        bring(ledger, key.key_id, KeyEvent.DESTRUCTION_ORDERED)
        assert not ledger.database.checkpoint()

    assert ledger.database.checkpoint()
    assert states(ledger) == [KeyState.DESTROYED]
    assert key.private not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_a_backup_made_while_it_is_written_has_every_key_so_far(ledger: Ledger, tmp_path: Path) -> None:
    keys = [a_key() for _ in range(3)]
    for key in keys:
        answer(ledger, key=key)

    with (
        closing(sqlite3.connect(ledger.database.path)) as source,
        closing(sqlite3.connect(tmp_path / "copy.sqlite3")) as copy,
    ):
        source.backup(copy)
    answer(ledger)

    with closing(Ledger(tmp_path / "copy.sqlite3")) as restored:
        assert [restored.keys.ref(key.key_id) for key in keys] == keys
        assert len(on_record(restored)) == 3


# Keys made ahead.


def test_a_key_made_ahead_is_on_record_without_an_owner(ledger: Ledger) -> None:
    key = ahead(ledger)

    (record,) = ledger.keys.all()
    assert (record.key_id, record.has_owner, record.owner) == (key.key_id, False, ("", ""))
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


def test_keys_made_ahead_are_there_after_a_restart_oldest_first(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        keys = [ahead(ledger) for _ in range(5)]
        answer(ledger, key=keys[2], taken=True)
        bring(ledger, keys[3].key_id, KeyEvent.EXPIRED)

    with closing(Ledger(path)) as ledger:
        assert stock_of(ledger) == [keys[0], keys[1], keys[4]]


@pytest.mark.parametrize("again", [False, True], ids=["in the run that made it", "in a later run"])
def test_a_key_made_ahead_gets_its_owner_with_its_answer(path: Path, again: bool) -> None:
    with closing(Ledger(path)) as ledger:
        key = ahead(ledger)
        if not again:
            answer(ledger, request(V2G, E1, request_id=REQUEST_ID), key=key, taken=True)
    if again:
        with closing(Ledger(path)) as ledger:
            answer(ledger, request(V2G, E1, request_id=REQUEST_ID), key=key, taken=True)

    with closing(Ledger(path)) as ledger:
        (record,) = ledger.keys.all()
        other = answer(ledger, request(V2G, E1))
        assert (record.key_id, record.owner, record.has_owner) == (key.key_id, (V2G, E1), True)
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


def test_pending_keys_are_in_the_order_in_which_they_were_asked_for_and_not_made(ledger: Ledger) -> None:
    early, late = ahead(ledger), ahead(ledger)
    first, second, third = answer(ledger, key=late, taken=True), answer(ledger), answer(ledger, key=early, taken=True)

    pending = ledger.keys.pending(ledger.keys.all(first)[0].certificate_type, None)

    assert [key.key_id for key in pending] == [first, second, third]
    assert [ledger.keys.history(key.key_id)[-1].seq for key in pending] == [key.asked for key in pending]


def _activated(ledger: Ledger, key_id: str) -> None:
    bring(ledger, key_id, KeyEvent.INSTALLED)


def _destroyed(ledger: Ledger, key_id: str) -> None:
    bring(ledger, key_id, KeyEvent.DESTRUCTION_ORDERED)


def _compromised(ledger: Ledger, key_id: str) -> None:
    bring(ledger, key_id, KeyEvent.COMPROMISE_REPORTED)


@pytest.mark.parametrize("after", [None, _activated, _destroyed, _compromised])
@pytest.mark.parametrize("pooled", [True, False], ids=["made ahead", "made for its request"])
def test_a_key_is_never_handed_out_twice(
    ledger: Ledger, path: Path, pooled: bool, after: Callable[[Ledger, str], None] | None
) -> None:
    key = ahead(ledger) if pooled else a_key()
    answer(ledger, key=key, taken=pooled)
    if after is not None:
        after(ledger, key.key_id)
    before = dump(path)

    with pytest.raises(LedgerError) as refusal:
        answer(ledger, key=key, taken=pooled)

    assert refusal.value.reason == "key_taken"
    assert dump(path) == before


@pytest.mark.parametrize("again", [False, True], ids=["in the run that made it", "in a later run"])
@pytest.mark.parametrize("end", [KeyEvent.EXPIRED, KeyEvent.DESTRUCTION_ORDERED, KeyEvent.COMPROMISE_REPORTED])
def test_a_key_made_ahead_that_is_gone_is_never_handed_out(path: Path, end: KeyEvent, again: bool) -> None:
    """Also where another process has ended it, and the daemon has not been told."""
    with ExitStack() as opened:
        ledger = opened.enter_context(closing(Ledger(path)))
        key = ahead(ledger)
        if again:
            ledger.close()
            ledger = opened.enter_context(closing(Ledger(path)))  # the run after it
            assert stock_of(ledger) == [key]
        with closing(Ledger(path, make=False)) as command:
            bring(command, key.key_id, end)
        before = dump(path)

        for _ in range(2):
            with pytest.raises(LedgerError) as refusal:
                answer(ledger, key=key, taken=True)
            assert refusal.value.reason == "key_taken"

        assert dump(path) == before
        assert stock_of(ledger) == []


def test_a_key_cannot_be_made_ahead_twice(ledger: Ledger, path: Path) -> None:
    key = ahead(ledger)
    before = dump(path)

    with pytest.raises(LedgerError):
        ahead(ledger, key)

    assert dump(path) == before


def test_an_answer_that_could_not_be_written_leaves_the_key_to_the_next_request(ledger: Ledger) -> None:
    key, asked = ahead(ledger), request()
    answer(ledger, asked)
    with pytest.raises(LedgerError):
        answer(ledger, asked, key=key, taken=True)

    assert stock_of(ledger) == [key]
    answer(ledger, key=key, taken=True)
    assert stock_of(ledger) == []


def test_keys_made_ahead_are_no_pending_keys(ledger: Ledger) -> None:
    bounds = Bounds(pending_limit=2, pending_total=2)
    stock = [ahead(ledger) for _ in range(5)]
    with closing(sqlite3.connect(ledger.database.path)) as connection, connection:
        connection.execute("UPDATE key SET due = NULL")
    keys = [answer(ledger, bounds=bounds) for _ in range(4)]
    ledger.retention.adopt(pending_due=7, grace_due=8)

    assert stock_of(ledger) == stock
    assert [key.due for key in on_record(ledger) if not key.has_owner] == [None] * 5
    assert [key.key_id for key in ledger.keys.usable() if key.has_owner] == keys[2:]


def test_how_long_the_last_key_of_each_type_took_to_make_is_on_record(ledger: Ledger) -> None:
    assert ledger.keys.seconds_to_make() == {}
    made: list[tuple[float, KeyType]] = [(0.25, SECP256R1), (31.5, RSA_3072), (29.25, RSA_3072)]
    for seconds, key_type in made:
        ledger.transitions.make_ahead(replace(a_key(), key_type=key_type), now=0, due=1, seconds=seconds)
    assert ledger.keys.seconds_to_make() == {"secp256r1": 0.25, "RSA-3072": 29.25}


def test_the_ids_that_were_answered_are_read_a_part_at_a_time(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.answers._PART", 2)
    asked = [request() for _ in range(5)]
    for one in asked:
        answer(ledger, one)
    read: list[str] = []
    while part := ledger.answers.ids(after=read[-1] if read else ""):
        assert len(part) <= 2
        read += part
    assert read == sorted(one.id for one in asked)


def test_a_key_made_ahead_ages_out_and_leaves_no_record(ledger: Ledger, path: Path) -> None:
    old, young = ahead(ledger, due=100), ahead(ledger, due=200)
    destroyed = answer(ledger)
    bring(ledger, destroyed, KeyEvent.EXPIRED)
    assert (ledger.retention.next_due(), ledger.retention.due(99), ledger.retention.due(100)) == (100, [], [old.key_id])

    state = ledger.transitions.apply(old.key_id, KeyEvent.EXPIRED, reason="made ahead, and not needed in time", now=0)

    assert state is KeyState.DESTROYED
    assert [key.key_id for key in on_record(ledger)] == [young.key_id, destroyed]
    assert not any(old.key_id in line for line in dump(path))
    assert ledger.keys.history(old.key_id) == []
    assert old.private not in on_disk(path)
    assert ledger.retention.forget(keep=1, answered_before=0) == 0


@pytest.mark.parametrize("event", [KeyEvent.INSTALLED, KeyEvent.INSTALLATION_FAILED])
def test_a_key_that_no_request_has_taken_has_no_certificate(ledger: Ledger, path: Path, event: KeyEvent) -> None:
    key = ahead(ledger)
    before = dump(path)

    with pytest.raises(IllegalTransition):
        bring(ledger, key.key_id, event)

    assert dump(path) == before


# Versions.


def make_version_1(path: Path, key: KeyRef) -> None:
    """A database as version 1 wrote it, with one key and the answer that carries its CSR."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(MIGRATIONS[0])
        connection.execute("PRAGMA user_version=1")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(
            "INSERT INTO key VALUES (?, 'software', 'secp256r1', 'v2g_certificate', ?, 'ECDSA_SHA256', 'CN', ?, ?,"
            " 'pre-activation', 1700000000000, ?, ?)",
            (key.key_id, E1, O, C, key.public, key.private),
        )
        connection.execute(
            "INSERT INTO answer VALUES (?, ?, x'00', ?, ?, 1700000000000, 1)",
            (REQUEST_ID.lower(), REQUEST_ID, key.key_id, CSR),
        )
        connection.execute("INSERT INTO meta VALUES ('mqtt_client_id', 'stationkey-1')")


def test_a_database_of_version_1_is_brought_up_to_date_with_all_that_is_in_it(path: Path) -> None:
    key = a_key()
    make_version_1(path, key)

    with closing(Ledger(path)) as ledger:
        (record,) = ledger.keys.all()
        assert (record.key_id, record.state, record.evse_id) == (key.key_id, KeyState.PRE_ACTIVATION, E1)
        assert record.request_ids == (REQUEST_ID,)
        assert ledger.keys.ref(key.key_id) == key
        assert [(event.event, event.at) for event in ledger.keys.history(key.key_id)] == [
            ("CSR answered", 1700000000000)
        ]
        answered = ledger.answers.find(REQUEST_ID.lower())
        assert answered is not None
        assert (answered.request_id, answered.csr, answered.key_id) == (REQUEST_ID, CSR, key.key_id)
        assert ledger.client_id() == "stationkey-1"
        assert ledger.retention.running == 0


def test_a_pending_key_of_version_1_gets_an_end_and_can_be_activated(path: Path) -> None:
    key = a_key()
    make_version_1(path, key)

    with closing(Ledger(path)) as ledger:
        assert ledger.keys.all()[0].due is None
        ledger.retention.adopt(pending_due=1000, grace_due=10)
        assert ledger.keys.all()[0].due == 1000
        ledger.retention.adopt(pending_due=2000, grace_due=10)
        assert ledger.keys.all()[0].due == 1000
        bring(ledger, key.key_id, KeyEvent.INSTALLED)
        assert states(ledger) == [KeyState.ACTIVE]


def _schema(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        version = connection.execute("PRAGMA user_version").fetchall()
        vacuum = connection.execute("PRAGMA auto_vacuum").fetchall()
        # Without SQLite's own, of which it leaves one behind that nobody uses.
        ours = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'"
        return version + vacuum + sorted(connection.execute(ours))


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_a_database_of_each_version_becomes_what_a_new_one_is(tmp_path: Path, version: int) -> None:
    old, new = tmp_path / "old.sqlite3", tmp_path / "new.sqlite3"
    with closing(sqlite3.connect(old)) as connection:
        for number in range(version):
            connection.executescript(MIGRATIONS[number])
        connection.execute(f"PRAGMA user_version={version}")

    Ledger(old).close()
    Ledger(new).close()

    assert _schema(old) == _schema(new)


@pytest.mark.parametrize("at", range(1, 12))
def test_a_migration_is_done_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    key = a_key()
    make_version_1(path, key)
    statements = MIGRATIONS[1].split(";\n")
    broken = ";\n".join([*statements[:at], "SELECT * FROM power_is_lost_here"])
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.database.MIGRATIONS", (MIGRATIONS[0], broken))
        with pytest.raises(LedgerError):
            Ledger(path)

    with closing(Ledger(path)) as ledger:
        assert ledger.keys.ref(key.key_id) == key
        assert len(ledger.keys.history(key.key_id)) == 1


def make_version_2(path: Path) -> dict[KeyState, KeyRef]:
    """A database as version 2 wrote it, with a key in each state; the keys."""
    keys = {state: a_key() for state in KeyState}
    seq = 0
    with closing(sqlite3.connect(path)) as connection, connection:
        for script in MIGRATIONS[:2]:
            connection.executescript(script)
        connection.execute("PRAGMA user_version=2")
        connection.execute("PRAGMA journal_mode=WAL")
        # Not in the order of their names: in that in which they were made.
        for number, (state, key) in enumerate(keys.items()):
            gone = state is KeyState.DESTROYED
            installed = state in {KeyState.ACTIVE, KeyState.DEACTIVATED, KeyState.DESTROYED}
            due = number if state in {KeyState.PRE_ACTIVATION, KeyState.DEACTIVATED} else None
            chain, not_after = ("chain", 9) if installed else (None, None)
            connection.execute(
                "INSERT INTO key VALUES (?, 'software', 'secp256r1', 'v2g_certificate', ?, 'ECDSA_SHA256', 'CN', ?, ?,"
                " ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(key.key_id, E1, O, C, state, number, key.public, None if gone else key.private),
                    *(due, number == 0, chain, not_after),
                ),
            )
            connection.execute(
                "INSERT INTO answer VALUES (?, ?, x'00', ?, ?, ?, ?, 77)",
                (f"id-{number}", f"ID-{number}", key.key_id, "" if gone else CSR, number, number > 0),
            )
        for key in keys.values():
            seq += 1
            connection.execute(
                "INSERT INTO event VALUES (?, ?, ?, 'CSR answered', 'pre-activation', '', 'ID')", (seq, key.key_id, seq)
            )
        for state, event in (
            (KeyState.DESTROYED, "installed"),
            (KeyState.DESTROYED, "deleted"),
            (KeyState.DEACTIVATED, "installed"),
            (KeyState.ACTIVE, "installed"),
            (KeyState.DEACTIVATED, "replaced"),
            (KeyState.COMPROMISED, "compromise reported"),
        ):
            seq += 1
            connection.execute(
                "INSERT INTO event VALUES (?, ?, ?, ?, ?, 'why', ?)",
                (seq, keys[state].key_id, seq, event, state, f"message {seq}"),
            )
        connection.execute("INSERT INTO rejection VALUES (3, 'id', 'reason', 'message', 4)")
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", [("running", "99"), ("mqtt_client_id", "stationkey-1")]
        )
    return keys


def test_a_database_of_version_2_is_brought_up_to_date_with_all_that_is_in_it(path: Path) -> None:
    keys = make_version_2(path)

    with closing(Ledger(path)) as ledger:
        records = ledger.keys.all()
        assert [(key.key_id, key.state) for key in records] == [(key.key_id, state) for state, key in keys.items()]
        assert [ledger.keys.ref(key.key_id) for key in keys.values()] == [*list(keys.values())[:-1], None]
        assert [key.due for key in records] == [0, None, 2, None, None]
        assert [key.failed for key in records] == [True, False, False, False, False]
        assert [key.chain for key in records] == [None, "chain", "chain", None, "chain"]
        assert [key.not_after for key in records] == [None, 9, 9, None, 9]
        assert [key.request_ids for key in records] == [(f"ID-{number}",) for number in range(5)]
        assert [key.asked for key in records] == [1, 2, 3, 4, 5]
        assert [key.installed for key in records] == [0, 9, 8, 0, 6]
        assert {(key.owner, key.created_at >= 0, key.common_name) for key in records} == {((V2G, E1), True, "CN")}
        assert [(event.seq, event.event, event.message_id) for event in ledger.keys.history(records[2].key_id)] == [
            (3, "CSR answered", "ID"),
            (8, "installed", "message 8"),
            (10, "replaced", "message 10"),
        ]
        assert [answered.request_id for answered in ledger.answers.undelivered()] == ["ID-0"]
        assert ledger.answers.find("id-4") is not None
        assert ledger.transitions.seen("message 8")
        assert not ledger.transitions.seen("ID")
        assert (ledger.retention.running, ledger.client_id()) == (99, "stationkey-1")
        assert ledger.keys.others_installed(ledger.keys.all(keys[KeyState.ACTIVE].key_id)[0])
        assert "INSERT INTO \"rejection\" VALUES(3,'id','reason','message',4);" in dump(path)
        bring(ledger, records[0].key_id, KeyEvent.EXPIRED)
        assert ledger.retention.forget(keep=1, answered_before=0) == 1
        assert [key.key_id for key in on_record(ledger)] == [key.key_id for key in records[:-1]]


def leave_pieces_in_version_2(path: Path) -> list[KeyRef]:
    """Fill a database of version 2 with keys, and destroy some as it did: a piece of one is left."""
    make_version_2(path)
    chance = random.Random(27)  # with which SQLite 3.40 leaves one
    live: list[KeyRef] = []
    gone: list[KeyRef] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("PRAGMA synchronous=OFF")
        for _ in range(600):
            if chance.random() < 0.6 or not live:
                key = a_marked_key(chance)
                live.append(key)
                connection.execute(
                    "INSERT INTO key (key_id, scheme, key_type, certificate_type, algorithm, common_name,"
                    " organization_name, country_name, state, created_at, public, private)"
                    " VALUES (?, 'software', 'secp256r1', ?, '', '', '', '', 'pre-activation', 0, ?, ?)",
                    (key.key_id, V2G, key.public, key.private),
                )
                connection.execute(
                    "INSERT INTO event (key_id, at, event, state, reason) VALUES (?, 0, 'CSR answered', '', '')",
                    (key.key_id,),
                )
            elif chance.random() < 0.5:
                key = chance.choice(live)
                connection.execute(
                    "UPDATE key SET chain = ? WHERE key_id = ?", ("z" * chance.randint(500, 6000), key.key_id)
                )
            else:
                gone.append(live.pop(chance.randrange(len(live))))
                connection.execute(
                    "UPDATE key SET private = NULL, state = 'destroyed' WHERE key_id = ?", (gone[-1].key_id,)
                )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return gone


def test_the_migration_leaves_no_trace_of_what_is_no_longer_on_record(path: Path) -> None:
    gone = leave_pieces_in_version_2(path)
    assert traces(path, gone) > 0

    with closing(Ledger(path)) as ledger:
        assert traces(path, gone) == 0
        usable = [ledger.keys.ref(key.key_id) for key in ledger.keys.usable()]
        for key in ledger.keys.usable():
            bring(ledger, key.key_id, KeyEvent.DESTRUCTION_ORDERED)
        ledger.retention.wipe()

        assert traces(path, [key for key in usable if key is not None]) == 0


def test_a_migration_that_ends_before_the_database_is_written_anew_is_made_good_by_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = leave_pieces_in_version_2(path)
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.database._REWRITE", "SELECT * FROM power_is_lost_here")
        with pytest.raises(LedgerError):
            Ledger(path)
    assert _schema(path)[0] == (SCHEMA_VERSION,)

    Ledger(path).close()

    assert traces(path, gone) == 0
    assert _schema(path)[1] == (2,)


@pytest.mark.parametrize("at", range(1, MIGRATIONS[2].count(";\n") + 1))
def test_the_migration_of_version_2_is_done_whole_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    keys = make_version_2(path)
    before = dump(path)
    statements = MIGRATIONS[2].split(";\n")
    broken = ";\n".join([*statements[:at], "SELECT * FROM power_is_lost_here"])
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.database.MIGRATIONS", (*MIGRATIONS[:2], broken))
        with pytest.raises(LedgerError):
            Ledger(path)
    assert dump(path) == before

    with closing(Ledger(path)) as ledger:
        assert {key.state: key.key_id for key in on_record(ledger)} == {
            state: key.key_id for state, key in keys.items()
        }


def _content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.glob("ledger.sqlite3*") if file.suffix != "-shm"}


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
@pytest.mark.parametrize("crashed", [False, True], ids=["closed in order", "with a log left by a crash"])
def test_a_newer_database_is_refused_in_words_and_not_a_byte_of_it_changed(
    tmp_path: Path, path: Path, read_only: bool, crashed: bool
) -> None:
    original = tmp_path / "newer" / path.name
    original.parent.mkdir()
    Ledger(original).close()
    with closing(sqlite3.connect(original, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        connection.execute("CREATE TABLE something_new (x)")
        left = ("", "-wal") if crashed else ()
        for suffix in left:
            Path(f"{path}{suffix}").write_bytes(Path(f"{original}{suffix}").read_bytes())
    if not crashed:
        path.write_bytes(original.read_bytes())
    before = {name: content for name, content in _content(path).items() if not name.endswith("-shm")}

    with pytest.raises(LedgerError) as refusal:
        Ledger(path, read_only=read_only)

    assert refusal.value.reason == "ledger_newer"
    assert f"version {SCHEMA_VERSION + 1}" in str(refusal.value)
    after = {name: content for name, content in _content(path).items() if content and not name.endswith("-shm")}
    assert after == before


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
def test_a_command_does_not_migrate_under_a_daemon_of_the_older_version(path: Path, read_only: bool) -> None:
    make_version_1(path, a_key())
    before = path.read_bytes()

    with pytest.raises(LedgerError) as refusal:
        Ledger(path, read_only=read_only, make=False)

    assert refusal.value.reason == "ledger_older"
    assert "start this version's daemon once" in str(refusal.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
@pytest.mark.parametrize("name", ["none.sqlite3", "no folder/ledger.sqlite3", "x" * 300])
def test_a_ledger_that_is_not_there_is_told_in_words_and_not_made(tmp_path: Path, name: str, read_only: bool) -> None:
    with pytest.raises(LedgerError) as refusal:
        Ledger(tmp_path / name, read_only=read_only, make=False)

    assert refusal.value.reason in {"ledger_missing", "ledger_unusable"}
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_database_is_refused_and_not_a_byte_of_it_changed(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        for _ in range(50):
            answer(ledger, bounds=Bounds(pending_limit=100))
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 4] = b"\xa5" * 4096
    path.write_bytes(content)

    with pytest.raises(LedgerError) as refusal:
        Ledger(path)

    assert refusal.value.reason == "ledger_damaged"
    assert path.read_bytes() == bytes(content)


def damage_the_history(path: Path) -> None:
    """Overwrite a page of the table `event`, which holds nothing that is needed to open a ledger."""
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'event'").fetchone()
    content = bytearray(path.read_bytes())
    content[4096 * (page - 1) : 4096 * page] = b"\xa5" * 4096
    path.write_bytes(content)


def test_a_large_database_is_checked_whole_only_after_an_end_that_was_not_in_order(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationkey.ledger.database._CHECKED_WHOLE", 5)
    with closing(Ledger(path)) as ledger:
        key_id = answer(ledger)
    damage_the_history(path)

    with closing(Ledger(path)) as ledger:
        assert ledger.keys.ref(key_id) is not None
        with pytest.raises(LedgerError) as met:
            ledger.keys.history(key_id)
        assert met.value.reason == "ledger_damaged"

    Path(f"{path}-wal").touch()
    with pytest.raises(LedgerError) as refusal:
        Ledger(path)
    assert refusal.value.reason == "ledger_damaged"


def test_a_small_database_is_always_checked_whole(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        answer(ledger)
    damage_the_history(path)

    with pytest.raises(LedgerError) as refusal:
        Ledger(path)

    assert refusal.value.reason == "ledger_damaged"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content, _: b"garbage" * 3 + content[21:], id="the header"),
        pytest.param(lambda content, _: content[: len(content) // 2], id="the length"),
        pytest.param(
            lambda content, page: content[: 4096 * (page - 1)] + bytes(4096) + content[4096 * page :],
            id="the private parts",
        ),
    ],
)
def test_a_large_database_that_is_damaged_where_it_matters_most_is_refused_always(
    path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes, int], bytes]
) -> None:
    monkeypatch.setattr("stationkey.ledger.database._CHECKED_WHOLE", 5)
    with closing(Ledger(path)) as ledger:
        answer(ledger)
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'secret'").fetchone()
    path.write_bytes(damage(path.read_bytes(), page))

    with pytest.raises(LedgerError) as refusal:
        Ledger(path)

    assert refusal.value.reason == "ledger_damaged"


# Repeats.


def test_a_message_counts_as_a_repeat_once_it_has_brought_an_event(ledger: Ledger) -> None:
    message_id = new_id()
    asked = request()
    key_id = answer(ledger, asked)
    assert not ledger.transitions.seen(message_id)
    assert not ledger.transitions.seen(asked.id)

    ledger.transitions.apply(key_id, KeyEvent.INSTALLED, reason="", now=0, message_id=message_id)

    assert ledger.transitions.seen(message_id)


@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        pytest.param("journal_mode", "wal", id="readers do not wait for writers"),
        pytest.param("synchronous", 2, id="a commit survives a loss of power"),
        pytest.param("secure_delete", 1, id="what is deleted is zeroed"),
        pytest.param("auto_vacuum", 2, id="the file can become smaller"),
        pytest.param("temp_store", 2, id="no copy goes to a temporary file"),
        pytest.param("foreign_keys", 1, id="no answer without its key"),
    ],
)
def test_the_promises_of_sqlite_are_asked_for(ledger: Ledger, pragma: str, value: object) -> None:
    assert ledger.database._connection.execute(f"PRAGMA {pragma}").fetchone() == (value,)  # noqa: SLF001 - of this connection
