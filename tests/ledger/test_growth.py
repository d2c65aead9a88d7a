"""The cost of each operation with a long history."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from depots import open_engine, take
from plans import through_whole_tables
from postgresql import Database
from recording import (
    ahead,
    answer,
    bring,
    stock_of,
)

from parts import E1, V2G, new_id, request, sqlite_of
from stationkey.config.settings import Bounds
from stationkey.ledger import Ledger
from stationkey.ledger.hints import Hint
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.overview import look

pytest_plugins = ["ledgers", "depots"]

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
            key_id, chain="c", not_after=0, reason="", now=0, grace_due=5000, useful_until=5000, message_id=new_id()
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


def _hinted(ledger: Ledger, key_id: str) -> None:
    ledger.hints.write(key_id, Hint(1, expired=False, count=1, running=1))
    assert len(ledger.hints.all()) == 1


OPERATIONS: dict[str, Callable[[Ledger, str], object]] = {
    "find_answer": lambda ledger, _: ledger.answers.find(ASKED),
    "record_answer": lambda ledger, _: answer(ledger, request(*OWNER, request_id=ASKED)),
    "record_answer that makes room": lambda ledger, _: answer(
        ledger, request(*OWNER), bounds=Bounds(pending_limit=3, pending_total=2)
    ),
    "record_answer that makes room in a token": lambda ledger, _: answer(
        ledger, request(*OWNER), bounds=Bounds(pending_of_shard=1)
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
    "overview": lambda ledger, _: look(ledger.database, keys=8, happenings=20),
    "hints": _hinted,
    "expiring": lambda ledger, _: ledger.keys.expiring(until=10, limit=5),
    "is_due": lambda ledger, key_id: ledger.retention.is_due(key_id, 0),
    "due": lambda ledger, _: ledger.retention.due(10),
    "crowd_out": lambda ledger, _: ledger.retention.crowd_out(5),
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
        useful_until=0,
        message_id=INSTALLED,
    ),
    "destruction": lambda ledger, key_id: ledger.transitions.apply(key_id, KeyEvent.DELETED, reason="", now=0),
    "destruction and wipe": _destroyed_and_wiped,
    "forget, nothing": lambda ledger, _: ledger.retention.forget(keep=10**6, answered_before=0),
    "forget, a batch of keys": lambda ledger, _: ledger.retention.forget(keep=5, answered_before=0),
    "forget, a batch of answers": lambda ledger, _: ledger.retention.forget(keep=10**6, answered_before=1),
}
"""All that is done with a ledger while requests wait, but for listing it."""


@dataclass(frozen=True)
class Filled:
    """A ledger with a history, and the name of its active key."""

    path: Path
    active: str

    @classmethod
    def make(cls, path: Path, fill: Callable[[Ledger], str]) -> Filled:
        with closing(Ledger(path)) as ledger:
            sqlite_of(ledger)._connection.execute("PRAGMA synchronous=OFF")  # noqa: SLF001 - no power is lost
            return cls(path, fill(ledger))

    def steps(self, folder: Path, operation: str) -> int:
        """How many instructions of SQLite's virtual machine an operation takes in a copy; the same on every machine."""
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        with closing(Ledger(Path(shutil.copy(self.path, folder)))) as ledger:
            connection = sqlite_of(ledger)._connection  # noqa: SLF001 - what it is given to do is the point
            connection.execute("PRAGMA synchronous=OFF")
            connection.set_progress_handler(count, 1)
            OPERATIONS[operation](ledger, self.active)
            connection.set_progress_handler(None, 0)
        return steps


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> list[Filled]:
    """A ledger with a short history, and one with a long one."""
    folder = tmp_path_factory.mktemp("histories")
    return [Filled.make(folder / f"{count}.sqlite3", partial(with_history, destroyed=count)) for count in (40, 400)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_done_while_requests_wait_costs_no_more_with_a_long_history(
    histories: list[Filled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr("stationkey.ledger.retention._BATCH", 10)
    short, long = (filled.steps(tmp_path, operation) for filled in histories)

    assert short > 10
    assert abs(long - short) <= 20


OF_ALL_STATIONS = frozenset(
    {
        *(
            "undelivered",
            "usable",
            "expiring",
            "active_files",
            "figures",
            "overview",
            "due",
            "next_due",
            "adopt",
            "crowd_out",
            "record_answer that makes room in a token",
        ),
        *("forget, nothing", "forget, a batch of keys", "forget, a batch of answers", "destruction and wipe"),
    }
)
"""Operations that look at the keys of every station, once a minute or when asked for."""


def with_stations(ledger: Ledger, count: int) -> str:
    """Fill a ledger with keys of other stations, and those of one; the name of its active one."""
    for station in range(count):
        for _ in range(2):
            key_id = answer(ledger, request(*OWNER), station=f"depot/{station:03}")
        bring(ledger, key_id, KeyEvent.INSTALLED)
    return with_history(ledger, 10)


@pytest.fixture(scope="module")
def depots(tmp_path_factory: pytest.TempPathFactory) -> list[Filled]:
    """A ledger with a few stations, and one with many."""
    folder = tmp_path_factory.mktemp("depots")
    return [Filled.make(folder / f"{count}.sqlite3", partial(with_stations, count=count)) for count in (10, 100)]


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - OF_ALL_STATIONS))
def test_what_is_done_for_one_station_costs_no_more_with_many_stations(
    depots: list[Filled], tmp_path: Path, operation: str
) -> None:
    few, many = (filled.steps(tmp_path, operation) for filled in depots)

    assert few > 10
    assert abs(many - few) <= 20


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_query_goes_through_a_table_that_grows(fast_ledger: Ledger, operation: str) -> None:
    active = with_history(fast_ledger, 3)
    statements: list[str] = []
    connection = sqlite_of(fast_ledger)._connection  # noqa: SLF001 - what it is given to do is the point
    connection.set_trace_callback(statements.append)
    OPERATIONS[operation](fast_ledger, active)
    connection.set_trace_callback(None)

    queries = [text for text in statements if re.match("SELECT|INSERT|UPDATE|DELETE", text)]
    plans = [row[3] for text in queries for row in connection.execute(f"EXPLAIN QUERY PLAN {text}")]
    assert queries
    through_all = [plan for plan in plans if re.match(r"SCAN (key|answer|event)\b", plan)]
    assert {plan.partition(" INDEX ")[2] for plan in through_all} <= {"key_living", "key_hint"}


NOT_ON_POSTGRESQL = frozenset({"usable", "overview", "figures", "active_files", "destruction and wipe"})
"""Operations that read all living keys of a shard, at a start or when a person asks for them; and SQLite's own."""


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - NOT_ON_POSTGRESQL))
def test_no_query_goes_through_a_table_that_grows_on_postgresql(
    depot: Database, tmp_path: Path, operation: str
) -> None:
    with closing(Ledger.on(open_engine(depot, tmp_path, shard=take(depot, 0, 1)))) as ledger:
        active = with_history(ledger, 3)
        with through_whole_tables() as found:
            OPERATIONS[operation](ledger, active)

    assert found == []


def test_such_a_query_would_be_found(depot: Database, tmp_path: Path) -> None:
    engine = open_engine(depot, tmp_path)
    with closing(engine), engine.reading() as sql, through_whole_tables() as found:
        sql.execute("SELECT count(*) FROM event WHERE reason = ?", ("none",))
        sql.execute("SELECT max(csr) FROM answer")

    assert len(found) == 2


@pytest.mark.parametrize("bounds", [Bounds(), Bounds(pending_total=1000)], ids=["one key ends for each", "none ends"])
def test_an_answer_writes_at_most_32_kib_to_the_log(fast_ledger: Ledger, path: Path, bounds: Bounds) -> None:
    log = Path(f"{path}-wal")
    for number in range(400):
        if number == 300:
            fast_ledger.database.checkpoint()
        asked = request(V2G, f"DE*ABC*E{number % 200}")
        answer(fast_ledger, asked, running=number, bounds=bounds)
        fast_ledger.answers.mark_delivered(asked.id)

    assert 0 < log.stat().st_size <= 100 * 32 * 1024


def test_an_answer_takes_no_more_steps_where_a_thousand_keys_are_pending(fast_ledger: Ledger) -> None:
    steps = Counter[int]()
    connection = sqlite_of(fast_ledger)._connection  # noqa: SLF001 - what SQLite does is the point
    bounds = Bounds(pending_total=10_000)
    for number in range(1000):
        connection.set_progress_handler(partial(steps.update, [number]), 1)
        answer(fast_ledger, request(V2G, f"DE*ABC*E{number % 200}"), bounds=bounds)

    assert max(steps[number] for number in range(990, 1000)) < 2 * steps[10]
