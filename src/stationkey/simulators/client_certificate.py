"""The station's client certificates for its CSMS: the current one, and a renewed one until it has connected.

A renewed certificate is tried first. If the CSMS refuses it, the station tries the previous one, then both in turn
[A02.FR.28]. The first that connects is kept, and only then the other is discarded [A02.FR.10].
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final

from stationkey.errors import ConfigurationError
from stationkey.x509.certificate import Chain, read_chain

PREVIOUS: Final = ".previous.pem"
"""Suffix of the file with the previous key and its chain."""


class Outcome(Enum):
    """The result of a connection for the renewed certificate."""

    NOTHING = auto()
    """There is no renewed certificate."""
    CONFIRMED = auto()
    """It has connected: the previous one can be discarded [A02.FR.10]."""
    DISCARDED = auto()
    """The previous one has connected: the renewed one is discarded [A02.FR.29]."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    chain: Chain
    tls: ssl.SSLContext


class ClientCertificate:
    """Chooses the certificate for each connection.

    Args:
        file: key and chain (PEM), such as ``active/charging_station_certificate.pem``; read before each connection.
        context: makes a context that trusts the CSMS.
        attempts: connections with a renewed certificate before the previous one is tried.

    Raises:
        ConfigurationError: the file cannot be used.
    """

    def __init__(self, file: Path, context: Callable[[], ssl.SSLContext], *, attempts: int) -> None:
        self._file = file
        self._context = context
        self._attempts = attempts
        self._refused = 0
        self._renewed: _Candidate | None = None
        self._discarded: Chain | None = None
        self._used: _Candidate | None = None
        before = file.with_name(file.stem + PREVIOUS)
        self._in_use = self._load(before if before.exists() else file)

    @property
    def previous(self) -> Path | None:
        """The file with the previous key, or None."""
        path = self._file.with_name(self._file.stem + PREVIOUS)
        return path if path.exists() else None

    def refresh(self) -> bool:
        """Read the file, and return whether a renewed certificate has not connected yet."""
        try:
            found = self._load(self._file)
        except ConfigurationError:  # its key is not in place
            return self._renewed is not None
        if found.chain.leaf == self._in_use.chain.leaf:
            self._renewed = None
        elif self._discarded is None or found.chain.leaf != self._discarded.leaf:
            if self._renewed is None or found.chain.leaf != self._renewed.chain.leaf:
                self._refused = 0
            self._renewed = found
        return self._renewed is not None

    def next(self) -> ssl.SSLContext:
        """Return the context for the next connection."""
        self.refresh()
        turn = self._refused - self._attempts
        renewed = self._renewed is not None and (turn < 0 or turn % 2 == 1)
        self._used = self._renewed if renewed else self._in_use
        assert self._used is not None  # one of the two
        return self._used.tls

    def refused(self) -> None:
        """Note that the CSMS refused the connection."""
        self._refused += 1

    def connected(self) -> Outcome:
        """Note that the CSMS accepted the connection; discard the other certificate."""
        renewed, self._refused = self._renewed, 0
        if renewed is None:
            return Outcome.NOTHING
        self._renewed = None
        if self._used is renewed:
            self._in_use = renewed
            return Outcome.CONFIRMED
        self._discarded = renewed.chain
        return Outcome.DISCARDED

    def _load(self, file: Path) -> _Candidate:
        try:
            chain = read_chain(file.read_bytes())
            tls = self._context()
            tls.load_cert_chain(file)
        except OSError as error:
            words = "not PEM, or the key does not fit the certificate"
            why = words if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigurationError(f"{file} cannot be used for TLS: {why}", reason="tls_invalid") from None
        if chain is None:
            raise ConfigurationError(f"{file} has no readable certificate", reason="tls_invalid")
        return _Candidate(chain, tls)
