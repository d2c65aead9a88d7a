"""The daemon ends when it is told to, whatever hangs; and nothing that hangs keeps a request waiting."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from pathlib import Path

import pytest
from asker import Asker, until
from outside import PROMISED_END, Station
from peers import Daemon, Mosquitto
from reasons import ENDS
from scene import Scene

SIGNALS = pytest.mark.parametrize("number", list(ENDS), ids=lambda number: number.name)


def end(daemon: Daemon, number: signal.Signals) -> None:
    """Send a signal, and wait for the end that it asks for."""
    assert daemon.process is not None
    daemon.process.send_signal(number)
    assert daemon.process.wait(PROMISED_END) == ENDS[number]


@SIGNALS
def test_a_signal_ends_it_though_its_tpm_hangs_with_a_request_in_hand(tmp_path: Path, number: signal.Signals) -> None:
    """The request is answered after the next start, as it is when the power fails instead."""
    with Scene(tmp_path, tpm=True) as scene:
        asker, daemon, request = scene.asker, scene.daemon, scene.frozen_in_hand()
        end(daemon, number)
        assert [event["request_id"] for event in daemon.events(level="warning")] == [request.id]
        scene.tpm.thaw()
        daemon.start()
        asker.wait_for_all()
        assert asker.rejected == set()


@SIGNALS
def test_a_signal_ends_it_though_its_tpm_hangs_from_the_start(tmp_path: Path, number: signal.Signals) -> None:
    with Scene(tmp_path, tpm=True) as scene:
        scene.tpm.freeze()
        scene.daemon.launch()
        until(scene.daemon.events, "it says anything: it logs its version before it asks the TPM")
        end(scene.daemon, number)


def test_a_standard_error_that_nobody_reads_keeps_no_request_waiting(tmp_path: Path, mosquitto: Mosquitto) -> None:
    station = Station(tmp_path, "--broker", mosquitto.url, "--keystore", "software:", "--allow-software-keys")
    with station:  # has the broker keep what is asked while it is away
        assert station.stop() == 0
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 8192)
    environment = {**os.environ, **station.environment}
    try:
        with (
            subprocess.Popen([station.program, *station.command()], env=environment, stderr=writing) as daemon,
            Asker(mosquitto) as asker,
        ):
            try:
                for _ in range(30):  # each is a line of a hundred bytes and more
                    assert asker.ask().data.status == "accepted"
                daemon.terminate()
                assert daemon.wait(PROMISED_END) == 0
            finally:
                daemon.kill()
        assert len(os.read(reading, 2**20)) <= 8192
    finally:
        os.close(reading)
        os.close(writing)
