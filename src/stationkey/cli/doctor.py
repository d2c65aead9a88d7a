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
from pathlib import Path
from typing import Any, Final

import click

from stationkey.cli._options import chosen_file, config_option, json_option, option, setting_option
from stationkey.doctor.examination import AREAS, examine
from stationkey.doctor.host.context import Options
from stationkey.doctor.report import Finding, Level, Report
from stationkey.errors import ConfigurationError
from stationkey.system.files import write_text
from stationkey.system.text import printable

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
    help="As for serve; the report says if it is invalid.",
)
@config_option()
@click.option("--try-keys", is_flag=True, help="Have each PKCS#11 token make a key, sign with it and destroy it.")
@click.option("--all", "everything", is_flag=True, help="Show every check, not problems only.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write every check to a page."
)
@json_option
def doctor(everything: bool, html: Path | None, as_json: bool, **options: Any) -> None:
    """Check the station, and say what to do.

    Takes the options and the environment of serve. Changes nothing, on this machine and in the TPM. Works with and
    without a running daemon, within seconds. Run it as root: other users may see less.

    \b
    Exit status: 0 no failure (maybe warnings), 1 a failure, 2 wrong usage.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show a character
    logging.getLogger("stationkey").addHandler(logging.NullHandler())  # the report has everything
    options["config_file"] = chosen_file(options["config_file"])
    report, left_behind = examine(Options(**options))
    written = 0 if html is None else _write(report, html)
    status = max(written, _print(report, as_json=as_json, everything=everything))
    if left_behind:
        # A thread may hang in a system call: do not wait for it.
        os._exit(status)
    sys.exit(status)


def _write(report: Report, file: Path) -> int:
    """Write the report as a page, and return the exit status."""
    from stationkey.doctor.page import page  # noqa: PLC0415 - loaded only for --html

    try:
        write_text(file, page(report), private=True)
    except ConfigurationError as error:
        click.echo(f"stationkey: {printable(error.message)}", err=True)
        return 1
    return 0


def _print(report: Report, *, as_json: bool, everything: bool) -> int:
    """Print a report, and return the exit status."""
    if sys.stdout is None:  # closed: the caller wants the exit status only
        return report.exit_code
    try:
        if as_json:
            click.echo(json.dumps(report.to_json(), indent=2))
        else:
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PLAIN_WIDTH
            for line in shown(report, width=min(max(columns, _WIDTHS[0]), _WIDTHS[1]), everything=everything):
                click.echo(line)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # the reader has closed the pipe; click ends quietly
        click.echo(f"stationkey: the report cannot be written: {error.strerror}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it would be tried again at the end
        return 1
    return report.exit_code


def shown(report: Report, *, width: int, everything: bool = False) -> Iterator[str]:
    """Yield the lines of the report for people: the summary, then findings by area, each with its advice below.

    Args:
        report: all findings.
        width: columns.
        everything: also checks without a problem, and those skipped for a failed check.
    """
    yield click.style(report.summary, bold=True)
    findings = [one for one in report.findings if everything or one.matters]
    for area, group in groupby(findings, key=lambda finding: AREAS[finding.id]):
        yield ""
        yield click.style(area, bold=True)
        # Checks skipped for the same reason are one line.
        for (level, _), same in groupby(
            group,
            key=lambda finding: (finding.level, finding.message if finding.level is Level.NOT_CHECKED else finding),
        ):
            alike = list(same)
            yield from _lines(level, ", ".join(dict.fromkeys(one.id for one in alike)), alike[0], width)
    if len(findings) < len(report.findings):
        yield ""
        yield f"{len(report.findings) - len(findings)} more with --all"


def _lines(level: Level, names: str, finding: Finding, width: int) -> Iterator[str]:
    margin = " " * (_INDENT + _COLUMN)
    text = textwrap.wrap(f"{names}: {finding.message}", width - len(margin), break_on_hyphens=False)
    word = click.style(f"{_WORDS[level]:<{_COLUMN}}", fg=_COLOURS[level])
    yield f"{' ' * _INDENT}{word}{text[0]}"
    yield from (margin + line for line in text[1:])
    if finding.advice:
        advice = textwrap.wrap(finding.advice, width - len(margin) - 2, break_on_hyphens=False)
        yield from (f"{margin}{'> ' if number == 0 else '  '}{line}" for number, line in enumerate(advice))
