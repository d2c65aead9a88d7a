"""The last hint of each key: kept over restarts, gone with the key, and no hint at all if it cannot be read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from parts import E1, E2, V2G, sqlite_of, station
from stationkey.errors import LedgerError
from stationkey.ledger import Ledger
from stationkey.ledger.hints import Hint
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.system.state_dir import DATABASE_NAME

HINT = Hint(not_after=1_800_000_000, expired=False, count=3, running=86_400_000)


async def test_hints_survive_a_restart_and_go_with_their_key(tmp_path: Path) -> None:
    async with station(tmp_path / "state") as opened:
        first, second = await opened.key(V2G, E1), await opened.key(V2G, E2)
        for key_id in (first, second):
            opened.ledger.hints.write(key_id, HINT)
    with closing(Ledger(tmp_path / "state" / DATABASE_NAME)) as ledger:
        assert ledger.hints.all() == {first: HINT, second: HINT}
        ledger.transitions.apply(first, KeyEvent.DESTRUCTION_ORDERED, reason="a test", now=0)
        ledger.hints.write(second, HINT)
        assert ledger.hints.all() == {second: HINT}


@pytest.mark.parametrize("value", ["", "{}", "[]", '{"not_after": "x"}', "\x00", "9" * 5000])
async def test_a_damaged_hint_is_no_reason_to_give_it_again(tmp_path: Path, value: str) -> None:
    async with station(tmp_path / "state") as opened:
        key_id = await opened.key(V2G, E1)
        opened.ledger.hints.write(key_id, HINT)
        sqlite_of(opened.ledger)._connection.execute(  # noqa: SLF001 - the fault is injected here
            "UPDATE key SET hint = ?", (value,)
        )
        with pytest.raises(LedgerError) as damaged:
            opened.ledger.hints.all()
        assert damaged.value.reason == "ledger_damaged"
