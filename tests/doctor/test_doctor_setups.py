"""The doctor on real set-ups, broken in real ways: swtpm, Mosquitto, files, disks and other users."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from doctors import NOBODY, Pki, as_nobody, command_output, look, read, write_config
from peers import Bus, Daemon, Mosquitto, ResourceManager, Swtpm, free_port, search_path

from parts import station
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.contract.profiles import Algorithm
from stationkey.doctor import AREAS, Level
from stationkey.errors import StationKeyError
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.ledger import Ledger
from stationkey.mqtt.connection import connect
from stationkey.mqtt.url import Broker
from stationkey.system.state_dir import DATABASE_NAME, StateDirectory

ROOT = Path(__file__).parents[2]
DOCTOR = [sys.executable, "-m", "stationkey", "doctor"]


def tool(tpm: Swtpm, *words: str, fails: bool = False) -> None:
    """A program of tpm2-tools."""
    done = subprocess.run(
        words, env={**os.environ, "TPM2TOOLS_TCTI": tpm.tcti}, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stderr


def child_with(parent: int, word: str) -> int:
    """A process that another has started and that has a word in its command line, or 0."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_child = (process / "stat").read_text().rpartition(")")[2].split()[1] == str(parent)
            if is_child and word in (process / "cmdline").read_text():
                return int(process.name)
    return 0


def digest(directory: Path) -> dict[str, tuple[str, int, int]]:
    """All that is in a directory: content, mode and time of change."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
    }


def used(folder: Path, *, keystore: str = "software:", installed: bool = True) -> Path:
    """A state directory with a key in it; active, where it is `installed`."""

    async def use() -> None:
        async with station(folder / "state", keystore=keystore) as one:
            await one.key()
            if installed:
                await one.told("installed")

    asyncio.run(use())
    return folder / "state"


class TestWhereAllIsWell:
    def test_there_is_no_failure(self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm) -> None:
        used(tmp_path, keystore=swtpm.uri)
        found = look(tmp_path, broker=mosquitto.url, keystore=swtpm.uri)
        assert found.failures == set()
        assert found.level("tpm.keys") is found.level("tpm.srk") is found.level("state.ledger") is Level.OK
        assert found.level("state.active") is found.level("broker.delay") is Level.OK

    def test_nothing_is_changed_on_the_disk_and_in_the_tpm(
        self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
    ) -> None:
        tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "ecc", "-c", str(tmp_path / "stray"))  # stays loaded
        (tmp_path / "state").mkdir(mode=0o700)
        look(tmp_path, broker=mosquitto.url, keystore=swtpm.uri)
        left = subprocess.run(
            ["tpm2_getcap", "handles-persistent"],
            env={**os.environ, "TPM2TOOLS_TCTI": swtpm.tcti},
            capture_output=True,
            text=True,
            check=True,
        )
        loaded = subprocess.run(
            ["tpm2_getcap", "handles-transient"],
            env={**os.environ, "TPM2TOOLS_TCTI": swtpm.tcti},
            capture_output=True,
            text=True,
            check=True,
        )
        assert left.stdout == ""
        assert len(loaded.stdout.splitlines()) == 1
        assert list((tmp_path / "state").iterdir()) == []

    @pytest.mark.parametrize("cut", [False, True], ids=["after an end in order", "after a loss of power"])
    def test_a_ledger_is_read_without_a_trace(self, tmp_path: Path, cut: bool) -> None:
        state = used(tmp_path)
        if cut:  # as it lies there while it is open
            with closing(sqlite3.connect(state / DATABASE_NAME)) as writer:
                writer.execute("INSERT INTO meta VALUES ('a', 'b')")
                writer.commit()
                shutil.copytree(state, tmp_path / "cut")
            shutil.rmtree(state)
            (tmp_path / "cut").rename(state)
            (state / f"{DATABASE_NAME}-shm").unlink()
        before = digest(state)
        assert (state / f"{DATABASE_NAME}-wal").exists() is cut
        found = look(tmp_path)
        assert found.level("state.ledger") is Level.OK
        assert digest(state) == before

    def test_the_running_daemon_is_seen_and_not_disturbed(
        self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
    ) -> None:
        options = ("--broker", mosquitto.url, "--keystore", swtpm.uri, "--state-dir", str(tmp_path / "state"))
        with Daemon(tmp_path / "daemon", *options) as daemon:
            found = look(tmp_path, broker=mosquitto.url, keystore=swtpm.uri)
            assert daemon.process is not None
            assert f"process {daemon.process.pid}" in found.text("state.daemon")
            assert found.failures == set()
            assert "warning" not in daemon.run_log

    def test_through_a_resource_manager_the_tpm_is_shared(self, tmp_path: Path, swtpm: Swtpm) -> None:
        with (
            Bus(tmp_path / "bus") as bus,
            ResourceManager(tmp_path / "abrmd", tpm=swtpm.tcti, bus=bus) as manager,
        ):
            text = command_output(
                [*DOCTOR, "--json", "--keystore", f"tpm2:{manager.tcti}", "--state-dir", str(tmp_path / "state")],
                {**os.environ, **manager.environment},
            )
        assert read(text).level("tpm.manager") is read(text).level("tpm.slots") is Level.OK
        assert read(text).level("tpm.reachable") is Level.OK


class TestTheCommand:
    def test_nothing_at_all_is_a_report_and_status_1(self, tmp_path: Path) -> None:
        environment = {
            "STATIONKEY_BROKER": f"mqtt://127.0.0.1:{free_port()}",
            "STATIONKEY_STATE_DIR": str(tmp_path / "x"),
        }
        done = subprocess.run(
            [*DOCTOR, "--config", str(tmp_path / "none.toml")],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr == ""
        assert "FAILURE   config.file: there is no configuration file" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("2 failures, ")
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "\x1b" not in done.stdout

    def test_warnings_alone_are_status_0(self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm) -> None:
        options = ["--broker", mosquitto.url, "--keystore", swtpm.uri, "--state-dir", str(tmp_path / "state")]
        done = subprocess.run([*DOCTOR, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "0 failures" in done.stdout.splitlines()[-1]

    def test_wrong_usage_is_status_2(self) -> None:
        assert subprocess.run([*DOCTOR, "--bogus"], capture_output=True, check=False).returncode == 2

    def test_every_check_is_in_every_report(self, tmp_path: Path) -> None:
        text = command_output([*DOCTOR, "--json", "--state-dir", str(tmp_path / "state")])
        report = json.loads(text)
        assert report["version"] == 1
        assert {one["id"] for one in report["findings"]} == set(AREAS)
        assert sum(report["summary"].values()) == len(report["findings"])

    def test_a_hung_tpm_and_a_silent_broker_do_not_hang_it(self, tmp_path: Path, swtpm: Swtpm) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            swtpm.freeze()
            found = look(tmp_path, keystore=swtpm.uri, broker=f"mqtt://127.0.0.1:{silent.getsockname()[1]}")
            swtpm.thaw()
        assert "does not answer" in found.text("tpm.reachable")
        assert "says nothing" in found.text("broker.login")
        assert found.level("state.directory") is not Level.NOT_CHECKED

    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_where_the_report_cannot_be_written_that_is_said_in_a_line(self, tmp_path: Path, form: list[str]) -> None:
        with Path("/dev/full").open("w") as full:
            command = [*DOCTOR, *form, "--state-dir", str(tmp_path / "state")]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "stationkey: the report cannot be written: No space left on device\n"

    def test_without_a_standard_output_the_exit_status_tells(
        self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
    ) -> None:
        options = f"--broker {mosquitto.url} --keystore {swtpm.uri} --state-dir {tmp_path}/state"
        for more, status in (("", 0), (" --config /none", 1)):
            command = ["sh", "-c", f"exec {' '.join(DOCTOR)} {options}{more} >&-"]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            assert (done.returncode, done.stderr) == (status, "")

    def test_with_it_ends_what_waits_for_a_tpm_that_hangs(self, tmp_path: Path, swtpm: Swtpm) -> None:
        """Whoever stops the doctor, ``timeout`` for example, leaves no process behind that waits for ever."""
        swtpm.freeze()
        command = [*DOCTOR, "--keystore", swtpm.uri, "--state-dir", str(tmp_path / "state")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as doctor:
            while not (probe := child_with(doctor.pid, "stationkey.doctor.tpm.probe")):
                assert doctor.poll() is None
            ended = os.pidfd_open(probe)
            doctor.terminate()
        assert select.select([ended], [], [], 30)[0]
        os.close(ended)
        swtpm.thaw()

    def test_a_pipe_in_place_of_the_configuration_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert "is no file" in look(tmp_path, config_file=tmp_path / "pipe").text("config.file")


class TestConfiguration:
    def test_every_mistake_is_told_at_once_and_what_is_right_is_used(self, tmp_path: Path) -> None:
        text = f'broker = "mqtt://127.0.0.1:{free_port()}"\nbrocker = 1\n[pool]\nrsa = "many"\n[deadlines]\nec = -1\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text), broker=None)
        assert all(word in found.text("config.file") for word in ("brocker", "$.pool.rsa", "$.deadlines.ec"))
        assert text.split('"')[1] in found.text("broker.url")

    @pytest.mark.parametrize("text", ["broker = ", "\x00", "a = 1\na = 2", "broker = 1\nkeystore = 2\nstate_dir = 3\n"])
    def test_a_wrong_file_is_the_only_failure(self, tmp_path: Path, text: str) -> None:
        """What it says of the rest is not known; that nothing is where it is guessed says nothing."""
        config = write_config(tmp_path, text)
        found = look(tmp_path, config_file=config, broker=None, keystore=None, state_dir=None)
        assert found.failures == {"config.file"}
        assert found.level("tpm.keystore") is found.level("broker.url") is Level.NOT_CHECKED
        assert "config.file" in found.text("broker.port")

    def test_one_mistake_in_a_section_does_not_cost_the_rest_of_it(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        text = f'[mqtt]\nusername = "us"\npassword_file = "{secret}"\nca_fiel = "ca"\nserver_name = 1\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text))
        assert all(word in found.text("config.file") for word in ("ca_fiel", "server_name"))
        assert str(secret) in found.text("config.secrets")

    def test_what_two_names_are_together_is_told_too(self, tmp_path: Path) -> None:
        text = '[mqtt]\npassword_file = "/x"\nca_fiel = "ca"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text))
        assert all(word in found.text("config.file") for word in ("ca_fiel", "no username"))

    def test_a_byte_order_mark_is_no_mistake(self, tmp_path: Path) -> None:
        """Nobody sees it, and what is said of it would point at a line without a fault."""
        config = write_config(tmp_path, "")
        config.write_bytes(b"\xef\xbb\xbfbroker = 'mqtt://127.0.0.1:1'\n")
        found = look(tmp_path, config_file=config, broker=None)
        assert found.level("config.file") is Level.OK
        assert "mqtt://127.0.0.1:1" in found.text("broker.url")

    def test_a_file_that_this_user_may_not_read_says_nothing_of_the_daemon(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("root makes a file that another user may not read")
        for directory in (tmp_path, *tmp_path.parents):
            if len(directory.parts) > 3:
                directory.chmod(0o711)
        found = as_nobody(tmp_path, config=write_config(tmp_path, ""))
        assert found.level("config.file") is Level.NOT_CHECKED
        assert "run it as root" in found.text("config.file")

    @pytest.mark.parametrize("line", ['state_dir = "state"', '[mqtt]\nca_file = "~/ca.pem"', '[tpm]\nsrk_auth = "a/b"'])
    def test_a_path_that_leads_elsewhere_for_a_service_is_told(self, tmp_path: Path, line: str) -> None:
        found = look(tmp_path, config_file=write_config(tmp_path, line + "\n"), state_dir=None)
        assert line.split('"')[1] in found.text("config.sense")

    @pytest.mark.parametrize(
        ("listen", "words"),
        [
            pytest.param("127.0.0.1:{port}", "another program listens", id="a port that is taken"),
            pytest.param("unix:{folder}/none/socket", "no directory", id="a directory that is not there"),
            pytest.param("nonsense", "no address with a port", id="no address"),
            pytest.param("0.0.0.0:9464", "other machines", id="open to others"),
        ],
    )
    def test_where_the_daemon_could_not_listen_is_a_failure(self, tmp_path: Path, listen: str, words: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            where = listen.format(port=other.getsockname()[1], folder=tmp_path)
            found = look(tmp_path, config_file=write_config(tmp_path, f'[metrics]\nlisten = "{where}"\n'))
        assert found.level("config.sense") is Level.FAILURE
        assert words in found.text("config.sense")

    def test_an_availability_topic_that_is_one_of_the_others_is_a_failure(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, 'topic_prefix = "a"\n[mqtt]\navailability_topic = "josev/cs"\n')
        assert "availability_topic" in look(tmp_path, config_file=config).text("config.sense")

    @pytest.mark.parametrize("text", ["broker = ", "\x00", "a = 1\na = 2"])
    def test_what_is_no_toml_is_told(self, tmp_path: Path, text: str) -> None:
        found = look(tmp_path, config_file=write_config(tmp_path, text))
        assert "is no TOML" in found.text("config.file")

    def test_a_file_that_others_may_write_is_a_failure(self, tmp_path: Path) -> None:
        found = look(tmp_path, config_file=write_config(tmp_path, "", mode=0o666))
        assert found.level("config.rights") is Level.FAILURE
        assert "chmod o-w" in found.text("config.rights")

    @pytest.mark.parametrize(
        ("content", "mode", "level", "words"),
        [
            pytest.param("hunter2\n", 0o600, Level.OK, "closed to others", id="as it should be"),
            pytest.param("hunter2\n", 0o644, Level.FAILURE, "chmod o=", id="open to everybody"),
            pytest.param("", 0o600, Level.FAILURE, "is empty", id="empty"),
            pytest.param("hunter2 \n", 0o600, Level.WARNING, "white space", id="a blank at the end"),
            pytest.param("h" * 5000, 0o600, Level.FAILURE, "more than 4096", id="too long"),
        ],
    )
    def test_of_a_secret_its_file_is_told_and_never_its_content(
        self, tmp_path: Path, content: str, mode: int, level: Level, words: str
    ) -> None:
        (tmp_path / "password").write_text(content)
        (tmp_path / "password").chmod(mode)
        text = f'[mqtt]\nusername = "us"\npassword_file = "{tmp_path}/password"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text))
        assert found.level("config.secrets") is level
        assert words in found.text("config.secrets")
        assert "hunter2" not in json.dumps(found.report.to_json())

    def test_a_password_in_place_of_its_file_s_name_is_not_shown(self, tmp_path: Path) -> None:
        text = '[mqtt]\nusername = "us"\npassword_file = "hunter2"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text), broker="mqtt://user:hunter3@localhost")
        assert found.level("config.secrets") is Level.FAILURE
        assert "hunter" not in json.dumps(found.report.to_json())

    @pytest.mark.parametrize(
        ("harm", "level"),
        [
            ("", Level.OK),
            ("mode", Level.WARNING),
            ("file", Level.FAILURE),
            ("missing", Level.FAILURE),
            ("many", Level.FAILURE),
            ("loop", Level.FAILURE),
        ],
    )
    def test_the_directory_of_certificates_is_looked_at(self, tmp_path: Path, harm: str, level: Level) -> None:
        directory = tmp_path / "certificates"
        if harm == "file":
            directory.touch()
        elif harm == "loop":
            directory.symlink_to(directory)
        elif harm != "missing":
            directory.mkdir()
            directory.chmod(0o777 if harm == "mode" else 0o755)
        for number in range(1100 if harm == "many" else 0):
            (directory / str(number)).touch()
        config = write_config(tmp_path, f'[josev]\ncertificate_dir = "{directory}"\n')
        assert look(tmp_path, config_file=config).level("config.certificate_dir") is level

    @pytest.mark.parametrize(
        ("harm", "level", "words"),
        [
            ("", Level.OK, ""),
            ("missing", Level.FAILURE, "ca.pem"),
            ("no certificate", Level.FAILURE, "station.pem"),
            ("no key", Level.FAILURE, "station.key"),
            ("no CA", Level.WARNING, "ca_file"),
            ("broken", Level.FAILURE, "station.pem"),
            ("broken key", Level.FAILURE, "station.key"),
            ("another key", Level.FAILURE, "station.key"),
            ("in the TPM", Level.OK, ""),
            ("large", Level.FAILURE, "ca.pem"),
            ("DER", Level.FAILURE, "openssl x509 -inform DER"),
            ("PKCS #12", Level.FAILURE, "openssl pkcs12"),
        ],
    )
    def test_the_files_of_tls_are_judged(self, tmp_path: Path, harm: str, level: Level, words: str) -> None:
        pki = Pki(tmp_path / "pki")
        certificate, key = pki.issue("station")
        ca = certificate if harm == "no CA" else pki.ca_file
        if harm == "missing":
            ca.unlink()
        written = {
            "no certificate": (certificate, b""),
            "no key": (key, certificate.read_bytes()),
            "broken": (certificate, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            "broken key": (key, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
            "another key": (key, pki.issue("other")[1].read_bytes()),
            "in the TPM": (key, b"-----BEGIN TSS2 PRIVATE KEY-----\nAAAA\n-----END TSS2 PRIVATE KEY-----\n"),
            "DER": (ca, x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)),
            "PKCS #12": (ca, b"\x30\x82\x01\x00" + bytes(256)),
            "large": (ca, bytes(2**20 + 1)),
        }
        if harm in written:
            written[harm][0].write_bytes(written[harm][1])
        text = f'[mqtt]\nca_file = "{ca}"\ncertificate_file = "{certificate}"\nkey_file = "{key}"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text), broker="mqtts://localhost:1")
        assert found.level("config.tls") is level
        assert words in found.text("config.tls")


class TestTpm:
    def test_a_tpm_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        found = look(tmp_path, keystore=f"tpm2:swtpm:host=127.0.0.1,port={free_port()}")
        assert found.level("tpm.reachable") is Level.FAILURE
        assert "start the simulator" in found.text("tpm.reachable")
        assert found.level("tpm.lockout") is Level.NOT_CHECKED

    @pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/tty", "{}/file"])
    def test_what_is_no_tpm_is_not_written_to(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").touch()
        found = look(tmp_path, keystore=f"tpm2:device:{path.format(tmp_path)}")
        assert found.level("tpm.device") is Level.FAILURE
        assert found.level("tpm.reachable") is Level.NOT_CHECKED
        assert (tmp_path / "file").read_bytes() == b""

    def test_a_library_that_is_not_installed_is_named(self, tmp_path: Path) -> None:
        found = look(tmp_path, keystore="tpm2:bogus:device")
        assert "libtss2-tcti-bogus" in found.text("tpm.reachable")
        assert found.level("software.tss") is Level.FAILURE

    def test_a_tpm_that_waits_for_its_start_up_is_not_started(self, tmp_path: Path) -> None:
        with Swtpm(tmp_path / "tpm", startup=False) as tpm:
            for _ in range(2):
                found = look(tmp_path, keystore=tpm.uri)
                assert found.level("tpm.started") is Level.WARNING
                assert "TPM2_Startup" in found.text("tpm.lockout")

    def test_a_lockout_is_a_failure_with_the_way_out(self, tmp_path: Path, swtpm: Swtpm) -> None:
        lock = ("--max-tries=1", "--recovery-time=1000", "--lockout-recovery-time=1000")
        tool(swtpm, "tpm2_dictionarylockout", "--setup-parameters", *lock)
        primary = str(tmp_path / "primary")
        tool(swtpm, "tpm2_createprimary", "-C", "e", "-G", "ecc", "-p", "right", "-c", primary)
        files = ("-u", str(tmp_path / "public"), "-r", str(tmp_path / "private"))
        tool(swtpm, "tpm2_create", "-C", primary, "-P", "wrong", *files, fails=True)
        found = look(tmp_path, keystore=swtpm.uri)
        assert found.level("tpm.lockout") is Level.FAILURE
        assert "tpm2_dictionarylockout --clear-lockout" in found.text("tpm.lockout")
        tool(swtpm, "tpm2_dictionarylockout", "--clear-lockout")
        assert look(tmp_path, keystore=swtpm.uri).level("tpm.lockout") is Level.OK

    def test_slots_full_of_what_others_left_are_told(self, tmp_path: Path, swtpm: Swtpm) -> None:
        for number in range(3):
            tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "ecc", "-c", str(tmp_path / str(number)))
        found = look(tmp_path, keystore=swtpm.uri)
        assert found.level("tpm.slots") is Level.WARNING
        assert "are full: 3 objects" in found.text("tpm.slots")

    def test_another_key_in_the_place_of_the_storage_root_key_is_a_failure(self, tmp_path: Path, swtpm: Swtpm) -> None:
        primary = str(tmp_path / "primary")
        tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "rsa2048", "-c", primary)
        tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", primary, "0x81000001")
        found = look(tmp_path, keystore=swtpm.uri)
        assert "a key of type RSA at 0x81000001" in found.text("tpm.srk")
        config = write_config(tmp_path, "[tpm]\nsrk_handle = 0x81000002\n")
        assert look(tmp_path, keystore=swtpm.uri, config_file=config).level("tpm.srk") is Level.OK

    def test_an_owner_s_password_that_nobody_names_is_a_failure(self, tmp_path: Path, swtpm: Swtpm) -> None:
        tool(swtpm, "tpm2_changeauth", "-c", "owner", "hunter2")
        found = look(tmp_path, keystore=swtpm.uri)
        assert "owner_auth" in found.text("tpm.srk")
        assert found.level("tpm.srk") is Level.FAILURE

    @pytest.mark.parametrize(("value", "level"), [("hunter2", Level.OK), ("hunter3", Level.FAILURE)])
    def test_the_owner_s_password_is_tried(self, tmp_path: Path, swtpm: Swtpm, value: str, level: Level) -> None:
        tool(swtpm, "tpm2_changeauth", "-c", "owner", "hunter2")
        tool(swtpm, "tpm2_changeauth", "-c", "lockout", "hunter4")
        (tmp_path / "owner").write_text(value)
        (tmp_path / "owner").chmod(0o600)
        config = write_config(tmp_path, f'[tpm]\nowner_auth = "{tmp_path}/owner"\n')
        found = look(tmp_path, keystore=swtpm.uri, config_file=config)
        assert found.level("tpm.authorisation") is level
        assert found.level("tpm.lockout") is Level.OK
        assert "hunter" not in json.dumps(found.report.to_json())

    @pytest.mark.parametrize("noda", [True, False])
    def test_a_storage_root_key_with_a_password_is_found_out_without_a_wrong_try(
        self, tmp_path: Path, swtpm: Swtpm, noda: bool
    ) -> None:
        """Where wrong tries are counted nothing is tried: to look must not bring the TPM nearer to its lockout."""
        attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt" + "|noda" * noda
        key, words = str(tmp_path / "key"), ("-G", "ecc256:aes128cfb", "-p", "hunter2", "-a", attributes)
        tool(swtpm, "tpm2_createprimary", "-C", "o", *words, "-c", key)
        tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", key, "0x81000001")
        tool(swtpm, "tpm2_flushcontext", "-t")
        found = look(tmp_path, keystore=swtpm.uri)
        assert found.level("tpm.srk") is (Level.FAILURE if noda else Level.WARNING)
        assert found.level("tpm.lockout") is Level.OK
        if noda:
            assert "srk_auth" in found.text("tpm.srk")
            tool(swtpm, *found.text("tpm.srk").rpartition(": ")[2].split())
            assert look(tmp_path, keystore=swtpm.uri).level("tpm.srk") is Level.OK

    def test_advice_about_what_has_a_password_says_where_it_goes(self, tmp_path: Path, swtpm: Swtpm) -> None:
        key = str(tmp_path / "key")
        tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "ecc384:aes256cfb", "-g", "sha384", "-c", key)
        tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", key, "0x81000001")
        tool(swtpm, "tpm2_flushcontext", "-t")
        tool(swtpm, "tpm2_changeauth", "-c", "owner", "hunter2")
        found = look(tmp_path, keystore=swtpm.uri)
        assert "the curve P-384" in found.text("tpm.srk")
        command = found.text("tpm.srk").partition("needs it: ")[2].partition(";")[0]
        tool(swtpm, *command.replace("PASSWORD", "hunter2").split())
        assert "owner_auth" in look(tmp_path, keystore=swtpm.uri).text("tpm.srk")

    @pytest.mark.parametrize("password", [[], ["-p", "hunter2"]], ids=["without a password", "with one"])
    def test_a_protection_that_is_switched_off_is_told(self, tmp_path: Path, swtpm: Swtpm, password: list[str]) -> None:
        off = ("--setup-parameters", "--max-tries=3", "--recovery-time=0", "--lockout-recovery-time=0")
        tool(swtpm, "tpm2_dictionarylockout", *off)
        if password:
            tool(swtpm, "tpm2_changeauth", "-c", "lockout", "hunter2")
        (found,) = look(tmp_path, keystore=swtpm.uri)["tpm.lockout"]
        assert found.level is Level.WARNING
        tool(swtpm, *found.advice.replace("PASSWORD", "hunter2").split())
        assert look(tmp_path, keystore=swtpm.uri).level("tpm.lockout") is Level.OK

    @pytest.mark.parametrize(
        ("tcti", "name", "words"),
        [
            pytest.param("swtpm:host=127.0.0.1,port={control}", "tpm.reachable", "--ctrl", id="its other port"),
            pytest.param("swtpm:host=127.0.0.1,port={broker}", "tpm.reachable", "--ctrl", id="a broker"),
            pytest.param("swtpm:path={folder}/none", "tpm.device", "/none", id="no such socket"),
            pytest.param("swtpm:path={folder}/file", "tpm.device", "/file", id="no socket"),
            pytest.param(" swtpm:port=1", "tpm.reachable", "blanks", id="a blank"),
            pytest.param("device:{folder}/link", "tpm.device", "/link", id="a link that leads nowhere"),
        ],
    )
    def test_what_is_wrong_with_the_way_to_it_is_told(
        self, tmp_path: Path, swtpm: Swtpm, mosquitto: Mosquitto, tcti: str, name: str, words: str
    ) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to(tmp_path / "nothing")
        tcti = tcti.format(folder=tmp_path, control=swtpm.port + 1, broker=mosquitto.port)
        found = look(tmp_path, keystore=f"tpm2:{tcti}")
        assert found.level(name) is Level.FAILURE
        assert words in found.text(name)

    def test_active_keys_of_another_tpm_are_named(self, tmp_path: Path, swtpm: Swtpm) -> None:
        state = used(tmp_path, keystore=swtpm.uri)
        swtpm.terminate()
        swtpm.new_chip()
        swtpm.start()
        cleared = look(tmp_path, keystore=swtpm.uri)
        assert cleared.level("tpm.srk") is cleared.level("tpm.keys") is Level.FAILURE
        with closing(Tpm2KeyStore(swtpm.tcti)) as store:
            store.generate(Algorithm.ECDSA_SHA256)  # another chip, with a storage root key of its own
        exchanged = look(tmp_path, keystore=swtpm.uri)
        with closing(Ledger(state / DATABASE_NAME, read_only=True)) as ledger:
            (key,) = ledger.keys.all()
        assert f"{key.key_id} (v2g_certificate) was made by another TPM" in exchanged.text("tpm.keys")

    def test_software_keys_are_a_warning_where_they_are_allowed(self, tmp_path: Path) -> None:
        assert look(tmp_path).level("tpm.keystore") is Level.FAILURE
        assert look(tmp_path, allow_software_keys=True).level("tpm.keystore") is Level.WARNING


class TestState:
    def test_a_damaged_ledger_is_a_failure(self, tmp_path: Path) -> None:
        database = used(tmp_path) / DATABASE_NAME
        content = bytearray(database.read_bytes())
        content[4096:8192] = bytes(4096)
        database.write_bytes(content)
        found = look(tmp_path)
        assert found.level("state.ledger") is Level.FAILURE
        assert "restore a backup" in found.text("state.ledger")

    @pytest.mark.parametrize(
        ("content", "level"), [(b"", Level.WARNING), (b"no database", Level.FAILURE), (None, Level.FAILURE)]
    )
    def test_what_is_no_ledger_is_told(self, tmp_path: Path, content: bytes | None, level: Level) -> None:
        (tmp_path / "state").mkdir(mode=0o700)
        if content is None:
            (tmp_path / "state" / DATABASE_NAME).mkdir()
        else:
            (tmp_path / "state" / DATABASE_NAME).write_bytes(content)
        assert look(tmp_path).level("state.ledger") is level

    def test_a_ledger_that_is_held_by_another_program_keeps_no_check_waiting(self, tmp_path: Path) -> None:
        database = used(tmp_path) / DATABASE_NAME
        with closing(sqlite3.connect(database, isolation_level=None)) as holder:
            holder.execute("PRAGMA journal_mode=DELETE")
            holder.execute("BEGIN EXCLUSIVE")
            holder.execute("UPDATE meta SET value = value")
            found = look(tmp_path)
        assert found.level("clock.time") is Level.OK
        assert found.level("state.directory") is Level.OK

    def test_a_daemon_with_other_settings_than_those_examined_is_told(
        self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
    ) -> None:
        config = write_config(tmp_path, f'broker = "{mosquitto.url}"\nkeystore = "{swtpm.uri}"\n')
        options = {"broker": None, "keystore": None, "config_file": config}
        with Daemon(tmp_path / "daemon", "--config", str(config), "--state-dir", str(tmp_path / "state")):
            assert look(tmp_path, **options).level("state.settings") is Level.OK
            os.utime(config, (2**32, 2**32))
            assert "restart the daemon" in look(tmp_path, **options).text("state.settings")
            assert f"--config {config}" in look(tmp_path).text("state.settings")

    def test_a_daemon_that_was_stopped_is_a_failure_with_the_way_out(
        self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
    ) -> None:
        """It has the state directory, its session at the broker and the TPM, and answers nothing."""
        options = {"broker": mosquitto.url, "keystore": swtpm.uri}
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        with Daemon(tmp_path / "daemon", *given, "--state-dir", str(tmp_path / "state")) as daemon:
            daemon.freeze()
            found = look(tmp_path, **options)
            assert found.level("state.daemon") is Level.FAILURE
            assert daemon.process is not None
            assert f"kill -CONT {daemon.process.pid}" in found.text("state.daemon")
            daemon.thaw()

    def test_a_ledger_of_a_newer_version_is_a_failure(self, tmp_path: Path) -> None:
        with closing(sqlite3.connect(used(tmp_path) / DATABASE_NAME)) as database:
            database.execute("PRAGMA user_version=99")
        assert "a newer stationkey wrote it" in look(tmp_path).text("state.ledger")

    @pytest.mark.parametrize(
        ("mode", "level"), [(0o700, Level.OK), (0o755, Level.WARNING), (0o777, Level.FAILURE), (0o770, Level.FAILURE)]
    )
    def test_who_may_enter_the_state_directory_is_told(self, tmp_path: Path, mode: int, level: Level) -> None:
        used(tmp_path).chmod(mode)
        assert look(tmp_path).level("state.directory") is level

    @pytest.mark.parametrize(
        ("harm", "name", "words"),
        [
            pytest.param("hard link", "state.files", "a hard link", id="the ledger has a second name"),
            pytest.param("group", "state.directory", "chmod go-w", id="a group may write in the directory above"),
            pytest.param("shared", "state.directory", "other files in it", id="it is open, and not of its own"),
            pytest.param("loop", "state.directory", "symbolic links", id="a link to itself"),
            pytest.param("file", "state.directory", "Not a directory", id="below a file"),
            pytest.param("long", "state.directory", "name too long", id="a name that is too long"),
        ],
    )
    def test_what_the_daemon_would_not_take_at_its_start_is_a_failure(
        self, tmp_path: Path, harm: str, name: str, words: str
    ) -> None:
        """The daemon is asked by the same rules, on the same directory: the two must not disagree."""
        above = tmp_path / "above"
        above.mkdir()
        path = above / "state"
        match harm:
            case "hard link":
                path = used(above)
                os.link(path / DATABASE_NAME, tmp_path / "second")
            case "group":
                path.mkdir(mode=0o700)
                above.chmod(0o775)
                if os.geteuid() == 0:  # the own group of a user may be his alone, and so be no other
                    os.chown(above, 0, 4711)
                else:
                    above.chmod(0o777)
            case "shared":
                path.mkdir(mode=0o755)
                (path / "README").touch()
            case "loop":
                path.symlink_to(path)
            case "file":
                (above / "file").touch()
                path = above / "file" / "state"
            case "long":
                path = above / ("x" * 300)
        with pytest.raises(StationKeyError):
            StateDirectory(path)
        found = look(tmp_path, state_dir=path)
        assert found.level(name) is Level.FAILURE
        assert words in found.text(name) or harm == "group"

    @pytest.mark.skipif(os.geteuid() != 0, reason="to give a directory away takes root")
    @pytest.mark.parametrize("which", ["the directory above", "a link on the way"])
    def test_what_belongs_to_another_user_on_the_way_is_a_failure_with_the_way_out(
        self, tmp_path: Path, which: str
    ) -> None:
        above = tmp_path / "above"
        above.mkdir()
        path = above / "state"
        if which == "the directory above":
            path.mkdir(mode=0o700)
            os.chown(above, NOBODY, NOBODY)
        else:
            (tmp_path / "real").mkdir(mode=0o700)
            path.symlink_to(tmp_path / "real")
            os.lchown(path, NOBODY, NOBODY)
        found = look(tmp_path, state_dir=path)
        assert found.level("state.directory") is Level.FAILURE
        (advice,) = (finding.advice for finding in found["state.directory"])
        subprocess.run(advice.split(",")[0].split(), check=True)
        assert look(tmp_path, state_dir=path).level("state.directory") is Level.OK

    def test_links_in_the_state_directory_are_a_failure(self, tmp_path: Path) -> None:
        state = used(tmp_path)
        (state / "lock").unlink(missing_ok=True)
        (state / "lock").symlink_to("/etc/passwd")
        found = look(tmp_path)
        assert found.level("state.files") is Level.FAILURE
        assert "lock" in found.text("state.files")

    def test_a_ledger_that_is_a_link_is_not_followed(self, tmp_path: Path) -> None:
        state = used(tmp_path)
        (state / DATABASE_NAME).rename(tmp_path / "elsewhere")
        (state / DATABASE_NAME).symlink_to(tmp_path / "elsewhere")
        assert look(tmp_path).level("state.ledger") is Level.FAILURE

    @pytest.mark.parametrize(
        ("harm", "level", "words"),
        [
            ("replaced", Level.FAILURE, "not what the ledger says"),
            ("removed", Level.FAILURE, "missing under active/"),
            ("added", Level.WARNING, "\\u001b[31mstray"),
        ],
    )
    def test_what_active_has_is_held_against_the_ledger(
        self, tmp_path: Path, harm: str, level: Level, words: str
    ) -> None:
        active = used(tmp_path) / "active"
        (file,) = active.glob("*.pem")
        match harm:
            case "replaced":
                file.write_text("another key")
            case "removed":
                file.unlink()
            case _:
                (active / "\x1b[31mstray").touch()
        found = look(tmp_path)
        assert found.level("state.active") is level
        assert words in found.text("state.active")

    def test_another_user_sees_less_and_says_so(self, tmp_path: Path) -> None:
        state = used(tmp_path)
        for directory in (tmp_path, *tmp_path.parents):
            if directory.owner() == state.owner() and len(directory.parts) > 3:
                directory.chmod(0o711)
        state.chmod(0)
        found = as_nobody(tmp_path)
        state.chmod(0o700)
        assert {found.level("state.ledger"), found.level("state.directory")} <= {Level.NOT_CHECKED, Level.FAILURE}
        assert found.level("clock.time") is Level.OK

    def test_no_check_that_fails_takes_another_with_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> object:
            raise ZeroDivisionError("hunter2")

        monkeypatch.setattr("stationkey.doctor.state.disk._place", broken)
        found = look(tmp_path)
        assert "the check itself failed (ZeroDivisionError" in found.text("state.disk")
        assert "hunter2" not in found.text("state.disk")
        assert found.level("state.disk") is Level.NOT_CHECKED
        assert found.level("state.directory") is Level.WARNING


@contextmanager
def guarded(folder: Path, acl: str, *extra: str) -> Iterator[tuple[Mosquitto, Path]]:
    """A broker with two users and an access control list, and the configuration of a station there."""
    folder.mkdir(exist_ok=True)
    passwords, rights, secret = folder / "passwords", folder / "rights", folder / "secret"
    program = shutil.which("mosquitto_passwd", path=search_path())
    assert program is not None
    for number, user in enumerate(("stationkey", "josev")):
        subprocess.run([program, "-b", *(["-c"] if number == 0 else []), str(passwords), user, "hunter2"], check=True)
    rights.write_text(acl)
    rights.chmod(0o600)
    secret.write_text("hunter2\n")
    secret.chmod(0o600)
    lines = [f"password_file {passwords}", *([f"acl_file {rights}"] if acl else []), *extra]
    with Mosquitto(folder / "broker", *lines) as broker:
        text = f'broker = "{broker.url}"\n[mqtt]\nusername = "stationkey"\npassword_file = "{secret}"\n'
        yield broker, write_config(folder, text)


OURS = "user stationkey\ntopic read josev/cs\ntopic write cs/josev\n"
JOSEVS = "user josev\ntopic write josev/cs\ntopic read cs/josev\n"
SHIPPED = ROOT / "packaging/mosquitto/stationkey.acl"
CLOSED = "allow_anonymous false"


class TestBroker:
    @pytest.mark.parametrize(
        ("acl", "extra", "failures"),
        [
            pytest.param(SHIPPED.read_text(), CLOSED, set(), id="as it is shipped"),
            pytest.param("", CLOSED, {"broker.own_rights"}, id="no access control list"),
            pytest.param("", "", {"broker.own_rights", "broker.anonymous"}, id="anybody may do anything"),
            pytest.param("topic read nothing\n" + OURS, "", set(), id="anybody may come in and do nothing"),
            pytest.param("topic read cs/josev\n" + OURS, "", {"broker.anonymous"}, id="anybody may read the answers"),
            pytest.param("topic write josev/cs\n" + OURS, "", {"broker.anonymous"}, id="anybody may ask"),
            pytest.param("user stationkey\ntopic read josev/cs\n", CLOSED, {"broker.publish"}, id="we may not answer"),
        ],
    )
    def test_rights_are_found_out_by_trying(self, tmp_path: Path, acl: str, extra: str, failures: set[str]) -> None:
        with guarded(tmp_path / "guarded", acl, extra) as (_, config):
            found = look(tmp_path, broker=None, config_file=config, allow_software_keys=True)
        assert found.failures == failures

    def test_where_a_user_has_one_session_nothing_in_it_is_lost(self, tmp_path: Path, swtpm: Swtpm) -> None:
        """As packaging/mosquitto/passwords.example has it: the doctor gets the daemon's session, requests included."""
        with guarded(tmp_path / "guarded", OURS + JOSEVS, CLOSED, "use_username_as_clientid true") as (broker, config):
            options = ("--config", str(config), "--keystore", swtpm.uri, "--state-dir", str(tmp_path / "state"))
            with Daemon(tmp_path / "daemon", *options) as daemon:
                found = look(tmp_path, broker=None, config_file=config, keystore=swtpm.uri)
                assert "one session for each user" in found.text("broker.login")
                assert found.level("broker.own_rights") is Level.NOT_CHECKED
                daemon.terminate()
                at = ("-p", str(broker.port), "-u", "josev", "-P", "hunter2", "-q", "1")
                request = (ROOT / "examples/requests.jsonl").read_text().splitlines()[0]
                subprocess.run(["mosquitto_pub", *at, "-t", "josev/cs", "-m", request], check=True)
                found = look(tmp_path, broker=None, config_file=config, keystore=swtpm.uri)
                assert found.level("broker.own_rights") is Level.OK
                assert found.failures == set()
                daemon.start()
                while "accepted" not in daemon.run_log:
                    time.sleep(0.01)  # a log has no events
                assert daemon.run_log.count("accepted") == 1

    @pytest.mark.parametrize(
        ("limit", "words"),
        [
            ("message_size_limit 1000", "4096"),
            ("max_packet_size 1000", "4096"),
            ("message_size_limit 20", "message_size_limit"),
            ("max_qos 0", "max_qos"),
        ],
    )
    def test_a_broker_that_would_not_take_an_answer_is_a_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, words: str
    ) -> None:
        """And no session is left behind where the broker ends the connection for it."""
        monkeypatch.setattr("stationkey.doctor.broker.probe._client_id", lambda: "stationkey-doctor-1")
        with guarded(tmp_path / "guarded", OURS, CLOSED, limit) as (broker, config):
            found = look(tmp_path, broker=None, config_file=config)
            assert found.level("broker.publish") is Level.FAILURE
            assert words in found.text("broker.publish")
            terms = MqttTerms(username="stationkey", password=SecretReference(str(tmp_path / "guarded" / "secret")))

            async def resumed() -> bool:
                at = Broker.parse(broker.url)
                async with await connect(at, client_id="stationkey-doctor-1", persistent=True, terms=terms) as again:
                    return again.resumed

            assert not asyncio.run(resumed())

    @pytest.mark.parametrize("prefix", ["a/#", "$SYS", "x" * 2000], ids=["a wildcard", "the broker's own", "too long"])
    def test_a_topic_prefix_that_is_none_is_told_with_what_it_may_be(self, tmp_path: Path, prefix: str) -> None:
        found = look(tmp_path, topic_prefix=prefix)
        assert found.level("broker.url") is Level.FAILURE
        assert "correct topic_prefix" in found.text("broker.url")

    def test_topics_are_called_by_their_names_with_the_prefix(self, tmp_path: Path, mosquitto: Mosquitto) -> None:
        found = look(tmp_path, broker=mosquitto.url, topic_prefix="site/7")
        for name in ("publish", "subscribe", "josev", "retained"):
            assert "site/7/" in found.text(f"broker.{name}")

    def test_what_lies_on_a_topic_is_taken_away_as_it_is_said(self, tmp_path: Path, mosquitto: Mosquitto) -> None:
        at = ("-p", str(mosquitto.port))
        subprocess.run(["mosquitto_pub", *at, "-t", "a/josev/cs", "-r", "-m", "old"], check=True)
        found = look(tmp_path, broker=mosquitto.url, topic_prefix="a")
        (advice,) = (finding.advice for finding in found["broker.retained"])
        subprocess.run(advice.partition(": ")[2].partition(";")[0].split(), check=True)
        assert look(tmp_path, broker=mosquitto.url, topic_prefix="a").level("broker.retained") is Level.OK

    def test_a_credential_of_the_unit_is_used_where_systemd_has_put_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The doctor is run from a shell, and the daemon by its unit: what that gets, the shell has not."""
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        monkeypatch.setattr("stationkey.doctor.host.context.CREDENTIALS", tmp_path / "credentials")
        with guarded(tmp_path / "guarded", OURS, CLOSED) as (broker, _):
            text = f'broker = "{broker.url}"\n[mqtt]\nusername = "stationkey"\npassword_file = "credential:password"\n'
            config = write_config(tmp_path, text)
            before = look(tmp_path, broker=None, config_file=config)
            directory = tmp_path / "credentials" / "stationkey.service"
            directory.mkdir(parents=True)
            (tmp_path / "guarded" / "secret").rename(directory / "password")
            after = look(tmp_path, broker=None, config_file=config)
        assert before.level("broker.login") is Level.NOT_CHECKED
        assert "while the unit runs" in before.text("broker.login")
        assert after.level("broker.publish") is Level.OK

    def test_a_password_that_this_user_may_not_read_says_nothing_of_the_daemon(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("root makes a file that another user may not read")
        with (
            tempfile.TemporaryDirectory(prefix="stationkey-") as name,  # where others may go, too
            guarded(Path(name, "guarded"), OURS, CLOSED) as (broker, config),
        ):
            Path(name).chmod(0o755)
            config.chmod(0o644)
            state = Path(name, "state")
            state.mkdir(mode=0o700)
            os.chown(state, 4711, 4711)  # somebody's, and not that of whoever looks
            found = as_nobody(Path(name), config=config, broker=broker.url)
        assert found.level("config.file") is Level.OK
        assert found.level("state.directory") is not Level.FAILURE
        assert found.level("broker.login") is Level.NOT_CHECKED
        assert "run it as root" in found.text("broker.login")

    @pytest.mark.parametrize("acl", [OURS, ""], ids=["rights", "none"])
    def test_no_session_is_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acl: str) -> None:
        monkeypatch.setattr("stationkey.doctor.broker.probe._client_id", lambda: "stationkey-doctor-1")

        async def resumed(broker: Broker, terms: MqttTerms) -> bool:
            async with await connect(broker, client_id="stationkey-doctor-1", persistent=True, terms=terms) as again:
                return again.resumed

        with guarded(tmp_path / "guarded", acl, CLOSED) as (broker, config):
            look(tmp_path, broker=None, config_file=config)
            secret = SecretReference(str(tmp_path / "guarded" / "secret"))
            terms = MqttTerms(username="stationkey", password=secret)
            assert not asyncio.run(resumed(Broker.parse(broker.url), terms))

    def test_a_wrong_password_is_told_apart(self, tmp_path: Path) -> None:
        with guarded(tmp_path / "guarded", OURS, CLOSED) as (_, config):
            (tmp_path / "guarded" / "secret").write_text("hunter3\n")
            found = look(tmp_path, broker=None, config_file=config)
        assert "Not authorized" in found.text("broker.login")
        assert "hunter" not in json.dumps(found.report.to_json())

    def test_a_broker_that_takes_anybody_is_a_failure_where_others_reach_it(self, tmp_path: Path) -> None:
        with Mosquitto(tmp_path / "broker") as broker:
            assert look(tmp_path, broker=broker.url).level("broker.anonymous") is Level.WARNING
            configuration = tmp_path / "broker" / "mosquitto.conf"
            broker.terminate()
            configuration.write_text(configuration.read_text().replace(" 127.0.0.1", " 0.0.0.0"))
            broker.start()
            found = look(tmp_path, broker=broker.url)
        assert found.level("broker.anonymous") is Level.FAILURE
        assert "every machine" in found.text("broker.anonymous")

    def test_nagle_s_algorithm_at_the_broker_is_seen(self, tmp_path: Path) -> None:
        with Mosquitto(tmp_path / "broker", "set_tcp_nodelay false") as broker:
            found = look(tmp_path, broker=broker.url)
        assert found.level("broker.delay") is Level.WARNING
        assert "set_tcp_nodelay true" in found.text("broker.delay")

    def test_a_retained_message_and_a_listening_josev_are_seen(self, tmp_path: Path, mosquitto: Mosquitto) -> None:
        at = ("-p", str(mosquitto.port))
        subprocess.run(["mosquitto_pub", *at, "-t", "josev/cs", "-r", "-m", "old"], check=True)
        with subprocess.Popen(
            ["mosquitto_sub", *at, "-t", "#", "-t", "$SYS/none", "-v", "-d"], stdout=subprocess.PIPE, text=True
        ) as josev:
            assert josev.stdout is not None
            while "SUBACK" not in josev.stdout.readline():
                pass
            found = look(tmp_path, broker=mosquitto.url)
            josev.kill()
            seen = josev.stdout.read()
        assert found.level("broker.josev") is Level.OK
        assert found.level("broker.retained") is Level.WARNING
        assert '"name": "stationkey_doctor"' in seen
        assert "generate_csr" not in seen

    @pytest.mark.parametrize(
        ("said", "name", "words"),
        [
            pytest.param(b"", "broker.login", "is it an MQTT broker?", id="closes"),
            pytest.param(b"HTTP/1.1 400 \x1b[2J\r\n\r\n", "broker.login", "is it an MQTT broker?", id="speaks HTTP"),
            pytest.param(
                b"\x20\x03\x00\x00\x00", "broker.publish", "did not acknowledge", id="then acknowledges nothing"
            ),
        ],
    )
    def test_what_behaves_as_no_broker_does_is_told(self, tmp_path: Path, said: bytes, name: str, words: str) -> None:
        def answer(listener: socket.socket) -> None:
            held = contextlib.ExitStack()
            with held, contextlib.suppress(OSError):  # the listener is closed at the end
                while True:
                    connection = held.enter_context(listener.accept()[0])
                    connection.recv(1000)
                    connection.sendall(said)
                    if not said.startswith(b"\x20"):
                        connection.close()

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=answer, args=(listener,))
            thread.start()
            found = look(tmp_path, broker=f"mqtt://127.0.0.1:{listener.getsockname()[1]}")
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
        assert found.level(name) is Level.FAILURE
        assert words in found.text(name)

    def test_a_name_that_leads_nowhere_is_told(self, tmp_path: Path) -> None:
        found = look(tmp_path, broker="mqtt://nowhere.invalid")
        assert found.level("broker.name") is Level.FAILURE

    def test_what_is_no_broker_is_told(self, tmp_path: Path, swtpm: Swtpm) -> None:
        found = look(tmp_path, broker=f"mqtt://127.0.0.1:{swtpm.port + 1}")
        assert found.level("broker.login") is Level.FAILURE

    @pytest.mark.parametrize(
        ("days", "host", "own_ca", "level", "words"),
        [
            pytest.param(365, "localhost", True, Level.OK, "verified", id="right"),
            pytest.param(-1, "localhost", True, Level.FAILURE, "expired", id="expired"),
            pytest.param(10, "localhost", True, Level.WARNING, "expires in", id="soon over"),
            pytest.param(365, "elsewhere", True, Level.FAILURE, "server_name", id="another name"),
            pytest.param(365, "localhost", False, Level.FAILURE, "not to be trusted", id="another CA"),
        ],
    )
    def test_the_certificate_of_the_broker_is_judged(
        self, tmp_path: Path, days: int, host: str, own_ca: bool, level: Level, words: str
    ) -> None:
        pki = Pki(tmp_path / "pki")
        certificate, key = pki.issue("broker", days=days, host=host)
        ca = pki.ca_file if own_ca else Pki(tmp_path / "other").ca_file
        with Mosquitto(tmp_path / "broker", f"certfile {certificate}", f"keyfile {key}") as broker:
            url = f"mqtts://localhost:{broker.port}"
            config = write_config(tmp_path, f'[mqtt]\nca_file = "{ca}"\n')
            found = look(tmp_path, broker=url, config_file=config)
        assert found.level("broker.tls") is level
        assert words in found.text("broker.tls")

    def test_a_client_s_certificate_that_the_broker_does_not_take_is_told(self, tmp_path: Path) -> None:
        """Whichever comes first, the alert or the end of the connection: the hint is at the certificate."""
        pki, others = Pki(tmp_path / "pki"), Pki(tmp_path / "others")
        certificate, key = pki.issue("broker")
        own, own_key = others.issue("station")
        lines = (f"certfile {certificate}", f"keyfile {key}", f"cafile {pki.ca_file}", "require_certificate true")
        with Mosquitto(tmp_path / "broker", *lines) as broker:
            text = f'[mqtt]\nca_file = "{pki.ca_file}"\ncertificate_file = "{own}"\nkey_file = "{own_key}"\n'
            found = look(tmp_path, broker=f"mqtts://localhost:{broker.port}", config_file=write_config(tmp_path, text))
        assert found.level("broker.login") is Level.FAILURE
        assert "client certificate" in found.text("broker.login")

    def test_what_is_wrong_on_our_side_is_not_looked_for_in_the_broker_s_log(
        self, tmp_path: Path, mosquitto: Mosquitto
    ) -> None:
        (tmp_path / "name").write_bytes(b"\xff\xfe")
        (tmp_path / "name").chmod(0o600)
        config = write_config(tmp_path, f'[mqtt]\nusername_file = "{tmp_path}/name"\n')
        assert "correct it under [mqtt]" in look(tmp_path, broker=mosquitto.url, config_file=config).text(
            "broker.login"
        )

    def test_tls_is_told_from_no_tls(self, tmp_path: Path, mosquitto: Mosquitto) -> None:
        certificate, key = Pki(tmp_path / "pki").issue("broker")
        with Mosquitto(tmp_path / "tls", f"certfile {certificate}", f"keyfile {key}") as broker:
            plain = look(tmp_path, broker=broker.url)
        assert "mqtts://" in plain.text("broker.login")
        secure = look(tmp_path, broker=f"mqtts://localhost:{mosquitto.port}")
        assert secure.level("broker.tls") is Level.FAILURE

    def test_the_client_s_own_certificate_and_key_are_judged(self, tmp_path: Path) -> None:
        pki = Pki(tmp_path / "pki")
        certificate, _ = pki.issue("station", days=5)
        _, other = pki.issue("other")
        other.chmod(0o644)
        text = f'[mqtt]\nca_file = "{pki.ca_file}"\ncertificate_file = "{certificate}"\nkey_file = "{other}"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text), broker="mqtts://localhost:1")
        assert found.level("config.tls") is Level.FAILURE
        assert all(word in found.text("config.tls") for word in (f"chmod o= {other}", "expires in"))
