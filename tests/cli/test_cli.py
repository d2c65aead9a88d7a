"""The command: what it says, what it exits with, and what it does not load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner, Result
from peers import Mosquitto, free_port

from stationkey import __version__, cli
from stationkey.cli import schema as schema_documents
from stationkey.cli.serve import serve
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.ledger import Ledger
from stationkey.system.state_dir import StateDirectory

ASK = [
    "request",
    "v2g_certificate",
    "--common-name",
    "DE-ABC-S-1",
    "--organization-name",
    "EcoG",
    "--country-name",
    "DE",
]

REASONED = Path(__file__).parents[1] / "support/reasoned.py"
JOSEV = [*ASK[2:], "--identity", "CS1", "--certificate-dir", "x", "--trust-anchors", __file__]
NOWHERE = ["--broker", "mqtt://127.0.0.1:1"]
"""A broker that is not there, for what must not get so far."""


def run(
    *arguments: str | bytes, program: Sequence[str] = ("-m", "stationkey"), environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command as a shell would start it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STATIONKEY_")}
    inherited["STATIONKEY_CONFIG"] = ""
    return subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=inherited | (environment or {}),
    )


def invoke(*arguments: str) -> Result:
    """The command in this process: what it raises is a fault."""
    return CliRunner().invoke(cli.main, arguments, catch_exceptions=False)


def commands(group: click.Group = cli.main, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words it is called by."""
    found: list[tuple[tuple[str, ...], click.Command]] = [(path, group)]
    context = click.Context(group)
    for name in group.list_commands(context):  # those in modules of their own too
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
        else:
            found.append(((*path, name), command))
    return found


COMMANDS = [pytest.param(path, command, id=" ".join(("stationkey", *path))) for path, command in commands()]


# Help.


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_help_says_what_a_command_is_for_and_what_each_option_does(
    path: tuple[str, ...], command: click.Command
) -> None:
    result = invoke(*path, "--help")

    assert result.exit_code == 0
    assert f"Usage: main {' '.join(path)}".strip() in result.output
    assert command.help
    assert command.help.split(".")[0].split("\n")[0] in " ".join(result.output.split())
    assert "\b" not in result.output
    assert "\\b" not in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.opts[-1] in result.output
            assert parameter.help


@pytest.mark.parametrize("option", [parameter for parameter in serve.params if isinstance(parameter, click.Option)])
def test_every_option_of_serve_can_be_set_by_the_environment_and_says_so(option: click.Option) -> None:
    variable = "STATIONKEY_" + option.opts[0].removeprefix("--").replace("-", "_").upper()

    assert option.envvar == variable
    assert variable in invoke("serve", "--help").output


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("request",), "0 accepted, 3 rejected, 4 no answer in time, 2 wrong usage, 1 anything else"),
        (("serve",), "[default: mqtt://127.0.0.1:1883]"),
        (("serve",), "[default: tpm2:device:/dev/tpmrm0, if there is one]"),
        (("serve",), "[default: /var/lib/stationkey]"),
        *((("schema",), f"  {name}\n") for name in schema_documents.NAMES),
    ],
)
def test_help_says_what_one_would_look_up(path: tuple[str, ...], words: str) -> None:
    folded = invoke(*path, "--help").output

    assert words in folded or words in " ".join(folded.split())


def test_the_version_is_the_packages() -> None:
    asked = run("--version")

    assert (asked.returncode, asked.stdout, asked.stderr) == (0, f"stationkey {__version__}\n", "")


# A command is its file.

SAY_HELLO = """
import click

@click.command()
def say_hello() -> None:
    '''Say hello. Then end.'''
    click.echo("hello")
"""


@pytest.fixture
def say_hello(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A command as somebody adds it, beside a module that several share. There is no other."""
    monkeypatch.setattr(cli, "__path__", [str(tmp_path)])
    file = tmp_path / "say_hello.py"
    file.write_text(SAY_HELLO)
    (tmp_path / "_shared.py").write_text("raise AssertionError\n")
    yield file
    sys.modules.pop("stationkey.cli.say_hello", None)


def test_a_command_is_added_by_its_file_alone(say_hello: Path) -> None:
    assert say_hello.exists()
    assert invoke("say-hello").output == "hello\n"
    assert invoke("--help").output.splitlines()[-1] == "  say-hello  Say hello."


def test_a_command_is_imported_only_when_it_is_asked_for(say_hello: Path) -> None:
    say_hello.write_text(f"raise AssertionError\n{SAY_HELLO}")

    assert "  say-hello  Say hello." in invoke("--help").output
    assert invoke("other").exit_code == 2
    with pytest.raises(AssertionError):
        invoke("say-hello")


def test_a_command_whose_library_is_not_installed_says_so(say_hello: Path) -> None:
    say_hello.write_text("import no_such_library\n")
    result = invoke("say-hello", "--any")

    assert result.exit_code == 1
    assert "no_such_library" in result.stderr  # words: which library


# Wrong usage, and other ends.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["no-such-command"], "'no-such-command'", id="unknown command"),
        pytest.param(["serve", "--no-such-option"], "--no-such-option", id="unknown option"),
        pytest.param(["serve", "--log-format", "xml"], "'xml'", id="unknown log format"),
        pytest.param(["request"], "Missing argument", id="no certificate type"),
        pytest.param(["request", "mo_certificate"], "'mo_certificate'", id="unknown certificate type"),
        *(pytest.param([*ASK[:at], *ASK[at + 2 :]], f"'{ASK[at]}'", id=f"no {ASK[at]}") for at in (2, 4, 6)),
        pytest.param([*ASK, "--algorithm", "MD5"], "'MD5'", id="unknown algorithm"),
        pytest.param([*ASK, "--id", "7"], "8-4-4-4-12", id="id no UUID"),
        pytest.param([*ASK, "--id", "{123e4567-e89b-12d3-a456-426614174000}"], "UUID", id="id in braces"),
        pytest.param([*ASK, "--id", ""], "UUID", id="id empty"),
        pytest.param([*ASK, "--timeout", "0"], "x>0", id="no time"),
        pytest.param([*ASK, "--timeout", "nan"], "'nan'", id="time no number"),
        pytest.param([*ASK, "--timeout", "soon"], "'soon'", id="time in words"),
        pytest.param(["schema", "generate_csr"], "generate_csr.request", id="unknown schema"),
        pytest.param(["completion", "csh"], "'csh'", id="unknown shell"),
        pytest.param(["keys", "show"], "'ID'", id="no key named"),
        pytest.param([*ASK, "--broker", "127.0.0.1"], "'127.0.0.1'", id="no URL"),
        pytest.param([*ASK, "--broker", "mqtt://u:p@127.0.0.1:1"], "password", id="password"),
        pytest.param([*ASK, *NOWHERE, "--topic-prefix", "a/#"], "'a/#'", id="wildcard"),
        pytest.param([*ASK, *NOWHERE, "--topic-prefix", "\udcff"], "udcff", id="prefix not UTF-8"),
        pytest.param([*ASK, *NOWHERE, "--mqtt-key-file", "/x"], "certificate_file", id="key without certificate"),
        pytest.param(["serve", "--keystore", "pkcs15:"], "'pkcs15:'", id="unknown key store"),
        pytest.param(["serve", "--keystore", "tpm2:"], "tpm2:device:/dev/tpmrm0", id="no TCTI"),
        pytest.param(["serve", "--keystore", "pkcs11:token"], "'token'", id="a PKCS#11 URI that is malformed"),
        pytest.param(["serve", "--keystore", "tpm2:x", "--broker", "h"], "'h'", id="serve, no URL"),
        pytest.param(["tls-config", "--check", "v2g"], ", ".join(CertificateType), id="a type that was mistyped"),
        pytest.param(["key-auth", "v2g"], ", ".join(CertificateType), id="key-auth, a type that was mistyped"),
        pytest.param(["health", "everywhere:1"], "'everywhere:1'", id="health, no address"),
        pytest.param(["josev", *JOSEV, "--csms", "http://127.0.0.1:1"], "wss://", id="no URL of a WebSocket"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr  # words: which command, option or argument, what it may be
    assert "--help" in result.stderr  # words: the option that helps


class Failure(NamedTuple):
    """Why a command exits 1."""

    reason: str
    said: str


def failed(*arguments: str | bytes) -> Failure:
    """Run a command that exits 1: it says why on standard error, with no traceback."""
    with tempfile.NamedTemporaryFile("r") as file:
        ended = run(*arguments, program=(str(REASONED),), environment={"REASON_FILE": file.name})
        reason = file.read()
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("stationkey: ")
    assert "Traceback" not in ended.stderr
    return Failure(reason, ended.stderr)


def test_asking_a_broker_that_is_not_there_exits_1() -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    failure = failed(*ASK, "--broker", url)

    assert failure.reason == "broker_unreachable"
    assert url in failure.said  # words: which broker


@pytest.mark.parametrize(
    ("arguments", "reason", "words"),
    [
        pytest.param([*ASK, *NOWHERE, "--evse-id", b"\xff"], "not_utf8", "", id="EVSE ID not UTF-8"),
        pytest.param(
            ["serve", "--keystore", "software:"],
            "software_keys_refused",
            "--allow-software-keys",
            id="software, not allowed",
        ),
        pytest.param(
            ["serve", "--config", "/no/such/file"], "config_unreadable", "/no/such/file", id="no configuration file"
        ),
        pytest.param(
            ["keys", "list", "--config", "/no/such/file"],
            "config_unreadable",
            "/no/such/file",
            id="keys, no configuration file",
        ),
    ],
)
def test_what_cannot_be_exits_1_and_says_why(arguments: list[str | bytes], reason: str, words: str) -> None:
    failure = failed(*arguments)

    assert failure.reason == reason
    assert words in failure.said  # words: which value or file, the option that helps, or what the reason leaves open


def test_no_answer_in_time_exits_4(mosquitto: Mosquitto) -> None:
    ended = run(*ASK, "--broker", mosquitto.url, "--timeout", "0.2")

    assert (ended.returncode, ended.stdout) == (4, "")
    assert "0.2 s" in ended.stderr  # words: the limit
    assert "Traceback" not in ended.stderr


# Keys.


def test_a_state_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for arguments in (["list"], ["show", "00"]):
        failure = failed("keys", *arguments, "--state-dir", str(tmp_path / "none"))
        assert failure.reason == "ledger_missing"
        assert "--state-dir" in failure.said  # words: the option that helps
    assert not (tmp_path / "none").exists()


def test_an_empty_state_directory_is_an_error_and_stays_empty(tmp_path: Path) -> None:
    assert failed("keys", "list", "--state-dir", str(tmp_path)).reason == "ledger_missing"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def new_state(tmp_path: Path) -> Path:
    """The state directory of a station that was asked for nothing yet."""
    directory = StateDirectory(tmp_path / "state")
    Ledger(directory.database).close()
    directory.close()
    return tmp_path / "state"


def test_a_station_without_keys_says_so(new_state: Path) -> None:
    assert invoke("keys", "list", "--state-dir", str(new_state)).stdout == "no keys yet\n"
    assert json.loads(invoke("keys", "list", "--json", "--state-dir", str(new_state)).stdout) == []


@pytest.mark.parametrize("key_id", ["00", "", "%", "'; DROP TABLE key"])
def test_a_key_that_is_not_there_is_an_error(new_state: Path, key_id: str) -> None:
    failure = failed("keys", "show", key_id, "--state-dir", str(new_state))

    assert failure.reason == "key_not_found"
    assert f"key {key_id}" in failure.said  # words: which key


def test_the_state_directory_may_come_from_the_configuration_file(new_state: Path, tmp_path: Path) -> None:
    file = tmp_path / "stationkey.toml"
    file.write_text(f'state_dir = "{new_state}"\n')

    assert invoke("keys", "list", "--config", str(file)).stdout == "no keys yet\n"


# Schemas.


@pytest.mark.parametrize("name", schema_documents.NAMES)
def test_schema_prints_exactly_the_codes_document(name: str) -> None:
    assert json.loads(invoke("schema", name).stdout) == schema_documents.document(name)


def test_schema_without_a_name_prints_all_of_them() -> None:
    documents = {name: schema_documents.document(name) for name in schema_documents.NAMES}
    assert json.loads(invoke("schema").stdout) == documents


# Completion.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str) -> None:
    script = invoke("completion", shell).stdout

    assert "_STATIONKEY_COMPLETE" in script
    assert f"{shell}_complete" in script


def test_the_script_for_bash_is_one_that_bash_takes() -> None:
    bash = shutil.which("bash")
    assert bash

    subprocess.run([bash, "-n"], input=invoke("completion", "bash").stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "stationkey ",
            {
                *("serve", "request", "keys", "key-auth", "schema", "completion", "josev", "csms", "tls-config"),
                *("health", "doctor", "attest", "verify-attestation", "requests", "status", "config", "csr"),
            },
        ),
        ("stationkey josev --ocpp ", {"2.1", "2.0.1", "1.6"}),
        ("stationkey csms --trigger ", set(CertificateType)),
        ("stationkey keys d", {"destroy"}),
        ("stationkey request ", set(CertificateType)),
        ("stationkey request v2g_certificate --algorithm ", set(Algorithm)),
        ("stationkey serve --allow", {"--allow-software-keys"}),
        ("stationkey schema ", set(schema_documents.NAMES)),
        ("stationkey key-auth ", set(CertificateType)),
        ("stationkey tls-config --check v2g_", {"v2g_certificate"}),
    ],
)
def test_what_is_begun_is_completed(line: str, expected: set[str]) -> None:
    environment = {
        "_STATIONKEY_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    ended = subprocess.run(
        [Path(sys.executable).with_name("stationkey")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )

    assert {row.partition(",")[2] for row in ended.stdout.splitlines()} == expected


# What is not loaded.


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--version"], id="--version"),
        pytest.param(["--help"], id="--help"),
        pytest.param(["serve", "--help"], id="serve --help"),
        pytest.param(["schema"], id="schema"),
        pytest.param(["schema", "asyncapi"], id="schema asyncapi"),
        pytest.param(["keys", "list"], id="keys list"),
        pytest.param(["keys", "show", "00"], id="keys show"),
        pytest.param(["requests"], id="requests"),
        pytest.param(["status"], id="status"),
        pytest.param(["completion", "bash"], id="completion"),
    ],
)
def test_looking_loads_no_tpm_x509_or_mqtt_library(new_state: Path, arguments: list[str]) -> None:
    program = (
        "import contextlib, sys\n"
        "from stationkey.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:], standalone_mode=False)\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} | set(sys.modules)\n"
        "told = loaded & {'tpm2_pytss', 'cryptography', 'stationkey.mqtt', 'ocpp', 'psycopg', 'stationkey'}\n"
        "print('loaded', *sorted(told), file=sys.stderr)\n"
    )
    if arguments[0] in {"keys", "requests", "status"}:
        arguments = [*arguments, "--state-dir", str(new_state)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, env=os.environ
    )

    assert ended.stderr.splitlines()[-1] == "loaded stationkey"
