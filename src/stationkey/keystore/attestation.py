"""The TPM's side of attestation: the attestation key, TPM2_Certify, and the opening of a challenge.

The attestation key (AK) is a restricted ECC P-256 key: the TPM signs with it only what it states itself. By default it
is a primary key of the endorsement hierarchy, made by a fixed template each time that it is needed. So it is always the
same, needs no storage, and survives TPM2_Clear, which leaves the seed of that hierarchy as it is.

Everything here runs on a context that a key store lends (`stationkey.keystore.Lending`). At most two objects are loaded
at a time, so that a bare TPM with three slots has room; they are unloaded in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_ECC, TPM2_SE, TPMA_OBJECT, TPMA_SESSION
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_ECC_PARMS,
    TPMS_SCHEME_HASH,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
    TPMT_SYM_DEF_OBJECT,
    TPMU_ASYM_SCHEME,
    TPMU_PUBLIC_PARMS,
)
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from stationkey.attestation.credential import activation
from stationkey.attestation.documents import (
    MAX_CERTIFICATE,
    MAX_ENDORSEMENT_KEYS,
    AttestationKey,
    Challenge,
    EndorsementKey,
    Evidence,
)
from stationkey.attestation.structures import Attribute, Public, kind_of, read_public, spki_of, unwrap
from stationkey.attestation.trust import certified_key
from stationkey.attestation.verifier import read_ak_public
from stationkey.errors import KeyStoreError, NotVerified
from stationkey.keystore import KeyRef, Lending
from stationkey.keystore.tpm2 import _code, _handles, _is_lost

AK_ATTRIBUTES: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.RESTRICTED  # signs nothing from outside that looks like a TPM's own statement
    | TPMA_OBJECT.SIGN_ENCRYPT
)
"""Attributes of the attestation key that is made here [TPM 2.0 part 2, 8.3]."""

_EK_TEMPLATES: Final = {
    "EK-ECC256": "secp256r1",
    "EK-RSA2048": "RSA-2048",
    "EK-HIGH-RSA2048": "RSA-2048",
    "EK-HIGH-ECC256": "secp256r1",
    "EK-HIGH-ECC384": "secp384r1",
    "EK-HIGH-ECC521": "secp521r1",
    "EK-HIGH-RSA3072": "RSA-3072",
    "EK-HIGH-RSA4096": "RSA-4096",
}
"""Of the TCG's EK Credential Profile, by their names in tpm2-pytss, and what kind of key each makes."""
_USUAL_EK_TEMPLATES: Final = ("EK-ECC256", "EK-RSA2048")
"""Those that a TPM may have without a certificate."""
_EK_HANDLES: Final = (0x81010000, 0x8101FFFF)
"""Where endorsement keys persist [TCG TPM v2.0 Provisioning Guidance 7.8]."""
_EK_ATTRIBUTES: Final = Attribute.FIXED_TPM | Attribute.RESTRICTED | Attribute.DECRYPT

_NV_PART: Final = 512  # every TPM reads so much at a time
_NO_SENSITIVE: Final = TPM2B_SENSITIVE_CREATE()
_NO_SYMMETRIC: Final = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)

_RC_FORMAT_ONE: Final = 0x080
_FORMAT_ONE: Final = 0x0BF  # bits of a return code that say what is wrong, and not where [TPM 2.0 part 2, 6.6.2]
_RC_HIERARCHY: Final = 0x085
_RC_AUTH: Final = frozenset({0x08E, 0x0A2})  # TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationTerms:
    """What the operator has set.

    Attributes:
        ak_handle: persistent handle of a provisioned attestation key; None for the one made here.
        endorsement_auth: authorisation value of the endorsement hierarchy.
    """

    ak_handle: int | None = None
    endorsement_auth: bytes = field(default=b"", repr=False)


def attest(
    store: Lending,
    key: KeyRef,
    *,
    qualifying: bytes,
    terms: AttestationTerms,
    challenge: Challenge | None = None,
) -> Evidence:
    """Have the TPM state that it holds `key`.

    Args:
        store: where the key is.
        key: the key.
        qualifying: goes into the statement, see `stationkey.attestation.verifier.qualifying_data`.
        terms: see there.
        challenge: opened, where one is given, and the evidence says so.

    Raises:
        KeyStoreError: the key is not of this TPM, the attestation key or the endorsement hierarchy cannot be used, the
            challenge is not for this TPM, or the device failed.
    """
    # First, and apart: with the key loaded too, a bare TPM would have no slot left.
    secret = None if challenge is None else store.lend(None, lambda esapi, _: _activate(esapi, challenge, terms))

    def certify(esapi: ESAPI, handle: Any) -> Evidence:
        public = esapi.read_public(handle)[0].marshal()
        with _attestation_key(esapi, terms) as (ak, ak_public):
            statement, signature = esapi.certify(handle, ak, qualifying, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL))
        attestation = bytes(statement)
        return Evidence(
            key_public=public,
            attestation=attestation,
            signature=signature.marshal(),
            attestation_key=AttestationKey(public=ak_public, endorsement_keys=_told(_at_hand(esapi))),
            activation=None if secret is None else activation(secret, attestation),
        )

    return store.lend(key, certify)


def attestation_key(store: Lending, *, terms: AttestationTerms, alone: bool = False) -> AttestationKey:
    """The attestation key, and the endorsement keys that the TPM has, those by the usual templates made if need be.

    Args:
        store: where they are.
        terms: see there.
        alone: the attestation key alone: an RSA endorsement key takes a chip seconds.

    Raises:
        KeyStoreError: as of `attest`.
    """

    def look(esapi: ESAPI, _: Any) -> AttestationKey:
        with _attestation_key(esapi, terms) as (_handle, public):
            pass
        if alone:
            return AttestationKey(public=public)
        found = _at_hand(esapi)
        with _endorsement(esapi, terms) as hierarchy:
            for name in _USUAL_EK_TEMPLATES:
                if (made := hierarchy.make_ek(name)) is not None:
                    handle, ek = made
                    _flush(esapi, handle)
                    found.setdefault(_spki(ek), _Found()).public = ek
        return AttestationKey(public=public, endorsement_keys=_told(found))

    return store.lend(None, look)


@contextmanager
def _attestation_key(esapi: ESAPI, terms: AttestationTerms) -> Iterator[tuple[Any, bytes]]:
    """The attestation key, loaded: its handle, and its TPM2B_PUBLIC."""
    if terms.ak_handle is not None:
        yield _provisioned_ak(esapi, terms.ak_handle)
        return
    with _endorsement(esapi, terms) as hierarchy:
        handle, public = hierarchy.create_primary(TPM2B_PUBLIC(publicArea=_ak_template()))
        try:
            yield handle, public
        finally:
            _flush(esapi, handle)


def _provisioned_ak(esapi: ESAPI, handle: int) -> tuple[Any, bytes]:
    if handle not in _handles(esapi, handle, handle):
        raise KeyStoreError(
            f"there is no attestation key at {handle:#x}",
            reason="ak_unfit",
            hint="set [tpm] ak_handle to where it is, or to 0 for one that needs no provisioning",
        )
    ak = esapi.tr_from_tpmpublic(handle)
    public = esapi.read_public(ak)[0].marshal()
    try:
        read_ak_public(AttestationKey(public=public))
    except NotVerified as error:
        raise KeyStoreError(f"at {handle:#x} in the TPM: {error.message}", reason="ak_unfit") from None
    return ak, public


def _ak_template() -> TPMT_PUBLIC:
    """ECDSA with SHA-256 on P-256, no policy, nothing in `unique`: docs/attestation.md makes the same by tpm2-tools."""
    scheme = TPMT_ECC_SCHEME(
        scheme=TPM2_ALG.ECDSA, details=TPMU_ASYM_SCHEME(anySig=TPMS_SCHEME_HASH(hashAlg=TPM2_ALG.SHA256))
    )
    parameters = TPMS_ECC_PARMS(
        symmetric=TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
        scheme=scheme,
        curveID=TPM2_ECC.NIST_P256,
        kdf=TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL),
    )
    return TPMT_PUBLIC(
        type=TPM2_ALG.ECC,
        nameAlg=TPM2_ALG.SHA256,
        objectAttributes=AK_ATTRIBUTES,
        parameters=TPMU_PUBLIC_PARMS(eccDetail=parameters),
    )


def _flush(esapi: ESAPI, handle: Any) -> None:
    with suppress(TSS2_Exception):  # what is lost holds nothing, and its own error is on the way
        esapi.flush_context(handle)


# The endorsement hierarchy.


@contextmanager
def _session(esapi: ESAPI, kind: Any) -> Iterator[Any]:
    session = esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, kind, _NO_SYMMETRIC, TPM2_ALG.SHA256)
    try:
        esapi.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION)
        yield session
    finally:
        _flush(esapi, session)


@contextmanager
def _endorsement(esapi: ESAPI, terms: AttestationTerms) -> Iterator[_Hierarchy]:
    """The endorsement hierarchy, authorised by a session: its value, where it has one, never crosses the bus."""
    esapi.tr_set_auth(ESYS_TR.ENDORSEMENT, terms.endorsement_auth)
    with _session(esapi, TPM2_SE.HMAC) as session:
        yield _Hierarchy(esapi, session, has_auth=bool(terms.endorsement_auth))


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """What can be done with the authorisation of the endorsement hierarchy."""

    esapi: ESAPI
    session: Any
    has_auth: bool

    def create_primary(self, template: TPM2B_PUBLIC) -> tuple[Any, bytes]:
        """A primary key, to be flushed by the caller: its handle, and its TPM2B_PUBLIC."""
        try:
            handle, public, *_ = self.esapi.create_primary(
                _NO_SENSITIVE, template, ESYS_TR.ENDORSEMENT, session1=self.session
            )
        except TSS2_Exception as error:
            self._explain(error)
            raise
        return handle, public.marshal()

    def make_ek(self, name: str) -> tuple[Any, bytes] | None:
        """An endorsement key by a template of the TCG, always the same; None where the TPM cannot make one."""
        _, template = _template(self.esapi, name)
        try:
            return None if template is None else self.create_primary(template)
        except TSS2_Exception as error:
            if _is_lost(error) or not _code(error) & _RC_FORMAT_ONE:
                raise
            return None  # TPM_RC_CURVE, TPM_RC_VALUE, TPM_RC_KEY_SIZE

    @contextmanager
    def policy_secret(self) -> Iterator[Any]:
        """A session that satisfies the policy of the usual endorsement keys: PolicySecret of this hierarchy."""
        with _session(self.esapi, TPM2_SE.POLICY) as policy:
            try:
                self.esapi.policy_secret(ESYS_TR.ENDORSEMENT, policy, expiration=0, session1=self.session)
            except TSS2_Exception as error:
                self._explain(error)
                raise
            yield policy

    def _explain(self, error: TSS2_Exception) -> None:
        """Raise the words for an error that is about the hierarchy."""
        number = _code(error) & _FORMAT_ONE
        if _is_lost(error):
            return
        if number == _RC_HIERARCHY:
            raise KeyStoreError(
                "the endorsement hierarchy of the TPM is disabled",
                reason="endorsement_unusable",
                hint="the firmware may have a switch for it; or provision an attestation key ([tpm] ak_handle)",
            ) from None
        if number in _RC_AUTH:
            given = "not the one that was given" if self.has_auth else "none was given"
            raise KeyStoreError(
                f"the endorsement hierarchy of the TPM has an authorisation value, and {given}",
                reason="endorsement_auth",
                hint="name the file that it is in: [tpm] endorsement_auth",
            ) from None


# Endorsement keys.


@dataclass(slots=True)
class _Found:
    """An endorsement key as far as it is known."""

    public: bytes | None = None
    certificate: bytes | None = None
    handle: int | None = None


def _at_hand(esapi: ESAPI) -> dict[bytes, _Found]:
    """The endorsement keys that can be told of without making one, by their subjectPublicKeyInfo."""
    found: dict[bytes, _Found] = {}
    for handle in _handles(esapi, *_EK_HANDLES):
        public = esapi.read_public(esapi.tr_from_tpmpublic(handle))[0].marshal()
        with suppress(NotVerified):  # something else persists there
            if not read_public(public, "an endorsement key").lacking(_EK_ATTRIBUTES):
                found[_spki(public)] = _Found(public=public, handle=handle)
    for name in _EK_TEMPLATES:
        certificate, _ = _template(esapi, name)
        if certificate is not None and (key := certified_key(certificate)) is not None:
            found.setdefault(spki_of(key), _Found()).certificate = certificate
    return found


def _told(found: dict[bytes, _Found]) -> tuple[EndorsementKey, ...]:
    told = (EndorsementKey(public=each.public, certificate=each.certificate) for each in found.values())
    return tuple(islice(told, MAX_ENDORSEMENT_KEYS))


def _spki(public: bytes) -> bytes:
    return read_public(public, "an endorsement key").spki


def _template(esapi: ESAPI, name: str) -> tuple[bytes | None, TPM2B_PUBLIC | None]:
    """Certificate and template of an endorsement key, by the TPM's NV memory [EK Credential Profile 2.5, 2.2.1]."""
    try:
        certificate, template = create_ek_template(name, lambda index: _read_nv(esapi, int(index)))
    except ValueError:  # a high range without a certificate
        return None, None
    return _without_padding(certificate), template


def _without_padding(certificate: bytes | None) -> bytes | None:
    """The DER of a certificate without what fills its NV index up; None where it is no DER, or too long to be told."""
    if certificate is None or certificate[:2] != b"\x30\x82":
        return None
    length = 4 + int.from_bytes(certificate[2:4], "big")
    return certificate[:length] if length <= min(len(certificate), MAX_CERTIFICATE) else None


def _read_nv(esapi: ESAPI, index: int) -> bytes:
    """The content of an NV index that everybody may read.

    Raises:
        NoSuchIndex: it is not there, or not for everybody.
    """
    if index not in _handles(esapi, index, index):
        raise NoSuchIndex(index)
    handle = esapi.tr_from_tpmpublic(index)
    size, content = int(esapi.nv_read_public(handle)[0].nvPublic.dataSize), b""
    try:
        while len(content) < size:
            content += bytes(esapi.nv_read(handle, min(_NV_PART, size - len(content)), len(content)))
    except TSS2_Exception as error:
        if _is_lost(error):
            raise
        raise NoSuchIndex(index) from None  # never written, or it has an authorisation value
    return content


# The challenge.


def _activate(esapi: ESAPI, challenge: Challenge, terms: AttestationTerms) -> bytes:
    """Open a challenge [TPM 2.0 part 3, 12.5]; what was in it."""
    blob = TPM2B_ID_OBJECT(unwrap(challenge.credential_blob, "the challenge's credential"))
    encrypted = TPM2B_ENCRYPTED_SECRET(unwrap(challenge.encrypted_secret, "the challenge's encrypted secret"))
    with (
        _attestation_key(esapi, terms) as (ak, ak_public),
        _endorsement(esapi, terms) as hierarchy,
    ):
        if read_public(ak_public, "the attestation key").name != challenge.ak_name:
            raise _not_ours("it is for another attestation key")
        with _challenged_ek(esapi, challenge.ek, hierarchy) as (ek, public), ExitStack() as sessions:
            session = ESYS_TR.PASSWORD
            if Attribute.USER_WITH_AUTH not in public.attributes:
                session = sessions.enter_context(hierarchy.policy_secret())
            try:
                return bytes(esapi.activate_credential(ak, ek, blob, encrypted, session2=session))
            except TSS2_Exception as error:
                if _is_lost(error):
                    raise
                raise _not_ours(f"the TPM does not open it ({error.rc:#x})") from None


@contextmanager
def _challenged_ek(esapi: ESAPI, spki: bytes, hierarchy: _Hierarchy) -> Iterator[tuple[Any, Public]]:
    """The endorsement key of this subjectPublicKeyInfo, loaded."""
    for key in _at_hand(esapi).values():
        if key.handle is not None and key.public is not None and _spki(key.public) == spki:
            yield esapi.tr_from_tpmpublic(key.handle), read_public(key.public, "the endorsement key")
            return
    kind = kind_of(spki)
    for name in (name for name, template_kind in _EK_TEMPLATES.items() if template_kind == kind):
        if (made := hierarchy.make_ek(name)) is None:
            continue
        handle, public = made
        try:
            if _spki(public) == spki:
                yield handle, read_public(public, "the endorsement key")
                return
        finally:
            _flush(esapi, handle)
    raise _not_ours("it is for another endorsement key")


def _not_ours(what: str) -> KeyStoreError:
    return KeyStoreError(
        f"the challenge cannot be opened here: {what}",
        reason="challenge_not_ours",
        hint="was it made for this station, and with its present attestation key?",
    )
