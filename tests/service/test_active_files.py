"""The files under ``active/``: their names, what is in them, and what a reader can see of an exchange."""

from __future__ import annotations

import itertools
import os
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from parts import V2G, Authority, pem, request
from stationkey.contract.active_names import ActiveName, Owner, file_name, read_name
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.errors import LedgerError
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.service import active_files
from stationkey.service.active_files import ActiveDirectory
from stationkey.x509.csr import build_csr, to_pem

NAME = "v2g_certificate.pem"
OTHER = "v2g_certificate.DE%2AABC%2AE1.pem"
AUTHORITY = Authority()


def pair() -> bytes:
    """A key and its certificate, as they stand in one file."""
    store = SoftwareKeyStore()
    key = store.generate(Algorithm.ECDSA_SHA256)
    with store.signer(key) as private_key:
        csr = to_pem(build_csr(request(V2G), private_key))
    return key.pem() + pem(AUTHORITY.sign(csr), AUTHORITY.sub)


def belong_together(content: bytes) -> bool:
    private_key = serialization.load_pem_private_key(content, None)
    return private_key.public_key() == x509.load_pem_x509_certificates(content)[0].public_key()


@pytest.fixture
def directory(tmp_path: Path) -> ActiveDirectory:
    return ActiveDirectory(tmp_path)


def names(directory: ActiveDirectory) -> set[str]:
    return {path.name for path in directory.path.iterdir()} - {".lock"}


# Names.


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(Owner("", "v2g_certificate", ""), "v2g_certificate.pem", id="no EVSE"),
        pytest.param(Owner("", "v2g_certificate", "DE*ABC*E1"), "v2g_certificate.DE%2AABC%2AE1.pem", id="asterisks"),
        pytest.param(Owner("", "v2g20_certificate", "DEABCE1"), "v2g20_certificate.DEABCE1.pem", id="no asterisks"),
        pytest.param(Owner("", "v2g_certificate", "../../x"), "v2g_certificate.%2E%2E%2F%2E%2E%2Fx.pem", id="way out"),
        pytest.param(
            Owner("depot7/s.1", "v2g_certificate", "E1"), "station-depot7%2Fs%2E1.v2g_certificate.E1.pem", id="station"
        ),
        pytest.param(
            Owner("/" * 22, "v2g_certificate", "E1"),
            "station_Ly8vLy8vLy8vLy8vLy8vLy8vLy8vLw.v2g_certificate.RTE.pem",
            id="a station that is too long when it is percent-encoded",
        ),
    ],
)
def test_a_name_is_the_type_and_the_evse_id(owner: Owner, name: str) -> None:
    assert file_name(owner) == name
    assert read_name(name) == ActiveName(owner)


HOSTILE = ["previous", "root-0123456789abcdef", "root-", "previous.previous", "..", "../..", ".lock", "v2g_certificate"]
STATIONS = st.just("") | st.text() | st.sampled_from([*HOSTILE, "station-", "station_", "a/b", "a%2Fb", "\u00fc" * 32])
owners = st.builds(
    Owner, STATIONS, st.sampled_from([str(name) for name in CertificateType]), st.text() | st.sampled_from(HOSTILE)
)


@given(owners, st.sampled_from(["", "0123456789abcdef"]), st.booleans())
def test_a_name_stays_in_its_folder_and_can_be_read_back(owner: Owner, root: str, previous: bool) -> None:
    name = file_name(owner, root, previous)

    assert read_name(name) == ActiveName(owner, root, previous)
    assert name == Path(name).name
    assert name.isascii()
    assert "\0" not in name
    assert name.count(".") == 1 + sum(map(bool, (owner.station, owner.evse_id, root, previous)))


@given(owners, owners, st.booleans(), st.booleans())
def test_two_owners_have_two_names(one: Owner, other: Owner, first: bool, second: bool) -> None:
    assert (file_name(one, previous=first) == file_name(other, previous=second)) == ((one, first) == (other, second))


@pytest.mark.parametrize(
    ("evse_id", "root", "previous", "name"),
    [
        ("", "", True, "v2g_certificate.previous.pem"),
        ("previous", "", False, "v2g_certificate.%70revious.pem"),
        ("root-0123456789abcdef", "", True, "v2g_certificate.%72oot-0123456789abcdef.previous.pem"),
        ("DE*ABC*E1", "0123456789abcdef", True, "v2g_certificate.DE%2AABC%2AE1.root-0123456789abcdef.previous.pem"),
    ],
)
def test_the_parts_of_a_name_cannot_be_taken_for_each_other(evse_id: str, root: str, previous: bool, name: str) -> None:
    assert file_name(Owner("", "v2g_certificate", evse_id), root, previous) == name


@pytest.mark.parametrize(
    "name",
    ["v2g_certificate.root-01.pem", "v2g_certificate.previous.previous.pem", "v2g_certificate.a.b.c.d.e.pem", ".pem.x"],
)
def test_a_name_that_is_never_given_says_nothing(name: str) -> None:
    assert read_name(name) is None


@given(st.text())
def test_no_two_names_have_one_owner(name: str) -> None:
    read = read_name(name)

    assert read is None or file_name(*read) == name


# Files.


def test_a_file_has_key_and_chain_and_is_for_us_alone(directory: ActiveDirectory) -> None:
    content = pair()

    assert directory.sync(lambda: {NAME: content}) == [directory.path / NAME]

    file = directory.path / NAME
    assert file.read_bytes() == content
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_a_file_is_what_a_tls_server_loads(directory: ActiveDirectory) -> None:
    directory.sync(lambda: {NAME: pair()})

    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(directory.path / NAME)


def test_a_file_that_is_right_is_left_alone(directory: ActiveDirectory) -> None:
    content = pair()
    directory.sync(lambda: {NAME: content})
    before = (directory.path / NAME).stat()

    assert directory.sync(lambda: {NAME: content}) == []
    assert (directory.path / NAME).stat() == before


def test_what_no_key_is_active_for_goes(directory: ActiveDirectory) -> None:
    directory.sync(lambda: {NAME: b"one", OTHER: b"two"})

    directory.sync(lambda: {OTHER: b"two"})

    assert names(directory) == {"v2g_certificate.DE%2AABC%2AE1.pem"}


@pytest.mark.parametrize("stray", ["v2g_certificate.pem.new", "v2g20_certificate.pem", "notes", ".hidden"])
def test_what_a_loss_of_power_or_a_hand_left_behind_goes(directory: ActiveDirectory, stray: str) -> None:
    directory.sync(dict)
    (directory.path / stray).write_text("half a k")

    directory.sync(lambda: {NAME: b"whole"})

    assert names(directory) == {NAME}
    assert (directory.path / NAME).read_bytes() == b"whole"


@pytest.mark.parametrize("change", ["content", "mode", "gone"])
def test_a_file_that_was_tampered_with_is_made_right(directory: ActiveDirectory, change: str) -> None:
    directory.sync(lambda: {NAME: b"right"})
    file = directory.path / NAME
    match change:
        case "content":
            file.write_bytes(b"wrong")
        case "mode":
            file.chmod(0o644)
        case _:
            file.unlink()

    directory.sync(lambda: {NAME: b"right"})

    assert file.read_bytes() == b"right"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("planted", [NAME, NAME + ".new", "stray.pem"])
@pytest.mark.parametrize("content", [b"right", b"wrong"], ids=["the right content", "other content"])
def test_a_planted_link_is_exchanged_and_never_followed(
    directory: ActiveDirectory, tmp_path: Path, planted: str, content: bytes
) -> None:
    directory.sync(dict)
    target = tmp_path / "target"
    target.write_bytes(content)
    (directory.path / planted).symlink_to(target)

    directory.sync(lambda: {NAME: b"right"})

    assert target.read_bytes() == content
    assert names(directory) == {NAME}
    assert not (directory.path / NAME).is_symlink()
    assert (directory.path / NAME).read_bytes() == b"right"


def test_a_link_in_the_place_of_the_directory_is_refused_and_nothing_behind_it_touched(
    directory: ActiveDirectory, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    directory.path.symlink_to(elsewhere)

    with pytest.raises(LedgerError) as refusal:
        directory.sync(lambda: {NAME: b"right"})

    assert refusal.value.reason == "active_unwritable"
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_a_fifo_in_the_place_of_a_file_is_exchanged_and_waited_for_by_nobody(directory: ActiveDirectory) -> None:
    directory.sync(dict)
    os.mkfifo(directory.path / NAME, 0o600)

    directory.sync(lambda: {NAME: b"right"})

    assert (directory.path / NAME).read_bytes() == b"right"


def test_a_directory_that_is_open_to_others_is_closed(directory: ActiveDirectory) -> None:
    directory.path.mkdir()
    directory.path.chmod(0o755)

    directory.sync(dict)

    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_the_file_of_a_destroyed_key_goes_although_another_cannot_be_written(
    directory: ActiveDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.sync(lambda: {NAME: b"destroyed since"})

    def no_room(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(LedgerError) as refusal:
        directory.sync(lambda: {OTHER: b"new"})

    assert "No space left on device" in str(refusal.value)
    assert NAME not in names(directory)


def test_who_cannot_get_the_lock_gives_up_in_words(directory: ActiveDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_files, "LOCK_TIMEOUT", 0.0)
    refusals: list[LedgerError] = []

    def while_locked() -> dict[str, bytes]:
        with pytest.raises(LedgerError) as refusal:
            ActiveDirectory(directory.path.parent).sync(dict)
        refusals.append(refusal.value)
        return {}

    directory.sync(while_locked)

    (refusal,) = refusals
    assert "another process holds the lock" in str(refusal)


# Exchanges.


def test_a_reader_sees_the_old_pair_or_the_new_pair_and_never_a_mix(directory: ActiveDirectory) -> None:
    pairs = [pair() for _ in range(4)]
    directory.sync(lambda: {NAME: pairs[0]})
    done = threading.Event()
    seen: set[bytes] = set()
    reads = 0

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            seen.add((directory.path / NAME).read_bytes())  # that there is none would be an error, too
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(1, 201):
            directory.sync(lambda number=number: {NAME: pairs[number % 4]})  # type: ignore[misc] # a default binds it
    finally:
        done.set()
        reader.join()

    assert reads > 0
    assert seen <= set(pairs)
    assert all(map(belong_together, seen))


def test_two_writers_leave_the_last_state_of_the_ledger(tmp_path: Path) -> None:
    """Each asks for the state with the directory locked, so none can show a state that was over before it began."""
    states = itertools.count(1)
    written = [0]
    lock = threading.Lock()

    def write() -> None:
        directory = ActiveDirectory(tmp_path)
        for _ in range(25):
            with lock:
                written.append(next(states))
            directory.sync(lambda: {NAME: str(written[-1]).encode()})

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert (tmp_path / "active" / NAME).read_bytes() == b"75"
