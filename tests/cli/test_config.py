"""``stationkey config check``, and which configuration file a command reads."""

from __future__ import annotations

import tomllib
from contextlib import closing
from pathlib import Path

import pytest
from reasons import command

from stationkey.cli import doctor
from stationkey.config import file as configuration
from stationkey.config.options import Declared, options_of
from stationkey.config.settings import CsrOverrides, Settings
from stationkey.doctor.host.context import Options
from stationkey.doctor.report import Report
from stationkey.ledger import Ledger
from stationkey.system.state_dir import DATABASE_NAME

WRONG = """\
brokr = "x"
broker = 1883
log_format = "xml"
[pool]
rsa = "1"
ecc = 2
listen = "x"
[polcy]
"""


def test_everything_wrong_is_said_at_once_with_its_line_and_what_it_must_be(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(WRONG)
    checked = command("config", "check", str(file))
    assert checked.exit_code == 1
    for line, words in {
        1: "did you mean broker?",
        2: 'broker must be text, e.g. "mqtt://127.0.0.1:1883"',
        3: 'must be one of "json", "text"',
        5: "pool.rsa must be a whole number, at least 0 and at most 16, e.g. 1",
        6: "did you mean ec?",
        7: "it belongs in [metrics]",
        8: "did you mean policy?",
    }.items():
        (told,) = [told for told in checked.stdout.splitlines() if f" line {line}: " in told]
        assert words in told  # words: the issue's own form
    assert command("keys", "list", "--config", str(file)).reason == "config_invalid"


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [("", 0), ('broker = "foo"', 1), ('topic_prefix = "a/#"', 1), ('[metrics]\nlisten = "0.0.0.0:1"', 1), ("a =", 1)],
)
def test_what_the_daemon_would_not_take_is_wrong(tmp_path: Path, text: str, exit_code: int) -> None:
    (tmp_path / "one.toml").write_text(text)
    assert command("config", "check", STATIONKEY_CONFIG=str(tmp_path / "one.toml")).exit_code == exit_code


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("pkcs11:token=se?module-path=/m", ["0 problems"]),
        ("nothing", ["line 3: keystores.se: "]),
        ("tpm2:device:/dev/tpmrm1", ["keystores.se", "keystore "]),
    ],
)
def test_a_key_store_with_a_name_is_checked_as_the_default_is_and_beside_it(
    tmp_path: Path, uri: str, said: list[str]
) -> None:
    file = tmp_path / "stores.toml"
    lines = ['keystore = "tpm2:device:/dev/tpmrm0"', "[keystores]", f'se = "{uri}"']
    file.write_text("\n".join([*lines, "[keystore_for]", 'v2g20_certificate = "se"']))
    checked = command("config", "check", str(file))
    told = checked.stdout.replace("no problems", "0 problems")
    assert (checked.exit_code, [words in told for words in said]) == (int(said != ["0 problems"]), [True] * len(said))


def test_a_text_that_is_not_toml_is_said_without_the_words_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text("# a\nbroker = mqtt://x\n")
    told = command("config", "check", str(tmp_path / "one.toml")).stdout
    assert "line 2" in told
    assert "Invalid value" not in told  # words: tomllib's


OPTIONS = [*options_of(Settings), *options_of(CsrOverrides, "csr.v2g_certificate")]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.place)
def test_the_example_of_an_option_is_one_that_it_takes(option: Declared) -> None:
    if option.example:
        option.read(tomllib.loads(f"x = {option.example}")["x"])
    else:
        assert option.written is bool or "evse_id" in option.place or option.written is not str


def test_the_system_s_file_is_read_where_no_other_is_named_and_errors_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Ledger(tmp_path / DATABASE_NAME)):
        system = tmp_path / "system.toml"
    system.write_text(f'state_dir = "{tmp_path}"\n')
    monkeypatch.setattr(configuration, "SYSTEM_FILE", system)
    monkeypatch.delenv("STATIONKEY_CONFIG")
    assert command("keys", "list").stdout == "no keys yet\n"
    failed = command("keys", "show", "00")
    assert str(system) in failed.stderr
    other = tmp_path / "other.toml"
    other.write_text(f'state_dir = "{tmp_path}/none"\n')
    assert command("keys", "list", STATIONKEY_CONFIG=str(other)).reason == "ledger_missing"
    assert command("keys", "list", "--config", str(other)).reason == "ledger_missing"
    assert command("keys", "list", "--state-dir", str(tmp_path / "none")).reason == "ledger_missing"
    monkeypatch.setattr(configuration, "SYSTEM_FILE", other)
    assert command("status", "--json", STATIONKEY_CONFIG="").stdout.count('"configuration": null') == 1


def test_a_client_takes_the_broker_of_the_system_s_file_and_not_its_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "system.toml"
    system.write_text('broker = "mqtt://127.0.0.1:1"\n[mqtt]\nusername = "daemon"\npassword_file = "/none"\n')
    monkeypatch.setattr(configuration, "SYSTEM_FILE", system)
    monkeypatch.delenv("STATIONKEY_CONFIG")
    names = ("--common-name", "x", "--organization-name", "x", "--country-name", "DE")
    failed = command("request", "v2g_certificate", *names)
    assert failed.reason == "broker_unreachable"  # and not secret_unreadable
    assert "127.0.0.1:1:" in failed.stderr


@pytest.mark.parametrize(
    ("text", "place", "form"),
    [
        ('\nbroker = "http://x"\n', "line 2: broker: ", "mqtt://127.0.0.1:1883"),
        ('[metrics]\nlisten = "0.0.0.0:1"\n', "line 2: metrics.listen: ", "loopback"),
        ('[policy]\ncountry_names = ["GER"]\n', "line 2: policy.country_names ", "two letters"),
        ('[csr.v2g_certificate]\ndomain_component = "Ü"\n', "line 2: csr.v2g_certificate.domain_component ", "ASCII"),
    ],
)
def test_serve_refuses_a_file_in_the_words_of_config_check(tmp_path: Path, text: str, place: str, form: str) -> None:
    file = tmp_path / "one.toml"
    file.write_text(text)
    checked = command("config", "check", str(file)).stdout.splitlines()
    served = command("serve", "--config", str(file), "--keystore", "software:")
    assert served.exit_code == 1
    assert f"{file}: {place}" in checked[0]
    assert form in checked[0]  # words: what the option must be
    assert f"{file}: {place}" in served.stderr.splitlines()[0]


def test_problems_are_told_in_the_order_of_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "one.toml"
    file.write_text('broker = "foo"\n[pool]\nec = -1\n[polcy]\n[mqtt]\nkey_file = "k"\n')
    told = command("config", "check", str(file)).stdout.splitlines()
    assert [line.split("line ")[1][0] for line in told[:-1]] == ["1", "3", "4", "5"]


def test_the_doctor_examines_the_system_s_file_where_no_other_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "system.toml"
    system.write_text("brokr = 1\n")
    monkeypatch.setattr(configuration, "SYSTEM_FILE", system)
    monkeypatch.delenv("STATIONKEY_CONFIG")
    seen: list[Path | None] = []

    def examine(options: Options) -> tuple[Report, bool]:
        seen.append(options.config_file)
        return Report(()), False

    monkeypatch.setattr(doctor, "examine", examine)
    command("doctor")
    command("doctor", "--config", str(tmp_path / "other.toml"))
    assert seen == [system, tmp_path / "other.toml"]
