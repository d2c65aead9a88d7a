"""A moment without memory: the kernel gives the daemon none, then gives it again."""

from __future__ import annotations

import json
import resource
from contextlib import suppress
from pathlib import Path

import pytest
from peers import Mosquitto
from scene import Scene

from stationkey.contract.messages import encode

MIB = 1024 * 1024
NOT_SAVED = ("autosave_on_changes false", "autosave_interval 1800")
"""The broker does not die, and would write all that it holds each second: up to 18 MiB."""


def size(pid: int) -> int:
    """Bytes of the address space of a process [proc(5)]."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmSize:")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("margin", "requests"), [(0, 40), (MIB // 4, 40), (MIB, 300), (4 * MIB, 80), (16 * MIB, 80)])
def test_a_moment_without_memory_costs_no_more_than_that_moment(tmp_path: Path, margin: int, requests: int) -> None:
    with Scene(tmp_path, tpm=True, broker=Mosquitto(tmp_path / "broker", *NOT_SAVED)) as scene:
        scene.daemon.start()
        asker = scene.asker
        assert asker.ask().data.status == "accepted"
        process = scene.daemon.process
        assert process is not None
        resource.prlimit(process.pid, resource.RLIMIT_AS, (size(process.pid) + margin, resource.RLIM_INFINITY))
        for _ in range(requests):
            request = asker.request()
            message = json.loads(encode(request))
            asker.publish(request, payload=json.dumps({**message, "other": "x" * 60_000}).encode())
        with suppress(AssertionError):  # how far it gets without memory is its own affair
            asker.wait_for_all(bound=3.0)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        asker.wait_for_all(bound=120.0)
        assert asker.ask().data.status == "accepted"
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 0
