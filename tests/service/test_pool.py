"""Keys made ahead: how many, when, for whom, and what becomes of those that cannot be used.

On real ledgers. With software keys, but with a TPM's where it matters whose they are. The clocks are the tests' own.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar
from unittest import mock

import pytest
from peers import Swtpm

from parts import Clocks, key_id_in, request
from stationkey.config.settings import DAY, PoolTerms, TpmTerms
from stationkey.contract.messages import GenerateCsrResponse
from stationkey.contract.profiles import RSA_3072, SECP256R1, SECP521R1, Algorithm, KeyType, RsaModulus
from stationkey.errors import KeyStoreError, LedgerError, Scope
from stationkey.keystore import KeyRef, KeyStore, Support, keystore_opener
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.worker import KeyStoreThread, Turn, on_keystore
from stationkey.ledger import Ledger
from stationkey.ledger.answers import Answers
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.transitions import Transitions
from stationkey.service import pool
from stationkey.service import requests as service
from stationkey.service.pool import MARGIN, RETRY_LAST, KeyPool
from stationkey.service.requests import DEADLINE, StationKeyService
from stationkey.service.running_time import RunningTime
from stationkey.system.state_dir import DATABASE_NAME
from stationkey.x509.csr import PrivateKey

T = TypeVar("T")

BOUND: Final = 30.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""
IDLE: Final = 30.0
"""Seconds on the clock of the test, which stands still until it is moved."""
TWO: Final = PoolTerms(ec=2, rsa=0, idle=0.0)
UNREACHABLE: Final = KeyStoreError(
    "the TPM cannot be reached", reason="tpm_unreachable", transient=True, scope=Scope.DEVICE
)
DISK_FULL: Final = LedgerError("the disk is full", reason="disk_full", transient=True)


class Store(SoftwareKeyStore):
    """A software key store that can be made to wait, to fail, or to have no RSA."""

    def __init__(self, clocks: Clocks | None = None) -> None:
        self._clocks = clocks or Clocks()
        self.made: list[KeyRef] = []
        self.made_at: list[float] = []
        self.pace = 0.0
        """Seconds that a key takes, on the clock of the test."""
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()
        self.fault: Exception | None = None
        self.unusable: dict[str, Exception] = {}
        """What loading a key raises, by its name."""
        self.has_rsa = True

    def supports(self, algorithm: Algorithm) -> Support:
        supported = super().supports(algorithm)
        return supported if self.has_rsa or not isinstance(supported.key_type, RsaModulus) else Support(None, "no RSA")

    def generate(self, algorithm: Algorithm) -> KeyRef:
        self.begun.release()
        assert self.go_on.wait(BOUND)
        if self.fault is not None:
            raise self.fault
        self._clocks.machine += self.pace
        self.made_at.append(self._clocks.machine)
        self.made.append(super().generate(algorithm))
        return self.made[-1]

    @contextmanager
    def signer(self, key: KeyRef) -> Iterator[PrivateKey]:
        if key.key_id in self.unusable:
            raise self.unusable[key.key_id]
        with super().signer(key) as private_key:
            yield private_key


class NotedThread(KeyStoreThread):
    """A key store's thread that notes in which order the jobs are done, and how many spare ones there were at once."""

    def __init__(self, open_store: Callable[[], KeyStore], *, clock: Callable[[], float]) -> None:
        super().__init__(open_store, clock=clock)
        self.submitted: list[Turn] = []
        self.done: list[Turn] = []
        self.most_spare = 0
        self._spare: list[Future[Any]] = []

    def submit(
        self, run: Callable[[KeyStore], T], *, timeout: float, turn: Turn = Turn.SHORT, task: str = "other"
    ) -> Future[T]:
        def noted(store: KeyStore) -> T:
            self.done.append(turn)
            return run(store)

        self.submitted.append(turn)
        future = super().submit(noted, timeout=timeout, turn=turn, task=task)
        if turn is Turn.SPARE:
            self._spare = [*(spare for spare in self._spare if not spare.done()), future]
            self.most_spare = max(self.most_spare, len(self._spare))
        return future


@dataclass
class Naps:
    """Takes the place of `asyncio.sleep` in the pool: the clock is moved, and nobody waits."""

    clocks: Clocks
    taken: list[float] = field(default_factory=list)
    after: Callable[[int], object] = lambda _: None
    """Called with the number of each nap, from 1."""

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)
        self.clocks.machine += seconds
        self.after(len(self.taken))
        await asyncio.sleep(0)


@dataclass
class Here:
    """A service whose pool is being filled."""

    service: StationKeyService
    ledger: Ledger
    thread: NotedThread
    store: Store
    clocks: Clocks
    making: asyncio.Task[None]

    @property
    def pool(self) -> KeyPool:
        return self.service.pool

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(BOUND):
            while not condition():
                assert not self.making.done() or not self.making.exception(), self.making.exception()
                await asyncio.sleep(0.001)

    async def full(self, **sizes: int) -> None:
        """Wait until it has so many of each kind ready; two of each curve, unless it is said otherwise."""
        wanted = sizes or {"secp256r1": 2, "secp521r1": 2}
        await self.until(lambda: {str(kind): ready for kind, ready in self.pool.ready().items()} == wanted)

    async def stop_making(self) -> None:
        """Make no more; what is ready stays so."""
        self.making.cancel()
        await asyncio.wait([self.making])

    async def answer(self, algorithm: Algorithm = Algorithm.ECDSA_SHA256) -> GenerateCsrResponse:
        return await self.service.answer(request(algorithm=algorithm))

    async def key(self, algorithm: Algorithm = Algorithm.ECDSA_SHA256) -> str:
        """Ask for a CSR; the name of its key."""
        response = await self.answer(algorithm)
        assert isinstance(response.data.csr, str)
        return key_id_in(response.data.csr)

    def ahead(self, kind: KeyType = SECP256R1) -> list[str]:
        """The names of the keys on record that have no owner, oldest first."""
        with closing(Ledger(self.ledger.database.path, read_only=True)) as beside:
            return [key.key_id for key, _ in beside.keys.made_ahead() if key.key_type == kind]

    def history(self, key_id: str) -> list[str]:
        with closing(Ledger(self.ledger.database.path, read_only=True)) as beside:
            return [event.event for event in beside.keys.history(key_id)]


@asynccontextmanager
async def pooled(
    folder: Path,
    terms: PoolTerms = TWO,
    *,
    store: Store | None = None,
    keystore: str | None = None,
    tpm: TpmTerms | None = None,
    clocks: Clocks | None = None,
) -> AsyncIterator[Here]:
    """A service with a pool, that ends with the block; its ledger stays, and so it can be started again."""
    clocks = clocks or Clocks()
    own = store = store or Store(clocks)

    def open_own() -> KeyStore:
        return own

    with closing(Ledger(folder / DATABASE_NAME)) as ledger:
        opener = keystore_opener(keystore, terms=tpm, state_dir=folder) if keystore else open_own
        thread = NotedThread(opener, clock=lambda: clocks.machine)
        with mock.patch("stationkey.service.requests.RunningTime", partial(RunningTime, clock=lambda: clocks.machine)):
            answering = StationKeyService(thread, ledger, pool=terms, clock=lambda: clocks.wall)
        making = asyncio.create_task(answering.pool.run(), name="make-ahead")
        here = Here(answering, ledger, thread, store, clocks, making)
        try:
            yield here
        finally:
            store.go_on.set()
            await here.stop_making()
            await answering.aclose()
            await asyncio.to_thread(thread.close, BOUND)
        if not making.cancelled():
            making.result()  # it never ends by itself, unless there is nothing to make


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def naps(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> Naps:
    naps = Naps(clocks)
    own = SimpleNamespace(Event=asyncio.Event, timeout=asyncio.timeout, sleep=naps)
    monkeypatch.setattr(pool, "asyncio", own)
    return naps


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


@pytest.fixture(autouse=True)
def everything_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="stationkey")


def told(caplog: pytest.LogCaptureFixture, text: str) -> list[dict[str, Any]]:
    """What stands beside the words in the log lines that have this text."""
    return [vars(record) for record in caplog.records if text in record.getMessage()]


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
    assert {said["key_id"] for said in told(caplog, "a key made ahead is destroyed")} == old


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
    assert {said["key_id"] for said in told(caplog, "a key made ahead is destroyed")} == old


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
        tries = [said["reason"] for said in told(caplog, "no keys are made ahead for now")]
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
    assert [said["reason"] for said in told(caplog, "no keys are made ahead for now")] == ["disk_full"] * 3
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
    assert [said["reason"] for said in told(caplog, "no keys are made ahead for now")] == ["tpm_unreachable"] * 2
    assert naps.taken == [1, 1]


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
    assert [said["reason"] for said in told(caplog, "no keys are made ahead for now")] == ["key_type_wrong"]
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
            f"a {kind} key takes 40 s to make, and a request that comes meanwhile is rejected after 30 s"
            for kind in ("secp256r1", "secp521r1")
        ]
    takes(DEADLINE)
    caplog.clear()
    (tmp_path / "other").mkdir()
    async with pooled(tmp_path / "other") as here:
        await here.full()
    assert warned(caplog) == []
