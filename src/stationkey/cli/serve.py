"""``stationkey serve``. The daemon and its libraries are imported when it starts: ``--help`` needs none of them."""

from __future__ import annotations

from pathlib import Path

import click

from stationkey.cli._options import (
    allow_software_keys_option,
    broker_option,
    config_option,
    keystore_option,
    option,
    state_dir_option,
    topic_prefix_option,
)
from stationkey.config import file as config
from stationkey.system import logs


@click.command()
@broker_option
@keystore_option(
    "Key store: tpm2:TCTI, such as tpm2:device:/dev/tpmrm0 or tpm2:swtpm:host=127.0.0.1,port=2321; or software:."
)
@allow_software_keys_option("Let software: be the key store. Its keys are not protected.")
@state_dir_option("Where the ledger is kept.")
@topic_prefix_option
@option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Format of the log on standard error.  [default: text]",
)
@config_option()
def serve(
    broker: str | None,
    keystore: str | None,
    allow_software_keys: bool | None,
    state_dir: Path | None,
    topic_prefix: str | None,
    log_format: config.LogFormat | None,
    config_file: Path | None,
) -> None:
    """Answer generate_csr until told to stop.

    Options on the command line win over the environment, which wins over the configuration file.
    """
    settings = config.settle(
        config.File() if config_file is None else config.read_file(config_file),
        broker=broker,
        topic_prefix=topic_prefix,
        keystore=keystore,
        allow_software_keys=allow_software_keys,
        state_dir=state_dir,
        log_format=log_format,
    )
    from stationkey import daemon  # noqa: PLC0415 - see the module's docstring

    logs.set_up(settings.log_format)
    daemon.run(settings)
