"""The broker dies, comes back, refuses, and drops connections within an answer; and a second daemon is started."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from asker import Asker, until
from asking import BOUND
from cutting_proxy import CuttingProxy
from peers import Daemon, Mosquitto
from rig import Rig
from scene import CONFIG, Scene
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
        for request_id in asker.open:
            asker.repeat(request_id)
    asker.keep_up(0)
    for request_id in [*asker.open, *asker.requests]:
        asker.ask(asker.requests[request_id])
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


@pytest.mark.parametrize(
    ("count", "end"),
    [
        pytest.param(1, Daemon.terminate, id="1-stopped"),
        *(pytest.param(count, Daemon.kill, id=f"{count}-killed") for count in (1, 63, 64, 65, 300)),
    ],
)
def test_whatever_the_broker_held_while_the_daemon_was_away_is_answered(
    scene: Scene, count: int, end: Callable[[Daemon], None]
) -> None:
    """More than are in hand at a time, too: nothing waits for an acknowledgement that stands behind them."""
    asker = scene.asker
    end(scene.daemon)
    scene.config.write_text(CONFIG.replace("ec = 2.0", "ec = 20.0"))  # it waits for 299 others
    for request in itertools.islice(iter(asker.request, None), count):
        asker.publish(request)
    scene.daemon.start()
    asker.wait_for_all()
    assert asker.rejected == set()


def lose_broker(scene: Scene) -> None:
    """Kill the broker, and return when the daemon has noticed."""
    scene.broker.kill()
    until(lambda: scene.daemon.events(reason="broker_unreachable"), "the broker is missed")


def test_a_broker_that_is_down_at_the_start_is_waited_for(tmp_path: Path) -> None:
    with Scene(tmp_path, tpm=False) as scene:
        scene.broker.kill()
        scene.daemon.launch()
        until(lambda: len(scene.daemon.events(reason="broker_unreachable")) >= 2, "it has tried again")
        assert not scene.daemon.events(event="ready")
        scene.broker.start()
        until(lambda: scene.daemon.events(event="ready"), "it has subscribed: nobody kept a request from before that")
        assert scene.asker.ask().data.status == "accepted"


def test_a_broker_that_forgot_its_sessions_is_subscribed_to_again(tmp_path: Path) -> None:
    with Scene(tmp_path, tpm=False) as scene:
        scene.daemon.start()
        lose_broker(scene)
        (scene.broker.directory / "mosquitto.db").unlink(missing_ok=True)
        scene.broker.start()
        until(lambda: len(scene.daemon.events(event="ready")) == 2, "it has subscribed again")
        assert scene.asker.ask().data.status == "accepted"


@pytest.mark.parametrize("restarted", [False, True], ids=["in-service", "at-the-next-start"])
def test_an_answer_that_was_made_while_the_broker_was_dead_goes_out_when_it_is_back(
    tmp_path: Path, restarted: bool
) -> None:
    with Scene(tmp_path, tpm=True) as scene:
        asker, daemon, request = scene.asker, scene.daemon, scene.frozen_in_hand()
        lose_broker(scene)
        scene.tpm.thaw()
        until(lambda: daemon.events(event="accepted", request_id=request.id), "the request is answered")
        if restarted:
            daemon.terminate()
        scene.broker.start()
        if restarted:
            daemon.start()
        asker.wait_for_all()
        daemon.terminate()
        assert asker.rejected == set()
        judge(scene.state_dir, scene.keystore, asker.accepted)


DENY_SUBSCRIPTION: Final = """{"defaultACLAccess":
    {"publishClientSend": true, "publishClientReceive": true, "subscribe": %s, "unsubscribe": true}}"""


def test_a_refused_subscription_is_told_and_tried_again(tmp_path: Path) -> None:
    [plugin] = Path("/usr/lib").glob("*/mosquitto_dynamic_security.so")
    rules = tmp_path / "rules.json"
    rules.write_text(DENY_SUBSCRIPTION % "false")
    rules.chmod(0o600)
    broker = Mosquitto(tmp_path / "broker", f"plugin {plugin}", f"plugin_opt_config_file {rules}")
    with Rig(tmp_path, tpm=False, broker=broker) as rig:
        rig.daemon.launch()
        until(lambda: len(rig.daemon.events(reason="subscription_refused")) >= 2, "it has tried again")
        assert not rig.daemon.events(event="ready")
        broker.terminate()
        rules.write_text(DENY_SUBSCRIPTION % "true")
        broker.start()
        until(lambda: rig.daemon.events(event="ready"), "it is subscribed")
        with Asker(broker) as asker:
            assert asker.ask().data.status == "accepted"


def test_a_refused_publication_is_logged_and_the_daemon_goes_on(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite josev/cs\n")
    with Rig(tmp_path, tpm=False, broker=Mosquitto(tmp_path / "broker", f"acl_file {rules}")) as rig:
        rig.daemon.start()
        with Asker(rig.broker) as asker:
            for request in (asker.request(), asker.request()):
                asker.publish(request)
                refusal = {"level": "error", "reason": "publication_refused", "request_id": request.id}
                until(lambda refusal=refusal: rig.daemon.events(**refusal), "it is refused")  # type: ignore[misc] # mypy infers no lambda with defaults


def test_a_second_daemon_on_a_state_directory_is_refused_in_words_and_the_first_goes_on(scene: Scene) -> None:
    second = Daemon(scene.folder / "second", *scene.options())
    try:
        second.launch()
        assert second.process is not None
        assert second.process.wait(BOUND) == 1
    finally:
        second.kill()
    assert str(scene.state_dir) in second.log
    assert "--state-dir" in second.log  # words: the option that helps
    assert "Traceback" not in second.log
    assert scene.asker.ask().data.status == "accepted"
