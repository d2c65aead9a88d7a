"""What `stationkey josev` does at a CSMS that does not simply accept it: frames of OCPP-J by hand, over a WebSocket."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import websockets
from msgspec.structs import replace
from peers import Mosquitto
from websockets.asyncio.server import ServerConnection, serve

from stationkey.contract.profiles import CertificateType
from stationkey.errors import ConfigurationError
from stationkey.mqtt.url import Broker
from stationkey.simulators.josev import Station
from stationkey.simulators.ocpp import OcppVersion
from stationkey.simulators.station_settings import StationSettings

CALL, RESULT, ERROR = 2, 3, 4
NOW = "2026-03-01T12:00:00Z"
Frame = list[Any]


class Backend:
    """A CSMS that answers BootNotification by a list, one after the other, and notes every call."""

    def __init__(self, *boots: dict[str, Any] | str | None) -> None:
        self.boots = list(boots)
        self.paths: list[str] = []
        self.calls: asyncio.Queue[Frame] = asyncio.Queue()
        self.url = ""
        self.socket: ServerConnection | None = None

    async def serve(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        self.paths.append(socket.request.path)
        self.socket = socket
        async for text in socket:
            frame = json.loads(text)
            await self.calls.put(frame)
            if frame[0] != CALL:
                continue
            if frame[2] != "BootNotification":
                await socket.send(json.dumps([RESULT, frame[1], {"currentTime": NOW}]))
                continue
            boot = self.boots.pop(0) if len(self.boots) > 1 else self.boots[0]
            if boot is None:
                await socket.close(4999)
            elif isinstance(boot, str):
                await socket.send(json.dumps([ERROR, frame[1], boot, "", {}]))
            else:
                await socket.send(json.dumps([RESULT, frame[1], {"currentTime": NOW} | boot]))

    async def next(self, action: str) -> Frame:
        """The next call of that name; nothing else may come before it."""
        async with asyncio.timeout(30):
            frame = await self.calls.get()
        assert frame[2] == action
        return frame


def accepted(interval: float = 0) -> dict[str, Any]:
    return {"status": "Accepted", "interval": interval}


def settings(folder: Path, url: str, **more: Any) -> StationSettings:
    return StationSettings(
        csms=url,
        identity="CS001",
        versions=(OcppVersion.V201,),
        broker=Broker.parse("mqtt://127.0.0.1:1"),
        common_name="DE-ABC-S-1",
        organization_name="O",
        country_name="DE",
        state_dir=folder / "josev",
        certificate_dir=folder / "certificates",
        **more,
    )


@asynccontextmanager
async def played(
    backend: Backend, folder: Path, **more: Any
) -> AsyncIterator[tuple[Station, asyncio.Queue[str], asyncio.Task[None]]]:
    told: asyncio.Queue[str] = asyncio.Queue()
    async with serve(backend.serve, "127.0.0.1", 0, subprotocols=[websockets.Subprotocol("ocpp2.0.1")]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        station = Station(
            replace(settings(folder, f"ws://127.0.0.1:{port}"), **more), lambda words, _: told.put_nowait(words)
        )
        running = asyncio.create_task(station.run())
        try:
            yield station, told, running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def heard(told: asyncio.Queue[str], words: str) -> str:
    async with asyncio.timeout(30):
        while words not in (line := await told.get()):
            pass
    return line


@pytest.mark.parametrize("status", ["Pending", "Rejected"])
async def test_boot_is_sent_again_until_it_is_accepted_and_nothing_else_before(tmp_path: Path, status: str) -> None:
    """As 2.0.1 has it in B02 and B03, and 1.6 in 4.2."""
    backend = Backend({"status": status, "interval": 1}, {"status": status, "interval": 1}, accepted())
    async with played(backend, tmp_path) as (_, told, _running):
        for _ in range(3):
            await backend.next("BootNotification")
        await heard(told, "connected")

    assert backend.calls.empty()
    assert len(backend.paths) == 1


async def test_a_call_to_a_rejected_station_is_answered_with_security_error(tmp_path: Path) -> None:
    backend = Backend({"status": "Rejected", "interval": 60}, accepted())
    async with played(backend, tmp_path) as (_, told, _running):
        await heard(told, "Rejected")
        await backend.next("BootNotification")
        assert backend.socket is not None
        trigger = [CALL, "1", "TriggerMessage", {"requestedMessage": "SignChargingStationCertificate"}]
        await backend.socket.send(json.dumps(trigger))
        async with asyncio.timeout(30):
            answer = await backend.calls.get()

    assert answer[:3] == [ERROR, "1", "SecurityError"]


@pytest.mark.parametrize(
    "boot",
    [
        pytest.param(None, id="closes"),
        pytest.param("InternalError", id="CALLERROR"),
        pytest.param({"status": "Accepted"}, id="no interval"),
        pytest.param({"status": "Perhaps", "interval": 1}, id="unknown status"),
    ],
)
async def test_a_boot_that_goes_wrong_is_said_and_tried_again(
    tmp_path: Path, boot: dict[str, Any] | str | None
) -> None:
    """[B01] And a renewal that waits for the connection goes on then."""
    backend = Backend(boot, accepted())
    async with played(backend, tmp_path) as (_, told, running):
        await heard(told, "reconnecting")
        await heard(told, "connected")
        assert not running.done()

    assert len(backend.paths) == 2


@pytest.mark.parametrize("abort", [True, False], ids=["connection broken", "closed with 4999"])
async def test_a_connection_that_ends_before_the_boot_answer_leaves_no_error_behind(
    tmp_path: Path, abort: bool
) -> None:
    """An exception that nobody retrieved is told when its future is collected."""
    unretrieved: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unretrieved.append(context))

    class Breaking(Backend):
        async def serve(self, socket: ServerConnection) -> None:
            self.paths.append("")
            if len(self.paths) > 1:
                return await super().serve(socket)
            await socket.recv()
            if abort:
                socket.transport.abort()
                return None
            return await socket.close(4999)

    async with played(Breaking(accepted()), tmp_path) as (_, told, running):
        await heard(told, "reconnecting")
        await heard(told, "connected")
        assert not running.done()
    gc.collect()

    assert unretrieved == []


async def test_heartbeats_are_sent_at_the_interval_of_the_csms(tmp_path: Path) -> None:
    """As 2.0.1 has it in G02, and 1.6 in 4.6."""
    backend = Backend(accepted(1))
    async with played(backend, tmp_path):
        await backend.next("BootNotification")
        for _ in range(2):
            assert (await backend.next("Heartbeat"))[3] == {}


@pytest.mark.parametrize("identity", ["CS 001", "a/b", "what?x#y", "Straße", "%41"])
async def test_the_identity_is_percent_encoded(tmp_path: Path, identity: str) -> None:
    """By OCPP-J 3.1.1: it is one segment of the URL's path."""
    backend = Backend(accepted())
    async with played(backend, tmp_path, identity=identity) as (_, told, _running):
        await heard(told, "connected")

    assert unquote(backend.paths[0].removeprefix("/")) == identity
    assert set(backend.paths[0][1:]).isdisjoint("/?# ")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", id="damaged"),
        pytest.param(b"\x30\x82\x01\x00", id="DER"),
        pytest.param(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", id="a key"),
        pytest.param(None, id="missing"),
    ],
)
def test_trust_anchors_that_cannot_be_read_are_refused_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "roots.pem"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigurationError) as refusal:
        Station(settings(tmp_path, "ws://127.0.0.1:1", trust_anchors=path))

    assert refusal.value.reason in {"trust_anchors_invalid", "file_unreadable"}
    assert str(path) in refusal.value.message  # words: which file


@pytest.mark.parametrize(
    ("code", "sent"),
    [pytest.param("InternalError", 3, id="may pass"), pytest.param("FormatViolation", 1, id="final")],
)
async def test_a_callerror_to_sign_certificate_is_final_only_where_it_says_so(
    tmp_path: Path, mosquitto: Mosquitto, code: str, sent: int
) -> None:
    """[OCPP-J 4.3; A02.FR.17-20] The same CSR is sent again, `--repeat-times` at the most."""
    csrs: list[str] = []

    class Failing(Backend):
        async def serve(self, socket: ServerConnection) -> None:
            async for text in socket:
                kind, number, action, payload = json.loads(text)
                if kind == CALL and action == "SignCertificate":
                    csrs.append(payload["csr"])
                    await socket.send(json.dumps([ERROR, number, code, "", {}]))
                else:
                    await socket.send(json.dumps([RESULT, number, {"currentTime": NOW} | accepted()]))

    pending = json.dumps(
        {
            "last_request_id": 0,
            "pending": [
                {"certificate_type": CertificateType.V2G_CERTIFICATE, "evse_id": None, "csr": "CSR", "request_id": None}
            ],
        }
    )
    (tmp_path / "josev").mkdir()
    (tmp_path / "josev" / "josev-pending.json").write_text(pending)
    more = {"wait_minimum": 0.01, "repeat_times": 2, "broker": Broker.parse(mosquitto.url)}
    async with played(Failing(accepted()), tmp_path, **more) as (station, told, _running):
        await heard(told, "sending the pending CSR")
        await station.settled()

    assert csrs == ["CSR"] * sent
