"""What happens at the CSMS, as values: each event says itself in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509

from stationkey.contract.profiles import CertificateType
from stationkey.simulators.ocpp import OcppVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. `str(event)` says it in one line.

    Attributes:
        station_id: whose, by the last part of the URL that it connected to.
    """

    station_id: str

    def __str__(self) -> str:
        return f"{self.station_id}: {self._words()}"

    def _words(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected(Event):
    """A station is connected. `certificate` is its own, with security profile 3."""

    version: OcppVersion
    certificate: x509.Certificate | None = None

    def _words(self) -> str:
        return f"connected, OCPP {self.version.number}" + (", by its certificate" if self.certificate else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected(Event):
    """A station is gone."""

    def _words(self) -> str:
        return "disconnected"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRefused(Event):
    """A station was not let in; `reason` in words."""

    reason: str

    def _words(self) -> str:
        return f"not let in: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Booted(Event):
    """BootNotification, which was accepted."""

    vendor: str
    model: str

    def _words(self) -> str:
        return f"BootNotification of {self.vendor} {self.model}, accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Triggered(Event):
    """A trigger was sent, and the station answered `status`."""

    certificate_type: CertificateType
    status: str

    def _words(self) -> str:
        return f"told to ask for a {self.certificate_type}: {self.status}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CsrAccepted(Event):
    """SignCertificate was answered with Accepted. `csr` is the PEM as it came."""

    certificate_type: CertificateType
    csr: str
    request_id: int | None

    def _words(self) -> str:
        return f"SignCertificate for a {self.certificate_type}, accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class CsrRejected(Event):
    """SignCertificate was answered with Rejected. `reason` is the stable word, `words` what to tell a person."""

    certificate_type: CertificateType
    csr: str
    request_id: int | None
    reason: str
    words: str

    def _words(self) -> str:
        return f"SignCertificate for a {self.certificate_type}, rejected: {self.words}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateSent(Event):
    """CertificateSigned is about to be sent."""

    certificate_type: CertificateType
    chain_pem: str
    request_id: int | None

    def _words(self) -> str:
        return f"CertificateSigned for the {self.certificate_type} sent, {self.chain_pem.count('BEGIN')} certificates"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateAnswered(Event):
    """CertificateSigned was answered: `status` is Accepted, Rejected or an error's code; `words` may say why."""

    certificate_type: CertificateType
    status: str
    words: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the station took the certificate."""
        return self.status == "Accepted"

    def _words(self) -> str:
        why = f" ({self.words})" if self.words else ""
        return f"CertificateSigned for the {self.certificate_type} answered: {self.status}{why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityEvent(Event):
    """SecurityEventNotification."""

    type: str
    tech_info: str

    def _words(self) -> str:
        return f"security event {self.type}" + (f": {self.tech_info}" if self.tech_info else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReported(Event):
    """StatusNotification of a connector."""

    status: str

    def _words(self) -> str:
        return f"status of a connector: {self.status}"


EventT = TypeVar("EventT", bound=Event)
