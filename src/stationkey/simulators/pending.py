"""Pending CSRs, on disk, so that a restart continues with the same CSR [A02.FR.17]."""

from __future__ import annotations

import asyncio
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from stationkey.contract.profiles import CertificateType
from stationkey.errors import ConfigurationError

MAX_PENDING: Final = 8
"""Most pending CSRs of one certificate type; a CSMS may answer the first of several [OCTT TC_A_23]. The oldest are
dropped first."""


class Pending(msgspec.Struct, kw_only=True, eq=False, dict=True):
    """A CSR that waits for its certificate."""

    certificate_type: CertificateType
    evse_id: str | None
    csr: str
    request_id: int | None
    hash_root_certificate: dict[str, str] | None = None

    @cached_property
    def answered(self) -> asyncio.Event:
        """Set when its certificate is installed."""
        return asyncio.Event()

    @property
    def public(self) -> bytes:
        """SubjectPublicKeyInfo of the CSR, in DER."""
        return (
            x509.load_pem_x509_csr(self.csr.encode())
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )


class _Content(msgspec.Struct):
    last_request_id: int
    pending: list[Pending]


class PendingFile:
    """The file of pending CSRs, replaced atomically with every change.

    Args:
        path: the file; it may be missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        content = _Content(0, [])
        try:
            content = msgspec.json.decode(path.read_bytes(), type=_Content)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is damaged'}",
                reason="pending_unreadable",
                hint="remove it to start over; certificates for its CSRs are then refused",
            ) from None
        self.pending, self.last_request_id = content.pending, content.last_request_id

    def add(self, pending: Pending) -> None:
        """Save a CSR; beyond the limit, drop the oldest of its type."""
        same = [other for other in self.pending if other.certificate_type is pending.certificate_type]
        for old in same[: max(0, len(same) - MAX_PENDING + 1)]:
            self.pending.remove(old)
        self.pending.append(pending)
        self.save()

    def remove(self, pending: Pending) -> None:
        """Remove a CSR that is no longer pending."""
        if pending in self.pending:
            self.pending.remove(pending)
            self.save()

    def save(self) -> None:
        """Write the file."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = _Content(self.last_request_id, self.pending)
        write_atomically(self._path, msgspec.json.format(msgspec.json.encode(content), indent=1))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader gets the old or the new content."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_bytes(content)
    unfinished.replace(path)
