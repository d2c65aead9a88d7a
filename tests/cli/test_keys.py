"""``stationkey keys``, as an operator types it, while a real daemon serves beside it."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from peers import Daemon, Mosquitto, Swtpm
from reasons import noted_reasons

from parts import E1, STATION, V2G, Verb, key_id_in, new_id, request
from stationkey import cli
from stationkey.cli._table import SHORT_ID
from stationkey.contract.profiles import CertificateType
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.migrations import SCHEMA_VERSION
from stationkey.mqtt.client import ask
from stationkey.mqtt.url import Broker
from stationkey.system.state_dir import DATABASE_NAME

BOUND = 30.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""


def invoke(*arguments: str | Path, answer: str = "") -> Result:
    """The command in this process, which is another one than the daemon's: what it raises is a fault."""
    return CliRunner().invoke(cli.main, list(map(str, arguments)), input=answer, catch_exceptions=False)


@contextmanager
def failing(reason: str) -> Iterator[None]:
    """A command in this process that ends by an error of this reason."""
    with noted_reasons() as noted:
        yield
    assert noted[-1:] == [reason]


@dataclass
class Beside:
    """A daemon, and the commands beside it."""

    broker: Mosquitto
    daemon: Daemon
    state_dir: Path

    def keys(self, *arguments: str, answer: str = "") -> Result:
        """``stationkey keys …``."""
        return invoke("keys", *arguments, "--state-dir", self.state_dir, answer=answer)

    def json(self, *arguments: str) -> Any:
        """What ``stationkey keys … --json`` prints."""
        result = self.keys(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def csr(self, certificate_type: CertificateType = V2G, evse_id: str | None = None) -> str:
        response = asyncio.run(
            ask(Broker.parse(self.broker.url), request(certificate_type, evse_id), topic_prefix="", timeout=BOUND)
        )
        assert response is not None
        assert isinstance(response.data.csr, str)
        return response.data.csr

    def key(self, certificate_type: CertificateType = V2G, evse_id: str | None = None) -> str:
        return key_id_in(self.csr(certificate_type, evse_id))

    def told(self, verb: Verb, certificate_type: CertificateType = V2G, *, of: str) -> str:
        """Publish a status as Josev would, and wait until the daemon has taken it to the key `of`; its id."""
        message_id = new_id()
        data = {"certificate_type": certificate_type, "status": verb, "private_key_path": f"/keys/{of}.pem"}
        message = {"id": message_id, "name": "certificate_installation_status", "type": "update", "data": data}
        subprocess.run(
            ["mosquitto_pub", "-p", str(self.broker.port), "-q", "1", "-t", "josev/cs", "-m", json.dumps(message)],
            check=True,
        )
        self.until(lambda: any(event["message_id"] == message_id for event in self.json("history", of)))
        return message_id

    def active_key(self, certificate_type: CertificateType = V2G) -> str:
        """A key that is active, its file written."""
        key_id = self.key(certificate_type)
        self.told("installed", certificate_type, of=key_id)
        self.until(self.file(certificate_type).exists)
        return key_id

    def file(self, certificate_type: CertificateType = V2G) -> Path:
        return self.state_dir / "active" / f"{certificate_type}.pem"

    def files(self) -> list[bytes]:
        """The files of the active key and of the one before."""
        active = self.file()
        return [active.read_bytes(), active.with_suffix(".previous.pem").read_bytes()]

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + BOUND
        while not done():
            assert time.monotonic() < end, self.daemon.log
            time.sleep(0.01)  # another process does it, and tells nobody

    def private(self, key_id: str) -> bytes:
        with closing(sqlite3.connect(self.state_dir / DATABASE_NAME)) as connection:
            ((blob,),) = connection.execute(
                "SELECT private FROM secret JOIN key ON number = key_number WHERE key_id = ?", (key_id,)
            ).fetchall()
        assert isinstance(blob, bytes)
        return blob

    def on_disk(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.state_dir.rglob("*") if path.is_file())


@pytest.fixture(scope="module", params=["software", "tpm2"])
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    folder = tmp_path_factory.mktemp("beside")
    with Swtpm(folder / "swtpm") as tpm, Mosquitto(folder / "mosquitto") as broker:
        store = (
            ("--keystore", tpm.uri) if request.param == "tpm2" else ("--keystore=software:", "--allow-software-keys")
        )
        state_dir = folder / "state"
        with Daemon(folder / "daemon", "--broker", broker.url, "--state-dir", str(state_dir), *store) as daemon:
            yield Beside(broker, daemon, state_dir)
            assert daemon.process is not None
            assert daemon.process.poll() is None, "the daemon has to live through all of this"


# Looking.


def test_list_shows_every_key(beside: Beside) -> None:
    key, csr = beside.active_key(STATION), beside.csr(V2G, E1)
    beside.told("failed_installation", of=key_id_in(csr))

    table = beside.keys("list").stdout
    listed = {row["key_id"]: row for row in beside.json("list")}

    assert table.splitlines()[0].split()[:4] == ["KEY", "STATE", "CERTIFICATE", "TYPE"]
    (line,) = [line for line in table.splitlines() if line.startswith(key[:SHORT_ID])]
    assert "active" in line
    (line,) = [line for line in table.splitlines() if line.startswith(key_id_in(csr)[:SHORT_ID])]
    assert "pre-activation, failed" in line
    assert (listed[key]["state"], listed[key]["evse_id"]) == ("active", None)
    assert (listed[key_id_in(csr)]["state"], listed[key_id_in(csr)]["evse_id"]) == ("pre-activation", E1)
    assert listed[key_id_in(csr)]["installation_failed"]


def test_show_shows_one_key_and_never_its_private_part(beside: Beside) -> None:
    key = beside.key()

    text = beside.keys("show", key).stdout
    shown = beside.json("show", key)

    assert shown == next(row for row in beside.json("list") if row["key_id"] == key)
    assert all(str(shown[name]) in text for name in ("key_id", "state", "common_name", "organization_name"))
    assert not any("private" in name for name in shown)


def test_the_csr_of_a_key_can_be_had_until_the_key_is_destroyed(beside: Beside) -> None:
    csr = beside.csr(V2G, E1)
    assert beside.keys("export-csr", key_id_in(csr)).stdout == csr

    beside.keys("destroy", key_id_in(csr), "--yes")
    ended = beside.keys("export-csr", key_id_in(csr))
    assert (ended.exit_code, ended.stdout) == (1, "")


def test_the_beginning_of_a_name_is_enough_in_either_case(beside: Beside) -> None:
    key = beside.key()

    assert beside.json("show", key[:12].upper())["key_id"] == key


def test_history_shows_every_event_with_time_reason_and_message(beside: Beside) -> None:
    key = beside.key()
    message_id = beside.told("installed", of=key)
    beside.keys("retire", key, "--reason", "board was opened")

    events = beside.json("history", key)
    table = beside.keys("history", key).stdout

    assert [(event["event"], event["state"], event["reason"]) for event in events] == [
        ("CSR answered", "pre-activation", ""),
        ("installed", "active", "Josev installed its certificate"),
        ("retired", "deactivated", "board was opened"),
    ]
    assert events[1]["message_id"] == message_id
    assert all(event["at"].endswith("Z") for event in events)
    assert "board was opened" in table
    assert len(table.splitlines()) == 1 + len(events)


def test_export_public_is_what_openssl_reads_and_the_public_key_of_the_csr(beside: Beside) -> None:
    csr = beside.csr()

    exported = beside.keys("export-public", key_id_in(csr)).stdout

    def openssl(*arguments: str, given: str) -> str:
        return subprocess.run(["openssl", *arguments], input=given, capture_output=True, text=True, check=True).stdout

    assert openssl("pkey", "-pubin", given=exported) == openssl("req", "-pubkey", "-noout", given=csr) == exported


# Ordering.


def test_retire_takes_an_active_key_out_of_use_at_once(beside: Beside) -> None:
    key = beside.active_key()

    result = beside.keys("retire", key)

    assert (result.exit_code, result.stdout) == (0, f"{key} is deactivated\n")
    assert not beside.file().exists()
    assert beside.private(key)


def renewed(beside: Beside) -> tuple[str, str]:
    """Two keys of which the first can be gone back to."""
    old = beside.active_key()
    beside.keys("confirm", old)
    return old, beside.active_key()


def test_restore_goes_back_and_confirm_begins_the_grace_period(beside: Beside) -> None:
    old, new = renewed(beside)

    result = beside.keys("restore", old, "--reason", "the CSMS refuses it")

    assert (result.exit_code, result.stdout) == (0, f"{old} is active\n")
    files = beside.files()
    assert beside.json("history", old)[-1]["reason"] == "the CSMS refuses it"
    shown = {key_id: beside.json("show", key_id) for key_id in (old, new)}
    assert [(shown[key]["state"], shown[key]["previous"], shown[key]["confirmed"]) for key in (old, new)] == [
        ("active", False, True),
        ("deactivated", True, False),
    ]
    assert "deactivated, previous" in beside.keys("list").stdout  # words: which key can be gone back to
    assert beside.keys("restore", new).stdout == f"{new} is active\n"
    assert beside.files() == files[::-1]
    assert beside.keys("confirm", new).stdout == f"{new} is active\n"
    assert beside.json("show", new)["confirmed"]


def test_restore_and_confirm_need_no_daemon(beside: Beside) -> None:
    old, new = renewed(beside)
    beside.daemon.terminate()
    try:
        assert [beside.keys("restore", key).exit_code for key in (old, new)] == [0, 0]
        assert beside.keys("confirm", new).exit_code == 0
        files = beside.files()
    finally:
        beside.daemon.start()

    assert beside.files() == files
    assert beside.json("show", new)["state"] == "active"


def test_destroy_leaves_nothing_of_the_key_on_disk_though_the_daemon_has_the_database_open(beside: Beside) -> None:
    key, kept = beside.active_key(), beside.key(STATION)
    private = beside.private(key)
    assert private in beside.on_disk()

    command = [sys.executable, "-m", "stationkey", "keys", "destroy", key, "--yes", "--reason", "sold"]
    result = subprocess.run(
        [*command, "--state-dir", str(beside.state_dir)], capture_output=True, text=True, check=True
    )

    assert result.stdout == f"{key} is destroyed\n"
    assert not beside.file().exists()
    assert private not in beside.on_disk()
    assert beside.private(kept) in beside.on_disk()
    assert beside.json("history", key)[-1]["reason"] == "sold"


def test_mark_compromised_takes_a_key_out_of_use_and_keeps_it_as_evidence(beside: Beside) -> None:
    key = beside.active_key()

    result = beside.keys("mark-compromised", key, "--yes")

    assert (result.exit_code, result.stdout) == (0, f"{key} is compromised\n")
    assert not beside.file().exists()
    assert beside.private(key)


@pytest.mark.parametrize("command", ["destroy", "mark-compromised"])
@pytest.mark.parametrize("answer", ["n\n", "\n", ""], ids=["no", "nothing said", "nobody there"])
def test_what_cannot_be_made_good_is_asked_for_first(beside: Beside, command: str, answer: str) -> None:
    key = beside.key()

    result = beside.keys(command, key, answer=answer)

    assert result.exit_code == 1
    assert f"{key} (v2g_certificate, pre-activation)?" in result.stderr  # words: which key, and what it is
    assert beside.json("show", key)["state"] == "pre-activation"


def test_who_says_yes_gets_it(beside: Beside) -> None:
    key = beside.key()

    assert beside.keys("destroy", key, answer="y\n").stdout == f"{key} is destroyed\n"


def test_the_daemon_goes_on_with_what_the_command_left(beside: Beside) -> None:
    destroyed = beside.active_key()
    beside.keys("destroy", destroyed, "--yes")

    renewed = beside.active_key()

    assert beside.json("show", renewed)["state"] == "active"
    assert beside.file().exists()


def test_commands_and_requests_can_come_at_once(beside: Beside) -> None:
    doomed = [beside.key() for _ in range(4)]
    results: list[int] = []
    ordering = threading.Thread(
        target=lambda: results.extend(beside.keys("destroy", key, "--yes").exit_code for key in doomed)
    )
    ordering.start()
    made = [beside.key(STATION) for _ in range(8)]
    ordering.join()

    states = {row["key_id"]: row["state"] for row in beside.json("list")}
    assert results == [0] * 4
    assert [states[key] for key in doomed] == ["destroyed"] * 4
    assert [states[key] for key in made] == ["pre-activation"] * 8


# Refusals.


@pytest.mark.parametrize("command", ["show", "history", "retire", "restore", "confirm", "export-public"])
def test_a_key_that_is_not_on_record_is_told_in_words(beside: Beside, command: str) -> None:
    for unknown in ("f" * 20, "no-hex", ""):
        with failing("key_not_found"):
            result = beside.keys(command, unknown)

        assert result.exit_code == 1
        assert f"key {unknown}" in result.stderr  # words: which key
        assert "stationkey keys list" in result.stderr  # words: the command that helps


def test_a_beginning_that_two_keys_have_is_refused_in_words(beside: Beside) -> None:
    beginnings = [row["key_id"][0] for row in beside.json("list")]
    while len(beginnings) == len(set(beginnings)):
        beginnings.append(beside.key()[0])
    twice = next(letter for letter in beginnings if beginnings.count(letter) > 1)

    with failing("key_not_found"):
        result = beside.keys("destroy", twice, "--yes")

    assert result.exit_code == 1
    assert f"{beginnings.count(twice)} keys" in result.stderr  # words: how many; an unknown key has this reason as well
    assert twice in result.stderr  # words: which beginning


def test_what_cannot_happen_to_a_key_is_refused_in_words(beside: Beside) -> None:
    key = beside.key()

    with failing("illegal_transition"):
        result = beside.keys("retire", key)

    assert result.exit_code == 1
    assert "pre-activation" in result.stderr  # words: the state
    assert "'retired'" in result.stderr  # words: the event
    assert beside.json("show", key)["state"] == "pre-activation"


@pytest.mark.parametrize("command", ["destroy", "mark-compromised"])
def test_a_destroyed_key_stays_destroyed(beside: Beside, command: str) -> None:
    key = beside.key()
    beside.keys("destroy", key, "--yes")

    with failing("illegal_transition"):
        result = beside.keys(command, key, "--yes")

    assert result.exit_code == 1
    assert "destroyed" in result.stderr  # words: the state


@pytest.mark.parametrize(
    "command",
    [("list",), ("show", "0"), ("history", "0"), ("retire", "0"), ("restore", "0"), ("destroy", "0", "--yes")],
    ids=lambda command: command[0],
)
def test_a_ledger_that_is_missing_is_told_in_words_and_not_made(tmp_path: Path, command: tuple[str, ...]) -> None:
    with failing("ledger_missing"):
        result = invoke("keys", *command, "--state-dir", tmp_path)

    assert result.exit_code == 1
    assert str(tmp_path / DATABASE_NAME) in result.stderr  # words: which file
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("list",), ("destroy", "0", "--yes")], ids=["to read", "to write"])
def test_a_ledger_of_another_version_is_refused_in_words(tmp_path: Path, command: tuple[str, ...]) -> None:
    path = tmp_path / DATABASE_NAME
    Ledger(path).close()
    for version, reason in ((SCHEMA_VERSION - 1, "ledger_older"), (SCHEMA_VERSION + 1, "ledger_newer")):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA user_version={version}")

        with failing(reason):
            result = invoke("keys", *command, "--state-dir", tmp_path)

        assert result.exit_code == 1
        assert f"version {version}" in result.stderr  # words: which version


def test_an_empty_ledger_is_no_error(tmp_path: Path) -> None:
    Ledger(tmp_path / DATABASE_NAME).close()

    table = invoke("keys", "list", "--state-dir", tmp_path)
    listed = invoke("keys", "list", "--json", "--state-dir", tmp_path)

    assert (table.exit_code, table.stdout) == (0, "no keys yet\n")
    assert json.loads(listed.stdout) == []


def test_a_key_that_changed_while_the_operator_thought_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He was asked about a pending key; it has become the active one since."""
    from recording import answer  # noqa: PLC0415 - used here alone

    path = tmp_path / DATABASE_NAME
    with closing(Ledger(path)) as ledger:
        key = answer(ledger)

    def installed_meanwhile(*_: object, **__: object) -> bool:
        with closing(Ledger(path)) as ledger:
            ledger.transitions.apply(key, KeyEvent.INSTALLED, reason="", now=0)
        return True

    monkeypatch.setattr("click.confirm", installed_meanwhile)

    with failing("key_changed"):
        result = invoke("keys", "destroy", key, "--state-dir", tmp_path)

    assert result.exit_code == 1
    assert f"{key} has become active" in result.stderr  # words: which key, and what it is now
    with closing(Ledger(path)) as ledger:
        assert ledger.keys.all()[0].state == "active"


@pytest.fixture
def two_active(tmp_path: Path) -> tuple[str, str]:
    """Two active keys of different owners on record, no file of theirs written."""
    from recording import answer  # noqa: PLC0415 - used here alone

    with closing(Ledger(tmp_path / DATABASE_NAME)) as ledger:
        found = answer(ledger, request(V2G)), answer(ledger, request(STATION))
        for key in found:
            ledger.transitions.apply(key, KeyEvent.INSTALLED, reason="", now=0)
    return found


def test_where_no_file_can_be_made_destroy_says_what_was_done_and_what_was_not(
    tmp_path: Path, two_active: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system without a free inode: the file that cannot be written is another key's."""
    key, other = two_active

    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("stationkey.system.files.exchange", full)

    result = invoke("keys", "destroy", key, "--yes", "--state-dir", tmp_path)

    assert (result.exit_code, result.stdout) == (1, f"{key} is destroyed\n")
    assert f"{key} is destroyed, but active/ is not up to date" in result.stderr
    with closing(Ledger(tmp_path / DATABASE_NAME)) as ledger:
        assert {row.key_id: row.state for row in ledger.keys.all()} == {key: "destroyed", other: "active"}
        assert not ledger.retention.wipe(), "it was wiped all the same"


def test_a_reader_that_never_ends_does_not_fail_destroy(tmp_path: Path, two_active: tuple[str, str]) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)) as reader:
        select = reader.execute("SELECT * FROM key")
        select.fetchone()

        result = invoke("keys", "destroy", two_active[0], "--yes", "--state-dir", tmp_path)
        select.close()

    assert (result.exit_code, result.stdout) == (0, f"{two_active[0]} is destroyed\n")
    assert "write-ahead log" in result.stderr


def test_a_long_list_is_written_a_part_at_a_time_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recording import answer  # noqa: PLC0415 - used here alone

    with closing(Ledger(tmp_path / DATABASE_NAME)) as ledger:
        made = [answer(ledger) for _ in range(5)]
    whole = invoke("keys", "list", "--state-dir", tmp_path).stdout
    for part in ("stationkey.cli._table._PART", "stationkey.ledger.keys._PART"):
        monkeypatch.setattr(part, 2)

    listed = invoke("keys", "list", "--json", "--state-dir", tmp_path).stdout

    assert invoke("keys", "list", "--state-dir", tmp_path).stdout == whole
    assert [line.split()[0] for line in whole.splitlines()] == ["KEY", *(key_id[:SHORT_ID] for key_id in made)]
    assert [key["key_id"] for key in json.loads(listed)] == made
    assert listed == json.dumps(json.loads(listed), indent=2) + "\n"
