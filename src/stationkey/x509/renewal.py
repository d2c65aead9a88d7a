"""When a certificate is due for renewal [OCPP 2.0.1 A03.FR.02: one month before it expires]."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

from stationkey.x509.certificate import read_chain

CLOCK_MARGIN: Final = 86_400
"""Seconds by which the clock may be before the start of a certificate without counting as not set."""


class Due(StrEnum):
    """The validity of a certificate by the clock."""

    NO = "no"
    DUE = "due"
    EXPIRED = "expired"
    UNKNOWN = "unknown"
    """The clock is before the certificate's start: it is not set."""


class RenewalRule(Struct, frozen=True):
    """The rule by which a certificate becomes due.

    Attributes:
        before: seconds before the end of the certificate.
        life_divisor: `before` is at most the certificate's whole life divided by this.
    """

    before: int
    life_divisor: int

    def due_at(self, not_before: int | None, not_after: int) -> int:
        """Return when a certificate becomes due, in Unix seconds; `not_before` is None if not known."""
        if not_before is None:
            return not_after - self.before
        return not_after - min(self.before, max(0, not_after - not_before) // self.life_divisor)

    def judge(self, not_before: int | None, not_after: int, now: float) -> Due:
        """Return whether a certificate is due at a moment; all in Unix seconds."""
        if not_before is not None and now < not_before - CLOCK_MARGIN:
            return Due.UNKNOWN
        if now >= not_after:
            return Due.EXPIRED
        return Due.DUE if now >= self.due_at(not_before, not_after) else Due.NO

    def judge_chain(self, chain: str | None, not_after: int, now: float) -> Due:
        """Do the same for the leaf of a chain in PEM, or None if not known; `not_after` is its end."""
        read = None if chain is None else read_chain(chain.encode())
        return self.judge(None if read is None else read.not_before, not_after, now)
