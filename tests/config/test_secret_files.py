"""Where a secret is, and what is said when it cannot be had."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stationkey.config.secrets import MAX_SECRET, SecretReference
from stationkey.errors import ConfigurationError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"sesame\n")
    path.chmod(0o640)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"sesame", b"sesame", id="bare"),
        pytest.param(b"sesame\n", b"sesame", id="with an editor's line feed"),
        pytest.param(b"sesame\r\n", b"sesame", id="with another editor's"),
        pytest.param(b" ses ame \n\n", b" ses ame \n", id="no more than one is taken off"),
        pytest.param(b"\x00\xff", b"\x00\xff", id="any bytes"),
        pytest.param(b"x" * MAX_SECRET, b"x" * MAX_SECRET, id="the longest"),
    ],
)
def test_a_secret_is_the_content_of_its_file(file: Path, content: bytes, expected: bytes) -> None:
    file.write_bytes(content)

    assert SecretReference(str(file)).read() == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"\xef\xbb\xbfsesame\n", True, id="byte order mark"),
        pytest.param(b"sesame \n", True, id="a blank at the end"),
        pytest.param(b"\tsesame", True, id="a tab at the beginning"),
        pytest.param(b"sesame\n\n", True, id="two line feeds"),
        pytest.param(b"open sesame\n", False, id="a blank within"),
        pytest.param(b"\xff\x00\x20", False, id="no text"),
    ],
)
def test_what_an_editor_may_have_added_is_told_once_and_the_secret_is_not(
    file: Path, caplog: pytest.LogCaptureFixture, content: bytes, *, told: bool
) -> None:
    file.write_bytes(content)
    for _ in range(2):
        SecretReference(str(file)).read()

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == told
    assert all(str(file) in line and "sesame" not in line for line in lines)  # words: which file, and no secret


def test_a_credential_is_where_systemd_has_put_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(file.parent))

    assert SecretReference("credential:secret").read() == b"sesame"


def test_without_systemd_there_is_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)

    with pytest.raises(ConfigurationError) as refused:
        SecretReference("credential:secret").read()
    assert refused.value.reason == "secret_unreadable"
    assert "LoadCredential" in refused.value.hint  # words: the setting that helps


@pytest.mark.parametrize(
    "source", ["", "a\0b", "credential:", "credential:..", "credential:../shadow", "credential:a/b"]
)
def test_what_names_no_secret_is_refused(source: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        SecretReference(source)
    assert refused.value.reason == "secret_invalid"


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        # words: they share a reason
        pytest.param(b"", 0o600, "empty", id="empty"),
        pytest.param(b"\n", 0o600, "empty", id="a line feed alone"),
        pytest.param(b"sesame" * MAX_SECRET, 0o600, str(MAX_SECRET), id="too long"),
        pytest.param(b"sesame", 0o604, "0604.*chmod o=", id="others may read it"),
        pytest.param(b"sesame", 0o602, "0602.*chmod o=", id="others may write it"),
    ],
)
def test_what_cannot_be_a_secret_is_refused_and_not_repeated(file: Path, content: bytes, mode: int, words: str) -> None:
    file.write_bytes(content)
    file.chmod(mode)

    with pytest.raises(ConfigurationError, match=words) as refused:
        SecretReference(str(file)).read()
    assert refused.value.reason == "secret_unreadable"
    assert "sesame" not in str(refused.value)  # words: the secret is not in it
    assert str(file) in refused.value.message  # words: which file


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, words in (
        (tmp_path / "none", os.strerror(errno.ENOENT)),
        (tmp_path, "regular file"),
        (tmp_path / "fifo", "regular file"),
    ):
        with pytest.raises(ConfigurationError, match=words) as refused:  # words: the system's, and the kind it takes
            SecretReference(str(path)).read()
        assert refused.value.reason == "secret_unreadable"
