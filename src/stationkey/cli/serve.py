"""``stationkey serve``. The daemon and its libraries are imported when it starts: ``--help`` needs none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from stationkey.cli._options import (
    allow_software_keys_option,
    broker_option,
    config_option,
    keystore_option,
    setting_option,
    state_dir_option,
    topic_prefix_option,
)
from stationkey.config.file import read_file, settle
from stationkey.config.settings import LogFormat
from stationkey.system import logs


@click.command()
@broker_option
@keystore_option()
@allow_software_keys_option()
@state_dir_option()
@topic_prefix_option
@setting_option("log_format", type=click.Choice(get_args(LogFormat)))
@config_option()
def serve(config_file: Path | None, **options: Any) -> None:
    """Answer generate_csr until told to stop.

    Options on the command line win over the environment, which wins over the configuration file.
    """
    settings = settle(read_file(config_file), **options)
    from stationkey import daemon  # noqa: PLC0415 - see the module's docstring

    logs.set_up(settings.log_format)
    daemon.run(settings)
