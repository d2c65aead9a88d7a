"""Links, FIFOs and directories in the place of what stationkey opens: nothing outside is touched, nothing waited for.

What a process of the daemon's own user could plant, it could do itself. But a state directory may have been open to
others before, may lie where others can exchange it, and may be the daemon's when root comes with ``sudo``.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from outside import STATIONKEY, Josev, generate_csr, run, software_station
from peers import Mosquitto
from station import (
    AS_ROOT,
    NOBODY,
    PLANTS,
    PRECIOUS,
    Elsewhere,
    Plant,
    a_ledger,
    give_away,
    take_back,
)

from stationkey.config.file import read_file
from stationkey.errors import ConfigurationError, LedgerError
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.service.active_files import ActiveDirectory
from stationkey.system.state_dir import DATABASE_NAME, StateDirectory, settled

PLANTED = [pytest.param(plant, id=name) for name, plant in PLANTS.items()]
OPENED = ["lock", DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm", f"{DATABASE_NAME}-journal"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Elsewhere:
    """What must stay as it is."""
    return Elsewhere(tmp_path / "elsewhere")


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A state directory with a key in it, in a folder that every user can go through; pytest's are closed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        a_ledger(Path(folder, "state"))
        yield Path(folder, "state")
        take_back(Path(folder, "state"))


# The state directory.


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("name", OPENED)
def test_what_was_planted_before_the_start_is_refused_in_words_and_never_opened(
    state_dir: Path, elsewhere: Elsewhere, name: str, plant: Plant
) -> None:
    plant(state_dir / name, elsewhere)

    with pytest.raises(LedgerError) as refusal:
        StateDirectory(state_dir)

    assert refusal.value.reason == "state_file_foreign"
    assert str(state_dir / name) in refusal.value.message  # words: which file
    assert elsewhere.untouched


@pytest.mark.parametrize("name", ["active", "tpm"])
@pytest.mark.parametrize("what", ["a link to a directory", "a link to nothing", "a FIFO", "a second name of a file"])
def test_what_was_planted_in_the_place_of_a_directory_is_refused_in_words(
    state_dir: Path, elsewhere: Elsewhere, name: str, what: str
) -> None:
    """Behind a link in the place of ``tpm``, somebody else's storage root key would be known as this station's."""
    PLANTS[what](state_dir / name, elsewhere)

    with pytest.raises(LedgerError) as refusal:
        StateDirectory(state_dir)

    assert refusal.value.reason == "state_file_foreign"
    assert elsewhere.untouched


@pytest.mark.parametrize("name", [DATABASE_NAME, f"{DATABASE_NAME}-wal"])
@pytest.mark.parametrize("what", ["a FIFO", "a link to a file"])
def test_the_daemon_and_the_commands_end_in_words_where_something_was_planted(
    state_dir: Path, elsewhere: Elsewhere, name: str, what: str
) -> None:
    """As processes: one that opened a FIFO would wait for ever."""
    PLANTS[what](state_dir / name, elsewhere)
    commands = [
        ("serve", "--keystore", "software:", "--allow-software-keys"),
        ("keys", "list"),
        ("keys", "destroy", "00", "--yes"),
    ]

    for command in commands:
        ended = run(*command, "--state-dir", str(state_dir))
        assert ended.returncode == 1
        assert ended.reason == "state_file_foreign"
        assert "Traceback" not in ended.stderr
    assert elsewhere.untouched


def test_a_file_of_somebody_else_in_the_state_directory_is_refused(state_dir: Path) -> None:
    give_away(state_dir / DATABASE_NAME, NOBODY)

    with pytest.raises(LedgerError) as refusal:
        StateDirectory(state_dir)

    assert refusal.value.reason == "state_file_foreign"
    assert f"uid {NOBODY}" in refusal.value.message  # words: whose it is


def test_a_state_directory_of_another_user_is_refused_and_stays_as_it_is(state_dir: Path) -> None:
    give_away(state_dir, NOBODY)
    state_dir.chmod(0o755)

    with pytest.raises(ConfigurationError) as refusal:
        StateDirectory(state_dir)

    assert refusal.value.reason == "state_dir_foreign"
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o755
    assert not (state_dir / "lock").exists()


def test_a_directory_with_things_of_others_in_it_is_neither_closed_nor_used(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir(mode=0o755)
    (tmp_path / "etc" / "passwd").write_bytes(PRECIOUS)

    with pytest.raises(ConfigurationError) as refusal:
        StateDirectory(tmp_path / "etc")

    assert refusal.value.reason == "state_dir_open"
    assert [path.name for path in (tmp_path / "etc").iterdir()] == ["passwd"]


# The directories above it.


@pytest.mark.parametrize(
    ("mode", "group"), [pytest.param(0o777, 0, id="by all"), pytest.param(0o775, NOBODY, id="by a group")]
)
def test_a_state_directory_that_others_can_exchange_is_refused(tmp_path: Path, mode: int, group: int) -> None:
    above = tmp_path / "above"
    (above / "state").mkdir(parents=True)
    subprocess.run([*AS_ROOT, "chgrp", str(group), str(above)], check=True)
    above.chmod(mode)

    for path in (above / "state", above / "between" / "state"):
        with pytest.raises(ConfigurationError) as refusal:
            StateDirectory(path)
        assert refusal.value.reason == "state_dir_exchangeable"
        assert f"{above} " in refusal.value.message  # words: which directory


def test_a_state_directory_below_somebody_elses_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "above"
    (above / "state").mkdir(parents=True, mode=0o700)
    subprocess.run([*AS_ROOT, "chown", str(NOBODY), str(above)], check=True)

    with pytest.raises(ConfigurationError) as refusal:
        settled(above / "state")

    assert refusal.value.reason == "state_dir_exchangeable"
    assert f"{above} " in refusal.value.message  # words: which directory
    assert f"uid {NOBODY}" in refusal.value.message  # words: whose it is


def test_a_sticky_directory_such_as_tmp_may_be_open(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    tmp_path.chmod(0o1777)

    StateDirectory(tmp_path / "state").close()


def test_a_link_of_the_administrators_to_the_state_directory_is_followed_once(tmp_path: Path) -> None:
    """``/var/lib/stationkey`` may be a link to where there is room. From then on, where it led is what is used."""
    (tmp_path / "data").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to("data")

    directory = StateDirectory(link)
    directory.close()

    assert directory.path == tmp_path / "data"


def test_a_link_that_others_could_exchange_is_not_followed_to_a_state_directory(
    tmp_path: Path, elsewhere: Elsewhere
) -> None:
    """Where it leads to is root's alone. But who may write beside the link can have it lead elsewhere tomorrow."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "link").symlink_to(elsewhere.directory)

    for path in (shared / "link" / "state", shared / "link"):
        with pytest.raises(ConfigurationError) as refusal:
            StateDirectory(path)
        assert refusal.value.reason == "state_dir_exchangeable"
    assert elsewhere.untouched


def test_a_link_of_somebody_else_in_a_sticky_directory_is_not_followed(tmp_path: Path, elsewhere: Elsewhere) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "stationkey").symlink_to(elsewhere.directory)
    subprocess.run([*AS_ROOT, "chown", "--no-dereference", str(NOBODY), str(shared / "stationkey")], check=True)

    with pytest.raises(ConfigurationError) as refusal:
        StateDirectory(shared / "stationkey" / "state")

    assert refusal.value.reason == "state_dir_exchangeable"
    assert f"uid {NOBODY}" in refusal.value.message  # words: whose it is
    assert elsewhere.untouched


def test_a_way_up_out_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        StateDirectory(tmp_path / "nowhere" / ".." / "state")
    assert refusal.value.reason == "state_dir_unusable"

    for path, real in (("a/b/state", "a/b/state"), ("a/../c", "c")):
        directory = StateDirectory(tmp_path / path)
        directory.close()
        assert directory.path == tmp_path / real


@pytest.mark.parametrize("what", ["a link to itself", "a link to nothing", "a FIFO", "a link to a file"])
def test_what_leads_to_no_directory_is_refused_in_words(tmp_path: Path, elsewhere: Elsewhere, what: str) -> None:
    PLANTS[what](tmp_path / "state", elsewhere)

    with pytest.raises(ConfigurationError) as refusal:
        StateDirectory(tmp_path / "state")

    assert refusal.value.reason == "state_dir_unusable"
    assert elsewhere.untouched


def test_a_configuration_that_every_user_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stationkey.toml").touch(mode=0o600)
    (tmp_path / "stationkey.toml").chmod(0o646)

    with pytest.raises(ConfigurationError) as refusal:
        read_file(tmp_path / "stationkey.toml")

    assert refusal.value.reason == "config_open"


def test_a_trigger_that_was_planted_in_the_ledger_gets_no_function_that_does_anything(state_dir: Path) -> None:
    """The loading of a library, say: whoever could write there before would have root load it."""
    with closing(sqlite3.connect(state_dir / DATABASE_NAME)) as planted, planted:
        planted.execute("CREATE TRIGGER planted AFTER UPDATE ON key BEGIN SELECT load_extension('x'); END")

    with closing(Ledger(state_dir / DATABASE_NAME)) as ledger:
        (key,) = ledger.keys.all()
        with pytest.raises(LedgerError, match=r"unsafe use of|no such function"):  # words: SQLite's own
            ledger.transitions.apply(key.key_id, KeyEvent.DESTRUCTION_ORDERED, reason="", now=0)


def test_a_path_with_nul_is_refused_in_words() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        StateDirectory(Path("/nowhere\0/state"))
    assert refusal.value.reason == "state_dir_unusable"


# The directory active/.

NAME = "v2g_certificate.pem"


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("name", [NAME, f"{NAME}.new", "stray", ".lock"])
def test_whatever_is_planted_under_active_goes_or_is_named_and_nothing_outside_is_touched(
    tmp_path: Path, elsewhere: Elsewhere, name: str, plant: Plant
) -> None:
    directory = ActiveDirectory(tmp_path)
    directory.sync(dict)
    plant(directory.path / name, elsewhere)
    other = "v2g20_certificate.pem"

    refusals: list[LedgerError] = []
    try:
        directory.sync(lambda: {NAME: b"right", other: b"right, too"})
    except LedgerError as refusal:
        refusals.append(refusal)

    if refusals:
        assert name == ".lock" or plant is PLANTS["a directory with a file"]
        assert refusals[0].reason == "active_unwritable"
        assert str(directory.path / name) in refusals[0].message  # words: which file
    else:
        assert (directory.path / NAME).read_bytes() == b"right"
        assert (directory.path / NAME).stat().st_nlink == 1
    if name != ".lock":  # without the lock nothing is done
        assert (directory.path / "v2g20_certificate.pem").read_bytes() == b"right, too"
    assert elsewhere.untouched


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_a_link_to_a_file_with_the_right_content_is_not_taken_for_the_right_file(
    tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    """Its content could be changed between two looks, by whoever may write where it leads."""
    directory, copy = ActiveDirectory(tmp_path), tmp_path / "copy"
    directory.sync(dict)
    copy.touch(mode=0o600)
    copy.write_bytes(b"right")
    plant(directory.path / NAME, copy)

    directory.sync(lambda: {NAME: b"right"})

    assert not (directory.path / NAME).is_symlink()
    assert not (directory.path / NAME).samefile(copy)


@pytest.mark.parametrize("what", ["a FIFO", "a link to a file", "a link to nothing", "a directory with a file"])
def test_what_is_planted_in_the_place_of_active_is_refused(tmp_path: Path, elsewhere: Elsewhere, what: str) -> None:
    PLANTS[what](tmp_path / "active", elsewhere)

    if what == "a directory with a file":  # it is closed to others, and emptied: it is stationkey's alone
        ActiveDirectory(tmp_path).sync(dict)
        assert {path.name for path in (tmp_path / "active").iterdir()} == {".lock"}
        assert stat.S_IMODE((tmp_path / "active").stat().st_mode) == 0o700
    else:
        with pytest.raises(LedgerError) as refusal:
            ActiveDirectory(tmp_path).sync(lambda: {NAME: b"right"})
        assert refusal.value.reason == "active_unwritable"
    assert elsewhere.untouched


def test_a_file_that_never_ends_in_the_place_of_a_key_is_not_read(tmp_path: Path) -> None:
    directory = ActiveDirectory(tmp_path)
    directory.sync(dict)
    with (directory.path / NAME).open("wb") as file:
        file.truncate(2**40)  # sparse: a TiB that takes no room

    directory.sync(lambda: {NAME: b"right"})

    assert (directory.path / NAME).read_bytes() == b"right"


# Root, who comes with sudo to a state directory of the daemon's user.


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*AS_ROOT, *STATIONKEY, *arguments], capture_output=True, text=True, timeout=30, check=False)


def key_id_in(state_dir: Path) -> str:
    with closing(Ledger(state_dir / DATABASE_NAME, read_only=True)) as ledger:
        (key,) = ledger.keys.all()
    return key.key_id


@pytest.mark.parametrize("name", [*OPENED, "active", f"active/{NAME}", f"active/{NAME}.new", "active/.lock"])
@pytest.mark.parametrize("what", ["a link to a file", "a second name of a file"])
def test_root_who_destroys_a_key_follows_no_link_of_the_daemons_user(
    state_dir: Path, elsewhere: Elsewhere, name: str, what: str
) -> None:
    """The classic: whoever took over the daemon plants a link, and waits for the administrator."""
    key_id = key_id_in(state_dir)
    if "/" in name:
        (state_dir / "active").mkdir(mode=0o700)
    PLANTS[what](state_dir / name, elsewhere)
    give_away(state_dir, NOBODY)
    if what == "a second name of a file":
        subprocess.run([*AS_ROOT, "chown", f"{os.geteuid()}:{os.getegid()}", str(elsewhere.file)], check=True)

    ended = command("keys", "destroy", key_id, "--yes", "--state-dir", str(state_dir))

    assert elsewhere.untouched
    assert "Traceback" not in ended.stderr
    assert PRECIOUS.decode()[:8] not in ended.stdout + ended.stderr
    assert ended.returncode == (0 if name in {f"active/{NAME}", f"active/{NAME}.new"} else 1)


def test_what_root_makes_in_a_state_directory_belongs_to_whom_that_belongs(state_dir: Path) -> None:
    """``sudo stationkey keys`` must not lock the daemon out: not by a file, and not by a mode."""
    key_id = key_id_in(state_dir)
    give_away(state_dir, NOBODY)

    ended = command("keys", "destroy", key_id[:12], "--yes", "--state-dir", str(state_dir))

    assert (ended.returncode, ended.stderr) == (0, "")
    owners = subprocess.run(
        [*AS_ROOT, "find", str(state_dir), "-printf", "%U:%G %m %P\n"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(owners) >= 4  # the directory, the ledger, active and its lock
    assert {line.split()[0] for line in owners} == {f"{NOBODY}:{NOBODY}"}
    assert {line.split()[1] for line in owners} <= {"600", "700"}


# While it runs.


def test_what_is_planted_under_active_while_the_daemon_runs_is_gone_after_the_next_status(
    tmp_path: Path, mosquitto: Mosquitto, elsewhere: Elsewhere
) -> None:
    """By a process of the daemon's own user: the daemon follows nothing of it, and goes on."""
    with software_station(tmp_path, mosquitto) as station, Josev(mosquitto) as josev:
        active = station.state_dir / "active"
        josev.ask(generate_csr())
        for number, plant in enumerate(PLANTS.values()):
            if plant is not PLANTS["a directory with a file"]:
                plant(active / f"stray{number}.pem", elsewhere)
        PLANTS["a link to a file"](active / "charging_station_certificate.pem", elsewhere)
        PLANTS["a link to nothing"](active / "charging_station_certificate.pem.new", elsewhere)
        for name in (f"{DATABASE_NAME}-journal", "lock"):
            PLANTS["a link to a file"](station.state_dir / name, elsewhere)

        josev.publish(
            {
                "id": "123e4567-e89b-12d3-a456-426614174000",
                "name": "certificate_installation_status",
                "type": "update",
                "data": {"certificate_type": "charging_station_certificate", "status": "installed"},
            }
        )
        station.wait_for("written")

        assert {path.name for path in active.iterdir()} == {"charging_station_certificate.pem", ".lock"}
        assert not (active / "charging_station_certificate.pem").is_symlink()
        assert josev.ask(generate_csr()).csr
        assert station.stop() == 0
    assert elsewhere.untouched
