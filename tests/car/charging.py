"""A charging station with installed certificates, all of it real: broker, TPM, resource manager, daemon.

The TPM stands behind a resource manager, as it does in a station (``/dev/tpmrm0``): several programs use it at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from authority import Authority, write
from peers import Bus, Mosquitto, ResourceManager, Swtpm

from stationkey.contract import messages
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.mqtt.client import ask
from stationkey.mqtt.connection import connect
from stationkey.mqtt.topics import topics
from stationkey.mqtt.url import Broker
from stationkey.openssl import check

BOUND = 30.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""
COMMON_NAME = {
    CertificateType.CHARGING_STATION_CERTIFICATE: "9783161484100",
    CertificateType.V2G_CERTIFICATE: "DEABCS0123456789",
    CertificateType.V2G20_CERTIFICATE: "DEABCS0123456789",
}


@dataclass
class ChargingStation:
    """What a test has of it.

    Attributes:
        directory: for what tests write.
        broker: URL.
        tcti: of its TPM, behind the resource manager.
        environment: what a program needs beside the TCTI to reach the TPM.
        daemon: ``stationkey serve``.
    """

    directory: Path
    broker: str
    tcti: str
    environment: dict[str, str]
    daemon: subprocess.Popen[str]
    seen: list[str] = field(default_factory=list)

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def certificate_dir(self) -> Path:
        return self.directory / "certificates"

    def active(self, certificate_type: CertificateType) -> Path:
        return self.state_dir / "active" / f"{certificate_type}.pem"

    def wait_for(self, **fields: str) -> None:
        """Read the daemon's log up to an event with these fields."""
        assert self.daemon.stderr is not None
        guard = threading.Timer(BOUND, self.daemon.kill)  # ends the log, and so the wait
        guard.start()
        try:
            for line in self.daemon.stderr:
                self.seen.append(line)
                if fields.items() <= json.loads(line).items():
                    return
        finally:
            guard.cancel()
        raise AssertionError(f"no {fields} in {''.join(self.seen)}")

    async def install(self, certificate_type: CertificateType, authority: Authority, algorithm: Algorithm) -> Path:
        """Josev's part: ask for a CSR, have it certified, put the chain where it belongs, and say so."""
        broker = Broker.parse(self.broker)
        data = messages.GenerateCsrData(
            certificate_type=certificate_type,
            common_name=COMMON_NAME[certificate_type],
            organization_name="EcoG",
            country_name="DE",
            algorithm=algorithm,
        )
        response = await ask(broker, messages.generate_csr(str(uuid.uuid4()), data))
        assert response is not None
        assert isinstance(response.data.csr, str)
        write(self.certificate_dir / f"{certificate_type}.pem", authority.certify(response.data.csr))
        status = {
            "id": str(uuid.uuid4()),
            "name": "certificate_installation_status",
            "type": "update",
            "data": {"certificate_type": certificate_type, "status": "installed"},
        }
        async with await connect(broker, client_id="josev", persistent=False) as connection:
            await connection.publish(topics("")[0], json.dumps(status).encode())
        active = self.active(certificate_type)
        self.wait_for(file=str(active))
        return active

    def openssl_environment(self) -> dict[str, str]:
        """The environment of a program that uses the active keys, as docs/tls.md has it."""
        configuration = write(self.directory / "openssl.cnf", check.openssl_configuration(tcti=self.tcti))
        return {**os.environ, **self.environment, **check.environment(configuration, tcti=self.tcti)}


@contextmanager
def charging_station(directory: Path, more: str = "") -> Iterator[ChargingStation]:
    """A running station with no certificate yet; `more` goes into its configuration file."""
    with (
        Mosquitto(directory / "mosquitto") as broker,
        Swtpm(directory / "swtpm") as tpm,
        Bus(directory / "bus") as bus,
        ResourceManager(directory / "resource-manager", tpm=tpm.tcti, bus=bus) as resource_manager,
    ):
        (directory / "certificates").mkdir()
        configuration = write(
            directory / "stationkey.toml", f'[josev]\ncertificate_dir = "{directory / "certificates"}"\n{more}'
        )
        daemon = subprocess.Popen(
            [
                *(sys.executable, "-m", "stationkey", "serve", "--log-format", "json"),
                *("--broker", broker.url, "--keystore", f"tpm2:{resource_manager.tcti}"),
                *("--state-dir", str(directory / "state"), "--config", str(configuration)),
            ],
            env={**os.environ, **resource_manager.environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            station = ChargingStation(
                directory, broker.url, resource_manager.tcti, resource_manager.environment, daemon
            )
            station.wait_for(event="ready")
            yield station
        finally:
            daemon.terminate()
            daemon.communicate(timeout=BOUND)
