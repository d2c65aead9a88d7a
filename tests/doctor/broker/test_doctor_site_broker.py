"""The doctor on a site: its broker is seen as a station sees it, and its directories before any station has one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from doctors import look, write_config
from peers import Mosquitto
from test_doctor_broker_setups import guarded

from stationkey.doctor.report import Level

SHIPPED = Path(__file__).parents[3] / "packaging/mosquitto/site.acl"


def test_the_topics_of_a_site_are_tried_with_the_rights_that_are_shipped(tmp_path: Path) -> None:
    with guarded(tmp_path, SHIPPED.read_text(), "allow_anonymous false") as (broker, config):
        text = config.read_text() + '[site]\nstations = "depot7/+"\n'
        text += f'[josev]\ncertificate_dir = "{tmp_path}/{{station}}/certificates"\n'
        found = look(tmp_path, broker=broker.url, config_file=write_config(tmp_path, text))
    checked = ("broker.publish", "broker.subscribe", "broker.own_rights", "broker.retained")
    assert {name: found.level(name) for name in checked} == dict.fromkeys(checked, Level.OK)
    assert found.level("broker.josev") is Level.NOT_CHECKED
    assert found.level("config.certificate_dir") is not Level.FAILURE


def test_a_message_that_is_retained_for_any_station_is_found(tmp_path: Path) -> None:
    retained = ("-h", "127.0.0.1", "-t", "depot7/s9/josev/cs", "-m", "{}", "-r", "-q", "1")
    with Mosquitto(tmp_path / "broker") as broker:
        subprocess.run(["mosquitto_pub", *retained, "-p", str(broker.port)], check=True)
        config = write_config(tmp_path, '[site]\nstations = ["depot8/a", "depot7/+"]\n')
        found = look(tmp_path, broker=broker.url, config_file=config)
    assert found.level("broker.retained") is Level.WARNING
    assert "depot7/s9/josev/cs" in found.text("broker.retained")


def test_without_rights_on_the_stations_topics_the_doctor_says_so(tmp_path: Path) -> None:
    single = "user stationkey\ntopic read josev/cs\ntopic write cs/josev\n"
    with guarded(tmp_path, single, "allow_anonymous false") as (broker, config):
        text = config.read_text() + '[site]\nstations = "depot7/+"\n'
        found = look(tmp_path, broker=broker.url, config_file=write_config(tmp_path, text))
    assert found.level("broker.publish") is Level.FAILURE
