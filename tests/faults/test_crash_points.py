"""Power lost between every two durable steps: the next start finds one truth, and goes on from it."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from asker import Asker, until
from asking import BOUND
from crashing_daemon import ANY_STATEMENT, MOMENTS
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from peers import Daemon
from scene import Scene
from truth import events_brought, judge, key_of, keys_ahead, keys_with_an_owner, next_ahead

from stationkey.keystore import key_id_of

EVSE: Final = "DE*ABC*E1"
STATEMENTS: Final = 80
"""How far the sweep over all statements goes: through a start, a request, an installation and a destruction."""
ACTIVE_FILE: Final = "charging_station_certificate.DE%2AABC%2AE1.pem"
PREVIOUS_FILE: Final = "charging_station_certificate.DE%2AABC%2AE1.previous.pem"
NAMES: Final = list(MOMENTS)
AT_START: Final = NAMES[: NAMES.index("request received")]
AT_REQUEST: Final = NAMES[NAMES.index("request received") : NAMES.index("key made ahead, not written")]
AT_MAKING: Final = NAMES[NAMES.index("key made ahead, not written") : NAMES.index("key taken")]
AT_TAKING: Final = NAMES[NAMES.index("key taken") : NAMES.index("key proved")]
AT_INSTALLATION: Final = NAMES[NAMES.index("key proved") : NAMES.index("restoring")]
AT_RESTORATION: Final = NAMES[NAMES.index("restoring") : NAMES.index("destroying")]
AT_DESTRUCTION: Final = NAMES[NAMES.index("destroying") :]
POOL: Final = "[pool]\nec = 2\nrsa = 0\nidle_seconds = 0.0\n"
AHEAD: Final = 4
"""Keys that this pool has when it is full: two of each curve."""


class CrashingDaemon(Daemon):
    """`crashing_daemon.py`, in the place of ``stationkey serve``."""

    def __init__(self, directory: Path, moment: str, count: int, *options: str) -> None:
        super().__init__(directory, *options)
        self.moment = (moment, str(count))

    def command(self) -> list[str]:
        return [str(Path(__file__).with_name("crashing_daemon.py")), *self.moment, *self.arguments]

    def listening(self) -> bool:
        return self.dead or super().listening()

    @property
    def dead(self) -> bool:
        """Whether it has crashed."""
        assert self.process is not None
        return self.process.poll() is not None

    def wait(self) -> None:
        """Wait until it has crashed."""
        assert self.process is not None
        assert self.process.wait(BOUND) == -signal.SIGKILL, self.run_log


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path, tpm=False) as opened:
        opened.daemon.start()  # the broker has a session for it, the state directory its files
        opened.daemon.terminate()
        yield opened


def crash(scene: Scene, moment: str, count: int = 1) -> CrashingDaemon:
    """Start a daemon that will crash at `moment`."""
    count += "directory synced" in moment  # it is synced once at the start
    daemon = CrashingDaemon(scene.folder / "crashing", moment, count, *scene.options())
    scene.daemon = daemon  # whatever happens, it is ended with the scene
    daemon.launch()
    return daemon


def recover(scene: Scene) -> None:
    """Start an ordinary daemon, and wait until it has dealt with what the broker held for it."""
    scene.daemon = Daemon(scene.folder / "daemon", *scene.options())
    scene.daemon.start()
    scene.asker.wait_for_all()
    scene.asker.ask()


def pending_pair(scene: Scene) -> tuple[str, str]:
    """Two keys of one EVSE, the first of them active and the second pending: the CSRs of both."""
    asker = scene.asker
    scene.daemon.start()
    first = asker.ask(asker.request(evse_id=EVSE))
    installed = asker.tell("installed", evse_id=EVSE)
    until(lambda: events_brought(scene.state_dir, [installed])[installed], "the first key is active")
    second = asker.ask(asker.request(evse_id=EVSE))
    scene.daemon.terminate()
    return str(first.data.csr), str(second.data.csr)


@pytest.mark.parametrize("moment", AT_START)
def test_a_start_that_is_cut_short_is_made_good_by_the_next(tmp_path: Path, moment: str) -> None:
    with Scene(tmp_path, tpm=False) as scene:
        crash(scene, moment).wait()
        scene.daemon = Daemon(tmp_path / "daemon", *scene.options())
        scene.daemon.start()
        scene.asker.ask()
        scene.daemon.terminate()
        judge(scene.state_dir, scene.keystore, scene.asker.accepted)


@pytest.mark.parametrize("moment", AT_REQUEST)
def test_a_request_that_is_cut_short_is_answered_after_the_next_start_with_one_csr(scene: Scene, moment: str) -> None:
    asker: Asker = scene.asker
    request = asker.request()
    crashing = crash(scene, moment)
    until(crashing.listening, "it is ready")
    asker.publish(request)
    crashing.wait()
    recover(scene)
    again = asker.ask(request)
    assert again.data.status == "accepted"
    scene.daemon.terminate()
    judge(scene.state_dir, scene.keystore, asker.accepted)


def ready_at_start(daemon: Daemon) -> list[int]:
    """How many keys of each curve the run in hand took up, where it has done so."""
    return [event["ready"] for event in daemon.events(event="keys are made ahead")]


def pool_full(daemon: Daemon) -> None:
    until(lambda: daemon.events(event="pool full"), "the pool is full")


@pytest.mark.parametrize("moment", AT_MAKING)
def test_a_key_made_ahead_that_is_cut_short_is_on_record_or_is_not_and_the_pool_is_filled_after_the_next_start(
    scene: Scene, moment: str
) -> None:
    scene.config.write_text(scene.config.read_text() + POOL)
    crash(scene, moment).wait()
    ahead = keys_ahead(scene.state_dir)
    assert len(ahead) == (moment == "key made ahead committed")
    scene.daemon = Daemon(scene.folder / "daemon", *scene.options())
    scene.daemon.start()
    pool_full(scene.daemon)
    # Of each curve one is made at start, where it is not on record how long that takes: here, where none was recorded.
    assert ready_at_start(scene.daemon) == [1, 1]
    filled = keys_ahead(scene.state_dir)
    assert len(filled) == AHEAD
    assert filled[: len(ahead)] == ahead
    first = next_ahead(scene.state_dir, "secp256r1")
    assert key_of(str(scene.asker.ask().data.csr)) == first
    scene.daemon.terminate()
    judge(scene.state_dir, scene.keystore, scene.asker.accepted)


@pytest.mark.parametrize("moment", AT_TAKING)
def test_a_key_made_ahead_that_was_taken_and_not_recorded_is_ready_again_after_the_next_start(
    scene: Scene, moment: str
) -> None:
    """And one whose answer is on record is nobody else's."""
    scene.config.write_text(scene.config.read_text() + POOL)
    asker = scene.asker
    scene.daemon.start()
    pool_full(scene.daemon)
    scene.daemon.terminate()
    ahead = keys_ahead(scene.state_dir)
    request = asker.request()
    crashing = crash(scene, moment)
    until(crashing.listening, "it is ready")
    until(lambda: len(ready_at_start(crashing)) == 2, "it has taken up the keys")
    asker.publish(request)
    crashing.wait()

    recorded = AT_TAKING.index(moment) >= AT_TAKING.index("answer with the key taken committed")
    assert keys_with_an_owner(scene.state_dir) == ahead[:1] * recorded
    # The process may have begun to fill the pool again.
    assert keys_ahead(scene.state_dir)[: AHEAD - recorded] == ahead[recorded:]
    recover(scene)
    until(lambda: len(ready_at_start(scene.daemon)) == 2, "it has taken up the keys")
    assert ready_at_start(scene.daemon)[0] >= 2 - recorded
    again = asker.ask(request)
    assert again.data.status == "accepted"
    assert not recorded or key_of(str(again.data.csr)) == ahead[0]
    scene.daemon.terminate()
    judge(scene.state_dir, scene.keystore, asker.accepted)
    on_record = keys_ahead(scene.state_dir) + keys_with_an_owner(scene.state_dir)
    assert set(ahead) <= set(on_record)
    assert len(on_record) == len(set(on_record))


@pytest.mark.parametrize("moment", AT_INSTALLATION)
def test_an_installation_that_is_cut_short_is_done_once_after_the_next_start(scene: Scene, moment: str) -> None:
    _, second = pending_pair(scene)
    crashing = crash(scene, moment)
    until(crashing.listening, "it is ready")
    status = scene.asker.tell("installed", evse_id=EVSE)
    crashing.wait()
    recover(scene)
    scene.daemon.terminate()
    judge(scene.state_dir, scene.keystore, scene.asker.accepted)
    assert events_brought(scene.state_dir, [status]) == {status: 1}
    active = scene.state_dir / "active" / ACTIVE_FILE
    assert key_of_file(active) == key_of(second)
    assert active.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("moment", AT_RESTORATION)
def test_a_way_back_that_is_cut_short_is_gone_once_after_the_next_start(scene: Scene, moment: str) -> None:
    """When power is lost, each file is as before or as after, and the active one is exchanged first."""
    asker, (old, new) = scene.asker, pending_pair(scene)
    active, previous = (scene.state_dir / "active" / name for name in (ACTIVE_FILE, PREVIOUS_FILE))
    scene.daemon.start()
    asker.tell("installed", evse_id=EVSE)
    until(previous.exists, "the new key is active")
    scene.daemon.terminate()
    before = active.read_bytes(), previous.read_bytes()
    assert [key_of_file(file) for file in (active, previous)] == [key_of(new), key_of(old)]

    crashing = crash(scene, moment, 2 if "PEM before" in moment else 1)
    until(crashing.listening, "it is ready")
    status = asker.tell("installed", evse_id=EVSE, private_key_path=previous)
    crashing.wait()

    restored = AT_RESTORATION.index(moment) >= AT_RESTORATION.index("restored")
    assert events_brought(scene.state_dir, [status]) == {status: restored}
    renamed = AT_RESTORATION.index(moment) - AT_RESTORATION.index("restored, PEM renamed")
    assert active.read_bytes() == before[renamed >= 0]
    assert previous.read_bytes() == before[renamed < 2]
    recover(scene)
    scene.daemon.terminate()
    judge(scene.state_dir, scene.keystore, asker.accepted)
    assert events_brought(scene.state_dir, [status]) == {status: 1}
    assert (previous.read_bytes(), active.read_bytes()) == before


@pytest.mark.parametrize("moment", AT_DESTRUCTION)
def test_a_destruction_that_is_cut_short_is_complete_after_the_next_start(scene: Scene, moment: str) -> None:
    asker = scene.asker
    scene.daemon.start()
    asker.ask(asker.request(evse_id=EVSE))
    installed = asker.tell("installed", evse_id=EVSE)
    until((scene.state_dir / "active" / ACTIVE_FILE).exists, "the key is active")
    scene.daemon.terminate()
    secret = secret_of(scene.state_dir / "active" / ACTIVE_FILE)
    assert secret in b"".join(path.read_bytes() for path in scene.state_dir.glob("ledger*"))

    crashing = crash(scene, moment)
    until(crashing.listening, "it is ready")
    deleted = asker.tell("deleted", evse_id=EVSE)
    crashing.wait()
    recover(scene)
    scene.daemon.terminate()
    asker.answers.clear()  # the key is gone: there is nothing to hold its answer against
    judge(scene.state_dir, scene.keystore, asker.accepted)
    assert events_brought(scene.state_dir, [installed, deleted]) == {installed: 1, deleted: 1}
    left = [path for path in scene.state_dir.rglob("*") if path.is_file()]
    assert not [path for path in left if secret in path.read_bytes()]


@pytest.mark.long
def test_no_statement_is_one_that_a_loss_of_power_must_not_precede(scene: Scene) -> None:
    """The daemon dies before the first statement that it gives to SQLite, then before the second, and so on.

    Every run has something to do of each kind, and what the run before it left.
    """
    asker = scene.asker
    statuses: list[str] = []
    installed: list[str] = []
    deleted: set[str] = set()
    for count in range(1, STATEMENTS + 1):
        for evse_id in set(installed) - deleted:
            statuses.append(asker.tell("deleted", evse_id=evse_id))
            deleted.add(evse_id)
        for request_id in asker.accepted:
            evse_id = str(asker.requests[request_id].evse_id)
            if evse_id not in installed:
                statuses.append(asker.tell("installed", evse_id=evse_id))
                installed.append(evse_id)
        asker.publish(asker.request())
        crash(scene, ANY_STATEMENT, count).wait()
    recover(scene)
    until(lambda: all(events_brought(scene.state_dir, statuses).values()), "every status is noted")
    scene.daemon.terminate()
    left = {
        request_id: csr
        for request_id, csr in asker.accepted.items()
        if asker.requests[request_id].evse_id not in deleted
    }
    judge(scene.state_dir, scene.keystore, left)
    assert asker.rejected == set()
    assert events_brought(scene.state_dir, statuses) == dict.fromkeys(statuses, 1)


def secret_of(pem: Path) -> bytes:
    """The private part of the key in a file under ``active/``."""
    text = pem.read_text()
    return base64.b64decode("".join(text.partition("-----END")[0].splitlines()[1:]))


def key_of_file(pem: Path) -> str:
    """The name of the key in a file under ``active/``."""
    private_key = load_pem_private_key(pem.read_bytes(), password=None)
    return key_id_of(private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
