"""`stationkey josev` against a CSMS made of nothing but the `ocpp` library's own ChargePoint: no messages of ours."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ocpp.v16  # type: ignore[import-untyped] # ships no type information
import ocpp.v21  # type: ignore[import-untyped] # ships no type information
import ocpp.v201  # type: ignore[import-untyped] # ships no type information
import pytest
import websockets
from cryptography import x509
from ocpp.routing import on  # type: ignore[import-untyped] # ships no type information
from peers import Daemon, Mosquitto

from stationkey.contract.active_names import Owner, file_name
from stationkey.contract.profiles import PROFILES, SECP256R1, SECP521R1, CertificateType
from stationkey.mqtt.url import Broker
from stationkey.simulators.josev import Station
from stationkey.simulators.ocpp import OcppVersion
from stationkey.simulators.pki import Hierarchy, to_pem
from stationkey.simulators.station_settings import StationSettings

CHARGING_STATION = CertificateType.CHARGING_STATION_CERTIFICATE
V2G20 = CertificateType.V2G20_CERTIFICATE
NOW = datetime.now(UTC).isoformat()


class Foreign16(ocpp.v16.ChargePoint):  # type: ignore[misc] # the library has no types
    """The security whitepaper's part of OCPP 1.6."""

    csrs: asyncio.Queue[str]

    @on("BootNotification")  # type: ignore[untyped-decorator] # same
    def boot(self, **_: Any) -> Any:
        return ocpp.v16.call_result.BootNotification(current_time=NOW, interval=300, status="Accepted")

    @on("SignCertificate")  # type: ignore[untyped-decorator] # same
    def sign(self, csr: str, **_: Any) -> Any:
        self.csrs.put_nowait(csr)
        return ocpp.v16.call_result.SignCertificate(status="Accepted")

    async def ask(self, _: CertificateType) -> Any:
        return await self.call(ocpp.v16.call.ExtendedTriggerMessage(requested_message="SignChargePointCertificate"))

    async def answer(self, _: CertificateType, chain: str) -> Any:
        return await self.call(ocpp.v16.call.CertificateSigned(certificate_chain=chain))


class Foreign20:
    """OCPP 2.0.1 and 2.1."""

    module: Any
    call: Any
    csrs: asyncio.Queue[str]
    request_id: int | None = None

    @on("BootNotification")  # type: ignore[untyped-decorator] # same
    def boot(self, **_: Any) -> Any:
        return self.module.call_result.BootNotification(current_time=NOW, interval=300, status="Accepted")

    @on("SignCertificate")  # type: ignore[untyped-decorator] # same
    def sign(self, csr: str, request_id: int | None = None, **_: Any) -> Any:
        self.request_id = request_id
        self.csrs.put_nowait(csr)
        return self.module.call_result.SignCertificate(status="Accepted")

    async def ask(self, certificate_type: CertificateType) -> Any:
        wanted = "SignV2G20Certificate" if certificate_type is V2G20 else "SignChargingStationCertificate"
        return await self.call(self.module.call.TriggerMessage(requested_message=wanted))

    async def answer(self, certificate_type: CertificateType, chain: str) -> Any:
        kind = "V2G20Certificate" if certificate_type is V2G20 else "ChargingStationCertificate"
        more = {} if self.request_id is None else {"request_id": self.request_id}
        return await self.call(
            self.module.call.CertificateSigned(certificate_chain=chain, certificate_type=kind, **more)
        )


class Foreign201(Foreign20, ocpp.v201.ChargePoint):  # type: ignore[misc] # same
    module = ocpp.v201


class Foreign21(Foreign20, ocpp.v21.ChargePoint):  # type: ignore[misc] # same
    module = ocpp.v21


@pytest.mark.parametrize(
    ("version", "foreign", "certificate_type"),
    [
        pytest.param(OcppVersion.V16, Foreign16, CHARGING_STATION, id="1.6"),
        pytest.param(OcppVersion.V201, Foreign201, CHARGING_STATION, id="2.0.1"),
        pytest.param(OcppVersion.V21, Foreign21, CHARGING_STATION, id="2.1"),
        pytest.param(OcppVersion.V21, Foreign21, V2G20, id="2.1, -20"),
    ],
)
async def test_a_foreign_csms_triggers_signs_and_sees_the_certificate_accepted(
    tmp_path: Path, mosquitto: Mosquitto, version: OcppVersion, foreign: Any, certificate_type: CertificateType
) -> None:
    curve = SECP521R1 if certificate_type is V2G20 else SECP256R1
    hierarchy = Hierarchy.make(curve, organization="EcoG", now=datetime.now(UTC))
    (tmp_path / "anchors.pem").write_text(hierarchy.trust_anchors_pem())
    connected: asyncio.Queue[Any] = asyncio.Queue()

    async def serve(socket: Any) -> None:
        point = foreign("CS001", socket)
        point.csrs = asyncio.Queue()
        connected.put_nowait(point)
        await point.start()

    daemon = Daemon(
        tmp_path / "daemon",
        *("--broker", mosquitto.url, "--state-dir", str(tmp_path / "state")),
        *("--keystore", "software:", "--allow-software-keys"),
    )
    async with websockets.serve(serve, "127.0.0.1", 0, subprotocols=[websockets.Subprotocol(version)]) as server:
        settings = StationSettings(
            csms=f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}",
            identity="CS001",
            versions=(version,),
            broker=Broker.parse(mosquitto.url),
            common_name="DE-ABC-S-STATION42",
            organization_name="EcoG",
            country_name="DE",
            state_dir=tmp_path / "josev",
            certificate_dir=tmp_path / "certificates",
            trust_anchors=tmp_path / "anchors.pem",
        )
        with daemon:
            station = Station(settings)
            playing = asyncio.create_task(station.run())
            try:
                async with asyncio.timeout(30):
                    point = await connected.get()
                    assert (await point.ask(certificate_type)).status == "Accepted"
                    csr = x509.load_pem_x509_csr((await point.csrs.get()).encode())
                    chain = to_pem(hierarchy.issue(csr, PROFILES[certificate_type], now=datetime.now(UTC)))
                    assert (await point.answer(certificate_type, chain)).status == "Accepted"
                    await station.settled()
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
    assert (settings.certificate_dir / file_name(Owner("", certificate_type, ""))).read_text().split() == chain.split()
