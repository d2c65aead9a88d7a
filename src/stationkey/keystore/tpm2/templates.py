"""Templates of the objects that the TPM creates [TPM 2.0 part 2, 12.2]."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_TEMPLATE,
    TPMS_ECC_PARMS,
    TPMS_KEYEDHASH_PARMS,
    TPMS_RSA_PARMS,
    TPMS_SENSITIVE_CREATE,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_KEYEDHASH_SCHEME,
    TPMT_PUBLIC,
    TPMT_RSA_SCHEME,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_PARMS,
    TPMU_SYM_KEY_BITS,
    TPMU_SYM_MODE,
)

from stationkey.contract.profiles import SECP256R1, SECP521R1, EllipticCurve, KeyType

KEY_ATTRIBUTES: Final = (
    TPMA_OBJECT.FIXEDTPM  # cannot be duplicated to another TPM
    | TPMA_OBJECT.FIXEDPARENT  # nor to another parent
    | TPMA_OBJECT.SENSITIVEDATAORIGIN  # made by the TPM, not imported
    | TPMA_OBJECT.USERWITHAUTH
    # Without NODA, three power cuts while the key is in use lock the TPM.
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.SIGN_ENCRYPT
)
"""Attributes of every key made here [TPM 2.0 part 2, 8.3]; one with a policy has not USERWITHAUTH, or its authorisation
value alone would do."""

SRK_NEEDED: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.DECRYPT
)
_SEALED: Final = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.NODA

CURVES: Final[dict[KeyType, Any]] = {SECP256R1: TPM2_ECC.NIST_P256, SECP521R1: TPM2_ECC.NIST_P521}
_NOTHING: Final = TPM2B_SENSITIVE_CREATE()


def srk() -> TPM2B_PUBLIC:
    """ECC P-256 storage key by the template of the TCG [TPM v2.0 Provisioning Guidance 7.5.1]."""
    symmetric = TPMT_SYM_DEF_OBJECT(
        algorithm=TPM2_ALG.AES, keyBits=TPMU_SYM_KEY_BITS(aes=128), mode=TPMU_SYM_MODE(aes=TPM2_ALG.CFB)
    )
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=SRK_NEEDED | TPMA_OBJECT.NODA,
            parameters=_ecc_parameters(TPM2_ECC.NIST_P256, symmetric),
        )
    )


def key(kind: KeyType, policy: bytes = b"") -> TPMT_PUBLIC:
    """A signing key. Its scheme stays NULL: one fixed to ECDSA with SHA-512 fails in TLS 1.2.

    Args:
        kind: curve or RSA size.
        policy: digest of the policy that its use needs; empty for none.
    """
    return TPMT_PUBLIC(
        type=TPM2_ALG.ECC if isinstance(kind, EllipticCurve) else TPM2_ALG.RSA,
        nameAlg=TPM2_ALG.SHA256,
        objectAttributes=_bound(KEY_ATTRIBUTES, policy),
        authPolicy=policy,
        parameters=key_parameters(kind),
    )


@cache
def _plain(kind: KeyType) -> TPM2B_TEMPLATE:
    return TPM2B_TEMPLATE(key(kind).marshal())


def marshalled_key(kind: KeyType, policy: bytes = b"") -> TPM2B_TEMPLATE:
    """The same as TPM2_CreateLoaded wants it."""
    return TPM2B_TEMPLATE(key(kind, policy).marshal()) if policy else _plain(kind)


def sealed(policy: bytes = b"") -> TPM2B_PUBLIC:
    """Data that the TPM gives out again, where the policy lets it."""
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.KEYEDHASH,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=_bound(_SEALED, policy),
            authPolicy=policy,
            parameters=TPMU_PUBLIC_PARMS(
                keyedHashDetail=TPMS_KEYEDHASH_PARMS(scheme=TPMT_KEYEDHASH_SCHEME(scheme=TPM2_ALG.NULL))
            ),
        )
    )


def sensitive(*, auth: bytes = b"", data: bytes = b"") -> TPM2B_SENSITIVE_CREATE:
    """Authorisation value of a new object, and what to seal in it."""
    if not (auth or data):
        return _NOTHING
    return TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=auth, data=data))


def _bound(attributes: Any, policy: bytes) -> Any:
    return attributes & ~TPMA_OBJECT.USERWITHAUTH if policy else attributes


def unlike_srk(public: TPMT_PUBLIC) -> str:
    """Return what a key is instead of an ECC P-256 storage key; empty if it is one."""
    attributes = public.objectAttributes
    if public.type != TPM2_ALG.ECC:
        return f"a key of type {str(public.type).upper()}"
    if public.parameters.eccDetail.curveID != TPM2_ECC.NIST_P256:
        return f"a key on the curve {str(public.parameters.eccDetail.curveID).upper().replace('NIST_P', 'P-')}"
    # With these, no TPM lets it sign.
    return "" if attributes & SRK_NEEDED == SRK_NEEDED else f"a key with the attributes {attributes}"


def key_parameters(kind: KeyType) -> TPMU_PUBLIC_PARMS:
    """Those of a signing key."""
    none = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
    if isinstance(kind, EllipticCurve):
        return _ecc_parameters(CURVES[kind], none)
    scheme = TPMT_RSA_SCHEME(scheme=TPM2_ALG.NULL)
    # An exponent of 0 stands for 65537 [TPM 2.0 part 2, 12.2.3.5].
    return TPMU_PUBLIC_PARMS(rsaDetail=TPMS_RSA_PARMS(symmetric=none, scheme=scheme, keyBits=kind.bits, exponent=0))


def _ecc_parameters(curve: Any, symmetric: TPMT_SYM_DEF_OBJECT) -> TPMU_PUBLIC_PARMS:
    scheme = TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL)
    kdf = TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL)
    return TPMU_PUBLIC_PARMS(eccDetail=TPMS_ECC_PARMS(symmetric=symmetric, scheme=scheme, curveID=curve, kdf=kdf))
