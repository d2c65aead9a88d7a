"""Josev's part between charging station and CSMS, for trials and tests: trigger, CSR, signature, installation.

A trigger of the CSMS, or an order, starts a *renewal*: a CSR is requested over MQTT and sent to the CSMS by
SignCertificate; the certificate in CertificateSigned is verified, stored, and reported to the charging station by
``certificate_installation_status``. Pending CSRs are on disk, so that a restart continues with the same CSR. It works
with any implementation of the charging station's side.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import ssl
import time
import uuid
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import websockets
from msgspec import UNSET

from stationkey.contract import messages
from stationkey.contract.active_names import Owner, file_name
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateProfile, CertificateType
from stationkey.errors import StationKeyError
from stationkey.mqtt.client import ask, report_status
from stationkey.simulators.client_certificate import ClientCertificate, Outcome
from stationkey.simulators.ocpp import (
    DISCARDED_CERTIFICATE_EVENT,
    INVALID_CERTIFICATE_EVENT,
    NotCarried,
    OcppVersion,
    Payload,
    PayloadInvalid,
    TriggerStatus,
    boot_notification,
    carriage,
    certificate_signed_answer,
    read_certificate_signed,
    read_status,
    read_status_info,
    read_trigger,
    security_event,
    sign_certificate,
    trigger_answer,
)
from stationkey.simulators.ocpp_connection import BoundedClient, CallError, NotAnswered, OcppConnection
from stationkey.simulators.pending import Pending, PendingFile, write_atomically
from stationkey.simulators.pki import certificate_hash
from stationkey.simulators.station_settings import StationSettings
from stationkey.simulators.verification import (
    CertificateInvalid,
    for_which,
    read_signed,
    read_trust_anchors,
    root_of,
    verify,
)
from stationkey.system.backoff import Backoff
from stationkey.x509.certificate import Chain, Expected, read_chain
from stationkey.x509.renewal import Due, RenewalRule

log = logging.getLogger(__name__)

ANSWER_TIMEOUT: Final = 90.0
"""Seconds for the charging station to answer: it may have to make an RSA key."""
BOOT_RETRY: Final = 10.0
"""Seconds until BootNotification is repeated if the CSMS gives no interval [2.0.1 B02.FR.04, B03.FR.02]."""
PASSING_ERRORS: Final = frozenset({"InternalError", "GenericError", "SecurityError"})
"""Codes of a CALLERROR that are not about the call itself [OCPP-J 4.3]: the same call may succeed later."""
RECONNECT_FIRST: Final = 0.5
RECONNECT_LAST: Final = 60.0
"""Seconds between attempts to reach the CSMS; doubled each time."""
WATCH: Final = 60.0
"""Seconds between two checks for certificates that are due for renewal."""
ASK_AGAIN: Final = 86_400.0
"""Seconds before the renewal of one certificate is retried."""
_CLIENT: Final = next(kind for kind, profile in PROFILES.items() if profile.tls_use.role == "client")
"""The type of the station's client certificate."""
SWITCH_LOOK: Final = 0.1
SWITCH_TIMEOUT: Final = 30.0
"""Seconds for the charging station to put the key of a renewed client certificate in place."""
_REFUSALS: Final = (ssl.SSLError, websockets.InvalidHandshake, ConnectionResetError, BrokenPipeError)
"""Errors by which a CSMS refuses a connection. An unreachable CSMS refuses no certificate."""


class SigningRefused(StationKeyError):
    """The CSMS refuses to sign, or the charging station made no CSR. Not retried [A02.FR.20]."""


def waits(minimum: float, repeats: int) -> list[float]:
    """Return the seconds to wait for the certificate after each sending of the CSR [A02.FR.17-19].

    Args:
        minimum: ``CertSigningWaitMinimum``, seconds.
        repeats: ``CertSigningRepeatTimes``.
    """
    return [minimum * 2**attempt for attempt in range(repeats + 1)]


class Station:
    """Plays Josev towards a charging station and a CSMS.

    Args:
        settings: the settings.
        on_event: called with a text for people at each event, and with the certificate type if any.

    Raises:
        ConfigurationError: the trust anchors or the file of pending CSRs cannot be read.
    """

    def __init__(
        self, settings: StationSettings, on_event: Callable[[str, CertificateType | None], None] = lambda *_: None
    ) -> None:
        self._settings = settings
        self._tell = on_event
        self._anchors = None if settings.trust_anchors is None else read_trust_anchors(settings.trust_anchors)
        self._file = PendingFile(settings.state_dir / "josev-pending.json")
        self._csms: OcppConnection | None = None
        self._connected = asyncio.Event()
        self._boot_status = ""
        self._renewing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: dict[CertificateType, float] = {}
        """Time of the last renewal attempt of each certificate that is due, in the loop's time."""

    # The connection to the CSMS.

    async def run(self) -> None:
        """Stay connected to the CSMS and serve its triggers, until cancelled."""
        backoff = Backoff(RECONNECT_FIRST, RECONNECT_LAST)
        watching = asyncio.create_task(self._watch(), name="josev-watch")
        try:
            while True:
                try:
                    await self._session()
                    self._tell("connection closed", None)
                except (OSError, TimeoutError, websockets.WebSocketException) as error:
                    if self._settings.client is not None and isinstance(error, _REFUSALS):
                        self._settings.client.refused()
                    # asyncio writes its own text into the strerror of a refused connection.
                    why = os.strerror(error.errno) if isinstance(error, ConnectionError) and error.errno else error
                    self._tell(f"no CSMS at {self._settings.csms}: {why}; trying again in {backoff.delay:g} s", None)
                except StationKeyError as error:
                    self._tell(f"BootNotification failed: {error}; reconnecting in {backoff.delay:g} s", None)
                finally:
                    if self._connected.is_set():
                        backoff.reset()
                    self._connected.clear()
                    self._csms = None
                await asyncio.sleep(backoff.next())
        finally:
            for task in (watching, *self._tasks):
                task.cancel()
            await asyncio.gather(watching, *self._tasks, return_exceptions=True)

    async def _session(self) -> None:
        settings = self._settings
        headers = {}
        if settings.password is not None:
            credentials = f"{settings.identity}:{settings.password}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(credentials).decode()}"
        async with websockets.connect(
            f"{settings.csms.rstrip('/')}/{quote(settings.identity, safe='')}",  # [OCPP-J 3.1.1]
            subprotocols=[websockets.Subprotocol(version) for version in settings.versions],
            additional_headers=headers,
            ssl=settings.tls if settings.client is None else settings.client.next(),
            create_connection=BoundedClient,
        ) as socket:
            if socket.subprotocol is None:
                raise OSError("the CSMS speaks none of the OCPP versions offered")
            version = OcppVersion(socket.subprotocol)
            csms = self._csms = OcppConnection(socket, version, self._called, invalid=self._invalid)
            listening = asyncio.create_task(csms.run(), name="ocpp-listen")
            beating = asyncio.create_task(self._boot(csms), name="ocpp-boot")
            try:
                await asyncio.wait({listening, beating}, return_when=asyncio.FIRST_COMPLETED)
                if beating.done():
                    await beating
                await listening
            finally:
                for task in (listening, beating):
                    task.cancel()
                await asyncio.gather(listening, beating, return_exceptions=True)

    async def _boot(self, csms: OcppConnection) -> None:
        """Boot until the CSMS accepts the station [B01-B03; 1.6 4.2], then send heartbeats [G02; 1.6 4.6].

        Until then nothing else is sent.

        Raises:
            StationKeyError: the connection closed, or the answer was an error or invalid.
        """
        boot = boot_notification(csms.version, model="josev", vendor="stationkey")
        while True:
            answer = await csms.call(*boot)
            self._boot_status, interval = str(answer["status"]), float(answer["interval"])
            if self._boot_status == "Accepted":
                break
            wait = interval if interval > 0 else BOOT_RETRY
            self._tell(f"BootNotification answered with {self._boot_status}; sending it again in {wait:g} s", None)
            await asyncio.sleep(wait)
        client = self._settings.client
        if client is not None and (outcome := client.connected()) is not Outcome.NOTHING:
            self._spawn(self._settle(csms, client, outcome))  # before renewals that wait for the connection
        self._connected.set()
        self._tell(f"connected to {self._settings.csms}, OCPP {csms.version.number}", None)
        self._resume()
        while interval > 0:
            await asyncio.sleep(interval)
            with contextlib.suppress(CallError, PayloadInvalid):  # a failed heartbeat has no effect
                await csms.call("Heartbeat", {})

    async def _called(self, action: str, payload: Payload) -> Payload:
        """Answer a call of the CSMS."""
        csms = self._csms
        assert csms is not None  # it is its call
        version = csms.version
        if self._boot_status == "Rejected":
            raise CallError("SecurityError", "BootNotification is rejected")  # [B03; OCPP-J 4.3]
        inner = payload.get("messageId") if action == "DataTransfer" else action
        if inner == "CertificateSigned":
            signed = read_certificate_signed(action, payload, version)
            accepted, why = await self._signed(csms, signed.certificate_type, signed.chain_pem, signed.request_id)
            return certificate_signed_answer(action, version, accepted=accepted, reason=why)
        if inner in {"TriggerMessage", "ExtendedTriggerMessage"}:
            wanted = read_trigger(action, payload, version)
            status = TriggerStatus.NOT_IMPLEMENTED if wanted is None else await self._triggered(csms, wanted)
            return trigger_answer(action, version, status)
        raise CallError("NotImplemented", action)

    async def _invalid(self, action: str, payload: Payload, error: PayloadInvalid) -> None:
        """Refuse the certificate of a call that violates the schema, such as a too long chain [A02.FR.16].

        It is taken as the answer to the last CSR that was sent.
        """
        inner = payload.get("messageId") if action == "DataTransfer" else action
        if inner == "CertificateSigned" and self._csms is not None:
            kind = self._file.pending[-1].certificate_type if self._file.pending else None
            self._tell(f"the certificate is refused: {error}", kind)
            await self._refuse(self._csms, kind, CertificateInvalid(str(error), reason="chain_unreadable"))

    def _resume(self) -> None:
        """Resend the CSRs that were pending before a restart [A02.FR.17]."""
        for pending in self._file.pending:
            self._spawn(self._again(pending))

    async def _again(self, pending: Pending) -> None:
        async with self._renewing:
            if pending in self._file.pending:
                self._tell("sending the pending CSR", pending.certificate_type)
                await self._carry_and_tell(pending)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait until all renewals have ended."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # A renewal.

    async def _triggered(self, csms: OcppConnection, certificate_type: CertificateType) -> TriggerStatus:
        """Answer a trigger; reject it while a renewal of this type is in progress."""
        if self._renewing.locked():
            self._tell("trigger rejected: a renewal is in progress", certificate_type)
            return TriggerStatus.REJECTED
        try:
            carriage(certificate_type, csms.version)
        except NotCarried as error:
            self._tell(str(error), certificate_type)
            return TriggerStatus.NOT_IMPLEMENTED
        self._tell("triggered by the CSMS", certificate_type)
        self._spawn(self._renew_quietly(certificate_type))
        return TriggerStatus.ACCEPTED

    async def _renew_quietly(self, certificate_type: CertificateType, *, triggered: bool = True) -> None:
        try:
            await self.renew(certificate_type, triggered=triggered)
        except StationKeyError as error:
            log.debug("%s", error)  # reported already

    async def _watch(self) -> None:
        """Renew each certificate that is due, while the CSMS is connected [A03.FR.02]."""
        while self._settings.renew_before:
            await self._connected.wait()
            for certificate_type in CertificateType:
                if self._is_due(certificate_type):
                    self._asked[certificate_type] = asyncio.get_running_loop().time()
                    self._tell("the certificate is due for renewal", certificate_type)
                    await self._renew_quietly(certificate_type, triggered=False)
            await asyncio.sleep(WATCH)

    def _is_due(self, certificate_type: CertificateType) -> bool:
        chain = self._installed_chain(certificate_type)
        if chain is None or any(pending.certificate_type is certificate_type for pending in self._file.pending):
            return False
        asked = self._asked.get(certificate_type)
        if asked is not None and asyncio.get_running_loop().time() - asked < ASK_AGAIN:
            return False
        rule = RenewalRule(before=int(self._settings.renew_before * 86_400), life_divisor=3)
        return rule.judge(chain.not_before, chain.not_after, time.time()) in {Due.DUE, Due.EXPIRED}

    async def renew(
        self, certificate_type: CertificateType, algorithm: Algorithm | None = None, *, triggered: bool = False
    ) -> None:
        """Renew a certificate: a new CSR [A02.FR.02], signed by the CSMS, verified, installed and reported.

        Args:
            certificate_type: the certificate type.
            algorithm: the algorithm; by default the one that its profile prefers.
            triggered: whether the CSMS triggered it. Otherwise the CSR names the root of the current certificate, if
                the version can [A03.FR.23].

        Raises:
            NotCarried: the CSMS's OCPP version cannot carry it; nothing was requested or sent.
            SigningRefused: the charging station or the CSMS refused.
            CertificateInvalid: the certificate must not be installed.
            StationKeyError: any other failure. A late certificate is still installed.
        """
        await self._connected.wait()
        async with self._renewing:
            carried = carriage(certificate_type, (await self._connection()).version)
            profile: CertificateProfile = self._settings.profiles[certificate_type]
            evse_id = self._evse_of(certificate_type)
            csr = await self._ask(certificate_type, evse_id, algorithm or profile.preferred_algorithm)
            request_id = root = None
            if carried.carries_request_id:
                self._file.last_request_id += 1
                request_id = self._file.last_request_id
                root = None if triggered else self._hash_of_root(certificate_type)
            pending = Pending(
                certificate_type=certificate_type,
                evse_id=evse_id,
                csr=csr,
                request_id=request_id,
                hash_root_certificate=root,
            )
            self._file.add(pending)
            await self._carry_and_tell(pending)

    def _hash_of_root(self, certificate_type: CertificateType) -> dict[str, str] | None:
        """Return the CertificateHashDataType of the root of the installed certificate, or None if not known."""
        chain = self._installed_chain(certificate_type)
        root = None if chain is None or self._anchors is None else root_of(chain, self._anchors)
        return None if root is None else certificate_hash(root)

    async def _carry_and_tell(self, pending: Pending) -> None:
        """Have a CSR signed; if the CSMS refuses, report a failed installation to the charging station."""
        try:
            await self._carry(pending)
        except StationKeyError as error:
            self._tell(str(error), pending.certificate_type)
            if isinstance(error, SigningRefused):
                await self._report(pending.certificate_type, pending.evse_id, "failed_installation")
            raise

    async def _ask(self, certificate_type: CertificateType, evse_id: str | None, algorithm: Algorithm | None) -> str:
        settings = self._settings
        request = messages.generate_csr(
            str(uuid.uuid4()),
            messages.GenerateCsrData(
                certificate_type=certificate_type,
                common_name=settings.common_name,
                organization_name=settings.organization_name,
                country_name=settings.country_name,
                evse_id=UNSET if evse_id is None else evse_id,
                algorithm=UNSET if algorithm is None else algorithm,
            ),
        )
        response = await ask(
            settings.broker,
            request,
            topic_prefix=settings.topic_prefix,
            station=settings.station,
            timeout=ANSWER_TIMEOUT,
            terms=settings.mqtt,
        )
        if response is None:
            raise SigningRefused("the charging station did not answer", reason="no_answer")
        if response.data.status != "accepted" or response.data.csr is UNSET:
            raise SigningRefused("the charging station rejected the request", reason="csr_rejected")
        self._tell("the charging station answered with a CSR", certificate_type)
        return response.data.csr

    async def _carry(self, pending: Pending) -> None:
        """Send the CSR, and repeat it while no certificate comes [A02.FR.17-19]."""
        for attempt, wait in enumerate(waits(self._settings.wait_minimum, self._settings.repeat_times)):
            accepted, why = await self._send(pending)
            if not accepted:
                self._file.remove(pending)
                told = f"the CSMS refuses to sign: {why}" if why else "the CSMS refuses to sign, without a reason"
                raise SigningRefused(told, reason="csms_rejected")  # [A02.FR.20]
            again = " again" if attempt else ""
            self._tell(f"SignCertificate was sent{again} and accepted", pending.certificate_type)
            try:
                await asyncio.wait_for(pending.answered.wait(), wait)
            except TimeoutError:
                continue
            return
        raise StationKeyError(
            "no certificate came; a late one is still accepted",
            reason="csms_silent",
        )

    async def _send(self, pending: Pending) -> tuple[bool, str]:
        """Send a CSR; return whether the CSMS will sign it, and why not. No answer counts as accepted."""
        csms = await self._connection()
        call = sign_certificate(
            pending.certificate_type,
            csms.version,
            pending.csr,
            request_id=pending.request_id,
            hash_root_certificate=pending.hash_root_certificate,
        )
        try:
            answer = await csms.call(*call)
        except NotAnswered as error:
            self._tell(f"SignCertificate: {error}", pending.certificate_type)
            return True, ""
        except CallError as error:
            self._tell(f"SignCertificate answered with an error: {error}", pending.certificate_type)
            return error.code in PASSING_ERRORS, str(error)
        status = read_status(call.action, answer, csms.version)
        return status == "Accepted", read_status_info(answer) or ("" if status == "Rejected" else status)

    async def _connection(self) -> OcppConnection:
        await self._connected.wait()
        assert self._csms is not None
        return self._csms

    # A certificate.

    async def _signed(
        self, csms: OcppConnection, certificate_type: CertificateType | None, chain_pem: str, request_id: int | None
    ) -> tuple[bool, str]:
        """Verify a certificate [A02.FR.06]; return whether it is accepted, and why not. Installation follows later."""
        try:
            chain = read_signed(chain_pem)
            if self._is_installed(chain, certificate_type):
                self._tell("this certificate is installed already; nothing changed", certificate_type)
                return True, ""
            pending = for_which(chain, self._candidates(certificate_type, request_id))
            station_only = not self._settings.profiles[pending.certificate_type].secc_id
            warning = verify(chain, self._expected(pending), anchors=self._anchors, root_permitted=station_only)
        except CertificateInvalid as error:
            self._tell(f"the certificate is refused: {error}", certificate_type)
            self._spawn(self._refuse(csms, certificate_type, error))
            return False, str(error)
        if warning:
            self._tell(f"warning: {warning}", pending.certificate_type)
        self._install(pending, chain)
        self._spawn(self._installed(pending))
        return True, ""

    def _candidates(self, certificate_type: CertificateType | None, request_id: int | None) -> list[Pending]:
        candidates = [p for p in self._file.pending if certificate_type in {None, p.certificate_type}]
        if request_id is not None:
            candidates = [p for p in candidates if p.request_id == request_id]
            if not candidates:
                raise CertificateInvalid(f"unknown request id {request_id}", reason="request_id_unknown")
        return candidates

    def _is_installed(self, chain: Chain, certificate_type: CertificateType | None) -> bool:
        """Return whether a certificate is installed already: the CSMS did not get the first answer."""
        for kind in CertificateType:
            if certificate_type not in {None, kind}:
                continue
            installed = self._installed_chain(kind)
            if installed is not None and installed.leaf == chain.leaf:
                return True
        return False

    def _installed_chain(self, certificate_type: CertificateType) -> Chain | None:
        try:
            return read_chain(self._place(certificate_type, self._evse_of(certificate_type)).read_bytes())
        except OSError:
            return None

    def _evse_of(self, certificate_type: CertificateType) -> str | None:
        return self._settings.evse_id if self._settings.profiles[certificate_type].secc_id else None

    def _place(self, certificate_type: CertificateType, evse_id: str | None) -> Path:
        """Return the file that a certificate is installed in."""
        return self._settings.certificate_dir / file_name(Owner("", str(certificate_type), evse_id or ""))

    def _expected(self, pending: Pending) -> Expected:
        settings = self._settings
        return Expected(
            profile=settings.profiles[pending.certificate_type],
            common_name=settings.common_name,
            organization_name=settings.organization_name,
            country_name=settings.country_name,
            public=pending.public,
        )

    def _install(self, pending: Pending, chain: Chain) -> None:
        self._settings.certificate_dir.mkdir(parents=True, exist_ok=True)
        place = self._place(pending.certificate_type, pending.evse_id)
        if place.exists():  # kept until the new one has connected
            write_atomically(self._before(place), place.read_bytes())
        write_atomically(place, chain.pem().encode())
        pending.answered.set()
        self._file.remove(pending)

    async def _installed(self, pending: Pending) -> None:
        self._tell("the certificate is verified and installed", pending.certificate_type)
        await self._report(pending.certificate_type, pending.evse_id, "installed")
        client, csms = self._settings.client, self._csms
        if pending.certificate_type is not _CLIENT or client is None or csms is None:
            return
        try:
            async with asyncio.timeout(SWITCH_TIMEOUT):
                while not client.refresh():  # noqa: ASYNC110 - another program writes the file
                    await asyncio.sleep(SWITCH_LOOK)
        except TimeoutError:
            self._tell("the renewed key is not in place: keeping the current certificate", _CLIENT)
            return
        self._tell("reconnecting with the renewed certificate", _CLIENT)
        await csms.close()  # [A02.FR.08]

    async def _settle(self, csms: OcppConnection, client: ClientCertificate, outcome: Outcome) -> None:
        """Discard the certificate that did not connect, and report that to the charging station.

        No renewal begins meanwhile: the charging station must get this report first.
        """
        async with self._renewing:
            place = self._place(_CLIENT, None)
            before = self._before(place)
            if outcome is Outcome.CONFIRMED:
                self._tell(
                    "connected with the renewed certificate; the previous one is discarded", _CLIENT
                )  # [A02.FR.10]
                before.unlink(missing_ok=True)
                if client.previous is not None:
                    await self._report(_CLIENT, None, "deleted", client.previous)
                return
            self._tell("connected with the previous certificate; the renewed one is discarded", _CLIENT)  # [A02.FR.28]
            await self._event(csms, DISCARDED_CERTIFICATE_EVENT, "the CSMS refuses it", _CLIENT)  # [A02.FR.29]
            if before.exists():
                before.replace(place)
            await self._report(_CLIENT, None, "installed", client.previous)

    def _before(self, place: Path) -> Path:
        """Return the file of the previous certificate."""
        return self._settings.state_dir / f"before-{place.name}"

    async def _refuse(
        self, csms: OcppConnection, certificate_type: CertificateType | None, error: CertificateInvalid
    ) -> None:
        """Send a security event to the CSMS, and `failed_installation` to the charging station [A02.FR.06/07]."""
        await self._event(csms, INVALID_CERTIFICATE_EVENT, str(error), certificate_type)
        if certificate_type is not None:
            await self._report(certificate_type, self._settings.evse_id, "failed_installation")

    async def _event(
        self, csms: OcppConnection, event: str, words: str, certificate_type: CertificateType | None
    ) -> None:
        try:
            await csms.call(*security_event(csms.version, event, timestamp=datetime.now(UTC), tech_info=words))
        except StationKeyError as failure:
            self._tell(f"security event not accepted: {failure}", certificate_type)

    async def _report(
        self,
        certificate_type: CertificateType,
        evse_id: str | None,
        status: messages.InstallationStatus,
        private_key_path: Path | None = None,
    ) -> None:
        await report_status(
            self._settings.broker,
            certificate_type,
            status,
            evse_id=evse_id if self._settings.profiles[certificate_type].secc_id else None,
            private_key_path=private_key_path,
            topic_prefix=self._settings.topic_prefix,
            station=self._settings.station,
            terms=self._settings.mqtt,
        )
        self._tell(f"reported to the charging station: {status}", certificate_type)
