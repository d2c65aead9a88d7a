"""What becomes of a key after its CSR was answered: which key a status means, proof, activation, expiry, destruction.

The ledger is the truth. Every step is one transaction there; the files under ``active/`` are made to show it after the
step, and again at every start. So a loss of power at any moment leaves either the state before or the state after, and
at most a file that the next start puts right.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Final

from stationkey.config.settings import Terms
from stationkey.contract.messages import CertificateInstallationStatus
from stationkey.contract.profiles import PROFILES, CertificateProfile, CertificateType
from stationkey.errors import KeyStoreError, LedgerError, Scope, StationKeyError
from stationkey.keystore import KeyRef, KeyStore, check_key
from stationkey.keystore.worker import KeyStoreThread, Task, Turn, on_keystore
from stationkey.ledger import KeyRecord
from stationkey.ledger.lifecycle import IllegalTransition, KeyEvent
from stationkey.ledger.worker import LedgerThread
from stationkey.service.active_files import ActiveDirectory
from stationkey.service.matching import KeyFinder
from stationkey.service.running_time import RunningTime
from stationkey.system.backoff import Backoff
from stationkey.system.counters import Counters
from stationkey.x509.certificate import Chain, Expected, differences, prove

log = logging.getLogger(__name__)

SWEEP: Final = 60.0
"""Seconds between two looks at what is due; also the most running time that a loss of power takes back."""
PROOF_DEADLINE: Final = 30.0
"""Seconds for a key to be loaded and to sign."""
RETRY_FIRST: Final = 1.0
RETRY_LAST: Final = 60.0
"""Seconds between tries at a status that needs a TPM which is away; doubled in between."""
MAX_WAITING: Final = 16
"""How many of them wait at a time: they must not take the places of requests."""
PATIENCE: Final = 20.0
"""Seconds that more than those wait where nothing is away, but each takes long: a certificate directory filled to its
bounds, a slow TPM. A burst of statuses that is honest is through by then."""


class KeyCustody:
    """Keeps the keys of one ledger and one key store through the rest of their lives.

    Args:
        keystore: the key store's thread.
        ledger: the ledger's.
        state_dir: where ``active/`` is.
        running: the running time.
        terms: how long, how many.
        profiles: of each certificate type, overrides included.
        certificate_dir: where Josev puts the certificates it installs, or None.
        clock: Unix time in seconds.
        counters: outcomes are counted here.

    Attributes:
        on_change: called when keys may have become active, or may have ended.
    """

    def __init__(
        self,
        keystore: KeyStoreThread,
        ledger: LedgerThread,
        *,
        state_dir: Path,
        running: RunningTime,
        terms: Terms | None = None,
        profiles: Mapping[CertificateType, CertificateProfile] = PROFILES,
        certificate_dir: Path | None = None,
        clock: Callable[[], float] = time.time,
        counters: Counters | None = None,
    ) -> None:
        self._keystore = keystore
        self._ledger = ledger
        self._active = ActiveDirectory(state_dir)
        self._running = running
        self._terms = terms or Terms()
        self._profiles = profiles
        self._finder = KeyFinder(self._active.path, certificate_dir)
        self._clock = clock
        self._counters = counters or Counters()
        self._one_at_a_time = asyncio.Lock()
        self._in_order = asyncio.Lock()
        self._waiting = 0
        self._trouble: StationKeyError | None = None
        self._crowded = False
        self.on_change: Callable[[], None] = lambda: None

    # A status.

    async def note_status(self, status: CertificateInstallationStatus) -> None:
        """Take a status to the key that it means. What cannot be done is logged and counted, never guessed.

        While the TPM is away or the disk is full the status waits, and those that come after it wait for their turn:
        ``deleted`` must not overtake the ``installed`` before it. None is acknowledged to the broker until it was dealt
        with. Where `MAX_WAITING` of them wait, the next ones give up: at once where something is away, else after
        `PATIENCE`, and then at once until none waits any more.
        """
        beyond = self._waiting >= MAX_WAITING
        if beyond and (self._trouble is not None or self._crowded):
            self.refuse(status, self._trouble or _crowd())
            return
        self._waiting += 1
        try:
            await self._take_turn(PATIENCE if beyond else None)
            try:
                await self._settle(status, _about(status))
            finally:
                self._in_order.release()
        except StationKeyError as error:
            self.refuse(status, error)
        finally:
            self._waiting -= 1
            self._crowded = self._crowded and self._waiting > 0

    async def _take_turn(self, patience: float | None) -> None:
        """Wait until the statuses before this one were dealt with; to be released afterwards.

        Raises:
            StationKeyError: that took longer than `patience` seconds.
        """
        try:
            async with asyncio.timeout(patience):
                await self._in_order.acquire()
        except TimeoutError:
            self._crowded = True
            raise self._trouble or _crowd() from None

    async def _settle(self, status: CertificateInstallationStatus, about: Mapping[str, object]) -> None:
        """Do what a status says, as soon as key store and ledger are there for it."""
        backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        try:
            while True:
                try:
                    async with self._one_at_a_time:
                        await self._note(status, about)
                    return
                except (KeyStoreError, LedgerError) as error:
                    if not error.transient:
                        raise
                    self._trouble = error
                    delay = backoff.next()
                    log.warning("%s; trying again in %g s", error, delay, extra={**about, "reason": error.reason})
                await asyncio.sleep(delay)
        finally:
            self._trouble = None

    def refuse(self, status: CertificateInstallationStatus, error: StationKeyError) -> None:
        """Log and count a status that changes nothing."""
        about = _about(status)
        self._counters.statuses.add(status.data.status, "refused", error.reason)
        log.error("'%s' changes nothing: %s", status.data.status, error, extra={**about, "reason": error.reason})

    async def _note(self, status: CertificateInstallationStatus, about: Mapping[str, object]) -> None:
        if await self._ledger(lambda ledger: ledger.transitions.seen(status.id)):
            log.info("'%s' was said before", status.data.status, extra=dict(about))
            self._counters.statuses.add(status.data.status, "repeated", "")
            return
        match status.data.status:
            case "installed":
                await self._installed(status, about)
            case "failed_installation":
                await self._failed(status, about)
            case "deleted":
                await self._deleted(status, about)

    async def _installed(self, status: CertificateInstallationStatus, about: Mapping[str, object]) -> None:
        found = await self._ledger(self._finder.installed, status)
        if found is None:
            log.info("the certificate's key is active already", extra=dict(about))
            self._counters.statuses.add("installed", "repeated", "")
            return
        key, chain = found.key, found.chain
        await self._prove(key, chain)
        if chain is not None:
            self._compare(key, chain, about)
        replaced = await self._ledger(
            lambda ledger: ledger.transitions.activate(
                key.key_id,
                chain=None if chain is None else chain.pem(),
                not_after=None if chain is None else chain.not_after,
                reason="Josev installed its certificate",
                now=self._now(),
                grace_due=self._running.now() + self._terms.grace,
                message_id=status.id,
                limit=self._terms.bounds.active_limit,
            )
        )
        self._counters.statuses.add("installed", "applied", "")
        log.info("key active", extra={**about, "key_id": key.key_id, "replaced": ",".join(replaced) or "-"})
        await self.show_active()

    async def _failed(self, status: CertificateInstallationStatus, about: Mapping[str, object]) -> None:
        key = await self._ledger(self._finder.failed, status)
        if key.failed:
            log.info("the failure was told before", extra={**about, "key_id": key.key_id})
            self._counters.statuses.add("failed_installation", "repeated", "")
            return
        await self._ledger(
            lambda ledger: ledger.transitions.apply(
                key.key_id,
                KeyEvent.INSTALLATION_FAILED,
                reason="Josev could not install its certificate",
                now=self._now(),
                due=min(key.due or self._running.now() + self._terms.failed, self._running.now() + self._terms.failed),
                message_id=status.id,
            )
        )
        self._counters.statuses.add("failed_installation", "applied", "")
        log.warning("installation failed", extra={**about, "key_id": key.key_id})

    async def _deleted(self, status: CertificateInstallationStatus, about: Mapping[str, object]) -> None:
        key = await self._ledger(self._finder.deleted, status)
        await self._destroy(key.key_id, KeyEvent.DELETED, "Josev deleted its certificate", status.id)
        self._counters.statuses.add("deleted", "applied", "")
        log.info("key destroyed", extra={**about, "key_id": key.key_id})
        await self.show_active()

    # Before "active".

    async def _prove(self, key: KeyRecord, chain: Chain | None) -> None:
        """Show that key and certificate work together; without a certificate, that the key works."""
        reference = await self._key_ref(key.key_id)

        def sign(store: KeyStore) -> None:
            with store.signer(reference) as private_key:
                public_key = store.public_key(reference) if chain is None else chain.leaf.public_key()
                prove(private_key, public_key, secrets.token_bytes(32))

        await on_keystore(self._keystore, sign, timeout=PROOF_DEADLINE, task=Task.PROOF)

    def _compare(self, key: KeyRecord, chain: Chain, about: Mapping[str, object]) -> None:
        expected = Expected(
            profile=self._profiles[CertificateType(key.certificate_type)],
            common_name=key.common_name,
            organization_name=key.organization_name,
            country_name=key.country_name,
            public=key.public,
        )
        for difference in differences(chain, expected, now=self._clock()):
            self._counters.differences += 1
            log.warning(
                "the certificate differs from its profile: %s", difference, extra={**about, "key_id": key.key_id}
            )

    async def _key_ref(self, key_id: str) -> KeyRef:
        reference = await self._ledger(lambda ledger: ledger.keys.ref(key_id))
        if reference is None:
            raise LedgerError(f"key {key_id} has no private part any more", reason="key_destroyed", scope=Scope.KEY)
        return reference

    # Destruction, expiry, start.

    async def _destroy(self, key_id: str, event: KeyEvent, reason: str, message_id: str | None = None) -> None:
        """Destroy a key, for good on disk; and in the device, where there is anything of it, when that has time."""
        reference = await self._ledger(lambda ledger: ledger.keys.ref(key_id))
        await self._ledger(
            lambda ledger: ledger.transitions.apply(
                key_id, event, reason=reason, now=self._now(), message_id=message_id
            )
        )
        if reference is not None:
            in_device = self._keystore.submit(
                lambda store: store.destroy(reference), timeout=PROOF_DEADLINE, turn=Turn.SPARE, task=Task.DESTROY
            )
            in_device.add_done_callback(partial(_tell_if_left, key_id))

    async def show_active(self) -> None:
        """Make the files under ``active/`` show what the ledger says. Tried again with every sweep."""
        self.on_change()
        try:
            written = await self._ledger(lambda ledger: self._active.sync(ledger.keys.active_files))
        except LedgerError as error:
            self._counters.not_shown.add(error.reason)
            log.error("%s", error, extra={"reason": error.reason})
            return
        for path in written:
            log.info("written", extra={"file": str(path)})

    async def sweep(self) -> None:
        """End what is due, forget what is old, and write the running time down.

        In steps of a few milliseconds, however much there is: a request that comes meanwhile waits for one of them.
        """
        running = self._running.now()
        await self._ledger(lambda ledger: ledger.retention.write_running(running))
        await self._ledger(
            lambda ledger: ledger.retention.adopt(
                pending_due=running + self._terms.pending, grace_due=running + self._terms.grace
            )
        )
        for key_id in await self._ledger(lambda ledger: ledger.retention.due(running)):
            async with self._one_at_a_time:
                await self._expire(key_id, running)
        while await self._ledger(
            lambda ledger: ledger.retention.forget(
                keep=self._terms.bounds.history_limit, answered_before=running - self._terms.answers
            )
        ):
            pass
        await self.show_active()
        # Last, because they need the most room: a full disk must not keep a file in active/ that has to go.
        await self._ledger(lambda ledger: ledger.retention.wipe())
        while await self._ledger(lambda ledger: ledger.database.shrink()):
            pass
        await self._ledger(lambda ledger: ledger.database.checkpoint())

    async def _expire(self, key_id: str, running: int) -> None:
        """End a key, if a status or an operator's command has not been faster."""
        if not await self._ledger(lambda ledger: ledger.retention.is_due(key_id, running)):
            return
        try:
            await self._destroy(key_id, KeyEvent.EXPIRED, "its time was over")
        except IllegalTransition as error:
            log.info("%s", error, extra={"key_id": key_id, "reason": error.reason})
            return
        log.info("key expired", extra={"key_id": key_id})

    async def run(self) -> None:
        """Sweep now and then until cancelled. A full disk or a TPM that is away is logged, and tried again."""
        while True:
            try:
                await self.sweep()
                due = await self._ledger(lambda ledger: ledger.retention.next_due())
            except StationKeyError as error:
                log.error("%s", error, extra={"reason": error.reason})
                due = None
            left = SWEEP if due is None else (due - self._running.now()) / 1000
            await asyncio.sleep(min(SWEEP, max(left, 0.05)))

    async def tell_unusable(self) -> None:
        """Say which keys the present key store can no longer use: another TPM, or one that was cleared.

        One key at a time, so that a request that comes meanwhile waits for no more than one. While the TPM is away,
        this waits for it.
        """
        try:
            for key in await self._ledger(lambda ledger: ledger.keys.usable()):
                if not key.has_owner:
                    continue  # made ahead: see `KeyPool`
                backoff = Backoff(RETRY_FIRST, RETRY_LAST)
                while not await self._tell_if_unusable(key):  # noqa: ASYNC110 - nobody tells when the key store is back
                    await asyncio.sleep(backoff.next())
        except LedgerError as error:
            log.error("not every key was tried: %s", error, extra={"reason": error.reason})

    async def _tell_if_unusable(self, key: KeyRecord) -> bool:
        """Try a key; False where the key store is away, so that nobody knows."""
        reference = await self._ledger(lambda ledger: ledger.keys.ref(key.key_id))
        if reference is None:
            return True
        try:
            await on_keystore(self._keystore, partial(check_key, key=reference), timeout=PROOF_DEADLINE, task=Task.LOAD)
        except KeyStoreError as error:
            if error.transient:
                return False
            self._counters.unusable += 1
            log.error(
                "this key cannot be used: %s",
                error,
                extra={
                    "key_id": key.key_id,
                    "state": str(key.state),
                    "certificate_type": key.certificate_type,
                    "reason": error.reason,
                },
            )
        return True

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _about(status: CertificateInstallationStatus) -> dict[str, object]:
    """What a log line says of a status."""
    return {"message_id": status.id, "certificate_type": str(status.data.certificate_type)}


def _crowd() -> StationKeyError:
    return StationKeyError(
        f"{MAX_WAITING} statuses wait already, and each takes long",
        reason="statuses_crowded",
        hint="who sends so many, and what is in [josev] certificate_dir?",
        transient=True,
    )


def _tell_if_left(key_id: str, done: Future[None]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        log.warning("the key store may still hold a destroyed key: %s", error, extra={"key_id": key_id})
