"""The renewal watch of the running daemon: who is told, a clock that is wrong, kills, and a command that hangs."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from asker import until
from scene import CONFIG, Scene
from test_clock_faults import WrongClockDaemon, set_clock

from parts import Authority, pem

EVSE: Final = "DE*ABC*E1"
LIFE: Final = timedelta(days=90)
START: Final = datetime.now(UTC)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path, tpm=False) as opened:
        set_clock(opened, timedelta())
        (tmp_path / "certificates").mkdir()
        opened.daemon = WrongClockDaemon(tmp_path / "daemon", str(tmp_path / "ahead"), *opened.options())
        yield opened


def configure(scene: Scene, renewal: str = "") -> None:
    folder = scene.folder / "certificates"
    scene.config.write_text(f'{CONFIG}[josev]\ncertificate_dir = "{folder}"\n[renewal]\n{renewal}\n')


def install(scene: Scene) -> None:
    """Have a certificate of 90 days installed."""
    authority = Authority()
    csr = scene.asker.ask(scene.asker.request(evse_id=EVSE)).data.csr
    leaf = authority.sign(str(csr), begins=START - timedelta(hours=1), ends=START + LIFE)
    (scene.folder / "certificates/leaf.pem").write_bytes(pem(leaf, authority.sub))
    scene.asker.tell("installed", evse_id=EVSE)
    until(lambda: scene.daemon.events(event="key active"), "the key is active")


def said(scene: Scene, reason: str) -> list[dict[str, Any]]:
    """The log lines of this run with this reason."""
    return [line for line in scene.daemon.events() if line.get("reason") == reason]


def let_it_look(scene: Scene) -> None:
    """Return when it has swept twice, and so has looked at the certificates as often, about."""
    seen = len(scene.daemon.events(event="swept"))
    until(lambda: len(scene.daemon.events(event="swept")) >= seen + 5, "it has swept")


def test_a_clock_that_is_wrong_gives_no_hint_and_a_restart_repeats_none(scene: Scene) -> None:
    configure(scene)
    scene.daemon.start()
    install(scene)
    set_clock(scene, datetime(1970, 1, 2, tzinfo=UTC) - START)
    until(lambda: said(scene, "clock_behind"), "the clock is found wrong")
    set_clock(scene, LIFE - timedelta(days=29))
    until(lambda: said(scene, "certificate_due"), "the certificate is due")
    hints: list[str] = []
    for ahead in (timedelta(), LIFE - timedelta(days=29), timedelta(days=3650), LIFE - timedelta(days=29)):
        set_clock(scene, ahead)
        let_it_look(scene)
        scene.daemon.kill()
        hints += [line["reason"] for line in scene.daemon.events() if "hint" in line]
        assert len(said(scene, "clock_behind")) == (not ahead)  # once, in the first run
        scene.daemon.start()
        let_it_look(scene)
    hints += [line["reason"] for line in scene.daemon.events() if "hint" in line]
    assert hints == ["certificate_due", "certificate_expired"]


def test_a_renewal_command_that_hangs_delays_no_request_and_is_killed(scene: Scene) -> None:
    script, told = scene.folder / "renew", scene.folder / "told"
    script.write_text(
        f'#!/bin/sh\nsleep 1000 &\necho "$$ $! $STATIONKEY_EVSE_ID" > {told}.new\nmv {told}.new {told}\nwait\n'
    )
    script.chmod(0o755)
    configure(scene, f"command = {json.dumps([str(script)])}\ncommand_timeout = 1000")
    scene.daemon.start()
    install(scene)
    set_clock(scene, LIFE - timedelta(days=29))
    until(told.exists, "the command runs")
    leader, child, evse_id = told.read_text().split()
    assert evse_id == EVSE
    assert scene.asker.ask().data.status == "accepted"  # within the deadline of 2 s, or it were rejected
    scene.daemon.terminate()
    for pid in (leader, child):
        until(lambda pid=pid: not is_running(pid), "the command is killed")  # type: ignore[misc]


def test_what_is_due_is_told_on_the_topic_and_by_health_and_metrics(scene: Scene) -> None:
    listen = f"unix:{scene.folder}/metrics.sock"
    configure(scene, f'topic = "cs/stationkey/renewal"\n[metrics]\nlisten = "{listen}"')
    scene.daemon.start()
    install(scene)
    port = scene.broker.url.rpartition(":")[2]
    command = ("mosquitto_sub", "-p", port, "-q", "1", "-t", "cs/stationkey/renewal", "-C", "2", "-W", "20")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as subscriber:
        assert subscriber.stdout is not None
        assert json.loads(subscriber.stdout.readline())["data"] == {"due": [], "more": 0}
        set_clock(scene, LIFE - timedelta(days=29))
        told = json.loads(subscriber.stdout.readline())["data"]
    certificate = {"certificate_type": "charging_station_certificate", "evse_id": EVSE, "state": "due"}
    assert told == {"due": [certificate | {"not_after": told["due"][0]["not_after"]}], "more": 0}
    assert datetime.fromisoformat(told["due"][0]["not_after"]) == (START + LIFE).replace(microsecond=0)
    assert json.loads(get(listen, "/health"))["renewal"] == {"due": 1, "expired": 0, "clock_behind": False}
    assert 'stationkey_certificates_due{state="due"} 1.0' in get(listen, "/metrics")


def get(listen: str, path: str) -> str:
    """What is answered to a GET over a Unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(listen.removeprefix("unix:"))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return answer.partition(b"\r\n\r\n")[2].decode()


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
