"""Pools for the tests: their parts, and a clock and naps that tests move on."""

from __future__ import annotations

import asyncio
import logging
import threading
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

from parts import Clocks, key_id_in, request, sqlite_of
from stationkey.config.settings import PoolTerms, TpmTerms
from stationkey.contract.messages import GenerateCsrResponse
from stationkey.contract.profiles import SECP256R1, Algorithm, KeyType, RsaModulus
from stationkey.keystore import KeyRef, KeyStore, Support, keystore_opener
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import KeyStoreThread, Turn
from stationkey.ledger import Ledger
from stationkey.service import pool
from stationkey.service.pool import KeyPool
from stationkey.service.requests import StationKeyService
from stationkey.service.running_time import RunningTime
from stationkey.system.state_dir import DATABASE_NAME
from stationkey.system.threads import Reply
from stationkey.x509.csr import PrivateKey

T = TypeVar("T")


BOUND: Final = 30.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""


TWO: Final = PoolTerms(ec=2, rsa=0, idle=0.0)


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
        self._spare: list[Future[Any] | asyncio.Future[Any]] = []

    def _queue(
        self, run: Callable[[KeyStore], T], future: Future[T] | Reply[T], *, timeout: float, turn: Turn, task: str
    ) -> None:
        def noted(store: KeyStore) -> T:
            self.done.append(turn)
            return run(store)

        self.submitted.append(turn)
        super()._queue(noted, future, timeout=timeout, turn=turn, task=task)
        if turn is Turn.SPARE:
            result = future.future if isinstance(future, Reply) else future
            self._spare = [*(spare for spare in self._spare if not spare.done()), result]
            self.most_spare = max(self.most_spare, len(self._spare))


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
        [pool] = self.service.pools.values()
        return pool

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
        with closing(Ledger(sqlite_of(self.ledger).path, read_only=True)) as beside:
            return [key.key_id for key, _ in beside.keys.made_ahead() if key.key_type == kind]

    def history(self, key_id: str) -> list[str]:
        with closing(Ledger(sqlite_of(self.ledger).path, read_only=True)) as beside:
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
            answering = StationKeyService(
                KeyStores.only(keystore or "software:", thread), ledger, pool=terms, clock=lambda: clocks.wall
            )
        making = asyncio.create_task(next(iter(answering.pools.values())).run(), name="make-ahead")
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


def told(caplog: pytest.LogCaptureFixture, text: str) -> list[dict[str, Any]]:
    """What stands beside the words in the log lines that have this text."""
    return [vars(record) for record in caplog.records if text in record.getMessage()]


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="stationkey")
