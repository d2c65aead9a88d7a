"""A ledger in which somebody else has written: values that SQLite takes, and this program never writes."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from reasons import noted_reasons
from station import a_ledger

from stationkey.cli import main
from stationkey.system.state_dir import DATABASE_NAME

VALUES: dict[str, tuple[object, ...]] = {
    "INTEGER": (-1, 2**63 - 1, -(2**63), None),
    "TEXT": ("", "\0junk\ud7ff", "x" * 10_000, None),
    "BLOB": (b"", b"junk", b"\0" * 10_000, None),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A state directory with a key, and the key's name."""
    state_dir = tmp_path_factory.mktemp("right") / "state"
    return state_dir, a_ledger(state_dir)


def columns(database: Path) -> Iterator[tuple[str, str, str]]:
    """Table, column and type of whatever can be written to."""
    with closing(sqlite3.connect(database)) as ledger:
        for (table,) in ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in ledger.execute(f"PRAGMA table_info({table})").fetchall():
                if kind in VALUES:
                    yield table, column, kind


@pytest.mark.long
def test_whatever_stands_in_the_ledger_the_commands_end_in_words(right: tuple[Path, str], tmp_path: Path) -> None:
    original, key_id = right
    state_dir = tmp_path / "state"
    tried = said = 0

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["keys", *arguments, "--state-dir", str(state_dir)])

    for table, column, kind in list(columns(original / DATABASE_NAME)):
        for value in VALUES[kind]:
            shutil.rmtree(state_dir, ignore_errors=True)
            shutil.copytree(original, state_dir)
            try:
                with closing(sqlite3.connect(state_dir / DATABASE_NAME)) as ledger, ledger:
                    ledger.execute(f"UPDATE {table} SET {column} = ?", (value,))
            except sqlite3.Error:
                continue  # the schema does not take it
            tried += 1
            for command in (["list"], ["list", "--json"], ["show", key_id], ["history", key_id], ["retire", key_id]):
                with noted_reasons() as reasons:
                    ended = run(*command)
                wrong = f"{table}.{column} = {value!r:.40}: {command[0]}: {ended.exception!r:.200}"
                assert ended.exception is None or isinstance(ended.exception, SystemExit), wrong
                said += "ledger_damaged" in ended.stderr or "ledger_damaged" in reasons
    assert tried > 80
    assert said > 10  # of states and times
