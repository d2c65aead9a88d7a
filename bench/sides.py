"""The sides: the TPM alone, the programs in use today, and stationkey's daemon. Each act takes one sample.

Everything here talks to one swtpm, so that what differs is the way to it. Times are in milliseconds.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# Read when tpm2-tss is loaded. It would print each TPM error by itself; here they are exceptions.
os.environ.setdefault("TSS2_LOG", "all+none")
# An installed package has its byte code. A daemon that compiles itself takes a MiB and tenths of a second more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from peers import Daemon, Mosquitto, Swtpm
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import TPM2_ALG, TPM2_CAP, TPM2_RH, TPM2_ST, TPMA_OBJECT
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_SIG_SCHEME, TPMT_TK_HASHCHECK

from bench.rows import GENPKEY_TPM, REQ_SOFTWARE, REQ_TPM, TOOLS

SRK: Final = 0x81000001
GAP: Final = 0.01
"""Seconds between two samples, so that what a side does after its answer does not slow down the next one."""
PATIENCE: Final = 120.0
"""Seconds to wait for an answer or a full pool."""
IN_FLIGHT: Final = 16

Act = Callable[[], float]
"""Takes one sample: does the work once, and returns its duration or rate."""


class Unavailable(Exception):
    """The side cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A key type, by the name that each program has for it."""

    template: str
    scheme: Any
    hash: Any
    digest: str
    algorithm: str
    newkey: tuple[str, ...]
    genpkey: tuple[str, ...]


def _elliptic(curve: str, bits: int, digest: str, hash_id: Any, algorithm: str) -> Kind:
    named = ("-pkeyopt", f"group:{curve}")
    return Kind(f"ecc{bits}", TPM2_ALG.ECDSA, hash_id, digest, algorithm, ("ec", *named), ("EC", *named))


KIND: Final = {
    "P-256": _elliptic("P-256", 256, "sha256", TPM2_ALG.SHA256, "ECDSA_SHA256"),
    "P-521": _elliptic("P-521", 521, "sha512", TPM2_ALG.SHA512, "ECDSA_SHA512"),
    "RSA-3072": Kind(
        "rsa3072",
        TPM2_ALG.RSASSA,
        TPM2_ALG.SHA256,
        "sha256",
        "RSA_SHA256",
        ("rsa:3072",),
        ("RSA", "-pkeyopt", "bits:3072"),
    ),
}


# The TPM alone.


class Floor:
    """Create, Load and Sign through tpm2-pytss: a key and its signature by the TPM alone."""

    _ATTRIBUTES: Final = (
        TPMA_OBJECT.FIXEDTPM
        | TPMA_OBJECT.FIXEDPARENT
        | TPMA_OBJECT.SENSITIVEDATAORIGIN
        | TPMA_OBJECT.USERWITHAUTH
        | TPMA_OBJECT.NODA
        | TPMA_OBJECT.SIGN_ENCRYPT
    )

    def __init__(self, tpm: Swtpm) -> None:
        self._esapi = ESAPI(tpm.tcti)
        try:
            self._srk = self._esapi.tr_from_tpmpublic(SRK)
        except TSS2_Exception as error:
            raise Unavailable(f"no storage root key at {SRK:#x}: {error}") from None

    def act(self, kind: Kind) -> Act:
        """Return the act of a key and a signature; preparing and unloading are not timed."""
        esapi, srk, sensitive = self._esapi, self._srk, TPM2B_SENSITIVE_CREATE()
        template = TPM2B_PUBLIC.parse(kind.template, objectAttributes=self._ATTRIBUTES)
        digest = bytes({"sha256": 32, "sha512": 64}[kind.digest])
        scheme = TPMT_SIG_SCHEME(scheme=kind.scheme)
        scheme.details.any.hashAlg = kind.hash
        ticket = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)

        def once() -> float:
            started = time.perf_counter()
            private, public, *_ = esapi.create(srk, sensitive, template)
            key = esapi.load(srk, private, public)
            esapi.sign(key, digest, scheme, ticket)
            took = time.perf_counter() - started
            esapi.flush_context(key)
            return took * 1000

        return once

    def flush(self) -> None:
        """Unload the keys that a program left: a bare TPM has three slots."""
        _, found = self._esapi.get_capability(TPM2_CAP.HANDLES, 0x80000000, 16)
        for handle in found.data.handles:
            self._esapi.flush_context(self._esapi.tr_from_tpmpublic(int(handle)))

    def close(self) -> None:
        """Close the connection."""
        self._esapi.close()


# What is in use today.


def programs(side: str, kind: Kind, tpm: Swtpm, folder: Path) -> Act:
    """Return the act of whole commands, their start included.

    Raises:
        Unavailable: a program is not installed.
    """
    # The storage root key is named, which saves the provider making one for each key; and of the orders and queries
    # that work this is the fastest.
    provider = ("-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2")
    parent = ("-pkeyopt", f"parent:{SRK:#x}")
    csr = (f"-{kind.digest}", "-subj", "/C=DE/O=Example/CN=DE-ABC-S-1", "-out", "csr.pem")
    new = ("-keyout", "key.pem", "-noenc", *csr)
    srk = f"{SRK:#x}"
    commands: dict[str, list[tuple[str, ...]]] = {
        REQ_TPM: [("openssl", "req", *provider, "-newkey", *kind.newkey, *parent, *new)],
        GENPKEY_TPM: [
            ("openssl", "genpkey", *provider, "-algorithm", *kind.genpkey, *parent, "-out", "key.pem"),
            ("openssl", "req", *provider, "-new", "-key", "key.pem", *csr),
        ],
        TOOLS: [
            ("tpm2_create", "-Q", "-C", srk, "-G", kind.template, "-u", "key.pub", "-r", "key.priv"),
            ("tpm2_load", "-Q", "-C", srk, "-u", "key.pub", "-r", "key.priv", "-c", "key.ctx"),
            ("tpm2_sign", "-Q", "-c", "key.ctx", "-g", kind.digest, "-o", "signature", "data"),
        ],
        REQ_SOFTWARE: [("openssl", "req", "-newkey", *kind.newkey, *new)],
    }
    if missing := sorted({words[0] for words in commands[side] if shutil.which(words[0]) is None}):
        raise Unavailable(f"{', '.join(missing)} is not installed")
    folder.mkdir(exist_ok=True)
    (folder / "data").write_bytes(b"to be signed")
    environment = {**os.environ, "TPM2OPENSSL_TCTI": tpm.tcti, "TPM2TOOLS_TCTI": tpm.tcti}
    return lambda: sum(command(words, environment=environment, folder=folder) for words in commands[side])


def command(words: tuple[str, ...], *, environment: dict[str, str] | None = None, folder: Path | None = None) -> float:
    """Return how long a command takes, in milliseconds.

    Raises:
        Unavailable: it failed.
    """
    started = time.perf_counter()
    done = subprocess.run(
        words,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    took = time.perf_counter() - started
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{words[0]} failed: {said[-1] if said else done.returncode}")
    return took * 1000


# stationkey.


class StockMosquitto(Mosquitto):
    """Mosquitto as Debian configures it, with ``packaging/mosquitto/stationkey.conf``.

    The one of the tests writes its database after every message, so that it can be killed.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        configuration = directory / "mosquitto.conf"
        kept = [line for line in configuration.read_text().splitlines() if not line.startswith("autosave_")]
        configuration.write_text("\n".join(kept) + "\n")


class Asker:
    """Josev's part, as lean as paho allows: no thread, and no answer is parsed."""

    def __init__(self, broker: Mosquitto, prefix: str) -> None:
        self._topic = f"{prefix}/josev/cs"
        self._received: list[tuple[float, bytes]] = []
        self._numbers = itertools.count()
        self._client = client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        subscribed: list[bool] = []
        client.on_subscribe = lambda *_: subscribed.append(True)
        client.on_message = lambda *said: self._received.append((time.perf_counter(), said[2].payload))
        client.connect("127.0.0.1", broker.port, keepalive=3600)
        connection = client.socket()
        assert isinstance(connection, socket.socket)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        while not client.is_connected():
            self._turn()
        client.subscribe(f"{prefix}/cs/josev", qos=1)
        while not subscribed:
            self._turn()

    def _turn(self) -> None:
        """Wait for the broker, and take what it sends."""
        writing = [self._socket] if self._client.want_write() else []
        readable, writable, _ = select.select([self._socket], writing, [], PATIENCE)
        if not readable and not writable:
            raise Unavailable(f"no answer within {PATIENCE:g} s")
        if writable:
            self._client.loop_write()
        if readable and self._client.loop_read() != paho.MQTT_ERR_SUCCESS:
            raise Unavailable("the broker closed the connection")

    def _request(self, algorithm: str) -> bytes:
        """Return a new request. The EVSEs take turns, so that no key has to make room for another."""
        number = next(self._numbers)
        data = {
            "certificate_type": "charging_station_certificate",
            "common_name": "9783161484100",
            "organization_name": "Example",
            "country_name": "DE",
            "evse_id": f"DE*ABC*E{number % EVSES}",
            "algorithm": algorithm,
        }
        return json.dumps({"id": str(uuid.uuid4()), "name": "generate_csr", "type": "request", "data": data}).encode()

    def _take(self) -> float:
        """Take the next answer, and return when it came."""
        while not self._received:
            self._turn()
        at, answer = self._received.pop(0)
        if b'"accepted"' not in answer:
            raise Unavailable("a request was rejected")
        return at

    def act(self, kind: Kind) -> Act:
        """Return the act of a request, from its publication to its answer."""

        def once() -> float:
            payload = self._request(kind.algorithm)
            started = time.perf_counter()
            self._client.publish(self._topic, payload, qos=1)
            return (self._take() - started) * 1000

        return once

    def rate(self, kind: Kind, count: int) -> float:
        """Return answers a second, with `IN_FLIGHT` requests in flight: each answer brings the next request."""
        payloads = [self._request(kind.algorithm) for _ in range(count)]
        started = time.perf_counter()
        for payload in payloads[:IN_FLIGHT]:
            self._client.publish(self._topic, payload, qos=1)
        ended = started
        for number in range(count):
            ended = self._take()
            if number + IN_FLIGHT < count:
                self._client.publish(self._topic, payloads[number + IN_FLIGHT], qos=1)
        return count / (ended - started)

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()


EVSES: Final = 200
LIFECYCLE: Final = "[lifecycle]\npending_limit = 100\npending_total = 10000\nhistory_limit = 100000\n"
"""Room for every key of a measurement: making room costs, and a station has a handful of keys, not thousands."""

# The pool, in this one place.
POOL_SIZE: Final = {"P-256": 16, "P-521": 16, "RSA-3072": 2}
"""Keys ready, and so requests in a row that a warm pool can serve. The two curves share one setting."""
POOL: Final = f"[pool]\nec = {POOL_SIZE['P-256']}\nrsa = {POOL_SIZE['RSA-3072']}\nidle_seconds = 0.05\n"
NO_POOL: Final = "[pool]\nrsa = 0\n"
NO_LIMIT: Final = "[policy]\nrequests_per_minute = 0\n"
"""A measurement asks as fast as it is answered; a station does not."""
POOL_FULL: Final = '"event": "pool full"'


@dataclass(slots=True)
class Station:
    """A daemon, and the client that asks it."""

    daemon: Daemon
    asker: Asker

    def times_full(self) -> int:
        """Return how often its pool has become full in this run."""
        return self.daemon.run_log.count(POOL_FULL)

    def until_full(self, seen: int) -> None:
        """Wait until the pool is full again, given how often it had been before."""
        end = time.monotonic() + PATIENCE
        while self.times_full() <= seen:
            if time.monotonic() > end:
                raise Unavailable(f"the pool did not become full within {PATIENCE:g} s")
            time.sleep(0.02)  # the log is the only one to tell


@contextmanager
def station(folder: Path, broker: Mosquitto, tpm: Swtpm, name: str, *, configuration: str = "") -> Iterator[Station]:
    """Start a daemon with topics of its own, in `folder`/`name`.

    Raises:
        Unavailable: it did not start.
    """
    home = folder / name
    arguments = serve_arguments(home, broker, tpm, name, configuration=configuration)
    with _asked(Daemon(home / "daemon", *arguments), broker, name) as one:
        yield one


class Composite(Daemon):
    """The program of `bench.composite`."""

    def command(self) -> list[str]:
        """Return the arguments of Python."""
        return ["-m", "bench.composite", *self.arguments]


@contextmanager
def composite(folder: Path, broker: Mosquitto, tpm: Swtpm, name: str, *, ahead: bool) -> Iterator[Station]:
    """Start the composite floor, as `station`; the TPM has a storage root key.

    Raises:
        Unavailable: it did not start.
    """
    home = folder / name
    home.mkdir()
    arguments = (str(broker.port), name, tpm.tcti, str(home / "answers.sqlite3"), "ahead" if ahead else "now")
    with _asked(Composite(home / "daemon", *arguments), broker, name) as one:
        yield one


@contextmanager
def _asked(daemon: Daemon, broker: Mosquitto, name: str) -> Iterator[Station]:
    try:
        daemon.start()
    except RuntimeError:
        raise Unavailable(f"the daemon did not start: {_last_words(daemon)}") from None
    try:
        asker = Asker(broker, name)
        try:
            yield Station(daemon, asker)
        finally:
            asker.close()
    finally:
        daemon.terminate()


def serve_arguments(home: Path, broker: Mosquitto, tpm: Swtpm, name: str, *, configuration: str) -> tuple[str, ...]:
    """Return the arguments of ``stationkey serve``, with its files in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    # A name of its own at the broker, also where its state was copied from another's.
    pool = "" if "[pool]" in configuration else NO_POOL
    (home / "stationkey.toml").write_text(f'client_id = "{name}"\n{configuration}{pool}{NO_LIMIT}')
    return (
        *("--broker", broker.url, "--keystore", tpm.uri, "--topic-prefix", name),
        *("--state-dir", str(home / "state"), "--config", str(home / "stationkey.toml")),
    )


def _last_words(daemon: Daemon) -> str:
    """Return the last line of its log, without the path of its directory."""
    lines = daemon.run_log.strip().splitlines() or ["nothing was logged"]
    words = lines[-1]
    return words.replace(str(daemon.directory.parent), "").strip()


def start_once(home: Path, arguments: tuple[str, ...], *, before: tuple[str, ...] = ()) -> float:
    """Return the milliseconds from the daemon's start until it is subscribed, by its ``READY=1`` to a service manager.

    Args:
        home: its folder.
        arguments: of ``stationkey serve``.
        before: a command that runs the one that follows it.

    Raises:
        Unavailable: it ended instead, or said nothing.
    """
    address = f"stationkey-bench-{uuid.uuid4().hex}"
    words = [*before, sys.executable, "-m", "stationkey", "serve", "--log-format", "json", *arguments]
    environment = {**os.environ, "NOTIFY_SOCKET": f"@{address}"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, (home / "log").open("wb") as log:
        told.bind(f"\0{address}")
        told.settimeout(PATIENCE)
        started = time.perf_counter()
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            said = told.recv(64)
            took = time.perf_counter() - started
        except TimeoutError:
            raise Unavailable("the daemon did not say that it is ready") from None
        finally:
            process.terminate()
            process.wait(PATIENCE)
    if said != b"READY=1":
        raise Unavailable(f"the daemon did not become ready, but said {said!r}")
    return took * 1000


def processor_time(daemon: Daemon) -> float:
    """Return the processor time of a program's living threads, user and system, in milliseconds."""
    assert daemon.process is not None
    tasks = Path(f"/proc/{daemon.process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def resident(daemon: Daemon) -> float:
    """Return the resident memory of a daemon, in MiB [proc(5), VmRSS]."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
