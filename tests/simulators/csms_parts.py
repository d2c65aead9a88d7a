"""A raw station, keys, CSRs and the command: what the tests of the CSMS share."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ocpp.v16  # type: ignore[import-untyped]  # same
import ocpp.v21  # type: ignore[import-untyped]  # same
import ocpp.v201  # type: ignore[import-untyped]  # same
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from ocpp.routing import on  # type: ignore[import-untyped]  # same
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from stationkey.contract.messages import GenerateCsrData, generate_csr
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.simulators.csms.server import Csms
from stationkey.simulators.ocpp import CARRIAGES, OcppVersion
from stationkey.x509.csr import PrivateKey, build_csr, to_pem

ORGANIZATION = "Über Strom GmbH"
STATION = CertificateType.CHARGING_STATION_CERTIFICATE
V2G = CertificateType.V2G_CERTIFICATE
V2G20 = CertificateType.V2G20_CERTIFICATE
V16, V201, V21 = OcppVersion
PNC = "org.openchargealliance.iso15118pnc"
LIBRARY = {V16: ocpp.v16, V201: ocpp.v201, V21: ocpp.v21}
each_carriage = pytest.mark.parametrize(
    ("kind", "version"), [pytest.param(kind, version, id=f"{version}-{kind}") for kind, version in CARRIAGES]
)


class RawStation:
    """A station that nobody here wrote: the `ocpp` library's ChargePoint, and a memory of what it was sent."""

    def __init__(self, version: OcppVersion, websocket: ClientConnection) -> None:
        module = LIBRARY[version]
        received: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        told = self

        class Point(module.ChargePoint):  # type: ignore[misc,name-defined]  # the library has no types
            @on("DataTransfer")  # type: ignore[untyped-decorator]  # same
            def on_data_transfer(self, **fields: Any) -> Any:
                received.put_nowait((fields["message_id"], json.loads(fields["data"])))
                return module.call_result.DataTransfer(status="Accepted", data=json.dumps({"status": told.says}))

            @on("CertificateSigned")  # type: ignore[untyped-decorator]  # same
            def on_certificate_signed(self, **fields: Any) -> Any:
                names = {
                    "certificate_chain": "certificateChain",
                    "certificate_type": "certificateType",
                    "request_id": "requestId",
                }
                received.put_nowait(("CertificateSigned", {names[name]: value for name, value in fields.items()}))
                return module.call_result.CertificateSigned(status=told.says)

            @on("TriggerMessage")  # type: ignore[untyped-decorator]  # same
            def on_trigger(self, **fields: Any) -> Any:
                received.put_nowait(("TriggerMessage", {"requestedMessage": fields["requested_message"]}))
                return module.call_result.TriggerMessage(status=told.says)

            if version is V16:

                @on("ExtendedTriggerMessage")  # type: ignore[untyped-decorator]  # same
                def on_extended_trigger(self, **fields: Any) -> Any:
                    received.put_nowait(("ExtendedTriggerMessage", {"requestedMessage": fields["requested_message"]}))
                    return module.call_result.ExtendedTriggerMessage(status=told.says)

        self.version = version
        self.module = module
        self.received = received
        self.says = "Accepted"
        self.point = Point("CS001", websocket, response_timeout=30)

    async def boot(self) -> str:
        fields = (
            {"charge_point_model": "M", "charge_point_vendor": "V"}
            if self.version is V16
            else {"charging_station": {"model": "M", "vendorName": "V"}, "reason": "PowerUp"}
        )
        return str((await self.call("BootNotification", **fields)).status)

    async def call(self, action: str, **fields: Any) -> Any:
        """Call the CSMS; the library checks the answer against the official schema."""
        return await self.point.call(getattr(self.module.call, action)(**fields), suppress=False)

    async def sign(self, kind: CertificateType, csr: str, **fields: Any) -> tuple[str, str]:
        """SignCertificate, by DataTransfer where the version has it so; status, and why."""
        how = CARRIAGES[kind, self.version]
        if how.by_data_transfer:
            data = json.dumps({"csr": csr, "certificateType": how.certificate_type})
            answer = await self.call("DataTransfer", vendor_id=PNC, message_id="SignCertificate", data=data)
            inner = json.loads(answer.data)
            return inner["status"], inner.get("statusInfo", {}).get("additionalInfo", "")
        if how.certificate_type is not None:
            fields["certificate_type"] = how.certificate_type
        answer = await self.call("SignCertificate", csr=csr, **fields)
        return str(answer.status), (getattr(answer, "status_info", None) or {}).get("additional_info", "")

    async def next(self) -> tuple[str, dict[str, Any]]:
        async with asyncio.timeout(30):
            return await self.received.get()


@asynccontextmanager
async def connected(csms: Csms, version: OcppVersion = V21, **options: Any) -> AsyncIterator[RawStation]:
    """A raw station that is connected to `csms` as CS001."""
    url = f"{csms.url}/CS001"
    async with connect(url, subprotocols=[Subprotocol(version.value)], **options) as websocket:
        station = RawStation(version, websocket)
        listening = asyncio.create_task(station.point.start())
        try:
            yield station
        finally:
            listening.cancel()
            await asyncio.wait([listening])


def new_key(kind: CertificateType = V2G) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP521R1() if kind is V2G20 else ec.SECP256R1())


def csr_for(kind: CertificateType, private_key: PrivateKey | None = None, organization: str = ORGANIZATION) -> str:
    """A good CSR of this project, with a new software key."""
    algorithm = Algorithm.ECDSA_SHA512 if kind is V2G20 else Algorithm.ECDSA_SHA256
    data = GenerateCsrData(
        certificate_type=kind,
        algorithm=algorithm,
        common_name="DE-ABC-S-STATION42",
        organization_name=organization,
        country_name="DE",
    )
    return to_pem(build_csr(generate_csr("123e4567-e89b-12d3-a456-426614174000", data), private_key or new_key(kind)))


# --- The command -----------------------------------------------------------------------------------------------------


class Command:
    """``stationkey csms`` as a shell would start it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def until(self, words: str) -> str:
        """The first line with these words, from here on."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while True:
                line = (await self.process.stdout.readline()).decode()
                assert line, "".join(self.lines)
                self.lines.append(line)
                if words in line:
                    return line


@asynccontextmanager
async def command(*arguments: str) -> AsyncIterator[Command]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-u", "-m", "stationkey", "csms", "--listen", "127.0.0.1:0", "--organization", ORGANIZATION),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Command(process)
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(30):
            await process.communicate()
