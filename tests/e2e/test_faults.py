"""The daemon while its broker, its TPM or it itself dies, hangs and comes back. Never is it restarted to get well."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from outside import PROMISED_END, Josev, Station, generate_csr, run, software_station
from peers import Mosquitto, Swtpm

from stationkey.ledger import Ledger
from stationkey.system.state_dir import DATABASE_NAME

REJECTED = {"status": "rejected"}


@pytest.fixture
def station(tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm) -> Iterator[Station]:
    """A daemon, not started yet, that gives its TPM a second for an EC key."""
    config = tmp_path / "stationkey.toml"
    config.write_text("[deadlines]\nec = 1\n")
    options = ("--broker", mosquitto.url, "--keystore", swtpm.uri, "--config", str(config))
    station = Station(tmp_path, *options)
    yield station
    station.kill()


@pytest.fixture
def josev(mosquitto: Mosquitto) -> Iterator[Josev]:
    with Josev(mosquitto) as subscribed:
        yield subscribed


def reason_of(station: Station, request_id: str) -> object:
    """Why the log says that a request was rejected."""
    return station.wait_for("rejected", request_id=request_id)[-1]["reason"]


def broker_dies_with_a_request_in_hand(station: Station, broker: Mosquitto, josev: Josev) -> None:
    """Kill the broker once the daemon has everything that was published."""
    josev.ask(generate_csr(country_name="GER"))  # comes after all the others, and needs no key
    broker.kill()
    station.wait_for("no broker at")


# The daemon.


def test_a_request_that_comes_while_the_daemon_is_down_is_answered_after_its_start(
    station: Station, josev: Josev
) -> None:
    station.start()
    assert station.stop() == 0
    request = generate_csr()
    josev.publish(request)
    station.start()
    assert josev.wait_for(request["id"])[0].csr


def test_a_request_in_hand_when_the_power_fails_is_answered_after_the_next_start(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    station = Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri)  # with all the time it wants
    served, request = generate_csr(), generate_csr()
    with station:
        josev.ask(served)
        swtpm.freeze()
        josev.publish(request)
        josev.ask(served)  # sent after the other and needs no key, so that one is in hand
    swtpm.thaw()
    with station:
        assert josev.wait_for(request["id"])[0].csr


def test_an_answer_that_is_on_record_and_was_not_sent_goes_out_at_the_next_start(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    station = Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri)
    request = generate_csr()
    with station:
        swtpm.freeze()
        josev.publish(request)
        broker_dies_with_a_request_in_hand(station, mosquitto, josev)
        swtpm.thaw()
        station.wait_for("accepted", request_id=request["id"])
        assert station.stop() == 0
    mosquitto.start()
    with station:
        station.wait_for("publishing an answer of an earlier run", request_id=request["id"])
        answer = josev.wait_for(request["id"])[0]
        with closing(Ledger(station.state_dir / DATABASE_NAME, read_only=True)) as ledger:
            recorded = ledger.answers.find(request["id"])
        assert recorded is not None
        assert answer.csr == recorded.csr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_though_its_tpm_hangs_with_a_request_in_hand(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev, number: signal.Signals
) -> None:
    station = Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri)
    served, request = generate_csr(), generate_csr()
    with station:
        josev.ask(served)
        swtpm.freeze()
        josev.publish(request)
        josev.ask(served)
        station.signal(number)
        assert station.ended() == 0
        [unfinished] = [event for event in station.events() if "not finished" in event["event"]]
        assert unfinished["request_id"] == request["id"]
    swtpm.thaw()
    with station:
        assert josev.wait_for(request["id"])[0].csr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_though_its_tpm_hangs_from_the_start(
    station: Station, swtpm: Swtpm, number: signal.Signals
) -> None:
    swtpm.freeze()
    station.launch().wait_for("stationkey")  # it logs its version before it asks the TPM
    station.signal(number)
    assert station.ended() == 0


# The broker.


def test_a_broker_that_is_down_at_the_start_is_waited_for(station: Station, mosquitto: Mosquitto) -> None:
    mosquitto.kill()
    station.launch().wait_for("no broker at", count=2)
    assert not [event for event in station.events() if event["event"] == "ready"]
    mosquitto.start()
    station.wait_for("ready")
    with Josev(mosquitto) as josev:
        assert josev.ask(generate_csr()).csr


def test_a_broker_that_dies_and_comes_back_is_served_again(
    station: Station, mosquitto: Mosquitto, josev: Josev
) -> None:
    station.start()
    request = generate_csr()
    first = josev.ask(request)
    mosquitto.kill()
    station.wait_for("no broker at")
    mosquitto.start()
    station.wait_for("ready", count=2)
    with Josev(mosquitto) as again:
        assert again.ask(request).csr == first.csr
        assert again.ask(generate_csr()).csr


def test_a_broker_that_forgot_its_sessions_is_subscribed_to_again(
    station: Station, mosquitto: Mosquitto, josev: Josev
) -> None:
    station.start()
    josev.ask(generate_csr())
    mosquitto.kill()
    (mosquitto.directory / "mosquitto.db").unlink(missing_ok=True)
    station.wait_for("no broker at")
    mosquitto.start()
    station.wait_for("ready", count=2)
    with Josev(mosquitto) as again:
        assert again.ask(generate_csr()).csr


def test_an_answer_whose_broker_died_goes_out_when_it_is_back(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    request = generate_csr()
    with Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri) as station:
        swtpm.freeze()
        josev.publish(request)
        broker_dies_with_a_request_in_hand(station, mosquitto, josev)
        swtpm.thaw()
        station.wait_for("accepted", request_id=request["id"])
        mosquitto.start()
        answer = josev.wait_for(request["id"])[0]
        assert answer.csr
        assert len(station.wait_for("accepted", request_id=request["id"])) == 1


DENY_SUBSCRIPTION = """{"defaultACLAccess":
    {"publishClientSend": true, "publishClientReceive": true, "subscribe": %s, "unsubscribe": true}}"""


def test_a_refused_subscription_is_told_in_words_and_tried_again(tmp_path: Path) -> None:
    [plugin] = Path("/usr/lib").glob("*/mosquitto_dynamic_security.so")
    rules = tmp_path / "rules.json"
    rules.write_text(DENY_SUBSCRIPTION % "false")
    rules.chmod(0o600)
    extra = (f"plugin {plugin}", f"plugin_opt_config_file {rules}")
    with Mosquitto(tmp_path / "mosquitto", *extra) as broker, software_station_not_ready(tmp_path, broker) as station:
        refusals = station.wait_for("refuses a subscription to josev/cs", count=2, reason="subscription_refused")
        assert "access control list" in refusals[0]["event"]
        assert not [event for event in station.events() if event["event"] == "ready"]
        broker.terminate()
        rules.write_text(DENY_SUBSCRIPTION % "true")
        broker.start()
        station.wait_for("ready")
        with Josev(broker) as josev:
            assert josev.ask(generate_csr()).csr


def software_station_not_ready(folder: Path, broker: Mosquitto) -> Station:
    """A daemon that is started, and that nobody waits for."""
    return Station(folder, "--broker", broker.url, "--keystore", "software:", "--allow-software-keys").launch()


def test_a_refused_publication_is_logged_and_the_daemon_goes_on(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite josev/cs\n")
    with (
        Mosquitto(tmp_path / "mosquitto", f"acl_file {rules}") as broker,
        software_station(tmp_path, broker) as station,
        Josev(broker) as josev,
    ):
        requests = [generate_csr(), generate_csr()]
        for request in requests:
            josev.publish(request)
            [refusal] = station.wait_for("refuses to take a message", request_id=request["id"])
            assert (refusal["level"], refusal["reason"]) == ("error", "publication_refused")
            assert "cs/josev" in refusal["event"]
        assert station.stop() == 0


class Amqtt(Mosquitto):
    """A broker that speaks MQTT 3.1.1 only, and answers a CONNECT of MQTT 5 with silence."""

    program = str(Path(sys.executable).parent / "amqtt")

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (directory / "amqtt.yaml").write_text(
            f"listeners:\n  default:\n    type: tcp\n    bind: 127.0.0.1:{self.port}\n"
            "plugins:\n  amqtt.plugins.authentication.AnonymousAuthPlugin:\n    allow_anonymous: true\n"
        )

    def command(self) -> list[str]:
        return ["-c", str(self.directory / "amqtt.yaml")]


def test_a_broker_of_mqtt_3_1_1_alone_is_spoken_to_in_that(tmp_path: Path) -> None:
    with Amqtt(tmp_path / "amqtt") as broker, software_station(tmp_path, broker) as station:
        names = ("--common-name", "9783161484100", "--organization-name", "EcoG", "--country-name", "DE")
        answer = run("request", "charging_station_certificate", "--broker", broker.url, *names)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout.startswith("-----BEGIN CERTIFICATE REQUEST-----")
        assert station.stop() == 0


# The TPM.


def test_a_tpm_that_dies_idle_costs_the_requests_until_it_is_back(station: Station, swtpm: Swtpm, josev: Josev) -> None:
    station.start()
    assert josev.ask(generate_csr()).csr
    swtpm.kill()
    refused = generate_csr()
    assert josev.ask(refused).data == REJECTED
    assert reason_of(station, refused["id"]) == "tpm_unreachable"
    swtpm.start()
    assert josev.ask(generate_csr()).csr
    assert josev.ask(refused).csr  # a refusal for want of a TPM is no answer for ever


def test_a_tpm_that_restarts_unnoticed_costs_no_request(station: Station, swtpm: Swtpm, josev: Josev) -> None:
    station.start()
    assert josev.ask(generate_csr()).csr
    swtpm.kill()
    swtpm.start()
    assert josev.ask(generate_csr()).csr


def test_a_tpm_that_hangs_costs_each_request_until_it_goes_on(station: Station, swtpm: Swtpm, josev: Josev) -> None:
    station.start()
    assert josev.ask(generate_csr()).csr
    swtpm.freeze()
    for _ in range(3):  # more than the threads that may be stuck in a call
        refused = generate_csr()
        assert josev.ask(refused).data == REJECTED
        assert reason_of(station, refused["id"]) == "keystore_timeout"
    swtpm.thaw()
    assert josev.ask(generate_csr()).csr


def test_a_tpm_that_hangs_and_then_dies_is_used_again_when_it_is_back(
    station: Station, swtpm: Swtpm, josev: Josev
) -> None:
    station.start()
    assert josev.ask(generate_csr()).csr
    swtpm.freeze()
    assert josev.ask(generate_csr()).data == REJECTED
    swtpm.kill()
    swtpm.start()
    assert josev.ask(generate_csr()).csr


def test_a_tpm_that_dies_while_it_makes_rsa_keys_costs_those_requests_only(
    station: Station, swtpm: Swtpm, josev: Josev
) -> None:
    station.start()
    requests = [generate_csr(algorithm="RSA_SHA256") for _ in range(5)]
    josev.publish(*requests)
    josev.wait_for()
    swtpm.kill()
    answers = josev.wait_for(count=len(requests))
    assert {answer.id for answer in answers} == {request["id"] for request in requests}
    assert answers[-1].data == REJECTED
    assert reason_of(station, answers[-1].id) == "tpm_unreachable"
    swtpm.start()
    assert josev.ask(generate_csr(algorithm="RSA_SHA256")).csr


def test_a_tpm_that_is_replaced_is_given_a_storage_root_key_and_used(
    station: Station, swtpm: Swtpm, josev: Josev
) -> None:
    station.start()
    assert josev.ask(generate_csr()).csr
    swtpm.kill()
    swtpm.new_chip()
    swtpm.start()
    assert josev.ask(generate_csr()).csr


def test_a_tpm_that_is_not_there_at_the_start_is_used_once_it_is(station: Station, swtpm: Swtpm, josev: Josev) -> None:
    swtpm.kill()
    station.start()
    [told] = [event for event in station.events() if event["level"] == "error"]
    assert "requests will be rejected until this is over" in told["event"]
    assert told["reason"] == "tpm_unreachable"
    assert josev.ask(generate_csr()).data == REJECTED
    swtpm.start()
    assert josev.ask(generate_csr()).csr


def test_a_storage_root_key_that_does_not_fit_is_refused_at_the_start_in_words(
    station: Station, swtpm: Swtpm, tmp_path: Path
) -> None:
    context = str(tmp_path / "primary.ctx")
    environment = {**os.environ, "TPM2TOOLS_TCTI": swtpm.tcti}
    for command in (
        ["tpm2_createprimary", "-Q", "-C", "o", "-G", "rsa2048", "-c", context],
        ["tpm2_evictcontrol", "-Q", "-C", "o", "-c", context, "0x81000001"],
    ):
        subprocess.run(command, env=environment, check=True, capture_output=True)
    station.launch()
    assert station.ended() == 1
    words = "\n".join(station.lines)
    assert "0x81000001" in words
    assert "tpm2_evictcontrol" in words
    assert "Traceback" not in words


def test_a_standard_error_that_nobody_reads_keeps_no_request_waiting(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with software_station(tmp_path, mosquitto) as station:  # has the broker keep what is asked while it is away
        assert station.stop() == 0
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 8192)
    try:
        with (
            subprocess.Popen(station.command, env=station.environment, stderr=writing) as daemon,
            Josev(mosquitto) as josev,
        ):
            try:
                for _ in range(30):  # each is a line of a hundred bytes and more
                    assert josev.ask(generate_csr()).csr
                daemon.terminate()
                assert daemon.wait(PROMISED_END) == 0
            finally:
                daemon.kill()
        assert len(os.read(reading, 2**20)) <= 8192
    finally:
        os.close(reading)
        os.close(writing)
