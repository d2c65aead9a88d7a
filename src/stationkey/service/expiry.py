"""Expire keys, and delete old records."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from functools import partial
from typing import Final

from stationkey.config.settings import Terms
from stationkey.errors import KeyStoreError, LedgerError, StationKeyError
from stationkey.keystore import KeyRef, check_key
from stationkey.keystore.worker import Task, on_keystore
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import IllegalTransition, KeyEvent
from stationkey.service.custody import PROOF_DEADLINE, Custody
from stationkey.system.backoff import Backoff

log = logging.getLogger(__name__)

SWEEP: Final = 60.0
"""Seconds between two sweeps."""
SAVE: Final = 14 * 60_000
"""Milliseconds of running time that are not saved; with a sweep more, what a loss of power may lose. To save it more
often would write to the flash of a station that does nothing."""
RETRY_FIRST: Final = 1.0
RETRY_LAST: Final = 60.0
"""Seconds between attempts at a key while the TPM is away; doubled each time."""


class Expiry:
    """Ends keys and records when they are due.

    Args:
        custody: the keys.
        terms: periods and limits.
    """

    def __init__(self, custody: Custody, terms: Terms) -> None:
        self._custody = custody
        self._terms = terms
        self._saved = custody.running.now()

    async def sweep(self) -> None:
        """Expire keys, delete old records, and save the running time.

        In steps of a few milliseconds: a request that comes meanwhile waits for one of them.
        """
        running = self._custody.running.now()
        if running - self._saved >= SAVE:
            await self._custody.ledger(lambda ledger: ledger.retention.write_running(running))
            self._saved = running
        await self._custody.ledger(
            lambda ledger: ledger.retention.adopt(
                pending_due=running + self._terms.pending, grace_due=running + self._terms.grace
            )
        )
        if crowded := await self._custody.ledger(lambda ledger: ledger.retention.crowd_out(running)):
            log.warning("too many pending keys of new stations: the oldest expire", extra={"keys": crowded})
        due = await self._custody.ledger(lambda ledger: ledger.retention.due(running))
        locks = [
            (self._custody.one_at_a_time(certificate_type, station), key_id)
            for key_id, certificate_type, station in due
        ]
        for lock, key_id in sorted(locks, key=lambda one: one[0].locked()):  # last what a proof in a frozen store holds
            async with lock:
                await self._expire(key_id, running)
        while await self._custody.ledger(
            lambda ledger: ledger.retention.forget(
                keep=self._terms.bounds.history_limit, answered_before=running - self._terms.answers
            )
        ):
            pass
        await self._custody.show_active()
        # Last, because they need the most room: a full disk must not keep a file in active/ that must be removed.
        await self._custody.ledger(lambda ledger: ledger.retention.wipe())
        while await self._custody.ledger(lambda ledger: ledger.database.shrink()):
            pass
        await self._custody.ledger(lambda ledger: ledger.database.checkpoint())

    async def _expire(self, key_id: str, running: int) -> None:
        """Expire a key, unless a status or an operator's command was faster."""

        def end(ledger: Ledger) -> tuple[bool, KeyRef | None]:
            if not ledger.retention.is_due(key_id, running):
                return False, None
            reference = ledger.keys.ref(key_id)
            ledger.transitions.apply(key_id, KeyEvent.EXPIRED, reason="its period has ended", now=self._custody.now())
            return True, reference

        try:
            ended, reference = await self._custody.ledger(end)
        except IllegalTransition as error:
            log.info("%s", error, extra={"key_id": key_id, "reason": error.reason})
            return
        if reference is not None:
            self._custody.destroy_in_device(reference)
        if ended:
            log.info("key expired", extra={"key_id": key_id})

    async def run(self) -> None:
        """Sweep periodically until cancelled. A full disk or an absent TPM is logged and retried."""
        while True:
            try:
                await self.sweep()
                due = await self._custody.ledger(lambda ledger: ledger.retention.next_due())
            except StationKeyError as error:
                log.error("%s", error, extra={"reason": error.reason})
                due = None
            left = SWEEP if due is None else (due - self._custody.running.now()) / 1000
            await asyncio.sleep(min(SWEEP, max(left, 0.05)))

    async def tell_unusable(self) -> None:
        """Log the keys that the key store cannot use, because it is another TPM or was cleared.

        One key of each kind of store at a time, so that a request waits for at most one. Waits while the store is away.
        """
        keys: defaultdict[str, list[KeyRecord]] = defaultdict(list)
        try:
            for key in await self._custody.ledger(lambda ledger: ledger.keys.usable()):
                if key.has_owner:  # else made ahead: see `KeyPool`
                    keys[key.scheme].append(key)
            await asyncio.gather(*(self._tell_unusable(kind) for kind in keys.values()))
        except LedgerError as error:
            log.error("key check incomplete: %s", error, extra={"reason": error.reason})

    async def _tell_unusable(self, keys: list[KeyRecord]) -> None:
        for key in keys:
            backoff = Backoff(RETRY_FIRST, RETRY_LAST)
            while not await self._tell_if_unusable(key):  # noqa: ASYNC110 - no event says when the key store is back
                await asyncio.sleep(backoff.next())

    async def _tell_if_unusable(self, key: KeyRecord) -> bool:
        """Try a key and log if it is unusable; return False if the key store is away."""
        reference = await self._custody.ledger(lambda ledger: ledger.keys.ref(key.key_id))
        if reference is None:
            return True
        try:
            store = self._custody.keystores.holding(reference)
            await on_keystore(store.thread, partial(check_key, key=reference), timeout=PROOF_DEADLINE, task=Task.LOAD)
        except KeyStoreError as error:
            if error.transient:
                return False
            self._custody.counters.unusable += 1
            self._custody.counters.unconfigured += error.reason == "keystore_unconfigured"
            log.error(
                "this key cannot be used: %s",
                error,
                extra={
                    "key_id": key.key_id,
                    "state": str(key.state),
                    "certificate_type": key.certificate_type,
                    **({"station": key.station} if key.station else {}),
                    "reason": error.reason,
                },
            )
        return True
