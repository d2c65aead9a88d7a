"""All checks, and their report."""

from __future__ import annotations

from typing import Final

from stationkey.doctor.broker.checks import CHECKS as BROKER
from stationkey.doctor.config.checks import CHECKS as CONFIGURATION
from stationkey.doctor.host.context import Options, survey
from stationkey.doctor.host.machine import CHECKS as MACHINE
from stationkey.doctor.pkcs11.checks import CHECKS as TOKEN
from stationkey.doctor.pkcs11.checks import PATIENCE_WITH_KEYS, checks_of
from stationkey.doctor.report import Report
from stationkey.doctor.runner import DEADLINE, AnyCheck, run
from stationkey.doctor.state.checks import CHECKS as STATE
from stationkey.doctor.tpm.device import CHECKS as KEY_STORE
from stationkey.doctor.tpm.state import CHECKS as TPM

CHECKS: Final[dict[str, tuple[AnyCheck, ...]]] = {
    "Configuration": CONFIGURATION,
    "Key store": (*KEY_STORE, *TPM),
    "Token": TOKEN,
    "State": STATE,
    "Broker": BROKER,
    "Machine": MACHINE,
}
"""The checks of each area; an area is a heading of the report."""
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
    checks = [check for rows in CHECKS.values() for check in (checks_of(context) if rows is TOKEN else rows)]
    deadline = DEADLINE + (PATIENCE_WITH_KEYS if options.try_keys else 0)
    findings, left_behind = run(checks, context, unread=context.configured.unread, deadline=deadline)
    return Report(tuple(findings)), left_behind
