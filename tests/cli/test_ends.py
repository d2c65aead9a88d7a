"""How a command ends: by Ctrl-C, and where its standard output takes nothing."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from peers import Mosquitto, free_port

from parts import Authority, pem
from stationkey.ledger import Ledger
from stationkey.system.interrupts import EXIT_INTERRUPTED
from stationkey.system.state_dir import DATABASE_NAME

STATIONKEY = [sys.executable, "-m", "stationkey"]
IMPORTS = ("stationkey.cli", "click", "stationkey.cli.keys", "stationkey.ledger", "sqlite3", "stationkey.cli.request")
INTERRUPTED = """
import signal, sys
class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.argv = ["stationkey", {command!r}, "--help"]
from stationkey.__main__ import run
run()
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with an empty ledger."""
    with closing(Ledger(tmp_path / DATABASE_NAME)):
        return tmp_path


@pytest.mark.parametrize("module", IMPORTS)
def test_ctrl_c_during_an_import_ends_with_130_and_without_a_word(module: str) -> None:
    command = "request" if module.endswith("request") else "keys"
    program = INTERRUPTED.format(module=module, command=command)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_INTERRUPTED, "", "")


def test_a_shell_that_ignores_ctrl_c_for_a_command_has_it_ignored() -> None:
    program = INTERRUPTED.format(module="click", command="keys")
    command = ["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_at_a_question_ends_with_130(state: Path) -> None:
    from recording import answer  # noqa: PLC0415 - used here alone

    with closing(Ledger(state / DATABASE_NAME)) as ledger:
        key_id = answer(ledger)
    keyboard, terminal = pty.openpty()
    command = [*STATIONKEY, "keys", "destroy", key_id, "--state-dir", str(state)]
    with subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as asked:
        os.close(terminal)
        assert asked.stderr is not None
        said = ""
        while not said.endswith("[y/N]:"):
            character = asked.stderr.read(1)
            assert character, said
            said += character
        while asked.returncode is None:  # Python notices one that came just before it reads only after it has read
            asked.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                asked.communicate(timeout=1)
    os.close(keyboard)
    assert asked.returncode == EXIT_INTERRUPTED
    declined = subprocess.run(command, input="n\n", capture_output=True, text=True, check=False)
    assert declined.returncode == 1


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["keys", "list"], ["keys", "list", "--json"]])
def test_a_full_standard_output_ends_in_words(arguments: list[str], state: Path) -> None:
    options = ["--state-dir", str(state)] if arguments[0] == "keys" else []
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*STATIONKEY, *arguments, *options], stdout=full, stderr=-1, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "stationkey: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["keys", "list", "--state-dir", "/"]])
def test_a_closed_standard_output_ends_in_words_and_nothing_is_done(arguments: list[str]) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *STATIONKEY, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "stationkey: standard output is closed; nothing was done\n")


def test_a_closed_standard_input_is_an_empty_one() -> None:
    command = ["sh", "-c", '"$@" <&-', "sh", *STATIONKEY, "csr", "inspect", "-"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("stationkey: ")
    assert "Traceback" not in done.stderr


def test_a_pipe_whose_reader_has_ended_ends_it_quietly(state: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*STATIONKEY, "keys", "list", "--state-dir", str(state)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_josev_tells_at_its_start_that_there_is_no_broker(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """With a broker it goes on, and tells that there is no CSMS."""
    anchors = tmp_path / "anchors.pem"
    anchors.write_bytes(pem(Authority().root))
    names = ("--common-name", "x", "--organization-name", "x", "--country-name", "DE", "--identity", "x")
    options = ("--certificate-dir", str(tmp_path), "--trust-anchors", str(anchors), "--state-dir", str(tmp_path / "j"))
    command = [*STATIONKEY, "josev", *names, *options, "--csms", f"ws://127.0.0.1:{free_port()}"]
    url = f"mqtt://127.0.0.1:{free_port()}"
    done = subprocess.run([*command, "--broker", url], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert url in done.stderr  # words: which broker
    with subprocess.Popen([*command, "--broker", mosquitto.url], stdout=subprocess.PIPE, text=True) as playing:
        assert playing.stdout is not None
        assert "no CSMS" in playing.stdout.readline()
        playing.send_signal(signal.SIGINT)
        playing.communicate()
    assert playing.returncode == EXIT_INTERRUPTED
