"""``stationkey doctor``."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final

import click

from stationkey.cli._options import config_option, json_option, option, setting_option
from stationkey.doctor import AREAS, Finding, Level, Options, Report, examine

_WIDTHS: Final = (60, 120)
_PLAIN_WIDTH: Final = 80
_WORDS: Final = {Level.OK: "ok", Level.WARNING: "warning", Level.FAILURE: "FAILURE", Level.NOT_CHECKED: "-"}
_COLOURS: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILURE: "red", Level.NOT_CHECKED: None}
_INDENT: Final = 2
_COLUMN: Final = 10


@click.command("doctor")
@setting_option("broker")
@setting_option("keystore", "Key store.")
@setting_option("allow_software_keys", "As for serve.")
@setting_option("state_dir", "Where the ledger is kept.")
@setting_option("topic_prefix")
@option(
    "--log-format",
    metavar="text|json",
    help="As for serve: whether it is one is said in the report.",
)
@config_option()
@json_option
def doctor(as_json: bool, **options: Any) -> None:
    """Look at everything that the station needs, and say what to do.

    Takes the options and the environment of serve. It changes nothing, on this machine and in the TPM. It works whether
    the daemon runs or not, and takes some seconds at the most. Run as root it sees most.

    \b
    Exit status: 0 no failure (there may be warnings), 1 at least one failure, 2 wrong usage.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter must not end it
    logging.getLogger("stationkey").addHandler(logging.NullHandler())  # what is seen is in the report, and only there
    report, left_behind = examine(Options(**options))
    status = _print(report, as_json=as_json)
    if left_behind:
        # A thread is stuck in a system call. To wait for it would be to hang.
        os._exit(status)
    sys.exit(status)


def _print(report: Report, *, as_json: bool) -> int:
    """Print a report; gives the exit status."""
    if sys.stdout is None:  # closed by whoever started this, and who wants the exit status alone
        return report.exit_code
    try:
        if as_json:
            click.echo(json.dumps(report.to_json(), indent=2))
        else:
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PLAIN_WIDTH
            for line in shown(report, width=min(max(columns, _WIDTHS[0]), _WIDTHS[1])):
                click.echo(line)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # whoever reads has read enough; click ends quietly
        click.echo(f"stationkey: the report cannot be written: {error.strerror}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it would be tried again at the end
        return 1
    return report.exit_code


def shown(report: Report, *, width: int) -> Iterator[str]:
    """The report for people: by area, each finding with its advice below it, and a line with the sum of it all."""
    for area, group in groupby(report.findings, key=lambda finding: AREAS[finding.id]):
        yield click.style(area, bold=True)
        # Several things that were not checked for one reason are said at once.
        for (level, _), same in groupby(
            group,
            key=lambda finding: (finding.level, finding.message if finding.level is Level.NOT_CHECKED else finding),
        ):
            findings = list(same)
            yield from _lines(level, ", ".join(dict.fromkeys(one.id for one in findings)), findings[0], width)
        yield ""
    yield report.summary


def _lines(level: Level, names: str, finding: Finding, width: int) -> Iterator[str]:
    margin = " " * (_INDENT + _COLUMN)
    text = textwrap.wrap(f"{names}: {finding.message}", width - len(margin), break_on_hyphens=False)
    word = click.style(f"{_WORDS[level]:<{_COLUMN}}", fg=_COLOURS[level])
    yield f"{' ' * _INDENT}{word}{text[0]}"
    yield from (margin + line for line in text[1:])
    if finding.advice:
        advice = textwrap.wrap(finding.advice, width - len(margin) - 2, break_on_hyphens=False)
        yield from (f"{margin}{'> ' if number == 0 else '  '}{line}" for number, line in enumerate(advice))
