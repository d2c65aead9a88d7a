"""``stationkey key-auth``, for services that use a key with an authorisation value."""

from __future__ import annotations

import sys

import click

from stationkey.cli._options import Configured, TypeOrFile, configured
from stationkey.errors import ConfigurationError
from stationkey.openssl import check


@click.command("key-auth")
@click.argument("named", type=TypeOrFile())
@configured(keystore="The TPM or the token that the keys are in.", state_dir="Where active/ is.")
def key_auth(named: str, settings: Configured) -> None:
    """Write a key's authorisation value to a pipe.

    The key is the active one of a certificate type, or the one in FILE.pem. A value that the TPM has
    sealed ([tpm] key_auth = "generated") is unsealed. Anyone with the value, the file and the TPM can sign with it.
    For a key in a PKCS#11 token the value is the PIN, and who has that can use all that is in the token.
    """
    if sys.stdout.isatty():
        raise ConfigurationError(
            "standard output is a terminal, where others could read the value",
            reason="secret_to_terminal",
            hint="for example: openssl s_server -passin fd:3 3< <(stationkey key-auth TYPE)",
        )
    settled = settings()
    values = {check.password_of(one, check.access_to(one, settled)) for one in check.files_of(named, settled.state_dir)}
    if len(values) != 1 or values == {b""}:
        words = "the keys have different authorisation values" if len(values) > 1 else "no authorisation value"
        raise ConfigurationError(
            f"{named}: {words}", reason="key_auth_unclear", hint="give the file of a key that has one"
        )
    (value,) = values
    sys.stdout.buffer.write(value)
