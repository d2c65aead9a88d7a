"""Keys made ahead: how many, when, for whom, and what becomes of those that cannot be used.

On real ledgers. With software keys, but with a TPM's where it matters whose they are. The clocks are the tests' own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest
from pools import BOUND, Naps, Store, pooled, told

from parts import Clocks
from stationkey.config.settings import DAY, PoolTerms
from stationkey.contract.profiles import RSA_3072, SECP256R1, SECP521R1, Algorithm
from stationkey.keystore import KeyRef, KeyStore
from stationkey.keystore.worker import Turn
from stationkey.service import pool
from stationkey.service.pool import MARGIN, KeyPool
from stationkey.service.requests import DEADLINE

pytest_plugins = ["pools"]
pytestmark = pytest.mark.usefixtures("everything_logged")


IDLE: Final = 30.0
"""Seconds on the clock of the test, which stands still until it is moved."""


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Lets the pool look at once whether anything is missing, again and again; how often it has found nothing."""
    monkeypatch.setattr(pool, "LOOK", 0.0)
    count = 0
    fill = KeyPool._fill  # noqa: SLF001 - each return from it is a look that ended

    async def counted(own: KeyPool) -> None:
        nonlocal count
        await fill(own)
        count += 1

    monkeypatch.setattr(KeyPool, "_fill", counted)
    return lambda: count


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# How many.


async def test_it_fills_to_its_sizes_of_each_kind_and_no_further(
    tmp_path: Path, looks: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    async with pooled(tmp_path, PoolTerms(ec=3, rsa=1, idle=0.0)) as here:
        await here.full(**{"secp256r1": 3, "secp521r1": 3, "RSA-3072": 1})
        seen = looks()
        await here.until(lambda: looks() >= seen + 3)
        assert [len(here.ahead(kind)) for kind in (SECP256R1, SECP521R1, RSA_3072)] == [3, 3, 1]
        assert len(here.store.made) == 7
    assert [(said["secp256r1"], said["RSA-3072"]) for said in told(caplog, "pool full")] == [(3, 1)]


async def test_both_algorithms_of_one_kind_share_its_keys(tmp_path: Path) -> None:
    async with pooled(tmp_path, PoolTerms(rsa=2, idle=0.0)) as here:
        await here.full(**{"RSA-3072": 2})
        await here.stop_making()
        made = here.ahead(RSA_3072)
        assert [await here.key(Algorithm.RSA_SHA384), await here.key(Algorithm.RSA_SHA256)] == made


async def test_with_sizes_of_zero_nothing_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with pooled(tmp_path, PoolTerms(rsa=0)) as here:
        await asyncio.wait_for(asyncio.shield(here.making), BOUND)
        assert here.thread.submitted == []
        assert await here.key() == here.store.made[0].key_id
    assert told(caplog, "ahead") == []


async def test_where_the_tpm_has_no_rsa_none_is_made_and_none_is_missed(
    tmp_path: Path, looks: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    store.has_rsa = False
    async with pooled(tmp_path, PoolTerms(rsa=1, idle=0.0), store=store) as here:
        await here.until(lambda: looks() >= 3)
        assert here.pool.ready() == {}
        assert store.made == []
    assert warned(caplog) == []


# When.


async def test_nothing_is_made_before_nobody_has_wanted_anything_for_a_while(
    tmp_path: Path, clocks: Clocks, naps: Naps, looks: Callable[[], int]
) -> None:
    clocks.machine = 100.0
    async with pooled(tmp_path, PoolTerms(ec=2, rsa=0, idle=IDLE), clocks=clocks) as here:
        await here.full()
        await here.until(lambda: looks() >= 1)
    assert naps.taken == [IDLE]  # once: to make keys is not to want something
    # But for the first of each curve: so it is known at start how long one takes.
    assert here.store.made_at == [100.0] * 2 + [100.0 + IDLE] * 2


async def test_one_key_is_made_at_a_time(tmp_path: Path) -> None:
    async with pooled(tmp_path, PoolTerms(ec=8, rsa=0, idle=0.0)) as here:
        await here.full(secp256r1=8, secp521r1=8)
        assert here.thread.submitted.count(Turn.SPARE) == 16
        assert here.thread.most_spare == 1


async def test_a_request_that_comes_while_a_key_is_made_ahead_waits_for_that_one_and_no_other(tmp_path: Path) -> None:
    store = Store()
    store.go_on.clear()
    async with pooled(tmp_path, store=store) as here:
        await asyncio.to_thread(store.begun.acquire)
        before = len(here.thread.submitted)
        asking = asyncio.create_task(here.key())
        await here.until(lambda: len(here.thread.submitted) > before)
        assert here.pool.ready() == {SECP256R1: 0, SECP521R1: 0}
        store.go_on.set()
        key = await asking
        await here.full()
        # The look at what the store can make, the key in hand, the request, and only then the other keys.
        assert here.thread.done[:4] == [Turn.SHORT, Turn.SPARE, Turn.SHORT, Turn.SPARE]
        assert here.history(key) == ["CSR answered"]
        assert key == store.made[1].key_id


async def test_a_job_before_which_somebody_came_makes_nothing(tmp_path: Path, clocks: Clocks, naps: Naps) -> None:
    """The thread is busy with what nobody waits for, and a request comes while the next key waits for its turn."""
    begun, go_on = threading.Event(), threading.Event()
    made: list[int] = []

    def busy(_: KeyStore) -> None:
        begun.set()
        assert go_on.wait(BOUND)

    async with pooled(tmp_path, PoolTerms(ec=2, rsa=0, idle=IDLE), clocks=clocks) as here:

        def after(nap: int) -> None:
            made.append(len(here.store.made))
            if nap == 1:
                here.thread.submit(busy, timeout=BOUND, turn=Turn.SPARE)
                assert begun.wait(BOUND)

        naps.after = after
        await here.until(lambda: here.thread.submitted.count(Turn.SPARE) == 4)  # one of each curve; that; the next
        wanted = here.thread.submit(lambda _: None, timeout=BOUND)
        go_on.set()
        await asyncio.wrap_future(wanted)
        await here.full(secp256r1=2, secp521r1=2)
    assert (naps.taken, made) == ([IDLE, IDLE], [2, 2])


# For whom.


async def test_keys_are_handed_out_oldest_first_and_then_they_are_made(tmp_path: Path) -> None:
    async with pooled(tmp_path, PoolTerms(ec=3, rsa=0, idle=0.0)) as here:
        await here.full(secp256r1=3, secp521r1=3)
        await here.stop_making()
        made, ahead = len(here.store.made), here.ahead()
        assert [await here.key() for _ in range(3)] == ahead
        assert len(here.store.made) == made
        assert await here.key() == here.store.made[-1].key_id
        assert [here.history(key) for key in ahead] == [["made ahead", "CSR answered"]] * 3


async def test_fifty_requests_at_once_get_a_key_each(tmp_path: Path) -> None:
    """While new ones are made for those that go: whoever gets which, it is one of those made ahead, or made for it."""
    async with pooled(tmp_path, PoolTerms(ec=25, rsa=0, idle=0.0)) as here:
        await here.full(secp256r1=25, secp521r1=25)
        ahead = set(here.ahead())
        keys = await asyncio.gather(*(here.key() for _ in range(50)))
        assert len(set(keys)) == 50
        assert ahead < set(keys)
        await here.full(secp256r1=25, secp521r1=25)
        assert not set(here.ahead()) & set(keys)
    assert here.service.counters.outcomes() == {"accepted": 50}


async def test_keys_made_ahead_are_handed_out_after_a_restart(tmp_path: Path) -> None:
    async with pooled(tmp_path) as here:
        await here.full()
        ahead = here.ahead()
    async with pooled(tmp_path) as here:
        await here.full()
        await here.stop_making()
        assert [await here.key(), await here.key()] == ahead
        assert here.store.made == []


async def test_a_key_whose_time_is_nearly_over_is_not_handed_out_and_another_is_made(
    tmp_path: Path, clocks: Clocks
) -> None:
    async with pooled(tmp_path, PoolTerms(ec=2, rsa=0, idle=0.0, age=DAY), clocks=clocks) as here:
        await here.full()
        old = here.ahead()
        clocks.pass_by(DAY - MARGIN - 1)
        assert await here.key() == old[0]
        await here.full()
        clocks.pass_by(1)
        key = await here.key()
        assert key not in old
        await here.until(lambda: len(here.ahead()) == 3)
        assert old[1] in here.ahead()  # until its time is over
        await here.service.expiry.sweep()
        assert old[1] in here.ahead()
        clocks.pass_by(MARGIN)
        await here.service.expiry.sweep()
        assert len(here.ahead()) == 2
        assert old[1] not in here.ahead()


async def test_keys_age_out_and_are_made_anew_though_nobody_asks(
    tmp_path: Path, clocks: Clocks, looks: Callable[[], int]
) -> None:
    async with pooled(tmp_path, PoolTerms(ec=2, rsa=0, idle=0.0, age=DAY), clocks=clocks) as here:
        await here.full()
        old = set(here.ahead())
        clocks.pass_by(DAY)
        seen = looks()
        await here.until(lambda: looks() >= seen + 2)
        await here.service.expiry.sweep()
        assert len(here.ahead()) == 2
        assert not old & set(here.ahead())


async def test_keys_that_last_for_minutes_only_are_not_made_over_and_over(
    tmp_path: Path, looks: Callable[[], int]
) -> None:
    async with pooled(tmp_path, PoolTerms(ec=2, rsa=0, idle=0.0, age=MARGIN // 2)) as here:
        await here.full()
        seen = looks()
        await here.until(lambda: looks() >= seen + 3)
        assert len(here.store.made) == 4


# How long it takes.


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many seconds it takes to make a key, as the pool sees it."""

    def set_to(seconds: float) -> None:
        ticks = iter(range(1_000_000))
        own = SimpleNamespace(time=time.time, monotonic=lambda: next(ticks) * seconds)
        monkeypatch.setattr(pool, "time", own)

    return set_to


async def test_how_long_a_key_takes_is_told_with_the_first_and_at_each_start(
    tmp_path: Path, takes: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    takes(2.5)
    async with pooled(tmp_path) as here:
        await here.full()
        assert here.pool.seconds_to_make == {SECP256R1: 2.5, SECP521R1: 2.5}
    at_start = told(caplog, "keys are made ahead")
    assert [(said["key_type"], said["ready"], said["seconds_to_make_one"]) for said in at_start] == [
        ("secp256r1", 1, "2.5"),
        ("secp521r1", 1, "2.5"),
    ]
    caplog.clear()

    async with pooled(tmp_path) as here:
        await here.full()
    at_start = told(caplog, "keys are made ahead")
    assert [(said["key_type"], said["ready"], said["wanted"], said["seconds_to_make_one"]) for said in at_start] == [
        ("secp256r1", 2, 2, "2.5"),
        ("secp521r1", 2, 2, "2.5"),
    ]
    assert warned(caplog) == []


async def test_how_long_an_rsa_key_takes_is_told_when_the_first_is_made(
    tmp_path: Path, takes: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """At start that would keep requests waiting for tens of seconds."""
    takes(2.5)
    async with pooled(tmp_path, PoolTerms(rsa=1, idle=0.0)) as here:
        await here.until(lambda: len(told(caplog, "pool full")) == 1)
    assert [(said["ready"], said["seconds_to_make_one"]) for said in told(caplog, "keys are made ahead")] == [
        (0, "not known yet"),
        (1, "2.5"),
    ]


async def test_a_tpm_that_makes_other_keys_than_it_said_is_asked_anew(
    tmp_path: Path, naps: Naps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was exchanged under the running daemon."""
    store = Store()
    generate, exchanged = store.generate, [True]

    def make(algorithm: Algorithm) -> KeyRef:
        if exchanged and algorithm is Algorithm.ECDSA_SHA512:
            exchanged.clear()
            return generate(Algorithm.ECDSA_SHA256)
        return generate(algorithm)

    monkeypatch.setattr(store, "generate", make)
    async with pooled(tmp_path, store=store) as here:
        await here.full()
    assert [said["reason"] for said in told(caplog, "making keys ahead paused")] == ["key_type_wrong"]
    assert len(naps.taken) == 1


async def test_a_key_that_takes_longer_than_a_request_may_is_warned_of_once_a_run(
    tmp_path: Path, takes: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    takes(DEADLINE + 10)
    for _ in range(2):
        caplog.clear()
        async with pooled(tmp_path) as here:
            await here.full()
        assert warned(caplog) == [
            f"making a {kind} key takes 40 s; a request meanwhile is rejected after 30 s"
            for kind in ("secp256r1", "secp521r1")
        ]
    takes(DEADLINE)
    caplog.clear()
    (tmp_path / "other").mkdir()
    async with pooled(tmp_path / "other") as here:
        await here.full()
    assert warned(caplog) == []
