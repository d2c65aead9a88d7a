"""The pool of keys where something is wrong: with a key, the TPM, or the disk."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from peers import Swtpm
from pools import Naps, Store, T, pooled, told

from parts import Clocks
from stationkey.config.settings import PoolTerms, TpmTerms
from stationkey.contract.profiles import SECP256R1, SECP521R1, Algorithm
from stationkey.errors import KeyStoreError, LedgerError, Scope
from stationkey.keystore import KeyRef, KeyStore
from stationkey.keystore.worker import KeyStoreThread, Turn, on_keystore
from stationkey.ledger import Ledger
from stationkey.ledger.answers import Answers
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.transitions import Transitions
from stationkey.service import requests as service
from stationkey.service.pool import RETRY_LAST
from stationkey.service.requests import DEADLINE
from stationkey.system.state_dir import DATABASE_NAME

pytest_plugins = ["pools"]
pytestmark = pytest.mark.usefixtures("everything_logged")


UNREACHABLE: Final = KeyStoreError(
    "the TPM cannot be reached", reason="tpm_unreachable", transient=True, scope=Scope.DEVICE
)


DISK_FULL: Final = LedgerError("the disk is full", reason="disk_full", transient=True)


# What cannot be used.


def destroy_beside(folder: Path, *key_ids: str, event: KeyEvent = KeyEvent.DESTRUCTION_ORDERED) -> None:
    """What the operator's commands do."""
    with closing(Ledger(folder / DATABASE_NAME, make=False)) as beside:
        for key_id in key_ids:
            beside.transitions.apply(key_id, event, reason="", now=0)


@pytest.mark.parametrize("event", [KeyEvent.DESTRUCTION_ORDERED, KeyEvent.COMPROMISE_REPORTED])
async def test_a_key_that_the_operator_ended_meanwhile_costs_nobody_anything(tmp_path: Path, event: KeyEvent) -> None:
    async with pooled(tmp_path) as here:
        await here.full()
        await here.stop_making()
        first, second = here.ahead()
        destroy_beside(tmp_path, first, event=event)
        assert await here.key() == second
        assert await here.key() not in {first, second}
    assert here.service.counters.outcomes() == {"accepted": 2}


async def test_keys_of_another_tpm_are_given_up_at_the_start_and_others_are_made(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture
) -> None:
    async with pooled(tmp_path, keystore=swtpm.uri) as here:
        await here.full()
        old = {*here.ahead(SECP256R1), *here.ahead(SECP521R1)}
    swtpm.terminate()
    swtpm.new_chip()
    swtpm.start()
    async with pooled(tmp_path, keystore=swtpm.uri) as here:
        await here.full()
        await here.stop_making()
        ahead = here.ahead()
        assert len(ahead) == 2
        assert await here.key() == ahead[0]
        assert [key for key in old if here.history(key)] == []
    assert {said["key_id"] for said in told(caplog, "destroying a key made ahead")} == old


@pytest.mark.parametrize(
    "tpm",
    [
        pytest.param(TpmTerms(key_auth="generated"), id="value"),
        pytest.param(TpmTerms(pcrs=(0,)), id="registers"),
        pytest.param(TpmTerms(srk_handle=0x81000010), id="parent"),
    ],
)
async def test_keys_made_ahead_without_the_protection_of_now_are_given_to_nobody(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture, tpm: TpmTerms
) -> None:
    async with pooled(tmp_path, keystore=swtpm.uri) as here:
        await here.full()
        old = {*here.ahead(SECP256R1), *here.ahead(SECP521R1)}
    async with pooled(tmp_path, keystore=swtpm.uri, tpm=tpm) as here:
        await here.full()
        assert set(here.ahead()) & old == set()
        assert await here.key() not in old
    assert {said["key_id"] for said in told(caplog, "destroying a key made ahead")} == old


async def test_keys_of_another_tpm_are_given_up_when_they_are_taken_and_the_request_is_served(
    tmp_path: Path, swtpm: Swtpm
) -> None:
    async with pooled(tmp_path, keystore=swtpm.uri) as here:
        await here.full()
        await here.stop_making()
        old = here.ahead()
        swtpm.terminate()
        swtpm.new_chip()
        swtpm.start()
        key = await here.key()
        assert key not in old
        assert here.ahead() == []
        assert here.history(key) == ["CSR answered"]
    assert here.service.counters.outcomes() == {"accepted": 1}


DAMAGES: Final = [
    pytest.param("UPDATE secret SET private = x'00'", id="no-blob"),
    pytest.param("UPDATE secret SET private = substr(private, 1, length(private) / 2)", id="half-a-blob"),
    pytest.param(
        "UPDATE secret SET private = CAST(substr(private, 1, length(private) - 1) || x'00' AS BLOB)", id="last-byte"
    ),
    *(
        pytest.param(
            f"UPDATE secret SET private = CAST(substr(private, 1, {place}) || x'ff' || substr(private, {place} + 2)"
            " AS BLOB)",
            id=f"byte-{place}",
        )
        for place in range(20, 120, 10)
    ),
    pytest.param("UPDATE key SET public = x'00'", id="no-public-part"),
]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_key_that_is_damaged_on_record_is_passed_over(
    tmp_path: Path, session_swtpm: Swtpm, damage: str
) -> None:
    async with pooled(tmp_path, PoolTerms(ec=1, rsa=0, idle=0.0), keystore=session_swtpm.uri) as here:
        await here.full(secp256r1=1, secp521r1=1)
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as database, database:
        database.execute(damage)
    async with pooled(tmp_path, PoolTerms(ec=1, rsa=0, idle=0.0), keystore=session_swtpm.uri) as here:
        await here.full(secp256r1=1, secp521r1=1)
        assert await here.key()
    assert here.service.counters.outcomes() == {"accepted": 1}


@pytest.mark.parametrize(
    "why",
    [
        *(
            pytest.param(KeyStoreError("no", reason=reason, scope=Scope.KEY), id=reason)
            for reason in ("key_of_another_tpm", "key_damaged", "tpm_error")
        ),
    ],
)
@pytest.mark.parametrize("gone", [pytest.param(True, id="destroyed-beside"), pytest.param(False, id="on-record")])
async def test_a_key_that_cannot_be_loaded_is_given_up_and_the_request_gets_the_next(
    tmp_path: Path, why: Exception, *, gone: bool
) -> None:
    async with pooled(tmp_path) as here:
        await here.full()
        await here.stop_making()
        first, second = here.ahead()
        here.store.unusable[first] = why
        if gone:
            destroy_beside(tmp_path, first)
        assert await here.key() == second
        assert here.history(first) == []
    assert here.service.counters.outcomes() == {"accepted": 1}


async def test_whatever_is_tried_for_a_request_has_one_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float] = []

    async def noted(
        thread: KeyStoreThread, job: Callable[[KeyStore], T], *, timeout: float, turn: Turn, task: str
    ) -> T:
        timeouts.append(timeout)
        return await on_keystore(thread, job, timeout=timeout, turn=turn, task=task)

    async with pooled(tmp_path) as here:
        await here.full()
        await here.stop_making()
        here.store.unusable = {key: KeyStoreError("no", reason="key_damaged", scope=Scope.KEY) for key in here.ahead()}
        monkeypatch.setattr("stationkey.service.requests.on_keystore", noted)
        await here.key()
    assert len(timeouts) == 3
    assert DEADLINE >= timeouts[0] > timeouts[1] > timeouts[2]


# Requests that fail.


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(DISK_FULL, id="passing"),
        pytest.param(LedgerError("an input or output error", reason="ledger_error"), id="not-known-to-pass"),
    ],
)
async def test_a_key_whose_answer_could_not_be_recorded_is_ready_again_in_its_place(
    tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch, fault: LedgerError
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    store = Store(clocks)
    store.pace = 1.0
    async with pooled(tmp_path, PoolTerms(ec=3, rsa=0, idle=0.0), store=store, clocks=clocks) as here:
        await here.full(secp256r1=3, secp521r1=3)
        await here.stop_making()
        ahead = here.ahead()
        with monkeypatch.context() as patched:
            patched.setattr(Answers, "record", fail)
            answers = await asyncio.gather(*(here.answer() for _ in range(3)))
        assert [answer.data.status for answer in answers] == ["rejected"] * 3
        assert here.ahead() == ahead
        assert [await here.key() for _ in range(3)] == ahead


@pytest.mark.parametrize("scope", [Scope.REQUEST, Scope.DEVICE, Scope.STORE])
async def test_a_key_that_the_tpm_did_not_sign_with_is_ready_again(
    tmp_path: Path, clocks: Clocks, scope: Scope
) -> None:
    store = Store(clocks)
    store.pace = 1.0
    async with pooled(tmp_path, store=store, clocks=clocks) as here:
        await here.full()
        await here.stop_making()
        first, _ = here.ahead()
        here.store.unusable[first] = KeyStoreError("not now", reason="tpm_unreachable", scope=scope)
        assert (await here.answer()).data.status == "rejected"
        here.store.unusable.clear()
        assert await here.key() == first


async def test_a_key_whose_csr_did_not_verify_is_not_ready_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise KeyStoreError("it does not verify", reason="signature_invalid")

    async with pooled(tmp_path) as here:
        await here.full()
        await here.stop_making()
        first, second = here.ahead()
        with monkeypatch.context() as patched:
            patched.setattr(service, "check_signature", fail)
            assert (await here.answer()).data.status == "rejected"
        assert here.history(first)[-1] == "expired"
        assert here.pool.ready()[SECP256R1] == 1
        assert await here.key() == second
    assert here.service.counters.outcomes() == {"signature_invalid": 1, "accepted": 1}


async def test_a_fault_of_ours_costs_the_key_and_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might be the key's: the next request must not come upon it again, and none may stay on record unused."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async with pooled(tmp_path) as here:
        await here.full()
        await here.stop_making()
        _, second = here.ahead()
        with monkeypatch.context() as patched:
            patched.setattr(service, "sign_csr", fail)
            assert (await here.answer()).data.status == "rejected"
        assert here.ahead() == [second]
        assert await here.key() == second


# Trouble while it is filled.


async def test_while_the_key_store_is_away_each_try_is_told_and_each_waits_longer(
    tmp_path: Path, clocks: Clocks, naps: Naps, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    store.fault = UNREACHABLE

    def after(nap: int) -> None:
        if nap in {11, 13}:
            store.fault = None

    naps.after = after
    async with pooled(tmp_path, store=store, clocks=clocks) as here:
        await here.full()
        tries = [said["reason"] for said in told(caplog, "making keys ahead paused")]
        assert tries == ["tpm_unreachable"] * 11
        assert naps.taken == [1, 2, 4, 8, 16, 32, 64, 128, 256, RETRY_LAST, RETRY_LAST]
        await here.until(lambda: told(caplog, "pool full"))
        # In trouble again: as if for the first time.
        store.fault = UNREACHABLE
        assert here.pool.take(Algorithm.ECDSA_SHA256) is not None
        await here.full()
    assert naps.taken[11:] == [1, 2]


async def test_while_the_disk_is_full_nothing_is_ready_and_room_heals_it(
    tmp_path: Path, clocks: Clocks, naps: Naps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_ahead = Transitions.make_ahead
    full = True
    ready: list[int] = []

    def make(own: Transitions, key: KeyRef, *, now: int, due: int, seconds: float) -> None:
        if full:
            raise DISK_FULL
        make_ahead(own, key, now=now, due=due, seconds=seconds)

    monkeypatch.setattr(Transitions, "make_ahead", make)
    async with pooled(tmp_path, clocks=clocks) as here:

        def after(nap: int) -> None:
            nonlocal full
            ready.append(sum(here.pool.ready().values()) + len(here.ahead()))
            full = nap < 3

        naps.after = after
        await here.full()
        assert len(here.ahead()) == 2
    assert [said["reason"] for said in told(caplog, "making keys ahead paused")] == ["disk_full"] * 3
    assert ready == [0, 0, 0]


async def test_a_tpm_that_is_away_at_the_start_and_again_later_is_used_when_it_is_back(
    tmp_path: Path, swtpm: Swtpm, clocks: Clocks, naps: Naps, caplog: pytest.LogCaptureFixture
) -> None:
    swtpm.kill()
    naps.after = lambda _: swtpm.start()
    async with pooled(tmp_path, keystore=swtpm.uri, clocks=clocks) as here:
        await here.full()
        await here.until(lambda: told(caplog, "pool full"))
        swtpm.kill()
        assert here.pool.take(Algorithm.ECDSA_SHA256) is not None
        await here.full()
        ahead = here.ahead()
        assert await here.key() in ahead
    assert [said["reason"] for said in told(caplog, "making keys ahead paused")] == ["tpm_unreachable"] * 2
    assert naps.taken == [1, 1]
