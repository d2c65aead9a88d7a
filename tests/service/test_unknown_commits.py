"""An answer of which it is not known whether it was committed: PostgreSQL's connection was lost at that moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parts import request, station
from stationkey.errors import LedgerError
from stationkey.ledger.answers import Answers, Crowded


async def test_it_is_recorded_again_if_it_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, lost = Answers.record, iter([True])

    def lost_once(*arguments: Any, **others: Any) -> list[Crowded]:
        if next(lost, False):
            raise LedgerError("the connection was lost", reason="commit_unknown", transient=True)
        return record(*arguments, **others)

    monkeypatch.setattr(Answers, "record", lost_once)
    asked = request()
    async with station(tmp_path / "state") as here:
        first = await here.service.answer(asked, station="depot7/s1")
        assert first.data.status == "accepted"
        assert await here.service.answer(asked, station="depot7/s1") == first


@pytest.mark.parametrize("name", ["", "depot7/s1"])
@pytest.mark.parametrize("committed", [True, False])
async def test_it_is_looked_up_before_the_request_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, committed: bool, name: str
) -> None:
    record = Answers.record

    def lost(*arguments: Any, **others: Any) -> None:
        if committed:
            record(*arguments, **others)
        raise LedgerError("the connection was lost", reason="commit_unknown", transient=True)

    asked = request()
    async with station(tmp_path / "state") as here:
        with monkeypatch.context() as cut:
            cut.setattr(Answers, "record", lost)
            first = await here.service.answer(asked, station=name)
        assert (first.data.status == "accepted") is committed
        again = await here.service.answer(asked, station=name)
        assert again.data.status == "accepted"
        assert (again == first) is committed
