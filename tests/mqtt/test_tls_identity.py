"""Our own identity at a broker: certificate, key, user name and password."""

from __future__ import annotations

import _ctypes
import _ssl
import logging
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from peers import Mosquitto
from tls_brokers import BOUND, VERSIONS, echo, opened

from secured import NAME, Authority, Identity, SecuredMosquitto, terms, write_secret
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.errors import BrokerError, ConfigurationError
from stationkey.mqtt import tpm_provider
from stationkey.mqtt.connection import MqttConnection
from stationkey.mqtt.introduction import check, introduction
from stationkey.mqtt.url import Broker

pytest_plugins = ["tls_brokers"]


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[SecuredMosquitto]:
    """One that does."""
    with SecuredMosquitto(tmp_path_factory.mktemp("strict"), authority.broker(), authority) as broker:
        yield broker


# Who we are.


async def test_the_broker_knows_us_by_our_certificate(
    strict: SecuredMosquitto, authority: Authority, identity: Identity
) -> None:
    async with await opened(strict.tls, terms(authority, identity)) as connection:
        assert await echo(connection) == b"echo"
    assert "u'stationkey'" in strict.log


@pytest.mark.parametrize("other", [False, True], ids=["none", "of-another-authority"])
async def test_a_broker_that_does_not_take_our_certificate_is_an_error_in_words(
    tmp_path: Path, strict: SecuredMosquitto, authority: Authority, other: bool
) -> None:
    own = Authority(tmp_path).identity("stationkey") if other else None
    with pytest.raises(BrokerError) as refused:
        await opened(strict.tls, terms(authority, own))
    assert refused.value.reason == "broker_refuses"
    assert "client certificate" in refused.value.hint  # words: what to look at


async def test_a_certificate_that_is_renewed_is_shown_at_the_next_connection(
    tmp_path: Path, strict: SecuredMosquitto, authority: Authority
) -> None:
    ours = authority.elsewhere(tmp_path)
    by = terms(authority, ours.identity("station", age=60))  # it has expired
    with pytest.raises(BrokerError) as refused:
        await opened(strict.tls, by)
    assert refused.value.reason == "broker_refuses"
    assert "client certificate" in refused.value.hint  # words: what to look at
    ours.identity("station")
    async with await opened(strict.tls, by) as connection:
        assert await echo(connection) == b"echo"


async def test_key_and_certificate_may_be_in_one_file(
    tmp_path: Path, strict: SecuredMosquitto, authority: Authority, identity: Identity
) -> None:
    both = write_secret(tmp_path / "both.pem", identity.key.read_bytes() + identity.certificate.read_bytes())
    by = MqttTerms(ca_file=authority.file, certificate_file=SecretReference(str(both)))
    async with await opened(strict.tls, by) as connection:
        assert await echo(connection) == b"echo"


async def test_the_key_may_be_a_credential_of_systemd(
    tmp_path: Path,
    strict: SecuredMosquitto,
    authority: Authority,
    identity: Identity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_secret(tmp_path / "mqtt-key", identity.key.read_bytes())
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    by = MqttTerms(
        ca_file=authority.file,
        certificate_file=SecretReference(str(identity.certificate)),
        key_file=SecretReference("credential:mqtt-key"),
    )
    async with await opened(strict.tls, by) as connection:
        assert await echo(connection) == b"echo"


Spoil = Callable[[Path, Identity], MqttTerms]


def by_files(ca: Path | None, certificate: Path | None = None, key: Path | None = None) -> MqttTerms:
    return MqttTerms(
        ca_file=ca,
        certificate_file=None if certificate is None else SecretReference(str(certificate)),
        key_file=None if key is None else SecretReference(str(key)),
    )


def encrypted(directory: Path) -> Path:
    key = rsa.generate_private_key(65537, 2048)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pass")
    )
    return write_secret(directory / "spoilt", text)


def opened_up(directory: Path, key: Path) -> Path:
    (path := write_secret(directory / "spoilt", key.read_bytes())).chmod(0o644)
    return path


DAMAGED = "-----BEGIN {0}-----\nMIIB\n-----END {0}-----\n"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(lambda at, _: by_files(at / "spoilt"), "ca_file_unusable", id="no-ca-file"),
        pytest.param(
            lambda at, _: by_files(write_secret(at / "spoilt", "nothing")), "ca_file_unusable", id="ca-file-of-nothing"
        ),
        pytest.param(
            lambda at, _: by_files(write_secret(at / "spoilt", DAMAGED.format("CERTIFICATE"))),
            "ca_file_unusable",
            id="ca-file-damaged",
        ),
        pytest.param(lambda at, _: by_files(at), "ca_file_unusable", id="ca-file-a-directory"),
        pytest.param(
            lambda at, own: by_files(None, at / "spoilt", own.key), "client_certificate_unusable", id="no-certificate"
        ),
        pytest.param(
            lambda at, own: by_files(None, write_secret(at / "spoilt", DAMAGED.format("CERTIFICATE")), own.key),
            "client_certificate_unusable",
            id="certificate-damaged",
        ),
        pytest.param(
            lambda at, own: by_files(None, own.certificate, at / "spoilt"), "secret_unreadable", id="no-key-file"
        ),
        pytest.param(
            lambda at, own: by_files(None, own.certificate, opened_up(at, own.key)),
            "secret_unreadable",
            id="key-open-to-all",
        ),
        pytest.param(
            lambda at, own: by_files(None, own.certificate, write_secret(at / "spoilt", "nothing")),
            "client_key_unusable",
            id="key-of-nothing",
        ),
        pytest.param(
            lambda at, own: by_files(None, own.certificate, write_secret(at / "spoilt", DAMAGED.format("PRIVATE KEY"))),
            "client_key_unusable",
            id="key-damaged",
        ),
        pytest.param(
            lambda at, own: by_files(None, own.certificate, encrypted(at)), "client_key_unusable", id="key-encrypted"
        ),
        pytest.param(
            lambda at, own: by_files(None, own.certificate, Authority(at).identity("spoilt").key),
            "client_key_mismatch",
            id="key-of-another",
        ),
    ],
)
async def test_a_file_that_cannot_be_used_is_refused_before_anything_is_connected(
    tmp_path: Path, identity: Identity, spoil: Spoil, reason: str
) -> None:
    by = spoil(tmp_path, identity)
    with pytest.raises(ConfigurationError, match=re.escape(str(tmp_path))) as refused:  # words: which file
        await check(Broker("127.0.0.1", 1, tls=True), by)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    "by",
    [
        pytest.param(MqttTerms(ca_file=Path("ca")), id="ca-file"),
        pytest.param(MqttTerms(certificate_file=SecretReference("certificate")), id="certificate"),
        pytest.param(MqttTerms(server_name=NAME), id="server-name"),
    ],
)
async def test_what_is_of_use_with_tls_only_is_refused_without(mosquitto: Mosquitto, by: MqttTerms) -> None:
    plain = Broker("127.0.0.1", mosquitto.port)
    for attempt in (check(plain, by), opened(plain, by)):
        with pytest.raises(ConfigurationError, match="mqtts://") as refused:  # words: the URL that helps
            await attempt
        assert refused.value.reason == "tls_options_unused"


async def test_a_server_name_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=re.escape("'.broker'")) as refused:  # words: which name
        await check(Broker("127.0.0.1", 1, tls=True), MqttTerms(server_name=".broker"))
    assert refused.value.reason == "config_invalid"


def test_a_python_that_does_not_show_its_openssl_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ssl, "__file__", _ctypes.__file__)  # a library without OpenSSL
    with pytest.raises(ConfigurationError, match="shared library") as refused:  # words: what helps
        tpm_provider.TpmProvider().open("device:/dev/null")
    assert refused.value.reason == "tls_provider_missing"


# User name and password.


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Mosquitto]:
    """A broker that knows ``stationkey`` by the password ``first``."""
    with Mosquitto(tmp_path / "guarded") as plain:
        pass
    (plain.directory / "passwords").touch(mode=0o600)
    set_password(plain, "first")
    configuration = plain.directory / "mosquitto.conf"
    lines = configuration.read_text().replace("allow_anonymous true", "allow_anonymous false")
    configuration.write_text(f"{lines}password_file {plain.directory}/passwords\n")
    with plain:
        yield plain


def set_password(broker: Mosquitto, password: str) -> None:
    subprocess.run(
        ["mosquitto_passwd", "-b", str(broker.directory / "passwords"), "stationkey", password],
        check=True,
        timeout=BOUND,
    )


@pytest.mark.parametrize("version", VERSIONS)
async def test_user_name_and_password_are_read_at_each_connection(
    tmp_path: Path, guarded: Mosquitto, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    write_secret(tmp_path / "name", "stationkey\n")
    file = write_secret(tmp_path / "password", "first\n")
    by = MqttTerms(username=SecretReference(str(tmp_path / "name")), password=SecretReference("credential:password"))

    def connection() -> MqttConnection:
        at = Broker("127.0.0.1", guarded.port)
        return MqttConnection(at, client_id="station", persistent=False, terms=by, protocol=version)

    async with connection() as first:
        await first.open()
        assert await echo(first) == b"echo"
    write_secret(file, "second")
    with pytest.raises(BrokerError) as refused:
        await connection().open()
    assert refused.value.reason == "broker_refuses"
    assert "second" not in str(refused.value)
    set_password(guarded, "second")
    guarded.terminate()
    guarded.start()
    async with connection() as again:
        await again.open()
        assert await echo(again) == b"echo"


async def test_a_user_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = write_secret(tmp_path / "name", b"\xff")
    with pytest.raises(ConfigurationError, match="UTF-8") as refused:  # words: other faults have this reason
        await check(Broker("127.0.0.1"), MqttTerms(username=SecretReference(str(file))))
    assert refused.value.reason == "secret_unreadable"


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        pytest.param("mqtt://192.0.2.1", True, id="over-the-network"),
        pytest.param("mqtt://broker.local", True, id="to-a-name"),
        pytest.param("mqtt://127.0.0.1", False, id="on-this-machine"),
        pytest.param("mqtt://localhost", False, id="on-this-machine-by-name"),
        pytest.param("mqtts://192.0.2.1", False, id="by-tls"),
    ],
)
async def test_a_password_in_the_clear_over_a_network_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str, warned: bool
) -> None:
    file = write_secret(tmp_path / "password", "secret")
    await check(Broker.parse(url), MqttTerms(username="stationkey", password=SecretReference(str(file))))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["mqtts://" in line for line in said] == [True] * warned  # words: the URL that helps
    assert "secret" not in "".join(said)  # words: the secret is not in it


def test_what_a_connection_begins_with_does_not_show_its_password(tmp_path: Path) -> None:
    file = write_secret(tmp_path / "password", "secret word")
    by = MqttTerms(username="stationkey", password=SecretReference(str(file)))
    assert "secret word" not in repr(introduction(by, tls=False))
