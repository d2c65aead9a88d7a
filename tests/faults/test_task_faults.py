"""An error that nobody foresaw, in each task of the daemon: it is logged and counted, and the task goes on."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from asker import Asker, until
from failing_daemon import FAULTS
from msgspec.structs import replace
from peers import Daemon, Mosquitto

CONFIG = """\
[pool]
ec = 1
rsa = 0
idle_seconds = 0.0
[renewal]
topic = "due"
"""


class FailingDaemon(Daemon):
    """`failing_daemon.py`, in the place of ``stationkey serve``."""

    def __init__(self, directory: Path, error: type[Exception], *arguments: str) -> None:
        super().__init__(directory, *arguments)
        self._error = error
        self.environment = {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "2000000"}

    def command(self) -> list[str]:
        script = Path(__file__).with_name("failing_daemon.py")
        return [str(script), self._error.__name__, *super().command()[2:]]


@pytest.mark.parametrize(("error", "reason"), [(RuntimeError, "internal_error"), (MemoryError, "out_of_memory")])
def test_an_error_in_any_task_is_logged_and_the_task_goes_on(
    tmp_path: Path, mosquitto: Mosquitto, error: type[Exception], reason: str
) -> None:
    config = tmp_path / "stationkey.toml"
    config.write_text(CONFIG)
    options = ("--config", str(config), "--broker", mosquitto.url, "--state-dir", str(tmp_path / "state"))
    daemon = FailingDaemon(tmp_path / "daemon", error, *options, "--keystore", "software:", "--allow-software-keys")
    with Asker(mosquitto) as asker, closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(daemon.environment["NOTIFY_SOCKET"])
        with daemon:
            until(lambda: daemon.events(event="works again", task="mqtt"), "it serves")
            first = asker.request()
            asker.publish(first)
            until(lambda: daemon.events(event="task failed", task="answer"), "the first message fails")
            second = asker.request()
            assert asker.ask(second).data.status == "accepted"
            other = replace(second, data=replace(second.data, common_name="other"))  # an id that was used
            for event in ("task failed", "works again"):
                asker.ask(other)
                until(partial(daemon.events, event=event, task="record-rejections"), "a rejection is put on record")
            until(lambda: {event["task"] for event in daemon.events(event="works again")} == set(FAULTS), "all work")
            if error is MemoryError:  # no fault of the message: redelivered
                asker.wait_for_all()
            assert daemon.process is not None
            assert daemon.process.poll() is None
            daemon.terminate()

    failed = daemon.events(event="task failed")
    assert {event["task"] for event in failed} == set(FAULTS) - {"keepalive"}  # which costs its connection
    assert {event["reason"] for event in failed} == {reason}
    [stopped] = daemon.events(event="stopped")
    assert stopped[reason] >= len(FAULTS), json.dumps(stopped)
