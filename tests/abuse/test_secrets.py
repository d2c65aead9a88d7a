"""Secrets are looked for in every log, core and error path: in all that the daemon says, and in every file it leaves.

Not in the ledger, under ``active/`` and in the files that hold the secrets: there they are at home.
"""

from __future__ import annotations

import base64
import os
import secrets as random
import select
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_private_key
from leaks import files_of, found
from outside import BOUND, STATIONKEY, Josev, Station, generate_csr
from peers import Mosquitto, free_port
from rig import Rig

from secured import write_secret
from stationkey.system.state_dir import DATABASE_NAME

LOUD = {
    "TSS2_LOG": "all+trace",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONDEVMODE": "1",
    "PYTHONASYNCIODEBUG": "1",
    "STATIONKEY_LOG_FORMAT": "text",
}
"""Everything that can be made to say more says more."""
STATUS = {
    "id": "123e4567-e89b-12d3-a456-426614174000",
    "name": "certificate_installation_status",
    "type": "update",
    "data": {"certificate_type": "charging_station_certificate", "status": "installed"},
}


def test_a_secret_would_be_seen_in_whatever_form_it_is_shown() -> None:
    secret = random.token_bytes(120)
    shown = {
        "raw": secret,
        "hexadecimal": secret.hex().encode(),
        "a dump": secret.hex(" ").upper().encode(),
        "a dump over lines": "\n".join(secret.hex()[start : start + 32] for start in range(0, 240, 32)).encode(),
        "base64": base64.b64encode(secret),
        "base64 within a longer text": base64.b64encode(b"x" + secret + b"yz"),
        "base64 in lines": base64.encodebytes(b"xy" + secret + b"z"),
        "for URLs": base64.urlsafe_b64encode(secret),
        "URL-encoded": quote(secret).encode(),
        "as Python shows it": repr(secret).encode(),
        "a list of numbers": repr(list(secret)).encode(),
        "a part of it": secret[60:].hex().encode(),
    }

    assert [
        form for form, text in shown.items() if found({"secret": secret}, b"before " + text + b" behind") == []
    ] == []
    assert found({"secret": secret}, random.token_bytes(4096).hex().encode()) == []


class Scene(Rig):
    """A rig with secrets of every kind, and what is looked through at the end."""

    def __init__(self, folder: Path, *, tpm: bool) -> None:
        self.secrets = {"password": b"Pa55-" + random.token_urlsafe(12).encode()}
        self.home = folder / "secrets"
        self.home.mkdir()
        self.working = folder / "working"
        self.working.mkdir()
        self.password_file = write_secret(self.home / "password", self.secrets["password"] + b"\n")
        passwords = write_secret(self.home / "passwords", b"")
        subprocess.run(
            ["mosquitto_passwd", "-b", str(passwords), "stationkey", self.secrets["password"].decode()],
            check=True,
            capture_output=True,
        )
        lines = [
            "[deadlines]",
            "ec = 2",
            "[mqtt]",
            'username = "stationkey"',
            f'password_file = "{self.password_file}"',
        ]
        if tpm:
            self.secrets["key_auth"] = b"Auth-" + random.token_urlsafe(12).encode()
            key_auth = write_secret(self.home / "key_auth", self.secrets["key_auth"])
            lines += ["[tpm]", f'key_auth = "{key_auth}"', 'session = "encrypted"']
        broker = GuardedMosquitto(folder / "broker", passwords)
        super().__init__(folder, tpm=tpm, config="\n".join(lines) + "\n", broker=broker)
        self.daemon = self.station = Station(folder, *self.options(broker=broker.guarded_url), **LOUD)
        self.run_from(*STATIONKEY)
        self.said = b""

    def run_from(self, *program: str) -> None:
        """Run the daemon by this program, in a folder of its own, where a core would be left, however large."""
        in_folder = ("prlimit", "--core=unlimited", "env", f"--chdir={self.working}")
        self.station.run_by(*in_folder, *program)

    def learn_blobs(self) -> None:
        """The private parts in the ledger are secrets, too."""
        with closing(sqlite3.connect(self.station.state_dir / DATABASE_NAME)) as ledger:
            for number, scheme, blob in ledger.execute(
                "SELECT number, scheme, private FROM key JOIN secret ON key_number = number"
            ):
                self.secrets[f"private part of key {number}"] = blob if scheme == "tpm2" else _scalar(blob)

    def look_at_keys(self, key_id: str) -> None:
        """Everything that an operator can ask for."""
        for command in (
            ["list"],
            ["list", "--json"],
            ["show", key_id],
            ["show", key_id, "--json"],
            ["history", key_id],
        ):
            self._command("keys", *command)
        self._command("keys", "export-public", key_id)
        self._command("keys", "destroy", "nothing", "--yes")

    def _command(self, *arguments: str) -> None:
        ended = subprocess.run(
            [*STATIONKEY, *arguments, "--state-dir", str(self.station.state_dir)],
            env={**os.environ, **self.station.environment},
            capture_output=True,
            check=False,
            timeout=30,
            cwd=self.working,
        )
        self.said += ended.stdout + ended.stderr

    def leaks(self) -> dict[str, list[str]]:
        """Where a secret is that it should not be."""
        self.said += "\n".join(self.station.lines).encode()
        state = self.station.state_dir
        kept = (self.home, state / "active", state / "tpm", *state.glob(f"{DATABASE_NAME}*"))
        # The broker knows the password, and Mosquitto 2.0.11 even writes it into its database, by chance.
        kept += (self.broker.directory,)
        kept += (self.tpm.directory,)
        outputs = {str(path): path.read_bytes() for path in files_of(self.folder, but=kept)}
        outputs["what was said"] = self.said + self.broker.log.encode()
        return {name: leaked for name, output in outputs.items() if (leaked := found(self.secrets, output))}


class GuardedMosquitto(Mosquitto):
    """A broker with a second listener, that asks for a password; Josev's is the first."""

    def __init__(self, directory: Path, passwords: Path) -> None:
        self.guarded_port = free_port()
        lines = [
            "per_listener_settings true",
            f"listener {self.guarded_port} 127.0.0.1",
            "allow_anonymous false",
            f"password_file {passwords}",
        ]
        super().__init__(directory, *lines)
        configuration = directory / "mosquitto.conf"
        # It must come before the listeners that it is about.
        text = configuration.read_text().replace("per_listener_settings true\n", "")
        configuration.write_text("per_listener_settings true\n" + text)

    @property
    def guarded_url(self) -> str:
        return f"mqtt://127.0.0.1:{self.guarded_port}"


def _scalar(pkcs8: bytes) -> bytes:
    """The private part of a software key, without the public one beside it."""
    key = load_der_private_key(pkcs8, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_numbers().private_value.to_bytes(32, "big")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """With keys in a TPM."""
    with Scene(tmp_path, tpm=True) as made:
        yield made


@pytest.fixture
def soft_scene(tmp_path: Path) -> Iterator[Scene]:
    """With software keys, which are plain in memory."""
    with Scene(tmp_path, tpm=False) as made:
        yield made


def rejected(josev: Josev, scene: Scene, reason: str, common_name: str = "station 1") -> None:
    request = generate_csr(common_name=common_name)
    assert josev.ask(request).data == {"status": "rejected"}
    scene.station.wait_for_lines(
        lambda lines: any(request["id"] in line and f"reason={reason}" in line for line in lines)
    )


def test_no_secret_is_said_or_left_behind_while_everything_goes_wrong(scene: Scene) -> None:
    """The TPM killed and frozen, no room, a damaged ledger; with every library as talkative as it can be made."""
    station, tpm = scene.station, scene.tpm
    with station, Josev(scene.broker) as josev:
        josev.ask(generate_csr()).csr  # noqa: B018 - it must be accepted
        josev.publish(STATUS)
        station.wait_for("written")
        scene.learn_blobs()
        tpm.freeze()
        rejected(josev, scene, "keystore_timeout")
        tpm.thaw()
        josev.ask(generate_csr()).csr  # noqa: B018 - same
        tpm.kill()
        rejected(josev, scene, "tpm_unreachable")
        tpm.start()
        scene.learn_blobs()
        assert station.process is not None
        subprocess.run(["prlimit", f"--pid={station.process.pid}", "--fsize=0"], check=True)
        rejected(josev, scene, "ledger_error")
        scene.look_at_keys(next(iter(_key_ids(station.state_dir))))
        station.kill()
        database = station.state_dir / DATABASE_NAME
        with closing(sqlite3.connect(database)) as ledger:
            ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = database.read_bytes()
        database.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        station.launch()
        assert station.ended() == 1
        scene.look_at_keys("00")

    assert len(scene.secrets) >= 4
    assert scene.leaks() == {}
    # The counter-check: they are where they belong, and would be found there.
    assert found(scene.secrets, content) == [name for name in scene.secrets if "private part" in name]


def _key_ids(state_dir: Path) -> list[str]:
    with closing(sqlite3.connect(state_dir / DATABASE_NAME)) as ledger:
        return [row[0] for row in ledger.execute("SELECT key_id FROM key")]


def test_a_wrong_password_is_not_repeated_by_whoever_refuses_it(soft_scene: Scene) -> None:
    scene = soft_scene
    right = scene.secrets["password"]
    scene.secrets["wrong password"] = b"Wrong-" + random.token_urlsafe(12).encode()
    write_secret(scene.password_file, scene.secrets["wrong password"])

    scene.station.launch()
    scene.station.wait_for("broker_refuses")
    write_secret(scene.password_file, right)
    scene.station.wait_for("INFO    ready")
    scene.station.stop()

    assert scene.leaks() == {}


def test_a_fault_of_ours_shows_its_traceback_and_no_secret(soft_scene: Scene) -> None:
    """Whatever an error has at hand and shows by repr: keys, requests, the ledger, the settings."""
    scene = soft_scene
    scene.run_from(sys.executable, str(Path(__file__).parent / "leaking_daemon.py"))
    with scene.station as station, Josev(scene.broker) as josev:
        josev.ask(generate_csr()).csr  # noqa: B018 - it must be accepted
        for name in ("sign", "record"):
            rejected(josev, scene, "internal_error", common_name=name)
        josev.publish(STATUS)
        station.wait_for_lines(lambda lines: "\n".join(lines).count("Traceback") >= 3)
        scene.learn_blobs()
        station.stop()
    said = "\n".join(station.lines)

    assert said.count("Traceback") == 3
    assert "KeyRef(" in said
    assert scene.leaks() == {}


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGQUIT, signal.SIGSEGV], ids=lambda number: number.name)
def test_a_daemon_that_is_aborted_leaves_no_secret_behind(soft_scene: Scene, number: signal.Signals) -> None:
    """Python's fault handler shows where each thread was; a core would show all. However large cores may be."""
    scene = soft_scene
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell's background job ignores it, and so would its children
    with scene.station as station, Josev(scene.broker) as josev:
        josev.ask(generate_csr()).csr  # noqa: B018 - it must be accepted
        scene.learn_blobs()
        assert station.process is not None
        with os.fdopen(os.pidfd_open(station.process.pid)) as process:
            station.signal(number)
            assert select.select([process], [], [], BOUND)[0] == [process]
        ended = os.waitid(os.P_PID, station.process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert ended.si_code == os.CLD_KILLED  # and not CLD_DUMPED: also none that goes through a pipe

    assert list(scene.working.iterdir()) == []
    assert scene.leaks() == {}
