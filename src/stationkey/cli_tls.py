"""``stationkey tls-config``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from stationkey import config
from stationkey.errors import ConfigurationError
from stationkey.profiles import CertificateType


@click.command("tls-config")
@click.option(
    "--keystore",
    envvar="STATIONKEY_KEYSTORE",
    show_envvar=True,
    metavar="URI",
    help=f"The TPM that the keys are in.  [default: tpm2:device:{config.DEFAULT_DEVICE}, if there is one]",
)
@click.option(
    "--state-dir",
    envvar="STATIONKEY_STATE_DIR",
    show_envvar=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help=f"Where active/ is.  [default: {config.DEFAULT_STATE_DIR}]",
)
@click.option(
    "--config",
    "config_file",
    envvar="STATIONKEY_CONFIG",
    show_envvar=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Configuration file (TOML).",
)
@click.option(
    "--check",
    "checked",
    metavar="TYPE|FILE",
    help="Instead of printing: make TLS handshakes with the active key of a certificate type, or with key and chain in "
    "FILE.pem.",
)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the configuration to a file instead of printing it.",
)
def tls_config(
    keystore: str | None, state_dir: Path | None, config_file: Path | None, checked: str | None, out: Path | None
) -> None:
    """Print the OpenSSL configuration that makes a service use the active keys.

    The service gets it by OPENSSL_CONF, and the TPM by TPM2OPENSSL_TCTI. The daemon itself needs neither.

    \b
    Exit status: 0 all is well, 2 wrong usage, 1 anything else; and with --check
      3 the key or its chain is not fit for a handshake
      4 the TPM cannot be reached, is full, or hangs
      5 OpenSSL has no tpm2 provider
      6 there is no such key and chain
    """  # noqa: D301 - click's mark for "do not rewrap" is a backspace, which a raw string has not
    if checked is not None and "OPENSSL_CONF" in os.environ:
        # This process is the other side, with a key in software, and OpenSSL has read its configuration already.
        variables = {name: value for name, value in os.environ.items() if name != "OPENSSL_CONF"}
        command = [sys.executable, "-m", "stationkey", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=variables, check=False).returncode)  # noqa: S603 - the command itself

    from stationkey import tls  # noqa: PLC0415 - see the docstring of stationkey.cli

    file = config.File() if config_file is None else config.read_file(config_file)
    tcti = tls.tcti_of(keystore or file.keystore or config.default_keystore())
    text = tls.openssl_configuration(tcti=tcti)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{out} cannot be written: {error.strerror}", reason="out_unwritable") from None
    if checked is None:
        if out is None:
            click.echo(text, nl=False)
        return
    if checked in set(CertificateType):
        state = state_dir or Path(file.state_dir or config.DEFAULT_STATE_DIR)
        files = tls.active_files(state, CertificateType(checked))
    else:
        files = [Path(checked)]
    with tempfile.TemporaryDirectory(prefix="stationkey-") as directory:
        configuration = Path(directory, "openssl.cnf")
        configuration.write_text(text, encoding="utf-8")
        for one in files:
            for handshake in tls.check(one, configuration=configuration, tcti=tcti):
                click.echo(f"{one.name}: {handshake}: ok")
