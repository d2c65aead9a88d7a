"""Make tables of results, for the terminal and for ``docs/performance.md``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from bench.rows import FLOOR, KINDS, LEDGER, ROWS, SIDES, SIZES, How, Row, Series, keys
from bench.summary import Summary


class Results(Struct, frozen=True, kw_only=True):
    """The results of a run; ``bench/results.json``.

    Attributes:
        quick: whether it was a quick run, with few samples.
        machine: its properties, see `bench.machine`.
        series: by group and side.
        missing: why a side was not measured, by group and side.
        faults: what is wrong with a side whatever its times are, by group and side.
    """

    quick: bool
    machine: dict[str, str]
    series: dict[str, dict[str, Summary]]
    missing: dict[str, dict[str, str]]
    faults: dict[str, dict[str, str]]

    def median(self, series: Series) -> float | None:
        """Return the median of a series, or None if it was not measured."""
        found = self.series.get(series.group, {}).get(series.side)
        return None if found is None else found.median


class Verdict(Struct, frozen=True, kw_only=True):
    """A row of the table, as text."""

    name: str
    what: str
    ours: str
    other: str
    ratio: str
    target: str
    met: str


NOT_RUN: Final = "not run"
MET: Final = "met"
MISSED: Final = "**missed**"
SHOWN: Final = "measured"


def verdict(row: Row, results: Results) -> Verdict:
    """Return the result of a row."""
    ours = results.median(row.ours)
    other = None if row.other is None else results.median(row.other)
    complete = ours is not None and (row.other is None or other is not None)
    ratio = row.ratio(ours, other) if complete and ours is not None else None
    return Verdict(
        name=row.name,
        what=row.what,
        ours=_quantity(ours, row.unit),
        other=_other(row, other),
        ratio="" if ratio is None or row.other is None else _ratio(ratio, row.limit),
        target=_target(row),
        met=_met(row, results, ratio),
    )


def _met(row: Row, results: Results, ratio: float | None) -> str:
    if ratio is None:
        return NOT_RUN
    faults = [fault for series in row.needs if (fault := results.faults.get(series.group, {}).get(series.side))]
    if faults:
        return f"{MISSED}: {', '.join(faults)}"
    if row.how is How.SHOWN:
        return SHOWN
    return MET if row.met(ratio) else MISSED


def _other(row: Row, median: float | None) -> str:
    return "" if row.other is None else f"{row.other.side}: {_quantity(median, row.unit)}"


def _target(row: Row) -> str:
    match row.how:
        case How.OVER:
            return f"≤ {row.limit:g}"
        case How.RATE:
            return f"≥ {row.limit:g}"
        case How.FASTER:
            return f"≥ {row.limit:g} times as fast"
        case How.VALUE:
            return f"≤ {row.limit:g} {row.unit}"
        case How.SHOWN:
            return ""


def _ratio(ratio: float, limit: float) -> str:
    """Return a ratio with as many digits as its target needs."""
    if limit < 0.1:  # noqa: PLR2004 - 0.04 against 0.05 is a difference, and 15.21 against 15.22 is none
        return f"{ratio:.3f}"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"  # noqa: PLR2004 - same


def _quantity(value: float | None, unit: str) -> str:
    return NOT_RUN if value is None else f"{number(value)} {unit}"


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if abs(value) < 100:  # noqa: PLR2004 - from here on three digits are whole ones
        return f"{float(f'{value:.3g}'):g}"
    return f"{float(f'{value:.3g}'):,.0f}"


def reasons(results: Results, rows: tuple[Row, ...] = ROWS) -> list[str]:
    """Return the reasons why rows could not be run, each once."""
    found = [results.missing.get(series.group, {}).get(series.side) for row in rows for series in row.needs]
    return list(dict.fromkeys(reason for reason in found if reason))


# docs/performance.md


def targets_table(results: Results) -> str:
    """Return the table of targets and results, in Markdown."""
    verdicts = [verdict(row, results) for row in ROWS]
    cells = [(one.what, one.ours, one.other, one.ratio, one.target, one.met) for one in verdicts]
    return _table(("", "ours", "compared with", "ratio", "target", ""), cells, right={1, 3})


def times_table(results: Results) -> str:
    """Return the table of every side for every kind of key, in Markdown."""
    cells: list[tuple[str, ...]] = []
    for kind in KINDS:
        base = results.median(Series(kind, FLOOR))
        for side in SIDES:
            found = results.series.get(kind, {}).get(side)
            cells.append((kind, side, *_numbers(found), _over(found, base)))
    return _table(
        ("key", "", "median, ms", "p10 to p90", "p99", "samples", "over the TPM alone"), cells, right={2, 3, 4, 5, 6}
    )


def ledger_table(results: Results) -> str:
    """Return the table of a request with ledgers of several sizes, in Markdown."""
    sides = [keys(size) for size in SIZES]
    base = results.median(Series(LEDGER, sides[0]))
    found = {side: results.series.get(LEDGER, {}).get(side) for side in sides}
    cells = [(side, *_numbers(one), _over(one, base)) for side, one in found.items()]
    return _table(
        ("in the ledger", "median, ms", "p10 to p90", "p99", "samples", f"over {sides[0]}"),
        cells,
        right={1, 2, 3, 4, 5},
    )


def machine_table(results: Results) -> str:
    """Return the table of the machine, in Markdown."""
    return _table(("", ""), list(results.machine.items()))


def _numbers(summary: Summary | None) -> tuple[str, str, str, str]:
    if summary is None:
        return NOT_RUN, "", "", ""
    spread = f"{number(summary.p10)} to {number(summary.p90)}"
    return number(summary.median), spread, number(summary.p99), str(summary.count)


def _over(summary: Summary | None, base: float | None) -> str:
    return "" if summary is None or base is None else number(summary.median / base)


def _table(
    heads: tuple[str, ...], cells: Sequence[tuple[str, ...]], *, right: frozenset[int] | set[int] = frozenset()
) -> str:
    rules = ["---:" if column in right else "---" for column in range(len(heads))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rules, *cells))


TABLES: Final = {
    "targets": targets_table,
    "times": times_table,
    "ledger": ledger_table,
    "machine": machine_table,
}
"""The tables of the page, by the name of their markers."""


def fill_in(page: str, results: Results) -> str:
    """Return the page with its tables made from `results`.

    Raises:
        ValueError: a marker is missing, or there are several.
    """
    for name, table in TABLES.items():
        page = put(page, name, table(results))
    return page


def put(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the markers of `name`.

    Raises:
        ValueError: the markers are missing, or there are several.
    """
    opened, closed = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    page, count = re.subn(f"(?<={opened}).*?(?={closed})", lambda _: text, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places for {name}, and not one")
    return page
