"""The disk is full, takes no writes, or gives back another database than was written."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from asker import until
from asking import BOUND
from peers import Daemon
from scene import Scene
from small_disk import DaemonOnDisk, SmallDisk
from truth import events_brought, judge, reasons_of

EVSE: Final = "DE*ABC*E1"
DATABASE: Final = "ledger.sqlite3"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path, tpm=False) as opened:
        yield opened


@pytest.fixture
def disk(scene: Scene) -> Iterator[SmallDisk]:
    """A small disk at the place of the state directory, and the scene's daemon on it."""
    with SmallDisk(scene.state_dir) as mounted:
        scene.daemon = DaemonOnDisk(scene.folder / "daemon", mounted, *scene.options())
        yield mounted
        scene.daemon.kill()


def bring_out(disk: SmallDisk, scene: Scene) -> Path:
    """A copy of the state directory, for the judge."""
    copy = scene.folder / "copy"
    subprocess.run([*disk.enter, "cp", "-a", str(disk.path), str(copy)], check=True)
    return copy


def ask_until_rejected(scene: Scene) -> None:
    """Ask until a request is rejected: a write-ahead log that was longer before has some room left in it."""
    for _ in range(1000):
        if scene.asker.ask().data.status == "rejected":
            return
    pytest.fail("nothing was rejected")


def test_a_full_disk_rejects_requests_in_words_and_room_heals_it(scene: Scene, disk: SmallDisk) -> None:
    scene.daemon.start()
    assert scene.asker.ask().data.status == "accepted"
    disk.fill()
    ask_until_rejected(scene)
    assert set(reasons_of(scene.daemon)) == {"disk_full"}
    disk.make_room()
    assert scene.asker.ask().data.status == "accepted"
    scene.daemon.terminate()
    assert "Traceback" not in scene.daemon.run_log
    judge(bring_out(disk, scene), scene.keystore, scene.asker.accepted)


def test_a_full_disk_at_start_is_told_in_words_and_room_heals_it(scene: Scene, disk: SmallDisk) -> None:
    scene.daemon.start()
    scene.asker.ask()
    scene.daemon.terminate()
    disk.fill()
    scene.daemon.launch()
    assert scene.daemon.process is not None
    until(lambda: scene.daemon.listening() or scene.daemon.process.poll() is not None, "it starts, or does not")  # type: ignore[union-attr] # still there
    if scene.daemon.process.poll() is None:
        ask_until_rejected(scene)
        assert set(reasons_of(scene.daemon)) == {"disk_full"}
    else:
        assert str(scene.state_dir) in scene.daemon.run_log  # words: which directory
    assert "Traceback" not in scene.daemon.run_log
    scene.daemon.kill()
    disk.make_room()
    scene.daemon.start()
    assert scene.asker.ask().data.status == "accepted"
    scene.daemon.terminate()
    judge(bring_out(disk, scene), scene.keystore, scene.asker.accepted)


def test_a_status_that_comes_while_the_disk_is_full_is_done_when_there_is_room(scene: Scene, disk: SmallDisk) -> None:
    scene.daemon.start()
    asker = scene.asker
    asker.ask(asker.request(evse_id=EVSE))
    disk.fill()
    ask_until_rejected(scene)
    status = asker.tell("installed", evse_id=EVSE)
    until(lambda: scene.daemon.events(message_id=status), "the status is tried")
    disk.make_room()
    until(lambda: scene.daemon.events(event="key active"), "the key is active")
    scene.daemon.terminate()
    copy = bring_out(disk, scene)
    judge(copy, scene.keystore, asker.accepted)
    assert events_brought(copy, [status]) == {status: 1}


def test_a_read_only_state_directory_at_start_is_refused_in_words(scene: Scene, disk: SmallDisk) -> None:
    scene.daemon.start()
    scene.asker.ask()
    scene.daemon.terminate()
    disk.run(f"mount -o remount,ro '{disk.path}'")
    refuse(scene.daemon)
    assert "Read-only file system" in scene.daemon.run_log
    disk.run(f"mount -o remount,rw '{disk.path}'")
    scene.daemon.start()
    assert scene.asker.ask().data.status == "accepted"


def refuse(daemon: Daemon) -> None:
    """Start a daemon that must refuse to start, in words."""
    daemon.launch()
    assert daemon.process is not None
    assert daemon.process.wait(BOUND) == 1
    assert "Traceback" not in daemon.run_log


class UnwritableDaemon(Daemon):
    """`unwritable_daemon.py`, in the place of ``stationkey serve``."""

    def command(self) -> list[str]:
        return [str(Path(__file__).with_name("unwritable_daemon.py")), *self.arguments]


def test_a_database_that_becomes_read_only_rejects_requests_in_words_and_heals(scene: Scene) -> None:
    switch = scene.folder / "read-only"
    scene.daemon = UnwritableDaemon(scene.folder / "daemon", str(switch), *scene.options())
    scene.daemon.start()
    assert scene.asker.ask().data.status == "accepted"
    switch.touch()
    assert scene.asker.ask().data.status == "rejected"
    assert reasons_of(scene.daemon) == ["ledger_read_only"]
    switch.unlink()
    assert scene.asker.ask().data.status == "accepted"
    scene.daemon.terminate()
    assert "Traceback" not in scene.daemon.run_log
    judge(scene.state_dir, scene.keystore, scene.asker.accepted)


def test_a_state_directory_that_is_moved_away_rejects_requests_in_words_and_heals_when_it_is_back(scene: Scene) -> None:
    """A write to what has no name any more succeeds: only the next start would miss the key."""
    scene.daemon.start()
    asker = scene.asker
    asker.ask(asker.request(evse_id=EVSE))
    elsewhere = scene.state_dir.rename(scene.folder / "elsewhere")
    assert asker.ask().data.status == "rejected"
    assert reasons_of(scene.daemon) == ["ledger_moved"]
    status = asker.tell("installed", evse_id=EVSE)
    until(lambda: scene.daemon.events(message_id=status), "the status is tried")
    elsewhere.rename(scene.state_dir)
    assert asker.ask().data.status == "accepted"
    until(lambda: scene.daemon.events(event="key active"), "the key is active")
    scene.daemon.terminate()
    assert "Traceback" not in scene.daemon.run_log
    judge(scene.state_dir, scene.keystore, asker.accepted)


def test_a_ledger_that_another_process_holds_rejects_requests_one_after_the_other_at_once_and_heals(
    scene: Scene,
) -> None:
    """The first waits for it. Where each did that, the last of these would be answered after a minute and a half."""
    scene.daemon.start()
    asker = scene.asker
    asker.ask()
    with closing(sqlite3.connect(scene.state_dir / DATABASE, isolation_level=None)) as another:
        another.execute("BEGIN IMMEDIATE")
        for _ in range(20):
            asker.publish(asker.request())
        asker.wait_for_all()
        assert reasons_of(scene.daemon) == ["ledger_busy"] * 20
        another.execute("ROLLBACK")
    assert asker.ask().data.status == "accepted"
    scene.daemon.terminate()
    judge(scene.state_dir, scene.keystore, asker.accepted)


def all_of_it(state_dir: Path) -> None:
    shutil.rmtree(state_dir)


def the_database(state_dir: Path) -> None:
    (state_dir / DATABASE).unlink()


def the_write_ahead_log(state_dir: Path) -> None:
    (state_dir / f"{DATABASE}-wal").unlink()


def the_database_for_a_copy(state_dir: Path) -> None:
    copy = state_dir / "copy"
    shutil.copy(state_dir / DATABASE, copy)
    copy.replace(state_dir / DATABASE)


TAKEN: Final = [all_of_it, the_database, the_write_ahead_log, the_database_for_a_copy]


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__.replace("_", " "))
def test_a_ledger_that_is_taken_away_under_the_daemon_is_written_to_no_more(
    scene: Scene, take: Callable[[Path], None]
) -> None:
    scene.daemon.start()
    scene.asker.ask()
    take(scene.state_dir)
    assert scene.asker.ask().data.status == "rejected"
    assert reasons_of(scene.daemon) == ["ledger_moved"]
    scene.daemon.kill()
    shutil.rmtree(scene.state_dir, ignore_errors=True)
    scene.daemon.start()
    assert scene.asker.ask().data.status == "accepted"


def flipped(content: bytes) -> bytes:
    """64 bytes in the head of every page but the first turned over."""
    damaged = bytearray(content)
    for page in range(4096, len(content), 4096):
        damaged[page : page + 64] = bytes(byte ^ 0xFF for byte in content[page : page + 64])
    return bytes(damaged)


DAMAGES: Final = [
    pytest.param(lambda content: content[: len(content) // 2], id="half-of-it-missing"),
    pytest.param(flipped, id="bytes-flipped-in-every-page"),
    pytest.param(lambda content: content[:4096] + bytes(len(content) - 4096), id="zeros-after-the-first-page"),
    pytest.param(lambda _: b"garbage\n" * 1000, id="garbage-all-over"),
]
DAMAGES_OF_THE_HEAD: Final = [
    pytest.param(lambda content: b"no database at all" + content[18:], id="garbage-for-a-header"),
    pytest.param(lambda content: content[:5000], id="cut-within-a-page"),
]
"""Those that a write-ahead log may make good: it has the first page as it should be."""


@pytest.mark.parametrize("damage", DAMAGES + DAMAGES_OF_THE_HEAD)
def test_a_damaged_database_is_refused_in_words_and_nothing_is_overwritten(
    scene: Scene, damage: Callable[[bytes], bytes]
) -> None:
    scene.daemon.start()
    for _ in range(20):
        scene.asker.ask()
    scene.daemon.terminate()
    damaged_and_refused(scene, damage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_with_a_write_ahead_log_is_refused_in_words_and_neither_is_overwritten(
    scene: Scene, damage: Callable[[bytes], bytes]
) -> None:
    scene.daemon.start()
    for _ in range(20):
        scene.asker.ask()
    scene.daemon.terminate()
    written = scene.state_dir / f"{DATABASE}-wal"
    while not written.exists() or written.stat().st_size == 0:  # the sweep at its start may have emptied it
        scene.daemon.start()
        scene.asker.ask()
        scene.daemon.kill()
    damaged_and_refused(scene, damage)


def damaged_and_refused(scene: Scene, damage: Callable[[bytes], bytes]) -> None:
    """Damage the database; the next start must refuse it, and leave every byte as it is."""
    database = scene.state_dir / DATABASE
    database.write_bytes(damage(database.read_bytes()))
    before = contents(scene.state_dir)
    refuse(scene.daemon)
    assert "restore a backup" in scene.daemon.run_log  # words: what to do
    after = contents(scene.state_dir)
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before)  # an empty write-ahead log may have been made


def contents(directory: Path) -> dict[str, bytes]:
    """Every file, but for SQLite's index of the write-ahead log, which is made anew from it at every start."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.is_file() and not path.name.endswith("-shm")
    }
