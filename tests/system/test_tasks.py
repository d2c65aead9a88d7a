"""A task that fails is logged, counted, and runs again; the others do not notice."""

from __future__ import annotations

import asyncio
import logging

import pytest

from stationkey.system import tasks
from stationkey.system.counters import Counts
from stationkey.system.tasks import background, unforeseen


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), MemoryError(), RecursionError(), OSError(5, "x")])
async def test_a_task_that_fails_runs_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "RETRY_FIRST", 0.001)
    failures = Counts()
    again, other = asyncio.Event(), asyncio.Event()

    async def failing() -> None:
        if sum(count for _, count in failures.items()) == 2:
            again.set()
            await asyncio.Event().wait()
        raise error

    async def steady() -> None:
        await again.wait()
        other.set()

    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(30), background({"failing": failing, "steady": steady}, failures):
            await other.wait()

    assert failures.items() == [(("failing", unforeseen(error).reason), 2)]
    told = [record for record in caplog.records if record.__dict__["reason"] == unforeseen(error).reason]
    assert [record.__dict__["task"] for record in told] == ["failing", "failing"]
    assert all(record.exc_info is not None and record.exc_info[1] is error for record in told)


async def test_leaving_ends_every_task_and_waits_for_it() -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("slow")

    async def done() -> None:
        ended.append("done")

    async with background({"slow": slow, "done": done}, Counts()):
        await asyncio.sleep(0)
    assert ended == ["done", "slow"]


async def test_what_the_block_raises_gets_out_after_the_tasks_have_ended() -> None:
    ended = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fail() -> None:
        async with background({"slow": slow}, Counts()):
            await asyncio.sleep(0)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert ended.is_set()
