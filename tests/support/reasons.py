"""The reason that a command failed for: what it prints is words, which may be improved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import click
from click.testing import CliRunner

from stationkey.cli import main
from stationkey.errors import StationKeyError
from stationkey.system.interrupts import EXIT_INTERRUPTED

ENDS: Final = {signal.SIGTERM: 0, signal.SIGINT: EXIT_INTERRUPTED}
"""Exit status of a command that serves until a signal comes, by the signal."""
_invoke = click.Group.invoke


@contextmanager
def noted_reasons() -> Iterator[list[str]]:
    """Note the reason of each error that a command ends with meanwhile, in this process."""
    noted: list[str] = []

    def invoke(group: click.Group, context: click.Context) -> Any:
        try:
            return _invoke(group, context)
        except StationKeyError as error:
            noted.append(error.reason)
            raise

    with mock.patch.object(click.Group, "invoke", invoke):
        yield noted


@dataclass(frozen=True)
class Ended:
    """How a command ended; the reason is empty where it was no error."""

    exit_code: int
    output: str
    stdout: str
    stderr: str
    reason: str


def command(*arguments: str, **environment: str) -> Ended:
    """Run a ``stationkey`` command in this process."""
    with noted_reasons() as noted:
        result = CliRunner(env=environment).invoke(main, arguments)
    return Ended(result.exit_code, result.output, result.stdout, result.stderr, noted[-1] if noted else "")
