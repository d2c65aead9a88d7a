"""The CSMS for trying, judged by a station made of the `ocpp` library and by `openssl verify`."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import reasons
import websockets
from cryptography import x509
from csms_parts import (
    ORGANIZATION,
    PNC,
    STATION,
    V2G,
    V2G20,
    V16,
    V21,
    V201,
    RawStation,
    command,
    connected,
    csr_for,
    each_carriage,
    new_key,
)
from ocpp.exceptions import (  # type: ignore[import-untyped]  # same
    InternalError,
    NotSupportedError,
    PropertyConstraintViolationError,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from stationkey.cli import csms as cli_csms
from stationkey.contract.profiles import PROFILES, SECP256R1, SECP521R1, CertificateType
from stationkey.errors import ConfigurationError
from stationkey.simulators.csms.events import Event, EventKind
from stationkey.simulators.csms.server import Csms, CsmsError, SecurityProfile
from stationkey.simulators.ocpp import CARRIAGES, NotCarried, OcppVersion
from stationkey.simulators.ocpp_connection import MAX_FRAGMENTS, NotAnswered, OcppConnection
from stationkey.simulators.pki import Hierarchy, Misbehaviour, certificate_hash, key_to_pem
from stationkey.simulators.pki import to_pem as chain_to_pem


@pytest.fixture(scope="module")
def hierarchies() -> dict[str, Hierarchy]:
    now = Csms(organization=ORGANIZATION)._clock()  # noqa: SLF001 - the time as it takes it
    return {
        "hierarchy": Hierarchy.make(SECP256R1, organization=ORGANIZATION, now=now),
        "hierarchy_20": Hierarchy.make(SECP521R1, organization=ORGANIZATION, now=now),
    }


Make = Callable[..., Csms]


@pytest.fixture
def make(hierarchies: dict[str, Hierarchy]) -> Make:
    """A CSMS with authorities that need not be made again for each test."""
    return lambda **options: Csms(organization=ORGANIZATION, **(hierarchies | options))


def openssl_verify(folder: Path, chain_pem: str, root_pem: str) -> str:
    """What openssl says of a chain, leaf first."""
    leaf, *subs = x509.load_pem_x509_certificates(chain_pem.encode())
    (folder / "root.pem").write_text(root_pem)
    (folder / "leaf.pem").write_text(chain_to_pem([leaf]))
    (folder / "subs.pem").write_text(chain_to_pem(subs))
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "root.pem", "-untrusted", "subs.pem", "leaf.pem"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


# --- The circle ------------------------------------------------------------------------------------------------------


@each_carriage
async def test_a_trigger_leads_to_a_certificate_that_openssl_verifies(
    kind: CertificateType, version: OcppVersion, make: Make, tmp_path: Path
) -> None:
    private_key = new_key(kind)
    csr = csr_for(kind, private_key)
    how = CARRIAGES[kind, version]
    async with make() as csms, connected(csms, version) as station:
        assert await csms.connected("CS001") is version
        assert await station.boot() == "Accepted"
        assert await csms.trigger("CS001", kind) == "Accepted"
        assert await station.next() == (how.trigger_action, {"requestedMessage": how.trigger})
        request_id = {"request_id": 42} if how.carries_request_id else {}
        assert await station.sign(kind, csr, **request_id) == ("Accepted", "")
        action, payload = await station.next()
        assert action == "CertificateSigned"
        assert payload.get("certificateType") == how.certificate_type
        assert payload.get("requestId") == (42 if how.carries_request_id else None)
        chain = payload["certificateChain"]
        assert openssl_verify(tmp_path, chain, csms.trust_anchors_pem(kind)) == "leaf.pem: OK"
        assert x509.load_pem_x509_certificate(chain.encode()).public_key() == private_key.public_key()
        assert (await csms.next(EventKind.CERTIFICATE_ANSWERED)).accepted
    assert [event.kind for event in csms.events] == [
        EventKind.CONNECTED,
        EventKind.BOOTED,
        EventKind.TRIGGERED,
        EventKind.CSR_ACCEPTED,
        EventKind.CERTIFICATE_SENT,
        EventKind.CERTIFICATE_ANSWERED,
        EventKind.DISCONNECTED,
    ]
    assert all(str(event).startswith("CS001: ") for event in csms.events)


@pytest.mark.parametrize(("kind", "version"), [(V2G20, V16), (V2G20, V201)], ids=["ocpp1.6", "ocpp2.0.1"])
async def test_what_a_version_cannot_carry_is_refused_before_anything_is_sent(
    kind: CertificateType, version: OcppVersion, make: Make
) -> None:
    async with make() as csms, connected(csms, version) as station:
        await csms.connected("CS001")
        with pytest.raises(NotCarried) as refusal:
            await csms.trigger("CS001", kind)
        assert refusal.value.reason == "ocpp_not_carried"
        assert {version.number, "v2g20_certificate"} <= set(refusal.value.message.split())  # words: what by what
        await station.boot()  # whatever had been sent before would have come before the answer to this
        assert station.received.empty()
    assert EventKind.TRIGGERED not in [event.kind for event in csms.events]


async def test_the_answer_to_a_trigger_is_told_as_it_came(make: Make) -> None:
    async with make() as csms, connected(csms) as station:
        station.says = "Rejected"
        await csms.connected("CS001")
        assert await csms.trigger("CS001", V2G) == "Rejected"
        del station.point.route_map["TriggerMessage"]["_on_action"]
        station.point._ocpp_version = "2.0.1"  # noqa: SLF001 - in 2.1 the library leaves what it does not know unanswered
        assert await csms.trigger("CS001", V2G) == "NotImplemented"


async def test_a_station_that_is_not_there_cannot_be_triggered(make: Make) -> None:
    async with make() as csms:
        with pytest.raises(CsmsError) as absent:
            await csms.trigger("CS001", V2G)
        with pytest.raises(CsmsError) as late:
            await csms.connected("CS001", timeout=0.01)
        with pytest.raises(CsmsError) as quiet:
            await csms.next(EventKind.BOOTED, timeout=0.01)
    assert [error.value.reason for error in (absent, late, quiet)] == [
        "csms_station_absent",
        "csms_station_absent",
        "csms_nothing_happened",
    ]


async def test_the_certificate_follows_the_answer_and_never_comes_before_it(make: Make) -> None:
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
        call = [2, "a", "SignCertificate", {"csr": csr_for(V2G), "certificateType": "V2GCertificate"}]
        await websocket.send(json.dumps(call))
        first, second = json.loads(await websocket.recv()), json.loads(await websocket.recv())
        assert first == [3, "a", {"status": "Accepted"}]
        assert second[2] == "CertificateSigned"


async def test_a_station_that_goes_away_instead_of_answering_is_told_as_that(make: Make) -> None:
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
        call = [2, "a", "SignCertificate", {"csr": csr_for(V2G), "certificateType": "V2GCertificate"}]
        await websocket.send(json.dumps(call))
        await websocket.recv()
        asked = json.loads(await websocket.recv())
        await websocket.send(json.dumps([3, asked[1], {"status": "Perhaps"}]))
        answered = await csms.next(EventKind.CERTIFICATE_ANSWERED)
        assert (answered.accepted, answered.status) == (False, "ocpp_payload_invalid")


async def test_a_fault_in_answering_is_answered_with_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The fault is put in: the other side waits for an answer, whatever happens here."""

    def fault(*_: object) -> None:
        raise RuntimeError("a fault")

    async with make() as csms, connected(csms) as station:
        monkeypatch.setattr(Csms, "_boot", fault)
        with pytest.raises(InternalError):
            await station.boot()
        assert (await station.call("Heartbeat")).current_time
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.args == ("BootNotification",)


async def test_a_call_without_an_answer_ends(make: Make) -> None:
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
        connection = OcppConnection(websocket, V21, csms.connected)  # type: ignore[arg-type]  # never called
        with pytest.raises(NotAnswered, match=r"Heartbeat.*0\.01 s") as silent:  # words: which call, the limit
            await connection.call("Heartbeat", {}, timeout=0.01)
        await websocket.close()
        with pytest.raises(NotAnswered, match="closed") as closed:  # words: other faults have this reason as well
            await connection.call("Heartbeat", {})
    assert silent.value.reason == closed.value.reason == "ocpp_not_answered"


async def test_a_newer_connection_of_a_station_takes_the_place_of_the_older(make: Make) -> None:
    offer = [Subprotocol("ocpp2.0.1")]
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=offer) as older:
        assert await csms.connected("CS001") is V201
        async with connected(csms, V21) as newer:
            await older.wait_closed()
            await csms.next(EventKind.DISCONNECTED)
            assert await csms.connected("CS001") is V21
            assert await csms.trigger("CS001", V2G20) == "Accepted"
            assert (await newer.next())[0] == "TriggerMessage"


async def test_a_station_that_goes_while_it_is_asked_leaves_nothing_hanging(make: Make) -> None:
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
        await csms.connected("CS001")
        asking = asyncio.create_task(csms.trigger("CS001", V2G))
        await websocket.recv()
        await websocket.close()
        with pytest.raises(NotAnswered, match="closed") as refusal:  # words: other faults have this reason as well
            await asking
        assert refusal.value.reason == "ocpp_not_answered"
        await csms.next(EventKind.DISCONNECTED)


@each_carriage
async def test_a_refused_csr_is_answered_with_rejected_and_no_certificate_follows(
    kind: CertificateType, version: OcppVersion, make: Make
) -> None:
    async with make() as csms, connected(csms, version) as station:
        status, words = await station.sign(kind, csr_for(kind, organization="EcoG"))
        event = await csms.next(EventKind.CSR_REJECTED)
        assert (event.certificate_type, event.reason) == (kind, "csr_organization_name")
        assert str(event) == f"CS001: SignCertificate for a {kind}, rejected: {event.words}"
        told = "" if (kind, version) == (STATION, V16) else event.words  # its answer has no place for words
        assert (status, words) == ("Rejected", told)
        await station.boot()
        assert station.received.empty()
    assert EventKind.CERTIFICATE_SENT not in [event.kind for event in csms.events]


async def test_a_request_id_belongs_to_one_csr(make: Make) -> None:
    """A02.FR.24; the same CSR again is a retry [A02.FR.17]."""
    async with make() as csms, connected(csms) as station:
        csr = csr_for(V2G)
        assert await station.sign(V2G, csr, request_id=1) == ("Accepted", "")
        assert await station.sign(V2G, csr, request_id=1) == ("Accepted", "")
        status, words = await station.sign(V2G, csr_for(V2G), request_id=1)
        assert status == "Rejected"
        assert "requestId 1 " in words  # words: which field
        assert [(await station.next())[1]["requestId"] for _ in range(2)] == [1, 1]


async def test_a_root_that_is_not_this_csmss_is_refused(make: Make) -> None:
    async with make() as csms, connected(csms) as station:
        issuers = csms.hierarchy(V2G20).issuers(V2G20)
        own = certificate_hash(issuers[-1].certificate)
        other = certificate_hash(issuers[0].certificate)
        assert (await station.sign(V2G20, csr_for(V2G20), hash_root_certificate=own))[0] == "Accepted"
        status, words = await station.sign(V2G20, csr_for(V2G20), hash_root_certificate=other)
        assert status == "Rejected"
        assert "hashRootCertificate" in words  # words: which field


# --- What it does wrong when told so ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [V16, V201, V21])
async def test_answer_first_of_three_answers_the_first(version: OcppVersion, make: Make) -> None:
    async with make(misbehaviour=Misbehaviour.ANSWER_FIRST_OF_THREE) as csms, connected(csms, version) as station:
        keys = [new_key() for _ in range(3)]
        for number, key in enumerate(keys):
            assert station.received.empty()
            extra = {"request_id": number} if version is V21 else {}
            assert (await station.sign(V2G, csr_for(V2G, key), **extra))[0] == "Accepted"
        _, payload = await station.next()
        assert payload.get("requestId") == (0 if version is V21 else None)
        certificate = x509.load_pem_x509_certificate(payload["certificateChain"].encode())
        assert certificate.public_key() == keys[0].public_key()
        await csms.next(EventKind.CERTIFICATE_ANSWERED)
        await station.boot()
        assert station.received.empty()


@pytest.mark.parametrize(
    "misbehaviour",
    [Misbehaviour.WRONG_KEY, Misbehaviour.EXPIRED, Misbehaviour.WRONG_DC, Misbehaviour.ROOT_IN_CHAIN],
)
async def test_a_spoiled_certificate_is_sent_and_what_the_station_says_of_it_is_told(
    misbehaviour: Misbehaviour, make: Make, tmp_path: Path
) -> None:
    """What each spoils is held against openssl in test_pki.py."""
    private_key = new_key()
    async with make(misbehaviour=misbehaviour) as csms, connected(csms) as station:
        station.says = "Rejected"
        assert await station.sign(V2G, csr_for(V2G, private_key)) == ("Accepted", "")
        chain_pem = (await station.next())[1]["certificateChain"]
        answered = await csms.next(EventKind.CERTIFICATE_ANSWERED)
        assert (answered.status, answered.accepted) == ("Rejected", False)
        chain = x509.load_pem_x509_certificates(chain_pem.encode())
        assert {
            Misbehaviour.WRONG_KEY: chain[0].public_key() != private_key.public_key(),
            Misbehaviour.EXPIRED: "expired" in openssl_verify(tmp_path, chain_pem, csms.trust_anchors_pem(V2G)),
            Misbehaviour.WRONG_DC: "CPO" not in chain[0].subject.rfc4514_string(),
            Misbehaviour.ROOT_IN_CHAIN: chain[-1].subject == chain[-1].issuer,
        }[misbehaviour]


@each_carriage
async def test_a_chain_too_long_goes_out_all_the_same(kind: CertificateType, version: OcppVersion, make: Make) -> None:
    async with make(misbehaviour=Misbehaviour.CHAIN_TOO_LONG) as csms, connected(csms, version) as station:
        await station.sign(kind, csr_for(kind))
        assert len((await csms.next(EventKind.CERTIFICATE_SENT)).chain_pem) > 10000
        answered = await csms.next(EventKind.CERTIFICATE_ANSWERED)
        if CARRIAGES[kind, version].by_data_transfer:  # whose own schema has no bound
            assert len((await station.next())[1]["certificateChain"]) > 10000
        else:  # the station's library judges it by the schema
            assert answered.status == "TypeConstraintViolation"


async def test_never_accepts_and_sends_nothing(make: Make) -> None:
    async with make(misbehaviour=Misbehaviour.NEVER) as csms, connected(csms) as station:
        for _ in range(4):
            assert await station.sign(V2G, csr_for(V2G)) == ("Accepted", "")
        await station.boot()
        assert station.received.empty()
        csms.misbehaviour = None
        await station.sign(V2G, csr_for(V2G))
        assert (await station.next())[0] == "CertificateSigned"


async def test_reject_refuses_a_good_csr(make: Make) -> None:
    async with make(misbehaviour=Misbehaviour.REJECT) as csms, connected(csms) as station:
        assert await station.sign(V2G, csr_for(V2G)) == ("Rejected", "this CSMS was told to refuse every CSR")


async def test_unknown_request_id_sends_one_that_was_never_used(make: Make) -> None:
    async with make(misbehaviour=Misbehaviour.UNKNOWN_REQUEST_ID) as csms, connected(csms) as station:
        await station.sign(V2G, csr_for(V2G), request_id=5)
        assert (await station.next())[1]["requestId"] == 6
        await station.sign(V2G, csr_for(V2G))
        assert "requestId" not in (await station.next())[1]


# --- Who is let in ---------------------------------------------------------------------------------------------------


def basic(name: str, password: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": websockets.headers.build_authorization_basic(name, password)}}


def trusting(csms: Csms, folder: Path | None = None, chain: str = "", key: bytes = b"") -> ssl.SSLContext:
    """A client that trusts the CSMS's root, and shows a certificate where there is one."""
    context = ssl.create_default_context(cadata=csms.trust_anchors_pem(STATION))
    if folder is not None:
        (folder / "client.pem").write_bytes(key + chain.encode())
        context.load_cert_chain(folder / "client.pem")
    return context


PASSWORDS = {"CS001": "Strom für alle", "CS002": "other"}


@pytest.mark.parametrize("profile", [SecurityProfile.BASIC, SecurityProfile.TLS], ids=["profile-1", "profile-2"])
async def test_a_station_is_let_in_by_its_own_password_only(profile: SecurityProfile, make: Make) -> None:
    async with make(security_profile=profile, passwords=PASSWORDS) as csms:
        tls: dict[str, Any] = {"ssl": trusting(csms)} if profile is SecurityProfile.TLS else {}
        assert csms.url.startswith("wss://" if tls else "ws://")
        async with connected(csms, **basic("CS001", PASSWORDS["CS001"]), **tls) as station:
            assert await station.boot() == "Accepted"
        for options in (
            {},
            basic("CS001", "other"),
            basic("CS002", PASSWORDS["CS002"]),  # another station's name
            basic("CS001", ""),
            {"additional_headers": {"Authorization": "Basic ?"}},
            {"additional_headers": {"Authorization": "Bearer x"}},
        ):
            with pytest.raises(InvalidStatus) as refusal:
                async with connected(csms, **options, **tls):
                    pass
            assert refusal.value.response.status_code == 401
            assert refusal.value.response.headers["WWW-Authenticate"].startswith("Basic ")
            assert "password" in (await csms.next(EventKind.CONNECTION_REFUSED)).words  # words: it is told of no reason
    assert all(password not in str(event) for event in csms.events for password in PASSWORDS.values())


@pytest.mark.parametrize("profile", [SecurityProfile.TLS, SecurityProfile.MUTUAL_TLS])
async def test_a_station_that_trusts_another_root_hangs_up(profile: SecurityProfile, make: Make) -> None:
    async with make(security_profile=profile) as csms:
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connected(csms, ssl=ssl.create_default_context()):
                pass


async def test_a_certificate_that_the_csms_has_signed_opens_profile_3(make: Make, tmp_path: Path) -> None:
    private_key = new_key()
    async with make() as csms, connected(csms) as station:
        await station.sign(STATION, csr_for(STATION, private_key))
        chain = (await station.next())[1]["certificateChain"]
    async with make(security_profile=SecurityProfile.MUTUAL_TLS) as csms:
        mine = trusting(csms, tmp_path, chain, key_to_pem(private_key))
        async with connected(csms, ssl=mine) as station:
            assert await station.boot() == "Accepted"
        certificate = (await csms.next(EventKind.CONNECTED)).certificate
        assert certificate is not None
        assert certificate.public_key() == private_key.public_key()


async def test_profile_3_lets_nobody_in_without_a_certificate_or_with_a_v2g_one(
    make: Make, hierarchies: dict[str, Hierarchy], tmp_path: Path
) -> None:
    private_key = new_key()
    csr = x509.load_pem_x509_csr(csr_for(V2G, private_key).encode())
    async with make(security_profile=SecurityProfile.MUTUAL_TLS) as csms:
        chain = hierarchies["hierarchy"].issue(csr, PROFILES[V2G], now=csms._clock())  # noqa: SLF001 - its own time
        for context in (trusting(csms), trusting(csms, tmp_path, chain_to_pem(chain), key_to_pem(private_key))):
            with pytest.raises((OSError, websockets.InvalidHandshake, websockets.ConnectionClosed)):
                async with connected(csms, ssl=context):
                    pass
    assert csms.events == []


async def test_profile_3_lets_no_other_organizations_station_in(
    make: Make, hierarchies: dict[str, Hierarchy], tmp_path: Path
) -> None:
    private_key = new_key()
    csr = x509.load_pem_x509_csr(csr_for(STATION, private_key, organization="Other").encode())
    async with make(security_profile=SecurityProfile.MUTUAL_TLS) as csms:
        chain = hierarchies["hierarchy"].issue(csr, PROFILES[STATION], now=csms._clock())  # noqa: SLF001 - same
        context = trusting(csms, tmp_path, chain_to_pem(chain), key_to_pem(private_key))
        with pytest.raises(InvalidStatus) as refusal:
            async with connected(csms, ssl=context):
                pass
        assert refusal.value.response.status_code == 401
        refused = await csms.next(EventKind.CONNECTION_REFUSED)
        assert "O of the station's certificate" in refused.words  # words: which field


def test_profile_1_without_passwords_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Csms(organization=ORGANIZATION, security_profile=SecurityProfile.BASIC)
    assert refusal.value.reason == "csms_no_passwords"


async def test_the_first_version_that_both_speak_is_taken(make: Make) -> None:
    async with make(versions=[V201, V16]) as csms:
        offer = [Subprotocol(name) for name in ("ocpp2.1", "ocpp1.6", "ocpp2.0.1")]
        async with connect(f"{csms.url}/CS001", subprotocols=offer) as websocket:
            assert websocket.subprotocol == "ocpp1.6"


@pytest.mark.parametrize("offer", [None, ["ocpp1.5"]], ids=["none", "another"])
async def test_without_a_common_version_the_connection_is_closed(offer: list[Subprotocol] | None, make: Make) -> None:
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=offer) as websocket:
        await websocket.wait_closed()
        assert websocket.close_code == 1002
        assert (
            "subprotocols" in (await csms.next(EventKind.CONNECTION_REFUSED)).words
        )  # words: what has nothing in common


async def test_a_url_without_a_stations_id_is_not_found(make: Make) -> None:
    async with make() as csms:
        with pytest.raises(InvalidStatus) as refusal:
            async with connect(f"{csms.url}/", subprotocols=[Subprotocol("ocpp2.1")]):
                pass
    assert refusal.value.response.status_code == 404


async def test_a_stations_id_may_have_any_characters(make: Make) -> None:
    async with make() as csms, connect(f"{csms.url}/x/DE*S%C3%9C%2F1", subprotocols=[Subprotocol("ocpp2.1")]):
        assert await csms.connected("DE*SÜ/1") is V21


# --- What else it answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", OcppVersion)
async def test_the_messages_of_every_station_are_answered(version: OcppVersion, make: Make) -> None:
    """The library holds each answer against the official schema."""
    now = "2025-06-01T12:00:00Z"
    status = (
        {"connector_id": 1, "error_code": "NoError", "status": "Available"}
        if version is V16
        else {"timestamp": now, "connector_status": "Available", "evse_id": 1, "connector_id": 1}
    )
    async with make() as csms, connected(csms, version) as station:
        assert await station.boot() == "Accepted"
        assert (await station.call("Heartbeat")).current_time.endswith("Z")
        await station.call("StatusNotification", **status)
        await station.call(
            "SecurityEventNotification", type="InvalidChargingStationCertificate", timestamp=now, tech_info="x"
        )
        answer = await station.call("DataTransfer", vendor_id="else", message_id="x")
        assert answer.status == "UnknownVendorId"
        booted = await csms.next(EventKind.BOOTED)
        assert (booted.vendor, booted.model) == ("V", "M")
        assert (await csms.next(EventKind.STATUS_REPORTED)).status == "Available"
        assert (await csms.next(EventKind.SECURITY_EVENT)).type == "InvalidChargingStationCertificate"
        assert [str(event).count("\n") for event in csms.events] == [0] * 4


async def test_a_plug_and_charge_message_that_it_does_not_know_is_said_to_be_unknown(make: Make) -> None:
    async with make() as csms, connected(csms, V16) as station:
        answer = await station.call("DataTransfer", vendor_id=PNC, message_id="Get15118EVCertificate", data="{}")
        assert answer.status == "UnknownMessageId"


async def test_what_it_does_not_serve_is_answered_so(make: Make) -> None:
    async with make() as csms, connected(csms) as station:
        with pytest.raises(NotSupportedError):
            await station.call("Authorize", id_token={"idToken": "x", "type": "Central"})
        report = {"request_id": 1, "generated_at": "2025-06-01T12:00:00Z", "seq_no": 0}
        await station.call("NotifyReport", **report)  # needs no answer but that it came


async def test_1_6_plug_and_charge_that_is_no_json_is_answered_with_an_error(make: Make) -> None:
    async with make() as csms, connected(csms, V16) as station:
        with pytest.raises(PropertyConstraintViolationError, match=r"SignCertificate.*JSON"):  # words: which
            await station.call("DataTransfer", vendor_id=PNC, message_id="SignCertificate", data="{")


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        pytest.param([2, "a", "NoSuch", {}], "NotImplemented", id="unknown"),
        pytest.param([2, "a", "../../x", {}], "NotImplemented", id="a-path"),
        pytest.param([2, "a", "SignCertificate", {}], "OccurrenceConstraintViolation", id="missing"),
        pytest.param([2, "a", "SignCertificate", {"csr": 1}], "TypeConstraintViolation", id="type"),
        pytest.param([2, "a", "SignCertificate", []], "TypeConstraintViolation", id="no-object"),
        pytest.param([2, "a", "SignCertificate", {"csr": "x", "y": 1}], "FormatViolation", id="extra"),
        pytest.param([2, "a", "SignCertificate", {"csr": "x" * 5501}], "PropertyConstraintViolation", id="long"),
        pytest.param(
            [2, "a", "Authorize", {"idToken": {"idToken": "x", "type": "y"}}], "NotSupported", id="not-served"
        ),
    ],
)
async def test_a_call_against_the_schema_is_answered_with_the_right_error(
    frame: list[Any], code: str, make: Make
) -> None:
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
        await websocket.send(json.dumps(frame))
        answer = json.loads(await websocket.recv())
        assert (answer[:3], len(answer)) == ([4, "a", code], 5)
        assert len(answer[3]) <= 255


@pytest.mark.parametrize(
    "frame",
    [
        *("", "{}", "[]", "[2]", "nonsense", "[9, 1, 2, 3]", '[2, 1, "Heartbeat", {}]', '[2, "a", 1, {}]'),
        *('[3, "never asked", {}]', '[4, "never asked", "X", "", {}]', "[3, null, {}]"),
        pytest.param("[" * 99999, id="too-deep"),
        pytest.param(f'[2, "a", "Heartbeat", {{"x": {"9" * 50_000}}}]', id="a number of 50,000 digits"),
        pytest.param(b"\xff", id="not UTF-8"),
    ],
)
async def test_what_is_no_message_is_passed_over_and_the_next_is_answered(frame: str | bytes, make: Make) -> None:
    async with make() as csms, connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
        await websocket.send(frame)
        await websocket.send('[2, "b", "Heartbeat", {}]')
        assert json.loads(await websocket.recv())[:2] == [3, "b"]


async def test_a_message_of_endless_empty_fragments_ends_its_connection_alone(make: Make) -> None:
    """They have no size that would count, and each takes memory until the last has come."""

    async def fragments(text: str, empty: int) -> AsyncIterator[str]:
        for _ in range(empty):
            yield ""
            await asyncio.sleep(0)  # so that an end is noticed
        yield text

    async def station() -> ClientConnection:
        return await connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")])

    async with make() as csms:
        async with await station() as hostile:
            with pytest.raises(ConnectionClosed):  # noqa: PT012 - by either
                await hostile.send(fragments('[2, "a", "Heartbeat", {}]', 10 * MAX_FRAGMENTS))
                await hostile.recv()
        async with await station() as good:
            await good.send(fragments('[2, "b", "Heartbeat", {}]', 100))
            assert json.loads(await good.recv())[:2] == [3, "b"]


async def test_events_are_told_to_each_who_asks_from_the_first_on(make: Make) -> None:
    async with make() as csms, connected(csms) as station:
        await station.boot()
        told: list[Event] = []
        async for event in csms.stream():
            told.append(event)
            if len(told) == 2:
                break
        assert [event.kind for event in told] == [EventKind.CONNECTED, EventKind.BOOTED]
        assert await csms.next(EventKind.BOOTED) is told[1]
        with pytest.raises(CsmsError):
            await csms.next(EventKind.BOOTED, timeout=0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_triggers_each_certificate_in_turn_and_ends_with_0(
    number: signal.Signals, tmp_path: Path
) -> None:
    kinds = [V2G, STATION]
    triggers = [word for kind in kinds for word in ("--trigger", kind.value)]
    async with command("--pki-dir", str(tmp_path / "pki"), *triggers) as csms:
        url = (await csms.until("listening on")).split()[-1].replace("STATION-ID", "CS001")
        async with connect(url, subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
            station = RawStation(V21, websocket)
            listening = asyncio.create_task(station.point.start())
            await station.boot()
            for kind in kinds:
                assert (await station.next())[0] == "TriggerMessage"
                await station.sign(kind, csr_for(kind))
                chain = (await station.next())[1]["certificateChain"]
                anchors = (tmp_path / "pki" / "trust-anchors.pem").read_text()
                assert openssl_verify(tmp_path, chain, anchors) == "leaf.pem: OK"
                await csms.until(f"CertificateSigned for the {kind} answered: Accepted")
            listening.cancel()
            await asyncio.wait([listening])
            csms.process.send_signal(number)
            assert await csms.process.wait() == 0


@pytest.mark.parametrize("options", [(), ("--tls",)], ids=["ws", "wss"])
async def test_half_open_handshakes_do_not_keep_the_command_from_ending(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    with ExitStack() as opened:
        async with command("--pki-dir", str(tmp_path), *options) as csms:
            assert csms.process.stdout is not None
            url = urlsplit((await csms.until("listening on")).split()[-1])
            for _ in range(500):
                opened.enter_context(socket.create_connection((url.hostname, url.port)))
            csms.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):  # what a service manager would wait
                assert await csms.process.wait() == 0
            assert b"Traceback" not in await csms.process.stdout.read()


async def test_the_command_goes_on_where_a_trigger_leads_to_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a version cannot carry, what the station rejects, and what never comes to an end."""
    async with make(misbehaviour=Misbehaviour.NEVER) as csms, connected(csms, V201) as station:
        await csms.connected("CS001")
        station.says = "Rejected"
        await cli_csms.ask(csms, "CS001", [V2G20, V2G], asyncio.Condition())
        station.says = "Accepted"
        monkeypatch.setattr(cli_csms, "TRIGGER_TIMEOUT", 0.01)  # so that it ends
        await cli_csms.ask(csms, "CS001", [STATION, V2G], asyncio.Condition())
        assert [(await station.next())[1]["requestedMessage"] for _ in range(3)] == [
            "SignV2GCertificate",
            "SignChargingStationCertificate",
            "SignV2GCertificate",
        ]
    told = capsys.readouterr().out
    assert {"2.0.1", "v2g20_certificate"} <= set(told.replace(":", " ").split())  # words: what by what
    assert told.count("CS001: no end to the") == 2  # words: what the command prints of each


async def test_the_command_keeps_its_authorities_and_asks_for_passwords(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text("# stations\n\nCS001:se:cret\n")
    options = ("--pki-dir", str(tmp_path / "pki"), "--password-file", str(tmp_path / "passwords"), "--tls")
    anchors = []
    for _ in range(2):
        async with command(*options) as csms:
            url = (await csms.until("listening on wss://")).split()[-1].replace("STATION-ID", "CS001")
            await csms.until("trust anchors in")
            anchors.append((tmp_path / "pki" / "trust-anchors.pem").read_text())
            context = ssl.create_default_context(cadata=anchors[0])
            version = [Subprotocol("ocpp1.6")]
            async with connect(url, subprotocols=version, ssl=context, **basic("CS001", "se:cret")):
                await csms.until("CS001: connected, OCPP 1.6")
            with pytest.raises(InvalidStatus) as refusal:
                async with connect(url, subprotocols=version, ssl=context):
                    pass
            assert refusal.value.response.status_code == 401
            await csms.until("CS001: not let in")
        assert "se:cret" not in "".join(csms.lines)  # words: the secret is not in it
    assert anchors[0] == anchors[1]


@pytest.mark.parametrize(
    ("arguments", "reason", "words"),
    [
        pytest.param(["--listen", "9000"], "", "'9000'", id="no-host"),
        pytest.param(["--listen", "127.0.0.1:99999"], "", "'127.0.0.1:99999'", id="port-too-large"),
        pytest.param(["--listen", "192.0.2.1:9000"], "csms_cannot_listen", "192.0.2.1", id="not-an-address-of-ours"),
        pytest.param(["--password-file", "bad"], "csms_password_file", "bad, line 2", id="password-file"),
        pytest.param(["--pki-dir", "."], "pki_unreadable", "secp256r1", id="pki"),
        pytest.param(
            ["--client-certificates", "--listen", "192.0.2.1:0"],
            "csms_cannot_listen",
            "192.0.2.1",
            id="profile-3-elsewhere",
        ),
        pytest.param(["--misbehave", "well"], "", "'well'", id="misbehave"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_words(
    arguments: list[str], reason: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong usage is click's, and has no reason."""
    (tmp_path / "bad").write_text("CS001:x\nCS002\n")
    (tmp_path / "secp256r1").mkdir()
    monkeypatch.chdir(tmp_path)
    done = reasons.command("csms", "--organization", "EcoG", *arguments)
    assert (done.exit_code, done.reason) == (1 if reason else 2, reason)
    assert words in " ".join(done.output.split())  # words: which value or file
