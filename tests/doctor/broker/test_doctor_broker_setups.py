"""The doctor on brokers broken in real ways: Mosquitto, and what is no broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from doctors import Pki, as_nobody, look, write_config
from peers import Daemon, Mosquitto, Swtpm, search_path

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.doctor.report import Level
from stationkey.mqtt.connection import connect
from stationkey.mqtt.url import Broker

ROOT = Path(__file__).parents[3]


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


async def resumed(broker: Mosquitto, folder: Path) -> bool:
    """Whether the doctor has left a session at a `guarded` broker."""
    terms = MqttTerms(username="stationkey", password=SecretReference(str(folder / "secret")))
    at = Broker.parse(broker.url)
    async with await connect(at, client_id=CLIENT_ID, persistent=True, terms=terms) as again:
        return again.resumed


OURS = "user stationkey\ntopic read josev/cs\ntopic write cs/josev\n"
JOSEVS = "user josev\ntopic write josev/cs\ntopic read cs/josev\n"
SHIPPED = ROOT / "packaging/mosquitto/stationkey.acl"
CLOSED = "allow_anonymous false"
CLIENT_ID = "stationkey-doctor-1"


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
                assert found.reasons("broker.login") == {"shared_session"}
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
        ("limit", "level", "reason"),
        [
            ("message_size_limit 1000", Level.FAILURE, "too_large"),
            ("max_packet_size 1000", Level.FAILURE, "too_large"),
            ("message_size_limit 20", Level.FAILURE, "too_large"),
            ("max_qos 0", Level.WARNING, "qos_0"),
        ],
    )
    def test_a_broker_that_would_not_take_an_answer_as_it_is_sent_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, level: Level, reason: str
    ) -> None:
        """And no session is left behind where the broker ends the connection for it."""
        monkeypatch.setattr("stationkey.doctor.broker.probe._client_id", lambda: CLIENT_ID)
        with guarded(tmp_path / "guarded", OURS, CLOSED, limit) as (broker, config):
            found = look(tmp_path, broker=None, config_file=config)
            assert found.level("broker.publish") is level
            assert found.reasons("broker.publish") == {reason}
            assert not asyncio.run(resumed(broker, tmp_path / "guarded"))

    @pytest.mark.parametrize("prefix", ["a/#", "$SYS", "x" * 2000], ids=["a wildcard", "the broker's own", "too long"])
    def test_a_topic_prefix_that_is_none_is_told_with_what_it_may_be(self, tmp_path: Path, prefix: str) -> None:
        found = look(tmp_path, topic_prefix=prefix)
        assert found.level("broker.url") is Level.FAILURE
        assert found.reasons("broker.url") == {"topic_prefix_invalid"}

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
        assert before.reasons("broker.login") == {"credential"}
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
        assert found.reasons("broker.login") == {"hidden"}

    @pytest.mark.parametrize("acl", [OURS, ""], ids=["rights", "none"])
    def test_no_session_is_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acl: str) -> None:
        monkeypatch.setattr("stationkey.doctor.broker.probe._client_id", lambda: CLIENT_ID)
        with guarded(tmp_path / "guarded", acl, CLOSED) as (broker, config):
            look(tmp_path, broker=None, config_file=config)
            assert not asyncio.run(resumed(broker, tmp_path / "guarded"))

    def test_a_wrong_password_is_told_apart(self, tmp_path: Path) -> None:
        with guarded(tmp_path / "guarded", OURS, CLOSED) as (_, config):
            (tmp_path / "guarded" / "secret").write_text("hunter3\n")
            found = look(tmp_path, broker=None, config_file=config)
        assert found.reasons("broker.login") == {"broker_refuses"}
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
        assert found.reasons("broker.anonymous") == {"no_names"}

    def test_nagle_s_algorithm_at_the_broker_is_seen(self, tmp_path: Path) -> None:
        with Mosquitto(tmp_path / "broker", "set_tcp_nodelay false") as broker:
            looks = (look(tmp_path, broker=broker.url) for _ in range(5))  # a busy machine hides the delay now and then
            found = next((found for found in looks if found.level("broker.delay") is Level.WARNING), None)
        assert found is not None
        assert found.reasons("broker.delay") == {"nagle"}

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
        ("said", "name", "reason"),
        [
            pytest.param(b"", "broker.login", "no_mqtt", id="closes"),
            pytest.param(b"HTTP/1.1 400 \x1b[2J\r\n\r\n", "broker.login", "no_mqtt", id="speaks HTTP"),
            pytest.param(
                b"\x20\x03\x00\x00\x00", "broker.publish", "no_acknowledgement", id="then acknowledges nothing"
            ),
        ],
    )
    def test_what_behaves_as_no_broker_does_is_told(self, tmp_path: Path, said: bytes, name: str, reason: str) -> None:
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
        assert found.reasons(name) == {reason}

    def test_a_name_that_leads_nowhere_is_told(self, tmp_path: Path) -> None:
        found = look(tmp_path, broker="mqtt://nowhere.invalid")
        assert found.level("broker.name") is Level.FAILURE

    def test_what_is_no_broker_is_told(self, tmp_path: Path, swtpm: Swtpm) -> None:
        found = look(tmp_path, broker=f"mqtt://127.0.0.1:{swtpm.port + 1}")
        assert found.level("broker.login") is Level.FAILURE

    @pytest.mark.parametrize(
        ("days", "host", "own_ca", "level", "reasons"),
        [
            pytest.param(365, "localhost", True, Level.OK, set(), id="right"),
            pytest.param(-1, "localhost", True, Level.FAILURE, {"broker_untrusted"}, id="expired"),
            pytest.param(10, "localhost", True, Level.WARNING, {"expires"}, id="soon over"),
            pytest.param(365, "elsewhere", True, Level.FAILURE, {"broker_untrusted"}, id="another name"),
            pytest.param(365, "localhost", False, Level.FAILURE, {"broker_untrusted"}, id="another CA"),
        ],
    )
    def test_the_certificate_of_the_broker_is_judged(
        self, tmp_path: Path, days: int, host: str, own_ca: bool, level: Level, reasons: set[str]
    ) -> None:
        pki = Pki(tmp_path / "pki")
        certificate, key = pki.issue("broker", days=days, host=host)
        ca = pki.ca_file if own_ca else Pki(tmp_path / "other").ca_file
        with Mosquitto(tmp_path / "broker", f"certfile {certificate}", f"keyfile {key}") as broker:
            url = f"mqtts://localhost:{broker.port}"
            config = write_config(tmp_path, f'[mqtt]\nca_file = "{ca}"\n')
            found = look(tmp_path, broker=url, config_file=config)
        assert found.level("broker.tls") is level
        assert found.reasons("broker.tls") == reasons

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
        assert "client certificate" in found.text("broker.login")  # what it hints at, by either reason

    def test_what_is_wrong_on_our_side_is_not_looked_for_in_the_broker_s_log(
        self, tmp_path: Path, mosquitto: Mosquitto
    ) -> None:
        (tmp_path / "name").write_bytes(b"\xff\xfe")
        (tmp_path / "name").chmod(0o600)
        config = write_config(tmp_path, f'[mqtt]\nusername_file = "{tmp_path}/name"\n')
        assert look(tmp_path, broker=mosquitto.url, config_file=config).reasons("broker.login") == {"secret_unreadable"}

    def test_tls_is_told_from_no_tls(self, tmp_path: Path, mosquitto: Mosquitto) -> None:
        certificate, key = Pki(tmp_path / "pki").issue("broker")
        with Mosquitto(tmp_path / "tls", f"certfile {certificate}", f"keyfile {key}") as broker:
            plain = look(tmp_path, broker=broker.url)
        assert plain.reasons("broker.login") == {"tls_needed"}
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
        assert found.reasons("config.tls") == {"key_open", "expires"}
