"""Faults that are planted to see that the simulation finds them.

Each is a mistake that could be made, patched into the parts while it runs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from unittest import mock

from msgspec.structs import replace

from stationkey.ledger import answers, database, lifecycle, transitions
from stationkey.ledger.answers import Answers
from stationkey.ledger.database import Database
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.ledger.retention import Retention
from stationkey.ledger.transitions import Transitions
from stationkey.mqtt.gateway import MqttEdge
from stationkey.service.active_files import ActiveDirectory
from stationkey.service.in_flight import InFlight
from stationkey.service.josev_files import JosevFiles, Snapshot, read_directory
from stationkey.service.pool import KeyPool
from stationkey.service.requests import StationKeyService
from stationkey.service.running_time import RunningTime
from stationkey.service.statuses import Statuses, _Line
from stationkey.system import files
from stationkey.x509.csr import to_pem

Patch = AbstractContextManager[Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A planted fault.

    Attributes:
        words: what is wrong.
        patches: makes the patches.
    """

    words: str
    patches: Callable[[], list[Patch]]


def _method(owner: type, name: str, made: Callable[[Any], Any]) -> Callable[[], list[Patch]]:
    """Put what `made` makes of a method in its place."""
    original = getattr(owner, name)
    return lambda: [mock.patch.object(owner, name, wraps(original)(made(original)))]


def _pragma(before: str, after: str) -> Patch:
    changed = tuple(after if pragma == before else pragma for pragma in database._CONNECTION)  # noqa: SLF001 - to spoil it
    assert changed != database._CONNECTION, f"no {before} to spoil"  # noqa: SLF001 - as above
    return mock.patch.object(database, "_CONNECTION", changed)


def _statement(module: Any, name: str, before: str, after: str) -> Patch:
    text = getattr(module, name)
    assert before in text, f"no {before!r} to spoil"
    return mock.patch.object(module, name, text.replace(before, after))


def _publish_first(record: Any) -> Any:
    async def later(self: StationKeyService, request: Any, key: Any, csr: Any, *, ahead: bool) -> str:
        async def commit() -> None:
            await asyncio.sleep(0.1)
            await record(self, request, key, csr, ahead=ahead)

        self._late = asyncio.ensure_future(commit())  # type: ignore[attr-defined] # kept, so that it is done
        return to_pem(csr)

    return later


def _acknowledge_first(respond: Any) -> Any:
    async def early(self: MqttEdge, in_hand: Any) -> Any:
        in_hand.message.acknowledge()
        return await respond(self, in_hand)

    return early


def _out_of_order(_: Any) -> Any:
    async def at_once(self: Statuses, status: Any, *, station: str = "") -> None:
        try:
            await self._settle(status, station, _Line())
        except Exception as error:  # noqa: BLE001 - as the original
            self.refuse(status, error)  # type: ignore[arg-type] # as the original

    return at_once


def _not_taken(_: Any) -> Any:
    def look(self: KeyPool, algorithm: Any) -> Any:
        ready = self._ready.get(self._kinds.get(algorithm))  # type: ignore[arg-type] # None for none
        return ready[0] if ready else None

    return look


def _second_look(complete: Any) -> Any:
    async def again(self: JosevFiles, chain: Any, look: Any) -> Any:
        await asyncio.sleep(0)
        seen = read_directory(self._certificate_dir) if self._certificate_dir else None
        others = [] if seen is None else [one for one in seen.chains.values() if one.path == chain.path]
        return await complete(self, others[0] if others else chain, look)

    return again


def _grace_for_active(activate: Any) -> Any:
    def spoiled(self: Transitions, key_id: str, *, grace_due: int, **others: Any) -> Any:
        replaced = activate(self, key_id, grace_due=grace_due, **others)
        with self._engine.transaction() as sql:
            sql.execute("UPDATE key SET due = ? WHERE key_id = ?", (grace_due, key_id))
        return replaced

    return spoiled


def _active_expires() -> Patch:
    table: Mapping[Any, KeyState] = {**lifecycle.TRANSITIONS, (KeyState.ACTIVE, KeyEvent.EXPIRED): KeyState.DESTROYED}
    return mock.patch.object(lifecycle, "TRANSITIONS", MappingProxyType(table))


def _no_turns(_: Any) -> Any:
    @asynccontextmanager
    async def turn(_self: InFlight, _request: Any) -> Any:
        yield

    return turn


def _not_on_record(_: Any) -> Any:
    async def find(_self: StationKeyService, _request_id: str) -> None:
        await asyncio.sleep(0)

    return find


def _record_anew(record: Any) -> Any:
    def spoiled(self: Answers, request: Any, *arguments: Any, **others: Any) -> Any:
        with self._engine.transaction() as sql:
            sql.execute("DELETE FROM answer WHERE canonical_id = ?", (request.id.lower(),))
        return record(self, request, *arguments, **others)

    return spoiled


def _two_commits(record: Any) -> Any:
    def spoiled(
        self: Answers, request: Any, key: Any, csr: str, *, now: int, due: int, ahead: bool, **others: Any
    ) -> Any:
        with self._engine.transaction() as sql:
            given = transitions.give_owner(sql, request, key, station="", now=now, due=due, ahead=ahead)
        with mock.patch.object(answers, "give_owner", return_value=given):
            return record(self, request, key, csr, now=now, due=due, ahead=ahead, **others)

    return spoiled


def _no_rollback(_: Any) -> Any:
    @contextmanager
    def transaction(self: Database, act: str = "written") -> Iterator[Any]:
        with self._explained(act):
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._sql
            while self._deferred:
                self._connection.execute(*self._deferred.popleft())
            self._connection.execute("COMMIT")

    return transaction


def _one_more(make_room: Any) -> Patch:
    def spoiled(sql: Any, owner: Any, bounds: Any, *, now: int) -> Any:
        return make_room(sql, owner, replace(bounds, pending_limit=bounds.pending_limit + 1), now=now)

    return mock.patch.object(answers, "_make_room", spoiled)


def _unsynced(path: Path, content: bytes) -> Path:
    unfinished = path.with_name(path.name + files.UNFINISHED)
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return unfinished


def _begins_anew(init: Any) -> Any:
    def spoiled(self: RunningTime, _so_far: int, *arguments: Any) -> None:
        init(self, 0, *arguments)

    return spoiled


def _by_the_wall(init: Any) -> Any:
    def spoiled(self: RunningTime, so_far: int) -> None:
        init(self, so_far, time.time)

    return spoiled


def _plain_running(_: Any) -> Any:
    def write(self: Retention, milliseconds: int) -> None:
        with self._engine.transaction() as sql:
            sql.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('running', ?)", (str(milliseconds),))

    return write


def _all_due(_: Any) -> Any:
    def due(self: Retention, _running: int) -> list[str]:
        with self._engine.reading() as sql:
            return [
                row[0] for row in sql.execute("SELECT key_id FROM key WHERE due IS NOT NULL AND state = 'deactivated'")
            ]

    return due


def _keeps_files(sync: Any) -> Any:
    def spoiled(self: ActiveDirectory, wanted: Any) -> Any:
        def more() -> dict[str, bytes]:
            there = {path.name: path.read_bytes() for path in self.path.glob("*.pem")}
            return {**there, **wanted()}

        return sync(self, more)

    return spoiled


def _gives_up(settle: Any) -> Any:
    async def spoiled(self: Statuses, status: Any, about: Any) -> None:
        try:
            async with asyncio.timeout(5.0):
                await settle(self, status, about)
        except TimeoutError:
            pass

    return spoiled


MUTANTS: Final[dict[str, Mutant]] = {
    "publish-before-commit": Mutant(
        "the answer is published before it is committed", _method(StationKeyService, "_record", _publish_first)
    ),
    "acknowledge-early": Mutant(
        "a message is acknowledged before it is answered", _method(MqttEdge, "_respond", _acknowledge_first)
    ),
    "no-fsync": Mutant(
        "a commit is not synced (`synchronous=NORMAL`)",
        lambda: [_pragma("PRAGMA synchronous=FULL", "PRAGMA synchronous=NORMAL")],
    ),
    "status-order": Mutant("statuses do not wait for each other", _method(Statuses, "note_status", _out_of_order)),
    "status-twice": Mutant(
        "a status that comes again is done again",
        _method(Transitions, "seen", lambda _: lambda _self, _message_id: False),
    ),
    "status-given-up": Mutant(
        "a status is given up after 5 s, and acknowledged", _method(Statuses, "_settle", _gives_up)
    ),
    "pool-key-twice": Mutant(
        "a key made ahead is given to two requests",
        lambda: [
            *_method(KeyPool, "take", _not_taken)(),
            _statement(transitions, "_NEW_OWNER", " AND certificate_type = ''", ""),
        ],
    ),
    "second-look": Mutant(
        "the certificate is read once more after it was matched", _method(JosevFiles, "complete", _second_look)
    ),
    "grace-of-active": Mutant(
        "the grace period is that of the new key, and ends it",
        lambda: [*_method(Transitions, "activate", _grace_for_active)(), _active_expires()],
    ),
    "grace-ignored": Mutant(
        "replaced keys are destroyed at once",
        lambda: [*_method(Retention, "due", _all_due)(), *_method(Retention, "is_due", lambda _: lambda *_: True)()],
    ),
    "id-twice": Mutant(
        "two copies of a request are both served",
        lambda: [
            *_method(InFlight, "turn", _no_turns)(),
            *_method(StationKeyService, "_on_record", _not_on_record)(),
            *_method(Answers, "record", _record_anew)(),
        ],
    ),
    "no-expiry": Mutant("keys are not destroyed at their time", _method(Retention, "due", lambda _: lambda *_: [])),
    "two-commits": Mutant("key and answer are committed one after the other", _method(Answers, "record", _two_commits)),
    "no-rollback": Mutant(
        "a transaction that failed is not rolled back", _method(Database, "transaction", _no_rollback)
    ),
    "pending-bound": Mutant("one pending key more than may be", lambda: [_one_more(answers._make_room)]),  # noqa: SLF001 - to spoil it
    "secret-kept": Mutant(
        "deleted private parts are not overwritten",
        lambda: [
            _pragma("PRAGMA secure_delete=ON", "PRAGMA secure_delete=OFF"),
            *_method(Retention, "wipe", lambda _: lambda _self: False)(),
        ],
    ),
    "log-kept": Mutant(
        "the write-ahead log is not emptied after a destruction",
        _method(Database, "checkpoint", lambda _: lambda _self: True),
    ),
    "rename-not-durable": Mutant(
        "the names in active/ are not synced", lambda: [mock.patch.object(files, "sync_directory", return_value=None)]
    ),
    "file-not-durable": Mutant(
        "a file in active/ is renamed before it is synced", lambda: [mock.patch.object(files, "_write", _unsynced)]
    ),
    "active-kept": Mutant("files of destroyed keys stay in active/", _method(ActiveDirectory, "sync", _keeps_files)),
    "running-time-lost": Mutant(
        "the running time restarts with each run",
        lambda: [
            *_method(RunningTime, "__init__", _begins_anew)(),
            *_method(Retention, "write_running", _plain_running)(),
        ],
    ),
    "wall-clock": Mutant("time is taken from the clock on the wall", _method(RunningTime, "__init__", _by_the_wall)),
    "guess": Mutant(
        "a certificate that cannot be read is taken for one that is gone",
        _method(Snapshot, "doubt", lambda _: lambda _self, _public: None),
    ),
    "hands": Mutant(
        "more messages are taken in hand than may be",
        _method(MqttEdge, "__init__", lambda init: lambda self, *a, queue, **k: init(self, *a, queue=queue + 1, **k)),
    ),
}
"""Name to fault."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant a fault."""
    with ExitStack() as stack:
        for patch in MUTANTS[name].patches():
            stack.enter_context(patch)
        yield
