"""A broker that plays the sessions of `mqtt_grammar` against the real daemon, and judges what comes of them.

After each session the daemon must live, keep to the bound on its memory, have acknowledged nothing untrue, and answer a
good request over a good connection; and SIGTERM must end it in time, in the middle of a session.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.x509.oid import NameOID
from flood import memory, packet, packets, request, wire
from mqtt_grammar import (
    CONNACK,
    PINGRESP,
    PUBACK,
    SUBACK,
    UNSUBACK,
    V5,
    V311,
    Grammar,
    Session,
    Step,
    identifier_at,
    publish,
)
from peers import Daemon

CORPUS: Final = Path(__file__).parent / "sessions"
BOUND: Final = 60.0
"""Seconds for the answer to a good request. Nothing is measured by it."""
MEMORY: Final = 16 * 1024
"""KiB that a connection may cost, whatever comes over it: the bound of docs/threat-model.md."""
MEMORY_MAX: Final = 256 * 1024
"""KiB that systemd lets the service have: ``MemoryMax=`` of its unit."""
TERM: Final = 10.0
"""Seconds that SIGTERM may take."""
HARD: Final = 5.0
"""Seconds that the daemon may not read for, before the broker gives up."""
PATIENCE: Final = 1.0
"""Seconds until the broker ends a connection on which the daemon waits for something: it would for `KEEPALIVE`."""
UUID: Final = re.compile(rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
CONFIG: Final = """\
[policy]
requests_per_minute = 0
[pool]
rsa = 0
"""


class ImpatientDaemon(Daemon):
    """`impatient_daemon.py`, in the place of ``stationkey serve``."""

    start_timeout = BOUND

    def command(self) -> list[str]:
        return [str(Path(__file__).with_name("impatient_daemon.py")), *super().command()[2:]]


class Untrue(AssertionError):
    """Something that must hold does not."""


class Link:
    """One connection of the daemon's.

    Args:
        broker: that it came to.
        sock: the socket.
    """

    def __init__(self, broker: HostileBroker, sock: socket.socket) -> None:
        self.broker = broker
        self.session: Session | None = None
        self.ended = threading.Event()
        self._sock = sock
        self._sending = threading.Lock()
        self._hearing = threading.Event()
        self._hearing.set()
        self._asked: dict[int, list[str]] = {}
        self._sent = bytearray()
        self.taken: set[int] = set()
        """Identifiers for which a PUBACK was sent, whatever for."""

    def serve(self) -> None:
        """Take what comes, until one side ends."""
        try:
            for head, body in packets(self._sock):
                self._hearing.wait(HARD)
                self._take(head, body)
        except (OSError, IndexError, ValueError):
            pass  # it may hang up at any moment
        except Untrue as untrue:
            self.broker.untrue.append(str(untrue))
        finally:
            self.ended.set()
            self.close("fin")

    def close(self, how: str) -> None:
        """End the connection."""
        with suppress(OSError):
            if how == "rst":
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads, as a close would not

    def send(self, data: bytes) -> None:
        """Send bytes that are no request."""
        if data[:1] == b"\x40":
            with self.broker.lock:
                self.taken.add(int.from_bytes(data[2:4], "big"))
        with self._sending:
            if len(self._sent) < _KEPT:
                self._sent += data
            self._sock.sendall(data)

    def publish(self, data: bytes, asked: list[tuple[int, str]]) -> None:
        """Send bytes in which there may be requests."""
        with self.broker.lock:
            self.broker.ids.update(found.decode() for found in UUID.findall(data))
            for identifier, request_id in asked:
                self._asked.setdefault(identifier, []).append(request_id)
                self.broker.times[request_id] += 1
        self.send(data)

    def _take(self, head: int, body: bytes) -> None:
        session = self.session or Session(level=self.level)
        match head >> 4:
            case 1:
                self._greet(body[6])
            case 3:
                self._take_answer(head, body, session)
            case 4:
                self._take_acknowledgement(int.from_bytes(body[:2], "big"))
            case 5 | 6 | 7:
                raise Untrue("a packet of QoS 2, which was never subscribed to, was taken")
            case 8:
                self._reply(SUBACK, body[:2], session.properties, b"\1", session.subscribe, session)
                if session is not self.session:
                    self.broker.subscribed(self)
                elif not session.early:
                    threading.Thread(target=self._play, daemon=True).start()
            case 10:
                reason = b"\0" if session.level == V5 else b""
                self._reply(UNSUBACK, body[:2], session.properties, reason, session.subscribe, session)
            case 12:
                self.send(packet(PINGRESP, b""))

    level = V5

    def _greet(self, level: int) -> None:
        self.level = level
        self.session = session = self.broker.next_session(level)
        if session is not None and level > session.level:
            self.session = None
            self.broker.put_back(session)
            self.send(packet(CONNACK, b"\0\1"))
            self.close("fin")
            return
        if session is not None and session.early:
            threading.Thread(target=self._play, daemon=True).start()
        own = session is not None and bytes.fromhex(session.connack)
        self.send(own or packet(CONNACK, b"\0\0" + Session(level=level).properties))
        if own:  # it may well end here
            threading.Thread(target=self._play_in_the_end, daemon=True).start()

    def _play_in_the_end(self) -> None:
        """Play the session though the daemon may never subscribe."""
        self.ended.wait(1.0)
        self._play()

    def _reply(self, kind: int, number: bytes, properties: bytes, reason: bytes, how: str, session: Session) -> None:
        """Answer a packet as the session has it."""
        wrong = bytes([number[0], number[1] ^ 1])
        right = packet(kind, number + properties + reason)
        refusal = packet(kind, number + properties + b"\x87") if session.level == V5 else packet(kind, number + b"\x80")
        other = packet(PUBACK, number) if kind != PUBACK else packet(SUBACK, number + session.properties + b"\0")
        replies = {
            "right": right,
            "silent": b"",
            "wrong id": packet(kind, wrong + properties + reason),
            "twice": right * 2,
            "wrong type": other,
            "refused": refusal,
            "half": right[:1],
        }
        if reply := replies[how]:
            self.send(reply)

    def _take_answer(self, head: int, body: bytes, session: Session) -> None:
        begin = 2 + int.from_bytes(body[:2], "big")
        number = body[begin : begin + 2] if head & 0x06 else b""
        properties = b"" if self.level == V311 else b"\0"
        answer = json.loads(body[begin + len(number) + len(properties) :])
        self.broker.take_answer(answer)
        with self.broker.lock:
            self.broker.places.setdefault(answer["id"], []).append((self, int.from_bytes(number, "big")))
            if not number:  # QoS 0
                self.taken.add(0)
        if number and session.publish == "refused" and session.level == V5:
            self.send(packet(PUBACK, number + b"\x87"))
        elif number:
            how = "right" if session.publish == "refused" else session.publish
            self._reply(PUBACK, number, b"", b"", how, session)

    def _take_acknowledgement(self, number: int) -> None:
        """Nothing is acknowledged that was not sent, and no request before its answer is with the broker."""
        with self.broker.lock:
            asked = self._asked.get(number, [])
            if len(asked) == 1 and asked[0] and self.broker.times[asked[0]] == 1 and not self.broker.has(asked[0]):
                raise Untrue(f"request {asked[0]} was acknowledged, and its answer is not with the broker")
            if len(self._sent) < _KEPT and number.to_bytes(2, "big") not in self._sent and not asked:
                raise Untrue(f"packet identifier {number} was acknowledged, and was never sent")

    def _play(self) -> None:
        """Send what the session has."""
        assert self.session is not None
        try:
            for step in self.session.steps:
                if step.deaf:
                    self._hearing.clear()
                self._send_step(step)
                self._hearing.set()
        except OSError:
            pass  # the daemon hung up, as it should
        finally:
            self._hearing.set()
            self.broker.played(self)

    def _send_step(self, step: Step) -> None:
        for data in step.packets():
            asked = _requests_in(data)
            if not step.drip:
                self.publish(data, asked)
                continue
            self.publish(b"", asked)
            with self.broker.lock:
                self.broker.ids.update(found.decode() for found in UUID.findall(data))
            for at in range(len(data)):
                self.send(data[at : at + 1])
                time.sleep(0.0005)  # a drip


_KEPT: Final = 1024 * 1024
"""Bytes of a connection that are kept, to know what was sent."""


def _requests_in(data: bytes) -> list[tuple[int, str]]:
    """Return identifier and id of the PUBLISH of QoS 1 that `data` is; the id is empty where it is no legal request."""
    at = identifier_at(data)
    if at < 0 or data[0] & 0xF6 != 0x32:
        return []
    found = UUID.findall(data)
    whole = data == packet(data[0], data[at - 10 :]) and data[at - 10 : at] == b"\0\x08josev/cs"
    asked = whole and b"generate_csr" in data and len(found) == 1
    return [(int.from_bytes(data[at : at + 2], "big"), found[0].decode() if asked else "")]


class HostileBroker:
    """Serves every connection well, but for the one that a session is for.

    Args:
        tls: with which connections are taken.

    Attributes:
        ids: all ids that were ever sent to the daemon.
        times: how often each request was sent.
        places: on which connection each answer came, and with which packet identifier.
        untrue: what did not hold.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.lock = threading.RLock()
        self.ids: set[str] = set()
        self.times: Counter[str] = Counter()
        self.places: dict[str, list[tuple[Link, int]]] = {}
        self.untrue: list[str] = []
        self._news = threading.Condition(self.lock)
        self._answers: dict[str, dict[str, object]] = {}
        self._next: Session | None = None
        self._played = False
        self._good: Link | None = None
        self._links: list[Link] = []
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        port = self._listening.getsockname()[1]
        self.url = f"mqtts://127.0.0.1:{port}" if tls else f"mqtt://127.0.0.1:{port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        for link in self._links:
            link.close("rst")

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            sock.settimeout(HARD)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
        except OSError:
            sock.close()
            return
        with sock:
            sock.settimeout(BOUND * 2)
            link = Link(self, sock)
            self._links = [one for one in self._links if not one.ended.is_set()] + [link]
            link.serve()

    # What links tell.

    def next_session(self, level: int) -> Session | None:
        """Return the session that waits for a connection, if any."""
        with self.lock:
            session, self._next = self._next, None
            if session is not None and session.level > level:  # the daemon tries 3.1.1 after a 5 that failed
                self._next, session = session, None
            return session

    def put_back(self, session: Session) -> None:
        """Let the session wait for the next connection."""
        with self.lock:
            self._next = session

    def has(self, request_id: str) -> bool:
        """Whether the daemon may take it that the answer to a request is with the broker, or refused for good."""
        return any(number in link.taken for link, number in self.places.get(request_id, ()))

    def subscribed(self, link: Link) -> None:
        """Note that a good connection stands."""
        with self._news:
            self._good = link
            self._news.notify_all()

    def played(self, link: Link) -> None:
        """Note that a session was played."""
        assert link.session is not None
        if link.session.end != "left":
            time.sleep(0.05)  # so that the last packets are taken up: what comes is looked for, and not when
            link.close(link.session.end)
        with self._news:
            self._played = True
            self._news.notify_all()

    def take_answer(self, answer: dict[str, object]) -> None:
        """Look at an answer: it must be to what was asked, and no other than before."""
        with self._news:
            request_id = str(answer["id"])
            if request_id not in self.ids:
                raise Untrue(f"an answer to {request_id}, which was never sent")
            data = answer["data"]
            assert isinstance(data, dict)
            before = self._answers.get(request_id)
            if data["status"] == "accepted":
                if before is not None and before["csr"] != data["csr"]:
                    raise Untrue(f"two CSRs for {request_id}")
                self._answers[request_id] = data
            self._news.notify_all()

    # What is asked of it.

    def play(self, session: Session) -> None:
        """Play a session on the daemon's next connection, which is now."""
        with self._news:
            self._next, self._played = session, False
            good, self._good = self._good, None
        if good is not None:
            good.close("fin")
        with self._news:
            self._news.wait_for(lambda: self._played, 3 * HARD)  # a session may keep the daemon from subscribing
            self._next = None

    def probe(self) -> None:
        """Ask for a CSR over a good connection.

        Raises:
            Untrue: there is no connection, or no right answer.
        """
        with self._news:
            if self._good is None or self._good.ended.is_set():
                self._good = None
                self._news.wait_for(lambda: self._good is not None, PATIENCE)
            if self._good is None:
                for link in self._links:  # it may well stay on one on which nothing comes
                    link.close("rst")
            if not self._news.wait_for(lambda: self._good is not None, BOUND):
                raise Untrue("the daemon does not come back")
            assert self._good is not None
            asked = request()
            link = self._good
        link.publish(publish(Session(level=link.level), "josev/cs", wire(asked), 77), [(77, asked["id"])])
        with self._news:
            if not self._news.wait_for(lambda: asked["id"] in self._answers or self.untrue, BOUND):
                raise Untrue("a good request over a good connection is not accepted")
            if self.untrue:
                raise Untrue("; ".join(self.untrue))
            csr = x509.load_pem_x509_csr(str(self._answers[asked["id"]]["csr"]).encode())
        [name] = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if name.value != asked["data"]["common_name"] or not csr.is_signature_valid:
            raise Untrue("the CSR is not the one that was asked for")


class Arena:
    """A daemon and a hostile broker; for the length of a ``with`` block.

    Args:
        folder: for the daemon's files.
        tls: with which the broker takes connections.
        options: more of the daemon's options.
        daemon: which daemon.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        tls: ssl.SSLContext | None = None,
        daemon: Callable[..., Daemon] = ImpatientDaemon,
        config: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "stationkey.toml"
        file.write_text(CONFIG + config)
        self.broker = HostileBroker(tls)
        keys = ("--keystore", "software:", "--allow-software-keys")
        place = ("--config", str(file), "--broker", self.broker.url, "--state-dir", str(folder / "state"))
        self.daemon = daemon(folder / "daemon", *place, *keys, *options)
        self._before = 0

    def __enter__(self) -> Self:
        self.broker.__enter__()
        self.daemon.start()
        self.broker.probe()
        self._before, _ = memory(self.daemon)
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.kill()
        self.broker.__exit__()

    @property
    def grown(self) -> int:
        """KiB that the daemon has taken more than at the start, at the most so far."""
        return memory(self.daemon)[1] - self._before

    def play(self, session: Session) -> None:
        """Play a session, and judge.

        Raises:
            Untrue: something does not hold.
        """
        self.broker.play(session)
        self._alive()
        self.broker.probe()
        self._alive()
        if self.grown > MEMORY:
            raise Untrue(f"memory grew by {self.grown} KiB")
        if memory(self.daemon)[1] > MEMORY_MAX:
            raise Untrue("more memory than the unit lets it have")
        if faults := self.daemon.events(reason="internal_error"):
            raise Untrue(f"a fault of ours: {str(faults[0])[:2000]}")

    def end(self, session: Session) -> None:
        """End the daemon in the middle of a session.

        Raises:
            Untrue: it takes too long, or does not end well.
        """
        playing = threading.Thread(target=self.broker.play, args=(session,), daemon=True)
        playing.start()
        playing.join(0.1)
        process = self.daemon.process
        assert process is not None
        process.terminate()
        try:
            code = process.wait(TERM)
        except Exception:  # noqa: BLE001 - whatever it is, it is told
            raise Untrue(f"SIGTERM did not end it in {TERM:g} s") from None
        if code != 0:
            raise Untrue(f"ended with {code} after SIGTERM: {self.daemon.run_log[-2000:]}")
        if self.broker.untrue:
            raise Untrue("; ".join(self.broker.untrue))

    def _alive(self) -> None:
        assert self.daemon.process is not None
        code = self.daemon.process.poll()
        if code is not None:
            raise Untrue(f"the daemon ended with {code}: {self.daemon.run_log[-3000:]}")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="stationkey-hostile-") as folder:
        yield Path(folder)


def breaks(session: Session, make: Callable[[Path], Arena] = Arena) -> str:
    """Play a session against a daemon of its own; what does not hold, or an empty text."""
    with scratch() as folder:
        try:
            with make(folder) as arena:
                arena.play(session)
                arena.end(session)
        except Untrue as untrue:
            return str(untrue)
    return ""


def shrunk(session: Session, *, make: Callable[[Path], Arena] = Arena, seconds: float = 120.0) -> Session:
    """Return the smallest session that still breaks something, as far as it is found in time."""
    end = time.monotonic() + seconds
    smaller = iter(session.smaller())
    while time.monotonic() < end and (candidate := next(smaller, None)) is not None:
        if breaks(candidate, make):
            session = candidate
            smaller = iter(session.smaller())
    return session


def storm(
    seed: int, folder: Path, *, sessions: int, make: Callable[[Path], Arena] = Arena, until: float = float("inf")
) -> tuple[int, int]:
    """Play so many sessions of a seed against one daemon.

    Returns:
        How many were played, and KiB that memory grew by.

    Raises:
        Untrue: something does not hold; with the seed and the smallest packets that show it.
    """
    grammar, played = Grammar(seed), 0
    session = grammar.session()
    try:
        with make(folder) as arena:
            while played < sessions and time.monotonic() < until:
                session = grammar.session()
                played += 1
                arena.play(session)
            session = grammar.session()
            grown = arena.grown
            arena.end(session)
    except Untrue as untrue:
        alone = breaks(session, make)
        small = shrunk(session, make=make) if alone else session
        kept = keep(small, seed)
        how = f"session {played} of seed {seed}, {'alone' if alone else 'not alone'}"
        raise Untrue(f"{untrue}\n{how}; {kept}:\n{small.encoded()}") from None
    return played, grown


def keep(session: Session, seed: int) -> Path:
    """Keep a session in the corpus, or where the corpus cannot be written to."""
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"seed_{seed}.json"
    path.write_text(session.encoded() + "\n")
    return path
