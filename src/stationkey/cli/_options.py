"""Options that several commands have, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from stationkey.config import file as config

PREFIX: Final = "STATIONKEY"
"""Of the environment variable of each option that has one."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# What may not be read is said in our words, and by the same exit status as all that is wrong with a file.
_path: Final = click.Path(path_type=Path, readable=False)


def option(name: str, *names: str, **terms: Any) -> Decorator:
    """An option that is also read from the environment."""
    variable = name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, *names, envvar=f"{PREFIX}_{variable}", show_envvar=True, **terms)


def keystore_option(text: str) -> Decorator:
    """``--keystore``. Its default depends on the machine; `stationkey.config.file.default_keystore` says it."""
    default = f"[default: tpm2:device:{config.DEFAULT_DEVICE}, if there is one]"
    return option("--keystore", metavar="URI", help=f"{text}  {default}")


def state_dir_option(text: str) -> Decorator:
    """``--state-dir``."""
    return option("--state-dir", metavar="DIR", type=_path, help=f"{text}  [default: {config.DEFAULT_STATE_DIR}]")


def config_option(text: str = "Configuration file (TOML).") -> Decorator:
    """``--config``, which a command gets as `config_file`."""
    return option("--config", "config_file", metavar="FILE", type=_path, help=text)


def allow_software_keys_option(text: str) -> Decorator:
    """``--allow-software-keys``, of which None says that nobody said so."""
    return option("--allow-software-keys", is_flag=True, default=None, help=text)


broker_option = option(
    "--broker",
    metavar="URL",
    help=f"MQTT broker, mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS.  [default: {config.DEFAULT_BROKER}]",
)
topic_prefix_option = option(
    "--topic-prefix",
    metavar="PREFIX",
    help="Put before both topics; a / is added where it ends in none.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
