"""Who may connect to the CSMS, and what is said on a connection."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import websockets
from cryptography import x509
from csms_parts import (
    ORGANIZATION,
    PNC,
    STATION,
    V2G,
    V16,
    V21,
    V201,
    connected,
    csr_for,
    new_key,
)
from csmss import Make, basic
from ocpp.exceptions import (  # type: ignore[import-untyped]  # same
    NotSupportedError,
    PropertyConstraintViolationError,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from stationkey.contract.profiles import PROFILES
from stationkey.errors import ConfigurationError
from stationkey.simulators.csms.events import Event, EventKind
from stationkey.simulators.csms.server import Csms, CsmsError, SecurityProfile
from stationkey.simulators.ocpp import OcppVersion
from stationkey.simulators.ocpp_connection import MAX_FRAGMENTS
from stationkey.simulators.pki import Hierarchy, key_to_pem
from stationkey.simulators.pki import to_pem as chain_to_pem

pytest_plugins = ["csmss"]


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


def masked(opcode: int, payload: bytes) -> bytes:
    """A whole frame of a client's, with a mask of zeros [RFC 6455 5.2]."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(masked(0x9, bytes(125)), id="pings"),
        pytest.param(masked(0x1, b'[2, "a", "Heartbeat", {}]'), id="calls"),
        # No compression takes the answers to these down to what the short ones take.
        pytest.param(
            masked(0x1, b'[2, "%s", "Heartbeat", {}]' % Random(1).randbytes(15_000).hex().encode()), id="long calls"
        ),
    ],
)
async def test_a_peer_that_sends_and_never_reads_is_disconnected(frame: bytes, make: Make) -> None:
    async with make() as csms:
        async with connect(f"{csms.url}/CS001", subprotocols=[Subprotocol("ocpp2.1")]) as hostile:
            hostile.transport.pause_reading()
            ended = asyncio.create_task(csms.next(EventKind.DISCONNECTED, timeout=60))
            while not ended.done():
                if hostile.transport.get_write_buffer_size() < 1_000_000:
                    hostile.transport.write(frame * 100)
                await asyncio.sleep(0)
            await ended
            hostile.transport.abort()
        async with connected(csms) as station:
            await station.boot()


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
