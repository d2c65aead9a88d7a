"""Real peers on free loopback ports: Mosquitto, swtpm, PostgreSQL and others, for the demo and for the tests.

Each is a context manager that starts a process, waits until it listens, and ends it. A peer can be killed, stopped and
started again on the same port and state, which is how a broker or a TPM dies and comes back.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Self

START_TIMEOUT = 30.0


_reserved: collections.deque[contextlib.ExitStack] = collections.deque()


@atexit.register
def _give_up_ports() -> None:
    for reservation in _reserved:
        reservation.close()


_RESERVATIONS = 64


def free_port(count: int = 1) -> int:
    """Return a free loopback port; the `count` - 1 ports after it are free, too.

    Ports for outgoing connections are left out: the kernel could give one away before the server binds it. Each port is
    reserved by an abstract Unix socket of its number, so that no other process that calls this function returns it.
    This process keeps its latest `_RESERVATIONS` reservations; the kernel drops them when it ends.
    """
    outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        port = random.randrange(min(10_000, outgoing // 2), outgoing - count)  # noqa: S311 - guards nothing
        with contextlib.ExitStack() as reserving, contextlib.ExitStack() as trying, contextlib.suppress(OSError):
            for each in range(port, port + count):
                reserving.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0stationkey-port-{each}")
                trying.enter_context(socket.socket()).bind(("127.0.0.1", each))
            _reserved.append(reserving.pop_all())
            if len(_reserved) > _RESERVATIONS:
                _reserved.popleft().close()
            return port
    raise RuntimeError("no free loopback ports")


def is_listening(port: int) -> bool:
    """Whether a server listens on a loopback port, without a connection to it [proc(5), /proc/net/tcp]."""
    address, listen = f"0100007F:{port:04X}", "0A"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(row[1] == address and row[3] == listen for row in rows)


def is_listening_at(path: Path) -> bool:
    """Whether a server listens on a Unix socket, without a connection to it [proc(5), /proc/net/unix].

    The socket is there before: a connection between the two calls of the server is refused.
    """
    accepting = "00010000"
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()]
    return any(row[7:] == [str(path)] and row[3] == accepting for row in rows)


def search_path() -> str:
    """Where programs are: Debian keeps some servers out of a user's PATH."""
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    return ":".join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", *map(str, servers)])


class Peer:
    """A server process of somebody else's program."""

    program: str
    environment: Mapping[str, str] = {}
    """Variables that it is given beside those of this process."""
    start_timeout = START_TIMEOUT
    """Seconds in which it must listen."""
    user: str | None = None
    """Whom it runs as, where that is not the user of this process."""
    leads = False
    """Whether it leads a process group of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def listening(self) -> bool:
        """Whether it takes connections."""
        raise NotImplementedError

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.directory / "log").read_text(errors="replace")

    def launch(self) -> Self:
        """Start it, and wait for nothing."""
        with (self.directory / "log").open("ab") as log:
            self.process = self._spawn(log)
        return self

    def _spawn(self, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        path = shutil.which(self.program, path=search_path())
        if path is None:
            raise RuntimeError(f"{self.program} is not installed; scripts/setup installs it")
        return subprocess.Popen(
            [path, *self.command()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
            user=self.user,
            process_group=0 if self.leads else None,
        )

    def start(self) -> Self:
        """Start it, and wait until it listens."""
        self.launch()
        assert self.process is not None
        end = time.monotonic() + self.start_timeout
        while not self.listening():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"{self.program} did not start: {self.log}")
            time.sleep(0.01)  # there is no event to wait for: only a connection tells
        return self

    def kill(self) -> None:
        """End it as a loss of power would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def terminate(self) -> None:
        """End it in its own good order."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
            self.process = None

    def restart(self) -> None:
        """Kill it and start it, as power that goes and comes back would."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop it in mid-work: it neither answers nor closes its connections."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # a test that may start no process is skipped here, too
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Mosquitto(Peer):
    """A Mosquitto broker that keeps its sessions over a restart, with TCP_NODELAY as it should be set."""

    program = "mosquitto"

    def __init__(self, directory: Path, *extra: str) -> None:
        super().__init__(directory)
        self.port = free_port()
        user = pwd.getpwuid(os.getuid()).pw_name
        lines = [
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "set_tcp_nodelay true",
            f"user {user}",  # or it would change to a user that cannot read this directory
            "persistence true",
            f"persistence_location {directory}/",
            "autosave_on_changes true",
            "autosave_interval 1",
            *extra,
        ]
        (directory / "mosquitto.conf").write_text("\n".join(lines) + "\n")

    def command(self) -> list[str]:
        return ["-c", str(self.directory / "mosquitto.conf")]

    @property
    def url(self) -> str:
        """``mqtt://127.0.0.1:PORT``."""
        return f"mqtt://127.0.0.1:{self.port}"

    def listening(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


class Swtpm(Peer):
    """A simulated TPM 2.0. Its state stays in `directory`, so that it is the same TPM after a restart."""

    program = "swtpm"

    def __init__(self, directory: Path, *, startup: bool = True) -> None:
        super().__init__(directory)
        self.port = free_port(2)
        self.startup = startup

    def command(self) -> list[str]:
        flags = "not-need-init,startup-clear" if self.startup else "not-need-init"
        return [
            "socket",
            "--tpm2",
            *("--tpmstate", f"dir={self.directory}"),
            *("--server", f"type=tcp,port={self.port},bindaddr=127.0.0.1"),
            *("--ctrl", f"type=tcp,port={self.port + 1},bindaddr=127.0.0.1"),
            *("--flags", flags),
        ]

    @property
    def tcti(self) -> str:
        """What tpm2-tss calls it."""
        return f"swtpm:host=127.0.0.1,port={self.port}"

    @property
    def uri(self) -> str:
        """The key store in it."""
        return f"tpm2:{self.tcti}"

    def new_chip(self) -> None:
        """Forget everything, as a replaced board would have; to be called while it is not running."""
        assert self.process is None
        for file in self.directory.glob("*.permall"):
            file.unlink()

    def listening(self) -> bool:
        # The control port: a connection to the other one would be served before ours. That may open later, so the
        # kernel is asked about it.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port + 1), 1):
            return is_listening(self.port)
        return False


class Bus(Peer):
    """A D-Bus, by which a resource manager is called."""

    program = "dbus-daemon"

    @property
    def address(self) -> str:
        """What clients find it by."""
        return f"unix:path={self.directory}/bus"

    def command(self) -> list[str]:
        return ["--session", "--nofork", "--nopidfile", f"--address={self.address}"]

    def listening(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{self.directory}/bus")
            return True
        return False


class ResourceManager(Peer):
    """tpm2-abrmd in front of a TPM, on a bus of its own, which goes on while the manager is killed and started."""

    program = "tpm2-abrmd"
    tcti = "tabrmd:bus_type=session"

    def __init__(self, directory: Path, *, tpm: str) -> None:
        super().__init__(directory)
        self._tpm = tpm
        self._bus = Bus(directory / "bus")
        self.environment = {"DBUS_SESSION_BUS_ADDRESS": self._bus.address}

    def __enter__(self) -> Self:
        self._bus.start()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._bus.kill()

    def command(self) -> list[str]:
        return ["--allow-root", "--session", f"--tcti={self._tpm}"]

    def listening(self) -> bool:
        question = ("NameHasOwner", "string:com.intel.tss2.Tabrmd")
        answer = subprocess.run(
            [
                "dbus-send",
                "--print-reply=literal",
                "--dest=org.freedesktop.DBus",
                "/",
                f"org.freedesktop.DBus.{question[0]}",
                question[1],
            ],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return "true" in answer.stdout


class SharedToken(Peer):
    """A token of SoftHSM behind p11-kit's server: several programs share it, as they share a network HSM.

    The server starts a process with the module for each connection, all of them in a process group. The token itself
    is in memory: an HSM would not wait for this machine's disk.

    Args:
        directory: for its socket, its log and its PIN.
    """

    program = "p11-kit"
    leads = True
    label = "site"
    module = Path("/usr/lib/softhsm/libsofthsm2.so")

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.pin = secrets.token_hex(4)
        self._pin_file = directory / "pin"
        self._pin_file.write_text(self.pin)
        self._pin_file.chmod(0o600)
        self._socket = directory / "socket"
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def uri(self) -> str:
        """The key store in it, for a program that has `clients` in its environment."""
        return f"pkcs11:token={self.label}?module-path={self.client_module()}&pin-source=file:{self._pin_file}"

    @staticmethod
    def client_module() -> Path:
        """The module that such a program loads."""
        [client] = Path("/usr/lib").glob("*/pkcs11/p11-kit-client.so")
        return client

    @property
    def clients(self) -> dict[str, str]:
        """What a program that uses it needs in its environment."""
        return {"P11_KIT_SERVER_ADDRESS": f"unix:path={self._socket}"}

    def command(self) -> list[str]:
        where = ("--provider", str(self.module), "--name", str(self._socket))
        return ["server", "--foreground", *where, f"pkcs11:token={self.label}"]

    def listening(self) -> bool:
        return is_listening_at(self._socket)

    def launch(self) -> Self:
        if self._folder is None:
            self._make()
        self._socket.unlink(missing_ok=True)
        return super().launch()

    def _make(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of ours is made in it
        self._folder = tempfile.TemporaryDirectory(prefix="stationkey-token-", dir=memory)
        home = Path(self._folder.name)
        (home / "tokens").mkdir()
        (home / "softhsm2.conf").write_text(f"directories.tokendir = {home}/tokens\n")
        self.environment = {"SOFTHSM2_CONF": str(home / "softhsm2.conf")}
        self.run(
            *("softhsm2-util", "--init-token", "--free", "--label", self.label),
            *("--so-pin", secrets.token_hex(4), "--pin", self.pin),
        )

    def run(self, *command: str) -> str:
        """Run a program that loads the module itself; return what it says."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def kill(self) -> None:
        """End it and each of its processes, as an HSM that loses its power."""
        self._signal(signal.SIGKILL)
        super().kill()

    def freeze(self) -> None:
        """Stop it and each of its processes."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let all of them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Postgresql(Peer):
    """A PostgreSQL server with a database and the user who owns it, reached by TCP with a password.

    Its data is in a folder of its own, which another user can reach: the server refuses to run as root.

    Args:
        directory: for its log and the password.
        settings: lines of ``postgresql.conf`` beside those given here.
        fsync: off where no test is about what survives; a daemon refuses such a server.
        max_connections: how many connections it takes.

    Attributes:
        password_file: what ``ledger_password_file`` takes.
    """

    program = "postgres"
    start_timeout = 30.0
    name = "stationkey"
    """Of the user and of the database."""
    admin = "admin"
    """The superuser, who needs no password on the Unix socket."""

    def __init__(
        self, directory: Path, settings: Iterable[str] = (), *, fsync: bool = True, max_connections: int = 100
    ) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.user = ("postgres" if _exists("postgres") else "nobody") if os.getuid() == 0 else None
        self.password = secrets.token_hex(8)
        self.password_file = directory / "password"
        self.password_file.write_text(self.password)
        self.password_file.chmod(0o600)
        self._settings = (
            f"port = {self.port}",
            "listen_addresses = '127.0.0.1'",
            "shared_buffers = '16MB'",
            f"max_connections = {max_connections}",
            f"fsync = {'on' if fsync else 'off'}",
            *settings,
        )
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._earlier = 0

    @property
    def uri(self) -> str:
        """What ``ledger`` takes."""
        return f"postgresql://{self.name}@127.0.0.1:{self.port}/{self.name}"

    @property
    def admin_uri(self) -> str:
        """The superuser's way in, by the Unix socket."""
        return f"postgresql://{self.admin}@/{self.name}?host={self._home}&port={self.port}"

    @property
    def data(self) -> Path:
        """Its data folder."""
        return self._home / "data"

    @property
    def _home(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name)

    def command(self) -> list[str]:
        return ["-D", str(self.data)]

    def launch(self) -> Self:
        if self._folder is None:
            self._make()
        log = self.directory / "log"
        self._earlier = len(self.log) if log.exists() else 0
        return super().launch()

    def _make(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stationkey-postgresql-")
        if self.user is not None:
            shutil.chown(self._home, self.user)
        self._make_data()
        with (self.data / "postgresql.conf").open("a") as configuration:
            lines = (*self._settings, f"unix_socket_directories = '{self._home}'")
            configuration.write("\n".join(lines) + "\n")

    def _make_data(self) -> None:
        """Make the data folder, with the user and the database."""
        self._run(
            *("initdb", "-D", str(self.data), "-U", self.admin, "-E", "UTF8", "--locale=C", "--no-sync"),
            *("--auth-local=trust", "--auth-host=scram-sha-256"),
        )
        statements = (
            f"CREATE USER {self.name} PASSWORD '{self.password}'",
            f"CREATE DATABASE {self.name} OWNER {self.name}",
        )
        self._run("postgres", "--single", "-D", str(self.data), "postgres", said="\n".join(statements) + "\n")

    def _run(self, program: str, *arguments: str, said: str = "") -> None:
        path = shutil.which(program, path=search_path())
        if path is None:
            raise RuntimeError(f"{program} is not installed; scripts/setup installs it")
        done = subprocess.run(
            [path, *arguments],
            input=said,
            capture_output=True,
            text=True,
            check=False,
            user=self.user,
            cwd="/",
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def listening(self) -> bool:
        return "ready to accept connections" in self.log[self._earlier :]  # it listens before, while it recovers

    def kill(self) -> None:
        """End it as a loss of power would: without a checkpoint, and with all its processes [immediate shutdown]."""
        self._end(signal.SIGQUIT)

    def terminate(self) -> None:
        """End it in its own good order, without waiting for those who are connected [fast shutdown]."""
        self._end(signal.SIGINT)

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        self.thaw()
        self.process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        super().kill()

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


class Daemon(Peer):
    """``stationkey serve``, its log in JSON. The log goes on from one run to the next."""

    program = sys.executable

    def __init__(self, directory: Path, *arguments: str) -> None:
        super().__init__(directory)
        self.arguments = arguments
        self._earlier = 0

    def command(self) -> list[str]:
        return ["-m", "stationkey", "serve", "--log-format", "json", *self.arguments]

    def launch(self) -> Self:
        log = self.directory / "log"
        self._earlier = log.stat().st_size if log.exists() else 0
        return super().launch()

    @property
    def run_log(self) -> str:
        """What it has said in this run, or in the last one."""
        with (self.directory / "log").open("rb") as log:
            log.seek(self._earlier)
            return log.read().decode(errors="replace")

    def events(self, **fields: object) -> list[dict[str, Any]]:
        """The events of this run, or of the last one, that have these fields."""
        lines = [line for line in self.run_log.splitlines(keepends=True) if line.endswith("\n")]  # the last may be half
        events = [json.loads(line) if line.startswith("{") else {"event": line.rstrip("\n")} for line in lines]
        return [event for event in events if fields.items() <= event.items()]

    def listening(self) -> bool:
        return any(event["event"].startswith(("ready", "serving degraded")) for event in self.events())
