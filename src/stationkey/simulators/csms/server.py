"""A small CSMS to try and test a station: OCPP 1.6, 2.0.1 and 2.1, with its own CA, and misbehaviour on request.

It checks each CSR as strictly as the standards allow, signs it, and records all events (`Csms.events`). It serves
messages about certificates only.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import http
import ssl
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.x509.oid import NameOID
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from stationkey.contract.profiles import (
    ALGORITHMS,
    DEFAULT_ALGORITHM,
    PROFILES,
    SECP256R1,
    SECP521R1,
    CertificateType,
)
from stationkey.errors import ConfigurationError, Fault, StationKeyError
from stationkey.simulators import ocpp
from stationkey.simulators.csms.events import Event, EventKind
from stationkey.simulators.ocpp import OcppVersion, Payload, PayloadInvalid, SignRequest
from stationkey.simulators.ocpp_connection import Answered, BoundedServer, CallError, OcppConnection
from stationkey.simulators.pki import Hierarchy, Misbehaviour, certificate_hash, key_to_pem, to_pem
from stationkey.x509.csr_check import CsrRefused, check_csr, from_pem, refused

EVENT_TIMEOUT: Final = 10.0
"""Default timeout of the waiting methods, in seconds."""
CLOSING_TIMEOUT: Final = 2.0
"""Seconds to wait for the connections to end. An unfinished handshake ends with the event loop."""
HEARTBEAT_INTERVAL: Final = 300
"""Interval in the answer to BootNotification, in seconds."""
_THREE: Final = 3
_LATE: Final = 2
"""Connections with a renewed certificate that `Misbehaviour.ACCEPT_RENEWED_LATE` refuses."""


class SecurityProfile(IntEnum):
    """How a station and the CSMS authenticate each other [OCPP 2.0.1 part 2, A00]."""

    NONE = 0
    """No authentication; for trials only."""
    BASIC = 1
    """ws, and the station's password."""
    TLS = 2
    """wss with the CSMS's certificate, and the station's password."""
    MUTUAL_TLS = 3
    """wss, with certificates on both sides."""


class CsmsError(StationKeyError):
    """The station is not connected, or did not connect in time."""

    fault = Fault.OPERATOR


class Csms:
    """A CSMS on a loopback port, an async context manager.

    ::

        async with Csms(organization="EcoG") as csms:
            # a station connects to f"{csms.url}/CS001"
            await csms.connected("CS001")
            await csms.trigger("CS001", CertificateType.V2G_CERTIFICATE)
            answered = await csms.next(EventKind.CERTIFICATE_ANSWERED)

    Args:
        organization: required O of a CSR [A00.FR.509], and O of its own CA if it makes one.
        hierarchy: signs charging station and ISO 15118-2 certificates, and its own server certificate; P-256, new.
        hierarchy_20: signs ISO 15118-20 certificates; P-521, new.
        host: address to listen on.
        port: 0 takes a free port.
        security_profile: required authentication.
        passwords: of the stations, by their ids, for profiles 1 and 2. Profile 2 without passwords is TLS only.
        versions: of OCPP; the first of them in the station's list is used.
        misbehaviour: misbehaviour; may be set while it runs.
        clock: returns the current time.

    Raises:
        ConfigurationError: profile 1 without passwords.
    """

    def __init__(
        self,
        *,
        organization: str,
        hierarchy: Hierarchy | None = None,
        hierarchy_20: Hierarchy | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        security_profile: SecurityProfile = SecurityProfile.NONE,
        passwords: Mapping[str, str] | None = None,
        versions: Sequence[OcppVersion] = tuple(OcppVersion),
        misbehaviour: Misbehaviour | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if security_profile is SecurityProfile.BASIC and passwords is None:
            raise ConfigurationError("security profile 1 needs the stations' passwords", reason="csms_no_passwords")
        now = clock()
        self.events: list[Event] = []
        self.misbehaviour = misbehaviour
        self.organization = organization
        self._hierarchy = hierarchy or Hierarchy.make(SECP256R1, organization=organization, now=now)
        self._hierarchy_20 = hierarchy_20 or Hierarchy.make(SECP521R1, organization=organization, now=now)
        self._address = (host, port)
        self._security_profile = security_profile
        self._passwords = passwords
        self._versions = versions
        self._clock = clock
        self._server: Server | None = None
        self._stations: dict[str, OcppConnection] = {}
        self._held: defaultdict[tuple[str, CertificateType], list[SignRequest]] = defaultdict(list)
        self._request_ids: dict[tuple[str, int], str] = {}
        self._signed: dict[x509.Certificate, int] = {}
        self._happened = asyncio.Event()
        self._cursors: dict[EventKind, int] = {}

    async def __aenter__(self) -> Self:
        host, port = self._address
        self._server = await serve(
            self._serve,
            host,
            port,
            subprotocols=[Subprotocol(version.value) for version in self._versions],
            select_subprotocol=self._select_subprotocol,
            process_request=self._let_in,
            ssl=self._tls() if self._security_profile >= SecurityProfile.TLS else None,
            close_timeout=1,
            create_connection=BoundedServer,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_TIMEOUT):
                await self._server.wait_closed()

    @property
    def url(self) -> str:
        """``ws://127.0.0.1:PORT`` or ``wss://...``; a station adds a slash and its id."""
        assert self._server is not None, "it is not running"
        host, port = next(iter(self._server.sockets)).getsockname()[:2]
        scheme = "wss" if self._security_profile >= SecurityProfile.TLS else "ws"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def hierarchy(self, certificate_type: CertificateType) -> Hierarchy:
        """Return the authorities for certificates of this type."""
        algorithm = PROFILES[certificate_type].required_algorithm or DEFAULT_ALGORITHM
        return self._hierarchy_20 if SECP521R1 in ALGORITHMS[algorithm].key_types else self._hierarchy

    def trust_anchors_pem(self, certificate_type: CertificateType | None = None) -> str:
        """Return the root for a certificate type, or all roots, for the station to verify chains [A02.FR.06]."""
        types = CertificateType if certificate_type is None else (certificate_type,)
        return "".join(self.hierarchy(known).trust_anchors_pem(known) for known in types)

    async def connected(self, station_id: str, *, timeout: float = EVENT_TIMEOUT) -> OcppVersion:
        """Wait until a station is connected, and return its version of OCPP.

        Raises:
            CsmsError: it does not connect in time.
        """
        try:
            async with asyncio.timeout(timeout):
                while station_id not in self._stations:
                    await self._happened.wait()
        except TimeoutError:
            raise CsmsError(
                f"{station_id} did not connect within {timeout:g} s", reason="csms_station_absent"
            ) from None
        return self._stations[station_id].version

    async def trigger(self, station_id: str, certificate_type: CertificateType) -> str:
        """Trigger a CSR; return the answer (``Accepted``, ``Rejected``, ``NotImplemented``, an error's code).

        Raises:
            NotCarried: the station's version cannot carry it. Nothing was sent.
            CsmsError: the station is not connected.
            NotAnswered: the station does not answer.
        """
        connection = self._stations.get(station_id)
        if connection is None:
            raise CsmsError(f"{station_id} is not connected", reason="csms_station_absent")
        call = ocpp.trigger(certificate_type, connection.version)
        try:
            result = await connection.call(*call)
            status = ocpp.read_status(call.action, result, connection.version, "TriggerMessage")
        except CallError as error:
            status = error.code
        self._record(EventKind.TRIGGERED, station_id, certificate_type=certificate_type, status=status)
        return status

    async def next(self, kind: EventKind, *, timeout: float = EVENT_TIMEOUT) -> Event:
        """Return the next event of this kind that `next` has not returned yet, past or future.

        Raises:
            CsmsError: no such event within the timeout.
        """
        index = self._cursors.get(kind, 0)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    while index < len(self.events):
                        event = self.events[index]
                        index += 1
                        self._cursors[kind] = index
                        if event.kind is kind:
                            return event
                    await self._happened.wait()
        except TimeoutError:
            raise CsmsError(f"no {kind} within {timeout:g} s", reason="csms_nothing_happened") from None

    async def stream(self) -> AsyncIterator[Event]:
        """Yield all events from the first on, as they happen, without end."""
        index = 0
        while True:
            while index < len(self.events):
                yield self.events[index]
                index += 1
            await self._happened.wait()

    def _record(self, kind: EventKind, station_id: str, **fields: Any) -> None:
        self.events.append(Event(kind=kind, station_id=station_id, **fields))
        self._happened.set()
        self._happened = asyncio.Event()

    # --- Who is let in [A00] -----------------------------------------------------------------------------------------

    def _tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        names = list(dict.fromkeys(("localhost", "127.0.0.1", self._address[0])))
        chain, private_key = self._hierarchy.issue_server(names, now=self._clock())
        with tempfile.TemporaryDirectory() as directory:  # ssl reads keys from files only
            file = Path(directory, "server.pem")
            file.touch(mode=0o600)
            file.write_bytes(key_to_pem(private_key) + to_pem(chain).encode())
            context.load_cert_chain(file)
        if self._security_profile is SecurityProfile.MUTUAL_TLS:
            context.verify_mode = ssl.CERT_REQUIRED
            root = to_pem([self._hierarchy.csms_root.certificate])
            context.load_verify_locations(cadata=root)
        return context

    def _let_in(self, websocket: ServerConnection, request: Request) -> Response | None:
        station_id = _station_id(request)
        if not station_id:
            return websocket.respond(http.HTTPStatus.NOT_FOUND, "the URL ends in the station's id\n")
        trouble = self._stranger(websocket, station_id, request)
        if trouble is None:
            return None
        self._record(EventKind.CONNECTION_REFUSED, station_id, words=trouble)
        response = websocket.respond(http.HTTPStatus.UNAUTHORIZED, f"{trouble}\n")
        if self._security_profile is not SecurityProfile.MUTUAL_TLS:
            response.headers["WWW-Authenticate"] = 'Basic realm="stationkey csms", charset="UTF-8"'
        return response

    def _stranger(self, websocket: ServerConnection, station_id: str, request: Request) -> str | None:
        """Return why a station is refused, or None."""
        if self._security_profile is SecurityProfile.MUTUAL_TLS:
            certificate = _peer_certificate(websocket)
            assert certificate is not None  # or TLS would have refused
            names = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
            if [name.value for name in names] != [self.organization]:
                return f"O of the station's certificate is not {self.organization!r} [A00.FR.509]"
            if certificate in self._signed and self._refuses(certificate):
                return "this CSMS is set to refuse the renewed certificate"
        elif self._security_profile is not SecurityProfile.NONE and self._passwords is not None:
            credentials = _credentials(request)
            if credentials is None:
                return "no user name and password [A00.FR.204]"
            password = self._passwords.get(station_id)
            # The user name is the station's identity [A00.FR.204].
            if password is None or not hmac.compare_digest(credentials, f"{station_id}:{password}".encode()):
                return "wrong user name or password [A00.FR.204]"
        return None

    def _refuses(self, renewed: x509.Certificate) -> bool:
        """Return whether a certificate of this run is refused; count its connections."""
        self._signed[renewed] += 1
        late = self.misbehaviour is Misbehaviour.ACCEPT_RENEWED_LATE and self._signed[renewed] <= _LATE
        return late or self.misbehaviour is Misbehaviour.REFUSE_RENEWED

    def _select_subprotocol(self, _: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
        return next((name for name in offered if name in {version.value for version in self._versions}), None)

    async def _serve(self, websocket: ServerConnection) -> None:
        assert websocket.request is not None
        station_id = _station_id(websocket.request)
        if websocket.subprotocol is None:
            # The handshake is completed without a subprotocol, and the connection closed [OCPP-J 3.1.2].
            speaks = ", ".join(version.value for version in self._versions)
            reason = f"none of the subprotocols offered is one of {speaks}"
            self._record(EventKind.CONNECTION_REFUSED, station_id, words=reason)
            await websocket.close(1002, "no common version of OCPP")
            return
        version = OcppVersion(websocket.subprotocol)

        async def answer(action: str, payload: Payload) -> Payload | Answered:
            return self._answer(station_id, connection, action, payload)

        connection = OcppConnection(websocket, version, answer)
        older, self._stations[station_id] = self._stations.get(station_id), connection
        certificate = _peer_certificate(websocket)
        self._record(
            EventKind.CONNECTED,
            station_id,
            version=version,
            certificate=certificate,
            words="by its certificate" if certificate else "",
        )
        try:
            if older is not None:
                await older.close()  # a station has one connection; the older one is most likely dead
            await connection.run()
        finally:
            if self._stations.get(station_id) is connection:
                del self._stations[station_id]
            self._record(EventKind.DISCONNECTED, station_id)

    # --- What it answers ---------------------------------------------------------------------------------------------

    def _answer(self, station_id: str, connection: OcppConnection, action: str, payload: Payload) -> Payload | Answered:
        version = connection.version
        match action:
            case "BootNotification":
                return self._boot(station_id, payload)
            case "Heartbeat":
                return {"currentTime": ocpp.to_timestamp(self._clock())}
            case "SignCertificate":
                return self._sign(station_id, connection, action, payload)
            case "DataTransfer":
                if ocpp.is_plug_and_charge(payload, "SignCertificate", version):
                    return self._sign(station_id, connection, action, payload)
                known = version is OcppVersion.V16 and payload["vendorId"] == ocpp.PNC_VENDOR_ID
                return {"status": "UnknownMessageId" if known else "UnknownVendorId"}
            case "SecurityEventNotification":
                info = str(payload.get("techInfo", ""))
                self._record(EventKind.SECURITY_EVENT, station_id, type=payload["type"], words=info)
            case "StatusNotification":
                status = str(payload.get("status") or payload.get("connectorStatus"))
                self._record(EventKind.STATUS_REPORTED, station_id, status=status)
        try:
            ocpp.validate(action, {}, version, result=True)
        except PayloadInvalid:
            raise CallError("NotSupported", f"this CSMS does not answer {action}") from None
        return {}  # acknowledged with an empty answer

    def _boot(self, station_id: str, payload: Payload) -> Payload:
        if "chargingStation" in payload:
            vendor, model = payload["chargingStation"]["vendorName"], payload["chargingStation"]["model"]
        else:
            vendor, model = payload["chargePointVendor"], payload["chargePointModel"]
        self._record(EventKind.BOOTED, station_id, vendor=vendor, model=model)
        now = ocpp.to_timestamp(self._clock())
        return {"currentTime": now, "interval": HEARTBEAT_INTERVAL, "status": "Accepted"}

    def _sign(self, station_id: str, connection: OcppConnection, action: str, payload: Payload) -> Payload | Answered:
        """Answer SignCertificate; the certificate follows, unless the CSMS misbehaves."""
        version = connection.version
        request = ocpp.read_sign_certificate(action, payload, version)
        about = {
            "certificate_type": request.certificate_type,
            "csr": request.csr,
            "request_id": request.request_id,
            "hash_root_certificate": request.hash_root_certificate,
        }
        try:
            csr = self._check(station_id, request)
        except CsrRefused as error:
            self._record(EventKind.CSR_REJECTED, station_id, **about, reason=error.reason, words=error.message)
            return ocpp.sign_certificate_answer(action, version, accepted=False, reason=error.message)
        self._record(EventKind.CSR_ACCEPTED, station_id, **about)
        answer = ocpp.sign_certificate_answer(action, version, accepted=True)
        if self.misbehaviour is Misbehaviour.NEVER:
            return answer
        if self.misbehaviour is Misbehaviour.ANSWER_FIRST_OF_THREE:
            held = self._held[station_id, request.certificate_type]
            held.append(request)
            if len(held) < _THREE:
                return answer
            request = held[0]
            csr = x509.load_der_x509_csr(from_pem(request.csr))
            held.clear()
        return Answered(answer, partial(self._send_certificate, station_id, connection, request, csr))

    def _check(self, station_id: str, request: SignRequest) -> x509.CertificateSigningRequest:
        """Check the CSR, requestId and hashRootCertificate."""
        if self.misbehaviour is Misbehaviour.REJECT:
            raise refused("csms_told_to", "this CSMS is set to refuse every CSR")
        kind = request.certificate_type
        csr = check_csr(request.csr, certificate_type=kind, organization=self.organization)
        if request.request_id is not None:
            before = self._request_ids.setdefault((station_id, request.request_id), request.csr)
            if before != request.csr:
                words = f"requestId {request.request_id} was used before with another CSR [A02.FR.24]"
                raise refused("csr_request_id", words)
        if request.hash_root_certificate is not None:
            own = certificate_hash(self.hierarchy(kind).issuers(kind)[-1].certificate)
            given = {name: str(value).lower() for name, value in request.hash_root_certificate.items()}
            if given != {name: value.lower() for name, value in own.items()}:
                words = "hashRootCertificate is not that of this CSMS's root (as SHA-256)"
                raise refused("csr_hash_root", words)
        return csr

    async def _send_certificate(
        self, station_id: str, connection: OcppConnection, request: SignRequest, csr: x509.CertificateSigningRequest
    ) -> None:
        kind, request_id = request.certificate_type, request.request_id
        profile = PROFILES[kind]
        chain = self.hierarchy(kind).issue(csr, profile, now=self._clock(), misbehaviour=self.misbehaviour)
        if request_id is not None and self.misbehaviour is Misbehaviour.UNKNOWN_REQUEST_ID:
            request_id = 1 + max(known for _, known in self._request_ids)
        self._signed[chain[0]] = 0
        chain_pem = to_pem(chain)
        checked = self.misbehaviour is not Misbehaviour.CHAIN_TOO_LONG
        call = ocpp.certificate_signed(kind, connection.version, chain_pem, request_id=request_id, checked=checked)
        self._record(
            EventKind.CERTIFICATE_SENT, station_id, certificate_type=kind, chain_pem=chain_pem, request_id=request_id
        )
        try:
            result = await connection.call(*call, checked=checked)
            status = ocpp.read_status(call.action, result, connection.version, "CertificateSigned")
            words = ocpp.read_status_info(result)
        except CallError as error:
            status, words = error.code, error.description
        except StationKeyError as error:  # no answer, or an invalid one
            status, words = error.reason, error.message
        self._record(EventKind.CERTIFICATE_ANSWERED, station_id, certificate_type=kind, status=status, words=words)


def _station_id(request: Request) -> str:
    """Return the last part of the URL [OCPP-J 3.1.1]."""
    return unquote(urlsplit(request.path).path.rsplit("/", 1)[-1])


def _credentials(request: Request) -> bytes | None:
    """Return the decoded credentials of HTTP basic authentication, or None."""
    scheme, _, encoded = (request.headers.get("Authorization") or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(encoded.strip(), validate=True)
    except ValueError:
        return None


def _peer_certificate(websocket: ServerConnection) -> x509.Certificate | None:
    tls = websocket.transport.get_extra_info("ssl_object")
    der = tls.getpeercert(binary_form=True) if isinstance(tls, ssl.SSLObject) else None
    return None if der is None else x509.load_der_x509_certificate(der)
