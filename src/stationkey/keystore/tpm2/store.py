"""The ``tpm2:`` key store: keys born in a TPM 2.0, usable only inside it.

Each key is an ordinary child of the storage root key (SRK): the TPM hands out its private part only wrapped by the SRK,
and that blob goes to the ledger. The TPM itself keeps nothing of a key, so the number of keys is not bounded by its
slots, and destroying the blob destroys the key.

The head of `stationkey.keystore.tpm2.device` says what is done when the TPM is lost, reset, cleared or full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, Final, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct
from msgspec.structs import replace

from stationkey.config.settings import TpmTerms
from stationkey.contract.profiles import Algorithm, EllipticCurve, KeyType
from stationkey.errors import KeyStoreError, Scope, UnsupportedAlgorithm
from stationkey.keystore.protocol import KeyRef, Support
from stationkey.keystore.refusal import refuse_foreign
from stationkey.keystore.signing import Buffer
from stationkey.keystore.tpm2 import capabilities, errors, signing, templates
from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.device import Device
from stationkey.keystore.tpm2.keyfile import SEALED, KeyFile, policy_digest
from stationkey.keystore.tpm2.pcr import PcrPolicy
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.sealed import damaged
from stationkey.keystore.tpm2.signing import ECDSA, RSASSA, EccPrivateKey, RsaPrivateKey, signing_scheme
from stationkey.keystore.tpm2.templates import KEY_ATTRIBUTES
from stationkey.x509.csr import PrivateKey, PublicKey

__all__ = ["KEY_ATTRIBUTES", "Tpm2KeyStore"]

T = TypeVar("T")

_SCHEME: Final = "tpm2"


class Tpm2KeyStore(Device):
    """Keys in the TPM behind a TCTI, with one context that is kept until the TPM is lost.

    Args:
        tcti: name and configuration of a TPM command transmission interface, ``device:/dev/tpmrm0`` for example. Always
            given: without one, tpm2-tss falls through to whatever listens on localhost:2321.
        terms: storage root key, authorisation values, policy and sessions.
        state_dir: the state directory, where some of these need a file of their own; see
            `stationkey.keystore.tpm2.sealed`.
        guest: unload nothing that others have loaded, as behind a resource manager.
    """

    def __init__(
        self, tcti: str, *, terms: TpmTerms | None = None, state_dir: Path | None = None, guest: bool = False
    ) -> None:
        super().__init__(tcti, terms or TpmTerms(), state_dir, guest=guest)
        self.uri = f"{_SCHEME}:{tcti}"
        self._unsealed: dict[Path, bytes] = {}
        # A key just made is loaded already, and one just signed with still is: until `unload`, or the next command.
        self._loaded: _Loaded | None = None
        self._supported: dict[Algorithm, Support] = {}
        self._has_create_loaded = True

    @property
    def description(self) -> str:
        """Vendor and firmware version, as the TPM tells them, and what keys are protected by besides."""
        return self._with_device(lambda: capabilities.description(self._context)) + self._protection()

    @property
    def identity(self) -> str:
        """The name of the storage root key, which no other TPM has."""
        return f"{_SCHEME}:{self._with_device(lambda: self._srk_name).hex()}"

    def _protection(self) -> str:
        words = []
        if self._terms.key_auth is not None:
            words.append("new keys have an authorisation value")
        if self._registers is not None:
            words.append(f"new keys are bound to {self._registers}")
        if self._terms.session != "none":
            words.append(f"sessions: {self._terms.session}")
        return "".join(f"; {each}" for each in words)

    def supports(self, algorithm: Algorithm) -> Support:
        return self._with_device(lambda: self._supports(algorithm))

    def generate(self, algorithm: Algorithm) -> KeyRef:
        return self._with_device(lambda: self._generate(algorithm))

    @contextmanager
    def signer(self, key: KeyRef) -> Iterator[PrivateKey]:
        self._with_device(lambda: self._load(key))
        known = None if self._loaded is None else self._loaded.public_key
        public_key, sign = known or self.public_key(key), partial(self._sign, key)
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            yield EccPrivateKey(sign, public_key)
        else:
            yield RsaPrivateKey(sign, public_key)

    def check(self, key: KeyRef, *, as_new: bool = False) -> None:
        """See `stationkey.keystore.Protecting`.

        A key with an authorisation value or a policy has to sign something: nothing less shows that these are still
        right.
        """
        if as_new:
            self._refuse_other_protection(key)
        self._with_device(lambda: self._check(key))

    def auth_value(self, private: bytes) -> bytes:
        try:
            file = KeyFile.read(private)
            policy = PcrPolicy.read(file.policy)
        except ValueError:
            raise KeyStoreError("the key cannot be read", reason="key_damaged", scope=Scope.KEY) from None
        if file.empty_auth:
            return b""
        if self._terms.key_auth == "generated":
            return self._with_device(lambda: self._auth_of(file, policy))
        return self._auth_of(file, policy)

    def public_key(self, key: KeyRef) -> PublicKey:
        try:
            return serialization.load_der_public_key(key.public)  # type: ignore[return-value] # EC or RSA: this store made it
        except (ValueError, CryptographyUnsupported):
            raise _damaged(key) from None

    def destroy(self, key: KeyRef) -> None:
        """Unload it where it is loaded. The TPM holds nothing else of it: the wrapped blob is all there is."""
        refuse_foreign(key, _SCHEME)
        if self._loaded is not None and self._loaded.key == key:
            self.unload()

    def lend(self, key: KeyRef | None, use: Callable[[Context, Any, Any], T]) -> T:
        """See `stationkey.keystore.Lending`. TPM2_Certify takes the value of a key, whether or not it has a policy."""

        def command() -> T:
            handle = None if key is None else self._load(key, lent=True)
            return use(self._context, handle, self._sessions.authorising())

        return self._with_device(command)

    def unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        # A TPM that is lost has unloaded it already, or a new context will.
        if loaded is not None and self._esapi is not None and not self._abandoned:
            try:
                self._context.flush_context(loaded.handle)
            except TpmError:
                self._forget()
        super().unload()

    def _emptied(self) -> None:
        self._loaded = None

    def _unknown(self) -> None:
        self._supported.clear()
        self._unsealed.clear()

    # Authorisation values.

    def _auth_of(self, file: KeyFile, policy: PcrPolicy | None) -> bytes:
        """The authorisation value of a key that has one."""
        if self._terms.key_auth is None:
            raise errors.key_auth_wrong(
                "the key has an authorisation value, and [tpm] key_auth is not set",
                hint="name the value that the key was made with",
            )
        if self._terms.key_auth != "generated":
            return self._secret("key_auth")
        value = self._sealed_auth(file.parent, policy, make=False)
        if value is None:
            raise errors.key_auth_wrong(
                "the authorisation value of the key is not in the state directory",
                hint="restore tpm/ from a backup; or, was the TPM cleared or exchanged? Then ask for a new certificate",
            )
        return value

    def _new_auth(self, policy: PcrPolicy | None) -> bytes:
        """That of a new key; empty for none."""
        if self._terms.key_auth == "generated":
            return self._sealed_auth(self._terms.srk_handle, policy, make=True) or b""
        return self._secret("key_auth")

    def _sealed_auth(self, parent: int, policy: PcrPolicy | None, *, make: bool) -> bytes | None:
        """Return the value sealed under a parent, for keys with this policy, or None."""
        assert self._kept is not None
        under = self._parent(parent)
        commands = policy.commands(auth=False) if policy is not None else ()
        path = self._kept.sealed_file(bytes(self._context.tr_get_name(under)), policy_digest(commands))
        if path not in self._unsealed:
            seal = partial(self._seal, parent, policy) if make else None
            file = self._kept.sealed(path, seal)
            if file is None:
                return None
            scope = Scope.STORE if make else Scope.REQUEST
            self._unsealed[path] = self._unseal(replace(file, parent=parent), policy, path, scope)
        return self._unsealed[path]

    def _seal(self, parent: int, policy: PcrPolicy | None) -> KeyFile:
        """A new random value, of 192 bits in 32 characters that OpenSSL can be given as a password."""
        self._refuse_if_abandoned()
        commands = policy.commands(auth=False) if policy is not None else ()
        secret = templates.sensitive(data=token_urlsafe(24).encode("ascii"))
        with self._under(parent) as session:
            private, public = self._context.create(
                self._parent(parent), secret, templates.sealed(policy_digest(commands)), session
            )
        return KeyFile(public, private, parent, policy=commands, type=SEALED)

    def _unseal(self, file: KeyFile, policy: PcrPolicy | None, path: Path, scope: Scope) -> bytes:
        try:
            handle = self._load_file(file)
        except (TpmError, ValueError) as error:
            if isinstance(error, TpmError) and rc.code(error) != rc.INTEGRITY:
                raise
            raise damaged(path, scope) from None
        try:
            with self._using(policy) as session:
                return bytes(self._context.unseal(handle, session))
        finally:
            self._context.flush_context(handle)

    # The commands. Each runs inside _with_device.

    def _supports(self, algorithm: Algorithm) -> Support:
        if algorithm not in self._supported:
            self._supported[algorithm] = capabilities.support(self._context, algorithm, self._watching)
        return self._supported[algorithm]

    def _generate(self, algorithm: Algorithm) -> KeyRef:
        self._make_room()
        support = self._supports(algorithm)
        if support.key_type is None:
            raise UnsupportedAlgorithm(
                f"{algorithm} cannot be served: {support.missing}", reason="algorithm_unsupported_by_tpm"
            )
        policy = None
        if self._registers is not None:
            policy = PcrPolicy.of(self._registers, self._registers.read(self._context, *self._watching()))
        auth, plain = self._new_auth(policy), self._is_plain(policy)
        handle, file = self._create_loaded(support.key_type, auth, policy, plain=plain)
        try:
            public_key = signing.public_key(support.key_type, file.public)
        except ValueError:
            raise errors.altered("an invalid public key") from None
        public = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        key = KeyRef(scheme=_SCHEME, key_type=support.key_type, public=public, private=file.der())
        self._keep_loaded(_Loaded(key, handle, policy, auth, plain=plain, public_key=public_key))
        return key

    def _is_plain(self, policy: PcrPolicy | None) -> bool:
        """Whether keys with this policy, or None, are used without a session: see `Context`."""
        return policy is None and self._terms.session == "none"

    def _create_loaded(
        self, kind: KeyType, auth: bytes, policy: PcrPolicy | None, *, plain: bool
    ) -> tuple[Any, KeyFile]:
        """Handle and file of a new key, by one command where the TPM has it."""
        commands = policy.commands(auth=bool(auth)) if policy is not None else ()
        secret, template = templates.sensitive(auth=auth), templates.key(kind, policy_digest(commands))
        srk = self._terms.srk_handle
        file = partial(KeyFile, parent=srk, empty_auth=not auth, policy=commands)
        if self._has_create_loaded:
            try:
                with self._under(srk, plain=plain) as session:
                    handle, private, public = self._context.create_loaded(
                        self._parent(srk, plain=plain), secret, template, session
                    )
            except TpmError as error:
                if rc.code(error) != rc.COMMAND_CODE:
                    raise
                self._has_create_loaded = False
            else:
                return handle, file(public, private)
        with self._under(srk, plain=plain) as session:
            private, public = self._context.create(self._parent(srk, plain=plain), secret, template, session)
        created = file(public, private)
        return self._load_file(created, plain=kind if plain else None), created

    def _load(self, key: KeyRef, *, lent: bool = False) -> Any:
        """The handle of a key, loaded now if need be; an ESYS_TR if it is `lent`."""
        loaded = self._loaded
        if loaded is not None and loaded.key == key and not (lent and loaded.plain):
            return loaded.handle
        file, policy = _file(key)
        self._make_room()
        auth = b"" if file.empty_auth else self._auth_of(file, policy)
        plain = self._is_plain(policy) and not lent
        try:
            handle = self._load_file(file, plain=key.key_type if plain else None)
        except ValueError:
            raise _damaged(key) from None
        self._keep_loaded(_Loaded(key, handle, policy, auth, plain=plain))
        return handle

    def _load_file(self, file: KeyFile, *, plain: KeyType | None = None) -> Any:
        """Load under the parent that the file names.

        Args:
            file: the key.
            plain: its type, if it is used without a session.

        Raises:
            ValueError: it is damaged, and was not sent.
        """
        parent = self._parent(file.parent, plain=plain is not None)
        private, public = file.private, file.public
        try:
            if plain is not None and not (templates.is_sized(private) and templates.is_key(plain, public)):
                from stationkey.keystore.tpm2.esapi import marshalled_again  # noqa: PLC0415 - only for other keys

                private, public = marshalled_again(private, public)
            with self._under(file.parent, plain=plain is not None) as session:
                return self._context.load(parent, private, public, session)
        except TpmError as error:
            if error.rc & rc.LAYER == rc.MARSHALLING:
                raise ValueError("damaged") from None
            raise

    def _keep_loaded(self, loaded: _Loaded) -> None:
        self._loaded = loaded
        if loaded.auth and not loaded.plain and self._esapi is not None:
            self._context.tr_set_auth(loaded.handle, loaded.auth)

    @contextmanager
    def _using(self, policy: PcrPolicy | None, *, auth: bytes = b"", plain: bool = False) -> Iterator[Any]:
        """The session for a command that a key authorises: by its policy, where it has one; see `_under`."""
        try:
            if policy is None:
                yield auth if plain else self._sessions.authorising()
                return
            yield self._shown(policy, auth=bool(auth))
        except TpmError as error:
            code = rc.code(error)
            if self._begun is not None and (policy is not None or code in rc.WRONG_AUTH):
                self._begun.close()  # it may be the session that is wrong: what began it may have been altered
            if policy is not None and code == rc.POLICY_FAIL:
                raise errors.pcr_changed(policy.registers, f"{error.rc:#x}") from None
            if code in rc.WRONG_AUTH:
                with_sessions = self._terms.session != "none"
                if with_sessions and not auth:
                    failure = errors.altered(f"{error.rc:#x}")
                else:
                    failure = errors.key_auth_wrong(
                        f"the authorisation value is not the one that the key was made with ({error.rc:#x})",
                        hint="[tpm] key_auth must name the value of then; otherwise ask for a new certificate"
                        + ("; or the command was altered on its way to the TPM" if with_sessions else ""),
                    )
                if code == rc.BAD_AUTH and with_sessions:
                    raise errors.SessionInDoubtError(failure) from None
                raise failure from None
            raise

    def _shown(self, policy: PcrPolicy, *, auth: bool) -> Any:
        """A session to which a policy was shown."""
        session = self._sessions.policy()
        try:
            self._context.policy_pcr(session, policy.digest, policy.registers.structure())
        except TpmError as error:
            if rc.code(error) == rc.VALUE_1:
                raise errors.pcr_changed(policy.registers, f"{error.rc:#x}") from None
            raise
        if auth:
            self._context.policy_auth_value(session)
        return session

    def _sign(self, key: KeyRef, data: Buffer, scheme: int, algorithm: hashes.HashAlgorithm) -> bytes:
        digest = hashes.Hash(algorithm)
        digest.update(data)
        message, how = digest.finalize(), signing_scheme(scheme, algorithm.name)
        return self._with_device(lambda: self._sign_digest(key, message, how))

    def _sign_digest(self, key: KeyRef, digest: bytes, how: bytes) -> bytes:
        self._load(key)
        loaded = self._loaded
        assert loaded is not None
        with self._using(loaded.policy, auth=loaded.auth, plain=loaded.plain) as session:
            return self._context.sign(loaded.handle, digest, how, session)

    def _check(self, key: KeyRef) -> None:
        self._load(key)
        if self._loaded is not None and (self._loaded.auth or self._loaded.policy is not None):
            scheme = ECDSA if isinstance(key.key_type, EllipticCurve) else RSASSA
            self._sign_digest(key, bytes(32), signing_scheme(scheme, "sha256"))

    def _refuse_other_protection(self, key: KeyRef) -> None:
        file, policy = _file(key)
        registers = None if policy is None else policy.registers
        wanted = (self._terms.srk_handle, self._terms.key_auth is None, self._registers)
        if (file.parent, file.empty_auth, registers) != wanted:
            raise KeyStoreError(
                "the key was made with another protection than [tpm] asks for now",
                reason="key_protection_differs",
                scope=Scope.KEY,
            )

    def _make_room(self) -> None:
        """Unload the loaded key, before the next command needs its slot."""
        self.unload()
        if self._esapi is None:  # the TPM was lost meanwhile, as the attempt to unload showed
            self._open()


class _Loaded(Struct, frozen=True):
    """A key in one of the TPM's slots, and the authorisation that it needs.

    Attributes:
        handle: ESYS_TR; where it is `plain`, the TPM's own.
        public_key: if known.
    """

    key: KeyRef
    handle: Any
    policy: PcrPolicy | None
    auth: bytes
    plain: bool
    public_key: PublicKey | None = None

    def __repr__(self) -> str:
        """Show no authorisation value."""
        return f"_Loaded({self.key!r}, {self.handle!r})"


def _file(key: KeyRef) -> tuple[KeyFile, PcrPolicy | None]:
    """Return the key file of a key of ours: wrapped private part, public part and policy."""
    refuse_foreign(key, _SCHEME)
    try:
        file = KeyFile.read(key.private)
        return file, PcrPolicy.read(file.policy)
    except ValueError:
        raise _damaged(key) from None


def _damaged(key: KeyRef) -> KeyStoreError:
    return KeyStoreError(
        f"the record of key {key.key_id} is unreadable",
        reason="key_damaged",
        hint="restore a backup of the state directory, or ask for a new certificate",
        scope=Scope.KEY,
    )
