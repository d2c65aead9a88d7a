"""Threads of key stores for the tests: calls that hang, and a clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from stationkey.keystore import KeyStore
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.worker import KeyStoreThread, Turn

LONG = 30.0
"""Seconds that nothing here takes, unless it never happens."""


DEADLINE = 5.0
"""On the clock of the test, which stands still until it is moved."""


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stores:
    """Opens software stores, and notes which thread opened and closed each."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.abandoned: list[str] = []

    def __call__(self) -> KeyStore:
        self.opened.append(threading.current_thread().name)
        return _NotedStore(self)


class _NotedStore(SoftwareKeyStore):
    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._owner = threading.current_thread().name

    def close(self) -> None:
        self._stores.closed.append(threading.current_thread().name)

    def abandon(self) -> None:
        self._stores.abandoned.append(self._owner)


class Stuck:
    """A job that is begun and does not return until it is let go, as a command to a hung TPM."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, _: KeyStore) -> str:
        self.begun.set()
        assert self.let_go.wait(LONG)
        return "late"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stores() -> Stores:
    return Stores()


@pytest.fixture
def thread(stores: Stores, clock: Clock) -> Iterator[KeyStoreThread]:
    with closing(KeyStoreThread(stores, clock=clock)) as thread:
        yield thread


@pytest.fixture
def stuck() -> Iterator[Callable[[], Stuck]]:
    """Makes jobs that are stuck; all are let go at the end."""
    jobs: list[Stuck] = []

    def make() -> Stuck:
        jobs.append(Stuck())
        return jobs[-1]

    yield make
    for job in jobs:
        job.let_go.set()


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("keystore-")]


def name(_: KeyStore) -> str:
    return threading.current_thread().name


def nothing(_: KeyStore) -> None:
    """A job that is done at once."""


def returned(thread: KeyStoreThread) -> None:
    """Wait until the calls of all threads that were given up have returned."""
    while thread.abandoned:
        threading.Event().wait(0.001)


# Turns.


@dataclass
class Order:
    """Jobs that note their names, behind one that is stuck until all have been submitted."""

    thread: KeyStoreThread
    first: Stuck
    done: list[str] = field(default_factory=list)
    futures: list[Future[None]] = field(default_factory=list)

    def submit(self, name: str, turn: Turn) -> Future[None]:
        future = self.thread.submit(lambda _: self.done.append(name), timeout=LONG, turn=turn)
        self.futures.append(future)
        return future

    def run(self) -> list[str]:
        self.first.let_go.set()
        for future in self.futures:
            if not future.cancelled():
                future.result(LONG)
        return self.done


@pytest.fixture
def order(thread: KeyStoreThread, stuck: Callable[[], Stuck]) -> Order:
    first = stuck()
    thread.submit(first, timeout=LONG)
    assert first.begun.wait(LONG)
    return Order(thread, first)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """Torn down last: whatever was stuck has been let go, and whatever was open has been closed."""
    yield
    for worker in workers():
        worker.join(LONG)
    assert workers() == []
