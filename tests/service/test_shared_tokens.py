"""A request to a daemon of a site whose key is in the site's token: on a real PostgreSQL and SoftHSM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
from asker import until
from depots import open_engine, take
from postgresql import Database
from softhsm import Token

from parts import request
from stationkey.config.file import read_table, settle
from stationkey.errors import LedgerError
from stationkey.keystore.pkcs11 import errors, keys
from stationkey.keystore.stores import checked_stores
from stationkey.keystore.worker import Turn, on_keystore
from stationkey.ledger import Ledger
from stationkey.ledger.answers import Answers
from stationkey.ledger.postgresql.connection import connect
from stationkey.ledger.postgresql.inventory import SiteInventory
from stationkey.service.requests import StationKeyService
from stationkey.service.strays import Strays

pytest_plugins = ["depots"]

ROOM = 3
"""Pending keys in the token."""


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Token]:
    made = Token.make("shared", tmp_path)
    yield made
    made.remove()


@pytest.fixture
async def service(depot: Database, token: Token, tmp_path: Path) -> AsyncIterator[StationKeyService]:
    depot.admin(
        "INSERT INTO daemon (instance, name, host, pid, version, schema, shards, lease, backend)"
        " VALUES ('here', '', '', 0, '', 1, 1, 86400, 0)"
    )
    inventory = SiteInventory(lambda: connect(depot.uri, depot.password, name="inventory"), "here")
    table: dict[str, object] = {
        "keystore": token.uri,
        "state_dir": str(tmp_path),
        "site": {"stations": "depot7/+"},
        "lifecycle": {"pending_in": {"default": ROOM}},
    }
    settings = settle(read_table(table, source="here"))
    stores = checked_stores(settings, site=inventory)()
    with closing(inventory), closing(Ledger.on(open_engine(depot, tmp_path, shard=take(depot)))) as ledger:
        made = StationKeyService(stores, ledger, terms=settings.lifecycle)
        try:
            yield made
        finally:
            await made.aclose()
            await asyncio.to_thread(stores.close)


def full(*_: Any, **__: Any) -> NoReturn:
    raise errors.full(8)


def lost(*_: Any, **__: Any) -> NoReturn:
    raise LedgerError("the connection was lost", reason="commit_unknown", transient=True)


async def test_a_key_that_the_ledger_did_not_record_is_destroyed_in_the_token_at_once(
    service: StationKeyService, token: Token, depot: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "record", lost)
    answer = await service.answer(request(), station="depot7/s1")
    assert answer.data.status == "rejected"
    await asyncio.to_thread(until, lambda: not token.objects(), "the key is destroyed")
    assert depot.admin("SELECT 1 FROM token_key WHERE ended IS NOT NULL") == []


async def test_a_key_that_the_ledger_recorded_after_all_stays_in_the_token(
    service: StationKeyService, token: Token, depot: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit was carried out, and its confirmation and the look for it were lost."""
    record = Answers.record

    def carried_out(*arguments: Any, **others: Any) -> NoReturn:
        record(*arguments, **others)
        lost()

    monkeypatch.setattr(Answers, "record", carried_out)
    asked = request()
    with monkeypatch.context() as cut:
        cut.setattr(Answers, "find", lost)
        service._knows_ids = True  # noqa: SLF001 - so that only the second look is lost
        assert (await service.answer(asked, station="depot7/s1")).data.status == "rejected"
    [store] = service.custody.keystores
    await on_keystore(store.thread, lambda _: None, timeout=30.0, turn=Turn.SPARE)  # after the destruction
    assert len(token.objects()) == 2
    assert (await service.answer(asked, station="depot7/s1")).data.status == "accepted"
    assert depot.admin("SELECT count(*) FROM secret") == [(1,)]


async def test_a_token_has_no_more_pending_keys_than_it_has_room_for_whoever_asks(
    service: StationKeyService, token: Token, depot: Database
) -> None:
    for number in range(5):
        await service.answer(request(evse_id=f"DE*ABC*E{number}"), station="depot7/flood")
    await service.answer(request(), station="depot7/s1")

    depot.admin("UPDATE token_key SET look = now()")  # as after a minute
    [store] = service.custody.keystores
    await Strays(None, store).sweep()
    assert depot.admin("SELECT station FROM key WHERE state = 'pre-activation' ORDER BY station") == [
        *[("depot7/flood",)] * (ROOM - 1),
        ("depot7/s1",),
    ]
    assert len(token.objects()) == 2 * ROOM


async def test_a_full_token_costs_no_key_and_the_request_is_rejected(
    service: StationKeyService, token: Token, depot: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.answer(request(), station="depot7/s1")
    monkeypatch.setattr(keys, "generate", full)
    asked = request()
    assert (await service.answer(asked, station="depot7/s2")).data.status == "rejected"
    monkeypatch.undo()

    assert depot.admin("SELECT station FROM key WHERE state = 'pre-activation'") == [("depot7/s1",)]
    assert (await service.answer(asked, station="depot7/s2")).data.status == "accepted"
    assert len(token.objects()) == 4
