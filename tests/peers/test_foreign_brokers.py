"""Request, loss of power, request, at brokers by other hands: whether what a broker has taken is answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from brokers import Aedes, Amqtt, RabbitMq, StoredAedes
from outside import Josev, generate_csr, software_station
from peers import Mosquitto

BROKERS: Final = [Mosquitto, Aedes, StoredAedes, pytest.param(RabbitMq, marks=pytest.mark.long), Amqtt]
LOSES_SESSIONS: Final = frozenset({Amqtt})
"""Known differences: brokers that forget a client which goes away, whatever it asked for. Not to be used."""
SURVIVE: Final = [Mosquitto, StoredAedes]
"""Brokers whose sessions outlive them, and which start fast enough to be shown here."""


class Josev311(Josev):
    """In MQTT 3.1.1, which each of them speaks."""

    def __init__(self, broker: Mosquitto) -> None:
        super().__init__(broker)
        self._address = (*self._address[:-1], "311")


@pytest.fixture
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mosquitto]:
    with request.param(tmp_path / "broker") as broker:
        yield broker


@pytest.mark.parametrize("broker", BROKERS, indirect=True)
def test_what_a_broker_has_taken_is_answered_after_the_daemon_has_died(broker: Mosquitto, tmp_path: Path) -> None:
    with Josev311(broker) as josev, software_station(tmp_path, broker) as station:
        first = josev.ask(generate_csr())
        in_hand = [generate_csr() for _ in range(10)]
        josev.publish_burst(in_hand)
        station.kill()
        while_away = generate_csr()
        josev.publish(while_away)
        station.start()
        josev.ask(generate_csr())

        if type(broker) in LOSES_SESSIONS:
            assert not josev.answers(while_away["id"])
        else:
            for message in (*in_hand, while_away):
                assert len({answer.csr for answer in josev.wait_for(message["id"])}) == 1
        assert len({answer.csr for answer in josev.answers(first.id)}) == 1


@pytest.mark.parametrize("broker", SURVIVE, indirect=True)
def test_what_a_broker_has_taken_is_answered_after_both_have_ended(broker: Mosquitto, tmp_path: Path) -> None:
    with software_station(tmp_path, broker) as station:
        station.kill()
        while_away = generate_csr()
        with Josev311(broker) as josev:
            josev.publish(while_away)
            broker.terminate()
            broker.start()
            station.start()
            assert josev.wait_for(while_away["id"])[0].csr
