"""Files that a command cannot use, of every kind: it names the file, and ends in words."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from parts import Authority, pem
from stationkey.cli import main
from stationkey.ledger import Ledger
from stationkey.system.files import MAX_FILE
from stationkey.system.state_dir import DATABASE_NAME

FILE, GOOD = "wrong.file", "good.pem"
"""The file that cannot be used, and one with a certificate."""
ASK = ("--common-name", "x", "--organization-name", "x", "--country-name", "DE")
ASKED = ("request", "v2g_certificate", *ASK, "--broker", "mqtts://127.0.0.1:1")
JOSEV = ("josev", *ASK, "--csms", "wss://127.0.0.1:1", "--identity", "x", "--broker", "mqtt://127.0.0.1:1")
TPM = ("--keystore", "tpm2:device:/nowhere")
PKI = ("--trust-anchors", GOOD, "--certificate-dir", "certificates")
COMMANDS = [
    ("csr", "inspect", FILE),
    ("config", "check", FILE),
    ("serve", "--config", FILE),
    ("keys", "list", "--config", FILE),
    ("status", "--state-dir", FILE),
    ("requests", "--state-dir", FILE),
    ("tls-config", "--check", f"./{FILE}", *TPM),
    ("key-auth", f"./{FILE}", *TPM),
    ("verify-attestation", GOOD, "--ak", FILE),
    ("verify-attestation", GOOD, "--ak", GOOD, "--ak-ca", FILE),
    ("verify-attestation", GOOD, "--secret", FILE),
    (*ASKED, "--mqtt-ca-file", FILE),
    (*ASKED, "--mqtt-username", "x", "--mqtt-password-file", FILE),
    ("csms", "--organization", "x", "--password-file", FILE),
    (*JOSEV, "--certificate-dir", "certificates", "--trust-anchors", FILE),
    (*JOSEV, *PKI, "--password-file", FILE),
    (*JOSEV, *PKI, "--ca-file", FILE),
    (*JOSEV, *PKI, "--client-certificate", FILE),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file that has a certificate."""
    (tmp_path / GOOD).write_bytes(pem(Authority().root))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(kind: str, path: Path) -> None:
    """Make a file, or something else, that cannot be used."""
    match kind:
        case "binary":
            path.write_bytes(b"\xff\xfe\x00\x01")
        case "huge":
            path.write_text("x" * MAX_FILE * 2)
        case "directory":
            path.mkdir()
        case _:
            assert kind == "missing"


@pytest.mark.parametrize("kind", ["missing", "directory", "binary", "huge"])
def test_a_file_that_cannot_be_used_is_named(folder: Path, kind: str) -> None:
    make(kind, folder / FILE)
    runner = CliRunner()
    wrong = {}
    for arguments in COMMANDS:
        ended = runner.invoke(main, arguments)
        named = FILE in " ".join(ended.output.split())
        if not isinstance(ended.exception, SystemExit) or ended.exit_code not in {1, 2, 6} or not named:
            wrong[arguments] = (ended.exit_code, ended.exception, ended.output)
    assert wrong == {}


@pytest.mark.parametrize("arguments", [["keys", "list"], ["status"]])
def test_another_user_is_told_of_sudo_and_of_nothing_that_he_does_not_see(arguments: list[str]) -> None:
    """The modules are loaded before the user is changed: nobody may read where they are, perhaps."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        state = Path(name, "state")
        state.mkdir(mode=0o700)
        with closing(Ledger(state / DATABASE_NAME)):
            pass
        change = "os.setgroups([]); os.setgid(65534); os.setuid(65534)" if os.geteuid() == 0 else "state.chmod(0)"
        program = f"import os, stationkey.cli.status; from stationkey.cli import main; {change}; main()"
        command = [sys.executable, "-c", program, *arguments, "--state-dir", str(state)]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "sudo" in said  # words: what helps
    assert "--state-dir" not in said
    assert "no keys" not in said
    assert "not running" not in said
