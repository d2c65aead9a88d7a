"""A task that fails is logged, counted, and runs again; the others do not notice."""

from __future__ import annotations

import asyncio
import logging

import pytest

from stationkey.system import tasks
from stationkey.system.tasks import kept_running


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), MemoryError(), RecursionError(), OSError(5, "x")])
async def test_a_task_that_fails_runs_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "_FIRST", 0.001)
    failed: list[str] = []
    again, other = asyncio.Event(), asyncio.Event()

    async def failing() -> None:
        if len(failed) == 2:
            again.set()
            await asyncio.Event().wait()
        raise error

    async def steady() -> None:
        await again.wait()
        other.set()

    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(10), kept_running({"failing": failing, "steady": steady}, failed=failed.append):
            await other.wait()

    assert failed == ["failing", "failing"]
    told = [record for record in caplog.records if record.__dict__["reason"] == "internal_error"]
    assert [record.__dict__["task"] for record in told] == failed
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

    async with kept_running({"slow": slow, "done": done}, failed=ended.append):
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
        async with kept_running({"slow": slow}, failed=lambda _: None):
            await asyncio.sleep(0)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert ended.is_set()
