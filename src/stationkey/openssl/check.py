"""A TLS handshake on loopback with an active key, which proves that a service can use it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from pkgutil import resolve_name
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stationkey.config.settings import Settings
from stationkey.contract.active_names import DIRECTORY_NAME, read_name
from stationkey.contract.profiles import PROFILES, SECP256R1, CertificateType, TlsUse
from stationkey.errors import ConfigurationError, KeyStoreError
from stationkey.keystore import KeyRef, KeyStore, KeyStoreUri, Locking, keystore_opener
from stationkey.keystore.schemes import SCHEMES
from stationkey.openssl.failures import EXIT_DEVICE, EXIT_FILE, EXIT_KEY, EXIT_MODULE, TlsCheckFailed
from stationkey.openssl.setups import Setup
from stationkey.system.files import MAX_FILE, read_regular
from stationkey.system.pem import blocks, from_pem
from stationkey.system.threads import Worker
from stationkey.x509.certificate import UNREADABLE, Chain, read_chain, untrusted
from stationkey.x509.lenient import name_text

TIMEOUT: Final = 30.0
"""Seconds to wait for a hung TPM or token."""
_GRACE: Final = 5.0
"""Seconds for the process with the key to unload it: on a bare TPM, a killed process leaves it in its slot."""

_SETUPS: Final = {"tpm2": "stationkey.openssl.tpm2:setup", "pkcs11": "stationkey.openssl.pkcs11:setup"}
"""By `stationkey.keystore.schemes.Scheme.openssl_provider`, the function that returns the setup for a location."""


def setup_of(keystore: str) -> Setup:
    """Return the OpenSSL setup for the keys of a key store.

    Args:
        keystore: its URI.

    Raises:
        ConfigurationError: invalid URI, or the keys need no setup.
    """
    where = KeyStoreUri.parse(keystore)
    make = _SETUPS.get(where.scheme.openssl_provider or "")
    if make is None or not where.location:
        raise ConfigurationError(
            f"the keys of the key store {where} need no OpenSSL configuration",
            reason="keystore_uri_invalid",
            hint="for example tpm2:device:/dev/tpmrm0",
        )
    made: Setup = resolve_name(make)(where.location)
    return made


_LABELS: Final = [scheme.pem_label for scheme in SCHEMES.values()]


@dataclass(frozen=True, slots=True)
class Access:
    """Access to a key.

    Attributes:
        setup: of OpenSSL.
        open_store: opens the key store that the key is in.
    """

    setup: Setup
    open_store: Callable[[], KeyStore]


def access_to(file: KeyFile, settings: Settings) -> Access:
    """Return the access to the key in a file: by its own key store, or else by that of ``keystore``.

    Raises:
        ConfigurationError: invalid configuration of the key store.
    """
    uris = [store.uri for store in settings.stores if _holds(KeyStoreUri.parse(store.uri), file)]
    uri = (uris or [settings.stores[0].uri])[0]
    return Access(
        setup_of(uri),
        keystore_opener(uri, terms=settings.keystore_terms(uri), state_dir=settings.state_dir, guest=True),
    )


def _holds(store: KeyStoreUri, file: KeyFile) -> bool:
    label = store.scheme.pem_label
    try:
        keys = [
            KeyRef(scheme=store.scheme.name, key_type=SECP256R1, public=b"", private=from_pem(block))
            for block in blocks(file.content, label)  # only the private part has the location
        ]
        return any(store.holds(key) for key in keys)
    except (ValueError, KeyStoreError):
        return False  # the check says so


@dataclass(frozen=True, slots=True)
class Handshake:
    """A successful handshake.

    Attributes:
        version: of TLS.
        suite: cipher suite, as OpenSSL calls it.
        role: of the side that holds the key.
    """

    version: str
    suite: str
    role: str

    def __str__(self) -> str:
        return f"{self.version} {self.role}, {self.suite}: ok"


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The content of a file with a key and its chain. It is read once, because it may be replaced at any time.

    Attributes:
        name: of the file, without its directory.
        content: PEM.
    """

    name: str
    content: bytes


def files_of(named: str, state: Path) -> list[KeyFile]:
    """Return the files under ``active/`` for a certificate type, or a given file.

    Args:
        named: a certificate type, or the path of a file.
        state: the state directory.

    Raises:
        TlsCheckFailed: no such file, or a file is unreadable.
    """
    if named in set(CertificateType):
        return active_files(state, CertificateType(named))
    return [key_file(Path(named))]


def active_files(state_dir: Path, certificate_type: CertificateType) -> list[KeyFile]:
    """Return the files under ``active/`` for a certificate type: one, or one for each EVSE.

    Safe for root on another user's directory: links are not followed, and a FIFO does not block.

    Raises:
        TlsCheckFailed: no such file, or a file is unreadable.
    """
    directory = state_dir / DIRECTORY_NAME
    files = []
    path = directory
    try:
        with _directory(directory) as opened:
            for name in sorted(os.listdir(opened)):  # noqa: PTH208 - by descriptor, so that the directory cannot be exchanged
                read = read_name(name)
                if read is None or read.previous or read.owner.certificate_type != certificate_type:
                    continue
                path = directory / name
                with contextlib.suppress(FileNotFoundError):  # deactivated meanwhile
                    content = read_regular(name, limit=MAX_FILE, follow=False, directory=opened)
                    files.append(KeyFile(name, content))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(path, error) from None
    if not files:
        raise _no_file(
            f"no active {certificate_type} in {directory}",
            hint="it appears when Josev reports the certificate as installed; stationkey keys list shows every key",
        )
    return files


def key_file(path: Path) -> KeyFile:
    """Return the file that the operator named, which may be a link.

    Raises:
        TlsCheckFailed: it cannot be read.
    """
    try:
        return KeyFile(path.name, read_regular(path, limit=MAX_FILE, follow=True))
    except OSError as error:
        raise _unreadable(path, error) from None


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> TlsCheckFailed:
    why = "it is a link" if error.errno == errno.ELOOP else error.strerror
    closed = error.errno in {errno.EACCES, errno.EPERM}
    hint = (
        "run as the user that the daemon runs as" if closed else "name a certificate type, or a key file under active/"
    )
    return _no_file(f"{path} cannot be read: {why}", hint=hint)


def password_of(file: KeyFile, access: Access) -> bytes:
    """Return the value that a service must give OpenSSL as the key's password.

    Args:
        file: key, leaf and chain, such as those under ``active/``.
        access: see `access_to`. The key store is opened only if the key needs a value, and closed again. A token is
            asked for the key, so that OpenSSL is given no PIN that the token refuses.

    Returns:
        The authorisation value of a key in a TPM, or the PIN of the token; empty if there is none.

    Raises:
        TlsCheckFailed: the value is unavailable, or useless: OpenSSL cannot satisfy a policy.
    """
    private = access.setup.locked_part(file.name, file.content)
    if private is None:
        return b""

    def ask() -> bytes:
        store = access.open_store()
        try:
            return store.auth_value(private) if isinstance(store, Locking) else b""
        finally:
            store.close()

    try:
        # On a separate thread: a hung module is abandoned, and the errors that it leaves in OpenSSL's per-thread queue
        # are not taken for those of `ssl`.
        return Worker("keystore").submit(ask).result(TIMEOUT)
    except TimeoutError:
        raise _hung(access.setup, file) from None
    except KeyStoreError as error:
        code = EXIT_DEVICE if error.transient else EXIT_KEY
        raise TlsCheckFailed(
            f"{file.name}: {error.message}", reason=error.reason, exit_code=code, hint=error.hint
        ) from None


def check(file: KeyFile, *, setup: Setup, password: bytes = b"", anchors: bytes | None = None) -> list[Handshake]:
    """Make a TLS handshake on loopback with the key and chain in `file`, for each version that its type needs.

    The side with the key runs in its own process, like a service. The peer verifies the chain in the file, dates
    included. Without `anchors`, the root is not checked.

    Args:
        file: key, leaf and chain, such as those under ``active/``.
        setup: for the key store of the key.
        password: of the key; see `password_of`.
        anchors: the roots that the peer trusts, PEM.

    Raises:
        TlsCheckFailed: no handshake, or the peer cannot verify the chain; the message says why.
    """
    chain = chain_of(file)
    _refuse_incomplete(file, chain, anchors)
    if not setup.installed():
        raise TlsCheckFailed(
            f"{file.name}: OpenSSL cannot read a key that is in a {setup.device}: its {setup.description} is missing",
            reason="tls_provider_missing",
            exit_code=EXIT_MODULE,
            hint=f"install {setup.install}; or set OPENSSL_MODULES to where its {setup.module}.so is; this is "
            f"{ssl.OPENSSL_VERSION}",
        )
    use = use_of(file, chain)
    with contextlib.ExitStack() as stack:
        listener = None
        if use.role == "client":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.settimeout(TIMEOUT)
        port = 0 if listener is None else listener.getsockname()[1]
        holder = stack.enter_context(holding(setup, use, file, port, password))
        try:
            holder.expect_loaded()
            if listener is None:
                port = int(holder.line())
            made = [shake(use, ssl.TLSVersion[version], chain, port, listener) for version in use.versions]
            holder.end()
            return made
        except (OSError, ValueError) as error:  # ssl's errors are among them
            said = holder.end()
            raise _explained(setup, file, error, said, loaded=holder.loaded, late=holder.late) from None


def chain_of(file: KeyFile) -> Chain:
    """Return the chain in `file`.

    Raises:
        TlsCheckFailed: no certificate, or no private key.
    """
    chain = read_chain(file.content)
    if chain is None:
        raise _no_file(
            f"{file.name} has no certificate",
            hint="with [josev] certificate_dir in the configuration of the daemon, it puts the chain beside the key",
        )
    if not any(f"{label}-----".encode() in file.content for label in _LABELS):
        raise _no_file(f"{file.name} has no private key")
    return chain


def _refuse_incomplete(file: KeyFile, chain: Chain, anchors: bytes | None) -> None:
    """Refuse a chain without an intermediate: only the root may be left out [RFC 5246 7.4.2, RFC 8446 4.4.2].

    Without `anchors` it is unknown whether the issuer of the last certificate is a root. The issuer of a lone leaf is
    taken for an intermediate, as in the PKIs of ISO 15118.
    """
    last = chain.certificates[-1]
    why = ""
    if anchors is not None:
        try:
            why = untrusted(chain, anchors)
        except ValueError:
            why = "the trust anchors are not certificates in PEM"
    elif len(chain.certificates) == 1 and not last.self_issued:
        why = f"it ends with the leaf; the certificate of its issuer {name_text(last.issuer)} is missing"
    if why:
        raise TlsCheckFailed(
            f"{file.name}: the chain is incomplete: {why}",
            reason="tls_chain_incomplete",
            exit_code=EXIT_KEY,
            hint="put the certificates of the Sub-CAs into [josev] certificate_dir; --trust-anchors names the roots",
        )


def use_of(file: KeyFile, chain: Chain) -> TlsUse:
    """Return the TLS use of the key: by the file's name under active/, else by extendedKeyUsage."""
    read = read_name(file.name)
    if read is not None and read.owner.certificate_type in set(CertificateType):
        return PROFILES[CertificateType(read.owner.certificate_type)].tls_use
    try:
        usage = set(chain.leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, *UNREADABLE):
        usage = set()
    client = usage == {ExtendedKeyUsageOID.CLIENT_AUTH}
    return TlsUse("client" if client else "server", ("TLSv1_2", "TLSv1_3"))


class Holder:
    """The process with the key.

    Args:
        process: `handshake.py`.
        variables: its environment.
    """

    def __init__(self, process: subprocess.Popen[str], variables: dict[str, str]) -> None:
        self._process = process
        self.variables = variables
        self.loaded = False
        self.late = False

    def line(self) -> str:
        """Read a line of its output."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def expect_loaded(self) -> None:
        """Wait until the key is loaded.

        Raises:
            ValueError: it was not loaded.
        """
        self.loaded = self.line() == "loaded"
        if not self.loaded:
            raise ValueError("the key was not loaded")

    def end(self) -> str:
        """Wait for its end, so that the TPM's slot is free, and return its standard error."""
        try:
            return self._process.communicate(timeout=_GRACE)[1]
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.communicate()[1]

    def too_late(self) -> None:
        """End it after the timeout."""
        if self._process.poll() is None:
            self.late = True
            self._process.kill()


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """Return the descriptor of a file in memory with that content."""
    with os.fdopen(os.memfd_create("stationkey"), "wb") as file:
        file.write(content)
        file.flush()
        yield file.fileno()


@contextmanager
def holding(
    setup: Setup, use: TlsUse, file: KeyFile, port: int, password: bytes, *, threaded: int = 0
) -> Iterator[Holder]:
    """Start the process with the key, for a handshake with each version, or for `threaded` ones at any time."""
    numbers = (threaded or len(use.versions), int(threaded > 0), port)
    with (
        _in_memory(file.content) as content,
        # No password in the command line or the environment: others can read the one, and children get the other.
        _in_memory(password) as secret,
        tempfile.TemporaryDirectory(prefix="stationkey-") as directory,
    ):
        Path(directory, "pin").symlink_to(f"/proc/self/fd/{secret}")
        # OpenSSL takes a key by path only: this path leads to the checked file, even if it was exchanged since.
        arguments = [use.role, f"/proc/self/fd/{content}", setup.module if setup.engine else "", *map(str, numbers)]
        variables = {
            **os.environ,
            **setup.write(Path(directory, "openssl.cnf")),
            "CREDENTIALS_DIRECTORY": directory,
            "TSS2_LOG": "all+WARNING",
        }
        with subprocess.Popen(  # noqa: S603 - our own script, and no shell
            [sys.executable, "-I", str(Path(__file__).with_name("handshake.py")), *arguments],
            env=variables,
            pass_fds=(secret, content),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            holder = Holder(process, variables)
            guard = threading.Timer(TIMEOUT, holder.too_late)
            guard.start()
            try:
                yield holder
            finally:
                guard.cancel()
                process.kill()  # normally it has ended already


def shake(use: TlsUse, version: ssl.TLSVersion, chain: Chain, port: int, listener: socket.socket | None) -> Handshake:
    """Play the peer: verify the certificate, and that it is the one in the file.

    Raises:
        OSError: no handshake.
        ValueError: another certificate was presented.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if listener is None else ssl.PROTOCOL_TLS_SERVER)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    top = chain.certificates[-1]
    context.load_verify_locations(cadata=top.der)
    context.minimum_version = context.maximum_version = version
    if use.suites is not None:
        context.set_ciphers(use.suites)
    if listener is None:
        connection = socket.create_connection(("127.0.0.1", port), TIMEOUT)
    else:
        _own_certificate(context)
        connection, _ = listener.accept()
        connection.settimeout(TIMEOUT)
    with connection, context.wrap_socket(connection, server_side=listener is not None) as session:
        session.recv(1)
        session.sendall(b"k")
        cipher = session.cipher()
        assert cipher is not None
        if session.getpeercert(binary_form=True) != chain.own.der:
            raise ValueError("the presented certificate is not the first in the file")
        return Handshake(session.version() or "", cipher[0], use.role)


def _own_certificate(context: ssl.SSLContext) -> None:
    """Load a temporary certificate, because a server needs one."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stationkey tls-config")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    with tempfile.NamedTemporaryFile("wb", prefix="stationkey-", suffix=".pem") as file:  # mode 0600
        file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        file.write(certificate.public_bytes(pem))
        file.flush()
        context.load_cert_chain(file.name)


def _no_file(message: str, *, hint: str = "") -> TlsCheckFailed:
    return TlsCheckFailed(message, reason="tls_file_missing", exit_code=EXIT_FILE, hint=hint)


def _hung(setup: Setup, file: KeyFile) -> TlsCheckFailed:
    message = f"{file.name}: no handshake in {TIMEOUT:g} s: the {setup.device} hangs"
    return TlsCheckFailed(message, reason=setup.reason, exit_code=EXIT_DEVICE)


def _explained(setup: Setup, file: KeyFile, error: Exception, said: str, *, loaded: bool, late: bool) -> TlsCheckFailed:
    """Return the error, by the output of the process with the key."""
    for sign in setup.signs:
        if sign.text in said:
            code = EXIT_DEVICE if sign.of_device else EXIT_KEY
            return TlsCheckFailed(f"{file.name}: {sign.meaning}", reason=setup.reason, exit_code=code, hint=sign.hint)
    if late or isinstance(error, TimeoutError):  # the time of the connection may be over first
        return _hung(setup, file)
    why = "the key cannot be read"
    hint = "is it in the key store that --keystore names?"
    if loaded:
        why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error)
        why, hint = f"no handshake: {why}", ""
    elif "KEY_VALUES_MISMATCH" in said:
        why, hint = "the key and the first certificate do not belong together", ""
    return TlsCheckFailed(f"{file.name}: {why}", reason="tls_handshake_failed", exit_code=EXIT_KEY, hint=hint)
