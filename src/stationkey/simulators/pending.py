"""CSRs that wait for a certificate, on disk: a restart goes on with the same CSR [A02.FR.17]."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from stationkey.contract.profiles import CertificateType
from stationkey.errors import ConfigurationError

MAX_PENDING: Final = 8
"""CSRs of one certificate type that may wait for a certificate. The oldest go first; a CSMS may answer the first of
several [OCTT TC_A_23]."""


@dataclass(slots=True, kw_only=True)
class Pending:
    """A CSR that waits for its certificate."""

    certificate_type: CertificateType
    evse_id: str | None
    csr: str
    request_id: int | None
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def public(self) -> bytes:
        """SubjectPublicKeyInfo of the CSR, in DER."""
        return (
            x509.load_pem_x509_csr(self.csr.encode())
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )


class PendingFile:
    """The pending CSRs, on disk: exchanged atomically with every change.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.pending: list[Pending] = []
        self.last_request_id = 0
        try:
            saved = json.loads(path.read_text())
            self.last_request_id = int(saved["last_request_id"])
            for entry in saved["pending"]:
                self.pending.append(
                    Pending(
                        certificate_type=CertificateType(entry["certificate_type"]),
                        evse_id=entry["evse_id"],
                        csr=entry["csr"],
                        request_id=entry["request_id"],
                    )
                )
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path} cannot be read: {error}",
                reason="pending_unreadable",
                hint="remove it to begin anew; certificates for the CSRs in it are then refused",
            ) from None

    def add(self, pending: Pending) -> None:
        """Write a CSR down; the oldest of its type makes room."""
        same = [other for other in self.pending if other.certificate_type is pending.certificate_type]
        for old in same[: max(0, len(same) - MAX_PENDING + 1)]:
            self.pending.remove(old)
        self.pending.append(pending)
        self.save()

    def remove(self, pending: Pending) -> None:
        """Take one off that has its certificate, or will never have one."""
        if pending in self.pending:
            self.pending.remove(pending)
            self.save()

    def save(self) -> None:
        """Write the file anew."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        entries = [
            {
                "certificate_type": str(pending.certificate_type),
                "evse_id": pending.evse_id,
                "csr": pending.csr,
                "request_id": pending.request_id,
            }
            for pending in self.pending
        ]
        write_atomically(
            self._path, json.dumps({"last_request_id": self.last_request_id, "pending": entries}, indent=1).encode()
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Exchange a file: whoever reads it has the old content or the new."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_bytes(content)
    unfinished.replace(path)
