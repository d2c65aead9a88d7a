"""The answer to ``generate_csr``: seen before? allowed? key, CSR, written down, answer.

This is the only place where the event loop and the blocking world meet: the key store's thread, and the ledger's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, TypeVar

from stationkey import messages
from stationkey.csr import build_csr, to_pem
from stationkey.errors import Fault, RequestRefused, StationKeyError
from stationkey.keystore import KeyRef, KeyStore
from stationkey.keystore.thread import KeyStoreThread, overdue
from stationkey.ledger import Answered, Ledger, content_digest
from stationkey.messages import CertificateInstallationStatus, GenerateCsrRequest, GenerateCsrResponse
from stationkey.profiles import ALGORITHMS, PROFILES, CertificateProfile, CertificateType, RsaModulus, is_secc_id

T = TypeVar("T")
log = logging.getLogger(__name__)

DEADLINE: Final = 30.0
"""Seconds within which a request for an EC key is answered, one way or the other."""
RSA_DEADLINE: Final = 60.0
"""The same for RSA: a hardware TPM searches for primes for tens of seconds."""
PRE_ACTIVATION: Final = "pre-activation"
"""State of a key whose CSR was answered and whose certificate is not installed [NIST SP 800-57 part 1, 7.1]."""


class StationKeyService:
    """Answers requests with keys of one key store, by one ledger.

    Args:
        keystore: the thread that owns the key store. Not closed by this class.
        ledger: the ledger. Not closed by this class, and used by nobody else while requests are answered.
        profiles: the profile of each certificate type, the operator's overrides included.
        deadline: seconds allowed for a request, EC.
        rsa_deadline: seconds allowed for a request, RSA.
        clock: Unix time in seconds.

    Attributes:
        counts: how many requests had which outcome: ``accepted``, ``repeated``, or the reason of a refusal.
    """

    def __init__(
        self,
        keystore: KeyStoreThread,
        ledger: Ledger,
        *,
        profiles: Mapping[CertificateType, CertificateProfile] = PROFILES,
        deadline: float = DEADLINE,
        rsa_deadline: float = RSA_DEADLINE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keystore = keystore
        self._ledger = ledger
        self._profiles = profiles
        self._deadline = deadline
        self._rsa_deadline = rsa_deadline
        self._clock = clock
        self._ledger_thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._in_hand: dict[str, _Turn] = {}
        self.counts: Counter[str] = Counter()

    async def answer(self, request: GenerateCsrRequest) -> GenerateCsrResponse:
        """Answer a request. Never raises: what goes wrong is logged, recorded and ``rejected``."""
        async with self._one_at_a_time(request.id):
            try:
                if (answered := await self._on_ledger(self._ledger.find_answer, request.id)) is not None:
                    return self._repeat(request, answered)
                self._warn(request)
                key, csr = await self._generate(request)
                await self._on_ledger(self._record, request, key, csr)
            except StationKeyError as error:
                return await self.reject(request.id, error)
            except Exception:
                log.exception("a fault of stationkey", extra={"request_id": request.id})
                return await self.reject(request.id, StationKeyError("a fault of ours", reason="internal_error"))
        self.counts["accepted"] += 1
        log.info("accepted", extra={"request_id": request.id, "key_id": key.key_id, **_about(request)})
        return messages.accepted(request, csr)

    async def reject(self, request_id: str, error: StationKeyError) -> GenerateCsrResponse:
        """Refuse a request: the reason to the log and the ledger, ``rejected`` and nothing else to the asker."""
        self.counts[error.reason] += 1
        level = logging.WARNING if error.fault is Fault.REQUEST else logging.ERROR
        log.log(level, "rejected: %s", error, extra={"request_id": request_id, "reason": error.reason})
        try:
            await self._on_ledger(self._record_rejection, request_id, error)
        except StationKeyError as failure:
            log.error("the rejection is not on record: %s", failure, extra={"request_id": request_id})
        return messages.rejected(request_id)

    def pass_over(self, error: StationKeyError) -> None:
        """Note a message that is wrong and carries no usable id: it cannot be answered, only logged and counted."""
        self.counts[error.reason] += 1
        log.warning("cannot be answered: %s", error, extra={"reason": error.reason})

    async def note_status(self, status: CertificateInstallationStatus) -> None:
        """Take note of what became of a certificate."""
        log.info(
            "certificate %s",
            status.data.status,
            extra={"message_id": status.id, "certificate_type": str(status.data.certificate_type)},
        )

    async def undelivered(self) -> list[GenerateCsrResponse]:
        """The accepted answers that were recorded, and that no `delivered` was told of: to be published (again)."""
        return [
            GenerateCsrResponse(
                id=answered.request_id,
                name=messages.GENERATE_CSR,
                type="response",
                data=messages.GenerateCsrResult(status="accepted", csr=answered.csr),
            )
            for answered in await self._on_ledger(self._ledger.undelivered)
        ]

    async def delivered(self, response: GenerateCsrResponse) -> None:
        """Note that the transport has handed an answer over, so that it is not published again at the next start."""
        if response.data.status == "accepted":
            await self._on_ledger(self._ledger.mark_delivered, response.id)

    def close(self) -> None:
        """Wait for what the ledger has in hand. The ledger and the key store are the caller's to close."""
        self._ledger_thread.shutdown()

    # The steps.

    def _repeat(self, request: GenerateCsrRequest, answered: Answered) -> GenerateCsrResponse:
        """The answer to an id that was answered before (decision 6)."""
        if answered.digest != content_digest(request):
            raise RequestRefused("the id was used before, with other content", reason="id_reused")
        self.counts["repeated"] += 1
        log.info("repeated the answer", extra={"request_id": request.id, "key_id": answered.key_id})
        return messages.accepted(request, answered.csr)

    def _warn(self, request: GenerateCsrRequest) -> None:
        """What is served although the profile would have it otherwise."""
        profile = self._profiles[request.data.certificate_type]
        if profile.secc_id and not is_secc_id(request.data.common_name):
            log.warning("the common name is no SECC ID", extra={"request_id": request.id, **_about(request)})
        if profile.preferred_algorithm not in {None, request.algorithm}:
            log.warning(
                "the profile of this certificate type wants %s",
                profile.preferred_algorithm,
                extra={"request_id": request.id, **_about(request)},
            )

    async def _generate(self, request: GenerateCsrRequest) -> tuple[KeyRef, str]:
        """Make the key and the CSR on the key store's thread; give up at the deadline, and keep nothing then."""
        profile = self._profiles[request.data.certificate_type]

        def generate(store: KeyStore) -> tuple[KeyRef, str]:
            key = store.generate(request.algorithm)
            with store.signer(key) as private_key:
                return key, to_pem(build_csr(request, private_key, profile))

        timeout = self._timeout(request)
        job = self._keystore.submit(generate, timeout=timeout)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), timeout)
        except TimeoutError:
            raise overdue() from None

    def _timeout(self, request: GenerateCsrRequest) -> float:
        kinds = ALGORITHMS[request.algorithm].key_types
        return self._rsa_deadline if isinstance(kinds[0], RsaModulus) else self._deadline

    def _record(self, request: GenerateCsrRequest, key: KeyRef, csr: str) -> None:
        self._ledger.record_answer(request, key, csr, state=PRE_ACTIVATION, now=self._now())

    def _record_rejection(self, request_id: str, error: StationKeyError) -> None:
        self._ledger.record_rejection(request_id, reason=error.reason, message=str(error), now=self._now())

    def _now(self) -> int:
        return int(self._clock() * 1000)

    async def _on_ledger(self, call: Callable[..., T], *arguments: object) -> T:
        # Shielded: a commit under way is waited for by nobody else, and must not be half-forgotten at a cancellation.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._ledger_thread, call, *arguments))

    @asynccontextmanager
    async def _one_at_a_time(self, request_id: str) -> AsyncIterator[None]:
        """Keep two requests with the same id apart, so that the second finds the answer to the first."""
        canonical = request_id.lower()
        turn = self._in_hand.setdefault(canonical, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if turn.users == 0:
                del self._in_hand[canonical]


@dataclass(slots=True)
class _Turn:
    """Who may answer an id now, and how many want to."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


def _about(request: GenerateCsrRequest) -> dict[str, object]:
    """What a log line says of a request."""
    about: dict[str, object] = {
        "certificate_type": str(request.data.certificate_type),
        "algorithm": str(request.algorithm),
        "common_name": request.data.common_name,
    }
    if request.evse_id is not None:
        about["evse_id"] = request.evse_id
    return about
