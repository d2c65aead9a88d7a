"""Destroy keys that a crash left in a key store that keeps keys in its device."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from stationkey.errors import StationKeyError
from stationkey.keystore import KeyStore, Sweeping
from stationkey.keystore.stores import Store
from stationkey.keystore.worker import Task, Turn, on_keystore
from stationkey.service.custody import PROOF_DEADLINE, Custody

log = logging.getLogger(__name__)

_SWEEP: Final = 60.0
"""Seconds between two looks."""


class Strays:
    """Destroys keys in the device that the ledger does not know.

    Args:
        custody: the keys.
        store: the key store.
    """

    def __init__(self, custody: Custody, store: Store) -> None:
        self._custody = custody
        self._store = store

    async def sweep(self) -> None:
        """Compare the ledger with the device once."""
        living = await self._custody.ledger(lambda ledger: ledger.keys.refs(self._store.uri.scheme.name))

        def sweep(store: KeyStore) -> int:
            return store.sweep(living) if isinstance(store, Sweeping) else 0

        destroyed = await on_keystore(
            self._store.thread, sweep, timeout=PROOF_DEADLINE, turn=Turn.SPARE, task=Task.DESTROY
        )
        if destroyed:
            log.warning("destroyed keys that a crash left in the key store", extra={"keys": destroyed})

    async def run(self) -> None:
        """Sweep periodically until cancelled. An absent device is logged and retried."""
        while True:
            try:
                await self.sweep()
            except StationKeyError as error:
                log.error("the key store was not swept: %s", error, extra={"reason": error.reason})
            await asyncio.sleep(_SWEEP)
