"""The daemon between a real Mosquitto and a real TPM, asked by stock clients; and how it starts, stops and logs."""

from __future__ import annotations

import base64
import json
import re
import signal
import sqlite3
import stat
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from brokers import Amqtt
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import load_pem_x509_csr
from outside import Event, Josev, Station, generate_csr, run, software_station
from peers import Mosquitto, Swtpm, free_port
from reasons import ENDS

from stationkey.ledger import KeyRecord, Ledger
from stationkey.system.state_dir import DATABASE_NAME

EXAMPLE = """\
{"id": "123e4567-e89b-12d3-a456-426614174000", "name": "generate_csr", "type": "request",
 "data": {"certificate_type": "charging_station_certificate", "common_name": "9783161484100",
          "organization_name": "EcoG", "country_name": "DE",
          "algorithm": "ECDSA_SHA256", "evse_id": "DE*SEV*E123456789"}}
"""
"""The request as the API page shows it."""
REJECTED = {"status": "rejected"}


def keys_of(station: Station) -> list[KeyRecord]:
    """The keys on record, read beside the running daemon."""
    with closing(Ledger(station.state_dir / DATABASE_NAME, read_only=True)) as ledger:
        return ledger.keys.all()


def keys_for(station: Station, request_id: str) -> list[KeyRecord]:
    """The keys on record that were made for a request, whichever way its id is written."""
    return [key for key in keys_of(station) if request_id.lower() in map(str.lower, key.request_ids)]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as mosquitto:
        yield mosquitto


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory, broker: Mosquitto, session_swtpm: Swtpm) -> Iterator[Station]:
    """One daemon for all the tests that leave it as it was."""
    options = ("--broker", broker.url, "--keystore", session_swtpm.uri)
    with Station(tmp_path_factory.mktemp("station"), *options) as running:
        yield running


@pytest.fixture(scope="module")
def josev(station: Station, broker: Mosquitto) -> Iterator[Josev]:
    assert station.process is not None
    with Josev(broker) as subscribed:
        yield subscribed


# The contract, over MQTT.


def test_the_example_of_the_api_page_is_answered_with_a_csr_that_openssl_verifies(josev: Josev) -> None:
    answer = josev.ask(EXAMPLE)
    assert answer.message == {
        "id": "123e4567-e89b-12d3-a456-426614174000",
        "name": "generate_csr",
        "type": "response",
        "data": {"status": "accepted", "csr": answer.csr},
    }
    judged = subprocess.run(
        ["openssl", "req", "-verify", "-noout", "-subject", "-nameopt", "RFC2253"],
        input=answer.csr,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "verify OK" in judged.stderr + judged.stdout
    assert "CN=9783161484100,O=EcoG,C=DE" in judged.stdout


def test_an_answer_is_published_at_qos_1_and_not_retained(josev: Josev, broker: Mosquitto) -> None:
    answer = josev.ask(generate_csr())
    assert (answer.topic, answer.qos, answer.retained) == ("cs/josev", 1, False)
    with Josev(broker) as late:
        assert late.everything() == []


def test_an_upper_case_id_comes_back_upper_case(josev: Josev) -> None:
    request_id = str(uuid.uuid4()).upper()
    assert josev.ask(generate_csr(request_id)).csr


def test_a_request_at_qos_0_is_answered(josev: Josev) -> None:
    request = generate_csr()
    josev.publish(request, qos=0)
    assert josev.wait_for(request["id"])[0].csr


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(lambda request: request, id="as-it-was"),
        pytest.param(lambda request: request | {"id": request["id"].upper()}, id="id-in-upper-case"),
        pytest.param(lambda request: request | {"unknown": 1}, id="with-an-unknown-field"),
        pytest.param(lambda request: dict(reversed(request.items())), id="members-in-another-order"),
    ],
)
def test_a_request_that_comes_again_gets_the_csr_it_got_and_no_second_key(
    josev: Josev, station: Station, again: Callable[[Event], Event]
) -> None:
    request = generate_csr()
    first = josev.ask(request)
    repeated = again(request)
    count = len(josev.answers(repeated["id"]))
    josev.publish(repeated)
    second = josev.wait_for(repeated["id"], count=count + 1)[-1]
    assert second.id == repeated["id"]
    assert second.csr == first.csr
    assert len(keys_for(station, request["id"])) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"common_name": "another"}, id="common-name"),
        pytest.param({"organization_name": "another"}, id="organization-name"),
        pytest.param({"country_name": "FR"}, id="country-name"),
        pytest.param({"algorithm": "ECDSA_SHA512"}, id="algorithm"),
        pytest.param({"certificate_type": "v2g_certificate"}, id="certificate-type"),
        pytest.param({"evse_id": "DE*SEV*E1"}, id="evse-id"),
    ],
)
def test_an_id_that_comes_again_with_other_content_is_rejected(josev: Josev, station: Station, change: Event) -> None:
    request = generate_csr()
    first = josev.ask(request)
    assert josev.ask(generate_csr(request["id"], **request["data"] | change)).data == REJECTED
    assert station.wait_for("rejected", request_id=request["id"])[0]["reason"] == "id_reused"
    assert josev.ask(request).csr == first.csr
    assert len(keys_for(station, request["id"])) == 1


def test_the_keys_of_two_requests_differ_though_they_ask_for_the_same(josev: Josev) -> None:
    request = generate_csr()
    first = load_pem_x509_csr(josev.ask(request).csr.encode())
    second = load_pem_x509_csr(josev.ask(request | {"id": str(uuid.uuid4())}).csr.encode())
    assert first.subject == second.subject
    assert first.public_key() != second.public_key()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        pytest.param({"country_name": "GER"}, "country_name_invalid", id="country-of-three-letters"),
        pytest.param({"common_name": "x" * 65}, "common_name_invalid", id="common-name-too-long"),
        pytest.param({"algorithm": "MD5"}, "algorithm_invalid", id="unknown-algorithm"),
        pytest.param({"certificate_type": "v2g20_certificate"}, "algorithm_not_allowed", id="v2g20-with-sha256"),
    ],
)
def test_a_wrong_request_is_rejected_with_nothing_else_in_data(
    josev: Josev, station: Station, wrong: Event, reason: str
) -> None:
    answer = josev.ask(generate_csr(**wrong))
    assert answer.message == {"id": answer.id, "name": "generate_csr", "type": "response", "data": REJECTED}
    assert station.wait_for("rejected", request_id=answer.id)[0]["reason"] == reason
    assert keys_for(station, answer.id) == []


OTHERS = [
    {"id": str(uuid.uuid4()), "name": "cs_status_and_limits", "type": "request", "data": {"evses": []}},
    {"id": str(uuid.uuid4()), "name": "generate_csr", "type": "response", "data": REJECTED},
    {"id": str(uuid.uuid4()), "name": "GENERATE_CSR", "type": "request", "data": {}},
]
"""Messages on ``josev/cs`` that are none of our business (decision 3)."""
UNANSWERABLE = [
    pytest.param(b"\xff\xfe", "not_utf8", id="not-utf-8"),
    pytest.param("", "not_json", id="empty"),
    pytest.param("[1, 2]", "not_a_message", id="no-object"),
    pytest.param({**generate_csr(), "id": "7"}, "id_invalid", id="id-no-uuid"),
    pytest.param({**generate_csr(), "id": None}, "id_invalid", id="id-null"),
    pytest.param({"name": "generate_csr", "type": "request", "data": {}}, "id_invalid", id="no-id"),
]


def test_messages_of_others_are_passed_over_in_silence(tmp_path: Path, mosquitto: Mosquitto) -> None:
    last = generate_csr()
    with software_station(tmp_path, mosquitto) as station, Josev(mosquitto) as josev:
        josev.publish(*OTHERS)
        josev.ask(last)
        assert station.stop() == 0  # nothing is in hand any more
        assert [answer.id for answer in josev.everything()] == [last["id"]]
        assert [event["level"] for event in station.events() if event["level"] != "info"] == ["warning"]
        assert station.wait_for("stopped")[0]["accepted"] == 1


def test_messages_without_a_usable_id_are_logged_and_counted_and_nothing_is_published(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    with software_station(tmp_path, mosquitto) as station, Josev(mosquitto) as josev:
        for parameters in UNANSWERABLE:
            payload, reason = parameters.values
            assert isinstance(payload, str | bytes | dict)
            josev.publish(payload)
            station.wait_for(reason=reason)
        assert station.stop() == 0
        assert josev.everything() == []
        counts = station.wait_for("stopped")[0]
        assert (counts["not_utf8"], counts["not_json"], counts["not_a_message"], counts["id_invalid"]) == (1, 1, 1, 3)


def test_an_installation_status_activates_the_key_and_is_not_answered(josev: Josev, station: Station) -> None:
    asked = generate_csr()
    josev.ask(asked)
    status = {
        "id": str(uuid.uuid4()),
        "name": "certificate_installation_status",
        "type": "update",
        "data": {"certificate_type": asked["data"]["certificate_type"], "status": "installed"},
    }
    josev.publish(status)
    station.wait_for("key active", message_id=status["id"])
    assert not [answer for answer in josev.everything() if answer.id == status["id"]]


def test_a_topic_prefix_is_put_before_both_topics(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with (
        software_station(tmp_path, mosquitto, "--topic-prefix", "site/7"),
        Josev(mosquitto, "site/7/") as josev,
        Josev(mosquitto) as elsewhere,
    ):
        elsewhere.publish(generate_csr())
        assert josev.ask(generate_csr()).topic == "site/7/cs/josev"
        assert elsewhere.everything() == []
        assert len(josev.everything()) == 1


def test_an_answer_is_on_record_before_it_is_published(josev: Josev, station: Station) -> None:
    answer = josev.ask(generate_csr())
    [key] = keys_for(station, answer.id)
    public_key = load_pem_x509_csr(answer.csr.encode()).public_key()
    assert key.public == public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_the_same_csr_comes_back_after_a_restart(tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm) -> None:
    request = generate_csr()
    station = Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri)
    with Josev(mosquitto) as josev:
        with station:
            first = josev.ask(request)
            assert station.stop() == 0
        with station:
            assert josev.ask(request).csr == first.csr
            assert len(keys_of(station)) == 1
            other = generate_csr(request["id"], common_name="another")
            assert josev.ask(other).data == REJECTED


def test_many_requests_at_once_are_each_answered_once(tmp_path: Path) -> None:
    requests = [generate_csr() for _ in range(200)]  # three times what is taken in hand
    with (
        Mosquitto(
            tmp_path / "mosquitto", "autosave_interval 1000000"
        ) as broker,  # it would write itself to disk 800 times
        software_station(tmp_path, broker) as station,
        Josev(broker) as josev,
    ):
        josev.publish_burst(requests)
        josev.wait_for(count=len(requests))
        assert station.stop() == 0
        answers = josev.everything()
        assert sorted(answer.id for answer in answers) == sorted(request["id"] for request in requests)
        assert len({answer.csr for answer in answers}) == len(requests)


# Starting and stopping.


@pytest.mark.parametrize("number", list(ENDS), ids=lambda number: number.name)
def test_a_signal_lets_it_finish_the_requests_in_hand(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, number: signal.Signals
) -> None:
    requests = [generate_csr() for _ in range(3)]
    with (
        Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri) as station,
        Josev(mosquitto) as josev,
    ):
        served = generate_csr()
        josev.ask(served)
        swtpm.freeze()
        josev.publish(*requests)
        josev.ask(served)  # sent after the others and needs no key, so they are in hand once it is answered
        station.signal(number)
        station.wait_for("stopping")
        swtpm.thaw()
        assert station.ended() == ENDS[number]
        for request in requests:
            assert josev.wait_for(request["id"])[0].csr


@pytest.mark.parametrize("number", list(ENDS), ids=lambda number: number.name)
def test_a_signal_ends_it_while_it_waits_for_a_broker(tmp_path: Path, number: signal.Signals) -> None:
    options = ("--broker", f"mqtt://127.0.0.1:{free_port()}", "--keystore", "software:", "--allow-software-keys")
    with Station(tmp_path, *options).launch() as station:
        station.wait_for(reason="broker_unreachable")
        station.signal(number)
        assert station.ended() == ENDS[number]
        assert not any("Traceback" in line for line in station.lines)


def test_a_state_directory_serves_one_daemon(station: Station, broker: Mosquitto) -> None:
    second = run(
        *("serve", "--state-dir", str(station.state_dir), "--broker", broker.url),
        *("--keystore", "software:", "--allow-software-keys"),
    )
    assert second.returncode == 1
    assert second.reason == "state_dir_in_use"
    assert str(station.state_dir) in second.stderr
    assert "Traceback" not in second.stderr


def test_its_state_is_for_its_user_alone(josev: Josev, station: Station) -> None:
    josev.ask(generate_csr())
    assert stat.S_IMODE(station.state_dir.stat().st_mode) == 0o700
    found = list(station.state_dir.rglob("*"))
    assert DATABASE_NAME in {file.name for file in found}
    assert {stat.S_IMODE(file.stat().st_mode) for file in found if file.is_file()} == {0o600}
    assert {stat.S_IMODE(file.stat().st_mode) for file in found if file.is_dir()} == {0o700}


def test_a_state_directory_that_cannot_be_made_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # no rights would stop root; a file in the way stops everybody
    refused = run(
        *("serve", "--state-dir", str(tmp_path / "file" / "state"), "--broker", "mqtt://127.0.0.1:1"),
        *("--keystore", "software:", "--allow-software-keys"),
    )
    assert refused.returncode == 1
    assert refused.reason == "state_dir_unusable"
    assert str(tmp_path / "file" / "state") in refused.stderr
    assert "--state-dir" in refused.stderr  # words: the option that helps
    assert "Traceback" not in refused.stderr


def test_software_keys_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    refused = run("serve", "--state-dir", str(tmp_path), "--keystore", "software:")
    assert refused.returncode == 1
    assert refused.reason == "software_keys_refused"
    assert "--allow-software-keys" in refused.stderr  # words: the option that helps
    assert "Traceback" not in refused.stderr


def test_every_start_with_software_keys_warns_that_they_are_not_protected(tmp_path: Path, mosquitto: Mosquitto) -> None:
    for _ in range(2):
        with software_station(tmp_path, mosquitto) as station:
            [warning] = [event for event in station.events() if event["level"] == "warning"]
            assert "NOT PROTECTED" in warning["event"]  # words: loud ones


# The log.


def test_every_line_of_a_json_log_is_json_and_each_about_a_request_names_it(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
) -> None:
    with (
        Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri) as station,
        Josev(mosquitto) as josev,
    ):
        served = josev.ask(generate_csr(common_name="no SECC ID", certificate_type="v2g_certificate"))
        wide = josev.ask(generate_csr(organization_name="Ü" * 64, algorithm="RSA_SHA384"))
        refused = josev.ask(generate_csr(country_name="GER"))
        repeated = josev.ask(generate_csr(served.id, common_name="another"))
        swtpm.kill()
        failed = josev.ask(generate_csr())
        assert station.stop() == 0
    events = [json.loads(line) for line in station.lines]
    assert all({"time", "level", "event"} <= event.keys() for event in events)
    assert [event["request_id"] for event in events if "request_id" in event] == [
        served.id,
        served.id,
        wide.id,
        refused.id,
        repeated.id,
        failed.id,
    ]


def test_a_text_log_has_one_readable_line_an_event(tmp_path: Path, mosquitto: Mosquitto) -> None:
    options = ("--keystore", "software:", "--allow-software-keys")
    station = Station(tmp_path, "--broker", mosquitto.url, *options, log_format="text")
    with station, Josev(mosquitto) as josev:
        answer = josev.ask(generate_csr(common_name='Ü with "quotes" and spaces'))
        assert station.stop() == 0
    line = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) +\S.*")
    assert [text for text in station.lines if not line.fullmatch(text)] == []
    [accepted] = [text for text in station.lines if " accepted " in text]
    assert f"request_id={answer.id}" in accepted


@pytest.mark.parametrize("keystore", ["tpm2", "software"])
def test_no_private_part_of_a_key_is_ever_logged(
    tmp_path: Path, mosquitto: Mosquitto, session_swtpm: Swtpm, keystore: str
) -> None:
    uri = session_swtpm.uri if keystore == "tpm2" else "software:"
    station = Station(tmp_path, "--broker", mosquitto.url, "--keystore", uri, "--allow-software-keys")
    with station, Josev(mosquitto) as josev:
        answer = josev.ask(generate_csr())
        josev.ask(generate_csr(answer.id, common_name="another"))
        assert station.stop() == 0
    log = "\n".join(station.lines)
    with closing(sqlite3.connect(station.state_dir / DATABASE_NAME)) as database:
        [(private,)] = database.execute("SELECT private FROM secret").fetchall()
    assert answer.id in log
    assert "PRIVATE KEY" not in log
    middle = private[len(private) // 2 :][:24]
    for spelled in (middle.hex(), base64.b64encode(middle).decode(), repr(middle)[2:-1]):
        assert spelled not in log


def test_a_broker_of_mqtt_3_1_1_alone_is_spoken_to_in_that(tmp_path: Path) -> None:
    with Amqtt(tmp_path / "amqtt") as broker, software_station(tmp_path, broker) as station:
        names = ("--common-name", "9783161484100", "--organization-name", "EcoG", "--country-name", "DE")
        answer = run("request", "charging_station_certificate", "--broker", broker.url, *names)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout.startswith("-----BEGIN CERTIFICATE REQUEST-----")
        assert station.stop() == 0
