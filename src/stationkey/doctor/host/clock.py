"""The clock: certificates begin and end by it."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import look_at
from stationkey.doctor.report import Verdict, failure, not_checked, ok, warning
from stationkey.system.state_dir import DATABASE_NAME

WRITTEN: Final = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
"""No station has run this program before."""
_FAR: Final = datetime(2100, 1, 1, tzinfo=UTC).timestamp()
_DIFFERENCE: Final = 300.0
"""Seconds that nobody minds."""
_RTC: Final = Path("/sys/class/rtc/rtc0/since_epoch")
_TIMEX: Final = 512
"""Bytes that are enough for a ``struct timex`` of any machine [adjtimex(2)]."""
_UNSYNCHRONISED: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """What the clocks say.

    Attributes:
        now: Unix time.
        latest: the latest time that is on record in the state directory, or None.
        synchronised: whether the kernel knows of something that keeps the clock right; None where it does not say.
        battery: what the clock that runs without power says, Unix time; None where there is none.
    """

    now: float
    latest: float | None
    synchronised: bool | None
    battery: float | None


def look_at_clocks(context: Context) -> tuple[Clocks]:
    """Read every clock."""
    return (Clocks(now=time.time(), latest=_latest(context), synchronised=_synchronised(), battery=_battery()),)


def _latest(context: Context) -> float | None:
    facts = look_at(context.settings.state_dir / DATABASE_NAME)
    times = [facts.modified] if facts.there else []
    if (contents := context.ledger_soon()) is not None:
        times += [key.created_at / 1000 for key in contents.keys]
    return max(times, default=None)


def _synchronised() -> bool | None:
    """The kernel's word: to ask with no mode set changes nothing."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _UNSYNCHRONISED


def _battery() -> float | None:
    try:
        return float(_RTC.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _date(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{moment:.0f} s after 1970"


def judge_time(clocks: Clocks) -> Verdict:
    """Judge whether the time can be right."""
    now = clocks.now
    advice = "set it (NTP, or date -s): by a wrong clock a certificate that holds seems to begin later, or to be over"
    if not WRITTEN <= now < _FAR:
        return failure(f"the clock says {_date(now)}, which cannot be", advice)
    if clocks.latest is not None and clocks.latest - now > _DIFFERENCE:
        return warning(
            f"the clock says {_date(now)}, and the ledger has something of {_date(clocks.latest)}: one of the two was "
            "wrong",
            "see whether the clock is right now. No key ends by it, but certificates are judged by it",
        )
    return ok(f"the clock says {_date(now)}")


def judge_synchronised(clocks: Clocks) -> Verdict:
    """Judge whether something keeps it right."""
    if clocks.synchronised is None:
        return not_checked("the kernel does not say")
    if not clocks.synchronised:
        return warning(
            "nothing keeps the clock right, as far as the kernel knows",
            "timedatectl set-ntp true, or chrony; see that the station reaches a time server. Where the host of a "
            "virtual machine, GNSS or the CSMS sets the clock, this may be so",
        )
    return ok("the clock is kept right (NTP, or another source that the kernel knows)")


def judge_battery(clocks: Clocks) -> Verdict:
    """Judge the clock that runs while there is no power."""
    if clocks.battery is None:
        return warning(
            "there is no clock that runs without power: after each power cut the time is wrong until somebody sets it",
            "have NTP at start, or fake-hwclock, so that at least it does not fall back by years",
        )
    if abs(clocks.battery - clocks.now) > _DIFFERENCE:
        return warning(
            f"the clock that runs without power says {_date(clocks.battery)}",
            "hwclock --systohc --utc; if it falls back again, its battery is empty",
        )
    return ok("the clock that runs without power agrees")
