"""TLS towards the broker: trust anchors, our certificate, and the socket. Loaded only where TLS is used.

The broker's certificate is always verified, its name included; no setting turns that off. The client's key may be in a
TPM; see `stationkey.mqtt.tpm_provider`.
"""

from __future__ import annotations

import gc
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from msgspec import Struct

from stationkey.config.settings import MqttTerms
from stationkey.errors import BrokerError, ConfigurationError
from stationkey.mqtt.tpm_provider import TPM_PROVIDER
from stationkey.mqtt.transport import PIECE, Transport
from stationkey.mqtt.url import Broker
from stationkey.system.files import read_regular
from stationkey.system.pem import blocks

MAX_PEM: Final = 1024 * 1024
"""Largest file of certificates or a key, in bytes."""

_HINTS: Final = {
    **dict.fromkeys((9, 10), "is this machine's clock right?"),
    **dict.fromkeys((62, 64), "if it has another name than the URL's host, say it by server_name"),
    **dict.fromkeys((18, 19, 20, 21), "is the certificate of its authority in ca_file?"),
}
"""By OpenSSL's verify code [x509_vfy.h]: not yet valid, expired; another name, another address; an unknown issuer."""
_NO_CERTIFICATE: Final = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
"""Alerts that a broker sends to a client without a certificate, or whose key does not work."""


class BrokerContext(ssl.SSLContext):
    """The TLS context of every connection to the broker: TLS 1.2 or later, the broker's certificate verified.

    Attributes:
        server_name: the name in the broker's certificate if it differs from the host, or None.
    """

    server_name: str | None = None

    def __new__(cls) -> Self:
        """Create the bare context; `introduction` adds the files."""
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # With it, TLS 1.2 could make a write wait for a read. No broker needs it [RFC 9325 3.5].
        context.options |= ssl.OP_NO_RENEGOTIATION
        return context

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """As in `ssl`, with the name in the broker's certificate."""
        if self.server_name is not None:
            options["server_hostname"] = self.server_name
        return super().wrap_socket(sock, *arguments, **options)


class _Files(Struct, frozen=True):
    """The files of a context."""

    terms: MqttTerms
    ca: bytes | None
    certificate: bytes | None
    key: bytes | None

    @property
    def key_is_in_tpm(self) -> bool:
        return self.key is not None and b"-----BEGIN TSS2 PRIVATE KEY-----" in self.key


def client_context(terms: MqttTerms) -> ssl.SSLContext:
    """Return the TLS context for a connection to the broker."""
    files = _read(terms)
    return _TPM.context(files) if files.key_is_in_tpm else _context(files)


def _read(terms: MqttTerms) -> _Files:
    certificate = key = None
    if terms.certificate_file is not None:
        path = terms.certificate_file.path
        certificate = _read_pem(path, "certificate file", reason="client_certificate_unusable")
        key = (terms.key_file or terms.certificate_file).read(limit=MAX_PEM)
    ca = None if terms.ca_file is None else _read_pem(terms.ca_file, "CA file", reason="ca_file_unusable")
    return _Files(terms, ca, certificate, key)


def _read_pem(path: Path, name: str, *, reason: str) -> bytes:
    try:
        content = read_regular(path, limit=MAX_PEM, follow=True)
    except OSError as error:
        raise ConfigurationError(f"the {name} {path} cannot be read: {error.strerror}", reason=reason) from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=_certificates(content))
    except (OSError, ValueError):
        raise ConfigurationError(f"the {name} {path} has no certificate (PEM)", reason=reason) from None
    return content


def _certificates(content: bytes) -> str:
    """Return the certificates of a PEM file, without keys and comments between them."""
    return "\n".join(block.decode("ascii", "replace") for block in blocks(content, "CERTIFICATE"))


def _context(files: _Files) -> ssl.SSLContext:
    """Return a context of these files."""
    context = BrokerContext()
    terms = files.terms
    context.server_name = terms.server_name
    if terms.server_name is not None:
        try:
            context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=terms.server_name)
        except ValueError:
            raise ConfigurationError(
                f"{terms.server_name!r} is not a valid server name", reason="config_invalid"
            ) from None
    if terms.ca_file is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(cadata=_certificates(files.ca or b""))
    if files.key is not None:
        _load_key(context, files)
    return context


def _load_key(context: ssl.SSLContext, files: _Files) -> None:
    certificate = files.terms.certificate_file
    assert certificate is not None
    assert files.key is not None
    path = (files.terms.key_file or certificate).path
    if b"PRIVATE KEY-----" not in files.key:
        raise ConfigurationError(f"{path} has no private key (PEM)", reason="client_key_unusable")

    def refuse() -> NoReturn:  # else OpenSSL would prompt on the terminal
        raise ConfigurationError(
            f"the private key in {path} needs a password or an authorisation value",
            reason="client_key_unusable",
            hint="store it without one, in a file for this user only, or better in the TPM",
        )

    try:
        context.load_cert_chain(certificate.path, path, refuse)
    except OSError as error:  # ssl's errors are among them
        what = getattr(error, "reason", None)
        if what == "KEY_VALUES_MISMATCH":
            raise ConfigurationError(
                f"the private key in {path} is not that of the first certificate in {certificate.path}",
                reason="client_key_mismatch",
            ) from None
        if files.key_is_in_tpm:
            raise BrokerError(
                f"the TPM does not load the private key in {path}",
                reason="tls_tpm_failed",
                hint="was it made by this TPM, and is there a resource manager, such as /dev/tpmrm0?",
            ) from None
        raise ConfigurationError(
            f"OpenSSL takes neither key nor certificate of {path}: {what or 'they are damaged'}",
            reason="client_key_unusable",
        ) from None


class _Tpm:
    """The context whose key is loaded in the TPM.

    One for all connections, because each loaded key takes one of the three slots that the kernel's resource manager
    gives a process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[_Files, ssl.SSLContext] | None = None
        self._stale = False

    def context(self, files: _Files) -> ssl.SSLContext:
        """Return a context of these files; the existing one if nothing has changed."""
        with self._lock:
            if self._made is not None and self._made[0] == files and not self._stale:
                return self._made[1]
            self._made = None
            gc.collect()  # the previous context's key leaves its slot only now
            self._stale = False
            context = self._load(files)
            self._made = files, context
            return context

    def _load(self, files: _Files) -> ssl.SSLContext:
        TPM_PROVIDER.open(files.terms.tcti)
        try:
            context = _context(files)
        except BrokerError:
            if not TPM_PROVIDER.close():
                raise
            TPM_PROVIDER.open(files.terms.tcti)
            context = _context(files)
        TPM_PROVIDER.works()
        return context

    def failed(self) -> bool:
        """Mark the context stale after a failure of TLS or TPM; the next connection reloads the key.

        Returns:
            Whether a key in a TPM was used at all.
        """
        self._stale = True  # not reloaded here: the caller is the event loop, and the TPM may hang
        return self._made is not None


_TPM: Final = _Tpm()


class TlsTransport(Transport):
    """A connected socket after its handshake."""

    def __init__(
        self,
        sock: ssl.SSLSocket,
        *,
        received: Callable[[bytes], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        super().__init__(sock, received=received, ended=ended)
        self.tls = sock

    def _take_from(self) -> bytes | None:
        try:
            return self.tls.recv(PIECE)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            self._read_when_writable()
        except ssl.SSLError as error:
            self.failure = error.reason
            raise
        return None

    def _put_into(self, data: bytes | memoryview) -> int:
        try:
            return self.tls.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def _has_more(self) -> bool:
        """See `Transport`; more may be decrypted already, which the socket does not signal."""
        return self.tls.fileno() != -1 and self.tls.pending() > 0


def shaken(context: ssl.SSLContext, sock: socket.socket, broker: Broker) -> ssl.SSLSocket:
    """Do the handshake, which blocks, and return the socket that speaks TLS.

    Raises:
        BrokerError: it failed.
        OSError: the connection ended.
    """
    try:
        return context.wrap_socket(sock, server_hostname=broker.host)
    except ssl.SSLError as error:
        raise no_handshake(str(broker), error) from None


def no_handshake(broker: str, error: ssl.SSLError) -> BrokerError:
    """Return the error for a failed handshake.

    Args:
        broker: its URL.
        error: of `ssl`.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return BrokerError(
            f"the certificate of {broker} is not trusted: {error.verify_message.rstrip('.')}",
            reason="broker_untrusted",
            hint=_HINTS.get(error.verify_code, ""),
        )
    if "_ALERT_" in (error.reason or ""):
        return refused(broker, error.reason)
    # Which of the two is raised, and whether it has a reason, depends on the Python version.
    hung_up = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    why = "connection closed by peer" if hung_up else _words(error.reason)
    return BrokerError(
        f"no TLS with {broker}: {why}",
        reason="broker_tls_failed",
        hint="or the TPM did not sign with the client's key" if _TPM.failed() else "",
    )


def refused(broker: str, failure: str) -> BrokerError:
    """Return the error for a broker that ends TLS, mostly because it refuses our certificate [RFC 8446 6.2].

    Args:
        broker: its URL.
        failure: OpenSSL's name for it.
    """
    if failure == _NO_CERTIFICATE and _TPM.failed():
        return BrokerError(f"no TLS with {broker}: the TPM did not sign with the client's key", reason="tls_tpm_failed")
    return BrokerError(
        f"{broker} refuses TLS with us: {_words(failure)}",
        reason="broker_refuses",
        hint="does it require a client certificate, and trust this one?",
    )


def closed_without_a_word() -> None:
    """Handle a TLS connection that the broker reset: a reset discards an alert that was not read yet.

    The TPM may have failed to sign, so its key is reloaded for the next connection.
    """
    _TPM.failed()


def _words(failure: str | None) -> str:
    return "it failed" if failure is None else failure.lower().replace("_", " ")
