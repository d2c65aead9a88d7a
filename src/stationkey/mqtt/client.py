"""The requesting side: does what Josev does, to try a charging station without Josev."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

from msgspec import UNSET

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import (
    CERTIFICATE_INSTALLATION_STATUS,
    CertificateInstallationStatus,
    CertificateInstallationStatusData,
    GenerateCsrRequest,
    GenerateCsrResponse,
    InstallationStatus,
    decode_response,
    encode,
)
from stationkey.contract.profiles import CertificateType
from stationkey.mqtt.connection import PLAIN, connect
from stationkey.mqtt.topics import topics
from stationkey.mqtt.url import Broker


async def ask(
    broker: Broker,
    request: GenerateCsrRequest,
    *,
    topic_prefix: str = "",
    station: str = "",
    timeout: float = 30.0,
    terms: MqttTerms = PLAIN,
) -> GenerateCsrResponse | None:
    """Ask for a CSR over MQTT and wait for the answer that carries the request's own id, character for character.

    Args:
        broker: where the broker is.
        request: the request, published unchanged: the station validates it.
        topic_prefix: see `stationkey.mqtt.topics.topics`.
        station: station of a site; empty for the single one.
        timeout: seconds to wait for the answer, connecting included.
        terms: TLS and credentials for the broker.

    Returns:
        The answer, or None after the timeout.

    Raises:
        BrokerError: the broker cannot be reached, refuses, or disconnects.
        ConfigurationError: a file of `terms` cannot be read, or the station's name is invalid.
        MessageError: the request has text that is not UTF-8.
    """
    payload = encode(request)
    request_topic, response_topic = topics(topic_prefix, station)
    client_id = f"stationkey-request-{uuid.uuid4().hex[:12]}"
    try:
        async with asyncio.timeout(timeout):
            async with await connect(broker, client_id=client_id, persistent=False, terms=terms) as connection:
                await connection.subscribe(response_topic)  # before the request: an answer may be quick
                await connection.publish(request_topic, payload)
                while True:
                    message = await connection.receive()
                    message.acknowledge()
                    response = decode_response(message.payload)
                    if response is not None and response.id == request.id:
                        return response
    except TimeoutError:
        return None


async def report_status(
    broker: Broker,
    certificate_type: CertificateType,
    status: InstallationStatus,
    *,
    evse_id: str | None = None,
    private_key_path: Path | None = None,
    topic_prefix: str = "",
    station: str = "",
    terms: MqttTerms = PLAIN,
) -> None:
    """Send a ``certificate_installation_status`` to the charging station.

    Args:
        broker: where the broker is.
        certificate_type: the type of the certificate.
        status: its status.
        evse_id: EVSE that its key is for, or None.
        private_key_path: its key, or None.
        topic_prefix: see `stationkey.mqtt.topics.topics`.
        station: station of a site; empty for the single one.
        terms: TLS and credentials for the broker.

    Raises:
        BrokerError: the broker cannot be reached, or refuses the message.
        ConfigurationError: a file of `terms` cannot be read, or the station's name is invalid.
    """
    message = CertificateInstallationStatus(
        id=str(uuid.uuid4()),
        name=CERTIFICATE_INSTALLATION_STATUS,
        type="update",
        data=CertificateInstallationStatusData(
            certificate_type=certificate_type,
            status=status,
            evse_id=UNSET if evse_id is None else evse_id,
            private_key_path=UNSET if private_key_path is None else str(private_key_path),
        ),
    )
    topic, _ = topics(topic_prefix, station)
    client_id = f"stationkey-josev-{uuid.uuid4().hex[:12]}"
    async with await connect(broker, client_id=client_id, persistent=False, terms=terms) as connection:
        await connection.publish(topic, encode(message))
