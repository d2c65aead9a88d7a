"""The TPM's side of attestation: the attestation key, TPM2_Certify, and the opening of a challenge.

The attestation key (AK) is a restricted ECC P-256 key: the TPM signs with it only what it states itself. By default it
is a primary key of the endorsement hierarchy, made by a fixed template each time that it is needed. So it is always the
same, needs no storage, and survives TPM2_Clear, which leaves the seed of that hierarchy as it is.

Everything here runs on a context that a key store lends (`stationkey.keystore.Lending`). At most two objects are loaded
at a time, so that a bare TPM with three slots has room; they are unloaded in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_ECC, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPMS_ECC_PARMS,
    TPMS_SCHEME_HASH,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF_OBJECT,
    TPMU_ASYM_SCHEME,
    TPMU_PUBLIC_PARMS,
)

from stationkey.attestation.credential import activation
from stationkey.attestation.documents import AttestationKey, Challenge, Evidence
from stationkey.attestation.structures import Attribute, read_public, unwrap
from stationkey.attestation.verifier import read_ak_public
from stationkey.errors import KeyStoreError, NotVerified
from stationkey.keystore.protocol import KeyRef, Lending
from stationkey.keystore.tpm2 import capabilities
from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.endorsement import challenged_ek, endorsement, endorsement_keys, flush, not_ours
from stationkey.keystore.tpm2.return_codes import TpmError

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationTerms:
    """The operator's settings.

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
        challenge: if given, it is answered in the evidence.

    Raises:
        KeyStoreError: the key is not of this TPM, the attestation key or the endorsement hierarchy cannot be used, the
            challenge is not for this TPM, or the device failed.
    """
    # First, and apart: with the key loaded too, a bare TPM would have no slot left.
    secret = None if challenge is None else store.lend(None, lambda esapi, *_: _activate(esapi, challenge, terms))

    def certify(esapi: Context, handle: Any, session: Any) -> Evidence:
        public = esapi.read_public(handle)[0].marshal()
        with _attestation_key(esapi, terms) as (ak, ak_public):
            statement, signature = esapi.certify(
                handle, ak, qualifying, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL), session1=session
            )
        attestation = bytes(statement)
        return Evidence(
            key_public=public,
            attestation=attestation,
            signature=signature.marshal(),
            attestation_key=AttestationKey(public=ak_public, endorsement_keys=endorsement_keys(esapi)),
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

    def look(esapi: Context, *_: Any) -> AttestationKey:
        with _attestation_key(esapi, terms) as (_handle, public):
            pass
        if alone:
            return AttestationKey(public=public)
        with endorsement(esapi, terms.endorsement_auth) as hierarchy:
            return AttestationKey(public=public, endorsement_keys=endorsement_keys(esapi, hierarchy))

    return store.lend(None, look)


@contextmanager
def _attestation_key(esapi: Context, terms: AttestationTerms) -> Iterator[tuple[Any, bytes]]:
    """The attestation key, loaded: its handle, and its TPM2B_PUBLIC."""
    if terms.ak_handle is not None:
        yield _provisioned_ak(esapi, terms.ak_handle)
        return
    with endorsement(esapi, terms.endorsement_auth) as hierarchy:
        handle, public = hierarchy.create_primary(TPM2B_PUBLIC(publicArea=_ak_template()))
        try:
            yield handle, public
        finally:
            flush(esapi, handle)


def _provisioned_ak(esapi: Context, handle: int) -> tuple[Any, bytes]:
    if handle not in capabilities.handles(esapi, handle, handle):
        raise KeyStoreError(
            f"no attestation key at {handle:#x}",
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


# The challenge.


def _activate(esapi: Context, challenge: Challenge, terms: AttestationTerms) -> bytes:
    """Open a challenge [TPM 2.0 part 3, 12.5], and return its secret."""
    try:
        blob = TPM2B_ID_OBJECT(unwrap(challenge.credential_blob, "its credential"))
        encrypted = TPM2B_ENCRYPTED_SECRET(unwrap(challenge.encrypted_secret, "its encrypted secret"))
    except (NotVerified, IndexError):  # the latter: longer than any that tpm2-tss has room for
        raise not_ours("no TPM has credentials of that size") from None
    with (
        _attestation_key(esapi, terms) as (ak, ak_public),
        endorsement(esapi, terms.endorsement_auth) as hierarchy,
    ):
        if read_public(ak_public, "the attestation key").name != challenge.ak_name:
            raise not_ours("it is for another attestation key")
        with challenged_ek(esapi, challenge.ek, hierarchy) as (ek, public), ExitStack() as sessions:
            session = ESYS_TR.PASSWORD
            if Attribute.USER_WITH_AUTH not in public.attributes:
                session = sessions.enter_context(hierarchy.policy_secret())
            try:
                return bytes(esapi.activate_credential(ak, ek, blob, encrypted, session2=session))
            except TpmError as error:
                if rc.is_lost(error) or rc.code(error) in rc.PASSING:
                    raise
                raise not_ours(f"the TPM does not open it ({error.rc:#x})") from None
