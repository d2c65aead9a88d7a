"""Destroy keys that a crash left in a key store that keeps keys in its device."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path
from pkgutil import resolve_name
from typing import Final

from stationkey.errors import LedgerError, StationKeyError
from stationkey.keystore import KeyStore, Sweeping, Swept
from stationkey.keystore.schemes import SCHEMES
from stationkey.keystore.stores import Store
from stationkey.keystore.worker import Task, Turn, on_keystore
from stationkey.service.custody import PROOF_DEADLINE, Custody

log = logging.getLogger(__name__)

_SWEEP: Final = 60.0
"""Seconds between two looks."""


async def tell_left_behind(custody: Custody, state_dir: Path) -> None:
    """Log how many destroyed keys are still in a device that the configuration does not name.

    They stay on record there, and are destroyed once the configuration names the device again.
    """
    for scheme in SCHEMES.values():
        if not scheme.resident or not (state_dir / scheme.name).exists():  # without a record, its code stays unloaded
            continue
        if recorded := resolve_name(scheme.recorded)(state_dir):
            await _tell_left_behind(custody, scheme.name, recorded)


async def _tell_left_behind(custody: Custody, scheme: str, recorded: Collection[str]) -> None:
    try:
        keys = await custody.ledger(lambda ledger: ledger.keys.refs(scheme))
    except LedgerError as error:
        log.error("key stores not compared with the ledger: %s", error, extra={"reason": error.reason})
        return
    ended = set(recorded) - {f"{key.scheme}:{key.location}" for key in keys}
    left = sorted(uri for uri in ended if not custody.keystores.have(uri))
    custody.counters.left_behind += len(left)
    if left:
        about = {"keys": len(left), "keystore": left[0].partition(";id=")[0], "reason": "keystore_unconfigured"}
        log.warning("destroyed keys are still in a key store that the configuration does not name", extra=about)


class Strays:
    """Destroys keys in the device that the ledger does not know.

    Args:
        custody: the keys; None for a key store whose record the daemons of a site share, which knows them.
        store: the key store.
        lease: seconds after which another daemon that died is known to be dead.
    """

    def __init__(self, custody: Custody | None, store: Store, *, lease: float = 0.0) -> None:
        if (custody is None) != store.shared:
            raise ValueError("the ledger tells which keys live, or the site's record")
        self._custody = custody
        self._store = store
        self._lease = lease
        self._woken = asyncio.Event()

    def soon(self) -> None:
        """Sweep at once, and again when the lease of a daemon that has just died is over."""
        self._woken.set()

    async def sweep(self) -> Swept:
        """Compare the ledger with the device once."""
        living = None
        if self._custody is not None:
            living = await self._custody.ledger(lambda ledger: ledger.keys.refs(self._store.uri.scheme.name))

        def sweep(store: KeyStore) -> Swept:
            return store.sweep(living) if isinstance(store, Sweeping) else Swept()

        swept = await on_keystore(self._store.thread, sweep, timeout=PROOF_DEADLINE, turn=Turn.SPARE, task=Task.DESTROY)
        if swept.destroyed:
            log.warning(
                "destroyed keys that a crash left in the key store",
                extra={"keys": swept.destroyed, **self._store.about},
            )
        return swept

    async def run(self) -> None:
        """Sweep periodically until cancelled. An absent device is logged and retried."""
        pause = _SWEEP
        while True:
            try:
                while (await self.sweep()).more:
                    pass
            except StationKeyError as error:
                log.error("the key store was not swept: %s", error, extra={"reason": error.reason, **self._store.about})
            try:
                async with asyncio.timeout(pause):
                    await self._woken.wait()
            except TimeoutError:
                pause = _SWEEP
            else:
                self._woken.clear()
                pause = self._lease
