"""What the stations of a site share: places, and turns at a key store. The single station shares with nobody."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final
from weakref import WeakValueDictionary

from stationkey.keystore.stores import Store
from stationkey.keystore.worker import overdue

EC_TURNS: Final = 4
RSA_TURNS: Final = 1
"""Keys that one station may have made or queued in a key store at a time; its further requests wait for these. A key
store works in the order of arrival: with all of a station's requests in its queue, others would wait behind them."""


class Shares:
    """Places that stations share.

    A station may hold as many as are free, and a few in any case. So one that takes all it can get leaves half of them
    to others, two leave a third, and so on. Without a station nothing is counted.

    Args:
        places: number of places.
        few: places that each station may hold in any case.
    """

    def __init__(self, places: int, *, few: int) -> None:
        self._places = places
        self._few = few
        self._held: Counter[str] = Counter()

    def has_room(self, station: str) -> bool:
        """Return whether a station may take a place."""
        return not station or self._held[station] < max(self._few, self._places - self._held.total())

    @contextmanager
    def place(self, station: str) -> Iterator[None]:
        """Hold a place."""
        if not station:
            yield
            return
        self._held[station] += 1
        try:
            yield
        finally:
            self._held[station] -= 1
            if not self._held[station]:
                del self._held[station]


class Turns:
    """Turns at the key stores, so many for each station. Those that nobody wants are forgotten."""

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[tuple[str, str, bool], asyncio.Semaphore] = WeakValueDictionary()
        self._wanted: Counter[str] = Counter()

    def wanted(self, store: Store) -> int:
        """Return how many requests have or want a turn at a key store."""
        return self._wanted[store.name]

    @asynccontextmanager
    async def turn(self, station: str, store: Store, *, rsa: bool, until: float) -> AsyncIterator[None]:
        """Hold one of a station's turns at a key store.

        Args:
            station: of a site.
            store: the key store.
            rsa: whether it is for an RSA key.
            until: deadline, in the event loop's time.

        Raises:
            KeyStoreError: the deadline has passed.
        """
        turns = self._turns.setdefault((station, store.name, rsa), asyncio.Semaphore(RSA_TURNS if rsa else EC_TURNS))
        self._wanted[store.name] += 1
        try:
            try:
                async with asyncio.timeout_at(until):
                    await turns.acquire()
            except TimeoutError:
                raise overdue() from None
            try:
                yield
            finally:
                turns.release()
        finally:
            self._wanted[store.name] -= 1
