"""Josev's certificate directory as a value: what was seen, what was not and why; and that a doubt changes no key."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import pkcs7, pkcs12

from parts import NOW, V2G, Authority, Station, Verb, key_id_in, pem, software_key, station
from stationkey.ledger.lifecycle import KeyState
from stationkey.service import josev_files
from stationkey.service.josev_files import MAX_CERTIFICATE_FILES, MAX_CERTIFICATE_SIZE, JosevFiles, read_directory

PENDING, ACTIVE, DEACTIVATED, DESTROYED = (
    KeyState.PRE_ACTIVATION,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.DESTROYED,
)
AUTHORITY = Authority()
JUNK = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where Josev installs to."""
    path = tmp_path / "certificates"
    path.mkdir()
    return path


@pytest.fixture
async def here(tmp_path: Path, directory: Path) -> AsyncIterator[Station]:
    """A station that sees it."""
    async with station(tmp_path / "state", certificate_dir=directory) as made:
        yield made


def put(file: Path, csr: str, *, days: int) -> None:
    """Install a certificate that is valid since so many days."""
    file.write_bytes(pem(AUTHORITY.sign(csr, begins=NOW - timedelta(days=days)), AUTHORITY.sub))


async def renewed(here: Station, file: Path) -> tuple[str, str]:
    """Two keys of which the second has replaced the first; the file holds the certificate of the second."""
    keys = []
    for days in (2, 1):
        csr = await here.csr()
        put(file, csr, days=days)
        await here.told("installed")
        keys.append(key_id_in(csr))
    assert here.states(*keys) == [DEACTIVATED, ACTIVE]
    return keys[0], keys[1]


# A doubt destroys no key.


def unreadable(file: Path) -> None:
    file.unlink()
    file.symlink_to("/proc/self/mem")  # a read from its start fails, even for root


def half_written(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:400])


def begun(file: Path) -> None:
    file.write_bytes(b"-----BEG")


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def too_large(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n" * MAX_CERTIFICATE_SIZE)


def link_to_nowhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/secc.pem")


def link_in_a_circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def link_to_a_folder_outside(file: Path) -> None:
    outside = file.parent.parent / "outside"
    outside.mkdir()
    file.rename(outside / "secc.pem")
    (file.parent / "secc").symlink_to(outside)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def certificate_in(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def der_cut_short(file: Path) -> None:
    file.write_bytes(certificate_in(file).public_bytes(serialization.Encoding.DER)[:-20])


def der_of_another_version(file: Path) -> None:
    der = certificate_in(file).public_bytes(serialization.Encoding.DER)
    file.write_bytes(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07", 1))


def pem_of_another_version(file: Path) -> None:
    der_of_another_version(file)
    body = base64.encodebytes(file.read_bytes())
    file.write_bytes(b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n")


def damaged_key(file: Path) -> None:
    certificate = certificate_in(file)
    point = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )[-64:]
    der = certificate.public_bytes(serialization.Encoding.DER)
    file.write_bytes(der.replace(point, b"\xff" * 64))  # on no curve


def trusted_certificate(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b" CERTIFICATE-", b" TRUSTED CERTIFICATE-"))


def pkcs7_file(file: Path) -> None:
    file.write_bytes(pkcs7.serialize_certificates([certificate_in(file)], serialization.Encoding.PEM))


def pkcs12_file(file: Path) -> None:
    bundle = pkcs12.serialize_key_and_certificates(None, None, certificate_in(file), None, serialization.NoEncryption())
    file.write_bytes(bundle)


def utf16(file: Path) -> None:
    file.write_bytes(file.read_text().encode("utf-16"))


def base64_alone(file: Path) -> None:
    file.write_bytes(base64.encodebytes(certificate_in(file).public_bytes(serialization.Encoding.DER)))


def directory_gone(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()


def directory_is_a_file(file: Path) -> None:
    directory_gone(file)
    file.parent.write_bytes(b"")


def too_many_files(file: Path) -> None:
    for number in range(MAX_CERTIFICATE_FILES):
        (file.parent / f"a{number}").write_bytes(b"text")


DOUBTS = [
    unreadable,
    half_written,
    begun,
    emptied,
    too_large,
    link_to_nowhere,
    link_in_a_circle,
    link_to_a_folder_outside,
    fifo,
    der_cut_short,
    der_of_another_version,
    pem_of_another_version,
    damaged_key,
    trusted_certificate,
    pkcs7_file,
    pkcs12_file,
    utf16,
    base64_alone,
    directory_gone,
    directory_is_a_file,
    too_many_files,
]


@pytest.mark.parametrize("spoil", DOUBTS, ids=lambda spoil: spoil.__name__)
async def test_a_certificate_that_is_there_and_not_seen_keeps_its_key_from_deleted(
    here: Station, directory: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    _, key = await renewed(here, directory / "secc.pem")
    spoil(directory / "secc.pem")

    for _ in range(3):
        await here.told("deleted")

    assert here.states(key) == [ACTIVE]
    assert here.counts["certificate_dir_unreadable"] >= 1
    assert str(directory) in caplog.text


@pytest.mark.parametrize("spoil", DOUBTS, ids=lambda spoil: spoil.__name__)
async def test_a_certificate_that_is_there_and_not_seen_is_not_replaced_by_an_older_one(
    here: Station, directory: Path, spoil: Callable[[Path], None]
) -> None:
    """[A02.FR.15]."""
    older = await here.csr()
    _, key = await renewed(here, directory / "secc.pem")
    spoil(directory / "secc.pem")
    with suppress(OSError):  # no directory
        put(directory / "older.pem", older, days=3)

    await here.told("installed")

    assert here.states(key_id_in(older), key) == [PENDING, ACTIVE]


async def test_junk_behind_a_certificate_neither_hides_it_nor_keeps_the_old_key(
    here: Station, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The junk is decoded and has no key in it: of the first key, no certificate is there for certain."""
    file = directory / "secc.pem"
    first, second = await renewed(here, file)
    file.write_bytes(file.read_bytes() + JUNK)

    await here.told("deleted")
    assert here.states(first, second) == [DESTROYED, ACTIVE]
    await here.told("deleted")

    assert here.states(second) == [ACTIVE]
    assert here.counts["certificate_dir_unreadable"] == 1
    assert str(file) in caplog.text


async def test_a_doubt_keeps_a_deactivated_key_too(here: Station, directory: Path) -> None:
    """Its certificate may be the one that is there, and the other the one that was deleted."""
    file = directory / "secc.pem"
    first, second = await renewed(here, file)
    (directory / "old.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nMIIB")

    await here.told("deleted")

    assert here.states(first, second) == [DEACTIVATED, ACTIVE]


async def test_a_file_that_may_be_of_another_pending_key_keeps_installed_from_choosing(
    here: Station, directory: Path
) -> None:
    seen, other = await here.csr(), await here.csr()
    (directory / "seen.pem").write_bytes(pem(AUTHORITY.sign(seen)))
    (directory / "other.pem").write_bytes(pem(AUTHORITY.sign(other))[:300])

    await here.told("installed")

    assert here.states(key_id_in(seen), key_id_in(other)) == [PENDING, PENDING]
    assert here.counts["certificate_dir_unreadable"] == 1


async def test_a_key_that_is_named_is_installed_whatever_else_cannot_be_read(here: Station, directory: Path) -> None:
    seen, other = await here.csr(), await here.csr()
    (directory / "seen.pem").write_bytes(pem(AUTHORITY.sign(seen)))
    (directory / "other.pem").write_bytes(pem(AUTHORITY.sign(other))[:300])

    await here.told("installed", private_key_path=f"/keys/{key_id_in(seen)}.pem")

    assert here.states(key_id_in(seen), key_id_in(other)) == [ACTIVE, PENDING]


def vanishing(file: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Fault injection: between the listing and the opening, the file moves to another name and back."""
    really_open, names = os.open, [file, file.with_name("zzz.pem")]

    def moved(path: Any, flags: int, *mode: int, **named: Any) -> int:
        nonlocal times
        if times and path == names[0]:
            times -= 1
            names[0].rename(names[1])
            names.reverse()
        return really_open(path, flags, *mode, **named)

    monkeypatch.setattr(os, "open", moved)


async def test_a_certificate_that_moves_between_two_looks_is_looked_for_again(
    here: Station, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await renewed(here, directory / "secc.pem")
    vanishing(directory / "secc.pem", monkeypatch, 1)

    await here.told("deleted")

    assert here.states(first, second) == [DESTROYED, ACTIVE]


async def test_a_directory_that_keeps_changing_is_a_doubt(
    here: Station, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await renewed(here, directory / "secc.pem")
    vanishing(directory / "secc.pem", monkeypatch, 99)

    await here.told("deleted")

    assert here.states(first, second) == [DEACTIVATED, ACTIVE]
    assert here.counts["certificate_dir_unreadable"] == 1


async def test_a_file_that_is_written_meanwhile_is_read_again(
    here: Station, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csr = await here.csr()
    file, whole = directory / "secc.pem", pem(AUTHORITY.sign(csr))
    file.write_bytes(whole[:300])
    really_open, times = os.open, [1]

    def finished(path: Any, flags: int, *mode: int, **named: Any) -> int:
        descriptor = really_open(path, flags, *mode, **named)
        if times and str(path).startswith("/proc/self/fd"):
            times.pop()
            file.write_bytes(whole)
        return descriptor

    monkeypatch.setattr(os, "open", finished)

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]


# Certainly gone.


def in_der(_: Path) -> bytes:
    return AUTHORITY.root.public_bytes(serialization.Encoding.DER)


def key_pem(_: Path) -> bytes:
    return software_key().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def key_der(_: Path) -> bytes:
    return software_key().private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def encrypted_key(_: Path) -> bytes:
    return software_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"secret"),
    )


def crl(_: Path) -> bytes:
    builder = x509.CertificateRevocationListBuilder().issuer_name(AUTHORITY.root.subject)
    made = builder.last_update(NOW).next_update(NOW + timedelta(days=1)).sign(software_key(), hashes.SHA256())
    return made.public_bytes(serialization.Encoding.DER)


def csr_of_another(_: Path) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(AUTHORITY.root.subject)
    return builder.sign(software_key(), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def words(_: Path) -> bytes:
    return "Zertifikate für die Säule; certificates of the station\n---\n".encode() + b"0123456789abcdef" * 8


def certificate_with_words(_: Path) -> bytes:
    return b"Bag Attributes\n  localKeyID: 54 69 6D\nsubject=CN = root\n" + pem(AUTHORITY.root).replace(b"\n", b"\r\n")


NO_CERTIFICATE_OF_OURS: list[Callable[[Path], bytes]] = [
    in_der,
    key_pem,
    key_der,
    encrypted_key,
    crl,
    csr_of_another,
    words,
    certificate_with_words,
    lambda _: JUNK,
]


async def test_where_the_whole_directory_was_seen_deleted_takes_the_key_in_use(here: Station, directory: Path) -> None:
    """Whatever else lies there, as long as it is certain what it is."""
    file = directory / "secc.pem"
    first, second = await renewed(here, file)
    for number, content in enumerate(NO_CERTIFICATE_OF_OURS):
        (directory / f"other{number}").write_bytes(content(directory))
    (directory / ".keep").touch()
    (directory / "folder").mkdir()
    (directory / "again").symlink_to(directory / "folder")
    (directory / "root.pem").symlink_to(directory / "other0")

    await here.told("deleted")
    await here.told("deleted")
    assert here.states(first, second) == [DESTROYED, ACTIVE]
    file.unlink()
    await here.told("deleted")

    assert here.states(second) == [DESTROYED]


async def test_a_path_takes_the_key_in_use_without_the_directory(here: Station, directory: Path) -> None:
    first, second = await renewed(here, directory / "secc.pem")
    directory_gone(directory / "secc.pem")

    await here.told("deleted", private_key_path=here.active_dir / f"{V2G}.pem")

    assert here.states(first, second) == [DEACTIVATED, DESTROYED]


async def test_what_was_read_is_a_value_with_each_file_that_was_not(directory: Path) -> None:
    (directory / "root.pem").write_bytes(pem(AUTHORITY.root))
    (directory / "half.pem").write_bytes(pem(AUTHORITY.sub)[:300])

    seen = read_directory(directory)

    assert [chain.leaf for chain in seen.chains.values()] == [AUTHORITY.root]
    assert [unread.path for unread in seen.unread] == [str(directory / "half.pem")]


def test_how_many_files_are_told_apart_is_bounded(directory: Path) -> None:
    for number in range(3 * josev_files.MAX_UNREAD):
        (directory / str(number)).write_bytes(JUNK)

    assert len(read_directory(directory).unread) == josev_files.MAX_UNREAD + 1


# A directory that hangs.


@pytest.fixture
def hanging(directory: Path, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Fault injection: whoever lists the directory waits until the event is set, as on a mount whose server is gone."""
    go_on, really_scan = threading.Event(), os.scandir

    def scan(path: Any) -> Any:
        if Path(path) == directory:
            go_on.wait()
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    return go_on


async def test_a_directory_that_hangs_holds_up_no_request_and_changes_no_key(
    tmp_path: Path, directory: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JosevFiles.__init__, "__kwdefaults__", {"deadline": 0.2})
    async with station(tmp_path / "state", certificate_dir=directory) as here:
        key = await here.key()
        told = asyncio.create_task(here.told("installed"))
        await here.key()
        assert not told.done()
        await told
        await here.told("deleted")  # at once: one look hangs already
        assert here.states(key) == [PENDING]
        assert here.counts["certificate_dir_unreadable"] == 2
        assert not here.service.ledger_stuck
        hanging.set()


async def test_a_directory_that_answers_again_is_read_again(
    tmp_path: Path, directory: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JosevFiles.__init__, "__kwdefaults__", {"deadline": 0.2})
    async with station(tmp_path / "state", certificate_dir=directory) as here:
        csr = await here.csr()
        (directory / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
        await here.told("installed")
        hanging.set()
        files = here.service._josev_files  # noqa: SLF001 - nobody tells when the look that hung is over
        assert files._reading is not None  # noqa: SLF001 - same
        await asyncio.wrap_future(files._reading)  # noqa: SLF001 - same

        monkeypatch.setattr(files, "_deadline", 30.0)  # time for the real one
        await here.told("installed")

        assert here.states(key_id_in(csr)) == [ACTIVE]


# Crossings between threads.


CROSSINGS = [
    pytest.param("installed", None, 3, id="installed, by order"),
    pytest.param("installed", "secc.pem", 5, id="installed, by certificate"),
    pytest.param("failed_installation", None, 1, id="failed_installation"),
    pytest.param("deleted", None, 1, id="deleted, by order"),
]


@pytest.mark.parametrize(("verb", "file", "trips"), CROSSINGS)
async def test_a_status_goes_to_other_threads_and_back_as_seldom_as_it_can(
    tmp_path: Path, directory: Path, verb: Verb, file: str | None, trips: int
) -> None:
    """Each trip is two crossings. Nobody waits for the destruction in the device, so it is none."""
    async with station(tmp_path / "state", certificate_dir=directory if file else None) as here:
        csr = await here.csr()
        if file:
            (directory / file).write_bytes(pem(AUTHORITY.sign(csr)))
        if verb == "deleted":
            await here.told("installed")
        loop = asyncio.get_running_loop()
        with mock.patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as back:
            await here.told(verb)

        assert back.call_count == trips
