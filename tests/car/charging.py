"""A charging station with installed certificates, all of it real: broker, TPM, resource manager, daemon.

The TPM stands behind a resource manager, as it does in a station (``/dev/tpmrm0``): several programs use it at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from authority import Authority, write
from outside import BOUND, Station
from peers import ResourceManager
from rig import Rig
from softhsm import Token

from stationkey.contract import messages
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.mqtt.client import ask
from stationkey.mqtt.connection import connect
from stationkey.mqtt.topics import topics
from stationkey.mqtt.url import Broker
from stationkey.openssl.check import setup_of

COMMON_NAME = {
    CertificateType.CHARGING_STATION_CERTIFICATE: "9783161484100",
    CertificateType.V2G_CERTIFICATE: "DEABCS0123456789",
    CertificateType.V2G20_CERTIFICATE: "DEABCS0123456789",
}


class CertifiedStation(Rig):
    """A station with no certificate yet.

    Args:
        directory: for all files, those of tests as well.
        tpm: whether its keys are in a TPM.
        more: goes into its configuration file.

    Attributes:
        environment: what a program needs to reach its keys.
        python_needs: a statement that comes first in a Python program that uses them.
    """

    station: Station
    environment: Mapping[str, str]
    python_needs = ""

    def __init__(self, directory: Path, *, tpm: bool, more: str = "") -> None:
        self.directory = directory
        self.certificate_dir = directory / "certificates"
        self.certificate_dir.mkdir(parents=True)
        josev = f'[josev]\ncertificate_dir = "{self.certificate_dir}"\n'
        super().__init__(directory, tpm=tpm, config=josev + more)

    def active(self, certificate_type: CertificateType) -> Path:
        return self.state_dir / "active" / f"{certificate_type}.pem"

    async def install(self, certificate_type: CertificateType, authority: Authority, algorithm: Algorithm) -> Path:
        """Josev's part: ask for a CSR, have it certified, put the chain where it belongs, and say so."""
        broker = Broker.parse(self.broker.url)
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
        self.station.wait_for(file=str(active))
        return active

    def openssl_environment(self) -> dict[str, str]:
        """The environment of a program that uses the active keys, as docs/tls.md has it."""
        return {**os.environ, **self.environment, **setup_of(self.keystore).write(self.directory / "openssl.cnf")}


class ChargingStation(CertifiedStation):
    """A running station with a TPM.

    Args:
        directory: for all files, those of tests as well.
        more: goes into its configuration file.

    Attributes:
        tcti: of its TPM, behind the resource manager.
        environment: what a program needs beside the TCTI to reach the TPM.
    """

    def __init__(self, directory: Path, more: str = "") -> None:
        super().__init__(directory, tpm=True, more=more)
        self._manager = ResourceManager(directory / "manager", tpm=self.tpm.tcti)
        self.tcti = self._manager.tcti
        self.environment = self._manager.environment
        self.keystore = f"tpm2:{self.tcti}"
        self.daemon = self.station = Station(directory, *self.options(), **self.environment)

    def peers(self) -> list[AbstractContextManager[Any]]:
        return [*super().peers(), self._manager, self.daemon]


class TokenStation(CertifiedStation):
    """A running station with a PKCS#11 token."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, tpm=False)
        self.token = Token.make("secc", directory)
        self.keystore = self.token.uri
        self.environment = {"CREDENTIALS_DIRECTORY": str(self.token.directory)}
        if setup_of(self.keystore).engine:
            self.python_needs = "import engine_key"
            self.environment["PYTHONPATH"] = str(Path(__file__).parent)
        self.daemon = self.station = Station(directory, *self.options())

    def peers(self) -> list[AbstractContextManager[Any]]:
        ending = ExitStack()
        ending.callback(self.token.remove)  # two of one label are an error
        return [ending, *super().peers(), self.daemon]


@contextmanager
def serving(command: list[str], environment: dict[str, str], *, descriptors: Collection[int] = ()) -> Iterator[int]:
    """Run a server for one connection; gives its port, and waits for its end."""
    with subprocess.Popen(
        command,
        env=environment,
        pass_fds=descriptors,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        guard = threading.Timer(BOUND, server.kill)
        guard.start()
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if found := re.fullmatch(r"ACCEPT 127\.0\.0\.1:(\d+)\n", line):
                    yield int(found[1])
                    break
            else:
                pytest.fail(f"{command} did not serve: {''.join(said)}")
        finally:
            guard.cancel()
            server.terminate()
            server.communicate(timeout=BOUND)
