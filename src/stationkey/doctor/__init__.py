"""``stationkey doctor``: looks at everything that a station needs, changes nothing, and says what to do.

Each check looks, then judges. Looking takes files, sockets, devices and programs, with a deadline for each; judging is
done by functions called ``judge_…`` that take what was seen and nothing else. `run` lets no check wait for another, nor
take another with it.
"""

from __future__ import annotations

from typing import Final

from stationkey.doctor.broker import checks
from stationkey.doctor.config import certificates, file, secrets
from stationkey.doctor.host import clock, machine, software
from stationkey.doctor.host.context import Options, Subject, survey
from stationkey.doctor.report import Finding, Level, Report
from stationkey.doctor.runner import Check, run
from stationkey.doctor.state import directory, disk, keys
from stationkey.doctor.tpm import reachability

__all__ = ["CHECKS", "Finding", "Level", "Options", "Report", "examine"]
CHECKS: Final[tuple[Check[Subject], ...]] = (
    Check("Configuration", file.FILE_IDS, file.check_file),
    Check("Configuration", secrets.SECRET_IDS, secrets.check_secrets),
    Check("Configuration", certificates.IDS, certificates.check_tls_files),
    Check("Configuration", secrets.JOSEV_IDS, secrets.check_certificate_dir),
    Check("Key store", reachability.IDS, reachability.check_tpm, reachability.DEADLINE),
    Check("State", directory.DIRECTORY_IDS, directory.check_directory),
    Check("State", disk.DISK_IDS, disk.check_disk),
    Check("State", keys.LEDGER_IDS, keys.check_ledger, keys.DEADLINE),
    Check("Broker", checks.IDS, checks.check_broker, checks.DEADLINE),
    Check("Clock", clock.IDS, clock.check_clock),
    Check("Machine", machine.IDS, machine.check_machine),
    Check("Machine", software.SOFTWARE_IDS, software.check_software, 9.0),
)
"""Every check, in the order of the report."""
AREAS: Final = {name: check.area for check in CHECKS for name in check.ids}
"""The heading that each finding stands under."""


def examine(options: Options) -> tuple[Report, bool]:
    """Look at everything.

    Args:
        options: as ``stationkey serve`` takes them.

    Returns:
        The report; and whether a thread was left behind in something that never came back, so that the process should
        end without waiting for it.
    """
    findings, left_behind = run(CHECKS, survey(options))
    return Report(tuple(findings)), left_behind
