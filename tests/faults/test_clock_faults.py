"""The station's clock is wrong until it has been set: no key ends by that, and keys end in their time all the same."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from asker import until
from peers import Daemon
from scene import CONFIG, Scene
from truth import judge, key_of, reasons_of

from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyState

EVSE: Final = "DE*ABC*E1"
JUMPS: Final = [
    pytest.param(timedelta(hours=-1), id="an-hour-back"),
    pytest.param(timedelta(days=3653), id="ten-years-on"),
    pytest.param(timedelta(days=-20_000), id="back-to-the-seventies"),
]


class WrongClockDaemon(Daemon):
    """`wrong_clock_daemon.py`, in the place of ``stationkey serve``."""

    def command(self) -> list[str]:
        return [str(Path(__file__).with_name("wrong_clock_daemon.py")), *self.arguments]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path, tpm=False) as opened:
        set_clock(opened, timedelta())
        opened.daemon = WrongClockDaemon(tmp_path / "daemon", str(tmp_path / "ahead"), *opened.options())
        yield opened


def set_clock(scene: Scene, ahead: timedelta) -> None:
    """Let the daemon's clock be `ahead` of the right one from now on."""
    new = scene.folder / "ahead.new"
    new.write_text(str(ahead.total_seconds()))
    new.replace(scene.folder / "ahead")


def let_it_sweep(scene: Scene) -> None:
    """Return when the daemon has looked at what is due, from beginning to end."""
    seen = len(scene.daemon.events(event="swept"))
    until(lambda: len(scene.daemon.events(event="swept")) >= seen + 2, "it has swept")


def states(scene: Scene) -> dict[str, KeyState]:
    """The state of each key."""
    ledger = Ledger(scene.state_dir / "ledger.sqlite3", read_only=True)
    try:
        return {key.key_id: key.state for key in ledger.keys.all(prefix="")}
    finally:
        ledger.close()


@pytest.mark.parametrize("jump", JUMPS)
def test_no_key_ends_by_a_jump_of_the_clock_nor_by_the_correction(scene: Scene, jump: timedelta) -> None:
    """A pending key, a failed one, an active one and one that it replaced; in a run, and over restarts."""
    asker = scene.asker
    scene.daemon.start()
    requests = [asker.request(evse_id=EVSE) for _ in range(2)]
    for request in requests:
        asker.ask(request)
        asker.tell("installed", evse_id=EVSE)
        until(lambda: len(scene.daemon.events(event="key active")) == len(asker.answers), "the key is active")
    for status in (None, "failed"):
        requests.append(asker.request(evse_id="DE*ABC*E2" if status else EVSE))
        asker.ask(requests[-1])
    asker.tell("failed_installation", evse_id="DE*ABC*E2")
    until(lambda: scene.daemon.events(event="installation failed"), "the failure is noted")
    before = states(scene)
    assert sorted(before.values()) == sorted(
        [KeyState.DEACTIVATED, KeyState.ACTIVE, KeyState.PRE_ACTIVATION, KeyState.PRE_ACTIVATION]
    )

    for ahead, restart in ((jump, False), (timedelta(), False), (jump, True), (timedelta(), True)):
        set_clock(scene, ahead)
        if restart:
            scene.daemon.terminate()
            scene.daemon.start()
        let_it_sweep(scene)
        assert states(scene) == before
        for request in requests:
            asker.ask(request)  # the same CSR, or `accepted` says so
        shown = datetime.fromisoformat(scene.daemon.events()[-1]["time"])
        assert abs(shown - ahead - datetime.now(UTC)) < timedelta(minutes=5), "the clock was not wrong at all"
    scene.daemon.terminate()
    assert asker.rejected == set()
    judge(scene.state_dir, scene.keystore, asker.accepted)


@pytest.mark.parametrize("jump", JUMPS)
def test_a_key_ends_when_its_time_has_run_whatever_the_clock_says(scene: Scene, jump: timedelta) -> None:
    scene.config.write_text(f"{CONFIG}pending_days = 0.00001\n")  # 864 ms
    scene.daemon.start()
    request = scene.asker.request()
    csr = scene.asker.ask(request).data.csr
    set_clock(scene, jump)
    until(lambda: scene.daemon.events(event="key expired"), "the key expires")
    assert states(scene) == {key_of(str(csr)): KeyState.DESTROYED}
    assert scene.asker.ask(request).data.status == "rejected"
    assert reasons_of(scene.daemon) == ["key_destroyed"]
    scene.daemon.terminate()
    judge(scene.state_dir, scene.keystore, {})


def test_time_in_which_the_daemon_does_not_run_ends_no_key(scene: Scene) -> None:
    """Running time is written down as it passes, and goes on from there after a loss of power."""
    scene.daemon.start()
    scene.asker.ask()
    let_it_sweep(scene)
    scene.daemon.kill()
    before = running_time(scene)
    assert before > 0
    set_clock(scene, timedelta(days=3653))
    scene.daemon.start()
    until(lambda: running_time(scene) > before, "it has run on")
    assert running_time(scene) < before + timedelta(days=1).total_seconds() * 1000
    assert set(states(scene).values()) == {KeyState.PRE_ACTIVATION}


def running_time(scene: Scene) -> int:
    """What the ledger says of it, in milliseconds."""
    ledger = Ledger(scene.state_dir / "ledger.sqlite3", read_only=True)
    try:
        return ledger.retention.running
    finally:
        ledger.close()
