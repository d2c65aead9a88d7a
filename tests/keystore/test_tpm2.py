"""The ``tpm2:`` key store on a real TPM simulator: what its keys are, and what happens when the TPM does not behave.

Where a test asks the TPM itself, it does so on a connection of its own, and by the numbers of the specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
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

from protection import reason_of, sign, tool
from stationkey.contract.profiles import RSA_2048, Algorithm
from stationkey.errors import KeyStoreError, UnsupportedAlgorithm
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2 import capabilities, device, signing
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.keystore.worker import KeyStoreThread

P256 = Algorithm.ECDSA_SHA256
SRK = 0x81000001
TRANSIENT = 0x80000000

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


@pytest.fixture
def store(swtpm: Swtpm) -> Iterator[Tpm2KeyStore]:
    """A store in this test's own TPM."""
    with closing(store_of(swtpm)) as store:
        yield store


def store_of(tpm: Swtpm) -> Tpm2KeyStore:
    return Tpm2KeyStore(tpm.tcti)


def works(store: Tpm2KeyStore, key: KeyRef | None = None) -> bool:
    """Whether the store signs, with a new key where none is given."""
    sign(store, key)
    return True


@contextmanager
def connected(tpm: Swtpm) -> Iterator[ESAPI]:
    """A connection of the test's own; the TPM serves one at a time, so the store has to be closed."""
    esapi = ESAPI(tpm.tcti)
    try:
        yield esapi
    finally:
        esapi.close()


def loaded_objects(tpm: Swtpm) -> list[int]:
    with connected(tpm) as esapi:
        return capabilities.handles(esapi, TRANSIENT, TRANSIENT | 0xFFFFFF)


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


def refuse_with(code: int) -> Callable[..., NoReturn]:
    """A TPM command that fails with a return code."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise TSS2_Exception(code)

    return refuse


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
    assert "lacks noda" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("-G", "rsa2048", "-a", SRK_ATTRIBUTES), "a key of type rsa", id="RSA"),
        pytest.param(
            ("-G", "ecc256", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|sign"),
            "a key with the attributes",
            id="signing-key",
        ),
        pytest.param(("-G", "ecc384", "-a", SRK_ATTRIBUTES), "a key on the curve", id="P-384"),
    ],
)
def test_another_key_in_the_place_of_the_srk_is_refused_and_left_alone(
    swtpm: Swtpm, store: Tpm2KeyStore, arguments: tuple[str, ...], words: str
) -> None:
    before = occupy_srk(swtpm, "-g", "sha256", *arguments)
    for _ in range(2):
        with pytest.raises(KeyStoreError, match=words) as caught:
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


# A TPM that goes away and comes back.

uses = pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda store, _: store.supports(P256), id="supports"),
        pytest.param(lambda store, _: store.description, id="description"),
        pytest.param(lambda store, _: works(store), id="generate"),
        pytest.param(works, id="signer"),
    ],
)
Use = Callable[[Tpm2KeyStore, KeyRef], object]


@uses
@pytest.mark.parametrize("signed", [True, False], ids=["key-used", "key-unused"])
def test_a_lost_tpm_is_told_and_the_first_use_after_its_return_succeeds(
    swtpm: Swtpm,
    store: Tpm2KeyStore,
    use: Use,
    signed: bool,
) -> None:
    """Whether or not a key just made was still loaded when it was lost."""
    key = store.generate(P256)
    if signed:
        assert works(store, key)
    swtpm.kill()
    assert reason_of(lambda: store.generate(P256)) == "tpm_unreachable"
    assert reason_of(lambda: use(store, key)) == "tpm_unreachable"
    swtpm.start()
    assert use(store, key)


@uses
@pytest.mark.parametrize("signed", [True, False], ids=["key-used", "key-unused"])
@pytest.mark.parametrize("startup", [True, False], ids=["started-up", "not-started-up"])
def test_a_tpm_that_was_restarted_between_two_uses_is_not_noticed(
    swtpm: Swtpm,
    store: Tpm2KeyStore,
    use: Use,
    signed: bool,
    startup: bool,
) -> None:
    """Nor is one that still waits for TPM2_Startup (0x100), as a chip does after a reset."""
    key = store.generate(P256)
    if signed:
        assert works(store, key)
    swtpm.kill()
    swtpm.startup = startup
    swtpm.start()
    assert use(store, key)
    assert works(store, key)


def test_a_tpm_that_was_never_started_up_is_started_up(tmp_path: Path) -> None:
    with Swtpm(tmp_path / "swtpm", startup=False) as tpm, closing(store_of(tpm)) as store:
        assert works(store)


@pytest.mark.parametrize("back", [True, False], ids=["back-at-once", "gone"])
def test_a_tpm_lost_in_the_middle_of_a_request_costs_only_that_request(
    swtpm: Swtpm,
    store: Tpm2KeyStore,
    back: bool,
) -> None:
    key = store.generate(P256)

    def lose_it_and_sign() -> None:
        with store.signer(key) as private:
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            swtpm.kill()
            if back:
                swtpm.start()
            private.sign(b"data", ec.ECDSA(hashes.SHA256()))

    if back:
        lose_it_and_sign()  # it is loaded again
    else:
        assert reason_of(lose_it_and_sign) == "tpm_unreachable"
        swtpm.start()
    assert works(store, key)
    assert works(store)


def test_what_was_loaded_before_a_loss_is_not_confused_with_what_is_loaded_after(
    swtpm: Swtpm, store: Tpm2KeyStore
) -> None:
    """A handle of the lost context may stand for another object on the new one."""
    before = store.generate(P256)
    with store.signer(before):
        swtpm.kill()
        swtpm.start()
        after = store.generate(P256)
    assert works(store, after)


def test_losses_of_power_while_a_key_is_in_use_never_lock_the_tpm(swtpm: Swtpm, store: Tpm2KeyStore) -> None:
    """A key without noda is locked out by the third (0x921), though nobody gave a wrong password."""
    key = store.generate(P256)
    for _ in range(5):
        with store.signer(key) as private:
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            private.sign(b"data", ec.ECDSA(hashes.SHA256()))
            swtpm.kill()
            swtpm.start()
    assert works(store, key)


def test_a_key_of_a_replaced_tpm_is_refused_and_new_ones_can_be_made(swtpm: Swtpm, store: Tpm2KeyStore) -> None:
    key = store.generate(P256)
    assert works(store, key)
    swtpm.kill()
    swtpm.new_chip()
    swtpm.start()
    assert reason_of(lambda: works(store, key)) == "key_of_another_tpm"
    assert works(store)
    store.close()
    assert loaded_objects(swtpm) == []


def test_a_tpm_cleared_under_an_open_store_makes_new_keys_and_refuses_old_ones(
    swtpm: Swtpm, store: Tpm2KeyStore
) -> None:
    old = store.generate(P256)
    assert works(store, old)
    clear(store)
    assert works(store)
    clear(store)
    assert reason_of(lambda: works(store, old)) == "key_of_another_tpm"
    assert works(store)
    store.close()
    assert loaded_objects(swtpm) == []


def clear(store: Tpm2KeyStore) -> None:
    """TPM2_Clear on the store's own connection: a bare TPM serves no second one."""
    assert store._esapi is not None  # noqa: SLF001 - see above
    store._esapi.clear(ESYS_TR.RH_LOCKOUT)  # noqa: SLF001 - see above


def test_a_store_that_was_abandoned_does_not_disturb_the_one_that_took_over(swtpm: Swtpm, tmp_path: Path) -> None:
    """The TPM gives the same handles to both: to unload its own key would be to unload the other's."""
    opening = partial(Tpm2KeyStore, swtpm.tcti, state_dir=tmp_path)
    store, unsigned = opening(), opening()
    unsigned.generate(P256)
    unsigned.abandon()
    unsigned.close()
    with closing(opening()) as successor, ExitStack() as late:
        late.enter_context(store.signer(store.generate(P256)))
        store.abandon()
        key = successor.generate(P256)
        with successor.signer(key) as private:
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            late.close()
            assert reason_of(lambda: store.generate(P256)) == "keystore_timeout"
            store.close()
            private.sign(b"data", ec.ECDSA(hashes.SHA256()))
        assert works(successor)
    with closing(opening()) as last:
        assert works(last), "what the abandoned ones have left is cleared away"
    assert loaded_objects(swtpm) == []


@pytest.mark.parametrize("code", [pytest.param(0x902, id="full"), pytest.param(0x910, id="reset")])
def test_a_store_abandoned_in_mid_command_mends_nothing(
    swtpm: Swtpm, store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Were it to clear the slots, it would clear its successor's."""
    assert works(store)
    store.unload()
    fail = refuse_with(code)

    def create_loaded(*_: object) -> NoReturn:
        store.abandon()
        fail()

    with closing(store_of(swtpm)) as successor:
        key = successor.generate(P256)
        with successor.signer(key) as private, monkeypatch.context() as patch:
            patch.setattr(ESAPI, "create_loaded", create_loaded)
            assert reason_of(lambda: store.generate(P256)) == "keystore_timeout"
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            private.sign(b"data", ec.ECDSA(hashes.SHA256()))


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
    create_loaded = ESAPI.create_loaded
    codes: list[int] = []

    def noting(*arguments: Any) -> Any:
        try:
            return create_loaded(*arguments)
        except TSS2_Exception as error:
            codes.append(error.rc)
            raise

    monkeypatch.setattr(ESAPI, "create_loaded", noting)
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
        patch.setattr(ESAPI, "create_loaded", refuse_with(0x902))
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
    with pytest.raises(KeyStoreError, match="the TPM refused") as caught:
        sign_by_an_unknown_hash(store)
    assert caught.value.reason == "tpm_error"
    assert works(store)


# What a TPM has not got. The simulator has it all, so the lack is put in.


@pytest.mark.parametrize("code", [pytest.param(0x143, id="bare"), pytest.param(0xB0143, id="by-/dev/tpmrm0")])
def test_a_tpm_without_create_loaded_serves_all_the_same(
    swtpm: Swtpm, store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The command came with revision 1.38; the kernel's resource manager says so in the TPM's place, in a layer."""
    monkeypatch.setattr(ESAPI, "create_loaded", refuse_with(code))
    key = store.generate(P256)
    assert works(store, key)
    assert works(store, key)
    assert works(store)
    store.close()
    assert loaded_objects(swtpm) == []


def lack_of(function: str, *missing: Any) -> Callable[[pytest.MonkeyPatch], None]:
    real: Callable[..., set[int]] = getattr(capabilities, function)

    def inject(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(capabilities, function, lambda *given: real(*given) - set(map(int, missing)))

    return inject


def lack_of_rsa(*sizes: int, code: int = 0x2C4) -> Callable[[pytest.MonkeyPatch], None]:
    """TPM2_TestParms refuses these sizes, with TPM_RC_VALUE of the first parameter."""
    real = ESAPI.test_parms

    def test_parms(esapi: ESAPI, parameters: Any, *sessions: Any) -> None:
        if int(parameters.parameters.rsaDetail.keyBits) in sizes:
            raise TSS2_Exception(code)
        real(esapi, parameters, *sessions)

    return lambda patch: patch.setattr(ESAPI, "test_parms", test_parms)


@pytest.mark.parametrize(
    ("algorithm", "lack", "words"),
    [
        pytest.param(
            Algorithm.ECDSA_SHA512, lack_of("curves", TPM2_ECC.NIST_P521), "this TPM has no secp521r1", id="P-521"
        ),
        pytest.param(P256, lack_of("curves", TPM2_ECC.NIST_P256), "this TPM has no secp256r1", id="P-256"),
        pytest.param(
            Algorithm.ECDSA_SHA512, lack_of("algorithms", TPM2_ALG.SHA512), "this TPM has no SHA-512", id="SHA-512"
        ),
        pytest.param(
            Algorithm.RSA_SHA384, lack_of("algorithms", TPM2_ALG.SHA384), "this TPM has no SHA-384", id="SHA-384"
        ),
        pytest.param(P256, lack_of("algorithms", TPM2_ALG.ECDSA), "this TPM has no ECDSA", id="ECDSA"),
        pytest.param(
            Algorithm.RSA_SHA256, lack_of("algorithms", TPM2_ALG.RSASSA), "this TPM has no RSASSA", id="RSASSA"
        ),
        pytest.param(Algorithm.RSA_SHA384, lack_of_rsa(3072), "this TPM has no RSA-3072", id="RSA-3072"),
        pytest.param(
            Algorithm.RSA_SHA256, lack_of_rsa(3072, 2048), "this TPM has no RSA-3072 and no RSA-2048", id="RSA"
        ),
    ],
)
def test_what_the_tpm_cannot_do_is_refused_in_words_before_a_key_is_made(
    swtpm: Swtpm,
    store: Tpm2KeyStore,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Algorithm,
    lack: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    lack(monkeypatch)
    support = store.supports(algorithm)
    assert not support
    assert (support.key_type, support.missing) == (None, words)
    for command in ("create_loaded", "create"):
        monkeypatch.setattr(ESAPI, command, None)  # to call it would fail the test
    with pytest.raises(UnsupportedAlgorithm, match=f"^{algorithm} cannot be served: {words}$") as caught:
        store.generate(algorithm)
    assert caught.value.reason == "algorithm_unsupported_by_tpm"
    store.close()
    assert loaded_objects(swtpm) == []


def test_rsa_sha256_falls_to_2048_bits_where_the_tpm_can_do_no_more(
    store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack_of_rsa(3072)(monkeypatch)
    assert store.supports(Algorithm.RSA_SHA256).key_type == RSA_2048
    key = store.generate(Algorithm.RSA_SHA256)
    public = store.public_key(key)
    assert isinstance(public, rsa.RSAPublicKey)
    assert public.key_size == 2048
    assert key.key_type == RSA_2048
    with store.signer(key) as private:
        assert isinstance(private, rsa.RSAPrivateKey)
        public.verify(
            private.sign(b"data", padding.PKCS1v15(), hashes.SHA256()), b"data", padding.PKCS1v15(), hashes.SHA256()
        )


def test_a_tpm_that_fails_when_asked_is_not_said_to_lack_anything(
    store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lack_of_rsa(3072, code=0x101)(patch)  # TPM_RC_FAILURE
        assert reason_of(lambda: store.supports(Algorithm.RSA_SHA384)) == "tpm_error"
    assert store.supports(Algorithm.RSA_SHA384)


def test_what_a_replaced_tpm_can_do_is_asked_anew(
    swtpm: Swtpm, store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lack_of("curves", TPM2_ECC.NIST_P521)(patch)
        assert not store.supports(Algorithm.ECDSA_SHA512)
    swtpm.kill()
    swtpm.new_chip()
    swtpm.start()
    assert works(store)
    assert store.supports(Algorithm.ECDSA_SHA512)


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
        patch.setattr(ESAPI, "create_loaded", refuse_with(code))
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
    broken = dataclasses.replace(key, private=key.private[:-1] + bytes([key.private[-1] ^ 1]))
    assert reason_of(lambda: works(store, broken)) == "key_of_another_tpm"
    assert works(store, key)
