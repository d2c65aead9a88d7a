"""What each version of OCPP carries, judged by the official schemas, and what is refused before it is sent."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import jsonschema  # type: ignore[import-untyped]  # ships no type information
import ocpp as library  # type: ignore[import-untyped]  # same
import pytest

from stationkey.contract.profiles import CertificateType
from stationkey.simulators import ocpp
from stationkey.simulators.csms.events import EventKind
from stationkey.simulators.ocpp import (
    CARRIAGES,
    NotCarried,
    OcppVersion,
    Payload,
    PayloadInvalid,
    TriggerStatus,
    UnknownAction,
)
from stationkey.simulators.pki import Misbehaviour

STATION = CertificateType.CHARGING_STATION_CERTIFICATE
V2G = CertificateType.V2G_CERTIFICATE
V2G20 = CertificateType.V2G20_CERTIFICATE
V16, V201, V21 = OcppVersion
PNC = "org.openchargealliance.iso15118pnc"

CARRIED = [
    # type, version, message, certificateType, trigger message, requestedMessage, requestId and hashRootCertificate
    (STATION, V16, "SignCertificate", None, "ExtendedTriggerMessage", "SignChargePointCertificate", False),
    (V2G, V16, "DataTransfer", "V2GCertificate", "DataTransfer", "SignV2GCertificate", False),
    (STATION, V201, "SignCertificate", "ChargingStationCertificate", "TriggerMessage", f"Sign{STATION}", False),
    (V2G, V201, "SignCertificate", "V2GCertificate", "TriggerMessage", "SignV2GCertificate", False),
    (STATION, V21, "SignCertificate", "ChargingStationCertificate", "TriggerMessage", f"Sign{STATION}", True),
    (V2G, V21, "SignCertificate", "V2GCertificate", "TriggerMessage", "SignV2GCertificate", True),
    (V2G20, V21, "SignCertificate", "V2G20Certificate", "TriggerMessage", "SignV2G20Certificate", True),
]
"""The table of the standards, written down a second time."""
each_carriage = pytest.mark.parametrize(
    ("kind", "version"), [pytest.param(row[0], row[1], id=f"{row[1]}-{row[0]}") for row in CARRIED]
)
NOT_CARRIED = [
    pytest.param(kind, version, id=f"{version}-{kind}")
    for kind in CertificateType
    for version in OcppVersion
    if (kind, version) not in {row[:2] for row in CARRIED}
]


def official(action: str, payload: object, version: OcppVersion, *, answer: bool = False) -> Any:
    """Judge a payload by the schema file of the `ocpp` library, read here and now; returns the payload."""
    suffix = "Response" if answer else "" if version is V16 else "Request"
    folder = Path(next(iter(library.__path__)), "v" + version.number.replace(".", ""), "schemas")
    schema = json.loads((folder / f"{action}{suffix}.json").read_text("utf-8-sig"))
    jsonschema.validate(payload, schema)
    return payload


def unwrapped(action: str, payload: Payload, version: OcppVersion, message: str) -> Payload:
    """The payload of `message`, by itself or inside the DataTransfer of 1.6 Plug & Charge."""
    official(action, payload, version)
    if action != "DataTransfer":
        assert action == message
        return payload
    assert (payload["vendorId"], payload["messageId"]) == (PNC, message)
    inner: Payload = official(message, json.loads(payload["data"]), V201)
    return inner


def test_the_table_holds_what_the_standards_can_carry_and_nothing_else() -> None:
    told = []
    for kind, version, action, name, trigger_action, trigger, newer in CARRIED:
        how = CARRIAGES[kind, version]
        assert how.action == action
        assert how.certificate_type == name
        assert ("DataTransfer" if how.by_data_transfer else how.trigger_action) == trigger_action
        assert how.trigger.lower() == trigger.lower().replace("_", "")
        assert how.carries_request_id == newer
        told.append((kind, version))
    assert set(CARRIAGES) == set(told)
    assert ocpp.undecided(CertificateType) == set()


def test_a_certificate_type_without_its_rows_would_be_an_error_at_import() -> None:
    newer = [*CertificateType, cast("CertificateType", "v2g30_certificate")]

    assert ocpp.undecided(newer) == {("v2g30_certificate", version) for version in OcppVersion}
    with pytest.raises(KeyError):
        ocpp.carriage(newer[-1], V21)


@pytest.mark.parametrize(("kind", "version"), NOT_CARRIED)
def test_what_a_version_cannot_carry_is_refused_in_words(kind: CertificateType, version: OcppVersion) -> None:
    for attempt in (
        lambda: ocpp.carriage(kind, version),
        lambda: ocpp.sign_certificate(kind, version, "CSR"),
        lambda: ocpp.trigger(kind, version),
        lambda: ocpp.certificate_signed(kind, version, "CHAIN"),
    ):
        with pytest.raises(NotCarried) as refusal:
            attempt()
        assert refusal.value.reason == "ocpp_not_carried"
        assert {version.number, kind} <= set(refusal.value.message.split())  # words: what by what
        assert "OCPP 2.1" in refusal.value.hint  # words: the version that helps


@each_carriage
def test_a_csr_goes_out_as_the_official_schema_has_it(kind: CertificateType, version: OcppVersion) -> None:
    how = CARRIAGES[kind, version]
    action, payload = ocpp.sign_certificate(kind, version, "CSR")
    inner = unwrapped(action, payload, version, "SignCertificate")
    assert inner == {"csr": "CSR"} | ({"certificateType": how.certificate_type} if how.certificate_type else {})
    read = ocpp.read_sign_certificate(action, payload, version)
    assert (read.certificate_type, read.csr, read.request_id) == (kind, "CSR", None)


@each_carriage
def test_a_csr_of_5500_characters_is_carried_and_one_of_5501_is_refused(
    kind: CertificateType, version: OcppVersion
) -> None:
    unwrapped(*ocpp.sign_certificate(kind, version, "x" * 5500), version, "SignCertificate")
    with pytest.raises(NotCarried, match=r"5501.*5500") as refusal:  # words: its length, the limit
        ocpp.sign_certificate(kind, version, "x" * 5501)
    assert refusal.value.reason == "csr_too_long"


@each_carriage
def test_a_chain_of_10000_characters_is_carried_and_one_of_10001_is_refused(
    kind: CertificateType, version: OcppVersion
) -> None:
    action, payload = ocpp.certificate_signed(kind, version, "x" * 10000)
    unwrapped(action, payload, version, "CertificateSigned")
    assert ocpp.read_certificate_signed(action, payload, version).chain_pem == "x" * 10000
    with pytest.raises(NotCarried, match=r"10001.*10000") as refusal:  # words: its length, the limit
        ocpp.certificate_signed(kind, version, "x" * 10001)
    assert refusal.value.reason == "chain_too_long"
    faulty = ocpp.certificate_signed(kind, version, "x" * 10001, checked=False)
    with pytest.raises(PayloadInvalid, match=r"certificateChain.*maxLength") as invalid:  # words: the schema's
        ocpp.read_certificate_signed(*faulty, version)
    assert invalid.value.keyword == "maxLength"


HASH_ROOT = {"hashAlgorithm": "SHA256", "issuerNameHash": "aa", "issuerKeyHash": "bb", "serialNumber": "1"}


@each_carriage
def test_request_id_and_root_are_carried_by_2_1_and_refused_by_what_has_no_field_for_them(
    kind: CertificateType, version: OcppVersion
) -> None:
    if version is V21:
        call = ocpp.sign_certificate(kind, version, "CSR", request_id=7, hash_root_certificate=HASH_ROOT)
        inner = unwrapped(*call, version, "SignCertificate")
        assert (inner["requestId"], inner["hashRootCertificate"]) == (7, HASH_ROOT)
        read = ocpp.read_sign_certificate(*call, version)
        assert (read.request_id, read.hash_root_certificate) == (7, HASH_ROOT)
        assert ocpp.read_certificate_signed(
            *ocpp.certificate_signed(kind, version, "CHAIN", request_id=7), version
        ) == ocpp.Signed(kind, "CHAIN", 7)
        return
    # words: which field; the reason is that of all that a version does not carry
    with pytest.raises(NotCarried, match="requestId"):
        ocpp.sign_certificate(kind, version, "CSR", request_id=7)
    with pytest.raises(NotCarried, match="hashRootCertificate"):
        ocpp.sign_certificate(kind, version, "CSR", hash_root_certificate=HASH_ROOT)
    with pytest.raises(NotCarried, match="requestId"):
        ocpp.certificate_signed(kind, version, "CHAIN", request_id=7)


def test_a_root_that_is_none_is_refused_by_the_schema() -> None:
    with pytest.raises(PayloadInvalid, match="MD5") as invalid:  # words: which value
        ocpp.sign_certificate(STATION, V21, "CSR", hash_root_certificate=HASH_ROOT | {"hashAlgorithm": "MD5"})
    assert invalid.value.keyword == "enum"


@each_carriage
def test_a_trigger_is_read_as_what_it_asks_for(kind: CertificateType, version: OcppVersion) -> None:
    action, payload = ocpp.trigger(kind, version)
    how = CARRIAGES[kind, version]
    assert unwrapped(action, payload, version, how.trigger_action) == {"requestedMessage": how.trigger}
    assert ocpp.read_trigger(action, payload, version) is kind


@pytest.mark.parametrize(
    ("action", "payload", "version"),
    [
        pytest.param("TriggerMessage", {"requestedMessage": "Heartbeat"}, V201, id="heartbeat"),
        pytest.param("TriggerMessage", {"requestedMessage": "SignCombinedCertificate"}, V21, id="combined"),
        pytest.param("TriggerMessage", {"requestedMessage": "Heartbeat"}, V16, id="heartbeat-1.6"),
        pytest.param("ExtendedTriggerMessage", {"requestedMessage": "Heartbeat"}, V16, id="extended-heartbeat"),
        pytest.param("Reset", {"type": "OnIdle"}, V201, id="no-trigger"),
        pytest.param("DataTransfer", {"vendorId": "else", "messageId": "TriggerMessage"}, V16, id="other-vendor"),
        pytest.param("DataTransfer", {"vendorId": PNC, "messageId": "CertificateSigned"}, V16, id="other-message"),
        pytest.param("DataTransfer", {"vendorId": PNC, "messageId": "TriggerMessage"}, V201, id="not-in-2.0.1"),
        pytest.param(
            "DataTransfer",
            {
                "vendorId": PNC,
                "messageId": "TriggerMessage",
                "data": '{"requestedMessage": "SignChargingStationCertificate"}',
            },
            V16,
            id="no-station-certificate-by-data-transfer",
        ),
    ],
)
def test_a_call_that_triggers_no_csr_of_ours_is_read_as_none(
    action: str, payload: Payload, version: OcppVersion
) -> None:
    official(action, payload, version)
    assert ocpp.read_trigger(action, payload, version) is None


@pytest.mark.parametrize(
    ("payload", "keyword", "words"),
    [
        pytest.param({"vendorId": PNC, "messageId": "TriggerMessage", "data": "{"}, "", "data", id="no-json"),
        pytest.param({"vendorId": PNC, "messageId": "TriggerMessage"}, "", "data", id="no-data"),
        pytest.param({"vendorId": PNC, "messageId": "TriggerMessage", "data": "[" * 99999}, "", "data", id="too-deep"),
        pytest.param({"vendorId": PNC, "messageId": "TriggerMessage", "data": "[]"}, "type", "[]", id="a-list"),
        pytest.param(
            {"vendorId": PNC, "messageId": "TriggerMessage", "data": '{"requestedMessage": "SignV2G20Certificate"}'},
            "enum",
            "SignV2G20Certificate",
            id="of-2.1",
        ),
        pytest.param({"messageId": "TriggerMessage"}, "required", "vendorId", id="no-vendor"),
    ],
)
def test_a_data_transfer_that_cannot_be_understood_says_why(payload: Payload, keyword: str, words: str) -> None:
    with pytest.raises(PayloadInvalid, match=re.escape(words)) as invalid:  # words: which field or value
        ocpp.read_trigger("DataTransfer", payload, V16)
    assert invalid.value.keyword == keyword


@pytest.mark.parametrize("version", [V201, V21])
def test_a_certificate_whose_type_is_left_out_answers_what_is_pending(version: OcppVersion) -> None:
    read = ocpp.read_certificate_signed("CertificateSigned", {"certificateChain": "CHAIN"}, version)
    assert read == ocpp.Signed(None, "CHAIN", None)


def test_1_6_knows_the_type_by_the_message() -> None:
    chain = {"certificateChain": "CHAIN"}
    assert ocpp.read_certificate_signed("CertificateSigned", chain, V16).certificate_type is STATION
    transfer = {"vendorId": PNC, "messageId": "CertificateSigned", "data": json.dumps(chain)}
    assert ocpp.read_certificate_signed("DataTransfer", transfer, V16).certificate_type is V2G


@pytest.mark.parametrize(
    ("action", "payload", "version"),
    [
        pytest.param("CertificateSigned", {}, V16, id="no-chain"),
        pytest.param("CertificateSigned", {"certificateChain": "C", "requestId": 1}, V201, id="requestId-in-2.0.1"),
        pytest.param("CertificateSigned", {"certificateChain": "C", "requestId": "1"}, V21, id="requestId-no-number"),
        pytest.param(
            "CertificateSigned", {"certificateChain": "C", "certificateType": "V2G20Certificate"}, V201, id="V2G20"
        ),
        pytest.param("Heartbeat", {}, V21, id="another-message"),
        pytest.param("DataTransfer", {"vendorId": "else"}, V16, id="another-vendor"),
        pytest.param(
            "DataTransfer",
            {
                "vendorId": PNC,
                "messageId": "CertificateSigned",
                "data": '{"certificateChain": "C", "certificateType": "ChargingStationCertificate"}',
            },
            V16,
            id="station-certificate-by-data-transfer",
        ),
    ],
)
def test_what_is_no_certificate_signed_is_refused(action: str, payload: Payload, version: OcppVersion) -> None:
    with pytest.raises(PayloadInvalid) as refusal:
        ocpp.read_certificate_signed(action, payload, version)
    assert refusal.value.reason == "ocpp_payload_invalid"


@each_carriage
@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "rejected"])
def test_answers_are_as_the_official_schema_has_them(
    kind: CertificateType, version: OcppVersion, accepted: bool
) -> None:
    status = "Accepted" if accepted else "Rejected"
    reason = "" if accepted else "w" * 600
    call = ocpp.sign_certificate(kind, version, "CSR")
    signed = ocpp.certificate_signed(kind, version, "CHAIN")
    asked = ocpp.trigger(kind, version)
    for action, message, payload in (
        (
            call.action,
            "SignCertificate",
            ocpp.sign_certificate_answer(call.action, version, accepted=accepted, reason=reason),
        ),
        (
            signed.action,
            "CertificateSigned",
            ocpp.certificate_signed_answer(signed.action, version, accepted=accepted, reason=reason),
        ),
        (asked.action, "TriggerMessage", ocpp.trigger_answer(asked.action, version, TriggerStatus(status))),
    ):
        official(action, payload, version, answer=True)
        if action == "DataTransfer":
            assert payload["status"] == "Accepted"  # the transfer itself was understood
            official(message, json.loads(payload["data"]), V201, answer=True)
        assert ocpp.read_status(action, payload, version, message) == status
        carries_words = version is not V16 or action == "DataTransfer"
        told = reason[:512] if carries_words and message != "TriggerMessage" else ""
        assert ocpp.read_status_info(payload).endswith(told)
        assert bool(ocpp.read_status_info(payload)) is bool(told)


@pytest.mark.parametrize(
    ("payload", "status"),
    [
        pytest.param({"status": "UnknownVendorId"}, "UnknownVendorId", id="unknown-vendor"),
        pytest.param({"status": "Rejected", "data": '{"status": "Accepted"}'}, "Rejected", id="transfer-rejected"),
        pytest.param({"status": "Accepted"}, "Accepted", id="nothing-more-said"),
    ],
)
def test_a_data_transfer_says_by_itself_that_it_was_not_taken(payload: Payload, status: str) -> None:
    assert ocpp.read_status("DataTransfer", payload, V16) == status


@pytest.mark.parametrize(
    "payload",
    [{"data": "{"}, {"data": "[]"}, {"statusInfo": "words"}, {}],
    ids=["no-json", "a-list", "no-object", "nothing"],
)
def test_an_answer_without_words_has_none(payload: Payload) -> None:
    assert ocpp.read_status_info(payload) == ""


@pytest.mark.parametrize("version", OcppVersion)
def test_a_security_event_is_told_in_utc_and_within_its_bounds(version: OcppVersion) -> None:
    moment = datetime(2025, 6, 1, 14, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    action, payload = ocpp.security_event(
        version, ocpp.INVALID_CERTIFICATE_EVENT, timestamp=moment, tech_info="é" * 300
    )
    official(action, payload, version)
    assert payload == {
        "type": "InvalidChargePointCertificate" if version is V16 else "InvalidChargingStationCertificate",
        "timestamp": "2025-06-01T12:00:00.123Z",
        "techInfo": "é" * 255,
    }
    assert "techInfo" not in ocpp.security_event(version, "X", timestamp=datetime.now(UTC)).payload


@pytest.mark.parametrize("version", OcppVersion)
def test_boot_notification_is_as_the_official_schema_has_it(version: OcppVersion) -> None:
    call = ocpp.boot_notification(version, model="a model", vendor="a vendor")
    assert {"a model", "a vendor"} <= set(re.findall(r"a \w+", str(official(*call, version))))


@pytest.mark.parametrize("action", ["NoSuchMessage", "../../v16/schemas/Heartbeat", "", "Heartbeat\x00", "x" * 70000])
def test_a_message_that_the_version_has_not_is_unknown_whatever_its_name(action: str) -> None:
    with pytest.raises(UnknownAction, match=r"OCPP 2\.1"):  # words: which version
        ocpp.validate(action, {}, V21)


def test_a_complaint_about_a_long_payload_is_short() -> None:
    with pytest.raises(PayloadInvalid) as refusal:
        ocpp.validate("SignCertificate", {"csr": "x" * 100_000}, V21)
    assert refusal.value.keyword == "maxLength"
    assert len(str(refusal.value)) < 200


# --- docs/ocpp.md ----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/ocpp.md").read_text()


def test_the_document_shows_the_table_as_it_is() -> None:
    rows = []
    for (kind, version), how in CARRIAGES.items():
        message = f"{how.action}, `messageId` SignCertificate" if how.by_data_transfer else how.action
        trigger = f"{'DataTransfer, ' if how.by_data_transfer else ''}{how.trigger_action} `{how.trigger}`"
        newer = "requestId, hashRootCertificate" if how.carries_request_id else "none"
        name = f"`{how.certificate_type}`" if how.certificate_type else "none"
        rows.append(f"| {version.number} | `{kind}` | {message} | {name} | {trigger} | {newer} |")
    table = DOCUMENT.split("## What travels how")[1].split("\n\n## ")[0]
    assert [line for line in table.splitlines() if line.startswith(("| 1", "| 2"))] == rows


def test_each_test_that_the_document_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT))
    assert len(named) > 20
    for file, test in named:
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert test in defined, f"{file}::{test}"


def test_each_name_in_the_code_that_the_document_gives_exists() -> None:
    named = set(re.findall(r"`(stationkey(?:\.\w+)+)`", DOCUMENT))
    assert named
    for path in named:
        pkgutil.resolve_name(path)  # imports the modules on the way


@pytest.mark.parametrize(
    "requirement",
    [
        *(f"A00.FR.{number}" for number in (501, 502, 503, 509, 511)),
        *(f"A02.FR.{number:02}" for number in (*range(2, 9), *range(11, 21), 24, 25, 26)),
        *(f"A02.FR.{number} (errata 2025-01)" for number in (10, 28, 29)),
        *("A03.FR.02", "A03.FR.23", "ISO15118Ctrlr"),
    ],
)
def test_the_document_has_a_row_for_each_requirement(requirement: str) -> None:
    assert re.search(rf"^\| {re.escape(requirement)} \|", DOCUMENT, re.MULTILINE)


def test_the_document_has_no_row_for_what_the_errata_removed_and_nothing_is_open() -> None:
    assert not re.search(r"^\| A02\.FR\.09 ", DOCUMENT, re.MULTILINE)
    assert "| *open*" not in DOCUMENT


def test_the_document_lists_each_reason_to_refuse_and_each_misbehaviour() -> None:
    paths = [*(ROOT / "src/stationkey/simulators/csms").glob("*.py"), ROOT / "src/stationkey/x509/csr_check.py"]
    source = "".join(path.read_text() for path in paths)
    reasons = set(re.findall(r'"(csr_\w+|csms_told_to)"', source)) - set(EventKind)
    assert set(re.findall(r"^\| `((?:csr|csms)_\w+)` \|", DOCUMENT, re.MULTILINE)) == reasons
    modes = DOCUMENT.split("## Misbehaviour")[1]
    assert re.findall(r"^\| `(\w+)` \|", modes, re.MULTILINE) == [mode.value for mode in Misbehaviour]
