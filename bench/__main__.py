"""``python -m bench``: measures, prints the table, and keeps what the page shows."""

from __future__ import annotations

import compileall
import sys
import time
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import ROOT
from bench.machine import describe, file_system
from bench.measure import FULL, GROUPS, QUICK, measure, sides_of
from bench.plot import draw
from bench.report import MET, MISSED, NOT_RUN, Results, Verdict, fill_in, reasons, verdict
from bench.rows import EXTRA, ROWS, Row, Series
from bench.summary import summarize

BASE: Final = ROOT / ".bench"
RESULTS: Final = ROOT / "bench/results.json"
PLOT: Final = ROOT / "docs/performance.svg"
PAGE: Final = ROOT / "docs/performance.md"
QUICK_RESULTS: Final = BASE / "results.json"
QUICK_PLOT: Final = BASE / "performance.svg"
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
NAMES: Final = {row.name: row for row in ROWS}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--list", "listing", is_flag=True, help="Name the benchmarks, and measure nothing.")
@click.option(
    "--only", metavar="NAME", multiple=True, type=click.Choice(list(NAMES)), help="Only this one; repeatable."
)
@click.option("--quick", is_flag=True, help="Few samples: for a look, not for a claim.")
@click.option("--json", "file", metavar="FILE", type=click.Path(path_type=Path), help="Write the results here as well.")
def main(*, listing: bool, only: tuple[str, ...], quick: bool, file: Path | None) -> None:
    """Measure stationkey beside the TPM alone and beside other programs.

    The whole run writes bench/results.json, docs/performance.svg and the tables of docs/performance.md. With --quick,
    the first two go to .bench/; with --only, nothing is written but what --json asks for.

    The exit status is 1 if a benchmark could not be run. A target that is missed is shown, and is no failure.
    """
    if listing:
        for row in ROWS:
            click.echo(f"{row.name:20} {row.what.replace('`', '')}")
        return
    BASE.mkdir(exist_ok=True)
    if (kind := file_system(BASE)) in IN_MEMORY:
        raise click.ClickException(f"the repository is on {kind}: a commit costs nothing there; use a real disk")
    compileall.compile_dir(ROOT / "src", quiet=2)  # as in an installed package
    rows = tuple(NAMES[name] for name in dict.fromkeys(only)) or ROWS
    wanted = [series for row in rows for series in row.needs] + ([] if only else list(EXTRA))
    results = run(wanted, quick=quick)
    show(results, rows)
    if file is not None:
        write(file, results)
    if not only:
        keep(results)
    sys.exit(1 if any(verdict(row, results).met == NOT_RUN for row in rows) else 0)


def run(wanted: list[Series], *, quick: bool) -> Results:
    """Measure the series wanted, group by group."""
    results = Results(quick=quick, machine=describe(BASE), series={}, missing={}, faults={})
    console = Console(stderr=True)
    for group in GROUPS:
        sides = sides_of(group, wanted)
        if not sides:
            continue
        started = time.monotonic()
        console.print(f"[dim]{group}: {escape(', '.join(sides))}[/]", end="", soft_wrap=True)
        measured = measure(group, sides, BASE, QUICK if quick else FULL)
        console.print(f"[dim] ({time.monotonic() - started:.0f} s)[/]")
        if measured.slow:
            console.print(f"the machine was in a slow phase: {measured.slow} rounds left out")
        results.series[group] = {side: summarize(samples) for side in sides if (samples := measured.samples.get(side))}
        for kept, found in ((results.missing, measured.missing), (results.faults, measured.faults)):
            if found:
                kept[group] = {side: words for side, words in found.items() if side in sides}
    return results


def show(results: Results, rows: tuple[Row, ...]) -> None:
    """Print the table, and what could not be run."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    title = "A quick look: few samples" if results.quick else "Medians, measured side by side"
    table = Table(title=title, title_justify="left")
    for heading in ("", "ours", "compared with", "ratio", "target", ""):
        table.add_column(heading, justify="right" if heading in {"ours", "ratio"} else "left")
    for row in rows:
        one = verdict(row, results)
        cells = (one.what.replace("`", ""), one.ours, one.other, one.ratio, one.target)
        table.add_row(*map(escape, cells), _coloured(one))
    console.print(table)
    for reason in reasons(results, rows):
        console.print(f"not run: {reason}", markup=False)


def _coloured(one: Verdict) -> str:
    words = escape(one.met.replace("*", ""))
    if one.met == MET:
        return f"[green]{words}"
    return f"[red]{words}" if one.met.startswith(MISSED) else f"[yellow]{words}"


def keep(results: Results) -> None:
    """Write results and plot: of a whole run into the repository, of a quick one into ``.bench/``."""
    write(QUICK_RESULTS if results.quick else RESULTS, results)
    (QUICK_PLOT if results.quick else PLOT).write_text(draw(results))
    if not results.quick:
        PAGE.write_text(fill_in(PAGE.read_text(), results))


def write(path: Path, results: Results) -> None:
    """Write results as JSON that a person can read in a diff."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


if __name__ == "__main__":
    main()
