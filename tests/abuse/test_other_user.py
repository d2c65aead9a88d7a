"""Another user of the machine, without rights of his own: what he cannot read, take, end or make."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from outside import Josev, Station, generate_csr
from peers import Mosquitto
from station import AS_ROOT, NOBODY, as_user

from stationkey.errors import LedgerError
from stationkey.system.state_dir import StateDirectory

PASSWORD = "correct horse battery staple"
STATUS = {
    "id": "123e4567-e89b-12d3-a456-426614174000",
    "name": "certificate_installation_status",
    "type": "update",
    "data": {"certificate_type": "charging_station_certificate", "status": "installed"},
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can go through, as they can through ``/var/lib``; pytest's are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """A running daemon with an active key, and a secret in its environment; what is tried on it leaves it as it was."""
    with (
        Mosquitto(tmp_path_factory.mktemp("mosquitto")) as broker,
        tempfile.TemporaryDirectory() as name,
        Station(Path(name), *options(broker), SOME_SECRET=PASSWORD) as made,
        Josev(broker) as josev,
    ):
        Path(name).chmod(0o711)
        josev.ask(generate_csr())
        josev.publish(STATUS)
        made.wait_for("written")
        yield made


def options(broker: Mosquitto) -> tuple[str, ...]:
    return ("--broker", broker.url, "--keystore", "software:", "--allow-software-keys")


def pid_of(station: Station) -> int:
    assert station.process is not None
    return station.process.pid


def test_he_reads_none_of_its_files_and_does_not_see_their_names(station: Station) -> None:
    files = [path for path in station.state_dir.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".pem", ".sqlite3", ".sqlite3-wal"}

    for path in [*files, station.state_dir, station.state_dir / "active"]:
        tried = as_user(NOBODY, "cat" if path.is_file() else "ls", str(path))
        assert tried.returncode != 0, path
        assert "Permission denied" in tried.stderr
        assert tried.stdout == ""


def test_he_makes_changes_and_removes_nothing_in_its_directory(station: Station) -> None:
    database = station.state_dir / "ledger.sqlite3"
    before = database.stat().st_size
    attempts = [
        ("touch", f"{station.state_dir}/new"),
        ("truncate", "--size=0", str(database)),
        ("rm", "-f", f"{station.state_dir}/lock"),
        ("ln", "-s", "/etc/passwd", f"{station.state_dir}/active/x.pem"),
        ("ln", str(database), f"{station.state_dir.parent}/second"),
        ("mv", str(station.state_dir), f"{station.state_dir}.old"),
        ("chmod", "777", str(station.state_dir)),
    ]

    assert [attempt for attempt in attempts if as_user(NOBODY, *attempt).returncode == 0] == []
    assert database.stat().st_size >= before
    assert {path.name for path in station.state_dir.parent.iterdir()} == {"state"}


def test_he_cannot_take_its_lock_and_so_keep_it_from_starting(station: Station) -> None:
    station.stop()

    tried = as_user(NOBODY, "flock", "--nonblock", f"{station.state_dir}/lock", "true")

    assert tried.returncode != 0
    assert "Permission denied" in tried.stderr
    station.start()


def test_he_can_neither_end_nor_stop_it(station: Station) -> None:
    for number in ("TERM", "KILL", "STOP", "QUIT", "ABRT"):
        tried = as_user(NOBODY, "kill", f"-{number}", str(pid_of(station)))
        assert tried.returncode != 0
    assert station.process is not None
    assert station.process.poll() is None


@pytest.mark.parametrize("what", ["environ", "mem", "maps", "smaps", "auxv", "stack", "syscall", "io"])
def test_the_kernel_tells_him_nothing_of_its_memory(station: Station, what: str) -> None:
    path = Path(f"/proc/{pid_of(station)}/{what}")

    tried = as_user(NOBODY, "head", "-c", "64", str(path))

    assert tried.stdout == ""
    assert tried.returncode != 0


def test_he_sees_neither_its_open_files_nor_where_it_is(station: Station) -> None:
    for name in ("fd", "cwd", "root", "exe"):
        tried = as_user(NOBODY, "ls", f"/proc/{pid_of(station)}/{name}/")
        assert tried.returncode != 0, name


def test_its_command_line_which_every_user_can_read_has_no_secret(station: Station) -> None:
    seen = as_user(NOBODY, "cat", f"/proc/{pid_of(station)}/cmdline")

    assert "stationkey" in seen.stdout
    assert PASSWORD not in seen.stdout
    # The counter-check: the secret is where it was put, for root to read.
    environment = subprocess.run(
        [*AS_ROOT, "cat", f"/proc/{pid_of(station)}/environ"], capture_output=True, check=True
    ).stdout
    assert PASSWORD.encode() in environment


def test_what_it_makes_is_closed_to_others_whatever_umask_it_was_started_with(
    folder: Path, mosquitto: Mosquitto
) -> None:
    before = os.umask(0)
    try:
        station = Station(folder, *options(mosquitto))
        station.start()
    finally:
        os.umask(before)
    with station, Josev(mosquitto) as josev:
        josev.ask(generate_csr())
        josev.publish(STATUS)
        station.wait_for("written")
        modes = {path: path.stat().st_mode & 0o777 for path in [station.state_dir, *station.state_dir.rglob("*")]}

    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} <= {0o600}


def test_a_directory_that_was_open_is_closed_before_anything_is_read_in_it(folder: Path) -> None:
    state = folder / "state"
    state.mkdir()
    state.chmod(0o777)  # an image that was built so
    assert as_user(NOBODY, "touch", f"{state}/ledger.sqlite3").returncode == 0

    with pytest.raises(LedgerError) as refusal:
        StateDirectory(state)
    assert refusal.value.reason == "state_file_foreign"

    assert as_user(NOBODY, "touch", f"{state}/more").returncode != 0


def test_a_ledger_that_was_put_back_from_a_backup_open_as_it_may_be_is_closed_at_the_start(
    folder: Path, mosquitto: Mosquitto
) -> None:
    """As ``sqlite3 .backup`` makes it with the usual umask; SQLite makes the log beside it no less open."""
    with Station(folder, *options(mosquitto)) as station, Josev(mosquitto) as josev:
        josev.ask(generate_csr())
        station.stop()
        database = station.state_dir / "ledger.sqlite3"
        database.chmod(0o644)
        station.start()
        josev.ask(generate_csr())
        modes = {path.name: path.stat().st_mode & 0o777 for path in station.state_dir.iterdir() if path.is_file()}

    assert modes.keys() >= {"ledger.sqlite3", "ledger.sqlite3-wal", "lock"}
    assert set(modes.values()) == {0o600}
