"""``stationkey doctor``: looks at everything that a station needs, changes nothing, and says what to do.

A check is a row of `stationkey.doctor.checks`. It looks, then judges. Looking takes files, sockets, devices and
programs, with a deadline for each; functions called ``judge_…`` take what was seen and nothing else.
"""

from __future__ import annotations

from typing import Final

from stationkey.doctor.checks import CHECKS
from stationkey.doctor.host.context import Context, Options, survey
from stationkey.doctor.report import Finding, Level, Report
from stationkey.doctor.runner import AnyCheck, run

__all__ = ["AREAS", "CHECKS", "Finding", "Level", "Options", "Report", "examine"]
AREAS: Final = {check.id: area for area, checks in CHECKS.items() for check in checks}
"""The heading that each check stands under, in the order of the report."""


def examine(options: Options) -> tuple[Report, bool]:
    """Make every check.

    Args:
        options: as ``stationkey serve`` takes them.

    Returns:
        The report; and whether a thread was left behind in something that never ended, so that the process should end
        without waiting for it.
    """
    context = survey(options)
    checks: list[AnyCheck[Context]] = [check for rows in CHECKS.values() for check in rows]
    findings, left_behind = run(checks, context, unread=context.configured.unread)
    return Report(tuple(findings)), left_behind
