"""Answer ``generate_csr``: find repeats, apply the policy, create key and CSR, record the answer.

`stationkey.service.statuses` handles the key afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stationkey.config.settings import PolicyTerms, PoolTerms, RenewalTerms, Terms
from stationkey.contract import messages
from stationkey.contract.messages import CertificateInstallationStatus, GenerateCsrRequest, GenerateCsrResponse
from stationkey.contract.profiles import PROFILES, CertificateProfile, CertificateType
from stationkey.errors import Fault, KeyStoreError, LedgerError, RequestRefused, Scope, ShardLost, StationKeyError
from stationkey.keystore import KeyRef, KeyStore
from stationkey.keystore.stores import KeyStores, Store
from stationkey.keystore.worker import Task, Turn, on_keystore, overdue
from stationkey.ledger import Answered, Figures, Ledger, content_digest
from stationkey.ledger.worker import LedgerThread
from stationkey.mqtt.bounds import STATUS_ROOM
from stationkey.service.active_files import ActiveDirectory
from stationkey.service.custody import Custody
from stationkey.service.expiry import Expiry
from stationkey.service.in_flight import InFlight
from stationkey.service.josev_files import JosevFiles
from stationkey.service.matching import KeyFinder
from stationkey.service.policy import Policy, is_rsa
from stationkey.service.pool import KeyPool
from stationkey.service.rejections import Rejections
from stationkey.service.renewal import RenewalWatch
from stationkey.service.running_time import RunningTime
from stationkey.service.seen_ids import SeenIds
from stationkey.service.shares import Turns
from stationkey.service.statuses import Statuses
from stationkey.system.counters import UNKNOWN, Counters
from stationkey.system.threads import Worker
from stationkey.x509.csr import Csr, check_recorded, check_signature, sign_csr, to_pem

if TYPE_CHECKING:
    from stationkey.ledger.answers import Crowded
    from stationkey.ledger.overview import Overview

log = logging.getLogger(__name__)

DEADLINE: Final = 30.0
"""Seconds within which a request for an EC key is accepted or rejected."""
RSA_DEADLINE: Final = 60.0
"""The same for RSA: a hardware TPM searches for primes for tens of seconds."""


class StationKeyService:
    """Answers requests with keys of the key stores, and records them in one ledger.

    In a site, each call names the station. Its keys, ids, allowances and places are its own.

    Args:
        keystores: the key stores. Not closed by this class.
        ledger: the ledger. Not closed by this class; no other code may use it while requests are answered.
        profiles: the profile of each certificate type, the operator's overrides included.
        policy: which requests are served, and how often; by default `PolicyTerms`.
        deadline: seconds allowed for a request, EC.
        rsa_deadline: seconds allowed for a request, RSA.
        terms: how long keys and records last, and how many there may be.
        pool: keys made ahead; by default none.
        renewal: when a certificate is due for renewal, and how often a hint is given.
        certificate_dir: where Josev puts the certificates that it installs, or None where that is not known; in a site,
            see `stationkey.service.josev_files.STATION`.
        clock: Unix time in seconds.
        on_change: called when keys may have become active, or may have ended.
        worker: makes the threads for the ledger and for Josev's files.
        counters: where outcomes are counted.

    Attributes:
        custody: shows the keys in use under ``active/``.
        expiry: ends keys; its `Expiry.run` sweeps.
        renewal: knows which certificates are due; its `RenewalWatch.run` looks.
        pools: the keys made ahead, by key store; filled while their `KeyPool.run` run.
        counters: outcomes of this run, by reason.
    """

    def __init__(
        self,
        keystores: KeyStores,
        ledger: Ledger,
        *,
        profiles: Mapping[CertificateType, CertificateProfile] = PROFILES,
        policy: Policy | None = None,
        deadline: float = DEADLINE,
        rsa_deadline: float = RSA_DEADLINE,
        terms: Terms | None = None,
        pool: PoolTerms | None = None,
        renewal: RenewalTerms | None = None,
        certificate_dir: Path | None = None,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[], None] = lambda: None,
        worker: type[Worker] = Worker,
        counters: Counters | None = None,
    ) -> None:
        self._keystores = keystores
        self._ledger = LedgerThread(ledger, worker=worker)
        self._terms = terms or Terms()
        self._bounds = {
            kind: self._terms.bounds.within(store.name, store.types) for store in keystores for kind in store.types
        }
        self._running = RunningTime(ledger.retention.running)
        self._profiles = profiles
        self._policy = policy or Policy(PolicyTerms(), profiles)
        self._deadline = deadline
        self._rsa_deadline = rsa_deadline
        self._clock = clock
        self._seen = SeenIds()
        self._knows_ids = False  # whether `_seen` has those of earlier runs, too
        self._in_flight = InFlight()
        self._turns = Turns()
        self._closed = False
        self.counters = counters or Counters()
        self._rejections = Rejections(self._ledger, self.counters.task_failures)
        active = ActiveDirectory(ledger.database.directory)
        self.custody = Custody(
            keystores,
            self._ledger,
            active,
            running=self._running,
            counters=self.counters,
            clock=clock,
            on_change=on_change,
        )
        self.expiry = Expiry(self.custody, self._terms)
        self.renewal = RenewalWatch(self.custody, renewal or RenewalTerms())
        self._josev_files = JosevFiles(active.path, certificate_dir, ledger.database.own_files(), worker=worker)
        self._statuses = Statuses(
            self.custody,
            self._josev_files,
            KeyFinder(active.path, roots=self._terms.bounds.root_limit > 1),
            terms=self._terms,
            bounds=self._bounds,
            profiles=profiles,
            rejections=self._rejections,
            room=STATUS_ROOM * self._policy.queue,
        )
        self.pools = {
            store: KeyPool(
                store,
                self._ledger,
                running=self._running.now,
                terms=pool or PoolTerms(rsa=0),
                patience=deadline,
                clock=clock,
            )
            for store in keystores
        }

    async def answer(
        self, request: GenerateCsrRequest, *, station: str = "", waited: float = 0.0
    ) -> GenerateCsrResponse:
        """Answer a request. An error is logged, recorded and ``rejected``.

        Args:
            request: the request.
            station: the station that it is from.
            waited: seconds since it arrived; they count against its deadline.

        Raises:
            ShardLost: another daemon answers it.
        """
        begun = time.monotonic() - waited
        until = self._until(request, waited)
        kind = request.data.certificate_type
        try:
            # A request with this id and other content may be in flight; the answer on record does not wait for it.
            contested = self._in_flight.is_contested(request, station=station)
            if contested and (answered := await self._on_record(request.id, station)) is not None:
                return self._repeat(request, station, answered)
            async with self._in_flight.turn(request, station=station):
                if (answered := await self._on_record(request.id, station)) is not None:
                    return self._repeat(request, station, answered)
                with self._policy.admitted(request, station) as remarks:
                    self._warn(request, station, remarks)
                    key, csr = await self._key_and_csr(request, station, until)
        except ShardLost:
            raise
        except StationKeyError as error:
            return await self.reject(request.id, error, station=station, certificate_type=kind)
        except Exception:
            log.exception("a fault of stationkey", extra={"request_id": request.id, **_of(station)})
            fault = StationKeyError("a fault of ours", reason="internal_error")
            return await self.reject(request.id, fault, station=station, certificate_type=kind)
        self.counters.requests.add(str(kind), "accepted", "")
        self.counters.answered(str(request.algorithm), time.monotonic() - begun)
        about = {"request_id": request.id, "key_id": key.key_id, **_of(station), **_about(request)}
        asyncio.get_running_loop().call_soon(partial(log.info, "accepted", extra=about))  # with the answer on its way
        return messages.accepted(request, csr)

    def is_surplus(self, request: GenerateCsrRequest, *, most: int, station: str = "") -> bool:
        """Return whether a request is a copy of one in flight, and `most` copies of its station wait already."""
        return self._in_flight.is_surplus(request, most=most, station=station)

    async def reject(
        self, request_id: str, error: StationKeyError, *, station: str = "", certificate_type: str = UNKNOWN
    ) -> GenerateCsrResponse:
        """Reject a request: log and record the reason; the requester gets ``rejected`` only.

        It is on disk soon after, or at `aclose`; the answer does not wait for that.
        """
        self.counters.requests.add(str(certificate_type), "rejected", error.reason)
        level = logging.WARNING if error.fault is Fault.REQUEST else logging.ERROR
        about = {"request_id": request_id, **_of(station), "reason": error.reason}
        log.log(level, "rejected: %s", error, extra=about)
        self._rejections.note(request_id, error, now=self._now(), station=station)
        return messages.rejected(request_id)

    def pass_over(self, error: StationKeyError, *, station: str = "") -> None:
        """Log and count an invalid message without a usable id, which cannot be answered."""
        self.counters.unanswerable.add(error.reason)
        log.warning("cannot be answered: %s", error, extra={**_of(station), "reason": error.reason})

    async def note_status(
        self, status: CertificateInstallationStatus, *, station: str = "", retained: bool = False
    ) -> None:
        """Handle a certificate status, within the allowance; see `Statuses.note_status`.

        Args:
            status: the status.
            station: the station that it is from.
            retained: whether the broker had kept it from before the subscription. It tells each new session of
                something that happened once, however long ago: a ``deleted`` would destroy key after key.
        """
        if retained:
            old = StationKeyError(
                "the broker retained it from an earlier time",
                reason="status_retained",
                hint="which client sets retain? stationkey doctor says how to remove it",
            )
            self._statuses.refuse(status, old, station=station)
            return
        try:
            self._policy.admit_status(status.data.certificate_type, station)
        except RequestRefused as error:
            self._statuses.refuse(status, error, station=station)
            return
        await self._statuses.note_status(status, station=station)

    def expect_copy(self, status: CertificateInstallationStatus, *, station: str = "") -> None:
        """Pass over the next status of a station with this id; see `Statuses.expect_copy`."""
        self._statuses.expect_copy(status, station=station)

    async def undelivered(self) -> list[tuple[str, GenerateCsrResponse]]:
        """Return the recorded answers for which `delivered` was not called, with their stations: publish them again."""
        responses = []
        for answered in await self._ledger(lambda ledger: ledger.answers.undelivered()):
            try:
                check_recorded(answered.csr)
            except KeyStoreError as error:
                about = {"request_id": answered.request_id, **_of(answered.station), "reason": error.reason}
                log.error("%s", error, extra=about)
                await self._withdraw(answered.request_id, answered.station)
                continue
            result = messages.GenerateCsrResult(status="accepted", csr=answered.csr)
            response = GenerateCsrResponse(
                id=answered.request_id, name=messages.GENERATE_CSR, type="response", data=result
            )
            responses.append((answered.station, response))
        return responses

    async def delivered(self, response: GenerateCsrResponse, *, station: str = "") -> None:
        """Record that an answer was delivered, so that the next start does not publish it again."""
        if response.data.status == "accepted":
            self._ledger.mark_delivered(response.id, station=station)

    async def learn_ids(self) -> None:
        """Read from the ledger which ids were answered in earlier runs. Until then each id is looked up there."""
        ids = [("", "")]
        try:
            while ids := await self._ledger(lambda ledger, last: ledger.answers.ids(after=last), ids[-1]):
                self._seen.update(ids)
        except LedgerError as error:
            log.error("id filter not loaded; looking up each id: %s", error, extra={"reason": error.reason})
            return
        self._knows_ids = True

    async def figures(self, *, expiries: int) -> Figures:
        """Return the counts of the ledger; see `Keys.figures`.

        Raises:
            LedgerError: it cannot be read.
        """
        return await self._ledger(lambda ledger: ledger.keys.figures(expiries=expiries))

    async def overview(self, *, keys: int, happenings: int) -> Overview:
        """Return what the status page shows of the ledger; see `stationkey.ledger.overview.look`.

        Raises:
            LedgerError: it cannot be read.
        """
        from stationkey.ledger.overview import look  # noqa: PLC0415 - only the status page needs it

        return await self._ledger(lambda ledger: look(ledger.database, keys=keys, happenings=happenings))

    @property
    def ledger_trouble(self) -> str:
        """Reason of the ledger's last failure, or an empty text since the last successful write."""
        return self._ledger.trouble

    @property
    def ledger_stuck(self) -> bool:
        """Whether a call of the ledger's thread hangs."""
        return self._ledger.stuck

    @property
    def running(self) -> int:
        """Running time of the daemon with this ledger, in milliseconds over all runs."""
        return self._running.now()

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called; the ledger can no longer be queried."""
        return self._closed

    async def aclose(self) -> None:
        """Save the running time and wait for the ledger. The caller closes ledger and key store."""
        if self._closed:
            return
        self._closed = True
        for last in (self._save_running, self._rejections.aclose):
            try:
                await last()
            except ShardLost:  # told already
                pass
            except StationKeyError as error:
                log.error("%s", error, extra={"reason": error.reason})
        self.renewal.close()
        self._josev_files.close()
        self._ledger.close()

    # The steps.

    async def _save_running(self) -> None:
        await self._ledger(lambda ledger: ledger.retention.write_running(self._running.now()))

    async def _on_record(self, request_id: str, station: str) -> Answered | None:
        if self._knows_ids and not self._seen.may_have(request_id, station):
            return None
        return await self._ledger(lambda ledger: ledger.answers.find(request_id, station=station))

    def _repeat(self, request: GenerateCsrRequest, station: str, answered: Answered) -> GenerateCsrResponse:
        """Return the recorded answer to an id that was answered before (decision 6)."""
        if answered.digest != content_digest(request):
            raise RequestRefused("the id was used before, with other content", reason="id_reused")
        if answered.destroyed:
            raise RequestRefused(
                "the id was answered before, and its key was destroyed since",
                reason="key_destroyed",
                hint="use a new id",
                scope=Scope.KEY,
            )
        check_recorded(answered.csr)
        self.counters.requests.add(str(request.data.certificate_type), "repeated", "")
        log.info("repeated the answer", extra={"request_id": request.id, "key_id": answered.key_id, **_of(station)})
        return messages.accepted(request, answered.csr)

    def _warn(self, request: GenerateCsrRequest, station: str, remarks: Iterable[str]) -> None:
        """Log the policy's warnings about a request that is served."""
        for remark in remarks:
            log.warning(remark, extra={"request_id": request.id, **_of(station), **_about(request)})

    def _until(self, request: GenerateCsrRequest, waited: float) -> float:
        """Return the deadline of a request, in the event loop's time."""
        allowed = self._rsa_deadline if is_rsa(request) else self._deadline
        return asyncio.get_running_loop().time() + allowed - waited

    async def _key_and_csr(self, request: GenerateCsrRequest, station: str, until: float) -> tuple[KeyRef, str]:
        """Return a key, made ahead or now, and its CSR in PEM, both recorded; one deadline for all attempts."""
        store = self._keystores.making(request.data.certificate_type)
        pool = self.pools[store]
        # A frozen key store keeps its share of the places: requests for the others must not wait for them.
        waiting = max(sum(store.thread.waiting.values()), self._turns.wanted(store))
        if store.thread.hung and waiting >= self._policy.queue // len(self._keystores):
            raise overdue()
        while True:
            ahead = pool.take(request.algorithm)
            try:
                turn = self._turns.turn(station, store, rsa=is_rsa(request), until=until) if station else nullcontext()
                async with turn:
                    key, csr = await self._sign(request, store, None if ahead is None else ahead.key, until)
                try:
                    return key, await self._record(request, station, key, csr, ahead=ahead is not None)
                except BaseException:
                    if store.shared:  # where the ledger has the key after all, the site's record refuses
                        self.custody.destroy_in_device(key)
                    raise
            except Exception as error:
                if ahead is None or not await pool.take_back(ahead, error):
                    raise

    async def _sign(
        self, request: GenerateCsrRequest, store: Store, ahead: KeyRef | None, until: float
    ) -> tuple[KeyRef, Csr]:
        """Return the key and its CSR; at the deadline give up and discard both."""
        profile = self._profiles[request.data.certificate_type]

        def sign(opened: KeyStore) -> tuple[KeyRef, Csr]:
            used = ahead or opened.generate(request.algorithm)
            with opened.signer(used) as private_key:
                return used, sign_csr(request, private_key, profile)

        turn, task = Turn.SHORT, Task.NEW_EC_KEY if ahead is None else Task.POOLED_KEY
        if ahead is None and is_rsa(request):
            turn, task = Turn.LONG, Task.NEW_RSA_KEY
        left = until - asyncio.get_running_loop().time()
        return await on_keystore(store.thread, sign, timeout=left, turn=turn, task=task)

    async def _record(self, request: GenerateCsrRequest, station: str, key: KeyRef, csr: Csr, *, ahead: bool) -> str:
        """Record the answer, verify the CSR while the ledger waits for the disk, and return the CSR in PEM.

        A CSR that is read from the ledger is verified again before it is sent. So an invalid one is never sent, not
        even if the power fails before it is withdrawn.
        """
        running, pem = self._running.now(), to_pem(csr)
        self._seen.add(request.id, station)

        def record(ledger: Ledger) -> list[Crowded]:
            return ledger.answers.record(
                request,
                key,
                pem,
                now=self._now(),
                running=running,
                due=running + self._terms.pending,
                bounds=self._bounds[request.data.certificate_type],
                ahead=ahead,
                station=station,
            )

        recorded = self._ledger(record)
        try:
            check_signature(csr)
        except KeyStoreError:
            await recorded
            await self._withdraw(request.id, station)
            raise
        try:
            crowded = await recorded
        except LedgerError as error:
            if error.reason != "commit_unknown":
                raise
            # If the first transaction still commits, this one fails by what is unique: id and key.
            crowded = [] if await self._was_recorded(request.id, station, key) else await self._ledger(record)
        for gone in crowded:
            about = {"key_id": gone.key_id, **_of(gone.station)}
            log.warning("too many pending keys: the oldest destroyed", extra=about)
        return pem

    async def _was_recorded(self, request_id: str, station: str, key: KeyRef) -> bool:
        """Return whether a key is recorded as the answer to a request, by a new connection to the ledger."""
        answered = await self._ledger(lambda ledger: ledger.answers.find(request_id, station=station))
        return answered is not None and answered.key_id == key.key_id

    async def _withdraw(self, request_id: str, station: str) -> None:
        """Remove a recorded answer that must not be sent."""
        await self._ledger(lambda ledger: ledger.answers.withdraw(request_id, station=station, now=self._now()))

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _of(station: str) -> dict[str, object]:
    """Return the field of a log line for a station; none for the single one."""
    return {"station": station} if station else {}


def _about(request: GenerateCsrRequest) -> dict[str, object]:
    """Return the fields of a log line about a request."""
    about: dict[str, object] = {
        "certificate_type": str(request.data.certificate_type),
        "algorithm": str(request.algorithm),
        "common_name": request.data.common_name,
    }
    if request.evse_id is not None:
        about["evse_id"] = request.evse_id
    return about
