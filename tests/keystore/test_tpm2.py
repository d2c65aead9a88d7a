"""The ``tpm2:`` key store on a real TPM simulator: what its keys are, and what happens when the TPM does not behave.

Where a test asks the TPM itself, it does so on a connection of its own, and by the numbers of the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import structs
from peers import Swtpm
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_ECC, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_ECC_PARMS,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_SYM_DEF,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_PARMS,
)
from tpm2_stores import P256, connected, loaded_objects, refuse_with, store_of, works

from protection import reason_of, tool
from stationkey.contract.profiles import Algorithm
from stationkey.errors import KeyStoreError
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2 import device, signing
from stationkey.keystore.tpm2.commands import Commands
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.keystore.worker import KeyStoreThread

pytest_plugins = ["tpm2_stores"]


SRK = 0x81000001


# [TPM 2.0 part 2, 8.3.2]
FIXED_TPM = 1 << 1


FIXED_PARENT = 1 << 4


SENSITIVE_DATA_ORIGIN = 1 << 5


USER_WITH_AUTH = 1 << 6


NO_DA = 1 << 10


SIGN = 1 << 18


SRK_ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"


@pytest.fixture(scope="module")
def module_swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    """A TPM for the tests that only look."""
    with Swtpm(tmp_path_factory.mktemp("swtpm")) as tpm:
        yield tpm


@pytest.fixture(scope="module")
def keys(module_swtpm: Swtpm) -> dict[Algorithm, KeyRef]:
    """A key for each algorithm."""
    with closing(store_of(module_swtpm)) as store:
        return {algorithm: store.generate(algorithm) for algorithm in Algorithm}


def name_at_srk(tpm: Swtpm) -> bytes:
    """The name of what is at the SRK's handle: a hash of its public area, so no two keys share it."""
    tool(tpm, "tpm2_readpublic", "-c", f"{SRK:#x}", "-n", "name")
    return (tpm.directory / "name").read_bytes()


def occupy_srk(tpm: Swtpm, *arguments: str) -> bytes:
    """Put a primary key at the SRK's handle by tpm2-tools; its name."""
    tool(tpm, "tpm2_createprimary", "-C", "o", "-c", "primary.ctx", *arguments)
    tool(tpm, "tpm2_flushcontext", "-t")
    tool(tpm, "tpm2_evictcontrol", "-C", "o", "-c", "primary.ctx", f"{SRK:#x}")
    tool(tpm, "tpm2_flushcontext", "-t")
    return name_at_srk(tpm)


# What a key is.


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=str)
def test_a_key_is_born_in_its_tpm_bound_to_it_and_only_signs(
    module_swtpm: Swtpm, keys: dict[Algorithm, KeyRef], algorithm: Algorithm
) -> None:
    """Not restricted, not for decryption, with no scheme of its own, and outside of the dictionary-attack counter."""
    with connected(module_swtpm) as esapi:
        handle = TSSPrivKey.from_der(keys[algorithm].private).load(esapi)
        public = esapi.read_public(handle)[0].publicArea
        esapi.flush_context(handle)
    attributes = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | SIGN
    assert int(public.objectAttributes) == attributes
    assert int(public.parameters.asymDetail.scheme.scheme) == 0x0010  # TPM_ALG_NULL
    assert int(public.nameAlg) == 0x000B  # TPM_ALG_SHA256
    assert bytes(public.authPolicy) == b""


def test_the_tpm_refuses_to_duplicate_a_key(module_swtpm: Swtpm, keys: dict[Algorithm, KeyRef]) -> None:
    """The same command, with the same authorisation, hands out a key that was made to be handed out."""
    with connected(module_swtpm) as esapi:
        policy = digest_of(esapi, duplication_session(esapi, TPM2_SE.TRIAL))
        srk = esapi.tr_from_tpmpublic(SRK)
        private, public, *_ = esapi.create(srk, TPM2B_SENSITIVE_CREATE(), duplicable(policy))
        lent = esapi.load(srk, private, public)
        assert duplicate(esapi, lent)
        esapi.flush_context(lent)

        ours = TSSPrivKey.from_der(keys[P256].private).load(esapi)
        with pytest.raises(TSS2_Exception) as by_policy:
            duplicate(esapi, ours)
        none = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
        with pytest.raises(TSS2_Exception) as by_password:
            esapi.duplicate(ours, ESYS_TR.NULL, b"", none, session1=ESYS_TR.PASSWORD)
        esapi.flush_context(ours)
    assert by_policy.value.rc == 0x99D  # TPM_RC_POLICY_FAIL: it has no policy that allows it
    assert by_password.value.rc == 0x124  # TPM_RC_AUTH_TYPE: and nothing but a policy could


def duplication_session(esapi: ESAPI, kind: Any) -> Any:
    session = esapi.start_auth_session(
        ESYS_TR.NONE, ESYS_TR.NONE, kind, TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL), TPM2_ALG.SHA256
    )
    esapi.policy_command_code(session, TPM2_CC.Duplicate)
    return session


def digest_of(esapi: ESAPI, session: Any) -> bytes:
    digest = bytes(esapi.policy_get_digest(session))
    esapi.flush_context(session)
    return digest


def duplicate(esapi: ESAPI, handle: Any) -> bytes:
    """The private part of a key, in the clear."""
    session = duplication_session(esapi, TPM2_SE.POLICY)
    try:
        none = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
        return bytes(esapi.duplicate(handle, ESYS_TR.NULL, b"", none, session1=session)[1])
    finally:
        with suppress(TSS2_Exception):  # a policy session ends with its use
            esapi.flush_context(session)


def duplicable(policy: bytes) -> TPM2B_PUBLIC:
    none = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
    scheme = TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL)
    kdf = TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL)
    detail = TPMS_ECC_PARMS(symmetric=none, scheme=scheme, curveID=TPM2_ECC.NIST_P256, kdf=kdf)
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=TPMA_OBJECT.SENSITIVEDATAORIGIN | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.SIGN_ENCRYPT,
            authPolicy=policy,
            parameters=TPMU_PUBLIC_PARMS(eccDetail=detail),
        )
    )


@pytest.mark.parametrize("algorithm", [P256, Algorithm.RSA_SHA256], ids=str)
def test_the_private_part_of_a_key_cannot_be_read(
    module_swtpm: Swtpm, keys: dict[Algorithm, KeyRef], algorithm: Algorithm
) -> None:
    with closing(store_of(module_swtpm)) as store, store.signer(keys[algorithm]) as private:
        with pytest.raises(NotImplementedError):
            private.private_bytes(
                serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        with pytest.raises(NotImplementedError):
            private.private_numbers()


def test_the_public_part_of_a_key_is_known_without_the_tpm(swtpm: Swtpm, store: Tpm2KeyStore) -> None:
    key = store.generate(P256)
    swtpm.kill()
    assert isinstance(store.public_key(key), ec.EllipticCurvePublicKey)
    assert key.pem()


def test_a_store_tells_which_tpm_it_is(store: Tpm2KeyStore) -> None:
    assert store.description.startswith("TPM 2.0 IBM SW")
    assert "firmware" in store.description


def test_two_tpms_of_one_model_are_told_apart(store: Tpm2KeyStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with Swtpm(tmp_path / "other") as tpm, closing(store_of(tpm)) as other:
        assert other.description == store.description
        assert other.identity != store.identity


# The storage root key.


def test_the_srk_is_made_where_there_is_none_by_the_template_that_all_programs_share(
    swtpm: Swtpm, store: Tpm2KeyStore
) -> None:
    """So the one that tpm2-tools makes by the same template is the same key."""
    assert works(store)
    store.close()
    made = name_at_srk(swtpm)
    tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", f"{SRK:#x}")
    assert occupy_srk(swtpm, "-G", "ecc256:null:aes128cfb", "-g", "sha256", "-a", SRK_ATTRIBUTES) == made


def test_an_srk_that_fits_is_used_as_it_is(swtpm: Swtpm, store: Tpm2KeyStore) -> None:
    before = occupy_srk(swtpm, "-G", "ecc256:null:aes256cfb", "-g", "sha256", "-a", SRK_ATTRIBUTES)
    key = store.generate(P256)
    assert works(store, key)
    store.close()
    assert name_at_srk(swtpm) == before
    swtpm.kill()
    swtpm.start()
    assert works(store, key)


def test_an_srk_without_noda_is_used_and_told(
    swtpm: Swtpm, store: Tpm2KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    """What tpm2_createprimary makes by default; other keys may hang on it."""
    before = occupy_srk(swtpm, "-G", "ecc256", "-g", "sha256", "-a", SRK_ATTRIBUTES.replace("|noda", ""))
    assert works(store)
    store.close()
    assert name_at_srk(swtpm) == before
    assert "noda" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("-G", "rsa2048", "-a", SRK_ATTRIBUTES), id="RSA"),
        pytest.param(
            ("-G", "ecc256", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|sign"), id="signing-key"
        ),
        pytest.param(("-G", "ecc384", "-a", SRK_ATTRIBUTES), id="P-384"),
    ],
)
def test_another_key_in_the_place_of_the_srk_is_refused_and_left_alone(
    swtpm: Swtpm, store: Tpm2KeyStore, arguments: tuple[str, ...]
) -> None:
    before = occupy_srk(swtpm, "-g", "sha256", *arguments)
    for _ in range(2):
        with pytest.raises(KeyStoreError) as caught:
            store.generate(P256)
        assert caught.value.reason == "srk_unfit"
        assert "0x81000001" in caught.value.message
        assert "tpm2_evictcontrol" in caught.value.hint
    store.close()
    assert name_at_srk(swtpm) == before


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(
            lambda tpm: occupy_srk(tpm, "-G", "ecc256", "-g", "sha256", "-a", SRK_ATTRIBUTES, "-p", "secret"), id="SRK"
        ),
        pytest.param(lambda tpm: tool(tpm, "tpm2_changeauth", "-c", "o", "secret"), id="owner-hierarchy"),
    ],
)
def test_an_authorisation_value_where_there_should_be_none_is_told(
    swtpm: Swtpm, store: Tpm2KeyStore, prepare: Callable[[Swtpm], object]
) -> None:
    prepare(swtpm)
    assert reason_of(lambda: store.generate(P256)) == "tpm_auth"
    store.close()
    assert loaded_objects(swtpm) == []


# Slots: a TPM holds three objects or so.


@pytest.mark.usefixtures("alone")
def test_objects_that_a_dead_program_left_in_the_tpm_do_not_keep_the_store_from_working(
    swtpm: Swtpm, store: Tpm2KeyStore
) -> None:
    with connected(swtpm) as esapi:
        for _ in range(3):
            esapi.create_primary(TPM2B_SENSITIVE_CREATE(), "ecc")
        with pytest.raises(TSS2_Exception) as full:
            esapi.create_primary(TPM2B_SENSITIVE_CREATE(), "ecc")
    assert full.value.rc == 0x902
    assert len(loaded_objects(swtpm)) == 3
    assert works(store)
    store.close()
    assert loaded_objects(swtpm) == []


@pytest.mark.usefixtures("alone")
def test_slots_that_are_full_in_mid_life_are_emptied(
    swtpm: Swtpm, store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_loaded = Commands.create_loaded
    codes: list[int] = []

    def noting(*arguments: Any) -> Any:
        try:
            return create_loaded(*arguments)
        except TpmError as error:
            codes.append(error.rc)
            raise

    monkeypatch.setattr(Commands, "create_loaded", noting)
    one = store.generate(P256)
    store.unload()
    with connected(swtpm) as esapi:
        for _ in range(3):
            esapi.create_primary(TPM2B_SENSITIVE_CREATE(), "ecc")
    assert works(store)
    assert codes == [0x902]
    assert works(store, one)
    store.close()
    assert loaded_objects(swtpm) == []


def test_slots_that_stay_full_are_told(store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they may be behind a resource manager, where they are others' to empty."""
    store.within(0.1)
    with monkeypatch.context() as patch:
        patch.setattr(Commands, "create_loaded", refuse_with(0x902))
        assert reason_of(lambda: store.generate(P256)) == "tpm_full"
    assert works(store)


def test_behind_a_resource_manager_nothing_of_others_is_unloaded(swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the clients apart, and what looks like a stray may be in use."""
    with connected(swtpm) as esapi:
        esapi.create_primary(TPM2B_SENSITIVE_CREATE(), "ecc")
    others = loaded_objects(swtpm)
    monkeypatch.setattr(device, "is_shared", lambda _: True)
    with closing(store_of(swtpm)) as store:
        assert works(store)
    assert loaded_objects(swtpm) == others


def sign_by_an_unknown_hash(store: Tpm2KeyStore) -> None:
    """There is no SHA-3 in libtpms, so this is a signature that the TPM really refuses."""
    sha3 = {"sha3-256": TPM2_ALG.SHA3_256}
    with mock.patch.dict(signing.HASHES, sha3), store.signer(store.generate(P256)) as private:
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        private.sign(b"data", ec.ECDSA(hashes.SHA3_256()))


def fail_in_the_block(store: Tpm2KeyStore) -> None:
    with suppress(ZeroDivisionError), store.signer(store.generate(P256)):
        raise ZeroDivisionError


def destroy_unused(store: Tpm2KeyStore) -> None:
    store.destroy(store.generate(P256))


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(works, id="generate-and-sign"),
        pytest.param(lambda store: store.generate(P256), id="generate-only"),
        pytest.param(lambda store: [store.generate(P256), store.generate(P256)], id="generate-twice"),
        pytest.param(lambda store: reason_of(lambda: sign_by_an_unknown_hash(store)), id="refused-signature"),
        pytest.param(fail_in_the_block, id="error-of-the-caller"),
        pytest.param(destroy_unused, id="destroy"),
    ],
)
def test_no_object_stays_in_the_tpm_once_the_store_is_closed(
    swtpm: Swtpm, store: Tpm2KeyStore, use: Callable[[Tpm2KeyStore], object]
) -> None:
    use(store)
    store.close()
    assert loaded_objects(swtpm) == []


def test_a_key_is_unloaded_when_its_job_is_done(swtpm: Swtpm) -> None:
    with closing(KeyStoreThread(lambda: store_of(swtpm))) as thread:
        thread.submit(lambda store: store.generate(P256), timeout=30).result(30)
        thread.submit(lambda store: store.uri, timeout=30).result(30)  # it comes after the unloading
        assert loaded_objects(swtpm) == []


def test_a_signature_that_the_tpm_refuses_is_an_error_in_words(store: Tpm2KeyStore) -> None:
    with pytest.raises(KeyStoreError) as caught:
        sign_by_an_unknown_hash(store)
    assert caught.value.reason == "tpm_error"
    assert works(store)


# The words for what goes wrong.


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param(0x921, "tpm_lockout", id="lockout"),
        pytest.param(0xC0921, "tpm_lockout", id="lockout-by-abrmd"),
        pytest.param(0xB0902, "tpm_full", id="full-by-/dev/tpmrm0"),
        pytest.param(0xA000A, "tpm_unreachable", id="TCTI"),
        pytest.param(0x70007, "tpm_unreachable", id="dead-context"),
        pytest.param(0xB000A, "tpm_unreachable", id="resource-manager"),
        pytest.param(0x101, "tpm_error", id="failure-mode"),
        pytest.param(0x185, "tpm_error", id="hierarchy-disabled"),
    ],
)
def test_each_failure_has_its_reason_and_tells_the_code(
    store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Commands, "create_loaded", refuse_with(code))
        with pytest.raises(KeyStoreError, match=f"{code:#x}") as caught:
            store.generate(P256)
    assert caught.value.reason == reason
    assert works(store)


@pytest.mark.parametrize(
    ("tcti", "reason"),
    [
        pytest.param("nonsense:x", "tcti_invalid", id="unknown-name"),
        pytest.param("swtpm:port=many", "tcti_invalid", id="port-no-number"),
        pytest.param("swtpm:port=99999", "tcti_invalid", id="port-too-large"),
        pytest.param("swtpm:prt=2321", "tcti_invalid", id="unknown-option"),
        pytest.param("device:/nowhere/tpm0", "tpm_unreachable", id="no-such-device"),
        pytest.param("device:/dev/null", "tpm_unreachable", id="device-that-is-no-TPM"),
        pytest.param("device:/", "tcti_invalid", id="directory"),
        pytest.param("swtpm:host=127.0.0.1,port=1", "tpm_unreachable", id="nobody-listens"),
    ],
)
def test_a_wrong_tcti_is_told_from_a_tpm_that_is_away(tcti: str, reason: str) -> None:
    """The one will never work; the other may come back, and each request tries again."""
    store = Tpm2KeyStore(tcti)
    with pytest.raises(KeyStoreError) as caught:
        store.supports(P256)
    assert caught.value.reason == reason
    assert tcti.removeprefix("device:") in caught.value.message
    assert caught.value.hint


def test_a_file_named_in_the_place_of_a_device_is_never_written_to(tmp_path: Path) -> None:
    """tpm2-tss opens whatever it is told, and would write its first command over the file's first bytes."""
    file = tmp_path / "precious"
    file.write_bytes(b"precious" * 8)
    assert reason_of(lambda: Tpm2KeyStore(f"device:{file}").supports(P256)) == "tcti_invalid"
    assert file.read_bytes() == b"precious" * 8


def test_a_blob_that_was_tampered_with_is_refused_by_the_tpm(store: Tpm2KeyStore) -> None:
    key = store.generate(P256)
    assert works(store, key)
    broken = structs.replace(key, private=key.private[:-1] + bytes([key.private[-1] ^ 1]))
    assert reason_of(lambda: works(store, broken)) == "key_of_another_tpm"
    assert works(store, key)
