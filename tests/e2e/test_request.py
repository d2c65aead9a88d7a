"""``stationkey request``: the asking side, judged by what it prints and by its exit status."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from outside import BOUND, STATIONKEY, run, software_station
from peers import Mosquitto, free_port

NAMES = ("--common-name", "9783161484100", "--organization-name", "EcoG", "--country-name", "DE")
ASK = ("request", "charging_station_certificate", *NAMES)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker with a station behind it."""
    folder = tmp_path_factory.mktemp("request")
    with Mosquitto(folder / "mosquitto") as mosquitto, software_station(folder, mosquitto):
        yield mosquitto


def test_an_accepted_request_prints_the_csr_alone_and_exits_0(broker: Mosquitto) -> None:
    answer = run(*ASK, "--broker", broker.url)
    assert (answer.returncode, answer.stderr) == (0, "")
    judged = subprocess.run(
        ["openssl", "req", "-verify", "-noout"], input=answer.stdout, capture_output=True, text=True, check=True
    )
    assert "verify OK" in judged.stdout + judged.stderr
    assert answer.stdout.startswith("-----BEGIN CERTIFICATE REQUEST-----\n")
    assert answer.stdout.endswith("-----END CERTIFICATE REQUEST-----\n")


def test_json_prints_the_whole_response(broker: Mosquitto) -> None:
    request_id = str(uuid.uuid4()).upper()
    answer = run(*ASK, "--broker", broker.url, "--id", request_id, "--json")
    assert answer.returncode == 0
    response = json.loads(answer.stdout)
    assert response["data"].pop("csr").startswith("-----BEGIN CERTIFICATE REQUEST-----")
    assert response == {
        "id": request_id,
        "name": "generate_csr",
        "type": "response",
        "data": {"status": "accepted"},
    }


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        pytest.param((), "", id="pem"),
        pytest.param(("--json",), '"status":"rejected"', id="json"),
    ],
)
def test_a_rejected_request_exits_3_and_says_where_the_reason_is(
    broker: Mosquitto, options: tuple[str, ...], printed: str
) -> None:
    request_id = str(uuid.uuid4())
    answer = run(*ASK, "--country-name", "GER", "--broker", broker.url, "--id", request_id, *options)
    assert answer.returncode == 3
    assert printed in answer.stdout
    assert request_id in answer.stderr


def test_no_answer_in_time_exits_4(broker: Mosquitto) -> None:
    answer = run(*ASK, "--broker", broker.url, "--topic-prefix", "nobody/here", "--timeout", "0.5")
    assert (answer.returncode, answer.stdout) == (4, "")
    assert "0.5 s" in answer.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("request",), id="no-certificate-type"),
        pytest.param(("request", "another_certificate", *NAMES), id="unknown-certificate-type"),
        pytest.param(("request", "v2g_certificate", *NAMES[:-2]), id="no-country"),
        pytest.param((*ASK, "--algorithm", "MD5"), id="unknown-algorithm"),
        pytest.param((*ASK, "--id", "7"), id="id-no-uuid"),
        pytest.param((*ASK, "--timeout", "0"), id="timeout-zero"),
        pytest.param((*ASK, "--timeout", "soon"), id="timeout-no-number"),
        pytest.param((*ASK, "--unknown"), id="unknown-option"),
        pytest.param((*ASK, "--broker", "http://127.0.0.1"), id="no-broker-url"),
        pytest.param((*ASK, "--topic-prefix", "a/#"), id="wildcard-in-prefix"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "Usage: " in answer.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param(("--broker", f"mqtt://127.0.0.1:{free_port()}"), "broker_unreachable", id="no-broker"),
    ],
)
def test_anything_else_exits_1_in_words(options: tuple[str, ...], reason: str) -> None:
    answer = run(*ASK, *options)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.reason == reason
    assert "Traceback" not in answer.stderr


def test_the_environment_names_broker_and_prefix(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with software_station(tmp_path, mosquitto, STATIONKEY_TOPIC_PREFIX="site/7"):
        answer = run(*ASK, STATIONKEY_BROKER=mosquitto.url, STATIONKEY_TOPIC_PREFIX="site/7")
    assert answer.returncode == 0


@contextmanager
def asked(mosquitto: Mosquitto, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``stationkey request`` where there is no station, from the moment on that it has asked."""
    address = ("-h", "127.0.0.1", "-p", str(mosquitto.port))
    with subprocess.Popen(
        ["stdbuf", "-oL", "mosquitto_sub", *address, "-t", "josev/cs", "-C", "1", "-d"],
        stdout=subprocess.PIPE,
        text=True,
    ) as listener:
        assert listener.stdout is not None
        assert any(line.startswith("Subscribed") for line in iter(listener.stdout.readline, ""))
        with subprocess.Popen(
            [*STATIONKEY, *ASK, "--broker", mosquitto.url, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that starts the tests in the background has Ctrl-C ignored in all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads here
        ) as command:
            assert listener.wait(BOUND) == 0
            yield command


def response(request_id: str, data: dict[str, object]) -> dict[str, object]:
    return {"id": request_id, "name": "generate_csr", "type": "response", "data": data}


def test_answers_to_others_are_ignored(mosquitto: Mosquitto) -> None:
    request_id = str(uuid.uuid4())
    answers = (
        response(str(uuid.uuid4()), {"status": "rejected"}),
        response(request_id.upper(), {"status": "rejected"}),  # an id is compared character for character
        response(request_id, {"status": "perhaps"}),
        {"id": request_id, "name": "cs_status_and_limits", "type": "response", "data": {"status": "rejected"}},
        response(request_id, {"status": "accepted", "csr": "the right one\n", "unknown": 1}),
    )
    with asked(mosquitto, "--id", request_id) as command:
        subprocess.run(
            ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(mosquitto.port), "-q", "1", "-t", "cs/josev", "-l"],
            input="".join(json.dumps(answer) + "\n" for answer in answers),
            text=True,
            check=True,
        )
        printed, _ = command.communicate(timeout=BOUND)
    assert (command.returncode, printed) == (0, "the right one\n")


def test_ctrl_c_ends_it_without_a_traceback(mosquitto: Mosquitto) -> None:
    with asked(mosquitto) as command:
        command.send_signal(signal.SIGINT)
        printed, said = command.communicate(timeout=BOUND)
    assert (command.returncode, printed, said) == (130, "", "")


def test_a_server_that_is_no_broker_exits_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = subprocess.Popen(
            [*STATIONKEY, *ASK, "--broker", f"mqtt://127.0.0.1:{server.getsockname()[1]}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2):  # MQTT 5, then 3.1.1
            connection, _ = server.accept()
            connection.recv(1)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()
        _, said = command.communicate(timeout=BOUND)
    assert command.returncode == 1
    assert "Traceback" not in said
