"""Events of the CSMS, as values that print as one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from cryptography import x509

from stationkey.contract.profiles import CertificateType
from stationkey.simulators.ocpp import OcppVersion


class EventKind(StrEnum):
    """The kind of an event; a comment names the fields of `Event` that it sets."""

    CONNECTED = "connected"  # version; certificate, with security profile 3
    DISCONNECTED = "disconnected"
    CONNECTION_REFUSED = "connection_refused"  # words
    BOOTED = "booted"  # vendor, model; BootNotification, which was accepted
    TRIGGERED = "triggered"  # certificate_type; status: the station's answer
    CSR_ACCEPTED = "csr_accepted"  # certificate_type, csr, request_id, hash_root_certificate
    CSR_REJECTED = "csr_rejected"  # the same, reason, words
    CERTIFICATE_SENT = "certificate_sent"  # certificate_type, chain_pem, request_id; it is about to be sent
    CERTIFICATE_ANSWERED = "certificate_answered"  # certificate_type, status (or an error's code), words
    SECURITY_EVENT = "security_event"  # type; words: its techInfo
    STATUS_REPORTED = "status_reported"  # status, of a connector


_TEXTS: Final[Mapping[EventKind, tuple[str, str]]] = MappingProxyType(
    {
        EventKind.CONNECTED: ("connected, OCPP {version}", ", {words}"),
        EventKind.DISCONNECTED: ("disconnected", ""),
        EventKind.CONNECTION_REFUSED: ("connection refused", ": {words}"),
        EventKind.BOOTED: ("BootNotification of {vendor} {model}, accepted", ""),
        EventKind.TRIGGERED: ("trigger for a {certificate_type}: {status}", ""),
        EventKind.CSR_ACCEPTED: ("SignCertificate for a {certificate_type}, accepted", ""),
        EventKind.CSR_REJECTED: ("SignCertificate for a {certificate_type}, rejected", ": {words}"),
        EventKind.CERTIFICATE_SENT: (
            "CertificateSigned for the {certificate_type} sent, {certificates} certificates",
            "",
        ),
        EventKind.CERTIFICATE_ANSWERED: (
            "CertificateSigned for the {certificate_type} answered: {status}",
            " ({words})",
        ),
        EventKind.SECURITY_EVENT: ("security event {type}", ": {words}"),
        EventKind.STATUS_REPORTED: ("status of a connector: {status}", ""),
    }
)
"""The line of each event, and the part that is added if there are words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event. `str(event)` is one line.

    Attributes:
        kind: its kind, which determines the other fields that are set.
        station_id: id of the station, the last part of the URL that it connected to.
        version: of OCPP.
        certificate: the station's client certificate.
        vendor: of the station.
        model: of the station.
        certificate_type: of the message.
        csr: the unchanged PEM.
        chain_pem: the chain that is sent.
        request_id: the message's ``requestId``, or None.
        hash_root_certificate: the message's ``hashRootCertificate``, or None.
        status: answered or reported status.
        type: of a security event.
        reason: stable word for why a CSR was rejected.
        words: text for people.
    """

    kind: EventKind
    station_id: str
    version: OcppVersion | None = None
    certificate: x509.Certificate | None = None
    vendor: str = ""
    model: str = ""
    certificate_type: CertificateType | None = None
    csr: str = ""
    chain_pem: str = ""
    request_id: int | None = None
    hash_root_certificate: Mapping[str, str] | None = None
    status: str = ""
    type: str = ""
    reason: str = ""
    words: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the station accepted the certificate."""
        return self.status == "Accepted"

    def __str__(self) -> str:
        always, more = _TEXTS[self.kind]
        text = always + more if self.words else always
        return f"{self.station_id}: " + text.format(
            version="" if self.version is None else self.version.number,
            vendor=self.vendor,
            model=self.model,
            certificate_type=self.certificate_type,
            certificates=self.chain_pem.count("BEGIN"),
            status=self.status,
            type=self.type,
            words=self.words,
        )
