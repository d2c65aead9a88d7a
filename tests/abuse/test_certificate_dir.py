"""What Josev's user, or whoever took him over, can do with the certificate directory: not hang, and not hurt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from outside import Josev, generate_csr, run, software_station
from peers import Mosquitto

from parts import NOW, Authority, Station, key_id_in, pem, software_key, sqlite_of, station
from stationkey.ledger.lifecycle import KeyState
from stationkey.service.josev_files import (
    MAX_CERTIFICATE_DIRECTORIES,
    MAX_CERTIFICATE_FILES,
    MAX_CERTIFICATE_SIZE,
    MAX_CERTIFICATES,
)
from stationkey.system.state_dir import DATABASE_NAME

AUTHORITY = Authority()


@pytest.fixture
def certificate_dir(tmp_path: Path) -> Iterator[Path]:
    """Where Josev installs to."""
    directory = tmp_path / "certificates"
    directory.mkdir()
    yield directory
    subprocess.run(["rm", "-rf", str(directory)], check=True)  # Python's own way cannot go as deep as a trap here does


@pytest.fixture
async def here(tmp_path: Path, certificate_dir: Path) -> AsyncIterator[Station]:
    """A station that sees what Josev installs."""
    async with station(tmp_path / "state", certificate_dir=certificate_dir) as made:
        yield made


def a_fifo(directory: Path) -> None:
    os.mkfifo(directory / "a.pem")


def a_socket(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "a.pem"))


def links_to_devices(directory: Path) -> None:
    for name in ("zero", "random", "tty", "null"):
        (directory / f"{name}.pem").symlink_to(f"/dev/{name}")


def links_to_proc(directory: Path) -> None:
    for name in ("self/environ", "self/mem", "kmsg", "kcore", "self/pagemap", "sys/kernel/random/uuid", "self/fd/0"):
        (directory / f"{name.replace('/', '-')}.pem").symlink_to(f"/proc/{name}")


def links_in_a_circle(directory: Path) -> None:
    (directory / "a.pem").symlink_to("b.pem")
    (directory / "b.pem").symlink_to("a.pem")
    (directory / "c.pem").symlink_to(directory)
    (directory / "d.pem").symlink_to("nowhere")


def a_link_to_the_whole_disk(directory: Path) -> None:
    (directory / "everything").symlink_to("/")


def a_file_without_end(directory: Path) -> None:
    with (directory / "a.pem").open("wb") as file:
        file.truncate(2**40)


def a_file_that_grew(directory: Path) -> None:
    (directory / "a.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\n" * MAX_CERTIFICATE_SIZE)


def a_name_of_bytes(directory: Path) -> None:
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff\x1b[31m\n.pem")).write_bytes(b"\xff")


PASSED_OVER = [
    a_fifo,
    a_socket,
    links_to_devices,
    links_to_proc,
    links_in_a_circle,
    a_link_to_the_whole_disk,
    a_file_without_end,
    a_file_that_grew,
    a_name_of_bytes,
]


@pytest.mark.parametrize("plant", PASSED_OVER, ids=lambda plant: plant.__name__.replace("_", " "))
async def test_what_is_no_certificate_is_passed_over_and_waited_for_by_nobody(
    here: Station, certificate_dir: Path, plant: Callable[[Path], None]
) -> None:
    csr = await here.csr()
    (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
    plant(certificate_dir)

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [KeyState.ACTIVE]


def too_many_files(directory: Path) -> None:
    for number in range(10_000):
        (directory / str(number)).touch()


def too_many_directories(directory: Path) -> None:
    for number in range(MAX_CERTIFICATE_DIRECTORIES + 1):
        (directory / str(number)).mkdir()


def folders_in_one_another(directory: Path) -> None:
    """More than Python may call within one another, and deeper than any path is long."""
    descriptor = os.open(directory, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("nested", dir_fd=descriptor)
        inner = os.open("nested", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)


def too_many_certificates(directory: Path) -> None:
    """A few files of many small ones."""
    chain = pem(AUTHORITY.root) * (MAX_CERTIFICATE_SIZE // len(pem(AUTHORITY.root)))
    for number in range(MAX_CERTIFICATES // chain.count(b"BEGIN") + 1):
        (directory / f"{number}.pem").write_bytes(chain)


TOO_MUCH = [too_many_files, too_many_directories, folders_in_one_another, too_many_certificates]


@pytest.mark.parametrize("plant", TOO_MUCH, ids=lambda plant: plant.__name__.replace("_", " "))
async def test_a_directory_with_too_much_in_it_is_refused_in_words_and_no_key_is_changed(
    here: Station, certificate_dir: Path, plant: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    csr = await here.csr()
    (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
    plant(certificate_dir)

    await here.told("installed")
    await here.told("deleted")

    assert here.states(key_id_in(csr)) == [KeyState.PRE_ACTIVATION]
    assert here.counts["certificate_dir_unreadable"] >= 1
    assert "more than" in caplog.text  # words: other faults have this reason as well
    assert await here.csr()


async def test_a_fifo_that_comes_into_the_place_of_a_file_is_waited_for_by_nobody(
    here: Station, certificate_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a file and its opening: the fault is injected there."""
    csr = await here.csr()
    (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
    raced = certificate_dir / "a.pem"
    raced.touch()
    really_open = os.open

    def exchanged(path: Path, flags: int, *mode: int, **named: Any) -> int:
        if path == raced and not raced.is_fifo():
            raced.unlink()
            os.mkfifo(raced)
        return really_open(path, flags, *mode, **named)

    monkeypatch.setattr(os, "open", exchanged)

    await here.told("installed")

    assert raced.is_fifo()
    assert here.states(key_id_in(csr)) == [KeyState.ACTIVE]


def locks_on(database: Path, pid: int) -> set[tuple[int, str, str]]:
    """What a process has locked of a database: inode, first and last byte [proc(5), /proc/locks]."""
    inodes = {Path(f"{database}{suffix}").stat().st_ino for suffix in ("", "-shm")}
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "POSIX" in line]
    found = {(int(row[5].rsplit(":", 1)[1]), row[6], row[7]) for row in rows if row[4] == str(pid)}
    return {lock for lock in found if lock[0] in inodes}


def links_by_name(directory: Path, database: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (directory / f"a{suffix}.pem").symlink_to(f"{database}{suffix}")


def links_to_what_is_open(directory: Path, _: Path) -> None:
    """Where the state directory is closed to whoever plants, and its name is not known to him."""
    for number in range(64):
        (directory / f"{number}.pem").symlink_to(f"/proc/self/fd/{number}")


def other_names_of_it(directory: Path, database: Path) -> None:
    for suffix in ("", "-shm"):
        (directory / f"a{suffix}.pem").hardlink_to(f"{database}{suffix}")


LEADS_TO_THE_LEDGER = [links_by_name, links_to_what_is_open, other_names_of_it]


@pytest.mark.parametrize("plant", LEADS_TO_THE_LEDGER, ids=lambda plant: plant.__name__.replace("_", " "))
async def test_what_leads_to_the_ledger_itself_takes_no_lock_off_it(
    here: Station, certificate_dir: Path, plant: Callable[[Path, Path], None]
) -> None:
    csr = await here.csr()
    (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
    before = locks_on(sqlite_of(here.ledger).path, os.getpid())
    plant(certificate_dir, sqlite_of(here.ledger).path)

    await here.told("installed")
    await here.told("deleted")

    assert before
    assert locks_on(sqlite_of(here.ledger).path, os.getpid()) == before
    assert here.states(key_id_in(csr)) == [KeyState.ACTIVE]


async def test_a_link_to_the_ledger_that_comes_into_the_place_of_a_file_takes_no_lock_off_it(
    here: Station, certificate_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a file and its opening: the fault is injected there."""
    csr = await here.csr()
    (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
    raced = certificate_dir / "a.pem"
    raced.touch()
    before = locks_on(sqlite_of(here.ledger).path, os.getpid())
    really_open = os.open

    def exchanged(path: str | Path, flags: int, *mode: int, **named: Any) -> int:
        if path == raced and not raced.is_symlink():
            raced.unlink()
            raced.symlink_to(sqlite_of(here.ledger).path)
        return really_open(path, flags, *mode, **named)

    monkeypatch.setattr(os, "open", exchanged)

    await here.told("installed")

    assert raced.is_symlink()
    assert locks_on(sqlite_of(here.ledger).path, os.getpid()) == before


def with_an_extension_twice(csr: str) -> bytes:
    """In DER. Two extensions that nobody knows become one that is there twice: their names are of one length."""
    return in_der(csr).replace(b"\x06\x03\x2a\x03\x05", b"\x06\x03\x2a\x03\x04")


def with_the_serial_number_zero(csr: str) -> bytes:
    """In DER: behind the version comes the serial number [RFC 5280 4.1.2.2: positive]."""
    return in_der(csr).replace(b"\xa0\x03\x02\x01\x02\x02\x01\x01", b"\xa0\x03\x02\x01\x02\x02\x01\x00")


def in_der(csr: str) -> bytes:
    """A certificate for the key of a CSR, with two extensions that nobody knows."""
    first, second = (x509.ObjectIdentifier(name) for name in ("1.2.3.4", "1.2.3.5"))
    unknown = [x509.UnrecognizedExtension(oid, b"\x05\x00") for oid in (first, second)]
    asked = x509.load_pem_x509_csr(csr.encode())
    public_key = asked.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    builder = (
        x509.CertificateBuilder()
        .subject_name(asked.subject)
        .issuer_name(asked.subject)
        .public_key(public_key)
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    for extension in unknown:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(software_key(), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


async def test_a_certificate_whose_extensions_cannot_be_read_is_told_and_its_key_used(
    here: Station, certificate_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Made by an authority that puts an extension in twice: whose key it is can be read, and that is what counts."""
    csr = await here.csr()
    (certificate_dir / "secc.der").write_bytes(with_an_extension_twice(csr))

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [KeyState.ACTIVE]
    assert "extensions" in caplog.text  # words: what cannot be read


# The daemon.


def test_the_daemon_answers_while_its_certificate_directory_is_full_of_traps(
    tmp_path: Path, mosquitto: Mosquitto, certificate_dir: Path
) -> None:
    for plant in (a_fifo, links_to_devices, links_to_proc, a_link_to_the_whole_disk):
        folder = certificate_dir / plant.__name__
        folder.mkdir()
        plant(folder)
    too_many_files(certificate_dir)
    config = tmp_path / "stationkey.toml"
    config.write_text(f'[josev]\ncertificate_dir = "{certificate_dir}"\n')

    with software_station(tmp_path, mosquitto, "--config", str(config)) as daemon, Josev(mosquitto) as josev:
        josev.ask(generate_csr())
        josev.publish(
            {
                "id": "123e4567-e89b-12d3-a456-426614174000",
                "name": "certificate_installation_status",
                "type": "update",
                "data": {"certificate_type": "charging_station_certificate", "status": "installed"},
            }
        )
        (refused,) = daemon.wait_for(reason="certificate_dir_unreadable")
        assert f"{MAX_CERTIFICATE_FILES} files" in refused["event"]  # words: the limit
        assert josev.ask(generate_csr()).csr
        assert daemon.stop() == 0


def test_no_answer_is_lost_where_a_link_to_the_ledger_lies_in_the_certificate_directory(
    tmp_path: Path, mosquitto: Mosquitto, certificate_dir: Path
) -> None:
    """Without its locks, the next command that ends would take away the write-ahead log that the daemon writes to."""
    config = tmp_path / "stationkey.toml"
    config.write_text(f'[josev]\ncertificate_dir = "{certificate_dir}"\n')

    with software_station(tmp_path, mosquitto, "--config", str(config)) as daemon, Josev(mosquitto) as josev:
        first = key_id_in(josev.ask(generate_csr()).csr)
        links_by_name(certificate_dir, daemon.state_dir / DATABASE_NAME)
        josev.publish(
            {
                "id": "123e4567-e89b-12d3-a456-426614174000",
                "name": "certificate_installation_status",
                "type": "update",
                "data": {"certificate_type": "charging_station_certificate", "status": "installed"},
            }
        )
        daemon.wait_for(reason="certificate_dir_unreadable")
        state_dir = ("--state-dir", str(daemon.state_dir))
        assert run("keys", "destroy", first, "--yes", "--reason", "test", *state_dir).returncode == 0
        second = key_id_in(josev.ask(generate_csr()).csr)
        daemon.kill()

        listed = run("keys", "list", "--json", *state_dir)

    assert second in listed.stdout


def test_what_a_library_warns_of_a_certificate_is_a_line_of_the_log_like_every_other(
    tmp_path: Path, mosquitto: Mosquitto, certificate_dir: Path
) -> None:
    """Libraries write warnings to standard error by themselves, and what is there must stay JSON line by line."""
    config = tmp_path / "stationkey.toml"
    config.write_text(f'[josev]\ncertificate_dir = "{certificate_dir}"\n')

    with software_station(tmp_path, mosquitto, "--config", str(config)) as daemon, Josev(mosquitto) as josev:
        csr = josev.ask(generate_csr()).csr
        (certificate_dir / "secc.der").write_bytes(with_the_serial_number_zero(csr))
        josev.publish(
            {
                "id": "123e4567-e89b-12d3-a456-426614174000",
                "name": "certificate_installation_status",
                "type": "update",
                "data": {"certificate_type": "charging_station_certificate", "status": "installed"},
            }
        )
        daemon.wait_for("key active")
        daemon.stop()

    events = [json.loads(line)["event"] for line in daemon.lines]
    assert any("serial number" in event for event in events)  # words: the library's own
