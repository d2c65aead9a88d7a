"""Draw the plot: a panel for each kind of key, a logarithmic scale of milliseconds. SVG, written directly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape

from bench.report import Results, number
from bench.rows import FLOOR, GENPKEY_TPM, KINDS, LOOP, LOOP_AHEAD, OURS, POOLED, REQ_SOFTWARE, REQ_TPM, TOOLS
from bench.summary import Summary

ORDER: Final = (POOLED, LOOP_AHEAD, OURS, LOOP, FLOOR, REQ_SOFTWARE, REQ_TPM, GENPKEY_TPM, TOOLS)
"""From top to bottom."""
COLOURS: Final = {POOLED: "#0b7a3b", OURS: "#0b5cad", LOOP: "#444444", LOOP_AHEAD: "#444444", FLOOR: "#444444"}
OTHER_COLOUR: Final = "#b3541e"
GREY: Final = "#666666"
LINE: Final = "#dddddd"

LABELS_WIDTH: Final = 300
PANEL_WIDTH: Final = 236
PANEL_GAP: Final = 20
ROW_HEIGHT: Final = 30
TOP: Final = 96
BOTTOM: Final = 62
WIDTH: Final = LABELS_WIDTH + len(KINDS) * (PANEL_WIDTH + PANEL_GAP)
HEIGHT: Final = TOP + len(ORDER) * ROW_HEIGHT + BOTTOM
LOWEST: Final = 0.5
HIGHEST: Final = 5000.0
TICKS: Final = (1, 10, 100, 1000)
ROOM: Final = 44
"""Width of a value's text. It stands right of its dot, or left where the panel ends."""


def draw(results: Results) -> str:
    """Return the plot of a run, as SVG."""
    machine = results.machine
    subtitle = (
        "Milliseconds on a logarithmic scale: median, and a line from p10 to p90; dotted: the TPM alone. Left is "
        f"better. swtpm {machine.get('swtpm', '')}, {machine.get('cores', '?')} cores."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"',
        ' font-family="Helvetica, Arial, sans-serif" font-size="13" role="img" aria-labelledby="title">',
        '<title id="title">Time for a key and its CSR</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(16, 30, "Time for a key and its CSR", size=18, weight="bold"),
        _text(16, 52, subtitle, size=12, colour=GREY),
    ]
    for row, side in enumerate(ORDER):
        weight = "bold" if side in {POOLED, OURS} else "normal"
        parts.append(_text(LABELS_WIDTH - 14, _y(row) + 4, side, anchor="end", colour=_colour(side), weight=weight))
    for column, kind in enumerate(KINDS):
        parts.extend(_panel(LABELS_WIDTH + column * (PANEL_WIDTH + PANEL_GAP), kind, results.series.get(kind, {})))
    parts.extend(
        (
            _text(
                16,
                HEIGHT - 14,
                "stationkey: from request to response over MQTT, written to disk and verified. "
                "H: the same, in one loop. TPM alone: Create, Load, Sign. The others: whole commands.",
                size=12,
                colour=GREY,
            ),
            "</svg>",
        )
    )
    return "\n".join(parts) + "\n"


def _panel(left: int, kind: str, sides: dict[str, Summary]) -> Iterator[str]:
    bottom = TOP + len(ORDER) * ROW_HEIGHT
    yield _text(left + PANEL_WIDTH / 2, TOP - 14, kind, size=14, weight="bold", anchor="middle")
    for tick in TICKS:
        x = left + _x(tick)
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="{LINE}"/>'
        label = f"{tick:,} ms" if tick == TICKS[-1] else f"{tick:,}"
        yield _text(x, bottom + 17, label, size=11, colour=GREY, anchor="middle")
    yield f'<line x1="{left}" y1="{bottom}" x2="{left + PANEL_WIDTH}" y2="{bottom}" stroke="{GREY}"/>'
    if (floor := sides.get(FLOOR)) is not None:
        x = left + _x(floor.median)
        ends = f'x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"'
        yield f'<line {ends} stroke="{COLOURS[FLOOR]}" stroke-dasharray="2 3"/>'
    for row, side in enumerate(ORDER):
        summary = sides.get(side)
        if summary is None:
            yield _text(left + PANEL_WIDTH / 2, _y(row) + 4, "not run", size=11, colour=GREY, anchor="middle")
        else:
            yield from _mark(left, _y(row), summary, _colour(side))


def _mark(left: int, y: float, summary: Summary, colour: str) -> Iterator[str]:
    """Yield a dot at the median, a line from p10 to p90, and the value beside it."""
    low, middle, high = (left + _x(value) for value in (summary.p10, summary.median, summary.p90))
    yield f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="{colour}" stroke-width="3" opacity="0.45"/>'
    yield f'<circle cx="{middle:.1f}" cy="{y}" r="5" fill="{colour}"/>'
    fits = max(high, middle + 5) + ROOM < left + PANEL_WIDTH
    at, anchor = (max(high, middle + 5) + 6, "start") if fits else (min(low, middle - 5) - 6, "end")
    value = number(summary.median)
    # A white rim keeps the figures readable where a line of the scale runs through them.
    yield _text(at, y + 4, value, size=12, colour=colour, anchor=anchor, rim=True)


def _colour(side: str) -> str:
    return COLOURS.get(side, OTHER_COLOUR)


def _x(value: float) -> float:
    """Return the x of a value within a panel."""
    bounded = min(max(value, LOWEST), HIGHEST)
    return PANEL_WIDTH * math.log(bounded / LOWEST) / math.log(HIGHEST / LOWEST)


def _y(row: int) -> float:
    return TOP + (row + 0.5) * ROW_HEIGHT


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 13,
    colour: str = "#111111",
    weight: str = "normal",
    anchor: str = "start",
    rim: bool = False,
) -> str:
    rimmed = ' stroke="#ffffff" stroke-width="3" paint-order="stroke"' if rim else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
        f' text-anchor="{anchor}"{rimmed}>{escape(words)}</text>'
    )
