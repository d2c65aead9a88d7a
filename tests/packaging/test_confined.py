"""The daemon as the unit runs it: its user, its files, its limits, and no system call but those that it allows.

``confine.py`` does what systemd would, by what the unit file says. Only root can become another user.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.request import urlopen

import pytest
from peers import Daemon, Mosquitto, Swtpm, free_port
from unit import Unit

from parts import E1, STATION, V2G, V2G20, status
from stationkey.contract import messages
from stationkey.contract.profiles import Algorithm, CertificateType

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the user that the unit names")

CONFINE = Path(__file__).with_name("confine.py")
STATIONKEY = (sys.executable, "-m", "stationkey")
UNIT = Unit()


class Confined(Daemon):
    """``stationkey serve``, as the unit's ExecStart= has it."""

    def __init__(self, directory: Path, *, broker: Mosquitto, tpm: Swtpm) -> None:
        super().__init__(directory)
        self.state = directory / "state"
        self.state.mkdir()
        self.config = directory / "stationkey.toml"
        self.metrics = f"127.0.0.1:{free_port()}"
        self.config.write_text(
            f'broker = "{broker.url}"\nkeystore = "{tpm.uri}"\nlog_format = "json"\n'
            f'metrics.listen = "{self.metrics}"\n'
            'tpm = {session = "encrypted", key_auth = "generated"}\n'
        )
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind("\0stationkey-" + os.urandom(8).hex())
        self.manager.settimeout(30)

    def confine(self, command: Sequence[str], *options: str) -> list[str]:
        files = ("--state", str(self.state), "--config", str(self.config))
        return [sys.executable, str(CONFINE), *options, *files, "--", *command]

    def command(self) -> list[str]:
        address = "@" + self.manager.getsockname()[1:].decode()
        program, *arguments = UNIT.words("ExecStart")
        assert program == "/usr/bin/stationkey"
        return self.confine([*STATIONKEY, *arguments], "--notify", address)[1:]

    def run(self, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Another command, beside it."""
        return subprocess.run(self.confine(command, *options), capture_output=True, text=True, check=False)

    def status(self, name: str) -> list[str]:
        """A line of what the kernel says of the process."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(line.split()[1:] for line in lines if line.startswith(f"{name}:"))


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Confined]:
    folder = tmp_path_factory.mktemp("confined")
    with Mosquitto(folder / "broker") as broker, Swtpm(folder / "tpm") as tpm:
        daemon = Confined(folder / "daemon", broker=broker, tpm=tpm)
        with daemon.manager, daemon:
            yield daemon


def ask(
    daemon: Confined, certificate_type: CertificateType, algorithm: Algorithm, *options: str
) -> subprocess.CompletedProcess[str]:
    broker = daemon.config.read_text().split('"')[1]
    names = ("--common-name", "DE-ABC-S-1", "--organization-name", "Über Strom GmbH", "--country-name", "DE")
    return subprocess.run(
        [*STATIONKEY, "request", certificate_type, "--broker", broker, "--algorithm", algorithm, *names, *options],
        capture_output=True,
        text=True,
        check=False,
    )


def until(true: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestServing:
    @pytest.mark.parametrize(
        ("certificate_type", "algorithm"),
        [(STATION, Algorithm.ECDSA_SHA256), (V2G20, Algorithm.ECDSA_SHA512), (STATION, Algorithm.RSA_SHA384)],
        ids=str,
    )
    def test_a_request_gets_a_csr_that_verifies(
        self, confined: Confined, certificate_type: CertificateType, algorithm: Algorithm
    ) -> None:
        answered = ask(confined, certificate_type, algorithm)
        assert answered.returncode == 0, answered.stderr + confined.log
        judged = subprocess.run(
            ["openssl", "req", "-verify", "-noout"], input=answered.stdout, capture_output=True, text=True, check=True
        )
        assert "verify OK" in judged.stderr + judged.stdout

    def test_the_figures_are_told_those_of_the_process_among_them(self, confined: Confined) -> None:
        with urlopen(f"http://{confined.metrics}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        assert "stationkey_ready 1.0" in text
        assert "process_resident_memory_bytes" in text
        assert "process_start_time_seconds" in text

    def test_an_installed_certificate_makes_its_key_active(self, confined: Confined) -> None:
        assert ask(confined, V2G, Algorithm.ECDSA_SHA256, "--evse-id", E1).returncode == 0
        port = confined.config.read_text().split('"')[1].rpartition(":")[2]
        told = messages.encode(status("installed", V2G, E1))
        subprocess.run(["mosquitto_pub", "-p", port, "-q", "1", "-t", "josev/cs", "-s"], input=told, check=True)
        until(lambda: any((confined.state / "active").glob("v2g_certificate.*.pem")))

    def test_the_service_manager_hears_that_it_is_ready(self, confined: Confined) -> None:
        assert UNIT.one("Type") == "notify"
        while "READY=1" not in confined.manager.recv(4096).decode().splitlines():
            pass

    def test_its_user_can_list_the_keys(self, confined: Confined) -> None:
        assert ask(confined, STATION, Algorithm.ECDSA_SHA256).returncode == 0
        listed = confined.run(*STATIONKEY, "keys", "list", "--json")
        assert listed.returncode == 0, listed.stderr
        assert "pre-activation" in {key["state"] for key in json.loads(listed.stdout)}


HOOK = """
import asyncio
from stationkey.system.bounded_command import BoundedCommand
script = "sleep 100 & mosquitto_pub --help | head -n 1; echo $STATIONKEY_STATE"
command = BoundedCommand(("/bin/sh", "-c", script), timeout=30)
print(asyncio.run(command.run({"STATIONKEY_STATE": "due"})))
command.close()
"""
"""What the daemon does for ``[renewal] command``: a shell with a child, a program, and the end of them all."""


def test_the_renewal_command_runs_under_the_same_confinement(confined: Confined) -> None:
    ran = confined.run(sys.executable, "-c", HOOK)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("mosquitto_pub")
    assert ran.stdout.rstrip().endswith("due")


WRITE = """
import json, os, shutil
found = {}
for directory in (
    "/ /etc /etc/stationkey /usr /var /var/lib /run /dev/shm /var/lib/stationkey /run/stationkey /tmp /var/tmp".split()
):
    path = os.path.join(directory, "x")
    try:
        shutil.copy("/bin/true", path)
    except OSError as error:
        found[directory] = error.strerror
    else:
        found[directory] = "written, executable" if os.access(path, os.X_OK) else "written, not executable"
        os.unlink(path)
print(json.dumps(found))
"""


class TestConfinement:
    """That it was confined while it did all that."""

    def test_it_has_no_privilege_and_can_get_none(self, confined: Confined) -> None:
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(confined.status(name)[0], 16) == 0
        assert confined.status("NoNewPrivs") == ["1"]
        assert confined.status("Seccomp") == ["2"]

    def test_it_is_nobody_else_and_in_the_group_of_the_tpm(self, confined: Confined) -> None:
        assert confined.process is not None
        (uid,), (gid,) = set(confined.status("Uid")), set(confined.status("Gid"))
        assert "0" not in {uid, gid}
        group = Path(f"/proc/{confined.process.pid}/root", "etc/group").read_text().splitlines()
        named = {line.split(":")[2]: line.split(":")[0] for line in group}
        assert named[gid] == UNIT.one("Group")
        assert [named[number] for number in confined.status("Groups")] == UNIT.words("SupplementaryGroups")

    def test_no_core_is_written(self, confined: Confined) -> None:
        assert confined.process is not None
        limits = Path(f"/proc/{confined.process.pid}/limits").read_text().splitlines()
        assert next(line.split()[4:6] for line in limits if line.startswith("Max core")) == ["0", "0"]

    def test_what_it_writes_is_its_own_alone(self, confined: Confined) -> None:
        uid = int(confined.status("Uid")[0])
        assert stat.S_IMODE(confined.state.stat().st_mode) == int(UNIT.one("StateDirectoryMode"), 8) == 0o700
        found = list(confined.state.rglob("*"))
        assert {path.name for path in found} >= {"ledger.sqlite3", "active", "lock"}
        for path in found:
            mode = path.stat()
            assert (mode.st_uid, stat.S_IMODE(mode.st_mode) & 0o077) == (uid, 0), path

    def test_it_takes_less_than_it_may(self, confined: Confined) -> None:
        assert int(confined.status("VmHWM")[0]) * 1024 < UNIT.size("MemoryMax") / 2
        assert int(confined.status("Threads")[0]) < UNIT.size("TasksMax") / 2

    @pytest.mark.parametrize(
        "attempt",
        [
            pytest.param("os.nice(1)", id="@resources"),
            pytest.param("os.setgroups([])", id="@setuid"),
            pytest.param("os.chown('/var/lib/stationkey', -1, -1)", id="@chown"),
            pytest.param("ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None)", id="@mount"),
            pytest.param("ctypes.CDLL(None).ptrace(0, 0, 0, 0)", id="@debug"),
            pytest.param("ctypes.CDLL(None).unshare(0x10000000)", id="RestrictNamespaces"),
            pytest.param("mmap.mmap(-1, 4096, prot=7)", id="MemoryDenyWriteExecute"),
        ],
    )
    def test_a_system_call_that_it_may_not_make_would_have_ended_it(self, confined: Confined, attempt: str) -> None:
        made = confined.run(sys.executable, "-c", f"import ctypes, mmap, os; {attempt}")
        assert made.returncode == -signal.SIGSYS, made.stderr

    def test_it_can_write_in_its_own_directories_alone(self, confined: Confined) -> None:
        tried = confined.run(sys.executable, "-c", WRITE)
        assert json.loads(tried.stdout) == {
            **dict.fromkeys(
                ("/", "/etc", "/etc/stationkey", "/usr", "/var", "/var/lib", "/run"), "Read-only file system"
            ),
            "/dev/shm": "Permission denied",
            **dict.fromkeys(("/var/lib/stationkey", "/run/stationkey", "/tmp", "/var/tmp"), "written, not executable"),
        }


class TestAnotherUser:
    """Somebody else on the machine, with a shell and no privilege."""

    @pytest.mark.parametrize(
        "path",
        ["/var/lib/stationkey", "/var/lib/stationkey/active", "/var/lib/stationkey/ledger.sqlite3", "/etc/stationkey"],
    )
    def test_can_look_at_nothing(self, confined: Confined, path: str) -> None:
        looked = confined.run("/bin/ls", path, options=["--as-another"])
        assert looked.returncode != 0
        assert "Permission denied" in looked.stderr

    @pytest.mark.parametrize(
        "command",
        [
            pytest.param(["keys", "list"], id="keys list"),
            pytest.param(["keys", "destroy", "a", "--yes"], id="keys destroy"),
            pytest.param(["serve", "--config", "/etc/stationkey/stationkey.toml"], id="serve"),
            pytest.param(["serve", "--keystore", "software:", "--allow-software-keys"], id="serve, without the file"),
        ],
    )
    def test_is_told_so_in_words(self, confined: Confined, command: list[str]) -> None:
        refused = confined.run(*STATIONKEY, *command, options=["--as-another"])
        assert refused.returncode == 1
        assert refused.stderr.startswith("stationkey: ")
        assert "Traceback" not in refused.stderr


class TestEnd:
    def test_it_ends_in_order_when_it_is_told_to(self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm) -> None:
        daemon = Confined(tmp_path / "daemon", broker=mosquitto, tpm=swtpm)
        with daemon.manager, daemon:
            assert daemon.process is not None
            daemon.process.terminate()
            assert daemon.process.wait(10) == 0
            assert '"event": "stopped"' in daemon.run_log
            told = ""
            while "STOPPING=1" not in told:
                told = daemon.manager.recv(4096).decode()
