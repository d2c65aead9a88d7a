"""The asking side: what Josev does, so that a charging station's side can be tried with no Josev at hand."""

from __future__ import annotations

import asyncio
import uuid

from stationkey.messages import GenerateCsrRequest, GenerateCsrResponse, decode_response, encode
from stationkey.mqtt import Broker, connect, topics


async def ask(
    broker: Broker, request: GenerateCsrRequest, *, topic_prefix: str = "", timeout: float = 30.0
) -> GenerateCsrResponse | None:
    """Ask for a CSR over MQTT and wait for the answer that carries the request's own id, character for character.

    Args:
        broker: where the broker is.
        request: what to ask. Published as it is: whether it is right is the station's to say.
        topic_prefix: see `stationkey.mqtt.topics`.
        timeout: seconds to wait for the answer, connecting included.

    Returns:
        The answer, or None where none came in time.

    Raises:
        BrokerError: the broker cannot be reached, refuses, or went away meanwhile.
        MessageError: the request has text that is not UTF-8.
    """
    payload = encode(request)
    request_topic, response_topic = topics(topic_prefix)
    client_id = f"stationkey-request-{uuid.uuid4().hex[:12]}"
    try:
        async with asyncio.timeout(timeout):
            async with await connect(broker, client_id=client_id, persistent=False) as connection:
                await connection.subscribe(response_topic)  # before asking: an answer may be quick
                await connection.publish(request_topic, payload)
                while True:
                    message = await connection.receive()
                    message.acknowledge()
                    response = decode_response(message.payload)
                    if response is not None and response.id == request.id:
                        return response
    except TimeoutError:
        return None
