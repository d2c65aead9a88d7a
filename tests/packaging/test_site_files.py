"""The files of a site, judged by those who read them: the daemon, systemd, PostgreSQL and Mosquitto."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import paho.mqtt.client as paho
import pytest
import yaml  # type: ignore[import-untyped] # comes without types
from asker import until
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from peers import Mosquitto, Postgresql, free_port, is_listening
from unit import ROOT, UNIT, Unit

from secured import Authority
from stationkey.cli.serve import serve
from stationkey.config.file import read_file, settle
from stationkey.config.secrets import SecretReference
from stationkey.ledger.postgresql.connection import connect

SITE = ROOT / "packaging/site"
DROP_IN = SITE / "stationkey.service.d.conf"
TOML = tomllib.loads((SITE / "stationkey.toml").read_text())
COMPOSE = yaml.safe_load((SITE / "three-machines.yml").read_text())
DAEMONS = {name: one for name, one in COMPOSE["services"].items() if one["image"].startswith("stationkey")}
BOUND = 30.0
"""Seconds after which a broker that has not answered has failed."""


def void(_: object) -> None:
    """Return nothing, as a callback has to."""


def credentials(words: str) -> set[str]:
    return set(re.findall(r"credential:([\w-]+)", words))


class TestConfiguration:
    def test_it_is_one_of_a_site(self) -> None:
        settings = settle(read_file(SITE / "stationkey.toml"))
        assert settings.site.stations == ("depot7/+",)
        assert settings.site.shards > 1
        assert settings.ledger.startswith("postgresql://")

    def test_its_secrets_are_those_that_unit_and_compose_file_give(self) -> None:
        named = credentials((SITE / "stationkey.toml").read_text())
        given = {line.partition(":")[0] for line in Unit(DROP_IN).all("LoadCredential")}
        assert named == given == set(COMPOSE["secrets"])
        assert all(set(daemon["secrets"]) == named for daemon in DAEMONS.values())


class TestUnit:
    def test_systemd_takes_every_line(self, tmp_path: Path) -> None:
        """The program is not installed where the tests run, so another one stands for it."""
        program = Unit().words("ExecStart")[0]
        unit = tmp_path / UNIT.name
        unit.write_text(UNIT.read_text().replace(f"ExecStart={program}", f"ExecStart={sys.executable}"))
        folder = tmp_path / f"{UNIT.name}.d"
        folder.mkdir()
        (folder / "site.conf").write_text(DROP_IN.read_text().replace(program, sys.executable))
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
        )
        ours = [line for line in verified.stderr.splitlines() if str(tmp_path) in line or "site.conf" in line]
        assert (verified.returncode, ours) == (0, [])

    def test_it_starts_what_the_command_understands(self) -> None:
        (start,) = (line for line in Unit(DROP_IN).all("ExecStart") if line)
        program, command, *arguments = shlex.split(start)
        assert [program, command] == Unit().words("ExecStart")[:2]
        assert serve.make_context("serve", arguments).params["site"] is True

    def test_it_names_no_other_setting_than_the_unit_and_no_weaker_one(self) -> None:
        harmless = {"After", "Wants", "ExecStart", "LoadCredential", "MemoryMax", "TasksMax", "LimitNOFILE"}
        others = {name: value for _, name, value in Unit(DROP_IN) if name not in harmless}
        assert others == {"DeviceAllow": "", "IPAddressAllow": "192.0.2.0/24"}


class TestThreeMachines:
    def test_there_are_three_daemons_that_differ_in_name_and_state_alone(self) -> None:
        assert len(DAEMONS) == 3
        alike = [
            {key: value for key, value in one.items() if key not in {"hostname", "volumes"}} for one in DAEMONS.values()
        ]
        assert alike[0] == alike[1] == alike[2]
        assert {one["hostname"] for one in DAEMONS.values()} == set(DAEMONS)

    def test_they_are_started_as_the_command_understands(self) -> None:
        for daemon in DAEMONS.values():
            command, *arguments = daemon["command"]
            assert command == "serve"
            assert serve.make_context("serve", arguments).params["site"] is True

    def test_every_file_that_it_names_is_here(self) -> None:
        mounted = {
            volume.partition(":")[0]
            for service in COMPOSE["services"].values()
            for volume in service.get("volumes", [])
            if volume.startswith(".")
        }
        assert mounted
        assert [name for name in mounted if not (SITE / name).exists()] == []


def test_a_server_with_these_settings_is_taken(tmp_path: Path) -> None:
    lines = [line for line in (SITE / "postgresql.conf").read_text().splitlines() if line and line[0] != "#"]
    with Postgresql(tmp_path, lines) as server:
        connect(server.uri, SecretReference(str(server.password_file)), name="test").close()
        compose = COMPOSE["services"]["database"]["command"]
        said = [word for word in compose if "=" in word]
        assert set(said) <= {line.replace(" ", "") for line in lines}


@dataclass
class Broker:
    """The broker with the settings of the site, on free ports, with certificates of a test's authority."""

    stations: int
    daemons: int
    authority: Authority

    def publish(self, user: str, port: int, topic: str, *, client_id: str = "anything") -> None:
        """Publish as a user, over a connection of its own: Mosquitto ends one on which something was refused."""
        identity = self.authority.identity(user)
        where = ("-h", "127.0.0.1", "-p", str(port), "--cafile", str(self.authority.file))
        who = ("--cert", str(identity.certificate), "--key", str(identity.key), "-i", client_id)
        what = ("-V", "5", "-q", "1", "-t", topic, "-m", "x")
        words = ["mosquitto_pub", *where, *who, *what]
        # It may send its end of TLS to a broker that has closed, and leaves SIGPIPE as it finds it: ignored, as by us.
        subprocess.run(words, check=True, capture_output=True, timeout=BOUND, restore_signals=False)

    @contextmanager
    def heard(self, user: str, port: int, topic: str, *, client_id: str = "anything") -> Iterator[Heard]:
        """Subscribe as a user."""
        identity = self.authority.identity(user)
        heard = Heard()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
        client.tls_set(str(self.authority.file), str(identity.certificate), str(identity.key))
        client.on_connect = lambda *_: void(client.subscribe(topic, qos=1))
        client.on_subscribe = lambda *_: heard.subscribed.set()
        client.on_message = lambda _client, _data, message: heard.topics.put(message.topic)
        client.on_disconnect = lambda *_: heard.ended.set()
        client.connect("127.0.0.1", port)
        client.loop_start()
        try:
            assert heard.subscribed.wait(BOUND)
            yield heard
        finally:
            client.disconnect()
            client.loop_stop()


class Heard:
    """What a client receives."""

    def __init__(self) -> None:
        self.topics: SimpleQueue[str] = SimpleQueue()
        self.subscribed, self.ended = Event(), Event()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    authority = Authority(tmp_path / "authority")
    server = authority.broker()
    ports = {8884: free_port(), 8883: free_port()}
    text = (SITE / "mosquitto.conf").read_text()
    for old, new in {
        "/etc/mosquitto/certs/stations-ca.crt": authority.file,
        "/etc/mosquitto/certs/clients-ca.crt": authority.file,
        "/etc/mosquitto/certs/broker.crt": server.certificate,
        "/etc/mosquitto/certs/broker.key": server.key,
        "/etc/mosquitto/stationkey.acl": ROOT / "packaging/mosquitto/site.acl",
        **{f"listener {old}": f"listener {new} 127.0.0.1" for old, new in ports.items()},
    }.items():
        assert old in text
        text = text.replace(str(old), str(new))
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    kept = [line for line in lines if line.split()[0] not in {"persistence", "autosave_interval"}]  # the peer's own
    with Mosquitto(tmp_path / "broker", *kept):
        until(lambda: all(map(is_listening, ports.values())), "each listener listens")
        yield Broker(ports[8884], ports[8883], authority)


class TestBroker:
    def test_a_station_asks_on_its_own_topic_alone_and_a_daemon_hears_all(self, broker: Broker) -> None:
        with broker.heard("stationkey", broker.daemons, "depot7/+/josev/cs") as heard:
            for topic in ("depot7/s2/josev/cs", "depot7/s1/cs/josev", "depot7/s1/josev/cs"):
                broker.publish("s1", broker.stations, topic)
            assert heard.topics.get(timeout=BOUND) == "depot7/s1/josev/cs"

    def test_a_station_hears_its_own_answers_alone(self, broker: Broker) -> None:
        with broker.heard("s1", broker.stations, "depot7/+/cs/josev") as heard:
            for topic in ("depot7/s2/cs/josev", "depot7/s1/cs/josev"):
                broker.publish("stationkey", broker.daemons, topic)
            assert heard.topics.get(timeout=BOUND) == "depot7/s1/cs/josev"

    def test_a_station_cannot_take_the_session_of_a_shard(self, broker: Broker) -> None:
        shard = "stationkey-x-8-0"
        with broker.heard("stationkey", broker.daemons, "depot7/+/josev/cs", client_id=shard) as heard:
            broker.publish("s1", broker.stations, "depot7/s1/josev/cs", client_id=shard)
            assert heard.topics.get(timeout=BOUND) == "depot7/s1/josev/cs"
            assert not heard.ended.is_set()
