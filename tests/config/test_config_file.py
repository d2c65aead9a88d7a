"""What the service runs by, and what it refuses to run by."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from click.testing import CliRunner, Result
from config_files import OVERRIDES
from msgspec import Meta, Struct

from stationkey import cli, daemon
from stationkey.config import file as file_module
from stationkey.config.file import MAX_FILE, build, read_file, read_parts, read_table, settle
from stationkey.config.options import Form, Option
from stationkey.config.settings import (
    DAY,
    DEFAULT_DEVICE,
    Deadlines,
    PoolTerms,
    Settings,
    TpmTerms,
)
from stationkey.contract.profiles import PROFILES, CertificateType, EvseIdPlacement, ExtendedKeyUsage, KeyUsage
from stationkey.errors import ConfigurationError, Fault
from stationkey.keystore import keystore_opener
from stationkey.keystore.stores import checked_stores
from stationkey.mqtt.topics import topics
from stationkey.mqtt.url import Broker

pytest_plugins = ["config_files"]


V2G = CertificateType.V2G_CERTIFICATE


TPM = "tpm2:swtpm:host=127.0.0.1,port=2321"


def refused(file: Path, text: str | bytes) -> ConfigurationError:
    """What a configuration file that cannot be is refused by."""
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigurationError) as caught:
        read_file(file)
    assert caught.value.fault is Fault.OPERATOR
    assert str(file) in caught.value.message or "[csr." in caught.value.message  # words: where it is
    return caught.value


# Precedence: command line, environment, file, default.


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, file: Path) -> Iterator[Any]:
    """``stationkey serve``, up to the point where the daemon would start; gives what it would start with."""
    started: list[Settings] = []
    monkeypatch.setattr(daemon, "run", started.append)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def serve(
        *arguments: str, toml: str = "", environment: dict[str, str] | None = None, named: bool = True
    ) -> Settings:
        file.write_text(toml)
        named_file = ["--config", str(file)] if named else []
        result: Result = CliRunner().invoke(
            cli.main, ["serve", *named_file, *arguments], env=environment, catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return started.pop()

    yield serve
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("name", "in_file", "in_environment", "on_command_line", "default"),
    [
        ("broker", "mqtt://file:1", "mqtt://environment:2", "mqtt://line:3", "mqtt://127.0.0.1:1883"),
        ("keystore", "tpm2:file", "tpm2:environment", "tpm2:line", None),
        ("state_dir", "/file", "/environment", "/line", "/var/lib/stationkey"),
        ("topic_prefix", "file", "environment", "line", ""),
        ("log_format", "json", "text", "json", "text"),
    ],
)
def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    run: Any, name: str, in_file: str, in_environment: str, on_command_line: str, default: str | None
) -> None:
    toml = f'{name} = "{in_file}"\n'
    environment = {f"STATIONKEY_{name.upper()}": in_environment}
    line = [f"--{name.replace('_', '-')}", on_command_line]
    # A key store must be named on a machine without a TPM, and may be on one with.
    fixed = [] if name == "keystore" else ["--keystore", TPM]

    def value(*arguments: str, toml: str = "", environment: dict[str, str] | None = None) -> str:
        return str(getattr(run(*fixed, *arguments, toml=toml, environment=environment), name))

    assert value(*line, toml=toml, environment=environment) == on_command_line
    assert value(toml=toml, environment=environment) == in_environment
    assert value(toml=toml) == in_file
    assert value(*line, toml=toml) == on_command_line
    if default is not None:
        assert value() == default


@pytest.mark.parametrize(
    ("arguments", "environment", "toml", "expected"),
    [
        pytest.param([], {}, "", False, id="default"),
        pytest.param([], {}, "allow_software_keys = true", True, id="file"),
        pytest.param([], {"STATIONKEY_ALLOW_SOFTWARE_KEYS": "1"}, "", True, id="environment"),
        pytest.param(
            [], {"STATIONKEY_ALLOW_SOFTWARE_KEYS": "0"}, "allow_software_keys = true", False, id="env says no"
        ),
        pytest.param(["--allow-software-keys"], {"STATIONKEY_ALLOW_SOFTWARE_KEYS": "0"}, "", True, id="command line"),
    ],
)
def test_software_keys_are_allowed_by_whoever_speaks_first(
    run: Any, arguments: list[str], environment: dict[str, str], toml: str, *, expected: bool
) -> None:
    settings = run("--keystore", "software:", *arguments, toml=toml, environment=environment)

    assert settings.allow_software_keys is expected


def test_an_empty_prefix_on_the_command_line_wins_over_the_file(run: Any) -> None:
    assert run("--keystore", TPM, "--topic-prefix", "", toml='topic_prefix = "site"').topic_prefix == ""


def test_the_command_line_wins_over_the_environment_for_the_file_itself(run: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('client_id = "station-7"')
    environment = {"STATIONKEY_CONFIG": str(other)}

    assert run("--keystore", TPM, environment=environment, named=False).client_id == "station-7"
    assert run("--keystore", TPM, environment=environment, toml='client_id = "station-8"').client_id == "station-8"


def test_what_only_the_file_can_say_reaches_the_settings(file: Path) -> None:
    file.write_text('client_id = "station-7"\n[deadlines]\nec = 5\nrsa = 90.5\n')
    settings = settle(read_file(file), keystore=TPM)

    assert settings.client_id == "station-7"
    assert settings.deadlines == Deadlines(ec=5.0, rsa=90.5)


def test_how_many_keys_are_made_ahead_reaches_the_settings(file: Path) -> None:
    file.write_text("[pool]\nec = 64\nrsa = 16\nidle_seconds = 0.5\nmax_age_days = 1.5\n")

    assert settle(read_file(file), keystore=TPM).pool == PoolTerms(ec=64, rsa=16, idle=0.5, age=3 * DAY // 2)
    assert settle({}, keystore=TPM).pool == PoolTerms(ec=0, rsa=1, idle=30.0, age=30 * DAY)


# Overrides for a CA.


@pytest.mark.parametrize(
    ("toml", "field", "expected"),
    [
        ('domain_component = "EMP"', "domain_component", "EMP"),
        ('domain_component = ""', "domain_component", None),
        ('key_usage = ["digitalSignature"]', "key_usage", (KeyUsage.DIGITAL_SIGNATURE,)),
        (
            'key_usage = ["keyEncipherment", "digitalSignature"]',
            "key_usage",
            (KeyUsage.KEY_ENCIPHERMENT, KeyUsage.DIGITAL_SIGNATURE),
        ),
        ('extended_key_usage = ["serverAuth"]', "extended_key_usage", (ExtendedKeyUsage.SERVER_AUTH,)),
        ("extended_key_usage = []", "extended_key_usage", ()),
        ("extended_key_usage_critical = true", "extended_key_usage_critical", True),
        ('evse_id = "none"', "evse_id_placement", EvseIdPlacement.NONE),
        ('evse_id = "san_uri"', "evse_id_placement", EvseIdPlacement.SAN_URI),
        ('evse_id = "serial_number"', "evse_id_placement", EvseIdPlacement.SERIAL_NUMBER),
    ],
)
@pytest.mark.parametrize("certificate_type", CertificateType)
def test_an_override_changes_its_field_of_its_certificate_type_and_nothing_else(
    file: Path, certificate_type: CertificateType, toml: str, field: str, expected: object
) -> None:
    file.write_text(f"[csr.{certificate_type}]\n{toml}\n")
    profiles = settle(read_file(file), keystore=TPM).profiles

    for option in OVERRIDES.values():
        profile_field = option.path[-1]
        standard = getattr(PROFILES[certificate_type], profile_field)
        assert getattr(profiles[certificate_type], profile_field) == (expected if profile_field == field else standard)
    others = set(CertificateType) - {certificate_type}
    assert all(profiles[other] == PROFILES[other] for other in others)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        pytest.param("ca = true", "CA:false", id="CA:true"),
        pytest.param("ca = false", "CA:false", id="CA:false, which needs no saying"),
        pytest.param('basic_constraints = "CA:TRUE"', "CA:false", id="basicConstraints"),
        pytest.param("path_length = 0", "CA:false", id="path length"),
        pytest.param("basic_constraints_critical = false", "always critical", id="basicConstraints not critical"),
        pytest.param("key_usage_critical = false", "keyUsage is always critical", id="keyUsage not critical"),
        pytest.param('key_usage = ["digitalSignature", "keyCertSign"]', "keyCertSign", id="keyCertSign"),
        pytest.param('key_usage = ["digitalSignature", "cRLSign"]', "cRLSign", id="cRLSign"),
        pytest.param('key_usage = ["keyAgreement"]', "must have digitalSignature", id="no digitalSignature"),
        pytest.param("key_usage = []", "must have digitalSignature", id="no keyUsage"),
        pytest.param('subject = ["C", "O"]', "always has C, O and CN", id="subject without CN"),
        *(
            pytest.param(f'{field} = ""', "always has C, O and CN", id=f"no {field}")
            for field in ("country_name", "organization_name", "common_name")
        ),
        pytest.param('extended_key_usage = ["anyExtendedKeyUsage"]', "anyExtendedKeyUsage", id="any purpose"),
        pytest.param('domain_component = "CPO\\n"', "domain_component", id="DC with a line feed"),
        pytest.param('domain_component = "Ü"', "domain_component", id="DC that is no IA5String"),
        pytest.param(f'domain_component = "{"a" * 65}"', "domain_component", id="DC of 65 characters"),
        pytest.param('evse_id = "subject"', "evse_id", id="evse_id somewhere else"),
        pytest.param("san = []", "san", id="unknown name"),
    ],
)
def test_what_no_stations_certificate_may_have_is_refused_at_start(file: Path, toml: str, words: str) -> None:
    error = refused(file, f"[csr.v2g_certificate]\n{toml}\n")
    named = {toml.partition(" ")[0], "[csr]", "csr[...]"}

    assert error.reason == "config_invalid"
    assert words in error.message  # words: which value or option
    assert any(name in error.message for name in named)  # words: which option


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        pytest.param('[pool]\nrsa = "1"\n', "must be a whole number", id="text"),
        pytest.param("[pool]\nrsa = [1]\n", "must be a whole number", id="list"),
        pytest.param("[mqtt]\nca_file = 1.5\n", "must be text, e.g. ", id="number"),
    ],
)
def test_a_value_of_another_type_is_refused_in_words_for_a_person(file: Path, toml: str, words: str) -> None:
    assert words in refused(file, toml).message  # words: what a person is told


# Files that cannot be.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param('brocker = "mqtt://h"', "brocker", id="unknown name"),
        pytest.param("[deadline]\nec = 1", "deadline", id="unknown table"),
        pytest.param("[deadlines]\necc = 1", "ecc", id="unknown name in a table"),
        pytest.param("[csr.mo_certificate]\n", "mo_certificate", id="unknown certificate type"),
        pytest.param("broker = 1883", "broker", id="number for text"),
        pytest.param('allow_software_keys = "yes"', "allow_software_keys", id="text for a boolean"),
        pytest.param('log_format = "xml"', "log_format", id="unknown log format"),
        pytest.param(f'client_id = "{"a" * 65}"', "client_id", id="client identifier of 65 characters"),
        *(
            pytest.param(f"[deadlines]\nec = {value}", "deadlines.ec", id=f"deadline {value}")
            for value in ("0", "-1", "3601", "nan", "inf", "true", '"30"')
        ),
        *(
            pytest.param(f"[pool]\n{name} = {value}", f"pool.{name}", id=f"pool {name} {value}")
            for name, values in {
                "ec": ("-1", "65", "1.5", "true"),
                "rsa": ("-1", "17", '"1"'),
                "idle_seconds": ("-0.1", "3601", "nan", "inf"),
                "max_age_days": ("0", "-1", "36501", "nan", "inf"),
            }.items()
            for value in values
        ),
        pytest.param("[pool]\nsize = 1", "size", id="pool of an unknown name"),
        pytest.param('[policy]\ncountry_names = ["GER"]', "country_names", id="country of three letters"),
        pytest.param('[policy]\nevse_ids = [""]', "evse_ids", id="empty pattern, which nothing would match"),
        pytest.param("[policy]\nrequests_per_minute = nan", "requests_per_minute", id="rate that is no number"),
        pytest.param('[policy]\nsecc_id = "no"', "secc_id", id="severity of another name"),
        pytest.param("[policy]\nqueue = 0", "queue", id="no place at all"),
        pytest.param('[mqtt]\nusername = "a"\nusername_file = "b"', "username_file", id="two user names"),
        pytest.param('[mqtt]\npassword_file = "a"', "username", id="password of nobody"),
        pytest.param('[mqtt]\nkey_file = "a"', "certificate_file", id="key without a certificate"),
        pytest.param("[tpm]\nak_handle = 0x80000000", "tpm.ak_handle", id="handle that is not persistent"),
        pytest.param('client_id = "a\\u0000"', "client_id", id="NUL in a text"),
        pytest.param('[policy]\ncommon_names = ["a\\u0000"]', "policy.common_names", id="NUL in a list"),
        pytest.param('[""]\nbroker = "a"', "unknown", id="table without a name"),
        pytest.param("pool = 7", "pool", id="table no table"),
        pytest.param("broker = ", "TOML", id="no TOML"),
        pytest.param('broker = "a"\nbroker = "b"', "TOML", id="a name twice"),
        pytest.param(f"x = {'9' * 5000}", "TOML", id="a number of 5,000 digits"),
        pytest.param(f"x = {'[' * 5000}", "TOML", id="5,000 deep"),
        pytest.param("csr = 7", "csr", id="csr no table"),
        pytest.param("[csr]\nv2g_certificate = 7", "csr", id="certificate type no table"),
        pytest.param(b'broker = "\xff"', "UTF-8", id="not UTF-8"),
        pytest.param(".".join(["a"] * 50_000) + " = 1", "line 1 ", id="a key of 50,000 parts"),
        pytest.param("[" + ".".join(["a"] * 50_000) + "]", "line 1 ", id="a table 50,000 deep"),
    ],
)
def test_a_file_that_cannot_be_is_refused_and_says_where(file: Path, text: str | bytes, words: str) -> None:
    error = refused(file, text)

    assert error.reason == "config_invalid"
    assert words in error.message  # words: which option, or which format it breaks


def test_a_file_over_256_kib_is_refused(file: Path) -> None:
    assert refused(file, b"#" * (MAX_FILE + 1)).reason == "config_unreadable"


def test_of_a_wrong_file_each_mistake_is_told_and_the_rest_is_used(file: Path) -> None:
    file.write_text(
        'topic_prefix = "a"\nclient_id = 1\nbrocker = "b"\n[pool]\nec = 2\nrsa = -1\n[mqtt]\nkey_file = "k"\n'
        '[csr.v2g_certificate]\nca = true\ndomain_component = ""\n'
    )
    parts = read_parts(file)
    settings = settle(parts.given, keystore=TPM)

    assert parts.lost == frozenset({"client_id", "brocker", "pool", "mqtt", "csr"})
    assert len(parts.complaints) == 5
    assert (settings.topic_prefix, settings.client_id, settings.mqtt.key_file) == ("a", None, None)
    assert settings.pool == PoolTerms(ec=2)
    assert settings.profiles[V2G].domain_component is None


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=os.strerror(errno.ENOENT)) as caught:  # words: the system's own
        read_file(tmp_path / "none.toml")
    assert caught.value.reason == "config_unreadable"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_not_a_regular_file_is_refused_without_waiting(file: Path, make: Callable[[Path], None]) -> None:
    """Nobody writes to the FIFO, and the device never ends."""
    make(file)
    with pytest.raises(ConfigurationError) as caught:
        read_file(file)
    assert caught.value.reason == "config_unreadable"
    assert read_parts(file).lost is None


# The key store.


def test_without_a_key_store_and_without_a_tpm_it_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(file_module, "DEFAULT_DEVICE", str(tmp_path / "tpmrm0"))  # the fault: a machine with no TPM

    with pytest.raises(ConfigurationError) as caught:
        settle({})
    assert "--keystore" in caught.value.hint  # words: the option that helps
    assert caught.value.reason == "keystore_unnamed"


def test_the_default_key_store_is_the_machines_tpm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert DEFAULT_DEVICE == "/dev/tpmrm0"
    monkeypatch.setattr(file_module, "DEFAULT_DEVICE", str(tmp_path))  # a machine with a TPM

    assert settle({}).keystore == f"tpm2:device:{tmp_path}"
    assert settle({("keystore",): TPM}).keystore == TPM


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        pytest.param("software:", "--allow-software-keys", id="software, not allowed"),
        pytest.param("tpm2:", "tpm2:device:/dev/tpmrm0", id="tpm2 without a TCTI"),
        pytest.param("tpm2", "tpm2:device:/dev/tpmrm0", id="no colon"),
        pytest.param("/dev/tpmrm0", "tpm2:device:/dev/tpmrm0", id="a path"),
        pytest.param("pkcs15:token=x", "tpm2: or pkcs11: or software:", id="unknown scheme"),
        pytest.param("pkcs11:token=x", "module", id="a token without its module"),
        pytest.param("", "tpm2: or pkcs11: or software:", id="empty"),
    ],
)
def test_a_key_store_uri_that_cannot_be_is_refused_with_a_hint(uri: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        keystore_opener(uri)
    assert words in caught.value.hint  # words: the option or URI that helps


def test_a_software_key_store_has_nothing_behind_its_colon() -> None:
    with pytest.raises(ConfigurationError, match="'software:'") as caught:  # words: the URI that helps
        keystore_opener("software:/tmp/keys", allow_software_keys=True)
    assert caught.value.reason == "keystore_uri_invalid"


# The broker.


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("mqtt://127.0.0.1:1883", "127.0.0.1", 1883),
        ("mqtt://broker.local", "broker.local", 1883),
        ("mqtt://broker.local:8883/", "broker.local", 8883),
        ("mqtt://[::1]:1884", "::1", 1884),
    ],
)
def test_a_broker_url_names_host_and_port(url: str, host: str, port: int) -> None:
    broker = Broker.parse(url)

    assert (broker.host, broker.port) == (host, port)
    assert Broker.parse(str(broker)) == broker


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:1883",
        "mqtt://",
        "mqtt://:1883",
        "https://h",
        "tcp://h:1883",
        "mqtt://h:0",
        "mqtt://h:65536",
        "mqtt://h:-1",
        "mqtt://h:port",
        "mqtt://h/topic",
        "mqtt://h?client=1",
        "mqtt://h#1",
        "mqtt://[::1",
    ],
)
def test_what_is_no_broker_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Broker.parse(url)
    assert caught.value.reason == "broker_invalid"
    assert "mqtt://127.0.0.1:1883" in caught.value.hint  # words: the example


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("mqtt://user:sesame@h:1883", id="right but for it"),
        pytest.param("mqtt://sesame@h", id="user name alone"),
        pytest.param("mqtt://user:sesame@h:port", id="and a wrong port"),
        pytest.param("mqtt://user:sesame@h:99999", id="and a port out of range"),
        pytest.param("mqtt://user:ses[ame@h", id="and a bracket in it"),
        pytest.param("mqtts://user:sesame@h", id="and another scheme"),
        pytest.param("user:sesame@h", id="and no scheme"),
        pytest.param("mqtt://user:sesame/x@h", id="and a slash in it"),
    ],
)
def test_a_password_in_a_broker_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError, match="password") as caught:  # words: other faults have this reason
        Broker.parse(url)
    assert caught.value.reason == "broker_invalid"
    assert "ses" not in str(caught.value)  # words: the secret is not in it


@pytest.mark.parametrize("prefix", ["a+", "#", "a/#", "a\0b", "$SYS", "a\ud800", "a" * 1025])
def test_a_prefix_that_no_topic_can_begin_with_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        topics(prefix)
    assert caught.value.reason == "topic_prefix_invalid"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("prefix", "request_topic"),
    [("", "josev/cs"), ("site", "site/josev/cs"), ("site/", "site/josev/cs"), ("ü/1", "ü/1/josev/cs")],
)
def test_a_prefix_stands_before_both_topics(prefix: str, request_topic: str) -> None:
    assert topics(prefix) == (request_topic, request_topic.replace("josev/cs", "cs/josev"))


# An option is declared once. The sample is the manual.


class LargerPool(PoolTerms, frozen=True, kw_only=True):
    spare: Annotated[int, Meta(ge=0, le=9), Option("Keys kept for a bad day.")] = 3
    ways: Annotated[
        tuple[str, ...], Option("Not named as in the file.", Form(list[str], tuple), "how", metavar="WAY")
    ] = ()


class TokenTerms(Struct, frozen=True, kw_only=True):
    SCHEME: ClassVar[str] = "token"
    slot: Annotated[int, Option("Where the token is.")] = 0


class LargerSettings(Settings, frozen=True, kw_only=True):
    pool: LargerPool = LargerPool()
    token: TokenTerms = TokenTerms()
    colour: Annotated[Literal["red", "blue"], Option("At the top of the file.")] = "red"


def test_a_field_that_is_added_to_a_section_is_read_and_needs_no_other_table() -> None:
    table: dict[str, Any] = {"keystore": TPM, "colour": "blue", "pool": {"rsa": 2, "spare": 9, "how": ["a", "b"]}}
    settings = build(LargerSettings, read_table(table, source="here", declared=LargerSettings))

    assert (settings.colour, settings.pool) == ("blue", LargerPool(rsa=2, spare=9, ways=("a", "b")))
    wrongs: list[dict[str, Any]] = [{"colour": "green"}, {"pool": {"spare": 10}}, {"pool": {"ways": []}}]
    for wrong in wrongs:
        with pytest.raises(ConfigurationError):
            read_table(wrong, source="here", declared=LargerSettings)
    with pytest.raises(ConfigurationError):
        read_table(table, source="here")


@pytest.mark.parametrize(
    ("keystore", "table"), [("token:", TokenTerms(slot=1)), (TPM, TpmTerms()), ("software:", TpmTerms())]
)
def test_a_key_store_gets_the_table_of_its_scheme(keystore: str, table: object) -> None:
    file = read_table({"keystore": keystore, "token": {"slot": 1}}, source="here", declared=LargerSettings)

    assert build(LargerSettings, file).keystore_terms(keystore) == table


SE = "pkcs11:token=se?module-path=/usr/lib/se.so"
HSM = "pkcs11:token=hsm?module-path=/usr/lib/hsm.so"


class TestKeyStores:
    def test_a_type_gets_its_key_store_and_the_others_the_default(self, file: Path) -> None:
        file.write_text(
            f'keystore = "{TPM}"\n[keystores]\nse = "{SE}"\nold = "{HSM}"\n'
            '[keystore_for]\nv2g20_certificate = "se"\nexisting_keys = ["old"]\n'
        )
        stores = {store.name: (store.uri, set(store.types)) for store in settle(read_file(file)).stores}
        assert stores == {
            "default": (TPM, {CertificateType.CHARGING_STATION_CERTIFICATE, CertificateType.V2G_CERTIFICATE}),
            "se": (SE, {CertificateType.V2G20_CERTIFICATE}),
            "old": (HSM, set()),
        }

    def test_where_each_type_names_one_no_default_is_needed(self) -> None:
        table = {"keystores": {"se": SE}, "keystore_for": {str(kind): "se" for kind in CertificateType}}
        [store] = settle(read_table(table, source="here")).stores
        assert (store.name, set(store.types)) == ("se", set(CertificateType))

    @pytest.mark.parametrize(
        ("text", "line", "place"),
        [
            (
                '[keystores]\nse = "a:"\n[keystore_for]\nv2g_certificate = "ses"\n',
                4,
                "keystore_for.v2g_certificate",
            ),
            ('[keystores]\nse = "a:"\n[keystore_for]\nv2g_certificate = "se"\nv2g21_certificate = "se"\n', 5, "v2g21"),
            ('[keystores]\nse = "a:"\n', 2, "keystores.se"),
            ('keystore = "a:"\n[keystores]\nse = "a:"\n[keystore_for]\nv2g_certificate = "se"\n', 3, "keystores.se"),
            ('[keystore_for]\nexisting_keys = ["se"]\n', 2, "keystore_for.existing_keys"),
            (
                '[keystores]\nse = "a:"\n[keystore_for]\nv2g_certificate = "se"\nexisting_keys = ["se"]\n',
                5,
                "keystore_for.existing_keys",
            ),
            ('[keystores]\nSE = "a:"\n', 2, "keystores"),
            ('[keystores]\ndefault = "a:"\n', 2, "keystores"),
            ("[keystores]\nse = 1\n", 2, "keystores"),
            ('keystores = "a:"\n', 1, "keystores"),
        ],
    )
    def test_what_is_contradictory_is_refused_with_its_line(self, file: Path, text: str, line: int, place: str) -> None:
        file.write_text(text)
        with pytest.raises(ConfigurationError) as refused:
            read_file(file)
        assert refused.value.reason == "config_invalid"
        assert f"line {line}: " in refused.value.message
        assert place in refused.value.message
        settle(read_parts(file).given, keystore=TPM)  # the rest can be used

    def test_the_command_line_may_name_a_store_of_the_file_for_a_command_and_not_for_the_daemon(self) -> None:
        table = {"keystores": {"se": SE}, "keystore_for": {"v2g_certificate": "se"}}
        settings = settle(read_table(table, source="here"), keystore=SE)
        assert settings.stores[0].uri == SE
        with pytest.raises(ConfigurationError) as refused:
            checked_stores(settings)
        assert refused.value.reason == "keystores_conflict"

    def test_the_options_of_a_tpm_are_for_the_tpm_alone(self) -> None:
        table = {"keystore": TPM, "keystores": {"se": SE}, "keystore_for": {"v2g_certificate": "se"}}
        settings = settle(read_table({**table, "tpm": {"session": "hmac"}}, source="here"))
        assert settings.keystore_terms(TPM) == TpmTerms(session="hmac")
        assert settings.keystore_terms(SE) is None

    def test_a_key_of_the_broker_s_is_in_the_tpm_wherever_that_is_named(self) -> None:
        table = {"keystore": SE, "keystores": {"chip": TPM}, "keystore_for": {"v2g_certificate": "chip"}}
        assert f"tpm2:{settle(read_table(table, source='here')).mqtt.tcti}" == TPM
