"""What CONNACK and PUBACK say is kept to; one answer that cannot be delivered stops no other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from gateways import Service, answers, payload, serving
from mqtt_sides import at, josev, reasons
from peers import Mosquitto

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import GenerateCsrRequest, GenerateCsrResponse, accepted
from stationkey.errors import BrokerError
from stationkey.mqtt import codec
from stationkey.mqtt.connection import ConnectionLost, MqttConnection, connect
from stationkey.mqtt.server_limits import ServerLimits, refused_publication

LARGE = "a large CSR " * 200
TOO_LARGE = "publication_too_large"


class Answers(Service):
    """Answers with a large CSR where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.large: set[str] = set()

    async def answer(
        self, request: GenerateCsrRequest, *, station: str = "", waited: float = 0.0
    ) -> GenerateCsrResponse:
        await super().answer(request, station=station, waited=waited)
        return accepted(request, LARGE if request.id in self.large else "a CSR")


async def ask(mosquitto: Mosquitto, *ids: str) -> None:
    async with await connect(at(mosquitto), client_id="asker", persistent=False) as asker:
        for one in ids:
            await asker.publish("josev/cs", payload(one))


async def all_answered(connection: MqttConnection, wanted: list[str]) -> None:
    """Wait until each of these has its answer; some may come twice, where a connection was lost."""
    missing = set(wanted)
    while missing:
        missing -= set(await answers(connection, 1))


def ids(number: int) -> list[str]:
    return [f"00000000-0000-4000-8000-{one:012}" for one in range(number)]


@pytest.mark.parametrize(
    ("limit", "connections"),
    [
        pytest.param("max_packet_size 1000", 1, id="announced"),
        pytest.param("message_size_limit 1000", 1, id="not announced, refused by PUBACK 0x95"),
    ],
)
async def test_an_answer_that_the_broker_does_not_take_stops_no_other(
    tmp_path: Path, limit: str, connections: int
) -> None:
    """By MQTT-3.2.2-15. The request is acknowledged: after a restart it does not come again."""
    service = Answers()
    large, *small = ids(7)
    service.large.add(large)
    with Mosquitto(tmp_path / "mosquitto", limit) as mosquitto, reasons() as said:
        async with josev(at(mosquitto)) as asker:
            async with serving(at(mosquitto), service) as edge:
                await ask(mosquitto, large, *small[:3])
                await all_answered(asker, small[:3])
                await said.until(TOO_LARGE)
                await ask(mosquitto, *small[3:5])
                await all_answered(asker, small[3:5])
                assert 1 + edge._ready.qsize() <= connections  # noqa: SLF001 - ready once for each connection
            asked = len(service.asked)
            async with serving(at(mosquitto), service):
                await ask(mosquitto, small[5])
                await all_answered(asker, small[5:])

    assert service.asked[asked:] == [small[5]]
    [record] = said.named(TOO_LARGE)
    assert getattr(record, "request_id", None) == large
    sizes = range(len(LARGE), len(LARGE) + 300)
    assert any(str(size) in record.getMessage() for size in sizes)  # words: its size


async def test_a_broker_that_takes_qos_0_only_gets_answers_at_qos_0(tmp_path: Path) -> None:
    """By MQTT-3.2.2-11. It is said once what that costs."""
    service = Answers()
    with Mosquitto(tmp_path / "mosquitto", "max_qos 0") as mosquitto, reasons() as said:
        async with josev(at(mosquitto)) as asker:
            async with serving(at(mosquitto), service) as edge:
                await ask(mosquitto, *ids(3))
                assert sorted(await answers(asker, 3)) == ids(3)
                assert edge._ready.qsize() == 0  # noqa: SLF001 - the one connection stood
            async with serving(at(mosquitto), service):
                pass

    assert len(said.named("broker_grants_less")) == 2, "once in each run"


async def test_a_broker_that_retains_nothing_gets_no_retained_message(tmp_path: Path) -> None:
    """By MQTT-3.2.2-14; the Last Will, which is retained, it refuses with the connection."""
    service = Answers()
    terms = MqttTerms(availability_topic="cs/stationkey/availability")
    with Mosquitto(tmp_path / "mosquitto", "retain_available false") as mosquitto:
        async with josev(at(mosquitto)) as asker, serving(at(mosquitto), service, terms=terms):
            await ask(mosquitto, *ids(1))
            assert await answers(asker, 1) == ids(1)


async def test_a_session_that_is_kept_for_less_is_said_once(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MQTT 5, 3.2.2.3.2. Mosquitto grants what is asked for: the CONNACK of another broker is put in."""
    monkeypatch.setattr(ServerLimits, "of", lambda _: ServerLimits(session_expiry=3600))
    with reasons() as said:
        async with serving(at(mosquitto), Answers()) as edge:
            mosquitto.kill()
            mosquitto.start()
            await edge.ready()
            mosquitto.kill()
            mosquitto.start()
            await edge.ready()

    [record] = said.named("broker_grants_less")
    assert "3600 s" in record.getMessage()  # words: how long


def test_a_connack_without_properties_grants_what_the_standard_says() -> None:
    assert ServerLimits.of({}) == ServerLimits()


def test_each_property_is_read() -> None:
    given = {0x27: 100, 0x24: 0, 0x25: 0, 0x21: 7, 0x11: 60}  # MQTT 5, 2.2.2.2

    assert ServerLimits.of(given) == ServerLimits(
        maximum_packet_size=100, maximum_qos=0, retain_available=False, receive_maximum=7, session_expiry=60
    )


@pytest.mark.parametrize("length", [1, 100, 120, 121, 122, 200, 16_370, 16_380, 16_400])
def test_the_size_of_a_packet_is_what_is_sent(length: int) -> None:
    """Remaining Length takes one byte more from 128 on, and from 16,384 on [MQTT 5 1.5.5]."""
    content = b"x" * length
    remaining = 2 + 1 + 2 + 1 + length  # topic "t", packet identifier, no properties
    size = 1 + (1 if remaining < 128 else 2 if remaining < 16_384 else 3) + remaining
    assert size == len(codec.publish(codec.V5, "t", content, identifier=1))

    ServerLimits(maximum_packet_size=size).check_size("t", content)
    with pytest.raises(BrokerError) as refusal:
        ServerLimits(maximum_packet_size=size - 1).check_size("t", content)
    assert (refusal.value.reason, refusal.value.transient) == (TOO_LARGE, False)


@pytest.mark.parametrize(
    ("code", "reason", "transient", "hinted"),
    [
        pytest.param(0x87, "publication_refused", False, True, id="not authorized"),
        pytest.param(0x97, "publication_quota", True, True, id="quota exceeded"),
        pytest.param(0x95, "publication_too_large", False, True, id="packet too large"),
        pytest.param(0x80, "publication_refused", False, False, id="unspecified"),
        pytest.param(0x99, "publication_refused", False, False, id="payload format invalid"),
    ],
)
def test_the_hint_about_access_belongs_to_not_authorized(code: int, reason: str, transient: bool, hinted: bool) -> None:
    error = refused_publication("cs/josev", code)

    assert (error.reason, error.transient, bool(error.hint)) == (reason, transient, hinted)
    assert ("access" in error.hint) is (code == 0x87)  # words: what to look at


async def test_no_more_is_unacknowledged_than_the_broker_allows(mosquitto: Mosquitto) -> None:
    """MQTT 5, 3.2.2.3.3: the broker's Receive Maximum, put in as 1; Mosquitto's own is 20."""
    async with await connect(at(mosquitto), client_id="one", persistent=False) as connection:
        connection._unacknowledged = asyncio.Semaphore(1)  # noqa: SLF001 - as a CONNACK with Receive Maximum 1 has it
        publishing = [asyncio.create_task(connection.publish("t", b"x")) for _ in range(5)]
        await asyncio.sleep(0)
        assert len(connection._waiting) <= 1  # noqa: SLF001 - what waits for its PUBACK
        await asyncio.gather(*publishing)


async def test_a_message_for_which_there_is_no_room_now_is_published_again(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PUBACK 0x97 passes. The fault is put in: Mosquitto has no such limit."""
    real, refused = MqttConnection.publish, list[str]()

    async def full(self: MqttConnection, topic: str, content: bytes, *, retain: bool = False) -> bool:
        if topic == "cs/josev" and len(refused) < 2:
            refused.append(topic)
            raise refused_publication(topic, 0x97)
        return await real(self, topic, content, retain=retain)

    monkeypatch.setattr(MqttConnection, "publish", full)
    monkeypatch.setattr("stationkey.mqtt.gateway.QUOTA_FIRST", 0.01)
    service = Answers()
    async with josev(at(mosquitto)) as asker, serving(at(mosquitto), service):
        await ask(mosquitto, *ids(1))
        assert await answers(asker, 1) == ids(1)

    assert len(refused) == 2


async def test_an_answer_in_flight_alone_is_blamed_and_no_other(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is put in: every connection ends over one answer. All others are delivered, most of them before."""
    real = MqttConnection.publish
    culprit, *others = ids(9)

    async def cut(self: MqttConnection, topic: str, content: bytes, *, retain: bool = False) -> bool:
        if culprit.encode() in content and topic == "cs/josev":
            self._drop("over this answer")
            raise ConnectionLost("the connection ended", reason="connection_lost")
        return await real(self, topic, content, retain=retain)

    service = Answers()
    async with josev(at(mosquitto)) as asker:
        with reasons() as said:
            monkeypatch.setattr(MqttConnection, "publish", cut)
            async with serving(at(mosquitto), service):
                async with await connect(at(mosquitto), client_id="asker", persistent=False) as other:
                    for one in (culprit, *others):
                        await real(other, "josev/cs", payload(one))
                await all_answered(asker, others)
                await said.until(TOO_LARGE)
            monkeypatch.undo()

    assert [getattr(record, "request_id", None) for record in said.named(TOO_LARGE)] == [culprit]
