"""``stationkey serve`` without click: a plain command line means what it means to click; any other is left to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stationkey import cli, given, serving
from stationkey.config.settings import Settings
from stationkey.errors import KeyStoreError

FILE = """
broker = "mqtt://of-the-file:1884"
keystore = "software:"
allow_software_keys = true
topic_prefix = "of-the-file"
"""


@dataclass
class Runs:
    """What the daemon was run with, by either."""

    settings: list[tuple[Settings, bool]] = field(default_factory=list)

    def run(self, settled: Settings, *, site: bool) -> int:
        """Run nothing."""
        self.settings.append((settled, site))
        return 0


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    (tmp_path / "stationkey.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stationkey.config.file.SYSTEM_FILE", tmp_path / "none")
    found = Runs()
    monkeypatch.setattr(serving, "run", found.run)
    monkeypatch.setattr("stationkey.cli.serve.run", found.run)
    monkeypatch.setattr("gc.disable", lambda: None)
    return found


def by_click(arguments: Sequence[str]) -> Any:
    return CliRunner().invoke(cli.main, ["serve", *arguments])


SOFTWARE = ("--keystore", "software:", "--allow-software-keys")

plain = pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        pytest.param(SOFTWARE, {}, id="options"),
        pytest.param((*SOFTWARE, "--state-dir=here", "--log-format=json", "--site"), {}, id="with-equals-signs"),
        pytest.param(("--config", "stationkey.toml"), {}, id="file"),
        pytest.param(("--config=stationkey.toml", "--topic-prefix", "a", "--topic-prefix", "b"), {}, id="twice"),
        pytest.param(("--config=stationkey.toml", "--topic-prefix="), {}, id="empty"),
        pytest.param(("--topic-prefix", "x"), {"STATIONKEY_CONFIG": "stationkey.toml"}, id="file-by-environment"),
        pytest.param((), {"STATIONKEY_CONFIG": "stationkey.toml", "STATIONKEY_BROKER": "mqtt://env"}, id="environment"),
        pytest.param(
            ("--config", "stationkey.toml", "--broker", "mqtt://option"), {"STATIONKEY_BROKER": "mqtt://env"}, id="both"
        ),
        pytest.param(("--config", "stationkey.toml"), {"STATIONKEY_BROKER": ""}, id="empty-variable"),
        pytest.param(SOFTWARE, {"STATIONKEY_CONFIG": ""}, id="no-file-by-environment"),
    ],
)


@plain
def test_a_plain_command_line_is_what_click_takes_it_for(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert serving.serve(arguments, cli.report) == 0
    assert by_click(arguments).exit_code == 0
    assert runs.settings[0] == runs.settings[1]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        pytest.param(("--help",), {}, id="help"),
        pytest.param(("-h",), {}, id="short"),
        pytest.param((*SOFTWARE, "--nonsense", "1"), {}, id="unknown"),
        pytest.param((*SOFTWARE, "more"), {}, id="argument"),
        pytest.param((*SOFTWARE, "--"), {}, id="dashes"),
        pytest.param((*SOFTWARE, "--broker"), {}, id="without-a-value"),
        pytest.param((*SOFTWARE, "--topic_prefix", "x"), {}, id="underscore"),
        pytest.param((*SOFTWARE, "--topic-prefix", "--site"), {}, id="value-like-an-option"),
        pytest.param(("--keystore", "software:", "--allow-software-keys=yes"), {}, id="flag-with-a-value"),
        pytest.param((*SOFTWARE, "--log-format", "xml"), {}, id="unknown-choice"),
        pytest.param((*SOFTWARE, "--broker", "nonsense://"), {}, id="invalid-broker"),
        pytest.param(("--keystore", "nonsense"), {}, id="invalid-keystore"),
        pytest.param((*SOFTWARE, "--config", "missing.toml"), {}, id="missing-file"),
        pytest.param(("--keystore", "software:"), {"STATIONKEY_ALLOW_SOFTWARE_KEYS": "1"}, id="flag-by-environment"),
        pytest.param(SOFTWARE, {"_STATIONKEY_COMPLETE": "bash_complete"}, id="completion"),
    ],
)
def test_any_other_is_left_to_click(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert serving.serve(arguments, cli.report) is None
    assert runs.settings == []


def test_an_error_of_the_daemon_has_the_words_and_the_status_of_the_command(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settled: Settings, *, site: bool) -> int:
        del settled, site
        raise KeyStoreError("it does not start", reason="tpm_error", hint="start it")

    for module in ("stationkey.serving", "stationkey.cli.serve"):
        monkeypatch.setattr(f"{module}.run", fail)
    arguments = ("--config", "stationkey.toml")
    status = serving.serve(arguments, cli.report)
    done = by_click(arguments)
    assert (status, capsys.readouterr().err) == (done.exit_code, done.stderr)
    assert status != 0
    assert runs.settings == []


def test_a_plain_command_line_loads_no_library_of_command_lines(tmp_path: Path) -> None:
    program = (
        "import sys; from stationkey import serving\n"
        "serving.run = lambda settled, site: print('click' in sys.modules) or 0\n"
        f"sys.exit(serving.serve([*{SOFTWARE!r}, '--state-dir', {str(tmp_path)!r}], None))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0)


def test_the_options_are_those_of_the_command() -> None:
    options = {name for option in cli.main.get_command(None, "serve").params for name in option.opts}  # type: ignore[arg-type, union-attr] # no context is needed
    assert options - {"--help", "-h"} == {f"--{name}".replace("_", "-") for name in ("config", "site", *serving.PLACES)}
    assert given.PREFIX == "STATIONKEY"
