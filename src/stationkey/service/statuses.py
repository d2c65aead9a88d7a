"""Apply a ``certificate_installation_status``: find its key, prove it, take one step of the ledger.

Each step runs on its own thread: Josev's files are read on theirs, the key is found on the ledger's, signs on the key
store's, and is activated on the ledger's, with its file under ``active/``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from typing import Final
from weakref import WeakValueDictionary

from msgspec import Struct, field

from stationkey.config.settings import DAY, Bounds, Terms
from stationkey.contract.messages import CertificateInstallationStatus
from stationkey.contract.profiles import PROFILES, CertificateProfile, CertificateType
from stationkey.errors import KeyStoreError, LedgerError, Scope, StationKeyError
from stationkey.keystore import KeyRef, KeyStore
from stationkey.keystore.worker import Task, on_keystore
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.ledger.messages import STATUS
from stationkey.mqtt.bounds import MAX_IN_HAND, STATUS_ROOM
from stationkey.service.custody import PROOF_DEADLINE, Custody
from stationkey.service.josev_files import JosevFiles, Look
from stationkey.service.matching import Found, KeyFinder, Repeated
from stationkey.service.rejections import Rejections
from stationkey.service.shares import Shares
from stationkey.system.backoff import Backoff
from stationkey.x509.certificate import Chain, Expected, differences, oddities, prove, read_chain
from stationkey.x509.path import root_of

log = logging.getLogger(__name__)

RETRY_FIRST: Final = 1.0
RETRY_LAST: Final = 60.0
"""Seconds between attempts at a status while the TPM is away; doubled each time."""
MAX_WAITING: Final = 16
"""Statuses that may wait at a time: they must not take the places of requests."""
FEW_STATUSES: Final = 8
"""Statuses in flight that a station of a site may have however many others do: more than one renewal of each type."""
MAX_COPIES: Final = 1000
"""Statuses of which a copy is expected at a time; the oldest is forgotten first."""
PATIENCE: Final = 20.0
"""Seconds that further statuses wait if nothing is away but each takes long: a full certificate directory, a slow TPM.
A normal burst of statuses is done by then."""

UNKNOWN_LIFE: Final = 365 * DAY
"""Assumed validity of an unreadable certificate, in milliseconds."""


class _Line(Struct, weakref=True, eq=False):
    """The statuses of one station about the keys of one key store, which wait in order.

    Attributes:
        turn: held by the status that is handled.
        waiting: how many there are.
        trouble: what the first of them waits for.
        crowded: whether one was given up because each takes long.
    """

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    trouble: StationKeyError | None = None
    crowded: bool = False


class Statuses:
    """Applies each status to its key.

    Args:
        custody: the keys.
        files: reads Josev's files.
        finder: finds the key of a status.
        terms: periods.
        bounds: limits, by certificate type.
        room: statuses of all stations of a site that may be in flight.
        rejections: records the statuses that change nothing.
        profiles: of each certificate type, overrides included.
    """

    def __init__(
        self,
        custody: Custody,
        files: JosevFiles,
        finder: KeyFinder,
        *,
        terms: Terms,
        bounds: Mapping[CertificateType, Bounds],
        rejections: Rejections,
        room: int = STATUS_ROOM * MAX_IN_HAND,
        profiles: Mapping[CertificateType, CertificateProfile] = PROFILES,
    ) -> None:
        self._custody = custody
        self._rejections = rejections
        self._files = files
        self._finder = finder
        self._terms = terms
        self._bounds = bounds
        self._profiles = profiles
        self._lines: WeakValueDictionary[tuple[str, str], _Line] = WeakValueDictionary()  # those in use
        self._shares = Shares(room, few=FEW_STATUSES)
        self._copies: dict[tuple[str, str], None] = {}  # in the order of arrival

    async def note_status(self, status: CertificateInstallationStatus, *, station: str = "") -> None:
        """Apply a status to its key. A status that cannot be applied is logged and counted; no key is guessed.

        While the TPM is away or the disk is full, the status and later ones wait in order: ``deleted`` must not
        overtake ``installed``. A status is acknowledged to the broker once it is handled. If `MAX_WAITING` of them
        wait, further ones are given up: at once if something is away, else after `PATIENCE`, and then at once until
        none waits. Certificate types whose keys are made in different key stores do not wait for each other, nor do
        stations. In a site, what a station sends beyond its share of the room is given up at once.
        """
        if self._copies and (station, status.id) in self._copies:
            del self._copies[station, status.id]
            log.info("'%s' was received before", status.data.status, extra=_about(status, station))
            self._count(status, "repeated")
            return
        if not self._shares.has_room(station):
            self.refuse(status, _crowd(), station=station)
            return
        store = self._custody.keystores.making(status.data.certificate_type)
        line = self._lines.setdefault((station, store.name), _Line())
        with self._shares.place(station):
            await self._queue(status, station, line)

    def expect_copy(self, status: CertificateInstallationStatus, *, station: str = "") -> None:
        """Pass over the next status of a station with this id, whatever became of this one.

        One that changed nothing could change something the next time: a ``deleted`` from before the station had a key
        would destroy the one that it has now.
        """
        if len(self._copies) >= MAX_COPIES:
            del self._copies[next(iter(self._copies))]
        self._copies[station, status.id] = None

    async def _queue(self, status: CertificateInstallationStatus, station: str, line: _Line) -> None:
        beyond = line.waiting >= MAX_WAITING
        if beyond and (line.trouble is not None or line.crowded):
            self.refuse(status, line.trouble or _crowd(), station=station)
            return
        line.waiting += 1
        try:
            await self._take_turn(line, PATIENCE if beyond else None)
            try:
                await self._settle(status, station, line)
            finally:
                line.turn.release()
        except StationKeyError as error:
            self.refuse(status, error, station=station)
        finally:
            line.waiting -= 1
            line.crowded = line.crowded and line.waiting > 0

    async def _take_turn(self, line: _Line, patience: float | None) -> None:
        """Wait until earlier statuses are handled; the caller releases the turn.

        Raises:
            StationKeyError: that took longer than `patience` seconds.
        """
        try:
            async with asyncio.timeout(patience):
                await line.turn.acquire()
        except TimeoutError:
            line.crowded = True
            raise line.trouble or _crowd() from None

    async def _settle(self, status: CertificateInstallationStatus, station: str, line: _Line) -> None:
        """Apply a status as soon as key store and ledger are available."""
        about = _about(status, station)
        backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        try:
            while True:
                try:
                    async with self._custody.one_at_a_time(status.data.certificate_type, station):
                        await self._note(status, station, about)
                    return
                except (KeyStoreError, LedgerError) as error:
                    if not error.transient:
                        raise
                    line.trouble = error
                    delay = backoff.next()
                    log.warning("%s; trying again in %g s", error, delay, extra={**about, "reason": error.reason})
                await asyncio.sleep(delay)
        finally:
            line.trouble = None

    def refuse(self, status: CertificateInstallationStatus, error: StationKeyError, *, station: str = "") -> None:
        """Log, count and record a status that changes nothing."""
        about = _about(status, station)
        self._count(status, "refused", error.reason)
        log.error("ignoring status '%s': %s", status.data.status, error, extra={**about, "reason": error.reason})
        self._rejections.note(status.id, error, now=self._custody.now(), name=STATUS, station=station)

    async def _note(self, status: CertificateInstallationStatus, station: str, about: Mapping[str, object]) -> None:
        look = await self._files.look(status, station)
        try:
            match status.data.status:
                case "installed":
                    await self._installed(status, station, look, about)
                case "failed_installation":
                    await self._failed(status, station, look, about)
                case "deleted":
                    await self._deleted(status, station, look, about)
        except Repeated as repeated:
            log.info("%s", repeated, extra={**about, **({"key_id": repeated.key_id} if repeated.key_id else {})})
            self._count(status, "repeated")
        else:
            self._count(status, "applied")

    def _count(self, status: CertificateInstallationStatus, outcome: str, reason: str = "") -> None:
        self._custody.counters.statuses.add(status.data.status, outcome, reason)

    async def _installed(
        self, status: CertificateInstallationStatus, station: str, look: Look, about: Mapping[str, object]
    ) -> None:
        def find(ledger: Ledger) -> tuple[Found, KeyRef]:
            _refuse_repeat(ledger, status, station)
            found = self._finder.installed(ledger, status, look, station=station)
            reference = ledger.keys.ref(found.key.key_id)
            if reference is None:
                raise LedgerError(
                    f"key {found.key.key_id} has no private part any more", reason="key_destroyed", scope=Scope.KEY
                )
            return found, reference

        found, reference = await self._custody.ledger(find)
        key, chain = found.key, found.chain
        if key.state is KeyState.DEACTIVATED:
            await self._prove(reference, chain or read_chain((key.chain or "").encode()))
            await self._restore(key, status, about)
            return
        await self._prove(reference, chain)
        if chain is not None:
            self._compare(key, chain, about)
            chain, missing = await self._files.complete(chain, look)
            if missing:
                told = _incomplete(missing)
                log.warning("%s", told, extra={**about, "key_id": key.key_id, "reason": told.reason})
        replaced = await self._custody.change(
            lambda ledger: ledger.transitions.activate(
                key.key_id,
                chain=None if chain is None else chain.pem(),
                not_after=None if chain is None else chain.not_after,
                root=root_of(chain) if chain is not None and self._terms.bounds.root_limit > 1 else "",
                useful_until=self._custody.running.now() + _life(chain),
                reason="Josev installed its certificate",
                now=self._custody.now(),
                grace_due=self._custody.running.now() + self._terms.grace,
                message_id=status.id,
                bounds=self._bounds[status.data.certificate_type],
            ),
            key.station,
        )
        log.info("key active", extra={**about, "key_id": key.key_id, "replaced": ",".join(replaced) or "-"})

    async def _restore(
        self, key: KeyRecord, status: CertificateInstallationStatus, about: Mapping[str, object]
    ) -> None:
        replaced = await self._custody.change(
            lambda ledger: ledger.transitions.restore(
                key.key_id,
                reason="Josev went back to its certificate",
                now=self._custody.now(),
                grace_due=self._custody.running.now() + self._terms.grace,
                message_id=status.id,
                bounds=self._bounds[status.data.certificate_type],
            ),
            key.station,
        )
        self._custody.counters.restorations += 1
        log.warning("key restored", extra={**about, "key_id": key.key_id, "replaced": ",".join(replaced) or "-"})

    async def _failed(
        self, status: CertificateInstallationStatus, station: str, look: Look, about: Mapping[str, object]
    ) -> None:
        def shorten(ledger: Ledger) -> KeyRecord:
            _refuse_repeat(ledger, status, station)
            key = self._finder.failed(ledger, status, look, station=station)
            soon = self._custody.running.now() + self._terms.failed
            ledger.transitions.apply(
                key.key_id,
                KeyEvent.INSTALLATION_FAILED,
                reason="Josev could not install its certificate",
                now=self._custody.now(),
                due=min(key.due or soon, soon),
                message_id=status.id,
            )
            return key

        key = await self._custody.ledger(shorten)
        log.warning("installation failed", extra={**about, "key_id": key.key_id})

    async def _deleted(
        self, status: CertificateInstallationStatus, station: str, look: Look, about: Mapping[str, object]
    ) -> None:
        def destroy(ledger: Ledger) -> tuple[KeyRecord, KeyRef | None]:
            _refuse_repeat(ledger, status, station)
            key = self._finder.deleted(ledger, status, look, station=station)
            reference = ledger.keys.ref(key.key_id)
            ledger.transitions.apply(
                key.key_id,
                KeyEvent.DELETED,
                reason="Josev deleted its certificate",
                now=self._custody.now(),
                message_id=status.id,
            )
            return key, reference

        key, reference = await self._custody.change(destroy, station)
        if reference is not None:
            self._custody.destroy_in_device(reference)
        log.info("key destroyed", extra={**about, "key_id": key.key_id})

    async def _prove(self, reference: KeyRef, chain: Chain | None) -> None:
        """Have the key sign, and verify the signature with the certificate, if there is one."""

        def sign(opened: KeyStore) -> None:
            with opened.signer(reference) as private_key:
                public_key = opened.public_key(reference) if chain is None else chain.leaf.public_key()
                prove(private_key, public_key, secrets.token_bytes(32))

        store = self._custody.keystores.holding(reference)
        await on_keystore(store.thread, sign, timeout=PROOF_DEADLINE, task=Task.PROOF)

    def _compare(self, key: KeyRecord, chain: Chain, about: Mapping[str, object]) -> None:
        expected = Expected(
            profile=self._profiles[CertificateType(key.certificate_type)],
            common_name=key.common_name,
            organization_name=key.organization_name,
            country_name=key.country_name,
            public=key.public,
        )
        for difference in differences(chain, expected, now=self._custody.now() / 1000):
            self._custody.counters.differences += 1
            log.warning(
                "the certificate differs from its profile: %s", difference, extra={**about, "key_id": key.key_id}
            )
        for oddity in oddities(chain):
            log.warning("certificate not to RFC 5280: %s", oddity, extra={**about, "key_id": key.key_id})


def _life(chain: Chain | None) -> int:
    """Return the whole validity period of a certificate, in milliseconds.

    Once the daemon has run that long since the installation, the certificate has expired, whatever the clock says.
    """
    return UNKNOWN_LIFE if chain is None else max(0, chain.not_after - chain.not_before) * 1000


def _refuse_repeat(ledger: Ledger, status: CertificateInstallationStatus, station: str) -> None:
    """Raise `Repeated` if the station's message is on record."""
    if ledger.transitions.seen(status.id, station=station):
        raise Repeated(f"'{status.data.status}' was received before")


def _about(status: CertificateInstallationStatus, station: str) -> dict[str, object]:
    """Return the fields of a log line about a status."""
    about: dict[str, object] = {"message_id": status.id, "certificate_type": str(status.data.certificate_type)}
    return {**about, "station": station} if station else about


def _incomplete(missing: str) -> StationKeyError:
    return StationKeyError(
        f"the chain is incomplete: the certificate of its issuer {missing} is missing",
        reason="issuer_missing",
        hint="TLS peers need it: have Josev install the Sub-CAs too, in [josev] certificate_dir",
    )


def _crowd() -> StationKeyError:
    return StationKeyError(
        f"{MAX_WAITING} slow statuses wait already",
        reason="statuses_crowded",
        hint="which client sends so many? what is in [josev] certificate_dir?",
        transient=True,
    )
