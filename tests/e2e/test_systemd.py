"""What systemd is told by the real daemon: ready, status, stopping, and the watchdog's signs of life.

The test is at systemd's end of the socket [sd_notify(3)]. With a real TPM simulator, frozen where it is to hang.
"""

from __future__ import annotations

import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outside import BOUND, Event, Josev, Station, generate_csr, software_station
from peers import Mosquitto, Swtpm

ALIVE = "WATCHDOG=1"
WATCHDOG = {"WATCHDOG_USEC": "200000"}
"""Has the daemon give a sign of life each tenth of a second."""
IMPATIENT = "[deadlines]\nec = 0.5\n"
"""So that what hangs is soon known to."""


class Manager:
    """systemd's end of the socket."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._told: list[str] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while told := self._socket.recv(4096):
            with self._news:
                self._told.append(told.decode())
                self._news.notify_all()

    def wait_for(self, found: Callable[[str], bool], *, since: int = 0, count: int = 1) -> int:
        """Wait until so many messages are as they should be; how many there are up to the last of them."""

        def places() -> list[int]:
            return [place for place, told in enumerate(self._told[since:], since + 1) if found(told)]

        with self._news:
            assert self._news.wait_for(lambda: len(places()) >= count, BOUND), self._told
            return places()[count - 1]

    def status(self, *words: str, since: int = 0) -> int:
        """Wait for a line of status with these words in it."""
        return self.wait_for(
            lambda told: told.startswith("STATUS=") and all(word in told for word in words), since=since
        )

    def alive(self, count: int, *, since: int) -> int:
        """Wait for signs of life."""
        return self.wait_for(ALIVE.__eq__, since=since, count=count)

    def told(self, since: int = 0, until: int | None = None) -> list[str]:
        with self._news:
            return self._told[since:until]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.address)
        self._thread.join()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def watched(folder: Path, broker: Mosquitto, tpm: Swtpm, manager: Manager, config: str = "") -> Station:
    (folder / "stationkey.toml").write_text(config)
    options = ("--broker", broker.url, "--keystore", tpm.uri, "--config", str(folder / "stationkey.toml"))
    return Station(folder, *options, NOTIFY_SOCKET=manager.address, **WATCHDOG)


def update(verb: str, request: Event) -> Event:
    data = {"certificate_type": request["data"]["certificate_type"], "status": verb}
    return {"id": str(uuid.uuid4()), "name": "certificate_installation_status", "type": "update", "data": data}


def test_it_is_ready_though_there_is_no_broker_and_its_status_says_that_there_is_none(
    tmp_path: Path, mosquitto: Mosquitto, manager: Manager
) -> None:
    """A start that waited for the broker would be ended by TimeoutStartSec, again and again."""
    mosquitto.kill()
    options = ("--broker", mosquitto.url, "--keystore", "software:", "--allow-software-keys")
    with Station(tmp_path, *options, NOTIFY_SOCKET=manager.address).launch() as station:
        station.wait_for(reason="broker_unreachable")
        ready = manager.wait_for("READY=1".__eq__)
        manager.status(f"no connection to {mosquitto.url}")
        assert not any(event["event"] == "ready" for event in station.events())
        mosquitto.start()
        station.wait_for("ready")
        connected = manager.status(f"connected to {mosquitto.url}", "0 keys active", since=ready)
        mosquitto.kill()
        manager.status(f"no connection to {mosquitto.url}", since=connected)
        mosquitto.start()
        station.wait_for("ready", count=2)
        with Josev(mosquitto) as josev:
            assert josev.ask(generate_csr()).csr
        assert station.stop() == 0
    assert [told for told in manager.told() if not told.startswith("STATUS=")] == ["READY=1", "STOPPING=1"]


def test_its_status_says_how_many_keys_are_active(tmp_path: Path, mosquitto: Mosquitto, manager: Manager) -> None:
    with (
        software_station(tmp_path, mosquitto, NOTIFY_SOCKET=manager.address) as station,
        Josev(mosquitto) as josev,
    ):
        request = generate_csr(common_name="not-for-everybody")
        josev.ask(request)
        josev.publish(update("installed", request))
        active = manager.status("1 key active")
        josev.publish(update("deleted", request))
        manager.status("0 keys active", since=active)
        assert station.stop() == 0
    assert "not-for-everybody" not in "".join(manager.told())


def test_while_the_tpm_hangs_there_is_no_sign_of_life_and_as_soon_as_it_goes_on_there_is(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, manager: Manager
) -> None:
    with watched(tmp_path, mosquitto, swtpm, manager, IMPATIENT) as station, Josev(mosquitto) as josev:
        manager.alive(3, since=0)
        swtpm.freeze()  # nobody wants anything of it
        station.wait_for("the key store hangs")
        hung = manager.status("the key store hangs")
        assert josev.ask(generate_csr()).data == {"status": "rejected"}  # after five intervals
        assert josev.ask(generate_csr()).data == {"status": "rejected"}  # with the first thread given up
        assert ALIVE not in manager.told(since=hung)
        swtpm.thaw()
        manager.alive(3, since=hung)
        manager.status(f"connected to {mosquitto.url}, 0 keys active", since=hung)
        assert josev.ask(generate_csr()).csr
        assert station.stop() == 0


def test_a_tpm_that_is_gone_does_not_hang_and_the_status_says_what_it_is(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, manager: Manager
) -> None:
    """A new process would find it gone as well."""
    with watched(tmp_path, mosquitto, swtpm, manager) as station, Josev(mosquitto) as josev:
        swtpm.kill()
        assert josev.ask(generate_csr()).data == {"status": "rejected"}
        gone = manager.status("the key store cannot serve (tpm_unreachable)")
        manager.alive(10, since=gone)
        swtpm.start()
        assert josev.ask(generate_csr()).csr
        assert not any("hangs" in event["event"] for event in station.events())


def test_a_request_that_takes_long_within_its_deadline_is_no_reason_to_worry(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, manager: Manager
) -> None:
    with watched(tmp_path, mosquitto, swtpm, manager) as station, Josev(mosquitto) as josev:
        swtpm.freeze()
        request = generate_csr()
        josev.publish(request)
        manager.alive(10, since=len(manager.told()))
        swtpm.thaw()
        assert josev.wait_for(request["id"])[0].csr
        assert not any("hangs" in event["event"] for event in station.events())


def test_there_are_signs_of_life_while_the_tpm_keeps_the_start_waiting(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, manager: Manager
) -> None:
    swtpm.freeze()
    with watched(tmp_path, mosquitto, swtpm, manager).launch() as station:
        manager.alive(5, since=0)
        assert "READY=1" not in manager.told()
        swtpm.thaw()
        station.wait_for("ready")
        manager.wait_for("READY=1".__eq__)


def test_there_are_signs_of_life_while_requests_in_hand_are_finished(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, manager: Manager
) -> None:
    with watched(tmp_path, mosquitto, swtpm, manager) as station, Josev(mosquitto) as josev:
        served, request = generate_csr(), generate_csr()
        josev.ask(served)
        swtpm.freeze()
        josev.publish(request)
        josev.ask(served)  # sent after the other, and needs no key: so that one is in hand
        station.signal(signal.SIGTERM)
        stopping = manager.wait_for("STOPPING=1".__eq__)
        manager.alive(5, since=stopping)
        swtpm.thaw()
        assert station.ended() == 0
        assert josev.wait_for(request["id"])[0].csr


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="no watchdog"),
        pytest.param({**WATCHDOG, "WATCHDOG_PID": "1"}, id="another process's"),
        pytest.param({"WATCHDOG_USEC": "soon"}, id="no number"),
        pytest.param({"WATCHDOG_USEC": "0"}, id="off"),
    ],
)
def test_nobody_who_does_not_wait_for_signs_of_life_gets_any(
    tmp_path: Path, mosquitto: Mosquitto, manager: Manager, environment: dict[str, str]
) -> None:
    with software_station(tmp_path, mosquitto, NOTIFY_SOCKET=manager.address, **environment) as station:
        manager.status("connected to")
        assert station.stop() == 0
    assert ALIVE not in manager.told()
