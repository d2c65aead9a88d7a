"""The daemon as it is seen from outside: by its log, its exit status, and Mosquitto's own clients in Josev's place."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from peers import Daemon, Mosquitto

BOUND = 30.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""
PROMISED_END = 10.0
"""Seconds in which the daemon promises to end after SIGTERM or SIGINT."""

STATIONKEY = (sys.executable, "-m", "stationkey")
REASONED = Path(__file__).parent.parent / "support" / "reasoned.py"

Event = dict[str, Any]


class Lines:
    """The lines of a stream, kept as they come; whoever waits for one is woken by it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            with self._news:
                self._lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def so_far(self) -> list[str]:
        with self._news:
            return list(self._lines)

    def wait(self, found: Callable[[list[str]], bool]) -> list[str]:
        """The lines so far, as soon as `found` says yes to them."""
        with self._news:
            self._news.wait_for(lambda: self._ended or found(self._lines), BOUND)
            assert found(self._lines), "waited in vain; seen: " + "\n".join(self._lines)
            return list(self._lines)

    def close(self) -> None:
        self._thread.join()
        self._stream.close()


class Station(Daemon):
    """``stationkey serve`` on a state directory that outlives the process; its log is read as it comes.

    Args:
        folder: the state directory is made in it.
        arguments: of ``stationkey serve``.
        log_format: ``json`` or ``text``.
        environment: variables beside those of this process.
    """

    def __init__(self, folder: Path, *arguments: str, log_format: str = "json", **environment: str) -> None:
        super().__init__(folder, *arguments)
        self.state_dir = folder / "state"
        self.run_by(*STATIONKEY)
        self.environment = {"STATIONKEY_LOG_FORMAT": log_format, **environment}
        self._output: Lines | None = None
        self._earlier_lines: list[str] = []

    def run_by(self, *program: str) -> None:
        """Take another program in place of `STATIONKEY`; it is given ``serve`` and what follows."""
        self.program, *self._first = program

    def command(self) -> list[str]:
        return [*self._first, "serve", "--state-dir", str(self.state_dir), *self.arguments]

    def launch(self) -> Self:
        self._earlier_lines = self.lines
        self.process = self._spawn(subprocess.PIPE)
        assert self.process.stdout is not None
        self._output = Lines(io.TextIOWrapper(self.process.stdout, errors="replace"))
        return self

    def start(self) -> Self:
        """Start it, and wait until it is ready: by the event itself, as a line of text may have ``ready=0`` in it."""
        self.launch()
        try:
            self.wait_for_lines(lambda lines: any(_serves(_event(line)["event"]) for line in lines))
        except BaseException:
            self.kill()
            raise
        return self

    @property
    def lines(self) -> list[str]:
        """The log of all runs so far."""
        return [*self._earlier_lines, *(self._output.so_far() if self._output else [])]

    @property
    def run_log(self) -> str:
        return "".join(f"{line}\n" for line in (self._output.so_far() if self._output else []))

    def wait_for_lines(self, found: Callable[[list[str]], bool]) -> list[str]:
        """The lines of this run so far, as soon as `found` says yes to them."""
        assert self._output is not None
        return self._output.wait(found)

    def wait_for(self, text: str = "", *, count: int = 1, **fields: object) -> list[Event]:
        """Wait until `count` events of this run have `text` in them, and these fields."""

        def matching(lines: Iterable[str]) -> list[Event]:
            events = map(_event, lines)
            return [event for event in events if text in event["event"] and fields.items() <= event.items()]

        return matching(self.wait_for_lines(lambda lines: len(matching(lines)) >= count))

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def ended(self) -> int:
        """The exit status, once it has ended by itself in the time that it promises."""
        assert self.process is not None
        try:
            return self.process.wait(PROMISED_END)
        finally:
            self.kill()

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.ended()

    def kill(self) -> None:
        super().kill()
        self._read_to_the_end()

    def terminate(self) -> None:
        super().terminate()
        self._read_to_the_end()

    def _read_to_the_end(self) -> None:
        if self._output is not None:
            self._output.close()

    def __enter__(self) -> Self:
        if self.process is None:
            self.start()
        return self


def _serves(event: str) -> bool:
    return event.split()[-1:] == ["ready"] or "serving degraded" in event


def _event(line: str) -> Event:
    event: Event = json.loads(line) if line.startswith("{") else {"event": line}
    return event


@dataclass(frozen=True)
class Answer:
    """A message on ``cs/josev``, and how it was delivered."""

    topic: str
    qos: int
    retained: bool
    message: Event

    @property
    def id(self) -> str:
        return str(self.message["id"])

    @property
    def data(self) -> Event:
        data: Event = self.message["data"]
        return data

    @property
    def csr(self) -> str:
        """The CSR of an answer that must be an accepted one."""
        assert self.data["status"] == "accepted", self.message
        return str(self.data["csr"])


class Josev:
    """``mosquitto_sub`` and ``mosquitto_pub`` in Josev's place, with a session that the broker keeps."""

    def __init__(self, broker: Mosquitto, prefix: str = "") -> None:
        self._address = ("-h", "127.0.0.1", "-p", str(broker.port), "-V", "5")
        self._request_topic = f"{prefix}josev/cs"
        self._response_topic = f"{prefix}cs/josev"
        self._client_id = f"josev-{uuid.uuid4().hex[:8]}"
        self._subscriber: subprocess.Popen[str]
        self._seen: Lines

    def __enter__(self) -> Self:
        options = ("-i", self._client_id, "-c", "-x", "3600", "-q", "1", "-t", self._response_topic)
        # -d tells when the subscription stands; stdbuf, because a pipe would hold its lines back.
        self._subscriber = subprocess.Popen(
            ["stdbuf", "-oL", "mosquitto_sub", *self._address, *options, "-d", "-F", "ANSWER %t %q %r %p"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._subscriber.stdout is not None
        self._seen = Lines(self._subscriber.stdout)
        self._seen.wait(lambda lines: any(line.startswith("Subscribed") for line in lines))
        return self

    def __exit__(self, *_: object) -> None:
        self._subscriber.kill()
        self._subscriber.wait()
        self._seen.close()

    def publish(self, *payloads: str | bytes | Event, qos: int = 1) -> None:
        """Publish each of the payloads as Josev would; done when the broker has them."""
        for payload in payloads:
            text = json.dumps(payload) if isinstance(payload, dict) else payload
            self._pub(
                self._request_topic, text.encode() if isinstance(text, str) else text, "-s" if text else "-n", qos=qos
            )

    def publish_burst(self, messages: Iterable[Event]) -> None:
        """Publish all of the messages over one connection, as fast as the broker takes them."""
        self._pub(self._request_topic, "".join(json.dumps(each) + "\n" for each in messages).encode(), "-l")

    def _pub(self, topic: str, payload: bytes, how: str, *, qos: int = 1) -> None:
        subprocess.run(
            ["mosquitto_pub", *self._address, "-q", str(qos), "-t", topic, how],
            input=payload,
            check=True,
            timeout=BOUND,
        )

    def ask(self, payload: str | bytes | Event) -> Answer:
        """Publish a request, and wait for one answer more to its id than there were."""
        message = payload if isinstance(payload, dict) else json.loads(payload)
        count = len(self.answers(message["id"]))
        self.publish(payload)
        return self.wait_for(message["id"], count=count + 1)[-1]

    def answers(self, request_id: str | None = None) -> list[Answer]:
        """What came on ``cs/josev`` so far, and to this id where one is given."""
        return list(_answers(self._seen.so_far(), request_id))

    def wait_for(self, request_id: str | None = None, *, count: int = 1) -> list[Answer]:
        lines = self._seen.wait(lambda lines: len(list(_answers(lines, request_id))) >= count)
        return list(_answers(lines, request_id))

    def everything(self) -> list[Answer]:
        """All that was published on ``cs/josev`` until now: a message of ours, sent after it, has arrived."""
        mark = str(uuid.uuid4())
        self._pub(self._response_topic, json.dumps({"id": mark}).encode(), "-s")
        self.wait_for(mark)
        return [answer for answer in self.answers() if "name" in answer.message]


def _answers(lines: Iterable[str], request_id: str | None) -> Iterator[Answer]:
    for line in lines:
        if line.startswith("ANSWER "):
            _, topic, qos, retained, payload = line.split(" ", 4)
            answer = Answer(topic, int(qos), retained == "1", json.loads(payload))
            if request_id in {None, answer.id}:
                yield answer


def generate_csr(request_id: str | None = None, **data: object) -> Event:
    """A ``generate_csr`` request; every one asks for something of its own, and has an id of its own."""
    request_id = request_id or str(uuid.uuid4())
    defaults = {
        "certificate_type": "charging_station_certificate",
        "common_name": f"station {request_id[:8].lower()}",
        "organization_name": "EcoG",
        "country_name": "DE",
        "algorithm": "ECDSA_SHA256",
    }
    return {"id": request_id, "name": "generate_csr", "type": "request", "data": {**defaults, **data}}


@contextmanager
def software_station(folder: Path, broker: Mosquitto, *arguments: str, **environment: str) -> Iterator[Station]:
    """A station with software keys: for what has nothing to do with where the keys are."""
    options = ("--keystore", "software:", "--allow-software-keys")
    with Station(folder, "--broker", broker.url, *options, *arguments, **environment) as station:
        yield station


class Done(subprocess.CompletedProcess[str]):
    """How a command ended.

    Attributes:
        reason: of the error that it ended with; empty if there was none.
    """

    reason: str = ""


def run(*arguments: str, **environment: str) -> Done:
    """Run a ``stationkey`` command that ends by itself."""
    with tempfile.NamedTemporaryFile("r") as file:
        done = subprocess.run(
            [sys.executable, str(REASONED), *arguments],
            env={**os.environ, **environment, "REASON_FILE": file.name},
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
        )
        ended = Done(done.args, done.returncode, done.stdout, done.stderr)
        ended.reason = file.read()
        return ended
