"""Print the man page, made from what `--help` shows: every command with its options."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from stationkey import __version__
from stationkey.cli import main

_HEAD = f'.TH STATIONKEY 1 "" "stationkey {__version__}" "User Commands"'
_TAIL = """\
.SH FILES
.TP
/etc/stationkey/stationkey.toml
the configuration; its comments explain every option
.TP
/var/lib/stationkey
the state directory: ledger and active files
.TP
/usr/share/doc/stationkey
the documents: start with README.md and docs/quickstart.md
.SH SEE ALSO
.BR systemctl (1),
.BR journalctl (1),
.BR openssl (1)"""


def _plain(text: str) -> str:
    """Return text that roff takes literally."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", escaped, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    """Return the paragraphs of a help text; a backspace marks one whose lines are kept, as for click."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        kept, lines = paragraph.startswith("\b"), [line.strip() for line in paragraph.strip("\b\n").splitlines()]
        yield ".PP"
        yield _plain(("\n.br\n" if kept else " ").join(lines)).replace("\n\\&.br", "\n.br")


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Return every command below and including this one, groups before their members, in the order of `--help`."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from commands(below, click.Context(below, info_name=name, parent=context))


def page() -> Iterator[str]:
    """Return the lines of the page."""
    root = click.Context(main, info_name="stationkey")
    yield _HEAD
    yield ".SH NAME"
    yield _plain("stationkey - TPM-protected keys and CSRs for an EV charging station")
    for command, context in commands(main, root):
        yield ".SH SYNOPSIS" if command is main else f'.SS "{_plain(context.command_path)}"'
        yield f".B {_plain(' '.join([context.command_path, *command.collect_usage_pieces(context)]))}"
        if command is main:
            yield ".SH DESCRIPTION"
        yield from _paragraphs(command.help or "")
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and record[1]:
                yield ".TP"
                yield f".B {_plain(record[0])}"
                yield _plain(" ".join(record[1].split()))
        if command is main:
            yield ".SH COMMANDS"
    yield _TAIL


if __name__ == "__main__":
    print(*page(), sep="\n")
