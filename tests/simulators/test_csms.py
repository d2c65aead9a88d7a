"""The CSMS for trying, judged by a station made of the `ocpp` library and by `openssl verify`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from cryptography import x509
from csms_parts import (
    STATION,
    V2G,
    V2G20,
    V16,
    V21,
    V201,
    connected,
    csr_for,
    each_carriage,
    new_key,
)
from csmss import Make, openssl_verify
from ocpp.exceptions import (  # type: ignore[import-untyped]  # same
    InternalError,
)
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from stationkey.contract.profiles import CertificateType
from stationkey.simulators.csms.events import EventKind
from stationkey.simulators.csms.server import Csms, CsmsError
from stationkey.simulators.ocpp import CARRIAGES, NotCarried, OcppVersion
from stationkey.simulators.ocpp_connection import NotAnswered, OcppConnection
from stationkey.simulators.pki import Misbehaviour, certificate_hash

pytest_plugins = ["csmss"]


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
        assert await station.sign(V2G, csr_for(V2G)) == ("Rejected", "this CSMS is set to refuse every CSR")


async def test_unknown_request_id_sends_one_that_was_never_used(make: Make) -> None:
    async with make(misbehaviour=Misbehaviour.UNKNOWN_REQUEST_ID) as csms, connected(csms) as station:
        await station.sign(V2G, csr_for(V2G), request_id=5)
        assert (await station.next())[1]["requestId"] == 6
        await station.sign(V2G, csr_for(V2G))
        assert "requestId" not in (await station.next())[1]
