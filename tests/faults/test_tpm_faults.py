"""The TPM dies, hangs, comes back, or comes back as another: every request has an answer, and no answer is untrue."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from asker import until
from asking import BOUND
from peers import Daemon, Swtpm
from scene import Scene
from truth import events_brought, judge, key_of, reasons_of

from protection import tool
from stationkey.contract.profiles import Algorithm
from wire import Later, Wire, untouched

ROUNDS: Final = 5
EVSE: Final = "DE*ABC*E1"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path, tpm=True) as opened:
        opened.daemon.start()
        yield opened


def processor_time(tpm: Swtpm) -> int:
    """How long the TPM has computed, in clock ticks."""
    assert tpm.process is not None
    user, system = Path(f"/proc/{tpm.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


def ask_for_rsa(scene: Scene) -> str:
    """Ask for an RSA key, and return while the TPM is searching for its primes."""
    while True:
        request = scene.asker.request(algorithm=Algorithm.RSA_SHA384)
        before = processor_time(scene.tpm)
        scene.asker.publish(request)
        # 30 ms of computing: ten times what anything but an RSA key takes.
        ticks = 3 * os.sysconf("SC_CLK_TCK") // 100
        until(lambda: processor_time(scene.tpm) >= before + ticks, "it makes an RSA key")  # noqa: B023 - called in here only
        if request.id in scene.asker.open:  # or the primes were found at once
            return request.id


def settle(scene: Scene) -> None:
    """Every request has its answer, the daemon serves again, and what it said is true."""
    asker = scene.asker
    asker.keep_up(0)
    asker.wait_for_all()
    assert asker.ask().data.status == "accepted"
    assert scene.daemon.process is not None
    assert scene.daemon.process.poll() is None
    scene.daemon.terminate()
    assert not asker.accepted.keys() & asker.rejected
    judge(scene.state_dir, scene.keystore, asker.accepted)


def test_a_tpm_that_is_killed_and_restarted_under_load_leaves_every_request_answered(scene: Scene) -> None:
    asker = scene.asker
    asker.keep_up(4)
    for _ in range(ROUNDS):
        accepted, rejected = len(asker.accepted), len(asker.rejected)
        asker.wait_for(lambda: len(asker.accepted) >= accepted + 4, "requests are accepted")  # noqa: B023 - called in here only
        scene.tpm.kill()
        asker.wait_for(lambda: len(asker.rejected) > rejected, "a request is rejected")  # noqa: B023 - called in here only
        scene.tpm.start()
    assert set(reasons_of(scene.daemon)) == {"tpm_unreachable"}
    settle(scene)


def test_a_tpm_that_is_frozen_under_load_leaves_every_request_answered(scene: Scene) -> None:
    asker = scene.asker
    asker.keep_up(4)
    for _ in range(2):
        accepted, rejected = len(asker.accepted), len(asker.rejected)
        asker.wait_for(lambda: len(asker.accepted) >= accepted + 4, "requests are accepted")  # noqa: B023 - called in here only
        scene.tpm.freeze()
        asker.wait_for(lambda: len(asker.rejected) > rejected, "a request is rejected")  # noqa: B023 - called in here only
        scene.tpm.thaw()
    assert set(reasons_of(scene.daemon)) == {"keystore_timeout"}
    asker.keep_up(0)
    asker.wait_for_all()
    until(lambda: asker.ask().data.status == "accepted", "it serves again")
    settle(scene)


def test_a_tpm_that_is_killed_while_it_makes_an_rsa_key_leaves_the_request_answered_and_no_stray_key(
    scene: Scene,
) -> None:
    request_id = ask_for_rsa(scene)
    scene.tpm.kill()
    scene.asker.wait_for_all()
    assert request_id in scene.asker.rejected
    scene.tpm.start()
    settle(scene)


def test_a_tpm_that_is_restarted_while_it_makes_an_rsa_key_leaves_the_request_answered(scene: Scene) -> None:
    """Accepted, where the TPM was back before the second try; else rejected."""
    for _ in range(ROUNDS):
        ask_for_rsa(scene)
        scene.tpm.kill()
        scene.tpm.start()
        scene.asker.wait_for_all()
    settle(scene)


def test_a_tpm_that_is_frozen_while_it_makes_an_rsa_key_leaves_the_request_rejected_and_no_stray_key(
    tmp_path: Path,
) -> None:
    with Scene(tmp_path, tpm=True) as scene:
        scene.config.write_text(scene.config.read_text().replace("rsa = 20.0", "rsa = 2.0"))
        scene.daemon.start()
        request_id = ask_for_rsa(scene)
        scene.tpm.freeze()
        scene.asker.wait_for_all()
        assert request_id in scene.asker.rejected
        assert reasons_of(scene.daemon) == ["keystore_timeout"]
        scene.tpm.thaw()
        until(lambda: scene.asker.ask().data.status == "accepted", "it serves again")
        settle(scene)


def test_a_status_that_comes_while_the_tpm_is_away_is_done_when_it_is_back(scene: Scene) -> None:
    asker = scene.asker
    asker.ask(asker.request(evse_id=EVSE))
    scene.tpm.kill()
    status = asker.tell("installed", evse_id=EVSE)
    until(lambda: scene.daemon.events(message_id=status), "the status waits")
    scene.tpm.start()
    until(lambda: events_brought(scene.state_dir, [status])[status], "the key is active")
    settle(scene)


@pytest.mark.parametrize("running", [pytest.param(True, id="under-the-daemon"), pytest.param(False, id="meanwhile")])
def test_keys_of_a_tpm_that_was_cleared_are_named_at_the_next_start_and_new_requests_are_served(
    scene: Scene, running: bool
) -> None:
    asker = scene.asker
    old = [key_of(str(asker.ask().data.csr)) for _ in range(3)]
    if not running:
        scene.daemon.terminate()
    scene.tpm.terminate()
    scene.tpm.new_chip()
    scene.tpm.start()
    if running:
        assert asker.ask().data.status == "accepted"
        scene.daemon.terminate()
    scene.daemon.start()
    fresh = asker.ask()
    assert fresh.data.status == "accepted"

    def unusable() -> list[str]:
        return [event["key_id"] for event in scene.daemon.events(reason="key_of_another_tpm")]

    until(lambda: len(unusable()) == len(old), "the old keys are named")
    scene.daemon.terminate()
    assert unusable() == old
    judge(scene.state_dir, scene.keystore, {fresh.id: str(fresh.data.csr)})


def test_a_key_of_a_tpm_that_was_cleared_is_never_activated(scene: Scene) -> None:
    asker = scene.asker
    asker.ask(asker.request(evse_id=EVSE))
    scene.tpm.terminate()
    scene.tpm.new_chip()
    scene.tpm.start()
    status = asker.tell("installed", evse_id=EVSE)
    until(lambda: scene.daemon.events(message_id=status), "the status is refused")
    scene.daemon.terminate()
    assert events_brought(scene.state_dir, [status]) == {status: 0}
    assert [path.name for path in (scene.state_dir / "active").iterdir()] in ([], [".lock"])


def test_a_tpm_that_dies_idle_costs_the_requests_until_it_is_back(scene: Scene) -> None:
    """A request that was rejected meanwhile may be asked again: that is no answer for ever."""
    asker = scene.asker
    assert asker.ask().data.status == "accepted"
    scene.tpm.kill()
    refused = asker.request()
    assert asker.ask(refused).data.status == "rejected"
    until(lambda: reasons_of(scene.daemon) == ["tpm_unreachable"], "the reason is logged")
    scene.tpm.start()
    assert asker.ask().data.status == "accepted"
    assert asker.ask(refused).data.status == "accepted"


def test_a_tpm_that_restarts_unnoticed_costs_no_request(scene: Scene) -> None:
    assert scene.asker.ask().data.status == "accepted"
    scene.tpm.kill()
    scene.tpm.start()
    assert scene.asker.ask().data.status == "accepted"
    settle(scene)


def test_a_tpm_that_hangs_and_then_dies_is_used_again_when_it_is_back(scene: Scene) -> None:
    assert scene.asker.ask().data.status == "accepted"
    scene.tpm.freeze()
    assert scene.asker.ask().data.status == "rejected"
    scene.tpm.kill()
    scene.tpm.start()
    settle(scene)


def test_a_tpm_that_is_not_there_at_the_start_is_used_once_it_is(tmp_path: Path) -> None:
    with Scene(tmp_path, tpm=True) as scene:
        scene.tpm.kill()
        scene.daemon.start()
        [told] = scene.daemon.events(level="error")
        assert told["reason"] == "tpm_unreachable"
        assert "serving degraded" in scene.daemon.run_log
        assert scene.asker.ask().data.status == "rejected"
        scene.tpm.start()
        settle(scene)


def test_a_tpm_that_says_later_from_the_start_on_is_used_once_it_does_not(tmp_path: Path) -> None:
    """A daemon never ends for it, were the storage root key still to be made."""
    with Scene(tmp_path, tpm=True) as scene, Wire(scene.tpm) as wire:
        Later(wire, 0x923, times=None)
        options = scene.options()
        options[options.index(scene.keystore)] = f"tpm2:{wire.tcti}"
        scene.daemon = Daemon(tmp_path / "other", *options)
        scene.daemon.launch()
        until(lambda: "serving degraded" in scene.daemon.run_log, "it serves")
        [told] = scene.daemon.events(level="error")
        assert told["reason"] == "tpm_busy"
        assert scene.asker.ask().data.status == "rejected"
        wire.commands = wire.responses = untouched
        settle(scene)


def test_a_storage_root_key_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    with Scene(tmp_path, tpm=True) as scene:
        tool(scene.tpm, "tpm2_createprimary", "-Q", "-C", "o", "-G", "rsa2048", "-c", "primary.ctx")
        tool(scene.tpm, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "primary.ctx", "0x81000001")
        scene.daemon.launch()
        assert scene.daemon.process is not None
        assert scene.daemon.process.wait(BOUND) == 1
        # Words: the handle, and the command that frees it.
        assert "0x81000001" in scene.daemon.log
        assert "tpm2_evictcontrol" in scene.daemon.log
        assert "Traceback" not in scene.daemon.log
