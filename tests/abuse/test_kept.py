"""What a broker has kept from another time: retained messages, and what the daemon's client id had subscribed to."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path

from outside import BOUND, Event, Josev, generate_csr, run, software_station
from peers import Mosquitto

CLIENT_ID = "the-station"
CONFIG = f'client_id = "{CLIENT_ID}"\n'
TYPE = "charging_station_certificate"


def status(said: str) -> Event:
    name = "certificate_installation_status"
    return {
        "id": str(uuid.uuid4()),
        "name": name,
        "type": "update",
        "data": {"certificate_type": TYPE, "status": said},
    }


def as_the_daemon(broker: Mosquitto, *options: str) -> None:
    """Subscribe with its client id, and go."""
    address = ("-h", "127.0.0.1", "-p", str(broker.port), "-V", "5", "-i", CLIENT_ID, "-q", "1", "-E")
    subprocess.run(["mosquitto_sub", *address, *options], check=True, timeout=BOUND)


def publish(broker: Mosquitto, topic: str, message: Event | None, *, retain: bool = False) -> None:
    address = ("-h", "127.0.0.1", "-p", str(broker.port), "-V", "5", "-q", "1", *(["-r"] if retain else []))
    payload = ["-n"] if message is None else ["-m", json.dumps(message)]
    subprocess.run(["mosquitto_pub", *address, "-t", topic, *payload], check=True, timeout=BOUND)


def states(state_dir: Path) -> list[str]:
    listed = json.loads(run("keys", "list", "--json", "--state-dir", str(state_dir)).stdout)
    return [key["state"] for key in listed]


def test_a_retained_status_changes_nothing_however_often_it_comes(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """Somebody who could publish once would have key after key destroyed, long after he can no more."""
    config = tmp_path / "stationkey.toml"
    config.write_text(CONFIG)
    publish(mosquitto, "josev/cs", status("deleted"), retain=True)
    with software_station(tmp_path, mosquitto, "--config", str(config)) as station, Josev(mosquitto) as josev:
        station.wait_for(reason="status_retained")
        assert josev.ask(generate_csr(certificate_type=TYPE)).csr
        josev.publish(status("installed"))
        station.wait_for("key active")
        for _ in range(2):
            station.stop()
            as_the_daemon(mosquitto, "-t", "nothing")  # ends the session: the next one is new, and is told again
            station.start()
            station.wait_for(reason="status_retained")
        assert states(station.state_dir) == ["active"]
        josev.publish(status("deleted"))
        station.wait_for("key destroyed")
    publish(mosquitto, "josev/cs", None, retain=True)


def test_what_comes_on_another_topic_is_passed_over_and_its_subscription_ended(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    config = tmp_path / "stationkey.toml"
    config.write_text(CONFIG)
    as_the_daemon(mosquitto, "-c", "-x", "3600", "-t", "elsewhere/josev/cs")
    stray, good = generate_csr(), generate_csr()
    publish(mosquitto, "elsewhere/josev/cs", stray)
    with software_station(tmp_path, mosquitto, "--config", str(config)) as station, Josev(mosquitto) as josev:
        station.wait_for(reason="topic_foreign")
        assert josev.ask(good).csr  # after it: messages are dealt with in their order
        publish(mosquitto, "elsewhere/josev/cs", stray)
        assert josev.ask(generate_csr()).csr
        assert josev.answers(stray["id"]) == []
        station.stop()
        assert len(station.events(reason="topic_foreign")) == 1
