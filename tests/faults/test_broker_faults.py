"""The broker dies, comes back, and drops connections in the middle of an answer; and a second daemon is started."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from asker import BOUND
from cutting_proxy import CuttingProxy
from peers import Daemon
from scene import Scene
from truth import judge

RESTARTS: Final = 10


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path, tpm=False) as opened:
        opened.daemon.start()
        yield opened


def test_a_broker_that_is_restarted_under_load_loses_no_request_that_it_took(scene: Scene) -> None:
    asker = scene.asker
    asker.keep_up(8)
    for number in range(1, RESTARTS + 1):
        asker.wait_for(lambda: len(asker.accepted) >= 4 * number, "some requests are answered")  # noqa: B023 - called in here only
        scene.broker.terminate()  # it writes its sessions down
        scene.broker.start()
    asker.keep_up(0)
    asker.wait_for_all()
    scene.daemon.terminate()
    assert asker.rejected == set()
    assert asker.taken == asker.accepted.keys() == asker.requests.keys()
    judge(scene.state_dir, scene.keystore, asker.accepted)


def test_a_broker_that_is_killed_under_load_gets_no_second_csr_for_an_id(scene: Scene) -> None:
    """What the broker itself lost is asked again, as Josev would; the answer is the one that there was, if any."""
    asker = scene.asker
    asker.keep_up(8)
    for number in range(1, RESTARTS + 1):
        asker.wait_for(lambda: len(asker.accepted) >= 4 * number, "some requests are answered")  # noqa: B023 - called in here only
        scene.broker.kill()
        scene.broker.start()
        for request in asker.open:
            asker.publish(request)
    asker.keep_up(0)
    for request in [*asker.open, *asker.requests.values()]:
        asker.ask(request)
    scene.daemon.terminate()
    assert asker.rejected == set()
    assert asker.accepted.keys() == asker.requests.keys()
    judge(scene.state_dir, scene.keystore, asker.accepted)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(0, id="before-its-first-byte"),
        pytest.param(1, id="after-its-first-byte"),
        pytest.param(8, id="in-its-topic"),
        pytest.param(200, id="in-its-payload"),
        pytest.param(-1, id="before-its-last-byte"),
        pytest.param(1_000_000, id="before-it-is-acknowledged"),
    ],
)
def test_an_answer_that_is_cut_off_is_published_again(tmp_path: Path, after: int) -> None:
    with Scene(tmp_path, tpm=False) as scene, CuttingProxy(scene.broker) as proxy:
        asker = scene.asker
        scene.daemon = Daemon(tmp_path / "daemon", *scene.options(broker=proxy.url))
        scene.daemon.start()
        asker.keep_up(4)
        asker.wait_for(lambda: asker.accepted, "requests are answered")
        proxy.cut(after)
        assert proxy.was_cut.wait(BOUND)
        asker.keep_up(0)
        asker.wait_for_all()
        asker.ask()
        scene.daemon.terminate()
        assert asker.rejected == set()
        assert asker.accepted.keys() == asker.requests.keys()
        judge(scene.state_dir, scene.keystore, asker.accepted)


@pytest.mark.parametrize("count", [pytest.param(count, id=str(count)) for count in (1, 63, 64, 65, 300)])
def test_whatever_the_broker_held_while_the_daemon_was_away_is_answered(scene: Scene, count: int) -> None:
    """More than are in hand at a time, too: nothing waits for an acknowledgement that stands behind them."""
    asker = scene.asker
    scene.daemon.kill()
    for request in itertools.islice(iter(asker.request, None), count):
        asker.publish(request)
    scene.daemon.start()
    asker.wait_for_all()
    assert asker.rejected == set()


def test_a_second_daemon_on_a_state_directory_is_refused_in_words_and_the_first_goes_on(scene: Scene) -> None:
    second = Daemon(scene.folder / "second", *scene.options())
    try:
        second.launch()
        assert second.process is not None
        assert second.process.wait(BOUND) == 1
    finally:
        second.kill()
    assert "another stationkey uses the state directory" in second.log
    assert "stop it first" in second.log
    assert "Traceback" not in second.log
    assert scene.asker.ask().data.status == "accepted"
