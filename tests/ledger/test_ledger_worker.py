"""The ledger's thread: every call is made, in order, whoever waits and whatever hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from recording import answer, on_record

from parts import request
from stationkey.errors import LedgerError
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.worker import LedgerThread

pytest_plugins = ["ledgers"]

BOUND = 30.0
"""Seconds that nothing here takes unless it hangs."""


@pytest.fixture
def thread(ledger: Ledger) -> Iterator[LedgerThread]:
    with closing(LedgerThread(ledger)) as opened:
        yield opened


class Disk:
    """Hangs until it is told to go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.goes_on = threading.Event()

    def write(self, _: Ledger) -> None:
        self.reached.set()
        assert self.goes_on.wait(BOUND)


async def test_a_call_gives_its_result_or_its_error_and_the_next_one_is_made(thread: LedgerThread) -> None:
    with pytest.raises(LedgerError) as failure:
        await thread(lambda ledger: ledger.transitions.apply("0" * 20, KeyEvent.EXPIRED, reason="", now=0))
    assert failure.value.reason == "key_not_found"
    key_id = await thread(answer)
    assert [key.key_id for key in await thread(on_record)] == [key_id]


async def test_a_call_is_made_whole_although_nobody_waits_for_it_any_more(thread: LedgerThread, ledger: Ledger) -> None:
    disk = Disk()
    hanging, queued = thread(disk.write), thread(answer)
    hanging.cancel()
    queued.cancel()
    disk.goes_on.set()
    async with asyncio.timeout(BOUND):
        await thread(lambda _: None)
    assert len(on_record(ledger)) == 1


def test_a_call_is_made_whole_although_its_loop_is_closed(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    with closing(LedgerThread(ledger)) as thread:

        async def ask() -> None:
            thread(disk.write)
            thread(answer)

        asyncio.run(ask())
        disk.goes_on.set()
    assert len(on_record(ledger)) == 1
    assert caplog.records == []


async def test_a_call_that_hangs_is_known(thread: LedgerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.worker.LEDGER_PATIENCE", 0.0)
    disk = Disk()
    stuck = [thread.stuck]
    hanging = thread(disk.write)
    await asyncio.to_thread(disk.reached.wait, BOUND)
    stuck.append(thread.stuck)
    disk.goes_on.set()
    await hanging
    await asyncio.to_thread(thread.close)
    stuck.append(thread.stuck)
    assert stuck == [False, True, False]


async def test_what_is_only_noted_does_not_wait_for_a_disk_that_hangs(thread: LedgerThread, ledger: Ledger) -> None:
    asked = request()
    await thread(answer, asked)
    disk = Disk()
    hanging = thread(disk.write)
    thread.mark_delivered(asked.id)
    thread.note_rejection(asked.id, reason="r", message="m", now=0)
    assert not hanging.done()
    disk.goes_on.set()
    await thread(lambda ledger: ledger.rejections.write())
    assert ledger.answers.undelivered() == []


async def test_closing_waits_for_the_calls_before_it_and_takes_no_more(thread: LedgerThread, ledger: Ledger) -> None:
    made = thread(answer)
    await asyncio.to_thread(thread.close)
    assert [key.key_id for key in on_record(ledger)] == [await made]
    with pytest.raises(RuntimeError):
        thread(answer)


async def test_the_thread_does_not_keep_the_interpreter_from_ending(thread: LedgerThread) -> None:
    own = await thread(lambda _: threading.current_thread())
    assert own.daemon
