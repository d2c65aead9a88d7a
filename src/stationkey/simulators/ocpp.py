"""Messages that carry a CSR and its certificate between charging station and CSMS, for each version of OCPP.

`CARRIAGES` has a `Carriage` for each certificate type and version, and `NOT_CARRIED` the others, which are refused
before anything is sent. A type in neither is an error at import. The rest builds and reads the payloads of both sides,
as dictionaries with OCPP's names, each validated by the official schema of the ``ocpp`` library. Pure:
`stationkey.simulators.ocpp_connection` sends.

Sources: OCPP 1.6 security whitepaper (edition 3), the application note "Using ISO 15118 Plug & Charge with OCPP 1.6",
OCPP 2.0.1 and 2.1 part 2 (A02, A03) and their schemas.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jsonschema  # type: ignore[import-untyped]  # ships no type information
from ocpp.messages import MessageType, get_validator  # type: ignore[import-untyped]  # ships no type information

from stationkey.contract.profiles import CertificateType
from stationkey.errors import Fault, StationKeyError

Payload = dict[str, Any]
"""Payload of a call or its result: a JSON object with OCPP's names."""

PNC_VENDOR_ID: Final = "org.openchargealliance.iso15118pnc"
"""``vendorId`` of the DataTransfer that carries 2.0.1 payloads over 1.6."""

INVALID_CERTIFICATE_EVENT: Final = "InvalidChargingStationCertificate"
"""The security event of A02.FR.07, by its name in 2.x; see `security_event`."""
DISCARDED_CERTIFICATE_EVENT: Final = "DiscardedRenewedClientCertificate"
"""The security event of A02.FR.29 (errata 2025-01 of 2.0.1)."""
_EVENTS_OF_16: Final = MappingProxyType({INVALID_CERTIFICATE_EVENT: "InvalidChargePointCertificate"})
"""The name of the same event in the 1.6 security whitepaper."""

CSR_LIMIT: Final = 5500
"""Longest ``csr`` in every version so far, in characters."""
CHAIN_LIMIT: Final = 10000
"""Longest ``certificateChain`` in every version so far, in characters; the station's MaxCertificateChainSize may be
lower."""

_ACTION: Final = re.compile(r"[A-Za-z0-9]{1,64}")


class OcppVersion(StrEnum):
    """A version of OCPP-J, by its WebSocket subprotocol."""

    V16 = "ocpp1.6"
    V201 = "ocpp2.0.1"
    V21 = "ocpp2.1"

    @property
    def number(self) -> str:
        """``1.6``, ``2.0.1`` or ``2.1``, as in the library's schemas."""
        return self.value.removeprefix("ocpp")


class NotCarried(StationKeyError):
    """A version of OCPP has no message for this. Raised before anything is sent."""

    fault = Fault.REQUEST


class PayloadInvalid(StationKeyError):
    """A payload, ours or the peer's, violates the official schema, or is otherwise invalid.

    Attributes:
        keyword: the violated keyword of the schema (``required``, ``maxLength``, ...), or an empty string.
    """

    fault = Fault.REQUEST

    def __init__(self, message: str, *, keyword: str = "") -> None:
        super().__init__(message, reason="ocpp_payload_invalid")
        self.keyword = keyword


class UnknownAction(PayloadInvalid):
    """A version of OCPP has no such message."""


class Call(NamedTuple):
    """A request: its message and payload."""

    action: str
    payload: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Carriage:
    """The messages for one certificate type in one version of OCPP.

    Attributes:
        by_data_transfer: whether the payloads are those of 2.0.1, as a JSON string in DataTransfer with vendorId
            `PNC_VENDOR_ID` and the message's name as messageId (1.6 Plug & Charge).
        certificate_type: value of ``certificateType``; None if the message has no such field.
        trigger: value of ``requestedMessage`` by which the CSMS triggers a new CSR.
        trigger_action: the message of the trigger.
        carries_request_id: whether SignCertificate and CertificateSigned may have a ``requestId`` [A02.FR.24], and the
            former a ``hashRootCertificate``.
        is_default: whether a message without a type, which may have one, is about this one.
    """

    certificate_type: str | None
    trigger: str
    trigger_action: str = "TriggerMessage"
    by_data_transfer: bool = False
    carries_request_id: bool = False
    is_default: bool = False

    @property
    def action(self) -> str:
        """The message on the wire that carries SignCertificate and CertificateSigned."""
        return "DataTransfer" if self.by_data_transfer else "SignCertificate"


_STATION: Final = "ChargingStationCertificate"
_V2G: Final = "V2GCertificate"
_V2G20: Final = "V2G20Certificate"
_SIGN_STATION: Final = "SignChargingStationCertificate"
_SIGN_V2G: Final = "SignV2GCertificate"
_SIGN_V2G20: Final = "SignV2G20Certificate"

CARRIAGES: Final[Mapping[tuple[CertificateType, OcppVersion], Carriage]] = MappingProxyType(
    {
        (CertificateType.CHARGING_STATION_CERTIFICATE, OcppVersion.V16): Carriage(
            certificate_type=None, trigger="SignChargePointCertificate", trigger_action="ExtendedTriggerMessage"
        ),
        (CertificateType.V2G_CERTIFICATE, OcppVersion.V16): Carriage(
            certificate_type=_V2G, trigger=_SIGN_V2G, by_data_transfer=True, is_default=True
        ),
        (CertificateType.CHARGING_STATION_CERTIFICATE, OcppVersion.V201): Carriage(
            certificate_type=_STATION, trigger=_SIGN_STATION
        ),
        (CertificateType.V2G_CERTIFICATE, OcppVersion.V201): Carriage(certificate_type=_V2G, trigger=_SIGN_V2G),
        (CertificateType.CHARGING_STATION_CERTIFICATE, OcppVersion.V21): Carriage(
            certificate_type=_STATION, trigger=_SIGN_STATION, carries_request_id=True
        ),
        (CertificateType.V2G_CERTIFICATE, OcppVersion.V21): Carriage(
            certificate_type=_V2G, trigger=_SIGN_V2G, carries_request_id=True
        ),
        (CertificateType.V2G20_CERTIFICATE, OcppVersion.V21): Carriage(
            certificate_type=_V2G20, trigger=_SIGN_V2G20, carries_request_id=True
        ),
    }
)
"""Every certificate type in every version that can carry it."""
NOT_CARRIED: Final = frozenset(
    {
        (CertificateType.V2G20_CERTIFICATE, OcppVersion.V16),
        (CertificateType.V2G20_CERTIFICATE, OcppVersion.V201),
    }
)
"""The certificate types that a version has no message for."""


def undecided(types: Iterable[CertificateType]) -> set[tuple[CertificateType, OcppVersion]]:
    """Return the pairs that are neither in `CARRIAGES` nor in `NOT_CARRIED`."""
    return set(itertools.product(types, OcppVersion)) - CARRIAGES.keys() - NOT_CARRIED


assert not undecided(CertificateType), "each certificate type needs its row for each version"


def carriage(certificate_type: CertificateType, version: OcppVersion) -> Carriage:
    """Return the carriage of `certificate_type` in `version`.

    Raises:
        NotCarried: this version cannot carry it.
    """
    if (certificate_type, version) in NOT_CARRIED:
        able = [known.number for kind, known in CARRIAGES if kind is certificate_type]
        raise NotCarried(
            f"OCPP {version.number} cannot carry a {certificate_type}",
            reason="ocpp_not_carried",
            hint=f"use a CSMS with OCPP {' or '.join(able)}",
        )
    return CARRIAGES[certificate_type, version]


def validate(action: str, payload: object, version: OcppVersion, *, result: bool = False) -> None:
    """Validate a payload by the official schema of its message.

    Args:
        action: name of the message, such as ``SignCertificate``.
        payload: its payload.
        version: of OCPP.
        result: whether it is the answer to a call.

    Raises:
        UnknownAction: this version has no such message.
        PayloadInvalid: the payload violates the schema.
    """
    try:
        if _ACTION.fullmatch(action) is None:  # it becomes a part of a file's name
            raise FileNotFoundError
        validator = get_validator(MessageType.CallResult if result else MessageType.Call, action, version.number)
    except OSError:
        raise UnknownAction(f"OCPP {version.number} has no message {action[:64]!r}") from None
    error = jsonschema.exceptions.best_match(validator.iter_errors(payload))
    if error is not None:
        where = "".join(f".{part}" for part in error.absolute_path)
        words = error.message if len(error.message) <= 200 else f"{error.message[:60]}... breaks {error.validator}"  # noqa: PLR2004 - a line or two
        raise PayloadInvalid(
            f"OCPP {version.number} {action}{' answer' if result else ''}{where}: {words}", keyword=str(error.validator)
        )


# --- The station's side: what it sends -------------------------------------------------------------------------------


def boot_notification(version: OcppVersion, *, model: str, vendor: str) -> Call:
    """BootNotification after power-up [B01]."""
    if version is OcppVersion.V16:
        return _call("BootNotification", {"chargePointModel": model, "chargePointVendor": vendor}, version)
    station = {"model": model, "vendorName": vendor}
    return _call("BootNotification", {"reason": "PowerUp", "chargingStation": station}, version)


def sign_certificate(
    certificate_type: CertificateType,
    version: OcppVersion,
    csr: str,
    *,
    request_id: int | None = None,
    hash_root_certificate: Mapping[str, str] | None = None,
) -> Call:
    """SignCertificate [A02.FR.02, A02.FR.03].

    Args:
        certificate_type: of the CSR.
        version: of the connection.
        csr: the CSR in PEM.
        request_id: identifies the answer [A02.FR.24]; 2.1 only.
        hash_root_certificate: CertificateHashDataType of the wanted root; 2.1 only.

    Raises:
        NotCarried: this version cannot carry the type, the CSR's length, or an option that is given.
    """
    how = carriage(certificate_type, version)
    if len(csr) > CSR_LIMIT:
        raise NotCarried(
            f"the CSR has {len(csr)} characters; OCPP {version.number} carries {CSR_LIMIT} at most",
            reason="csr_too_long",
        )
    newer = {"requestId": request_id, "hashRootCertificate": hash_root_certificate}
    return _carry(how, "SignCertificate", {"csr": csr} | _about(how, version, newer), version)


def security_event(version: OcppVersion, event_type: str, *, timestamp: datetime, tech_info: str | None = None) -> Call:
    """SecurityEventNotification [A04].

    Args:
        version: of the connection.
        event_type: such as `INVALID_CERTIFICATE_EVENT`, by its name in 2.x; 1.6 gets its own name for it.
        timestamp: when it happened.
        tech_info: what happened, in words; cut to 255 characters.
    """
    if version is OcppVersion.V16:
        event_type = _EVENTS_OF_16.get(event_type, event_type)
    payload = {"type": event_type, "timestamp": to_timestamp(timestamp)}
    if tech_info is not None:
        payload["techInfo"] = tech_info[:255]
    return _call("SecurityEventNotification", payload, version)


class TriggerStatus(StrEnum):
    """A station's answer to a trigger."""

    ACCEPTED = "Accepted"
    REJECTED = "Rejected"
    NOT_IMPLEMENTED = "NotImplemented"


def trigger_answer(action: str, version: OcppVersion, status: TriggerStatus) -> Payload:
    """The answer to a trigger that `read_trigger` has read; `action` is that of the call."""
    return _answer(action, "TriggerMessage", {"status": status.value}, version)


def certificate_signed_answer(action: str, version: OcppVersion, *, accepted: bool, reason: str = "") -> Payload:
    """The answer to a certificate that `read_certificate_signed` has read.

    Args:
        action: of the call.
        version: of the connection.
        accepted: whether the certificate is good.
        reason: why not, in words; 2.0.1 and 2.1 carry it as statusInfo, cut to 512 characters.
    """
    return _verdict(action, "CertificateSigned", version, accepted, "InvalidCertificate", reason)


# --- The station's side: what it reads -------------------------------------------------------------------------------


def read_trigger(action: str, payload: Payload, version: OcppVersion) -> CertificateType | None:
    """Return the certificate type that a call of the CSMS triggers a CSR for.

    Reads TriggerMessage, in 1.6 ExtendedTriggerMessage, and TriggerMessage inside DataTransfer.

    Returns:
        None if the call is not a trigger for a CSR.

    Raises:
        PayloadInvalid: it violates the schema.
    """
    validate(action, payload, version)
    by_data_transfer = action == "DataTransfer"
    if by_data_transfer:
        if not is_plug_and_charge(payload, "TriggerMessage", version):
            return None
        payload = _unpack(payload, "TriggerMessage")
        action = "TriggerMessage"
    for (certificate_type, known), how in CARRIAGES.items():
        if (known, how.by_data_transfer, how.trigger_action) == (version, by_data_transfer, action) and (
            payload.get("requestedMessage") == how.trigger
        ):
            return certificate_type
    return None


@dataclass(frozen=True, slots=True)
class Signed:
    """The content of CertificateSigned.

    Attributes:
        certificate_type: None if missing, which 2.x allows: it answers the pending CSR.
        chain_pem: leaf first; not verified.
        request_id: of the SignCertificate that it answers [A02.FR.24], or None.
    """

    certificate_type: CertificateType | None
    chain_pem: str
    request_id: int | None = None


def read_certificate_signed(action: str, payload: Payload, version: OcppVersion) -> Signed:
    """The certificate that a call from the CSMS brings: CertificateSigned, in 1.6 also inside DataTransfer.

    Raises:
        PayloadInvalid: against the schema, such as a chain of more than 10000 characters; or something else.
    """
    inner = _read(action, "CertificateSigned", payload, version)
    kind = _certificate_type(action, inner, version)
    return Signed(kind, inner["certificateChain"], inner.get("requestId"))


def read_status(action: str, payload: Payload, version: OcppVersion, message: str = "SignCertificate") -> str:
    """The status in an answer: ``Accepted``, ``Rejected``, ``NotImplemented``, ...

    Where the call went by DataTransfer, the status of `message` counts where it is there, once the DataTransfer itself
    was accepted.

    Raises:
        PayloadInvalid: against the schema.
    """
    validate(action, payload, version, result=True)
    status = str(payload["status"])
    if action == "DataTransfer" and status == "Accepted" and payload.get("data"):
        status = str(_unpack(payload, message, result=True)["status"])
    return status


def read_status_info(payload: Payload) -> str:
    """Why a call was rejected, where the answer says so; else an empty string."""
    inner: object = payload
    if isinstance(data := payload.get("data"), str):
        try:
            inner = json.loads(data)
        except (ValueError, RecursionError):
            return ""
    info = inner.get("statusInfo") if isinstance(inner, dict) else None
    if not isinstance(info, dict):
        return ""
    return ": ".join(str(info[key]) for key in ("reasonCode", "additionalInfo") if key in info)


# --- The CSMS's side -------------------------------------------------------------------------------------------------


def trigger(certificate_type: CertificateType, version: OcppVersion) -> Call:
    """Ask a station for a new CSR [A02.FR.02].

    Raises:
        NotCarried: this version cannot.
    """
    how = carriage(certificate_type, version)
    return _carry(how, how.trigger_action, {"requestedMessage": how.trigger}, version)


@dataclass(frozen=True, slots=True)
class SignRequest:
    """The content of SignCertificate.

    Attributes:
        certificate_type: of the CSR. If missing, which 2.x allows, `CHARGING_STATION_CERTIFICATE`.
        csr: PEM, not checked.
        request_id: 2.1, or None.
        hash_root_certificate: 2.1, or None.
    """

    certificate_type: CertificateType
    csr: str
    request_id: int | None = None
    hash_root_certificate: Mapping[str, str] | None = None


def read_sign_certificate(action: str, payload: Payload, version: OcppVersion) -> SignRequest:
    """The CSR that a call from a station brings: SignCertificate, in 1.6 also inside DataTransfer.

    Raises:
        PayloadInvalid: against the schema; or something else.
    """
    inner = _read(action, "SignCertificate", payload, version)
    kind = _certificate_type(action, inner, version) or CertificateType.CHARGING_STATION_CERTIFICATE
    return SignRequest(kind, inner["csr"], inner.get("requestId"), inner.get("hashRootCertificate"))


def sign_certificate_answer(action: str, version: OcppVersion, *, accepted: bool, reason: str = "") -> Payload:
    """The answer to SignCertificate; `reason` as in `certificate_signed_answer`."""
    return _verdict(action, "SignCertificate", version, accepted, "InvalidCSR", reason)


def certificate_signed(
    certificate_type: CertificateType,
    version: OcppVersion,
    chain_pem: str,
    *,
    request_id: int | None = None,
    checked: bool = True,
) -> Call:
    """CertificateSigned, the chain leaf first; the type is the one of the SignCertificate that it answers [A02.FR.14].

    Args:
        certificate_type: what the certificate is for.
        version: of the connection.
        chain_pem: the certificates.
        request_id: of the SignCertificate that it answers; 2.1 only.
        checked: False makes what a faulty CSMS would send.

    Raises:
        NotCarried: this version cannot carry the type, or the chain is too long for it.
    """
    how = carriage(certificate_type, version)
    if checked and len(chain_pem) > CHAIN_LIMIT:
        raise NotCarried(
            f"the chain has {len(chain_pem)} characters; OCPP {version.number} carries {CHAIN_LIMIT} at most",
            reason="chain_too_long",
        )
    payload = {"certificateChain": chain_pem} | _about(how, version, {"requestId": request_id})
    return _carry(how, "CertificateSigned", payload, version, checked=checked)


# --- Both sides ------------------------------------------------------------------------------------------------------


def to_timestamp(moment: datetime) -> str:
    """A moment as OCPP writes it: UTC, to the millisecond [RFC 3339]."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _call(action: str, payload: Payload, version: OcppVersion) -> Call:
    validate(action, payload, version)
    return Call(action, payload)


def _carry(how: Carriage, message: str, payload: Payload, version: OcppVersion, *, checked: bool = True) -> Call:
    """A call with `payload`, inside DataTransfer where the carriage says so."""
    if checked:
        validate(message, payload, OcppVersion.V201 if how.by_data_transfer else version)
    if not how.by_data_transfer:
        return Call(message, payload)
    outer = {"vendorId": PNC_VENDOR_ID, "messageId": message, "data": _json(payload)}
    return _call("DataTransfer", outer, version)


def _verdict(action: str, message: str, version: OcppVersion, accepted: bool, code: str, reason: str) -> Payload:
    """The answer of who judges, with the reason where the message has a field for it."""
    payload: Payload = {"status": "Accepted" if accepted else "Rejected"}
    if reason and not (version is OcppVersion.V16 and action == message):
        payload["statusInfo"] = {"reasonCode": code, "additionalInfo": reason[:512]}
    return _answer(action, message, payload, version)


def _answer(action: str, message: str, payload: Payload, version: OcppVersion) -> Payload:
    if action == "DataTransfer":
        validate(message, payload, OcppVersion.V201, result=True)
        payload = {"status": "Accepted", "data": _json(payload)}
    validate(action, payload, version, result=True)
    return payload


def _read(action: str, message: str, payload: Payload, version: OcppVersion) -> Payload:
    """The payload of `message`, by itself or inside DataTransfer."""
    validate(action, payload, version)
    if action == message:
        return payload
    if action == "DataTransfer" and is_plug_and_charge(payload, message, version):
        return _unpack(payload, message)
    raise PayloadInvalid(f"OCPP {version.number} {action} is not a {message}")


def is_plug_and_charge(payload: Payload, message: str, version: OcppVersion) -> bool:
    """Whether a DataTransfer carries this message of 1.6 Plug & Charge."""
    return (version, payload["vendorId"], payload.get("messageId")) == (OcppVersion.V16, PNC_VENDOR_ID, message)


def _unpack(payload: Payload, message: str, *, result: bool = False) -> Payload:
    """The 2.0.1 payload inside a DataTransfer, validated."""
    try:
        inner = json.loads(payload.get("data", ""))
    except (ValueError, RecursionError):
        raise PayloadInvalid(f"DataTransfer {message}: data is not JSON") from None
    validate(message, inner, OcppVersion.V201, result=result)
    assert isinstance(inner, dict)  # the schema says so
    return inner


def _certificate_type(action: str, payload: Payload, version: OcppVersion) -> CertificateType | None:
    """The type that a payload is about; None where it may say and does not."""
    by_data_transfer = action == "DataTransfer"
    name = payload.get("certificateType")
    carried = [
        (certificate_type, how)
        for (certificate_type, known), how in CARRIAGES.items()
        if (known, how.by_data_transfer) == (version, by_data_transfer)
    ]
    found = next((kind for kind, how in carried if how.certificate_type == name), None)
    if found is None and name is not None:
        raise PayloadInvalid(f"OCPP {version.number} {action}: certificateType {name} has no place here")
    return found or next((kind for kind, how in carried if how.is_default), None)


def _about(how: Carriage, version: OcppVersion, newer: Payload) -> Payload:
    """The certificate type, where the message has it, and what is given of the fields that only 2.1 has."""
    given = {name: value for name, value in newer.items() if value is not None}
    if given and not how.carries_request_id:
        raise NotCarried(f"OCPP {version.number} has no {next(iter(given))}", reason="ocpp_not_carried")
    return given if how.certificate_type is None else {"certificateType": how.certificate_type} | given


def _json(payload: Payload) -> str:
    return json.dumps(payload, separators=(",", ":"), ensure_ascii=False)
