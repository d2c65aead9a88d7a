"""Whoever floods the broker: payloads of many bad kinds, and connections that do nothing but publish and listen."""

from __future__ import annotations

import json
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Self

from peers import Daemon, Mosquitto

BOUND: Final = 120.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""
ORGANIZATION: Final = "EcoG"
CONFIG: Final = f"""\
[policy]
organization_names = ["{ORGANIZATION}"]
[pool]
rsa = 0
"""
"""The limits are the default ones; a name is refused, so that there is something that the policy refuses."""


class PatientMosquitto(Mosquitto):
    """A broker that keeps whatever it is given for the daemon: what a flood does to the daemon is the point."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "max_queued_messages 0")
        configuration = directory / "mosquitto.conf"
        kept = [line for line in configuration.read_text().splitlines() if not line.startswith(("autosave", "persist"))]
        configuration.write_text("\n".join(kept) + "\n")


def request(request_id: str | None = None, **data: object) -> dict[str, Any]:
    """A ``generate_csr`` request, right but for what `data` has."""
    asked = {
        "certificate_type": "charging_station_certificate",
        "common_name": "9783161484100",
        "organization_name": ORGANIZATION,
        "country_name": "DE",
    }
    return {
        "id": request_id or str(uuid.uuid4()),
        "name": "generate_csr",
        "type": "request",
        "data": {name: value for name, value in {**asked, **data}.items() if value is not None},
    }


def status(**data: object) -> dict[str, Any]:
    """A ``certificate_installation_status`` that fits no key."""
    told = {"certificate_type": "v2g_certificate", "status": "installed", "evse_id": "DE*ABC*E404"}
    name = "certificate_installation_status"
    return {"id": str(uuid.uuid4()), "name": name, "type": "update", "data": {**told, **data}}


def wire(message: object) -> bytes:
    return json.dumps(message).encode()


def bad_kinds(used: dict[str, Any]) -> dict[str, tuple[Callable[[], bytes], bool]]:
    """By name: what makes a bad message of the kind, and whether it is to be answered.

    Args:
        used: a request that was answered.
    """
    return {
        "no JSON": (lambda: b'{"name": "generate_csr", ' + uuid.uuid4().bytes.hex().encode(), False),
        "no UTF-8": (lambda: b'{"name": "generate_csr\xff"}', False),
        "no object": (lambda: b"[1, 2, 3]", False),
        "no id": (lambda: wire({**request(), "id": "7"}), False),
        "two ids": (lambda: wire(request()).replace(b'"name"', b'"id": "7", "name"', 1), False),
        "two names": (lambda: wire(request()).replace(b'"country_name"', b'"common_name": "x", "country_name"'), True),
        "wrong country": (lambda: wire(request(country_name="GER")), True),
        "no organization": (lambda: wire(request(organization_name=None)), True),
        "long name": (lambda: wire(request(common_name="x" * 500)), True),
        "control character": (lambda: wire(request(common_name="\u202e" * 40)), True),
        "wrong EVSE": (lambda: wire(request(evse_id="../../etc/passwd")), True),
        "unknown type": (lambda: wire(request(certificate_type="root_certificate")), True),
        "wrong algorithm": (lambda: wire(request(certificate_type="v2g20_certificate")), True),
        "NaN": (lambda: wire(request(common_name=float("nan"))), True),
        "long number": (lambda: wire(request()).replace(b'"DE"', b"9" * 5000), True),
        "deep": (lambda: wire(request())[:-1] + b', "x": ' + b"[" * 2000 + b"]" * 2000 + b"}", True),
        "against the policy": (lambda: wire(request(organization_name="Mallory")), True),
        "id used before": (lambda: wire(request(used["id"].upper(), common_name="another")), True),
        "not ours": (lambda: wire({"id": str(uuid.uuid4()), "name": "cs_status_and_limits", "type": "update"}), False),
        "status for no key": (lambda: wire(status()), False),
        "wrong status": (lambda: wire(status(status="lost")), False),
    }


LARGE: Final = wire(request(common_name="x" * 70_000))
"""Too large; always of one id."""
HUGE: Final = wire(request(common_name="x" * 400_000))
"""So large that a part of it is all that is kept."""


# MQTT 3.1.1 by hand: a client library would take longer to publish these than the daemon to refuse them.


def packet(kind: int, body: bytes, *, filler: int = 0) -> bytes:
    """A packet, or the front of one: so many bytes are to follow."""
    length, digits = len(body) + filler, bytearray()
    while True:
        length, digit = divmod(length, 128)
        digits.append(digit | (128 if length else 0))
        if not length:
            return bytes([kind, *digits]) + body


def text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def _connect(client_id: str) -> bytes:
    return packet(0x10, text("MQTT") + bytes([4, 2, 0, 0]) + text(client_id))


def publish(payload: bytes, number: int) -> bytes:
    """A PUBLISH of QoS 1 on ``josev/cs``."""
    return packet(0x32, text("josev/cs") + (number % 65_535 + 1).to_bytes(2, "big") + payload)


def packets(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """First byte and body of each packet that comes, until the other side ends."""
    with connection.makefile("rb") as stream:
        while head := stream.read(1):
            length = shift = 0
            while True:
                digit = stream.read(1)[0]
                length |= (digit & 127) << shift
                shift += 7
                if digit < 128:
                    break
            yield head[0], stream.read(length)


class Connection:
    """A connection to the broker, and a thread that takes in whatever comes on it."""

    def __init__(self, broker: Mosquitto) -> None:
        self._broker = broker

    def __enter__(self) -> Self:
        self._socket = socket.create_connection(("127.0.0.1", self._broker.port), BOUND)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(_connect(f"flood-{uuid.uuid4().hex[:8]}"))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def send(self, packets: bytes) -> None:
        self._socket.sendall(packets)

    def _read(self) -> None:
        for head, body in packets(self._socket):
            self.take(head, body)

    def take(self, head: int, body: bytes) -> None:
        """Take in a packet; acknowledgements need no more than that."""


class Listener(Connection):
    """Hears what is published on ``cs/josev``.

    Attributes:
        answers: how often each id was answered, by id and status.
        total: how many answers of each status there were.
        csrs: the last CSR of each id.
    """

    def __init__(self, broker: Mosquitto) -> None:
        super().__init__(broker)
        self._news = threading.Condition()
        self._subscribed = threading.Event()
        self.answers: Counter[tuple[str, str]] = Counter()
        self.total: Counter[str] = Counter()
        self.csrs: dict[str, str] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        self.send(packet(0x82, b"\0\1" + text("cs/josev") + b"\0"))
        assert self._subscribed.wait(BOUND)
        return self

    def take(self, head: int, body: bytes) -> None:
        if head >> 4 == 9:
            self._subscribed.set()
        if head >> 4 != 3:
            return
        answer = json.loads(body[2 + int.from_bytes(body[:2], "big") :])
        with self._news:
            self.answers[answer["id"], answer["data"]["status"]] += 1
            self.total[answer["data"]["status"]] += 1
            if "csr" in answer["data"]:
                self.csrs[answer["id"]] = answer["data"]["csr"]
            self._news.notify_all()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        with self._news:
            assert self._news.wait_for(condition, BOUND), f"waited in vain until {what}"

    def ask(self, message: dict[str, Any]) -> str:
        """Publish a request, wait for the next answer to it, and return its status."""

        def count() -> int:
            return sum(self.answers[message["id"], status] for status in ("accepted", "rejected"))

        before, accepted = count(), self.answers[message["id"], "accepted"]
        self.send(publish(wire(message), 0))
        self.wait_for(lambda: count() > before, f"{message['id']} is answered")
        return "accepted" if self.answers[message["id"], "accepted"] > accepted else "rejected"


def in_parts(packets: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Packets put together, so many at a time."""
    part: list[bytes] = []
    for packet in packets:
        part.append(packet)
        if len(part) == size:
            yield b"".join(part)
            part.clear()
    yield b"".join(part)


# The daemon, looked at from outside.


def memory(daemon: Daemon) -> tuple[int, int]:
    """Resident memory in KiB, now and at the most so far [proc(5)]."""
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmRSS"].split()[0]), int(fields["VmHWM"].split()[0])


def size(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def counts_of(daemon: Daemon) -> dict[str, Any]:
    """What a daemon that has ended counted."""
    [stopped] = daemon.events(event="stopped")
    return stopped
