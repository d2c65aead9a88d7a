"""``stationkey tls-config``. OpenSSL is loaded only after its configuration was set aside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from stationkey.cli._options import Configured, TypeOrFile, configured
from stationkey.errors import ConfigurationError
from stationkey.openssl.servers import SERVERS


@click.command("tls-config")
@configured(keystore="The TPM or the token that the keys are in.", state_dir="Where active/ is.")
@click.option(
    "--check",
    "checked",
    type=TypeOrFile(),
    help="Instead: test TLS handshakes with the active key of a certificate type, or with key and chain in FILE.pem.",
)
@click.option(
    "--trust-anchors",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --check: roots (PEM); the chain must lead to one of them.",
)
@click.option(
    "--for",
    "server",
    type=click.Choice(sorted(SERVERS)),
    help="Instead: print the configuration of a TLS server with an active key.",
)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the configuration to a file instead of printing it.",
)
def tls_config(
    settings: Configured, checked: str | None, trust_anchors: Path | None, server: str | None, out: Path | None
) -> None:
    """Print an OpenSSL configuration for the active keys.

    It says at its head which environment variables a service needs; the daemon needs none of them. For a token, it is
    for pkcs11-provider, or for the engine of libengine-pkcs11-openssl if only that is installed here.

    With --check, a server's key is also tried with six handshakes at a time, if it is in a token, or in a TPM behind a
    resource manager. If only these fail, that is a warning: the server needs one thread and one worker process.

    \b
    Exit status: 0 success, 2 wrong usage, 1 anything else; and with --check
      3 the handshake fails because of the key or its chain
      4 the TPM or token cannot be reached, is full, or hangs
      5 OpenSSL has no provider or engine for it
      6 key and chain do not exist
    """  # noqa: D301 - click's mark for "do not rewrap" is a backspace, which a raw string has not
    if checked is not None and server is not None:
        raise click.UsageError("--for and --check exclude each other")
    if checked is None and trust_anchors is not None:
        raise click.UsageError("--trust-anchors needs --check")
    if checked is not None and "OPENSSL_CONF" in os.environ:
        # This process is the peer, with a software key, and OpenSSL has read its configuration already.
        variables = {name: value for name, value in os.environ.items() if name != "OPENSSL_CONF"}
        command = [sys.executable, "-m", "stationkey", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=variables, check=False).returncode)  # noqa: S603 - the command itself

    from stationkey.openssl import check  # noqa: PLC0415 - see the module's docstring
    from stationkey.openssl.together import check_together  # noqa: PLC0415 - same

    settled = settings()
    text = "" if checked is not None and out is None else check.setup_of(settled.stores[0].uri).text(server)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{out} cannot be written: {error.strerror}", reason="out_unwritable") from None
    if checked is None:
        if out is None:
            click.echo(text, nl=False)
        return
    anchors = None if trust_anchors is None else check.key_file(trust_anchors).content
    for one in check.files_of(checked, settled.state_dir):
        access = check.access_to(one, settled)
        password = check.password_of(one, access)
        made = check.check(one, setup=access.setup, password=password, anchors=anchors)
        for found in (*made, *check_together(one, setup=access.setup, password=password)):
            click.echo(f"{one.name}: {found}")
