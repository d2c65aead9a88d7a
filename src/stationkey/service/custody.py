"""Change keys for statuses and expiry: one step of the ledger, the files under ``active/``, destruction in the device.

The ledger is the truth. Every step is one transaction; the files under ``active/`` are updated right after it, and
again at every start. So a loss of power leaves the state before or after the step, and at most a file that the next
start corrects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from stationkey.contract.profiles import CertificateType
from stationkey.errors import KeyStoreError, LedgerError
from stationkey.keystore import KeyRef
from stationkey.keystore.schemes import SCHEMES
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import Task, Turn
from stationkey.ledger import Ledger
from stationkey.ledger.worker import LedgerThread
from stationkey.service.active_files import ActiveDirectory
from stationkey.service.running_time import RunningTime
from stationkey.system.counters import Counters

T = TypeVar("T")
log = logging.getLogger(__name__)

PROOF_DEADLINE: Final = 30.0
"""Seconds allowed to load a key and sign, or to destroy it."""

_PART: Final = 20
"""Stations whose files are written in one step, while a request may wait."""


class Custody:
    """The keys of one ledger and its key stores.

    Args:
        keystores: the key stores.
        ledger: the ledger's.
        active: the directory ``active/``.
        running: the running time.
        counters: counts outcomes.
        clock: Unix time in seconds.
        on_change: called when keys may have become active, or may have ended.
    """

    def __init__(
        self,
        keystores: KeyStores,
        ledger: LedgerThread,
        active: ActiveDirectory,
        *,
        running: RunningTime,
        counters: Counters,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.keystores = keystores
        self.ledger = ledger
        self.running = running
        self.counters = counters
        self._stores = {str(kind): keystores.making(kind).name for kind in CertificateType}
        self._locks: WeakValueDictionary[tuple[str, str | None], asyncio.Lock] = WeakValueDictionary()
        self._active = active
        self._clock = clock
        self._on_change = on_change
        self._shown: int | None = None
        """The event up to which the files of a shard were updated."""
        self._unshown: set[str] = set()
        """Stations whose files are to be updated."""

    def now(self) -> int:
        """Return Unix time in milliseconds."""
        return int(self._clock() * 1000)

    def one_at_a_time(self, certificate_type: str, station: str = "") -> asyncio.Lock:
        """Return the lock that is held while a key of a station and a certificate type is read and then changed.

        It is the same for all types whose keys are made in one key store: another one may hang meanwhile. It is
        forgotten when nobody holds or wants it: there may be many stations.
        """
        # A key made ahead has no type.
        return self._locks.setdefault((station, self._stores.get(certificate_type)), asyncio.Lock())

    async def change(self, step: Callable[[Ledger], T], station: str = "") -> T:
        """Take a step of the ledger and update ``active/``, in one crossing to the ledger's thread.

        Args:
            step: the step.
            station: the station of a site whose keys alone it changes; then only its files are looked at.
        """
        stations = frozenset({station}) if station else None

        def both(ledger: Ledger) -> tuple[T, list[Path] | LedgerError]:
            return step(ledger), self._show(ledger, stations)

        result, shown = await self.ledger(both)
        self._on_change()
        self._tell(shown)
        return result

    async def show_active(self) -> None:
        """Make the files under ``active/`` match the ledger. Retried with every sweep.

        In a shard of a site those of stations whose keys changed since the last call; at first all, in parts, so that
        requests get in between.
        """
        if self.ledger.local:
            await self.change(lambda _: None)
            return
        first = self._shown is None
        changed, self._shown = await self.ledger(lambda ledger: ledger.keys.changed_stations(self._shown))
        self._unshown |= changed
        if first:  # files that a daemon which was killed left behind
            self._unshown |= await self.ledger(self._left_behind)
        while self._unshown:
            part = frozenset(islice(self._unshown, _PART))
            if not self._tell(await self.ledger(self._show, part)):
                return
            self._unshown -= part
        if changed:
            self._on_change()

    def _left_behind(self, ledger: Ledger) -> set[str]:
        return {station for station in self._active.stations() if ledger.database.owns(station)}

    def _tell(self, shown: list[Path] | LedgerError) -> bool:
        """Log what was written, and return whether all of it was."""
        if isinstance(shown, LedgerError):
            self.counters.not_shown.add(shown.reason)
            log.error("%s", shown, extra={"reason": shown.reason})
            return False
        for path in shown:
            log.info("written", extra={"file": str(path)})
        return True

    def _show(self, ledger: Ledger, stations: frozenset[str] | None) -> list[Path] | LedgerError:
        """Write the files of some stations, or of all; return the error if they cannot be: the step is taken anyway."""
        try:
            if stations is None:
                return self._active.sync(ledger.keys.active_files, owns=ledger.database.owns)

            def wanted() -> dict[str, bytes]:
                return {name: file for one in stations for name, file in ledger.keys.active_files(one).items()}

            return self._active.sync(wanted, owns=stations.__contains__)
        except LedgerError as error:
            return error

    def destroy_in_device(self, reference: KeyRef) -> None:
        """Have the device destroy a key that is destroyed in the ledger, when it is idle."""
        try:
            store = self.keystores.holding(reference)
        except KeyStoreError as error:
            if reference.scheme in SCHEMES and SCHEMES[reference.scheme].resident:
                about = {"key_id": reference.key_id, "reason": error.reason}
                log.warning("destroyed key still in its device: %s", error, extra=about)
            return
        done = store.thread.submit(
            lambda store: store.destroy(reference), timeout=PROOF_DEADLINE, turn=Turn.SPARE, task=Task.DESTROY
        )
        done.add_done_callback(partial(_tell_if_left, reference.key_id))


def _tell_if_left(key_id: str, done: Future[None]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        log.warning("the key store may still hold a destroyed key: %s", error, extra={"key_id": key_id})
