"""A Mosquitto with the files that are shipped for a site: each station reaches its own topics, and no other's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import UNSET
from outside import Station, software_station
from peers import Mosquitto

import parts
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.errors import BrokerError
from stationkey.mqtt.client import ask, report_status
from stationkey.mqtt.connection import MqttConnection, connect
from stationkey.mqtt.url import Broker

SHIPPED = Path(__file__).parent.parent.parent / "packaging/mosquitto"
USERS = ("stationkey", "s1", "s2", "+")


class SiteMosquitto(Mosquitto):
    """A broker with the access control list of a site, and a password for each user."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        passwords = directory / "passwords"
        passwords.write_text("".join(f"{user}:{self.password(user)}\n" for user in USERS))
        subprocess.run(["mosquitto_passwd", "-U", passwords], check=True)
        configuration = directory / "mosquitto.conf"
        lines = [*configuration.read_text().splitlines(), "max_queued_messages 1000"]
        lines = [line for line in lines if line != "allow_anonymous true"]
        lines += [f"acl_file {SHIPPED / 'site.acl'}", f"password_file {passwords}", "allow_anonymous false"]
        configuration.write_text("\n".join([*lines, (SHIPPED / "site.example").read_text()]))

    def password(self, user: str) -> str:
        return f"of-{user}"

    def terms(self, user: str) -> MqttTerms:
        file = self.directory / f"password-of-{USERS.index(user)}"
        file.touch(mode=0o600)
        file.write_text(self.password(user))
        return MqttTerms(username=user, password=SecretReference(str(file)))

    async def client(self, user: str) -> MqttConnection:
        at = Broker.parse(self.url)
        return await connect(at, client_id=f"client-{USERS.index(user)}", persistent=False, terms=self.terms(user))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[SiteMosquitto]:
    with SiteMosquitto(tmp_path / "broker") as mosquitto:
        yield mosquitto


@pytest.fixture
def daemon(tmp_path: Path, broker: SiteMosquitto) -> Iterator[Station]:
    terms = broker.terms("stationkey")
    assert terms.password is not None
    config = tmp_path / "stationkey.toml"
    config.write_text(
        '[site]\nstations = "depot7/+"\n'
        f'[mqtt]\nusername = "stationkey"\npassword_file = "{terms.password.source}"\n'
        'availability_topic = "cs/stationkey/availability"\n'
    )
    with software_station(tmp_path / "daemon", broker, "--config", str(config)) as running:
        yield running


async def test_a_station_is_answered_on_its_own_topics_and_reaches_no_others(
    broker: SiteMosquitto, daemon: Station
) -> None:
    at = Broker.parse(broker.url)
    for user in ("s1", "s2"):
        response = await ask(at, parts.request(), station=f"depot7/{user}", terms=broker.terms(user))
        assert response is not None
        assert response.data.csr is not UNSET
    strangers = {user: await broker.client(user) for user in ("s1", "+")}
    for connection in strangers.values():
        await connection.subscribe("depot7/s2/cs/josev")
        await connection.subscribe("depot7/+/cs/josev")
        await connection.subscribe("#")
        for topic in ("depot7/s2/josev/cs", "depot7/s2/cs/josev", "depot7/x/josev/cs", "cs/stationkey/availability"):
            with pytest.raises(BrokerError):
                await connection.publish(topic, b"{}")
    with pytest.raises(BrokerError):
        await report_status(at, parts.V2G, "deleted", station="depot7/s2", terms=broker.terms("s1"))
    response = await ask(at, parts.request(), station="depot7/s2", terms=broker.terms("s2"))
    assert response is not None
    mark = "depot7/s1/josev/cs"
    await strangers["s1"].publish(mark, b"{}")  # what was sent before it would have come
    assert [connection.waiting for connection in strangers.values()] == [0, 0]
    for connection in strangers.values():
        await connection.close()
    assert daemon.stop() == 0
    [counts] = daemon.wait_for("stopped")
    assert counts["accepted"] == 3
