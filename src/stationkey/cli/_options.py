"""Options that several commands have. Those of the configuration are made from `stationkey.config.settings`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from stationkey.config.options import options_of
from stationkey.config.settings import Settings

PREFIX: Final = "STATIONKEY"
"""Of the environment variable of each option that has one."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# What may not be read is said in our words, and by the same exit status as all that is wrong with a file.
_path: Final = click.Path(path_type=Path, readable=False)
_DECLARED: Final = {option.place: option for option in options_of(Settings)}


def option(name: str, *names: str, **terms: Any) -> Decorator:
    """An option that is also read from the environment."""
    variable = name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, *names, envvar=f"{PREFIX}_{variable}", show_envvar=True, **terms)


def setting_option(place: str, text: str = "", **terms: Any) -> Decorator:
    """Return the option ``--TABLE-NAME`` for an option of the configuration. None is what is not given.

    Args:
        place: where it is in the file, such as ``mqtt.ca_file``.
        text: what it does for this command, where that is not what is declared.
        terms: for `click.option`.
    """
    declared = _DECLARED[place]
    default = f"  [default: {declared.default}]" if declared.default else ""
    name = f"--{place.replace('.', '-').replace('_', '-')}"
    help_ = (text or declared.option.help) + default
    return option(name, metavar=declared.option.metavar or None, help=help_, default=None, **terms)


def keystore_option(text: str = "") -> Decorator:
    """``--keystore``."""
    return setting_option("keystore", text)


def state_dir_option(text: str = "") -> Decorator:
    """``--state-dir``."""
    return setting_option("state_dir", text, type=_path)


def config_option(text: str = "Configuration file (TOML).") -> Decorator:
    """``--config``, which a command gets as `config_file`."""
    return option("--config", "config_file", metavar="FILE", type=_path, help=text)


def allow_software_keys_option(text: str = "") -> Decorator:
    """``--allow-software-keys``."""
    return setting_option("allow_software_keys", text, is_flag=True)


broker_option = setting_option("broker")
topic_prefix_option = setting_option("topic_prefix")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
