"""The daemon with its keys in a PKCS#11 token, asked by stock clients; and killed in between."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from outside import Josev, Station, generate_csr
from peers import Mosquitto
from softhsm import Token


def test_a_csr_comes_from_the_token_and_a_destroyed_key_leaves_it(tmp_path: Path) -> None:
    token = Token.make("station", tmp_path)
    with (
        Mosquitto(tmp_path / "broker") as broker,
        Station(tmp_path / "station", "--broker", broker.url, "--keystore", token.uri) as station,
    ):
        with Josev(broker) as josev:
            answers = [
                josev.ask(generate_csr(certificate_type=kind, algorithm=algorithm))
                for kind, algorithm in (
                    ("charging_station_certificate", "ECDSA_SHA256"),
                    ("v2g20_certificate", "ECDSA_SHA512"),
                )
            ]
        for answer in answers:
            judged = subprocess.run(
                ["openssl", "req", "-verify", "-noout"], input=answer.csr, text=True, capture_output=True, check=True
            )
            assert "verify OK" in judged.stderr + judged.stdout
        labels = {label for _, label in token.objects()}
        assert len(labels) == 2

        assert station.process is not None
        station.process.send_signal(signal.SIGKILL)
        station.process.wait()
    assert {label for _, label in token.objects()} == labels
    token.remove()
