"""Reading a file that may be a trap; tests/abuse/test_planted.py plants them in a station."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from stationkey.system.files import NotRegular, TooLarge, opened_regular, read_regular


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")

    assert read_regular(tmp_path / "file", limit=8, follow=False) == b"12345678"


def test_a_file_with_one_byte_too_many_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456789")

    with pytest.raises(TooLarge):
        read_regular(tmp_path / "file", limit=8, follow=False)


def test_a_file_that_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to("/dev/zero")

    with pytest.raises(NotRegular):
        read_regular(tmp_path / "file", limit=8, follow=True)


def test_a_fifo_a_socket_and_a_directory_keep_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(NotRegular):
            read_regular(tmp_path / name, limit=8, follow=False)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)) as refused:
            read_regular(tmp_path / "socket", limit=8, follow=False)
        assert refused.value.errno == errno.ENXIO


def test_a_link_is_followed_only_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")

    assert read_regular(tmp_path / "link", limit=8, follow=True) == b"1"
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)) as refused:
        read_regular(tmp_path / "link", limit=8, follow=False)
    assert refused.value.errno == errno.ELOOP


def test_a_file_that_vanished_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "gone", limit=8, follow=False)


def test_a_name_is_looked_up_in_the_directory_that_is_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert read_regular("file", limit=8, follow=False, directory=directory) == b"1"
    finally:
        os.close(directory)


def open_in(directory: Path) -> list[str]:
    """The open files of this process in a directory."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since, as the one by which they are listed
            found.append(str(descriptor.readlink()))
    return [name for name in found if name.startswith(str(directory))]


def test_nothing_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(NotRegular):
        read_regular(tmp_path / "fifo", limit=8, follow=False)
    with opened_regular(tmp_path / "file", follow=False) as (file, status):
        assert (file.read(), status.st_size) == (b"1", 1)
        assert open_in(tmp_path) == [str(tmp_path / "file")]

    assert open_in(tmp_path) == []
