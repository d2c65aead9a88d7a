"""What every key store does, shown on each: ``software:``, ``pkcs11:`` in three tokens, ``tpm2:`` in a TPM simulator.

The last one also with each protection that keys can have, and with all at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from msgspec import structs
from peers import Swtpm
from softhsm import PIN, Token
from tokens import opencryptoki, tpm2_pkcs11

from protection import terms
from stationkey.config.settings import TpmTerms
from stationkey.contract.profiles import RSA_3072, SECP256R1, SECP521R1, Algorithm, KeyType
from stationkey.errors import ConfigurationError, KeyStoreError, StationKeyError
from stationkey.keystore import KeyRef, KeyStore, Protecting, check_key, keystore_opener
from stationkey.keystore.schemes import SCHEMES
from stationkey.x509.csr import PrivateKey, PublicKey, key_type

DATA = b"to be signed"

KINDS: dict[Algorithm, KeyType] = {
    Algorithm.ECDSA_SHA256: SECP256R1,
    Algorithm.ECDSA_SHA512: SECP521R1,
    Algorithm.RSA_SHA256: RSA_3072,
    Algorithm.RSA_SHA384: RSA_3072,
}
"""What both stores make here: neither OpenSSL nor the simulated TPM lacks anything."""

HASHES: dict[Algorithm, hashes.HashAlgorithm] = {
    Algorithm.ECDSA_SHA256: hashes.SHA256(),
    Algorithm.ECDSA_SHA512: hashes.SHA512(),
    Algorithm.RSA_SHA256: hashes.SHA256(),
    Algorithm.RSA_SHA384: hashes.SHA384(),
}

each_algorithm = pytest.mark.parametrize("algorithm", list(Algorithm), ids=str)


@dataclasses.dataclass
class Device:
    """Where one kind of store keeps its keys.

    Attributes:
        restart: powers it off and on, where there is something to power.
        refused: the reason why no key is made for an algorithm.
        by_engine: for what OpenSSL can use a token through its pkcs11 engine.
    """

    uri: str
    tpm: Swtpm | None = None
    terms: TpmTerms = dataclasses.field(default_factory=TpmTerms)
    state_dir: Path | None = None
    restart: Callable[[], None] = lambda: None
    refused: dict[Algorithm, str] = dataclasses.field(default_factory=dict)
    by_engine: frozenset[Algorithm] = frozenset(Algorithm)
    keys: dict[Algorithm, KeyRef] = dataclasses.field(default_factory=dict)

    @property
    def scheme(self) -> str:
        return self.uri.partition(":")[0]

    def open(self) -> KeyStore:
        return keystore_opener(self.uri, allow_software_keys=True, terms=self.terms, state_dir=self.state_dir)()

    def key(self, store: KeyStore, algorithm: Algorithm) -> KeyRef:
        """A key made at some time before; each is made once, because RSA takes long."""
        if algorithm not in self.keys:
            self.keys[algorithm] = store.generate(algorithm)
        return self.keys[algorithm]

    @property
    def any(self) -> Algorithm:
        """One that it serves, the quickest."""
        return next(algorithm for algorithm in Algorithm if algorithm not in self.refused)


PROTECTIONS: dict[str, dict[str, Any]] = {
    "tpm2": {},
    "tpm2-auth": {"key_auth": "the value of the keys"},
    "tpm2-registers": {"pcrs": (0, 7)},
    "tpm2-hmac": {"session": "hmac"},
    "tpm2-all": {
        "srk_handle": 0x81000020,
        "srk_auth": "the value of the root key",
        "key_auth": "generated",
        "pcrs": (0, 7),
        "pcr_bank": "sha384",
        "session": "encrypted",
    },
}


TOKENS = {"opencryptoki": opencryptoki, "tpm2-pkcs11": tpm2_pkcs11}


@pytest.fixture(scope="module", params=["software", "softhsm", *TOKENS, *PROTECTIONS])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "software":
        yield Device("software:")
    elif request.param == "softhsm":
        token = Token.make("suite", directory)
        yield Device(token.uri, state_dir=directory)
        token.remove()
    elif request.param in TOKENS:
        with TOKENS[request.param](directory) as other:
            yield Device(state_dir=directory, **vars(other))
    else:
        with Swtpm(directory) as tpm:
            yield Device(tpm.uri, tpm, terms(directory, **PROTECTIONS[request.param]), directory, restart=tpm.restart)


@pytest.fixture
def store(device: Device) -> Iterator[KeyStore]:
    store = device.open()
    yield store
    store.close()


@pytest.fixture
def key(device: Device, store: KeyStore) -> KeyRef:
    """A key that works, made at some time before."""
    return device.key(store, device.any)


@pytest.fixture
def served(device: Device, store: KeyStore, algorithm: Algorithm) -> KeyRef:
    """A key for the algorithm; a store that has none says why."""
    if algorithm in device.refused:
        with pytest.raises(StationKeyError) as caught:
            store.generate(algorithm)
        assert caught.value.reason == device.refused[algorithm]
        pytest.skip(caught.value.reason)
    return device.key(store, algorithm)


def sign(private_key: PrivateKey, algorithm: Algorithm) -> bytes:
    if isinstance(private_key, rsa.RSAPrivateKey):
        return private_key.sign(DATA, padding.PKCS1v15(), HASHES[algorithm])
    return private_key.sign(DATA, ec.ECDSA(HASHES[algorithm]))


def verify(public_key: PublicKey, signature: bytes, algorithm: Algorithm) -> None:
    if isinstance(public_key, rsa.RSAPublicKey):
        public_key.verify(signature, DATA, padding.PKCS1v15(), HASHES[algorithm])
    else:
        public_key.verify(signature, DATA, ec.ECDSA(HASHES[algorithm]))


def sign_and_verify(store: KeyStore, key: KeyRef, algorithm: Algorithm) -> None:
    with store.signer(key) as private_key:
        verify(store.public_key(key), sign(private_key, algorithm), algorithm)


@each_algorithm
def test_a_key_is_of_the_kind_that_was_promised_before_it_was_made(
    device: Device, store: KeyStore, algorithm: Algorithm, served: KeyRef
) -> None:
    support = store.supports(algorithm)
    assert support
    assert support.missing == ""
    assert support.key_type == served.key_type == key_type(store.public_key(served)) == KINDS[algorithm]
    assert served.scheme == device.scheme


@each_algorithm
def test_what_a_key_signs_verifies_with_its_public_key(store: KeyStore, algorithm: Algorithm, served: KeyRef) -> None:
    with store.signer(served) as private_key:
        signature = sign(private_key, algorithm)
        assert private_key.public_key() == store.public_key(served)
    verify(store.public_key(served), signature, algorithm)
    with pytest.raises(InvalidSignature):
        verify(ec.generate_private_key(ec.SECP256R1()).public_key(), signature, Algorithm.ECDSA_SHA256)


def test_a_key_just_made_signs_more_than_once(device: Device, store: KeyStore) -> None:
    key = store.generate(device.any)
    for _ in range(3):
        sign_and_verify(store, key, device.any)


def test_no_two_keys_are_the_same(device: Device, store: KeyStore, key: KeyRef) -> None:
    other = store.generate(device.any)
    assert other.key_id != key.key_id
    assert other.private != key.private
    for each in (key, other):
        sign_and_verify(store, each, device.any)


def test_the_name_of_a_key_is_the_beginning_of_the_hash_of_its_public_key(store: KeyStore, key: KeyRef) -> None:
    """So whoever holds the certificate can find the key."""
    public = store.public_key(key).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert public == key.public
    assert key.key_id == hashlib.sha256(public).hexdigest()[:20]


def test_a_store_can_be_used_after_it_was_closed(device: Device, store: KeyStore, key: KeyRef) -> None:
    store.close()
    store.close()
    sign_and_verify(store, key, device.any)


@each_algorithm
def test_a_key_outlives_its_store_and_a_loss_of_power(
    device: Device, store: KeyStore, algorithm: Algorithm, served: KeyRef
) -> None:
    """All there is to keep are the fields of the `KeyRef`."""
    kept = structs.asdict(served) | {"key_type": KINDS[algorithm]}
    store.close()
    device.restart()
    later = device.open()
    try:
        sign_and_verify(later, KeyRef(**kept), algorithm)
    finally:
        later.close()


def test_a_key_that_works_passes_the_check_and_a_damaged_one_does_not(store: KeyStore, key: KeyRef) -> None:
    for as_new in (False, True):
        check_key(store, key, as_new=as_new)
        with pytest.raises(KeyStoreError) as caught:
            check_key(store, structs.replace(key, private=key.private[:-7]), as_new=as_new)
        assert caught.value.reason == "key_damaged"


def test_a_destroyed_key_takes_no_other_with_it(device: Device, store: KeyStore, key: KeyRef) -> None:
    used, unused = (store.generate(device.any) for _ in range(2))
    sign_and_verify(store, used, device.any)
    for each in (used, unused, unused):
        store.destroy(each)
    sign_and_verify(store, key, device.any)


def test_a_key_of_another_store_is_refused_in_words(store: KeyStore, key: KeyRef) -> None:
    for scheme in SCHEMES.keys() - {key.scheme}:
        with pytest.raises(KeyStoreError) as signing, store.signer(structs.replace(key, scheme=scheme)):
            pass
        assert signing.value.reason == "key_of_another_store"
        assert key.key_id in str(signing.value)


@pytest.mark.parametrize(
    "private",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 200, id="zeros"),
        pytest.param(b"\x30\x03\x02\x01\x00", id="other-DER"),
    ],
)
def test_a_damaged_key_is_refused_in_words(store: KeyStore, key: KeyRef, private: bytes) -> None:
    with pytest.raises(KeyStoreError) as signing, store.signer(structs.replace(key, private=private)):
        pass
    assert signing.value.reason == "key_damaged"
    assert key.key_id in str(signing.value)


def test_a_key_cut_short_is_refused_in_words(store: KeyStore, key: KeyRef) -> None:
    short = structs.replace(key, private=key.private[:-7])
    with pytest.raises(KeyStoreError) as caught, store.signer(short):
        pass
    assert caught.value.reason == "key_damaged"


def test_no_key_material_is_shown_by_repr(key: KeyRef) -> None:
    shown = f"{key!r} {key!s}"
    assert "private" not in shown
    assert "public" not in shown
    assert all(key.private[at : at + 4].hex() not in shown for at in range(len(key.private) - 4))
    assert repr(key.private)[2:10] not in shown


def test_a_store_is_found_again_by_its_uri(device: Device, store: KeyStore) -> None:
    assert store.uri == device.uri
    assert store.description


def test_a_device_has_the_same_identity_after_a_loss_of_power(device: Device, store: KeyStore) -> None:
    identity = store.identity
    assert identity.startswith(f"{device.scheme}:")
    store.close()
    device.restart()
    later = device.open()
    assert later.identity == identity
    later.close()


@each_algorithm
def test_openssl_signs_with_the_pem_file_of_a_key(
    device: Device, store: KeyStore, algorithm: Algorithm, served: KeyRef, tmp_path: Path
) -> None:
    """Where the key is in a TPM, through the tpm2 provider; it can give a value, and show no policy.

    Where it is in a token, through the pkcs11 engine, which takes the URI that is in the file. Plain OpenSSL verifies.
    """
    (tmp_path / "key.pem").write_bytes(served.pem())
    (tmp_path / "data").write_bytes(DATA)
    (tmp_path / "public.pem").write_bytes(
        store.public_key(served).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    store.close()  # a bare TPM serves one program at a time
    providers: list[str] = []
    environment = dict(os.environ)
    if device.tpm is not None:
        # In this order, and with this query: no other serves TLS 1.2 with every kind of key.
        providers = ["-provider", "default", "-provider", "tpm2", "-propquery", "?tpm2.signature=yes"]
        environment["TPM2OPENSSL_TCTI"] = device.tpm.tcti
        assert (tmp_path / "key.pem").read_bytes().startswith(b"-----BEGIN TSS2 PRIVATE KEY-----")
    digest = f"-{HASHES[algorithm].name}"
    if device.terms.key_auth is not None:
        assert isinstance(store, Protecting)
        (tmp_path / "value").write_bytes(store.auth_value(served.private))
        store.close()
        providers += ["-passin", "file:value"]
    file = "key.pem"
    if device.scheme == "pkcs11":
        file = served.pem().splitlines()[0].decode()
        providers = ["-engine", "pkcs11", "-keyform", "engine", "-passin", f"pass:{PIN}"]
        environment["PKCS11_MODULE_PATH"] = device.uri.partition("module-path=")[2].partition("&")[0]
    command = ("dgst", *providers, digest, "-sign", file, "-out", "signature", "data")
    if device.terms.pcrs or algorithm not in device.by_engine:
        # tpm2-openssl, 1.1.1 and 1.3.0, does not know a key file with a policy.
        said = openssl(tmp_path, environment, *command, fails=True)
        assert "private key from" in said or "Error signing data" in said
        assert (tmp_path / "signature").read_bytes() == b""
        return
    openssl(tmp_path, environment, *command)
    plain = dict(os.environ)
    said = openssl(tmp_path, plain, "dgst", digest, "-verify", "public.pem", "-signature", "signature", "data")
    assert said == "Verified OK\n"


def openssl(directory: Path, environment: dict[str, str], *arguments: str, fails: bool = False) -> str:
    done = subprocess.run(
        ["openssl", *arguments],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode != 0) is fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize(
    ("uri", "allowed", "reason"),
    [
        pytest.param("tpm2:", False, "keystore_uri_invalid", id="no-TCTI"),
        pytest.param("tpm2::device:/dev/tpmrm0", False, "keystore_uri_invalid", id="no-TCTI-name"),
        pytest.param("tpm2: ", False, "keystore_uri_invalid", id="blank-TCTI"),
        pytest.param("tpm2", False, "keystore_uri_invalid", id="no-colon"),
        pytest.param("software:", False, "software_keys_refused", id="software-not-allowed"),
        pytest.param("software:here", True, "keystore_uri_invalid", id="software-with-more"),
        pytest.param("software", True, "keystore_uri_invalid", id="software-no-colon"),
        pytest.param("pkcs15:token=x", True, "keystore_uri_invalid", id="unknown-scheme"),
        pytest.param("pkcs11:token=x", True, "keystore_uri_invalid", id="no-module"),
        pytest.param("", True, "keystore_uri_invalid", id="empty"),
        pytest.param("TPM2:device:/dev/tpmrm0", False, "keystore_uri_invalid", id="upper-case"),
    ],
)
def test_a_uri_that_names_no_store_is_refused_before_anything_is_opened(uri: str, allowed: bool, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        keystore_opener(uri, allow_software_keys=allowed)
    assert caught.value.reason == reason


def test_a_software_store_says_that_its_keys_are_not_protected() -> None:
    assert "NOT PROTECTED" in keystore_opener("software:", allow_software_keys=True)().description
