"""The refusals of evidence."""

from __future__ import annotations

from typing import Final

from stationkey.errors import NotVerified

MAX_STRUCTURE: Final = 2048
"""Bytes of a structure of a TPM. The largest, the public area of an RSA key of 4096 bits, has some 600."""


def malformed(message: str) -> NotVerified:
    """Return the refusal of an invalid format."""
    return NotVerified(message, reason="evidence_malformed")


def unsupported(message: str) -> NotVerified:
    """The refusal of what may be right and is not judged here."""
    return NotVerified(message, reason="evidence_unsupported")
