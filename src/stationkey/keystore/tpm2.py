"""The ``tpm2:`` key store: keys born in a TPM 2.0, usable only inside it.

Each key is an ordinary child of the storage root key (SRK): the TPM hands out its private part only wrapped by the SRK,
and that blob goes to the ledger. The TPM itself keeps nothing of a key, so the number of keys is not bounded by its
slots, and destroying the blob destroys the key.

What a TPM does when it is lost, cleared or full, by its return codes, and what is done:

- The TCTI fails (``0xa000a``), and from then on every call on that context (``0x70007``), even when the TPM is back:
  the context is closed and a new one opened, and the command in hand is tried once more on it.
- ``0x100`` (TPM_RC_INITIALIZE): the TPM was reset and waits for TPM2_Startup, which is sent.
- ``0x910`` (TPM_RC_REFERENCE_H0): it was reset and started up again, and what was loaded is gone: it is loaded anew.
- ``0x902`` (TPM_RC_OBJECT_MEMORY): objects of a dead client fill the slots. On a bare TPM they are flushed; through
  a resource manager they are somebody else's, and it keeps each client's apart.
- A handle error on the SRK: the TPM was cleared under us; a new context finds or makes the SRK anew.

Nothing is retried more than once. All of it happens on the one thread that owns the store; a call that never returns is
that thread's to notice.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final, TypeVar

# tpm2-tss prints every TPM error to standard error by itself; here each becomes an exception with its own words, and a
# line of JSON in the log must not be torn apart. Read once, when the library is loaded; an operator's own value wins.
os.environ.setdefault("TSS2_LOG", "all+none")

from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_ECC,
    TPM2_PT,
    TPM2_PT_FIRMWARE,
    TPM2_PT_VENDOR,
    TPM2_RH,
    TPM2_ST,
    TPM2_SU,
    TPMA_OBJECT,
)
from tpm2_pytss.cryptography import tpm_ecc_private_key, tpm_rsa_private_key
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_TEMPLATE,
    TPMS_ECC_PARMS,
    TPMS_RSA_PARMS,
    TPMS_SCHEME_HASH,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_PUBLIC_PARMS,
    TPMT_RSA_SCHEME,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF_OBJECT,
    TPMT_TK_HASHCHECK,
    TPMU_PUBLIC_PARMS,
    TPMU_SIG_SCHEME,
    TPMU_SYM_KEY_BITS,
    TPMU_SYM_MODE,
)

from stationkey.csr import PrivateKey, PublicKey
from stationkey.errors import KeyStoreError, UnsupportedAlgorithm
from stationkey.keystore import KeyRef, Support
from stationkey.profiles import (
    ALGORITHMS,
    SECP256R1,
    SECP521R1,
    Algorithm,
    EllipticCurve,
    KeyType,
    RsaModulus,
)

T = TypeVar("T")
_Sign = Callable[[bytes, Any, Any], TPMT_SIGNATURE]
"""Signs data by a TPM_ALG_ID and one of cryptography's hashes."""
log = logging.getLogger(__name__)

SRK_HANDLE: Final = 0x81000001
"""Where the SRK persists [TCG TPM v2.0 Provisioning Guidance 7.5.1]."""

KEY_ATTRIBUTES: Final = (
    TPMA_OBJECT.FIXEDTPM  # cannot be duplicated to another TPM
    | TPMA_OBJECT.FIXEDPARENT  # nor to another parent
    | TPMA_OBJECT.SENSITIVEDATAORIGIN  # made by the TPM, not imported
    | TPMA_OBJECT.USERWITHAUTH
    # Without NODA, three losses of power while the key is in use lock the TPM, though nobody gave a wrong password.
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.SIGN_ENCRYPT
)
"""Attributes of every key made here [TPM 2.0 part 2, 8.3]."""

_SRK_NEEDED: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.DECRYPT
)
_SRK_ATTRIBUTES: Final = _SRK_NEEDED | TPMA_OBJECT.NODA

_SCHEME: Final = "tpm2"
_CURVES: Final[dict[KeyType, Any]] = {SECP256R1: TPM2_ECC.NIST_P256, SECP521R1: TPM2_ECC.NIST_P521}
_POINTS: Final[dict[KeyType, ec.EllipticCurve]] = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}
_HASHES: Final[dict[str, Any]] = {"sha256": TPM2_ALG.SHA256, "sha384": TPM2_ALG.SHA384, "sha512": TPM2_ALG.SHA512}
_NO_SENSITIVE: Final = TPM2B_SENSITIVE_CREATE()  # no authorisation value, and nothing to seal
_NO_TICKET: Final = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)  # the digest was made outside
_RESOURCE_MANAGERS: Final = ("device:/dev/tpmrm", "tabrmd")
_PAGE: Final = 64  # entries asked for at a time; the TPM may give fewer
_FIRST_TRANSIENT: Final = 0x80000000
_LAST_TRANSIENT: Final = 0x80FFFFFF

_RC_LAYER: Final = 0x00FF0000
_RC_RESOURCE_MANAGER: Final = frozenset({0x000B0000, 0x000C0000})  # the layers of /dev/tpmrm0 and of tpm2-abrmd
_RC_MARSHALLING: Final = 0x00090000
_RC_TPM: Final = 0x180  # bits that a code of the TPM has and a code of tpm2-tss has not: version 1 or format one
_RC_FORMAT_ONE: Final = 0x080  # it complains about a handle, a session or a parameter [TPM 2.0 part 2, 6.6.2]
_RC_TCTI_VALUE: Final = 0xA000B
_RC_TCTI_UNKNOWN: Final = 0xA0015
_RC_INITIALIZE: Final = 0x100
_RC_OBJECT_MEMORY: Final = 0x902
_RC_REFERENCE_H0: Final = 0x910
_RC_COMMAND_CODE: Final = 0x143  # TPM2_CreateLoaded came with revision 1.38 of the specification
_RC_LOCKOUT: Final = 0x921
_RC_HANDLE_1: Final = 0x18B
_RC_AUTH_FAIL: Final = 0x98E
_RC_BAD_AUTH: Final = 0x9A2
_RC_INTEGRITY: Final = 0x1DF  # TPM2_Load, parameter 1: the blob is of another TPM, or of this one before it was cleared


def is_shared(tcti: str) -> bool:
    """Whether a resource manager is behind a TCTI, so that several programs can use the TPM at a time."""
    return tcti.startswith(_RESOURCE_MANAGERS)


class Tpm2KeyStore:
    """Keys in the TPM behind a TCTI, with one ESAPI context that is kept until the TPM is lost.

    Args:
        tcti: name and configuration of a TPM command transmission interface, ``device:/dev/tpmrm0`` for example. Always
            given: without one, tpm2-tss falls through to whatever listens on localhost:2321.
        guest: unload nothing that others have loaded, as behind a resource manager.
    """

    def __init__(self, tcti: str, *, guest: bool = False) -> None:
        self.uri = f"{_SCHEME}:{tcti}"
        self._tcti = tcti
        self._resource_manager = guest or is_shared(tcti)
        self._esapi: ESAPI | None = None
        self._srk: Any = None
        # A key just made is loaded already, and one just signed with still is: until `unload`, or the next command.
        self._loaded: _Loaded | None = None
        self._supported: dict[Algorithm, Support] = {}
        self._has_create_loaded = True
        self._abandoned = False

    @property
    def description(self) -> str:
        """Vendor and firmware version, as the TPM tells them [TPM 2.0 part 2, 6.13]."""
        return self._with_device(self._describe)

    def supports(self, algorithm: Algorithm) -> Support:
        return self._with_device(lambda: self._supports(algorithm))

    def generate(self, algorithm: Algorithm) -> KeyRef:
        return self._with_device(lambda: self._generate(algorithm))

    @contextmanager
    def signer(self, key: KeyRef) -> Iterator[PrivateKey]:
        self._with_device(lambda: self._load(key))
        public_key, sign = self.public_key(key), partial(self._sign, key)
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            yield _EccPrivateKey(sign, public_key)
        else:
            yield _RsaPrivateKey(sign, public_key)

    def public_key(self, key: KeyRef) -> PublicKey:
        try:
            return serialization.load_der_public_key(key.public)  # type: ignore[return-value] # EC or RSA: this store made it
        except (ValueError, CryptographyUnsupported):
            raise _damaged(key) from None

    def destroy(self, key: KeyRef) -> None:
        """Unload it where it is loaded. The TPM holds nothing else of it: the wrapped blob is all there is."""
        _own(key)
        if self._loaded is not None and self._loaded.key == key:
            self.unload()

    def lend(self, key: KeyRef | None, use: Callable[[ESAPI, Any], T]) -> T:
        """See `stationkey.keystore.Lending`."""

        def command() -> T:
            handle = None if key is None else self._load(key)
            return use(self._esapi, handle)

        return self._with_device(command)

    def unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        # A TPM that is lost has unloaded it already, or a new context will.
        if loaded is not None and self._esapi is not None and not self._abandoned:
            try:
                self._esapi.flush_context(loaded.handle)
            except TSS2_Exception:
                self._forget()

    def close(self) -> None:
        self.unload()
        self._forget()

    def abandon(self) -> None:
        """Never unload anything again, nor begin a command: see `stationkey.keystore.Abandonable`."""
        self._abandoned = True

    # The device: opened when first used, and anew whenever it was lost.

    def _with_device(self, command: Callable[[], T]) -> T:
        """Run `command` on an open context; where the TPM was lost, cleared, reset or full, mend that and try again."""
        self._refuse_if_abandoned()
        if self._esapi is not None:
            try:
                return command()
            except TSS2_Exception as error:
                self._refuse_if_abandoned()
                if not self._mend(error):
                    raise self._failure(error) from None
        try:
            if self._esapi is None:
                self._open()
            return command()
        except TSS2_Exception as error:
            raise self._failure(error) from None

    def _refuse_if_abandoned(self) -> None:
        if self._abandoned:
            raise KeyStoreError(f"the TPM at {self._tcti} answered too late", reason="keystore_timeout")

    def _mend(self, error: TSS2_Exception) -> bool:
        """Put the device in order after `error`; True where the command is worth another try."""
        if _code(error) == _RC_OBJECT_MEMORY and self._esapi is not None and not self._resource_manager:
            self._flush_strays(self._esapi)
            return True
        if _is_lost(error) or _code(error) in {_RC_INITIALIZE, _RC_REFERENCE_H0, _RC_HANDLE_1}:
            self._forget()
            return True
        return False

    def _forget(self) -> None:
        """Give up the context. Its transport may be dead; there is nothing left to save on it."""
        esapi, self._esapi, self._srk, self._loaded = self._esapi, None, None, None
        self._supported.clear()  # the next device may be another
        if esapi is not None:
            esapi.close()

    def _failure(self, error: TSS2_Exception) -> KeyStoreError:
        """The words for an error that stands."""
        code = f"{error.rc:#x}"
        if _code(error) in {_RC_TCTI_VALUE, _RC_TCTI_UNKNOWN}:
            return KeyStoreError(
                f"tpm2-tss cannot make use of the TCTI {self._tcti!r} ({code})",
                reason="tcti_invalid",
                hint="it is NAME:CONFIGURATION, and the library of that name must be installed; "
                "for example device:/dev/tpmrm0",
            )
        if _is_lost(error):
            self._forget()
            return KeyStoreError(
                f"the TPM at {self._tcti} cannot be reached ({code})",
                reason="tpm_unreachable",
                hint="is it there, and may this user open it? Each request tries again",
            )
        known = {
            _RC_LOCKOUT: (
                "tpm_lockout",
                "the TPM is in lockout",
                "it ends by itself after the TPM's lockout interval, or with tpm2_dictionarylockout --clear-lockout",
            ),
            _RC_INITIALIZE: ("tpm_reset", "the TPM was reset while it was in use", "ask again"),
            _RC_REFERENCE_H0: ("tpm_reset", "the TPM was reset while it was in use", "ask again"),
            _RC_OBJECT_MEMORY: ("tpm_full", "the TPM has no free slot", "another program holds keys loaded"),
            _RC_INTEGRITY: (
                "key_of_another_tpm",
                "the key was made by another TPM, or before this one was cleared, or its blob is damaged",
                "it cannot be used again; ask for a new certificate",
            ),
            _RC_AUTH_FAIL: (
                "tpm_auth",
                "the TPM wants an authorisation value",
                "owner hierarchy and SRK must have none",
            ),
            _RC_BAD_AUTH: (
                "tpm_auth",
                "the TPM wants an authorisation value",
                "owner hierarchy and SRK must have none",
            ),
        }
        reason, words, hint = known.get(_code(error), ("tpm_error", f"the TPM refused: {error}", ""))
        return KeyStoreError(f"{words} ({code})", reason=reason, hint=hint)

    def _open(self) -> None:
        self._refuse_file()
        esapi = self._esapi = ESAPI(self._tcti)
        try:
            self._srk = self._prepare(esapi)
        except (TSS2_Exception, KeyStoreError):
            self._forget()
            raise

    def _refuse_file(self) -> None:
        """Keep a mistaken path from costing a file: tpm2-tss would write its commands into whatever it can open."""
        name, _, path = self._tcti.partition(":")
        if name != "device" or not path:
            return
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - a TCTI's configuration is text, and Path would tidy it up
        except (OSError, ValueError):
            return  # tpm2-tss will say so
        if not stat.S_ISCHR(mode):
            raise KeyStoreError(
                f"{path} is no device", reason="tcti_invalid", hint="a TPM is a character device, such as /dev/tpmrm0"
            )

    def _prepare(self, esapi: ESAPI) -> Any:
        """Start the TPM and clear its slots where that is needed; the SRK."""
        try:
            # The first command of all: it finds out whether the TPM was started.
            present = _persistent(esapi, SRK_HANDLE)
        except TSS2_Exception as error:
            if _code(error) != _RC_INITIALIZE:
                raise
            esapi.startup(TPM2_SU.CLEAR)
            present = _persistent(esapi, SRK_HANDLE)
        if not self._resource_manager:
            self._flush_strays(esapi)
        return self._find_srk(esapi) if present else self._make_srk(esapi)

    def _find_srk(self, esapi: ESAPI) -> Any:
        srk = esapi.tr_from_tpmpublic(SRK_HANDLE)
        public = esapi.read_public(srk)[0].publicArea
        attributes = public.objectAttributes
        wrong = None
        if public.type != TPM2_ALG.ECC:
            wrong = f"a key of type {public.type}"
        elif public.parameters.eccDetail.curveID != TPM2_ECC.NIST_P256:
            wrong = f"a key on the curve {public.parameters.eccDetail.curveID}"
        elif attributes & _SRK_NEEDED != _SRK_NEEDED:  # with these, no TPM lets it sign
            wrong = f"a key with the attributes {attributes}"
        if wrong is not None:
            raise KeyStoreError(
                f"the TPM holds {wrong} at {SRK_HANDLE:#x}, where an ECC P-256 storage root key should be",
                reason="srk_unfit",
                hint=f"if nothing else needs it, remove it with: tpm2_evictcontrol -C o -c {SRK_HANDLE:#x}",
            )
        if not attributes & TPMA_OBJECT.NODA:
            # tpm2_createprimary makes it so by default; keys may hang on it, so it is used, and said.
            log.warning("the storage root key lacks noda: three losses of power in a row can lock the TPM for a while")
        return srk

    def _make_srk(self, esapi: ESAPI) -> Any:
        """Make the SRK by the TCG's template, so that any other program would make the same, and keep it in the TPM."""
        primary = esapi.create_primary(_NO_SENSITIVE, TPM2B_PUBLIC(publicArea=_srk_template()), ESYS_TR.OWNER)[0]
        try:
            return esapi.evict_control(ESYS_TR.OWNER, primary, SRK_HANDLE)
        finally:
            esapi.flush_context(primary)

    def _flush_strays(self, esapi: ESAPI) -> None:
        """Unload every transient object of a bare TPM: they are of clients that died, for this is its only user now."""
        self._loaded = None
        for handle in _handles(esapi, _FIRST_TRANSIENT, _LAST_TRANSIENT):
            self._refuse_if_abandoned()
            esapi.flush_context(esapi.tr_from_tpmpublic(handle))

    # The commands. Each runs inside _with_device.

    def _describe(self) -> str:
        properties = _properties(self._esapi)
        names = (TPM2_PT_VENDOR.STRING_1, TPM2_PT_VENDOR.STRING_2, TPM2_PT_VENDOR.STRING_3, TPM2_PT_VENDOR.STRING_4)
        vendor = b"".join(properties.get(int(name), 0).to_bytes(4, "big") for name in names)
        manufacturer = properties.get(int(TPM2_PT.MANUFACTURER), 0).to_bytes(4, "big")
        firmware = properties.get(int(TPM2_PT_FIRMWARE.VERSION_1), 0)
        return f"TPM 2.0 {_printable(manufacturer)} {_printable(vendor)} firmware {firmware >> 16}.{firmware & 0xFFFF}"

    def _supports(self, algorithm: Algorithm) -> Support:
        if algorithm not in self._supported:
            self._supported[algorithm] = self._ask_support(algorithm)
        return self._supported[algorithm]

    def _ask_support(self, algorithm: Algorithm) -> Support:
        profile = ALGORITHMS[algorithm]
        algorithms = _algorithms(self._esapi)
        if int(_HASHES[profile.hash_name]) not in algorithms:
            return Support(None, f"this TPM has no {profile.hash_name.upper().replace('SHA', 'SHA-')}")
        missing = []
        for kind in profile.key_types:
            scheme = TPM2_ALG.ECDSA if isinstance(kind, EllipticCurve) else TPM2_ALG.RSASSA
            if int(scheme) not in algorithms:
                return Support(None, f"this TPM has no {'ECDSA' if isinstance(kind, EllipticCurve) else 'RSASSA'}")
            if self._can_make(kind):
                return Support(kind)
            missing.append(str(kind))
        return Support(None, f"this TPM has no {' and no '.join(missing)}")

    def _can_make(self, kind: KeyType) -> bool:
        assert self._esapi is not None
        if isinstance(kind, EllipticCurve):
            return int(_CURVES[kind]) in _curves(self._esapi)
        try:
            self._esapi.test_parms(TPMT_PUBLIC_PARMS(type=TPM2_ALG.RSA, parameters=_key_parameters(kind)))
        except TSS2_Exception as error:
            if _is_lost(error) or not _code(error) & _RC_FORMAT_ONE:
                raise
            return False  # TPM_RC_VALUE, TPM_RC_KEY_SIZE: the TPM knows RSA, but not this size
        return True

    def _generate(self, algorithm: Algorithm) -> KeyRef:
        self._make_room()
        support = self._supports(algorithm)
        if support.key_type is None:
            raise UnsupportedAlgorithm(
                f"{algorithm} cannot be served: {support.missing}", reason="algorithm_unsupported_by_tpm"
            )
        handle, private, public = self._create_loaded(support.key_type)
        key = KeyRef(
            scheme=_SCHEME,
            key_type=support.key_type,
            public=_public_der(support.key_type, public),
            private=TSSPrivKey(private, public, empty_auth=True, parent=SRK_HANDLE).to_der(),
        )
        self._loaded = _Loaded(key, handle)
        return key

    def _create_loaded(self, kind: KeyType) -> tuple[Any, Any, Any]:
        """Handle, wrapped private part and public part of a new key, by one command where the TPM has it."""
        assert self._esapi is not None
        if self._has_create_loaded:
            try:
                created: tuple[Any, Any, Any] = self._esapi.create_loaded(
                    self._srk, _NO_SENSITIVE, _marshalled_template(kind)
                )
            except TSS2_Exception as error:
                if _code(error) != _RC_COMMAND_CODE:
                    raise
                self._has_create_loaded = False
            else:
                return created
        template = TPM2B_PUBLIC(publicArea=_key_template(kind))
        private, public, *_ = self._esapi.create(self._srk, _NO_SENSITIVE, template)
        return self._esapi.load(self._srk, private, public), private, public

    def _load(self, key: KeyRef) -> Any:
        if self._loaded is not None and self._loaded.key == key:
            return self._loaded.handle
        blob = _blob(key)
        self._make_room()
        assert self._esapi is not None
        try:
            handle = self._esapi.load(self._srk, blob.private, blob.public)
        except TSS2_Exception as error:
            if error.rc & _RC_LAYER == _RC_MARSHALLING:  # tpm2-tss does not even send it
                raise _damaged(key) from None
            raise
        self._loaded = _Loaded(key, handle)
        return handle

    def _sign(self, key: KeyRef, data: bytes, scheme: Any, algorithm: hashes.HashAlgorithm) -> TPMT_SIGNATURE:
        digest = hashes.Hash(algorithm)
        digest.update(data)
        message, how = digest.finalize(), _signing_scheme(scheme, algorithm.name)

        def sign() -> TPMT_SIGNATURE:
            handle = self._load(key)
            assert self._esapi is not None
            return self._esapi.sign(handle, message, how, _NO_TICKET)

        return self._with_device(sign)

    def _make_room(self) -> None:
        """Unload what is still loaded, before the next command needs its slot."""
        self.unload()
        if self._esapi is None:  # the TPM was lost meanwhile, as the attempt to unload showed
            self._open()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A key that is in one of the TPM's slots."""

    key: KeyRef
    handle: Any


class _EccPrivateKey(tpm_ecc_private_key):  # type: ignore[misc] # untyped, like all of tpm2-pytss
    """tpm2-pytss's face of a loaded key towards cryptography, with the public part that is known already.

    The class it comes from asks the TPM for the public part, decodes it anew at each use, and looks at it again before
    it signs; that took a tenth of a request's time (``docs/performance.md``).
    """

    def __init__(self, sign: _Sign, public_key: ec.EllipticCurvePublicKey) -> None:
        self._sign = sign
        self._public_key = public_key

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public_key.curve

    def sign(self, data: bytes, signature_algorithm: ec.ECDSA) -> bytes:
        """DER [RFC 3279 2.2.3]."""
        signature = self._sign(data, TPM2_ALG.ECDSA, signature_algorithm.algorithm)
        # TPMT_SIGNATURE: two algorithm identifiers, then r and s [TPM 2.0 part 2, 11.2.4.2 and 11.3.4].
        return encode_dss_signature(*_two_numbers(signature.marshal()[4:]))


class _RsaPrivateKey(tpm_rsa_private_key):  # type: ignore[misc] # as above
    """The same for RSA, with PKCS #1 v1.5 padding [RFC 8017 8.2]: what the algorithms of the contract are."""

    def __init__(self, sign: _Sign, public_key: rsa.RSAPublicKey) -> None:
        self._sign = sign
        self._public_key = public_key

    def public_key(self) -> rsa.RSAPublicKey:
        return self._public_key

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def sign(self, data: bytes, padding: AsymmetricPadding, algorithm: hashes.HashAlgorithm) -> bytes:
        if not isinstance(padding, PKCS1v15):
            raise ValueError(f"{padding.name} is none of the contract's")  # noqa: TRY004 - as cryptography's own keys say it
        return bytes(self._sign(data, TPM2_ALG.RSASSA, algorithm))


@cache
def _signing_scheme(scheme: Any, hash_name: str) -> TPMT_SIG_SCHEME:
    if hash_name not in _HASHES:
        raise ValueError(f"{hash_name} is none of the contract's")
    details = TPMU_SIG_SCHEME(any=TPMS_SCHEME_HASH(hashAlg=_HASHES[hash_name]))
    return TPMT_SIG_SCHEME(scheme=scheme, details=details)


def _public_der(kind: KeyType, public: TPM2B_PUBLIC) -> bytes:
    """The subjectPublicKeyInfo of a key that the TPM made."""
    if isinstance(kind, RsaModulus):
        rsa_der: bytes = public.publicArea.to_der()
        return rsa_der
    point = ec.EllipticCurvePublicNumbers(*_two_numbers(public.publicArea.unique.ecc.marshal()), _POINTS[kind])
    return point.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _two_numbers(marshalled: bytes) -> tuple[int, int]:
    """Two big-endian numbers, each behind its length in two bytes: r and s, or the coordinates of a point.

    tpm2-pytss would give them as attributes, which takes ten times as long as to marshal the structure; see
    ``docs/performance.md``.
    """
    middle = 2 + int.from_bytes(marshalled[:2], "big")
    return int.from_bytes(marshalled[2:middle], "big"), int.from_bytes(marshalled[middle + 2 :], "big")


def _own(key: KeyRef) -> None:
    if key.scheme != _SCHEME:
        raise KeyStoreError(
            f"key {key.key_id} was made by a {key.scheme}: key store, and this one is {_SCHEME}:",
            reason="key_of_another_store",
        )


def _blob(key: KeyRef) -> TSSPrivKey:
    """The wrapped private part of a key of ours, with the public part that the TPM wants beside it."""
    _own(key)
    try:
        return TSSPrivKey.from_der(key.private)
    except (ValueError, TypeError, TSS2_Exception):
        raise _damaged(key) from None


def _damaged(key: KeyRef) -> KeyStoreError:
    return KeyStoreError(
        f"what is on record of key {key.key_id} cannot be read",
        reason="key_damaged",
        hint="restore a backup of the state directory, or ask for a new certificate",
    )


def _code(error: TSS2_Exception) -> int:
    """The return code; where a resource manager answers in the TPM's place, with the code that the TPM would give."""
    code: int = error.rc
    return code & 0xFFFF if code & _RC_LAYER in _RC_RESOURCE_MANAGER and code & _RC_TPM else code


def _is_lost(error: TSS2_Exception) -> bool:
    """Whether the failure is between us and the TPM, in any layer of tpm2-tss, rather than the TPM's own answer."""
    return bool(_code(error) & _RC_LAYER)


def _printable(text: bytes) -> str:
    return "".join(chr(byte) for byte in text if chr(byte).isprintable() and chr(byte).isascii())


def _srk_template() -> TPMT_PUBLIC:
    """ECC P-256 storage key by the template of the TCG [TPM v2.0 Provisioning Guidance 7.5.1]."""
    symmetric = TPMT_SYM_DEF_OBJECT(
        algorithm=TPM2_ALG.AES, keyBits=TPMU_SYM_KEY_BITS(aes=128), mode=TPMU_SYM_MODE(aes=TPM2_ALG.CFB)
    )
    return TPMT_PUBLIC(
        type=TPM2_ALG.ECC,
        nameAlg=TPM2_ALG.SHA256,
        objectAttributes=_SRK_ATTRIBUTES,
        parameters=_ecc_parameters(TPM2_ECC.NIST_P256, symmetric),
    )


def _key_template(kind: KeyType) -> TPMT_PUBLIC:
    """A signing key. Its scheme stays NULL: one fixed to ECDSA with SHA-512 fails in TLS 1.2."""
    return TPMT_PUBLIC(
        type=TPM2_ALG.ECC if isinstance(kind, EllipticCurve) else TPM2_ALG.RSA,
        nameAlg=TPM2_ALG.SHA256,
        objectAttributes=KEY_ATTRIBUTES,
        parameters=_key_parameters(kind),
    )


@cache
def _marshalled_template(kind: KeyType) -> TPM2B_TEMPLATE:
    """The same as TPM2_CreateLoaded wants it."""
    return TPM2B_TEMPLATE(_key_template(kind).marshal())


def _key_parameters(kind: KeyType) -> TPMU_PUBLIC_PARMS:
    none = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
    if isinstance(kind, EllipticCurve):
        return _ecc_parameters(_CURVES[kind], none)
    scheme = TPMT_RSA_SCHEME(scheme=TPM2_ALG.NULL)
    # An exponent of 0 stands for 65537 [TPM 2.0 part 2, 12.2.3.5].
    return TPMU_PUBLIC_PARMS(rsaDetail=TPMS_RSA_PARMS(symmetric=none, scheme=scheme, keyBits=kind.bits, exponent=0))


def _ecc_parameters(curve: Any, symmetric: TPMT_SYM_DEF_OBJECT) -> TPMU_PUBLIC_PARMS:
    scheme = TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL)
    kdf = TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL)
    return TPMU_PUBLIC_PARMS(eccDetail=TPMS_ECC_PARMS(symmetric=symmetric, scheme=scheme, curveID=curve, kdf=kdf))


def _pages(esapi: ESAPI, capability: Any, member: str, number: Callable[[Any], int], first: int) -> Iterator[Any]:
    """Every entry of a capability from `first` on; a TPM may hand them out in pages [TPM 2.0 part 3, 30.2]."""
    more = True
    while more:
        more, page = esapi.get_capability(capability, first, _PAGE)
        entries = list(getattr(page.data, member))
        yield from entries
        if not entries:
            return
        first = number(entries[-1]) + 1


def _handles(esapi: ESAPI, first: int, last: int) -> list[int]:
    handles = (int(handle) for handle in _pages(esapi, TPM2_CAP.HANDLES, "handles", int, first))
    return [handle for handle in handles if handle <= last]


def _persistent(esapi: ESAPI, handle: int) -> bool:
    return handle in _handles(esapi, handle, handle)


def _algorithms(esapi: ESAPI) -> set[int]:
    return {int(entry.alg) for entry in _pages(esapi, TPM2_CAP.ALGS, "algorithms", lambda entry: int(entry.alg), 0)}


def _curves(esapi: ESAPI) -> set[int]:
    return {int(curve) for curve in _pages(esapi, TPM2_CAP.ECC_CURVES, "eccCurves", int, 0)}


def _properties(esapi: ESAPI) -> dict[int, int]:
    """The fixed properties [TPM 2.0 part 2, 6.13]."""
    first = int(TPM2_PT.FIXED)
    entries = _pages(esapi, TPM2_CAP.TPM_PROPERTIES, "tpmProperties", lambda entry: int(entry.property), first)
    return {int(entry.property): int(entry.value) for entry in entries}
