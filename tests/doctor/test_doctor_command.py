"""The command, where all is well and where nothing works: swtpm, Mosquitto, files and other users."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import select
import shutil
import socket
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from doctors import DOCTOR, command_output, look, read, tool, used
from peers import Daemon, Mosquitto, ResourceManager, Swtpm, free_port

from stationkey.doctor.examination import AREAS
from stationkey.doctor.report import Level
from stationkey.system.state_dir import DATABASE_NAME


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
        assert tool(swtpm, "tpm2_getcap", "handles-persistent") == ""
        assert len(tool(swtpm, "tpm2_getcap", "handles-transient").splitlines()) == 1
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
        with ResourceManager(tmp_path / "manager", tpm=swtpm.tcti) as manager:
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
        assert "FAILURE   config.file:" in done.stdout
        assert done.stdout.splitlines()[0].startswith("2 failures, ")
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "\x1b" not in done.stdout

    def test_warnings_alone_are_status_0(self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm) -> None:
        options = ["--broker", mosquitto.url, "--keystore", swtpm.uri, "--state-dir", str(tmp_path / "state")]
        done = subprocess.run([*DOCTOR, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "0 failures" in done.stdout.splitlines()[0]

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
        assert found.level("tpm.reachable") is found.level("broker.login") is Level.FAILURE
        assert found.reasons("tpm.reachable") == {"silent"}
        assert found.reasons("broker.login") == {"broker_unreachable"}
        assert found.level("state.directory") is not Level.NOT_CHECKED

    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_where_the_report_cannot_be_written_that_is_said_in_a_line(self, tmp_path: Path, form: list[str]) -> None:
        with Path("/dev/full").open("w") as full:
            command = [*DOCTOR, *form, "--state-dir", str(tmp_path / "state")]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "stationkey: the report cannot be written: No space left on device\n"

    def test_a_page_holds_every_finding_as_text_and_needs_nothing_else(self, tmp_path: Path) -> None:
        (tmp_path / "hostile").write_text("\"<script>alert(1)</script>\" = 1\n[mqtt]\n'<img src=x>' = 1\n")
        page = tmp_path / "page.html"
        command = [*DOCTOR, "--config", str(tmp_path / "hostile"), "--state-dir", str(tmp_path / "state")]
        done = subprocess.run([*command, "--json", "--html", str(page)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "")
        html, found = page.read_text(), json.loads(done.stdout)["findings"]
        assert all(f"<code>{one['id']} {one['reason']}</code>" in html for one in found)
        assert "&lt;script&gt;" in html
        assert [word for word in ("<script", "<img", "<link", "https://") if word in html] == []
        assert stat.S_IMODE(page.stat().st_mode) == 0o600
        done = subprocess.run([*command, "--html", "/none/page.html"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("stationkey: /none/page.html ")

    @pytest.mark.parametrize(("variable", "coloured"), [("NO_COLOR=", True), ("NO_COLOR=1", False)])
    def test_colours_are_for_a_terminal_that_wants_them(self, tmp_path: Path, variable: str, coloured: bool) -> None:
        command = ["env", variable, "TERM=xterm", *DOCTOR, "--state-dir", str(tmp_path / "state")]
        reader, writer = pty.openpty()
        with subprocess.Popen(command, stdout=writer, stderr=writer) as doctor:
            os.close(writer)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: its other end is closed
                while part := os.read(reader, 4096):
                    shown += part
        os.close(reader)
        assert doctor.returncode in {0, 1}
        assert (b"\x1b[" in shown) is coloured

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
        assert look(tmp_path, config_file=tmp_path / "pipe").reasons("config.file") == {"invalid"}
