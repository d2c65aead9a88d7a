"""The report as a page: one file, without script and without anything from elsewhere, to be kept or sent."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from stationkey._version import __version__
from stationkey.doctor.examination import AREAS
from stationkey.doctor.report import Report
from stationkey.system.text import printable


def page(report: Report) -> str:
    """Return the report as HTML: what to do first, then every check. Whatever is in a finding is text there."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - loaded only by who asks for a page

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    rest = groupby((one for one in report.findings if not one.matters), key=lambda finding: AREAS[finding.id])
    return template.render(
        report=report,
        areas=[(area, list(findings)) for area, findings in rest],
        made=datetime.now(UTC),
        host=printable(socket.gethostname()),
        version=__version__,
    )
