"""The refusals of evidence."""

from __future__ import annotations

from typing import Final

from stationkey.errors import NotVerified

MAX_STRUCTURE: Final = 2048
"""Largest structure of a TPM in bytes. The public area of an RSA-4096 key has some 600."""


def malformed(message: str) -> NotVerified:
    """Return the refusal of an invalid format."""
    return NotVerified(message, reason="evidence_malformed")


def unsupported(message: str) -> NotVerified:
    """Return the refusal of something that may be valid, but is not supported."""
    return NotVerified(message, reason="evidence_unsupported")
