"""The ``stationkey`` command: a group of commands, one module each.

A command ``do-this`` is the `click.Command` named ``do_this`` in the module ``do_this.py`` of this package. It is
imported when it is run; ``stationkey --help`` and completion read its docstring from the source. Modules that begin
with an underscore are shared by several commands.
"""

from __future__ import annotations

import ast
import errno
import os
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from stationkey._version import __version__
from stationkey.errors import StationKeyError
from stationkey.system.interrupts import EXIT_INTERRUPTED, clean_up_first
from stationkey.system.text import printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_EXTRAS: Final = {
    "station": {"jinja2", "prometheus_client", "rich", "tpm2_pytss"},
    "pkcs11": {"pkcs11"},
    "site": {"psycopg"},
    "josev": {"jsonschema", "ocpp", "websockets"},
}
"""The libraries of each extra in pyproject.toml."""
_UNWRITABLE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""Errors of a standard output that cannot be written. A broken pipe is not among them: click ends quietly."""
_WITHOUT_OUTPUT: Final = {"doctor", "serve"}
"""Commands that are useful without a standard output: by exit status, or the log on standard error."""
_DOCUMENTS: Final = "/usr/share/doc/stationkey"
"""Directory of the documents in the Debian package, which has no extra but [station]."""
_HELP: Final = {"-h", "--help"}


class _Commands(click.Group):
    """Find each command in its module, and turn a `StationKeyError` into a message and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        names = (module.name for module in iter_modules(__path__))
        return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        name = cmd_name.replace("-", "_")
        try:
            command: click.Command = getattr(import_module(f"{__name__}.{name}"), name)
        except ModuleNotFoundError as error:
            return _without(cmd_name, _missing(error))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        click.Group(commands=self._described(ctx)).format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only completion needs it

        found = [command for command in self._described(ctx) if str(command.name).startswith(incomplete)]
        commands = [CompletionItem(command.name, help=command.get_short_help_str()) for command in found]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def _described(self, ctx: click.Context) -> list[click.Command]:
        """Return a stand-in with name and help for each command, without importing any."""
        return [click.Command(name, help=_docstring(name.replace("-", "_"))) for name in self.list_commands(ctx)]

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        if sys.stdout is None and (args[:1] not in ([name] for name in _WITHOUT_OUTPUT) or _HELP & set(args)):
            _fail("standard output is closed; nothing was done")
        return super().make_context(info_name, args, *more, **extra)

    def main(self, *args: Any, **extra: Any) -> Any:
        if sys.stdin is None:  # closed: a file that is opened would take its place
            sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - for as long as the process
        try:
            return super().main(*args, **extra)
        except OSError as error:
            if error.errno not in _UNWRITABLE or error.filename is not None:
                raise
            if sys.stdout is sys.__stdout__:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python would retry at exit
            _fail(f"standard output cannot be written: {error.strerror}")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as stop:
            # A prompt raises Abort both for Ctrl-C and for the answer no.
            if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            ctx.exit(EXIT_INTERRUPTED)
        except (StationKeyError, ModuleNotFoundError) as failure:
            ctx.exit(report(failure, ctx.meta.get("stationkey.configuration")))


def report(failure: StationKeyError | ModuleNotFoundError, file: Path | None) -> int:
    """Print an error, and return its exit status.

    Args:
        failure: the error, or that of a library that is not installed.
        file: the configuration file that was read, if one was.

    Raises:
        ModuleNotFoundError: a module of stationkey is missing.
    """
    error = failure if isinstance(failure, StationKeyError) else _missing(failure)
    click.echo(f"stationkey: {printable(error.message)}", err=True)
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)
    if file and str(file) not in error.message:
        click.echo(f"  configuration file: {printable(str(file))}", err=True)
    return error.exit_code


def _fail(words: str) -> NoReturn:
    click.echo(f"stationkey: {words}", err=True)
    sys.exit(1)


def _docstring(module: str) -> str | None:
    """Return the docstring of the function with the name of its module, from the source."""
    tree = ast.parse(Path(__path__[0], f"{module}.py").read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == module)
    return next((ast.get_docstring(node) for node in functions), None)


def _missing(error: ModuleNotFoundError) -> StationKeyError:
    """Return the error for a library that is not installed.

    Raises:
        ModuleNotFoundError: `error`, if a module of stationkey is missing.
    """
    library = (error.name or "stationkey").partition(".")[0]
    if library == "stationkey":
        raise error
    extras = [f"[{extra}]" for extra, libraries in _EXTRAS.items() if library in libraries]
    return StationKeyError(
        f"this command needs {library}, which is not installed",
        reason="extra_missing",
        hint=f"install the extra {' or '.join(extras)}: docs/install.md, on Debian in {_DOCUMENTS}" if extras else "",
    )


def _without(command: str, missing: StationKeyError) -> click.Command:
    """Return a command that only reports the missing library."""

    @click.command(command, context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("anything", nargs=-1)
    def without(anything: tuple[str, ...]) -> None:  # noqa: ARG001 - click gives it
        raise missing

    return without


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="stationkey", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Create TPM-protected keys on an EV charging station.

    stationkey answers Josev's generate_csr over MQTT with a certificate signing request for a key that is created in
    the station's TPM and never leaves it.

    COMMAND --help shows each option, with its environment variable if it has one.
    """
    clean_up_first()  # the command is imported now
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        context.color = False
