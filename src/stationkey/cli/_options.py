"""Options of several commands. Those of the configuration are made from `stationkey.config.settings`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final, get_args

import click
from click.shell_completion import CompletionItem

from stationkey.config.file import settle
from stationkey.config.options import options_of
from stationkey.config.settings import LogFormat, Settings
from stationkey.contract.profiles import CertificateType
from stationkey.errors import ConfigurationError, KeyStoreError, MessageError
from stationkey.given import PREFIX, combined, file_of, read

CONFIG_TEXT: Final = "Configuration file (TOML)."
CLIENT_TEXT: Final = "Configuration file (TOML) with the broker's URL. The daemon's login in it is not used."
BROKER: Final = (
    *("broker", "topic_prefix", "mqtt.ca_file", "mqtt.certificate_file", "mqtt.key_file", "mqtt.server_name"),
    *("mqtt.username", "mqtt.password_file"),
)
"""Options of a client of the broker. There is none for a password itself, because every user could read it."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Configured = Callable[[], Settings]
"""Reads the configuration, after a command has checked its own arguments."""
# An unreadable file is reported in our words, with the exit status of every problem with a file.
_path: Final = click.Path(path_type=Path, readable=False)
_DECLARED: Final = {option.place: option for option in options_of(Settings)}
_OF_A_CLIENT: Final = (("broker",), ("topic_prefix",), ("mqtt", "ca_file"), ("mqtt", "server_name"))
"""Options that another client of the broker takes from the system's file, whose login is the daemon's."""
CHOSEN: Final = "stationkey.configuration"
"""Name of the configuration file in click's `meta`."""
_TERMS: Final[dict[str, dict[str, Any]]] = {
    "state_dir": {"type": _path},
    "allow_software_keys": {"is_flag": True},
    "log_format": {"type": click.Choice(get_args(LogFormat))},
}
"""Arguments of `click.option` for an option that is not text."""


class TypeOrFile(click.ParamType):  # type: ignore[type-arg] # generic in the newest click alone
    """A certificate type or a file: any other text is most likely a mistyped type."""

    name = "type|file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in set(CertificateType) and "/" not in value and not Path(value).exists():
            self.fail(f"{value!r} is neither a file nor a certificate type: {', '.join(CertificateType)}", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(str(name)) for name in CertificateType if name.startswith(incomplete)]
        return found or click.File().shell_complete(ctx, param, incomplete)


class Number(click.FloatRange):
    """A finite number in a range: nan is in every range of click's."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def option(name: str, *names: str, **terms: Any) -> Decorator:
    """Return an option that is also read from the environment."""
    variable = name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, *names, envvar=f"{PREFIX}_{variable}", show_envvar=True, **terms)


def chosen_file(given: Path | None) -> Path | None:
    """Return `stationkey.given.file_of`, and note it for the message of an error."""
    if (file := file_of(given)) is not None:
        click.get_current_context().meta[CHOSEN] = file
    return file


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Turn the error of a value of the command line or the environment into wrong usage: exit status 2."""
    try:
        yield
    except (ConfigurationError, MessageError, KeyStoreError) as error:
        raise click.UsageError(str(error)) from error


def setting_option(place: str, text: str = "") -> Decorator:
    """Return the option ``--TABLE-NAME`` for an option of the configuration; its value is None if not given.

    Args:
        place: its place in the file, such as ``mqtt.ca_file``.
        text: its help for this command, if not the declared one.
    """
    declared = _DECLARED[place]
    default = f"  [default: {declared.default}]" if declared.default else ""
    name = f"--{place.replace('.', '-').replace('_', '-')}"
    help_ = (text or declared.option.help) + default
    return option(name, metavar=declared.option.metavar or None, help=help_, default=None, **_TERMS.get(place, {}))


def config_option(text: str = CONFIG_TEXT) -> Decorator:
    """Return the option ``--config``, which a command gets as `config_file`."""
    return option("--config", "config_file", metavar="FILE", type=_path, help=text)


def configured(
    *places: str,
    file: str = CONFIG_TEXT,
    client: bool = False,
    serves: bool = False,
    needs_keystore: bool = True,
    **texts: str,
) -> Decorator:
    """Give a command options of the configuration. It gets the settings as its argument `settings`.

    Args:
        places: places of the options in the file.
        file: help of ``--config`` for this command; empty for no such option.
        client: whether it is another client of the broker, which takes only `_OF_A_CLIENT` from the file.
        serves: whether it uses all options, so that those of `CHECKED` in the file are checked here.
        needs_keystore: see `stationkey.config.file.settle`.
        texts: more options at the top of the file, with their help for this command.
    """
    places += tuple(texts)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def with_settings(*, config_file: Path | None = None, **others: Any) -> Any:
            given: defaultdict[str, dict[str, Any]] = defaultdict(dict)
            for place in places:
                table, _, name = place.rpartition(".")
                given[table][name] = others.pop(place.replace(".", "_"))

            def settings() -> Settings:
                filed = read(chosen_file(config_file), given[""] if serves else None)
                if client:
                    filed = {path: filed[path] for path in _OF_A_CLIENT if path in filed}
                with wrong_usage():
                    told = combined(given, filed)
                return settle(told, needs_keystore=needs_keystore, **given[""])

            return command(settings=settings, **others)

        decorated = config_option(file)(with_settings) if file else with_settings
        for place in reversed(places):
            decorated = setting_option(place, texts.get(place, ""))(decorated)
        return decorated

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
