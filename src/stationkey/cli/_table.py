"""Tables for a terminal: as many columns as fit, the most important first, a part of the rows at a time."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple, TypeVar

from rich.cells import cell_len, set_cell_size

from stationkey.system.text import printable

T = TypeVar("T")

PLAIN_WIDTH: Final = 80
"""Columns if standard output is not a terminal and ``COLUMNS`` is not set."""
SHORT_ID: Final = 10
"""Characters of an id in a list: unique among the keys of a station. Commands accept them as the id."""
_PART: Final = 1000
"""Rows that are aligned together, so that a list needs bounded memory."""
_GAP: Final = "  "
_LEAST: Final = 20
"""Columns for a value, however narrow the terminal is."""
_NOTE_LINES: Final = 3
"""Most lines of a note."""


class Column(NamedTuple):
    """A column.

    Attributes:
        heading: its heading.
        rank: columns of the highest rank are left out first if not all fit.
        most: most characters of a cell; a longer one ends in an ellipsis if there is no room.
    """

    heading: str
    rank: int = 0
    most: int = 0


def width() -> int:
    """Return the columns of the terminal."""
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns


def listed(columns: tuple[Column, ...], rows: Iterable[tuple[str, ...]], *, empty: str) -> Iterator[str]:
    """Yield the lines of a table, a part of the rows at a time; see `lined_up`."""
    yield from lined_up(columns, in_parts(rows, _PART), empty=empty)


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items as lists of up to `size`."""
    rest = iter(items)
    return iter(lambda: list(islice(rest, size)), [])


def lined_up(columns: tuple[Column, ...], parts: Iterable[Iterable[tuple[str, ...]]], *, empty: str) -> Iterator[str]:
    """Yield the lines of a table. The first part decides which columns are shown; a later one may be wider.

    Args:
        columns: the columns.
        parts: the rows as they come. A value after the last cell of a row is a note, shown below it.
        empty: the line for a table without rows.
    """
    room = width()
    widths = [cell_len(column.heading) for column in columns]
    shown: list[int] = []
    for rows in parts:
        part = [tuple(map(printable, row)) for row in rows]
        widths = [max(known, _widest(cells)) for known, *cells in zip(widths, *part, strict=False)]
        if not shown:
            shown = _chosen(columns, widths, room)
            part.insert(0, tuple(column.heading for column in columns))
        limits = [min(widths[at], columns[at].most or widths[at]) for at in shown]
        if _total([widths[at] for at in shown]) <= room:
            limits = [widths[at] for at in shown]
        for row in part:
            yield _GAP.join(_fit(row[at], limit) for at, limit in zip(shown, limits, strict=True)).rstrip() + "\n"
            yield from (line for note in row[len(columns) :] for line in _noted(note, room))
    if not shown:
        yield empty + "\n"


def _noted(note: str, room: int) -> Iterator[str]:
    """Yield the lines of a note; a long one ends in an ellipsis."""
    room = max(room - len(_GAP), _LEAST)
    for line in textwrap.wrap(note, room, max_lines=_NOTE_LINES, placeholder=" …"):
        yield f"{_GAP}{line}\n"


def _chosen(columns: tuple[Column, ...], widths: list[int], room: int) -> list[int]:
    """Return the columns that fit, each at its minimum width."""
    shown = list(range(len(columns)))
    while len(shown) > 1:
        least = [min(widths[at], columns[at].most or widths[at]) for at in shown]
        if _total(least) <= room:
            break
        worst = max(columns[at].rank for at in shown)
        shown.remove(max(at for at in shown if columns[at].rank == worst))
    return shown


def _total(widths: list[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _widest(texts: Iterable[str]) -> int:
    return max(map(len if "".join(texts).isascii() else cell_len, texts))


def _fit(text: str, limit: int) -> str:
    """Cut or pad a text to a number of columns; a wide character takes two."""
    if text.isascii() and len(text) <= limit:
        return text.ljust(limit)
    return set_cell_size(text, limit) if cell_len(text) <= limit else set_cell_size(text, limit - 1) + "…"


def labelled(name: str, words: str, *, indent: int) -> Iterator[str]:
    """Yield the lines of a named value, wrapped to the width of the terminal."""
    room = max(width() - indent, _LEAST) if sys.stdout.isatty() else None
    first, *more = (textwrap.wrap(printable(words), room) or [""]) if room else [printable(words)]
    yield f"{name:<{indent}}{first}\n"
    yield from (f"{' ' * indent}{line}\n" for line in more)


def write(lines: Iterable[str]) -> None:
    """Write lines to standard output as they come; a closed pipe is reported here."""
    for line in lines:
        sys.stdout.write(line)
    sys.stdout.flush()
