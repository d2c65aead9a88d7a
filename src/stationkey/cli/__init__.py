"""The ``stationkey`` command. Each subcommand imports what it needs when it runs: ``schema`` loads no TPM stack."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from stationkey import __version__
from stationkey.cli._broker_options import Reach, reaches_broker
from stationkey.cli._options import (
    allow_software_keys_option,
    broker_option,
    config_option,
    json_option,
    keystore_option,
    option,
    state_dir_option,
    topic_prefix_option,
)
from stationkey.config import file as config
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.errors import StationKeyError
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.system.logs import printable

if TYPE_CHECKING:
    from stationkey.ledger import KeyRecord, Ledger

EXIT_REJECTED: Final = 3
EXIT_NO_ANSWER: Final = 4


_ELSEWHERE: Final = {
    "attest": ("stationkey.cli.attest", "attest"),
    "csms": ("stationkey.cli.csms", "csms"),
    "doctor": ("stationkey.cli.doctor", "doctor"),
    "health": ("stationkey.cli.health", "health"),
    "josev": ("stationkey.cli.josev", "josev"),
    "key-auth": ("stationkey.cli.tls_config", "key_auth"),
    "tls-config": ("stationkey.cli.tls_config", "tls_config"),
    "verify-attestation": ("stationkey.cli.verify_attestation", "verify_attestation"),
}
"""Commands that stand in modules of their own, imported when they are asked for: module and name."""


def _without(command: str, library: str) -> click.Command:
    """What stands for a command whose libraries are not installed: a station does not need them."""

    @click.command(command, context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("anything", nargs=-1)
    def without(anything: tuple[str, ...]) -> None:  # noqa: ARG001 - click gives it
        raise StationKeyError(
            f"stationkey {command} needs {library}, which is not installed",
            reason="extra_missing",
            hint="pip install 'stationkey[josev]'",
        )

    without.help = f"(Needs {library}, which is not installed.)"
    return without


class _Commands(click.Group):
    """The one place where the error family becomes words on standard error and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, name = _ELSEWHERE[cmd_name]
        try:
            command: click.Command = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("stationkey"):
                raise
            return _without(cmd_name, error.name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StationKeyError as error:
            click.echo(f"stationkey: {printable(error.message)}", err=True)
            if error.hint:
                click.echo(f"  {printable(error.hint)}", err=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="stationkey", message="%(prog)s %(version)s")
def main() -> None:
    """Give an EV charging station its keys.

    stationkey answers Josev's generate_csr over MQTT with a certificate signing request for a key that is made in the
    station's TPM and never leaves it.

    Every option can also be set by the environment, as shown by each command's --help.
    """


_state_dir = state_dir_option("Where the ledger is kept.")
_config = config_option()


def _file(path: Path | None) -> config.File:
    return config.File() if path is None else config.read_file(path)


@main.command()
@broker_option
@keystore_option(
    "Key store: tpm2:TCTI, such as tpm2:device:/dev/tpmrm0 or tpm2:swtpm:host=127.0.0.1,port=2321; or software:."
)
@allow_software_keys_option("Let software: be the key store. Its keys are not protected.")
@_state_dir
@topic_prefix_option
@option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Format of the log on standard error.  [default: text]",
)
@_config
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
        _file(config_file),
        broker=broker,
        topic_prefix=topic_prefix,
        keystore=keystore,
        allow_software_keys=allow_software_keys,
        state_dir=state_dir,
        log_format=log_format,
    )
    from stationkey import daemon  # noqa: PLC0415 - see the module's docstring
    from stationkey.system import logs  # noqa: PLC0415 - see the module's docstring

    logs.set_up(settings.log_format)
    daemon.run(settings)


@main.command()
@click.argument("certificate_type", type=click.Choice([str(name) for name in CertificateType]))
@click.option("--common-name", required=True, help="CN: SECC ID, or serial number of the station.")
@click.option("--organization-name", required=True, help="O: the operator, as the CSMS knows it.")
@click.option("--country-name", required=True, help="C: two letters.")
@click.option("--algorithm", type=click.Choice([str(name) for name in Algorithm]), help="Key and signature.")
@click.option("--evse-id", help="EVSE that the key is for.")
@click.option("--id", "request_id", metavar="UUID", help="Id of the request.  [default: a new one]")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=30.0, help="Seconds to wait.")
@reaches_broker
@json_option
def request(
    certificate_type: str,
    common_name: str,
    organization_name: str,
    country_name: str,
    algorithm: str | None,
    evse_id: str | None,
    request_id: str | None,
    timeout: float,
    as_json: bool,
    reach: Reach,
) -> None:
    """Ask for a CSR, as Josev does, and print it.

    CERTIFICATE_TYPE says what the certificate is for. What is asked goes out as it is given: whether it is right is
    for the charging station to say.

    \b
    Exit status: 0 accepted, 3 rejected, 4 no answer in time, 2 wrong usage, 1 anything else.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    from msgspec import UNSET  # noqa: PLC0415 - see the module's docstring

    from stationkey.contract import messages  # noqa: PLC0415 - see the module's docstring
    from stationkey.mqtt.client import ask  # noqa: PLC0415 - see the module's docstring

    if request_id is not None and not messages.is_usable_id(request_id):
        raise click.BadParameter("no UUID of the form 8-4-4-4-12: nobody could answer it", param_hint="--id")
    asked = messages.generate_csr(
        request_id or str(uuid.uuid4()),
        messages.GenerateCsrData(
            certificate_type=CertificateType(certificate_type),
            common_name=common_name,
            organization_name=organization_name,
            country_name=country_name,
            evse_id=UNSET if evse_id is None else evse_id,
            algorithm=UNSET if algorithm is None else Algorithm(algorithm),
        ),
    )
    response = asyncio.run(
        ask(reach.broker, asked, topic_prefix=reach.topic_prefix, timeout=timeout, terms=reach.terms)
    )
    if response is None:
        click.echo(f"stationkey: no answer to {asked.id} within {timeout:g} s", err=True)
        click.echo("  is stationkey serve running, on this broker and with this topic prefix?", err=True)
        sys.exit(EXIT_NO_ANSWER)
    if as_json:
        click.echo(messages.encode(response).decode())
    elif response.data.csr is not UNSET:
        click.echo(response.data.csr, nl=False)
    if response.data.status == "accepted" and response.data.csr is UNSET:
        raise StationKeyError(f"{asked.id} was accepted, but the answer has no CSR in it", reason="csr_missing")
    if response.data.status == "rejected":
        click.echo(f"stationkey: {asked.id} was rejected; the log of the charging station says why", err=True)
        sys.exit(EXIT_REJECTED)


@main.group()
def keys() -> None:
    """Look at the keys on record, and end them. Works while the daemon runs."""


@contextmanager
def _ledger(state_dir: Path | None, config_file: Path | None, *, write: bool = False) -> Iterator[Ledger]:
    from stationkey.ledger import Ledger  # noqa: PLC0415 - see the module's docstring
    from stationkey.system.state_dir import DATABASE_NAME, visit  # noqa: PLC0415 - see the module's docstring

    directory = state_dir or Path(_file(config_file).state_dir or config.DEFAULT_STATE_DIR)
    with ExitStack() as stack:
        if os.path.exists(directory):  # noqa: PTH110 - Path.exists raises where the folder above is closed to this user
            directory = stack.enter_context(visit(directory))
        ledger = Ledger(directory / DATABASE_NAME, read_only=not write, make=False)
        stack.callback(ledger.close)
        yield ledger


def _key_json(key: KeyRecord) -> dict[str, object]:
    from base64 import b64encode  # noqa: PLC0415 - see the module's docstring

    return {
        "key_id": key.key_id,
        "state": str(key.state),
        "installation_failed": key.failed,
        "certificate_type": key.certificate_type or None,
        "evse_id": key.evse_id,
        "algorithm": key.algorithm or None,
        "key_type": key.key_type,
        "keystore": key.scheme,
        "common_name": key.common_name or None,
        "organization_name": key.organization_name or None,
        "country_name": key.country_name or None,
        "created_at": _time(key.created_at),
        "certificate_expires_at": None if key.not_after is None else _time(key.not_after * 1000),
        "request_ids": list(key.request_ids),
        "subject_public_key_info": b64encode(key.public).decode(),
    }


def _time(milliseconds: int) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415 - see the module's docstring

    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _age(milliseconds: int) -> str:
    """How long ago, by this machine's clock: days, or hours, or minutes."""
    minutes = max(0, int(time.time() - milliseconds / 1000)) // 60
    for unit, length in (("d", 24 * 60), ("h", 60)):
        if minutes >= length:
            return f"{minutes // length}{unit}"
    return f"{minutes}min"


def _print_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - see the module's docstring
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring
    from rich.text import Text  # noqa: PLC0415 - see the module's docstring

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == headings[0])
    for row in rows:
        # Text, not str: a name may look like markup. Whoever wrote to the ledger must not write to the terminal.
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@keys.command("list")
@_state_dir
@_config
@json_option
def keys_list(state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """List the keys, in the order in which they were made."""
    with _ledger(state_dir, config_file) as ledger:
        found = ledger.keys()
    if as_json:
        click.echo(json.dumps([_key_json(key) for key in found], indent=2))
    elif found:
        _print_table(
            ("KEY", "STATE", "CERTIFICATE TYPE", "EVSE", "ALGORITHM", "COMMON NAME", "AGE", "CERTIFICATE EXPIRES"),
            [
                (
                    key.key_id,
                    f"{key.state}, failed" if key.failed and key.state == "pre-activation" else str(key.state),
                    key.certificate_type or "(made ahead)",
                    key.evse_id or "-",
                    key.algorithm or key.key_type,
                    key.common_name or "-",
                    _age(key.created_at),
                    "-" if key.not_after is None else _time(key.not_after * 1000),
                )
                for key in found
            ],
        )
    else:
        click.echo("no keys yet")


_key_id = click.argument("key_id", metavar="ID")


@keys.command("show")
@_key_id
@_state_dir
@_config
@json_option
def keys_show(key_id: str, state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Show one key. ID is its name, or as much of its beginning as no other key has."""
    with _ledger(state_dir, config_file) as ledger:
        shown = _key_json(ledger.named(key_id))
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    for name, value in shown.items():
        text = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name.replace('_', ' '):<24}{'-' if text is None else printable(str(text))}")


@keys.command("history")
@_key_id
@_state_dir
@_config
@json_option
def keys_history(key_id: str, state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Show everything that happened to a key, first to last, with time and reason."""
    with _ledger(state_dir, config_file) as ledger:
        events = ledger.history(ledger.named(key_id).key_id)
    if as_json:
        shown = [
            {
                "at": _time(event.at),
                "event": event.event,
                "state": event.state,
                "reason": event.reason,
                "message_id": event.message_id,
            }
            for event in events
        ]
        click.echo(json.dumps(shown, indent=2))
        return
    _print_table(
        ("TIME", "EVENT", "STATE AFTER IT", "REASON", "MESSAGE"),
        [(_time(event.at), event.event, event.state, event.reason or "-", event.message_id or "-") for event in events],
    )


def _order(
    key_id: str, event: KeyEvent, reason: str, state_dir: Path | None, config_file: Path | None, *, ask: str | None
) -> None:
    """Do to a key what the operator orders, in the ledger and under active/."""
    from stationkey.service.active_files import ActiveDirectory  # noqa: PLC0415 - see the module's docstring

    with _ledger(state_dir, config_file, write=True) as ledger:
        key = ledger.named(key_id)
        if ask is not None:
            named = printable(f"{key.key_id} ({key.certificate_type}, {key.state})")
            click.confirm(f"{ask} {named}?", abort=True, err=True)
            if (now := ledger.named(key.key_id).state) != key.state:
                raise StationKeyError(
                    f"{key.key_id} has become {now} meanwhile; nothing was changed",
                    reason="key_changed",
                    hint="ask anew",
                )
        state = ledger.apply(key.key_id, event, reason=reason, now=int(time.time() * 1000))
        ActiveDirectory(ledger.path.parent).sync(ledger.active_files)
        ledger.wipe()
    click.echo(printable(f"{key.key_id} is {state}"))


_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_reason = click.option("--reason", default="by the operator", help="For the history.")


@keys.command("retire")
@_key_id
@_reason
@_state_dir
@_config
def keys_retire(key_id: str, reason: str, state_dir: Path | None, config_file: Path | None) -> None:
    """Take an active key out of use. It is kept for the grace period, and then destroyed."""
    _order(key_id, KeyEvent.RETIRED, reason, state_dir, config_file, ask=None)


@keys.command("destroy")
@_key_id
@_yes
@_reason
@_state_dir
@_config
def keys_destroy(key_id: str, yes: bool, reason: str, state_dir: Path | None, config_file: Path | None) -> None:
    """Destroy a key for good: its private part is wiped from the ledger and from active/."""
    ask = None if yes else "Destroy"
    _order(key_id, KeyEvent.DESTRUCTION_ORDERED, reason, state_dir, config_file, ask=ask)


@keys.command("mark-compromised")
@_key_id
@_yes
@_reason
@_state_dir
@_config
def keys_mark_compromised(
    key_id: str, yes: bool, reason: str, state_dir: Path | None, config_file: Path | None
) -> None:
    """Say that a key may be known to others. It is taken out of use at once; have its certificate revoked."""
    ask = None if yes else "Mark as compromised"
    _order(key_id, KeyEvent.COMPROMISE_REPORTED, reason, state_dir, config_file, ask=ask)


@keys.command("export-public")
@_key_id
@_state_dir
@_config
def keys_export_public(key_id: str, state_dir: Path | None, config_file: Path | None) -> None:
    """Print the public part of a key, as a PEM PUBLIC KEY."""
    from ssl import DER_cert_to_PEM_cert  # noqa: PLC0415 - see the module's docstring

    with _ledger(state_dir, config_file) as ledger:
        key = ledger.named(key_id)
    # The standard library has armour for certificates only; the lines in between are the same [RFC 7468 13].
    click.echo(DER_cert_to_PEM_cert(key.public).replace("CERTIFICATE", "PUBLIC KEY"), nl=False)


@main.command()
@click.argument("name", required=False)
def schema(name: str | None) -> None:
    """Print the contract: the JSON Schema of a message or of evidence, or the AsyncAPI document.

    \b
    NAME is one of
      generate_csr.request
      generate_csr.response
      certificate_installation_status.update
      asyncapi
      attestation.evidence
      attestation.attestation_key
      attestation.challenge

    Without NAME, all of them are printed as one JSON object.
    """  # noqa: D301 - as above
    from stationkey.cli import schema_documents as schemas  # noqa: PLC0415 - see the module's docstring

    if name is not None and name not in schemas.NAMES:
        raise click.BadParameter(f"{name!r} is none of {', '.join(schemas.NAMES)}", param_hint="NAME")
    documents = {known: schemas.document(known) for known in schemas.NAMES if name in {None, known}}
    click.echo(json.dumps(documents if name is None else documents[name], indent=2, ensure_ascii=False))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes stationkey's commands and options.

    For bash: stationkey completion bash > /etc/bash_completion.d/stationkey
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - see the module's docstring

    complete = get_completion_class(shell)
    assert complete is not None  # the argument's choice
    click.echo(complete(main, {}, "stationkey", "_STATIONKEY_COMPLETE").source())


if __name__ == "__main__":
    main()
