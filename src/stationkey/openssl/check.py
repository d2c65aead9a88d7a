"""TLS with the active keys: the OpenSSL configuration for it, and a handshake on loopback that proves it.

A key under ``active/`` is a ``TSS2 PRIVATE KEY``. OpenSSL uses it through the provider of tpm2-openssl, if the
providers are loaded in one order and preferred by one property query; all others tried fail at least TLS 1.2.
"""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stationkey.contract.active_names import DIRECTORY_NAME, read_name
from stationkey.contract.profiles import PROFILES, CertificateType, TlsUse
from stationkey.errors import ConfigurationError, Fault, KeyStoreError, Scope, StationKeyError
from stationkey.keystore import KeyStore, KeyStoreUri, Protecting
from stationkey.keystore.tpm2 import keyfile
from stationkey.system.files import MAX_FILE, read_regular
from stationkey.x509.certificate import UNREADABLE, Chain, read_chain, untrusted
from stationkey.x509.lenient import name_text

TIMEOUT: Final = 30.0
"""Seconds that a hung TPM may keep the check waiting."""
_GRACE: Final = 5.0
"""Seconds for the process with the key to give the key up: on a bare TPM, one that is killed leaves it in its slot."""

EXIT_KEY: Final = 3
EXIT_TPM: Final = 4
EXIT_PROVIDER: Final = 5
EXIT_FILE: Final = 6

_CONFIGURATION: Final = """\
# OpenSSL with the keys under active/, which are in the TPM. Made by: stationkey tls-config
#
# Only for the services that use such a key: it replaces the system's openssl.cnf.
# They need two environment variables:
#   OPENSSL_CONF      where this file is
#   TPM2OPENSSL_TCTI  {tcti}
# Without the second, tpm2-tss takes whatever TPM it finds, a simulator on port 2321 included.

openssl_conf = stationkey_init

[stationkey_init]
providers = stationkey_providers
alg_section = stationkey_algorithms
ssl_conf = stationkey_ssl

# The order matters: default before tpm2.
[stationkey_providers]
default = stationkey_default
tpm2 = stationkey_tpm2

[stationkey_default]
activate = 1

[stationkey_tpm2]
activate = 1

# Signatures by the TPM where it has the key; everything else in software.
[stationkey_algorithms]
default_properties = ?tpm2.signature=yes

# As Debian has it. The suites of ISO 15118-2 pass.
[stationkey_ssl]
system_default = stationkey_tls

[stationkey_tls]
MinProtocol = TLSv1.2
CipherString = DEFAULT@SECLEVEL=2
"""


class TlsCheckFailed(StationKeyError):
    """The check found what would keep a service from using the key. `exit_code` says where the fault lies."""

    def __init__(self, message: str, *, reason: str, exit_code: int, hint: str = "") -> None:
        of_device = exit_code == EXIT_TPM
        scope = Scope.DEVICE if of_device else Scope.REQUEST
        super().__init__(message, reason=reason, hint=hint, transient=of_device, scope=scope)
        self.exit_code = exit_code
        self.fault = Fault.DEVICE if of_device else Fault.OPERATOR


def openssl_configuration(*, tcti: str) -> str:
    """The OpenSSL configuration file, in text, that makes a service use the active keys.

    Args:
        tcti: of the TPM, written as a comment: tpm2-openssl 1.1 takes it from the environment only.

    Raises:
        ConfigurationError: the TCTI has a line break in it.
    """
    if not tcti.isprintable():
        raise ConfigurationError("the TCTI has a control character in it", reason="keystore_uri_invalid")
    return _CONFIGURATION.format(tcti=tcti)


def environment(configuration: Path, *, tcti: str) -> dict[str, str]:
    """What a service needs in its environment, beside the configuration file itself."""
    return {"OPENSSL_CONF": str(configuration), "TPM2OPENSSL_TCTI": tcti}


def tcti_of(keystore: str) -> str:
    """The TCTI in a key-store URI.

    Raises:
        ConfigurationError: it names no TPM.
    """
    where = KeyStoreUri.parse(keystore)
    if where.scheme.openssl_provider != "tpm2" or not where.location:
        raise ConfigurationError(
            f"the key store {where} is not a TPM: its keys need no OpenSSL configuration",
            reason="keystore_uri_invalid",
            hint="for example tpm2:device:/dev/tpmrm0",
        )
    return where.location


@dataclass(frozen=True, slots=True)
class Handshake:
    """A handshake that went well.

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
    """What was in a file with a key and its chain when it was read. It is read once: it may be exchanged at any time.

    Attributes:
        name: of the file, without its directory.
        content: PEM.
    """

    name: str
    content: bytes


def files_of(named: str, state: Path) -> list[KeyFile]:
    """Return the files under ``active/`` for a certificate type, or the one file that is named instead.

    Args:
        named: a certificate type, or the path of a file.
        state: the state directory.

    Raises:
        TlsCheckFailed: the type has none, or one cannot be read.
    """
    if named in set(CertificateType):
        return active_files(state, CertificateType(named))
    return [key_file(Path(named))]


def active_files(state_dir: Path, certificate_type: CertificateType) -> list[KeyFile]:
    """The files under ``active/`` for a certificate type: one, or one for each EVSE.

    Root may call this on another user's directory: links are not followed, and a FIFO does not block.

    Raises:
        TlsCheckFailed: there is none, or a file is unreadable.
    """
    directory = state_dir / DIRECTORY_NAME
    files = []
    path = directory
    try:
        with _directory(directory) as opened:
            for name in sorted(os.listdir(opened)):  # noqa: PTH208 - of a directory that stays the same one
                read = read_name(name)
                if read is None or read.previous or read.owner[0] != certificate_type:
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
    """A file that the operator named. That may be a link.

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
    hint = "run as the user that the daemon runs as" if closed else "the daemon put no such thing there: who did?"
    return _no_file(f"{path} cannot be read: {why}", hint=hint)


def password_of(file: KeyFile, open_store: Callable[[], KeyStore]) -> bytes:
    """The authorisation value of the key in `file`, which a service has to give OpenSSL as the key's password.

    Args:
        file: key, leaf and chain, such as those under ``active/``.
        open_store: opens the key store; asked only where the key has such a value, and closed again.

    Returns:
        The value; empty if the key has none.

    Raises:
        TlsCheckFailed: it is unavailable, or useless: OpenSSL cannot satisfy a policy.
    """
    try:
        key = keyfile.read_pem(file.content)
    except ValueError:
        return b""  # the check says so
    if key is None:
        return b""
    if key.policy:
        raise TlsCheckFailed(
            f"{file.name}: the key is bound to PCRs, and OpenSSL's tpm2 provider cannot use such a key",
            reason="tls_policy",
            exit_code=EXIT_KEY,
            hint="keys that services use through OpenSSL must be made without [tpm] pcrs",
        )
    if key.empty_auth:
        return b""
    store = open_store()
    try:
        return store.auth_value(key.der()) if isinstance(store, Protecting) else b""
    except KeyStoreError as error:
        code = EXIT_TPM if error.transient else EXIT_KEY
        raise TlsCheckFailed(
            f"{file.name}: {error.message}", reason=error.reason, exit_code=code, hint=error.hint
        ) from None
    finally:
        store.close()


def check(
    file: KeyFile, *, configuration: Path, tcti: str, password: bytes = b"", anchors: bytes | None = None
) -> list[Handshake]:
    """Make a TLS handshake on loopback with the key and chain in `file`, for each version that its type needs.

    The side with the key runs in a process of its own, as a service would. The other side verifies the chain as far as
    the file has it, dates included. Without `anchors`, whom it leads to is for the real other side to say.

    Args:
        file: key, leaf and chain, such as those under ``active/``.
        configuration: of OpenSSL; see `openssl_configuration`.
        tcti: of the TPM.
        password: of the key; see `password_of`.
        anchors: the roots that the other side trusts, PEM.

    Raises:
        TlsCheckFailed: no handshake, or a chain that the other side cannot verify; the message says why.
    """
    chain = chain_of(file)
    _refuse_incomplete(file, chain, anchors)
    use = use_of(file, chain)
    variables = {**os.environ, **environment(configuration, tcti=tcti), "TSS2_LOG": "all+WARNING"}
    with contextlib.ExitStack() as stack:
        listener = None
        if use.role == "client":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.settimeout(TIMEOUT)
        port = 0 if listener is None else listener.getsockname()[1]
        holder = stack.enter_context(holding(use, file, port, variables, password))
        try:
            holder.expect_loaded()
            if listener is None:
                port = int(holder.line())
            made = [shake(use, ssl.TLSVersion[version], chain, port, listener) for version in use.versions]
            holder.end()
            return made
        except (OSError, ValueError) as error:  # ssl's errors are among them
            said = holder.end()
            raise _explained(file, error, said, loaded=holder.loaded, late=holder.late) from None


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
    if b"PRIVATE KEY-----" not in file.content:
        raise _no_file(f"{file.name} has no private key")
    return chain


def _refuse_incomplete(file: KeyFile, chain: Chain, anchors: bytes | None) -> None:
    """Refuse a chain without an intermediate: only the root may be left out [RFC 5246 7.4.2, RFC 8446 4.4.2].

    Without `anchors` nothing says whether the issuer of the last certificate is a root. That of a lone leaf is taken
    for an intermediate, as it is in the PKIs of ISO 15118.
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
    """Return what TLS the key is for: by the file's name, as the daemon gives it, else by extendedKeyUsage."""
    read = read_name(file.name)
    if read is not None and read.owner[0] in set(CertificateType):
        return PROFILES[CertificateType(read.owner[0])].tls_use
    try:
        usage = set(chain.leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, *UNREADABLE):
        usage = set()
    client = usage == {ExtendedKeyUsageOID.CLIENT_AUTH}
    return TlsUse("client" if client else "server", ("TLSv1_2", "TLSv1_3"))


class Holder:
    """The process with the key."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.loaded = False
        self.late = False

    def line(self) -> str:
        """Read a line that it printed."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def expect_loaded(self) -> None:
        """Wait until the key is loaded.

        Raises:
            ValueError: it is not.
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
        """End it, because it took too long."""
        if self._process.poll() is None:
            self.late = True
            self._process.kill()


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """The descriptor of a file with that content which is on no disk."""
    with os.fdopen(os.memfd_create("stationkey"), "wb") as file:
        file.write(content)
        file.flush()
        yield file.fileno()


@contextmanager
def holding(
    use: TlsUse, file: KeyFile, port: int, variables: dict[str, str], password: bytes, *, threaded: int = 0
) -> Iterator[Holder]:
    """Start the process with the key, for a handshake with each version, or for `threaded` ones at any time."""
    # Command line and environment are no places for a password: others can read the one, and children get the other.
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(password)
    numbers = (threaded or len(use.versions), int(threaded > 0), port, reading)
    command = [sys.executable, "-I", str(Path(__file__).with_name("handshake.py")), use.role]
    with (
        os.fdopen(reading),
        _in_memory(file.content) as content,
        subprocess.Popen(  # noqa: S603 - our own script, and no shell
            # OpenSSL takes a key by path only: this path leads to the checked file, even if it was exchanged since.
            [*command, f"/proc/self/fd/{content}", *map(str, numbers)],
            env=variables,
            pass_fds=(reading, content),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process,
    ):
        holder = Holder(process)
        guard = threading.Timer(TIMEOUT, holder.too_late)
        guard.start()
        try:
            yield holder
        finally:
            guard.cancel()
            process.kill()  # ended by itself, if all is well


def shake(use: TlsUse, version: ssl.TLSVersion, chain: Chain, port: int, listener: socket.socket | None) -> Handshake:
    """Be the side without the key: verify the certificate, and that it is the one in the file.

    Raises:
        OSError: no handshake.
        ValueError: the certificate is another one.
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
            raise ValueError("another certificate than the first in the file was presented")
        return Handshake(session.version() or "", cipher[0], use.role)


def _own_certificate(context: ssl.SSLContext) -> None:
    """A certificate for the length of the check, as a server has to have one."""
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


_TPM_SIGNS: Final[Sequence[tuple[str, str, str]]] = (
    # Messages of tpm2-tss, their meaning, and what to do.
    ("tcti", "the TPM cannot be reached", "is --keystore right, and may this user open the device (group tss)?"),
    (
        "0x00000902",
        "the TPM has no room for the key",
        "without a resource manager no slot is free for a TLS client; use tpm2:device:/dev/tpmrm0, or tpm2-abrmd",
    ),
    (
        "Esys_Load() Esys Finish ErrorCode (0x000009a2)",
        "the storage root key has an authorisation value, and OpenSSL's tpm2 provider cannot give it",
        "keys that services use through OpenSSL must hang on a storage root key without [tpm] srk_auth",
    ),
    *(
        (code, "the authorisation value is not the key's", "[tpm] key_auth must name the value that it was made with")
        for code in ("0x000009a2", "0x0000098e")
    ),
    ("0x000001df", "the key is another TPM's", "a key works only in the TPM that made it; ask for a new one"),
    ("0x0000018b", "the TPM has no primary key where the file says", "was the TPM cleared? Then ask for new keys"),
)

_TPMS_OWN: Final = frozenset({"tcti", "0x00000902", "0x0000018b"})
"""Signs of a fault that is not the key's."""


def _explained(file: KeyFile, error: Exception, said: str, *, loaded: bool, late: bool) -> TlsCheckFailed:
    """Return the error, by the output of the process with the key."""
    for sign, meaning, hint in _TPM_SIGNS:
        if sign in said:
            code = EXIT_TPM if sign in _TPMS_OWN else EXIT_KEY
            return TlsCheckFailed(f"{file.name}: {meaning}", reason="tls_tpm_failed", exit_code=code, hint=hint)
    if late:
        return TlsCheckFailed(
            f"{file.name}: no handshake in {TIMEOUT:g} s: the TPM hangs", reason="tls_tpm_failed", exit_code=EXIT_TPM
        )
    if loaded:
        why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error)
        return TlsCheckFailed(f"{file.name}: no handshake: {why}", reason="tls_handshake_failed", exit_code=EXIT_KEY)
    if "KEY_VALUES_MISMATCH" in said:
        return TlsCheckFailed(
            f"{file.name}: the key and the first certificate do not belong together",
            reason="tls_handshake_failed",
            exit_code=EXIT_KEY,
        )
    if b"TSS2 PRIVATE KEY" not in file.content:
        return TlsCheckFailed(f"{file.name}: the key cannot be read", reason="tls_handshake_failed", exit_code=EXIT_KEY)
    # No message of tpm2-tss, so it was not called: OpenSSL has no provider for such a key.
    return TlsCheckFailed(
        f"{file.name}: OpenSSL cannot read a key that is in a TPM: its tpm2 provider is missing",
        reason="tls_provider_missing",
        exit_code=EXIT_PROVIDER,
        hint=f"install tpm2-openssl, or set OPENSSL_MODULES to where its tpm2.so is; this is {ssl.OPENSSL_VERSION}",
    )
