"""``stationkey config``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

import click

from stationkey.cli._options import chosen_file
from stationkey.config import file as configuration
from stationkey.config.file import read_parts, settle
from stationkey.errors import ConfigurationError
from stationkey.given import PREFIX, refused_texts
from stationkey.system.text import printable

_LINE: Final = re.compile(r": line (\d+): ")


@click.group()
def config() -> None:
    """Check the configuration file."""


@config.command("check")
@click.argument("file", required=False, envvar=f"{PREFIX}_CONFIG", type=click.Path(path_type=Path, readable=False))
def config_check(file: Path | None) -> None:
    """List every error of a configuration file.

    Each with its line, its option and the expected form. FILE is by default that of STATIONKEY_CONFIG, or
    /etc/stationkey/stationkey.toml. Checks the file only; stationkey doctor also checks the files that it names.

    \b
    Exit status: 0 valid, 1 invalid, 2 wrong usage.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    path = chosen_file(file) or configuration.SYSTEM_FILE
    found = _problems(path)
    for problem in found:
        click.echo(printable(problem))
    click.echo(f"{printable(str(path))}: {len(found) or 'no'} problem{'s' * (len(found) != 1)}")
    if found:
        sys.exit(1)


def _problems(path: Path) -> list[str]:
    """Return the errors of a file, in the order of its lines."""
    parts = read_parts(path)
    told = [*parts.complaints, *(str(error) for error in refused_texts(path, parts.given))]
    if not told and ("keystores",) in parts.given:
        from stationkey.keystore.stores import store_uris  # noqa: PLC0415 - most files name one key store

        try:
            store_uris(settle(parts.given, needs_keystore=False).stores)
        except ConfigurationError as error:
            told.append(f"{path}: {error}")
    return sorted(told, key=lambda words: int(line[1]) if (line := _LINE.search(words)) else 0)
