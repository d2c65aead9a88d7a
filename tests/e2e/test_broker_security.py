"""A Mosquitto with the very files that are shipped, set up by the commands of docs/broker.md, and who attacks it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from outside import BOUND, Josev, Station, generate_csr, run, software_station
from peers import Mosquitto, free_port

import parts
from secured import Authority, SecuredMosquitto, commands
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.errors import BrokerError
from stationkey.mqtt.client import ask
from stationkey.mqtt.connection import MqttConnection, connect
from stationkey.mqtt.url import Broker

SHIPPED = Path(__file__).parent.parent.parent / "packaging/mosquitto"
AVAILABILITY = "cs/stationkey/availability"
CLIENT_ID = "the-station"


def shell(directory: Path, script: str) -> None:
    subprocess.run(
        ["sh", "-eu"], input=script, text=True, cwd=directory, check=True, capture_output=True, timeout=BOUND
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the document make; and, by the same commands, one more user: somebody else."""
    directory = tmp_path_factory.mktemp("made")
    certificates, passwords = commands("1. Certificates"), commands("With passwords")
    users = "for name in stationkey josev; do"
    assert users in certificates
    assert users in passwords
    shell(directory, certificates.replace(users, users.replace("josev", "josev somebody")))
    shell(directory, passwords.replace(users, users.replace("josev", "josev somebody")))
    return directory


class Shipped(Mosquitto):
    """Mosquitto as it is shipped and as the document says; only paths and port are others.

    Args:
        directory: its own.
        made: see the fixture.
        listener: which of the two ways.
    """

    def __init__(self, directory: Path, made: Path, listener: str) -> None:
        super().__init__(directory)
        self._made = made
        self.listener = listener
        self.port = free_port()
        etc = directory / "etc"
        (etc / "conf.d").mkdir(parents=True)
        for name in ("certs/broker.crt", "certs/broker.key", "certs/clients-ca.crt", "stationkey.passwords"):
            (etc / name).parent.mkdir(exist_ok=True)
            shutil.copy(made / Path(name).name, etc / name)
        shutil.copy(SHIPPED / "stationkey.acl", etc)
        shutil.copy(SHIPPED / "stationkey.conf", etc / "conf.d")
        secured = (SHIPPED / f"{listener}.example").read_text()
        assert secured.count("\nlistener 8883\n") == 1
        secured = secured.replace("\nlistener 8883\n", f"\nlistener {self.port} 127.0.0.1\n")
        (etc / "conf.d/secured.conf").write_text(secured.replace("/etc/mosquitto", str(etc)))
        user = next(
            line for line in (directory / "mosquitto.conf").read_text().splitlines() if line.startswith("user ")
        )
        lines = [user, "persistence true", f"persistence_location {directory}/", f"include_dir {etc}/conf.d"]
        (directory / "mosquitto.conf").write_text("\n".join(lines) + "\n")

    @property
    def url(self) -> str:
        return f"mqtts://127.0.0.1:{self.port}"

    def terms(self, user: str) -> MqttTerms:
        """How `user` speaks to it."""
        ca = self._made / "broker-ca.crt"
        if self.listener == "passwords":
            password = SecretReference(str(self._made / f"{user}.password"))
            return MqttTerms(ca_file=ca, username=user, password=password)
        certificate, key = (SecretReference(str(self._made / f"{user}.{part}")) for part in ("crt", "key"))
        return MqttTerms(ca_file=ca, certificate_file=certificate, key_file=key)

    def options(self, user: str) -> list[str]:
        """The same, as options of a command."""
        terms = self.terms(user)
        options = ["--broker", self.url, "--mqtt-ca-file", str(terms.ca_file)]
        if isinstance(terms.username, str) and terms.password is not None:
            return [*options, "--mqtt-username", terms.username, "--mqtt-password-file", terms.password.source]
        assert terms.certificate_file is not None
        assert terms.key_file is not None
        files = ("--mqtt-certificate-file", terms.certificate_file.source, "--mqtt-key-file", terms.key_file.source)
        return [*options, *files]

    def toml(self, user: str) -> str:
        """The same, as the configuration file of the daemon."""
        names = {option.removeprefix("--mqtt-").replace("-", "_"): value for option, value in pairs(self.options(user))}
        lines = [f'{name} = "{value}"' for name, value in names.items() if not name.startswith("__")]
        return (
            f'client_id = "{CLIENT_ID}"\n[mqtt]\n'
            + "\n".join([*lines, f'availability_topic = "{AVAILABILITY}"'])
            + "\n"
        )

    async def client(self, user: str, *, client_id: str = "client", will: str | None = None) -> MqttConnection:
        at = Broker.parse(self.url)
        return await connect(at, client_id=client_id, persistent=False, terms=self.terms(user), will=will)


def pairs(options: list[str]) -> list[tuple[str, str]]:
    return [
        (name, value) for name, value in zip(options[::2], options[1::2], strict=True) if name.startswith("--mqtt-")
    ]


@pytest.fixture(scope="module", params=["certificates", "passwords"])
def broker(tmp_path_factory: pytest.TempPathFactory, made: Path, request: pytest.FixtureRequest) -> Iterator[Shipped]:
    with Shipped(tmp_path_factory.mktemp("broker"), made, request.param) as mosquitto:
        yield mosquitto


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory, broker: Shipped) -> Iterator[Station]:
    directory = tmp_path_factory.mktemp("station")
    (directory / "stationkey.toml").write_text(broker.toml("stationkey"))
    with software_station(directory, broker, "--config", str(directory / "stationkey.toml")) as running:
        yield running


@dataclass(frozen=True)
class Listening:
    """Somebody who wants to hear what he can."""

    connection: MqttConnection
    heard: asyncio.Task[bytes]

    async def nothing(self) -> bool:
        """Whether nothing came up to now: the answer to a subscription comes behind it."""
        await self.connection.subscribe("a/mark")
        return not self.heard.done()


async def listen(connection: MqttConnection, *topics: str) -> Listening:
    for topic in topics:
        await connection.subscribe(topic)

    async def hear() -> bytes:
        return (await connection.receive()).payload

    return Listening(connection, asyncio.create_task(hear()))


async def asked(broker: Shipped) -> bool:
    """Whether Josev gets a CSR."""
    response = await ask(Broker.parse(broker.url), parts.request(), terms=broker.terms("josev"), timeout=BOUND)
    return response is not None and response.data.status == "accepted"


# It works.


def test_josev_asks_and_stationkey_answers(station: Station, broker: Shipped) -> None:
    arguments = ("--common-name", "DE-ABC-S-1", "--organization-name", "EcoG", "--country-name", "DE")
    done = run("request", "v2g_certificate", *arguments, *broker.options("josev"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("-----BEGIN CERTIFICATE REQUEST-----")
    station.wait_for("ready")


def test_a_command_is_told_how_by_the_environment_too(station: Station, broker: Shipped) -> None:
    station.wait_for("ready")
    options = broker.options("josev")
    variables = {f"STATIONKEY_{name[2:].upper().replace('-', '_')}": value for name, value in pairs(options)}
    arguments = ("--common-name", "DE-ABC-S-1", "--organization-name", "EcoG", "--country-name", "DE")
    assert run("request", "v2g_certificate", *arguments, "--broker", broker.url, **variables).returncode == 0


async def test_josev_reads_whether_stationkey_is_there(station: Station, broker: Shipped) -> None:
    station.wait_for("ready")
    async with await broker.client("josev") as josev:
        await josev.subscribe(AVAILABILITY)
        async with asyncio.timeout(BOUND):
            assert (await josev.receive()).payload == b"online"


# Others cannot.


RIGHTS = [
    ("josev", "josev/cs", True),
    ("josev", "cs/josev", False),
    ("josev", AVAILABILITY, False),
    ("stationkey", "josev/cs", False),
    ("stationkey", "cs/josev", True),
    ("stationkey", AVAILABILITY, True),
    ("somebody", "josev/cs", False),
    ("somebody", "cs/josev", False),
    ("somebody", AVAILABILITY, False),
    ("somebody", "another/topic", False),
    ("somebody", "$SYS/broker/version", False),
]


@pytest.fixture(scope="module", params=["certificates", "passwords"])
def vacant(tmp_path_factory: pytest.TempPathFactory, made: Path, request: pytest.FixtureRequest) -> Iterator[Shipped]:
    """The same without the daemon: a user has one connection at a time."""
    with Shipped(tmp_path_factory.mktemp("vacant"), made, request.param) as mosquitto:
        yield mosquitto


@pytest.mark.parametrize("retain", [False, True], ids=["sent", "retained"])
@pytest.mark.parametrize(("user", "topic", "may"), RIGHTS)
async def test_each_user_publishes_what_is_his_to_publish(
    vacant: Shipped, user: str, topic: str, may: bool, retain: bool
) -> None:
    async with await vacant.client(user) as client:
        if may:
            await client.publish(topic, b"", retain=retain)
        else:
            with pytest.raises(BrokerError) as refused:
                await client.publish(topic, b"{}", retain=retain)
            assert refused.value.reason == "publication_refused"


async def test_who_subscribes_to_everything_hears_nothing_that_is_not_his(station: Station, broker: Shipped) -> None:
    station.wait_for("ready")
    everything = ("#", "+/+", "josev/cs", "cs/josev", "$SYS/#", AVAILABILITY)
    async with await broker.client("somebody") as somebody:
        ears = await listen(somebody, *everything)
        assert await asked(broker)
        assert await ears.nothing()
        ears.heard.cancel()


async def test_a_last_will_of_somebody_else_is_not_published(station: Station, broker: Shipped) -> None:
    somebody = await broker.client("somebody", will="josev/cs")
    somebody._drop("as if the power failed")  # noqa: SLF001 - no orderly end has a will
    assert await asked(broker)
    assert [event for event in station.events() if event.get("reason") in {"not_json", "not_a_message"}] == []


async def test_a_stolen_client_id_throws_nobody_off(station: Station, broker: Shipped) -> None:
    station.wait_for("ready")
    for stolen in (CLIENT_ID, "stationkey"):
        async with await broker.client("somebody", client_id=stolen) as thief:
            ears = await listen(thief, "josev/cs")
            assert await asked(broker)
            assert await ears.nothing()
            ears.heard.cancel()
    assert [event for event in station.events() if event.get("reason") == "connection_lost"] == []


async def test_nobody_without_a_name_gets_a_connection(broker: Shipped) -> None:
    ca_only = MqttTerms(ca_file=broker.terms("josev").ca_file)
    with pytest.raises(BrokerError) as refused:
        await connect(Broker.parse(broker.url), client_id="nobody", persistent=False, terms=ca_only)
    assert refused.value.reason == "broker_refuses"


async def test_a_name_that_is_only_said_counts_for_nothing(tmp_path: Path, broker: Shipped) -> None:
    """By a certificate one is who stands in it; and a name without its password is none."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("guessed")
    own = broker.terms("somebody")
    said = MqttTerms(
        ca_file=own.ca_file,
        certificate_file=own.certificate_file,
        key_file=own.key_file,
        username="josev",
        password=SecretReference(str(password)),
    )
    with pytest.raises(BrokerError) as refused:
        async with await connect(Broker.parse(broker.url), client_id="x", persistent=False, terms=said) as client:
            await client.publish("josev/cs", b"{}")
    assert refused.value.reason in {"broker_refuses", "publication_refused"}


def test_no_file_that_is_shipped_is_taken_unless_it_is_asked_for() -> None:
    """`conf.d` takes what ends in ``.conf``: the listeners are examples, and change no broker by themselves."""
    assert [file.name for file in SHIPPED.iterdir() if file.suffix == ".conf"] == ["stationkey.conf"]


# The daemon.


def test_a_wrong_password_is_said_and_the_right_one_taken_without_a_restart(tmp_path: Path, made: Path) -> None:
    secret = (made / "stationkey.password").read_text()
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_text("guessed wrong\n")
    with Shipped(tmp_path / "broker", made, "passwords") as broker:
        toml = broker.toml("stationkey").replace(str(made / "stationkey.password"), str(file))
        (tmp_path / "stationkey.toml").write_text(toml)
        options = ("--keystore", "software:", "--allow-software-keys", "--config", str(tmp_path / "stationkey.toml"))
        with Station(tmp_path, "--broker", broker.url, *options).launch() as station:
            station.wait_for(reason="broker_refuses", count=2)
            file.unlink()
            station.wait_for(reason="secret_unreadable")
            file.touch(0o600)
            file.write_text(secret)
            station.wait_for("ready")
            assert station.stop() == 0
        assert [line for line in station.lines if secret.strip() in line or "guessed" in line] == []


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        pytest.param('ca_file = "ca.pem"', "tls_options_unused", id="tls-options-without-tls"),
        pytest.param('password_file = "absent"\nusername = "u"', "secret_unreadable", id="no-password-file"),
        pytest.param('availability_topic = "josev/cs"', "availability_topic_invalid", id="availability-topic"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(tmp_path: Path, toml: str, reason: str) -> None:
    (tmp_path / "stationkey.toml").write_text(f"[mqtt]\n{toml}\n")
    options = ("--keystore", "software:", "--allow-software-keys", "--state-dir", str(tmp_path / "state"))
    done = run("serve", *options, "--config", str(tmp_path / "stationkey.toml"))
    assert done.returncode == 1
    assert done.reason == reason
    assert "Traceback" not in done.stderr


def test_what_is_asked_while_it_is_away_is_answered_after_its_start_by_tls_as_without(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    own = authority.identity("stationkey")
    (tmp_path / "stationkey.toml").write_text(
        f'[mqtt]\nca_file = "{authority.file}"\ncertificate_file = "{own.certificate}"\nkey_file = "{own.key}"\n'
    )
    with SecuredMosquitto(tmp_path / "mosquitto", authority.broker(), authority) as broker:
        options = ("--keystore", "software:", "--allow-software-keys", "--config", str(tmp_path / "stationkey.toml"))
        station = Station(tmp_path, "--broker", broker.tls_url, *options)
        asked = generate_csr()
        with Josev(broker) as josev:
            with station:
                station.kill()
            josev.publish(asked)
            with station:
                assert josev.wait_for(asked["id"])[0].csr
                broker.kill()
                broker.start()
                station.wait_for("ready", count=2)
                assert station.stop() == 0


# Availability.


def retained(broker: Mosquitto) -> str:
    """What a newcomer is told."""
    command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(broker.port), "-t", AVAILABILITY, "-C", "1", "-W", "30"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=BOUND).stdout.strip()


def told(broker: Mosquitto, state: str) -> None:
    """Wait until the broker keeps `state`."""
    command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(broker.port), "-t", AVAILABILITY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        try:
            while line := watching.stdout.readline():
                if line.strip() == state:
                    return
        finally:
            watching.kill()
    raise AssertionError(f"never {state}")


@pytest.fixture
def available(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Station]:
    (tmp_path / "stationkey.toml").write_text(f'[mqtt]\navailability_topic = "{AVAILABILITY}"\n')
    with software_station(tmp_path, mosquitto, "--config", str(tmp_path / "stationkey.toml")) as station:
        yield station


def test_the_broker_keeps_whether_the_service_is_there(available: Station, mosquitto: Mosquitto) -> None:
    assert retained(mosquitto) == "online"
    assert available.stop() == 0
    assert retained(mosquitto) == "offline"
    available.start()
    assert retained(mosquitto) == "online"
    available.kill()
    told(mosquitto, "offline")


def test_it_is_kept_over_a_restart_of_the_broker(available: Station, mosquitto: Mosquitto) -> None:
    mosquitto.terminate()
    mosquitto.start()
    available.wait_for("ready", count=2)
    assert retained(mosquitto) == "online"


def test_a_broker_that_does_not_take_it_is_told_of_once_and_served(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic readwrite josev/cs\ntopic readwrite cs/josev\n")
    (tmp_path / "stationkey.toml").write_text(f'[mqtt]\navailability_topic = "{AVAILABILITY}"\n')
    with (
        Mosquitto(tmp_path / "mosquitto", f"acl_file {tmp_path}/acl") as mosquitto,
        software_station(tmp_path, mosquitto, "--config", str(tmp_path / "stationkey.toml")) as station,
    ):
        mosquitto.kill()
        mosquitto.start()
        station.wait_for("ready", count=2)
        response = asyncio.run(ask(Broker("127.0.0.1", mosquitto.port), parts.request(), timeout=BOUND))
        assert response is not None
        assert response.data.status == "accepted"
        assert station.stop() == 0
        assert len(station.events(reason="publication_refused")) == 1
