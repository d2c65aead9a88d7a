"""The key store in a TPM that lacks something, or has no room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from peers import Swtpm
from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC
from tpm2_pytss.types import TPMT_PUBLIC_PARMS
from tpm2_stores import P256, loaded_objects, refuse_with, works

from protection import reason_of
from stationkey.contract.profiles import RSA_2048, Algorithm
from stationkey.errors import UnsupportedAlgorithm
from stationkey.keystore.tpm2 import capabilities
from stationkey.keystore.tpm2.commands import Commands
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.store import Tpm2KeyStore

pytest_plugins = ["tpm2_stores"]


# What a TPM has not got. The simulator has it all, so the lack is put in.


@pytest.mark.parametrize("code", [pytest.param(0x143, id="bare"), pytest.param(0xB0143, id="by-/dev/tpmrm0")])
def test_a_tpm_without_create_loaded_serves_all_the_same(
    swtpm: Swtpm, store: Tpm2KeyStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The command came with revision 1.38; the kernel's resource manager says so in the TPM's place, in a layer."""
    monkeypatch.setattr(Commands, "create_loaded", refuse_with(code))
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
    real = Commands.test_parms

    def test_parms(commands: Commands, parameters: bytes) -> None:
        if int(TPMT_PUBLIC_PARMS.unmarshal(parameters)[0].parameters.rsaDetail.keyBits) in sizes:
            raise TpmError(code)
        real(commands, parameters)

    return lambda patch: patch.setattr(Commands, "test_parms", test_parms)


@pytest.mark.parametrize(
    ("algorithm", "lack", "lacking"),
    [
        pytest.param(Algorithm.ECDSA_SHA512, lack_of("curves", TPM2_ECC.NIST_P521), "secp521r1", id="P-521"),
        pytest.param(P256, lack_of("curves", TPM2_ECC.NIST_P256), "secp256r1", id="P-256"),
        pytest.param(Algorithm.ECDSA_SHA512, lack_of("algorithms", TPM2_ALG.SHA512), "SHA-512", id="SHA-512"),
        pytest.param(Algorithm.RSA_SHA384, lack_of("algorithms", TPM2_ALG.SHA384), "SHA-384", id="SHA-384"),
        pytest.param(P256, lack_of("algorithms", TPM2_ALG.ECDSA), "ECDSA", id="ECDSA"),
        pytest.param(Algorithm.RSA_SHA256, lack_of("algorithms", TPM2_ALG.RSASSA), "RSASSA", id="RSASSA"),
        pytest.param(Algorithm.RSA_SHA384, lack_of_rsa(3072), "RSA-3072", id="RSA-3072"),
        pytest.param(Algorithm.RSA_SHA256, lack_of_rsa(3072, 2048), "RSA-2048", id="RSA"),
    ],
)
def test_what_the_tpm_cannot_do_is_refused_in_words_before_a_key_is_made(
    swtpm: Swtpm,
    store: Tpm2KeyStore,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Algorithm,
    lack: Callable[[pytest.MonkeyPatch], None],
    lacking: str,
) -> None:
    lack(monkeypatch)
    support = store.supports(algorithm)
    assert not support
    assert support.key_type is None
    assert lacking in support.missing
    for command in ("create_loaded", "create"):
        monkeypatch.setattr(Context, command, None, raising=False)  # to call it would fail the test
    with pytest.raises(UnsupportedAlgorithm) as caught:
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
