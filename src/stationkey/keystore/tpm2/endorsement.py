"""The endorsement hierarchy of a TPM: its authorisation, and the endorsement keys (EK) in it.

An endorsement key says which TPM it is: its maker signs a certificate for it. It is made by a template of the TCG,
always the same, or persists in the TPM [TCG EK Credential Profile 2.5].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Final

from msgspec import Struct
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_SESSION
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_SYM_DEF
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from stationkey.attestation.documents import MAX_CERTIFICATE, MAX_ENDORSEMENT_KEYS, EndorsementKey
from stationkey.attestation.structures import Attribute, Public, kind_of, read_public, spki_of
from stationkey.attestation.trust import certified_key
from stationkey.errors import KeyStoreError, NotVerified
from stationkey.keystore.tpm2 import capabilities
from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.return_codes import TpmError

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
_FORMAT_ONE: Final = 0x0BF  # bits of a return code for the error, without its place [TPM 2.0 part 2, 6.6.2]
_RC_HIERARCHY: Final = 0x085
_RC_AUTH: Final = frozenset({0x08E, 0x0A2})  # TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH


def flush(esapi: Context, handle: Any) -> None:
    """Unload an object or a session, if it is still there."""
    with suppress(TpmError):  # a lost TPM holds nothing, and its own error is reported
        esapi.flush_context(handle)


@contextmanager
def _session(esapi: Context, kind: Any) -> Iterator[Any]:
    session = esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, kind, _NO_SYMMETRIC, TPM2_ALG.SHA256)
    try:
        esapi.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION)
        yield session
    finally:
        flush(esapi, session)


@contextmanager
def endorsement(esapi: Context, auth: bytes) -> Iterator[Hierarchy]:
    """The endorsement hierarchy, authorised by a session: its value, where it has one, never crosses the bus."""
    esapi.tr_set_auth(ESYS_TR.ENDORSEMENT, auth)
    with _session(esapi, TPM2_SE.HMAC) as session:
        yield Hierarchy(esapi, session, has_auth=bool(auth))


class Hierarchy(Struct, frozen=True):
    """What can be done with the authorisation of the endorsement hierarchy."""

    esapi: Context
    session: Any
    has_auth: bool

    def create_primary(self, template: TPM2B_PUBLIC) -> tuple[Any, bytes]:
        """A primary key, to be flushed by the caller: its handle, and its TPM2B_PUBLIC."""
        try:
            handle, public, *_ = self.esapi.create_primary(
                _NO_SENSITIVE, template, ESYS_TR.ENDORSEMENT, session1=self.session
            )
        except TpmError as error:
            self._explain(error)
            raise
        return handle, public.marshal()

    def make_ek(self, name: str) -> tuple[Any, bytes] | None:
        """An endorsement key by a template of the TCG, always the same; None where the TPM cannot make one."""
        _, template = _template(self.esapi, name)
        try:
            return None if template is None else self.create_primary(template)
        except TpmError as error:
            if rc.is_lost(error) or not rc.code(error) & _RC_FORMAT_ONE:
                raise
            return None  # TPM_RC_CURVE, TPM_RC_VALUE, TPM_RC_KEY_SIZE

    @contextmanager
    def policy_secret(self) -> Iterator[Any]:
        """A session that satisfies the policy of the usual endorsement keys: PolicySecret of this hierarchy."""
        with _session(self.esapi, TPM2_SE.POLICY) as policy:
            try:
                self.esapi.policy_secret(ESYS_TR.ENDORSEMENT, policy, expiration=0, session1=self.session)
            except TpmError as error:
                self._explain(error)
                raise
            yield policy

    def _explain(self, error: TpmError) -> None:
        """Raise the words for an error that is about the hierarchy."""
        number = rc.code(error) & _FORMAT_ONE
        if rc.is_lost(error):
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


class _Found(Struct):
    """An endorsement key, as far as known."""

    public: bytes | None = None
    certificate: bytes | None = None
    handle: int | None = None


def endorsement_keys(esapi: Context, hierarchy: Hierarchy | None = None) -> tuple[EndorsementKey, ...]:
    """The endorsement keys of the TPM: those at hand and, where `hierarchy` is given, the usual ones, made for it."""
    found = _at_hand(esapi)
    if hierarchy is not None:
        for name in _USUAL_EK_TEMPLATES:
            if (made := hierarchy.make_ek(name)) is not None:
                handle, public = made
                flush(esapi, handle)
                found.setdefault(_spki(public), _Found()).public = public
    told = (EndorsementKey(public=each.public, certificate=each.certificate) for each in found.values())
    return tuple(islice(told, MAX_ENDORSEMENT_KEYS))


def _at_hand(esapi: Context) -> dict[bytes, _Found]:
    """Return the endorsement keys that are known without making one, by their subjectPublicKeyInfo."""
    found: dict[bytes, _Found] = {}
    for handle in capabilities.handles(esapi, *_EK_HANDLES):
        public = esapi.read_public(esapi.tr_from_tpmpublic(handle))[0].marshal()
        with suppress(NotVerified):  # something else persists there
            if not read_public(public, "an endorsement key").lacking(_EK_ATTRIBUTES):
                found[_spki(public)] = _Found(public=public, handle=handle)
    for name in _EK_TEMPLATES:
        certificate, _ = _template(esapi, name)
        if certificate is not None and (key := certified_key(certificate)) is not None:
            found.setdefault(spki_of(key), _Found()).certificate = certificate
    return found


def _spki(public: bytes) -> bytes:
    return read_public(public, "an endorsement key").spki


def _template(esapi: Context, name: str) -> tuple[bytes | None, TPM2B_PUBLIC | None]:
    """Certificate and template of an endorsement key, by the TPM's NV memory [EK Credential Profile 2.5, 2.2.1]."""
    try:
        certificate, template = create_ek_template(name, lambda index: _read_nv(esapi, int(index)))
    except ValueError:  # a high range without a certificate
        return None, None
    return _without_padding(certificate), template


def _without_padding(certificate: bytes | None) -> bytes | None:
    """Return the DER of a certificate without the padding of its NV index; None if it is not DER, or too long."""
    if certificate is None or certificate[:2] != b"\x30\x82":
        return None
    length = 4 + int.from_bytes(certificate[2:4], "big")
    return certificate[:length] if length <= min(len(certificate), MAX_CERTIFICATE) else None


def _read_nv(esapi: Context, index: int) -> bytes:
    """The content of an NV index that everybody may read.

    Raises:
        NoSuchIndex: it is not there, or not for everybody.
    """
    if index not in capabilities.handles(esapi, index, index):
        raise NoSuchIndex(index)
    handle = esapi.tr_from_tpmpublic(index)
    size, content = int(esapi.nv_read_public(handle)[0].nvPublic.dataSize), b""
    try:
        while len(content) < size:
            content += bytes(esapi.nv_read(handle, min(_NV_PART, size - len(content)), len(content)))
    except TpmError as error:
        if rc.is_lost(error) or rc.code(error) in rc.PASSING:
            raise
        raise NoSuchIndex(index) from None  # never written, or it has an authorisation value
    return content


@contextmanager
def challenged_ek(esapi: Context, spki: bytes, hierarchy: Hierarchy) -> Iterator[tuple[Any, Public]]:
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
            flush(esapi, handle)
    raise not_ours("it is for another endorsement key")


def not_ours(what: str) -> KeyStoreError:
    """The words for a challenge that is not for this TPM."""
    return KeyStoreError(
        f"the challenge cannot be opened here: {what}",
        reason="challenge_not_ours",
        hint="was it made for this station, and with its present attestation key?",
    )
