"""What a key store in a PKCS#11 token does besides: shown on SoftHSM, alone and behind a module that fails on order."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pkcs11
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from softhsm import PIN, SOFTHSM, Token

from stationkey.contract.profiles import Algorithm
from stationkey.errors import ConfigurationError, KeyStoreError, Scope, StationKeyError
from stationkey.keystore import KeyRef, KeyStore, Sweeping, Trying, keystore_opener
from stationkey.keystore.worker import KeyStoreThread, on_keystore

EC = Algorithm.ECDSA_SHA256


@pytest.fixture
def token(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Token]:
    made = Token.make(f"t{abs(hash(request.node.nodeid)) % 10**8}", tmp_path)
    yield made
    made.order()
    if made.present():
        made.remove()


@pytest.fixture
def opened() -> Iterator[Callable[[Token, str], KeyStore]]:
    """Open a store as a process that starts does; closed in the end."""
    stores: list[KeyStore] = []

    def open_store(token: Token, uri: str = "") -> KeyStore:
        for store in stores:  # one at a time uses the module
            store.close()
        stores.append(keystore_opener(uri or token.uri, state_dir=token.directory)())
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


Open = Callable[..., KeyStore]


def test_a_key_file_is_what_pkcs11_provider_reads_with_its_uri_before_it(
    token: Token, opened: Open, tmp_path: Path
) -> None:
    """Version 1.0 reads none with a UTF8String in the first place [pkcs11-provider, src/pk11_uri.pre]."""
    (tmp_path / "key.pem").write_bytes(opened(token).generate(EC).pem())
    command = ["openssl", "asn1parse", "-in", str(tmp_path / "key.pem")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    parts = [[part.strip() for part in line.split(":", 3)[2:]] for line in told.splitlines()]
    uri = (tmp_path / "key.pem").read_text().splitlines()[0]
    assert parts[1:] == [["VISIBLESTRING", "PKCS#11 Provider URI v1.0"], ["UTF8STRING", uri]]
    assert uri.startswith(f"pkcs11:token={token.label};")
    assert "pin" not in uri


def sign(store: KeyStore, key: KeyRef) -> None:
    with store.signer(key) as private:
        public = store.public_key(key)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        public.verify(private.sign(b"data", ec.ECDSA(hashes.SHA256())), b"data", ec.ECDSA(hashes.SHA256()))


def reason_of(call: Callable[[], object]) -> tuple[str, bool, Scope]:
    with pytest.raises(StationKeyError) as caught:
        call()
    return caught.value.reason, caught.value.transient, caught.value.scope


def recorded(token: Token) -> set[str]:
    return {path.name for path in (token.directory / "pkcs11").iterdir() if "pin-refused" not in path.name}


@pytest.mark.parametrize("algorithm", [EC, Algorithm.ECDSA_SHA512, Algorithm.RSA_SHA256], ids=str)
def test_another_program_finds_a_key_that_signs_and_cannot_leave(
    token: Token, opened: Open, algorithm: Algorithm
) -> None:
    opened(token).generate(algorithm)

    [identifier] = recorded(token)
    private = token.objects()["Private", f"stationkey {identifier}"]
    assert "Access:     sensitive, always sensitive, never extractable, local" in private
    assert [line.split()[1:] for line in private.splitlines() if "Usage" in line] == [["sign"]]
    assert f"ID:         {identifier}" in private
    assert len(f"stationkey {identifier}") <= 40  # the longest label of a YubiHSM 2


def test_a_key_is_recorded_before_the_token_is_asked_to_make_it(token: Token, opened: Open) -> None:
    store = opened(token, token.shimmed)
    store.supports(EC)
    token.order("C_GenerateKeyPair 0x30", "C_OpenSession 0x30")  # CKR_DEVICE_ERROR, and no way to clear it away

    assert reason_of(lambda: store.generate(EC)) == ("pkcs11_failed", True, Scope.DEVICE)
    assert len(recorded(token)) == 1

    token.order()
    later = opened(token)
    assert isinstance(later, Sweeping)
    for _ in range(9):
        assert later.sweep([]).destroyed == 0
        assert len(recorded(token)) == 1  # the token may still be at it
    later.sweep([])
    assert recorded(token) == set()


def test_a_key_that_the_token_finished_after_the_crash_is_destroyed(token: Token, opened: Open) -> None:
    identifier = "0" * 27 + "7"
    (token.directory / "pkcs11").mkdir()
    (token.directory / "pkcs11" / identifier).touch()
    store = opened(token)
    assert isinstance(store, Sweeping)
    assert store.sweep([]).destroyed == 0

    named = ("--label", f"stationkey {identifier}", "--id", identifier)
    token.tool("--keypairgen", "--key-type", "EC:prime256v1", *named)
    assert store.sweep([]).destroyed == 1
    assert token.objects() == {}
    assert recorded(token) == set()


def test_what_a_crash_left_is_destroyed_and_nothing_else(token: Token, opened: Open) -> None:
    store = opened(token)
    kept, left = store.generate(EC), store.generate(EC)
    mine = token.objects()
    token.tool("--keypairgen", "--key-type", "EC:prime256v1", "--label", "of somebody else", "--id", "aa" * 14)
    stranger = token.objects().keys() - mine.keys()

    later = opened(token)  # as after a crash: the ledger has one of them
    assert isinstance(later, Sweeping)
    assert later.sweep([kept]).destroyed == 1
    assert later.sweep([kept]).destroyed == 0

    assert len(token.objects().keys() - stranger) == 2  # the public and the private part of one key
    assert stranger <= token.objects().keys()
    sign(later, kept)
    assert reason_of(lambda: sign(later, left)) == ("key_of_another_token", False, Scope.KEY)


def test_a_key_on_its_way_to_the_ledger_is_not_swept(token: Token, opened: Open) -> None:
    store = opened(token)
    key = store.generate(EC)
    assert isinstance(store, Sweeping)

    assert store.sweep([]).destroyed == 0  # not in the ledger yet
    assert store.sweep([key]).destroyed == 0  # there
    sign(store, key)
    assert store.sweep([]).destroyed == 1  # destroyed on record, by a command beside the daemon
    assert token.objects() == {}


def test_a_key_that_missed_its_way_to_the_ledger_is_swept_in_the_end(token: Token, opened: Open) -> None:
    """As that of a request which was over before the token had made it."""
    store = opened(token)
    store.generate(EC)
    assert isinstance(store, Sweeping)

    assert [store.sweep([]).destroyed for _ in range(10)] == [0] * 9 + [1]
    assert token.objects() == {}
    assert recorded(token) == set()


def test_an_object_of_another_with_the_same_id_is_not_touched(token: Token, opened: Open) -> None:
    store = opened(token)
    key = store.generate(EC)
    [identifier] = recorded(token)
    token.tool("--keypairgen", "--key-type", "EC:prime256v1", "--label", "not ours", "--id", identifier)

    store.close()
    sign(store, key)
    store.destroy(key)

    assert token.objects().keys() == {("Private", "not ours"), ("Public", "not ours")}


def test_destroying_is_verified(token: Token, opened: Open) -> None:
    store = opened(token, token.shimmed)
    key = store.generate(EC)
    token.order("C_DestroyObject 0x0")  # says that it did

    assert reason_of(lambda: store.destroy(key)) == ("pkcs11_failed", True, Scope.DEVICE)
    assert len(recorded(token)) == 1

    token.order()
    store.destroy(key)
    assert token.objects() == {}
    assert recorded(token) == set()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        pytest.param("token=a?module-path={so}&pin-value=1234", "keystore_uri_invalid", id="pin-in-the-URI"),
        pytest.param("token=a;pin-value=1234?module-path={so}", "keystore_uri_invalid", id="pin-in-the-path"),
        pytest.param("?module-path={so}", "keystore_uri_invalid", id="no-token"),
        pytest.param("slot-id=0?module-path={so}", "keystore_uri_invalid", id="slot-number"),
        pytest.param("token=a;slot-id=0?module-path={so}", "keystore_uri_invalid", id="slot-number-too"),
        pytest.param("token=a;id=%01?module-path={so}", "keystore_uri_invalid", id="a-key"),
        pytest.param("token=a;token=b?module-path={so}", "keystore_uri_invalid", id="twice"),
        pytest.param("token=%f?module-path={so}", "keystore_uri_invalid", id="half-a-byte"),
        pytest.param("token=%ff?module-path={so}", "keystore_uri_invalid", id="not-UTF-8"),
        pytest.param("token=a b?module-path={so}", "keystore_uri_invalid", id="blank"),
        pytest.param("token=a?module-name=softhsm2", "keystore_uri_invalid", id="module-by-name"),
        pytest.param("token=a?module-path=libsofthsm2.so", "keystore_uri_invalid", id="relative-module"),
        pytest.param("token=a?module-path={so}&pin-source=pin", "keystore_uri_invalid", id="relative-pin"),
        pytest.param("token=a?module-path={so}&pin-source=https://pin", "keystore_uri_invalid", id="pin-from-the-web"),
        pytest.param("token=a?module-path={so}&pin-source=|sh", "keystore_uri_invalid", id="program-by-name"),
        pytest.param("token=a?module-path={so}&pin-source=credential:../x", "secret_invalid", id="credential-up"),
    ],
)
def test_an_evil_uri_is_refused_before_anything_is_loaded(tmp_path: Path, uri: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        keystore_opener("pkcs11:" + uri.format(so=SOFTHSM), state_dir=tmp_path)
    assert caught.value.reason == reason
    assert "1234" not in str(caught.value)


def test_a_name_may_have_any_character(opened: Open, tmp_path: Path) -> None:
    token = Token.make("a;b?c&d=é /%", tmp_path)
    try:
        uri = token.uri.replace(token.label, "a%3bb%3Fc&d=%c3%A9%20/%25")
        store = opened(token, uri)
        sign(store, store.generate(EC))
    finally:
        token.remove()


@pytest.mark.parametrize("how", ["writable", "in-a-writable-directory", "foreign", "directory", "missing", "loop"])
def test_a_module_that_others_can_replace_is_refused(token: Token, opened: Open, tmp_path: Path, how: str) -> None:
    if os.geteuid() != 0:
        pytest.fail("the modules of this test have to be root's, as those of a station are")
    place = tmp_path / "modules"
    place.mkdir()
    module = place / "module.so"
    shutil.copy(SOFTHSM, module)
    match how:
        case "writable":
            module.chmod(0o664)
        case "in-a-writable-directory":
            place.chmod(0o777)
        case "foreign":
            os.chown(module, 65534, 0)
        case "directory":
            module.unlink()
            module.mkdir()
        case "missing":
            module.unlink()
        case _:
            module.unlink()
            module.symlink_to(module)
    store = opened(token, token.uri.replace(str(SOFTHSM), str(module)))

    assert reason_of(lambda: store.supports(EC)) == ("pkcs11_module_unsafe", False, Scope.REQUEST)


@pytest.mark.parametrize("library", ["/usr/lib/x86_64-linux-gnu/libc.so.6", "/etc/hostname"])
def test_what_is_no_module_is_told(token: Token, opened: Open, library: str) -> None:
    path = library if Path(library).exists() else str(Path(os.__file__))
    store = opened(token, token.uri.replace(str(SOFTHSM), path))

    assert reason_of(lambda: store.supports(EC))[0] == "pkcs11_module_unsafe"


@pytest.mark.parametrize("how", ["program", "credential"])
def test_the_pin_may_come_from_elsewhere(token: Token, opened: Open, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    source = f"file:{token.directory}/pin"
    if how == "program":
        program = token.directory / "tell"
        program.write_text(f"#!/bin/sh\necho {PIN}\n")
        program.chmod(0o700)
        uri = token.uri.replace(source, f"|{program}")
    else:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(token.directory))
        uri = token.uri.replace(source, "credential:pin")
    store = opened(token, uri)

    sign(store, store.generate(EC))


@pytest.mark.parametrize("script", ["exit 1", "exit 0", "head -c 5000 /dev/zero", "printf '\\377'", "kill -9 $$"])
def test_a_program_that_tells_no_pin_is_told(token: Token, opened: Open, script: str) -> None:
    program = token.directory / "tell"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    store = opened(token, token.uri.replace(f"file:{token.directory}/pin", f"|{program}"))

    assert reason_of(lambda: store.supports(EC)) == ("secret_unreadable", False, Scope.REQUEST)


def test_a_program_that_tells_the_pin_gets_nothing_of_our_environment(
    token: Token, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATIONKEY_SECRET_OF_A_TEST", "x")
    program = token.directory / "tell"
    program.write_text(f'#!/bin/sh\n[ -z "$STATIONKEY_SECRET_OF_A_TEST" ] && echo {PIN}\n')
    program.chmod(0o700)
    store = opened(token, token.uri.replace(f"file:{token.directory}/pin", f"|{program}"))

    sign(store, store.generate(EC))


def test_a_program_for_the_pin_that_is_missing_is_told(token: Token, opened: Open) -> None:
    store = opened(token, token.uri.replace(f"file:{token.directory}/pin", f"|{token.directory}/none"))

    assert reason_of(lambda: store.supports(EC))[0] == "command_unstartable"


def test_a_pin_that_was_refused_is_not_tried_again(token: Token, opened: Open) -> None:
    pin = token.directory / "pin"
    pin.write_text("wrong pin")
    for _ in range(3):  # each as a daemon that starts again
        store = opened(token, token.shimmed)
        for _ in range(3):
            assert reason_of(lambda: store.supports(EC)) == ("pkcs11_pin_wrong", False, Scope.STORE)  # noqa: B023
    assert token.calls("C_Login") == 1

    [remembered] = (token.directory / "pkcs11").glob("pin-refused*")
    assert b"wrong" not in remembered.read_bytes()
    assert stat.S_IMODE(remembered.stat().st_mode) == 0o600

    pin.write_text("another")
    assert reason_of(lambda: store.supports(EC))[0] == "pkcs11_pin_wrong"
    assert token.calls("C_Login") == 2

    pin.write_text(PIN)
    sign(store, store.generate(EC))
    assert not remembered.exists()


def test_a_token_with_a_login_already_is_used(token: Token, opened: Open) -> None:
    store = opened(token, token.shimmed)
    module = pkcs11.lib(token.shimmed.partition("module-path=")[2].partition("&")[0])
    with module.get_token(token_label=token.label).open(user_pin=PIN):
        sign(store, store.generate(EC))
        assert token.calls("C_Login") == 2


@pytest.mark.parametrize("code", [0x5, 0x6, 0x30, 0x32, 0xB3, 0x101])
def test_a_login_that_fails_otherwise_is_not_tried_twice(token: Token, opened: Open, code: int) -> None:
    """GENERAL_ERROR, FUNCTION_FAILED, DEVICE_ERROR, DEVICE_REMOVED, SESSION_HANDLE_INVALID, USER_NOT_LOGGED_IN."""
    store = opened(token, token.shimmed)
    token.order(f"C_Login {code:#x} once")

    assert reason_of(lambda: store.supports(EC))[1]
    assert token.calls("C_Login") == 1
    sign(store, store.generate(EC))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("C_Login 0xa4", ("pkcs11_pin_locked", False, Scope.STORE)),  # CKR_PIN_LOCKED
        ("C_Login 0x102", ("pkcs11_pin_locked", False, Scope.STORE)),  # CKR_USER_PIN_NOT_INITIALIZED
        ("C_OpenSession 0xb1", ("pkcs11_failed", True, Scope.DEVICE)),  # CKR_SESSION_COUNT
        ("C_GenerateKeyPair 0x31", ("pkcs11_token_full", True, Scope.STORE)),  # CKR_DEVICE_MEMORY
        ("C_GenerateKeyPair 0x32", ("pkcs11_token_missing", True, Scope.DEVICE)),  # CKR_DEVICE_REMOVED
        ("C_GenerateKeyPair 0xd1", ("pkcs11_refused", False, Scope.KEY)),  # CKR_TEMPLATE_INCONSISTENT
        ("C_GenerateKeyPair 0x6", ("pkcs11_failed", True, Scope.DEVICE)),  # CKR_FUNCTION_FAILED
        ("C_GenerateKeyPair 0x80000001", ("pkcs11_failed", True, Scope.DEVICE)),  # of the maker's own
        ("C_GetSlotList 0x5", ("pkcs11_failed", True, Scope.DEVICE)),  # CKR_GENERAL_ERROR
    ],
)
def test_what_the_module_returns_is_told_and_leaves_nothing(
    token: Token, opened: Open, order: str, expected: tuple[str, bool, Scope]
) -> None:
    store = opened(token, token.shimmed)
    token.order(order)
    assert reason_of(lambda: store.generate(EC)) == expected
    assert token.objects() == {}

    token.order()
    sign(store, store.generate(EC))


def test_a_full_token_is_told_with_the_number_of_its_objects(token: Token, opened: Open) -> None:
    store = opened(token, token.shimmed)
    store.generate(EC)
    token.tool("--keypairgen", "--key-type", "EC:prime256v1", "--label", "of somebody else")
    token.order("C_GenerateKeyPair 0x31")  # CKR_DEVICE_MEMORY
    with pytest.raises(KeyStoreError, match=r"\b4 objects"):
        store.generate(EC)


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=str)
def test_a_trial_key_leaves_nothing(token: Token, opened: Open, algorithm: Algorithm) -> None:
    store = opened(token, token.shimmed)
    assert isinstance(store, Trying)
    assert store.try_out(algorithm) == store.supports(algorithm)
    assert token.calls("C_SignInit") == 1
    assert token.objects() == {}
    assert not (token.directory / "pkcs11").exists()  # nothing was recorded: it was no object of the token


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("C_GenerateKeyPair 0xd1", id="TEMPLATE_INCONSISTENT"),
        pytest.param("C_SignInit 0x70", id="MECHANISM_INVALID"),
        pytest.param("C_SignInit 0x2", id="HOST_MEMORY"),  # tpm2-pkcs11 1.9, of P-521
    ],
)
def test_a_trial_shows_what_the_mechanism_list_promises_in_vain(token: Token, opened: Open, order: str) -> None:
    store = opened(token, token.shimmed)
    assert isinstance(store, Trying)
    token.order(order)
    assert store.supports(EC)
    assert not store.try_out(EC)
    assert reason_of(lambda: store.generate(EC)) == ("pkcs11_refused", False, Scope.KEY)
    assert token.objects() == {}
    assert recorded(token) == set()


def test_a_trial_key_that_a_session_cannot_have_is_made_in_the_token(token: Token, opened: Open) -> None:
    store = opened(token, token.shimmed)
    assert isinstance(store, Trying)
    token.order("C_SignInit 0x70 once")  # CKR_MECHANISM_INVALID
    assert store.try_out(EC)
    assert token.calls("C_GenerateKeyPair") == 2
    assert token.objects() == {}
    assert recorded(token) == set()


def test_a_key_that_is_for_more_than_signing_is_destroyed(token: Token, opened: Open) -> None:
    """A module that refuses to be told what a key is not for makes it by its own defaults: SoftHSM's allow all."""
    store = opened(token, token.shimmed)
    token.order("C_GenerateKeyPair 0x12 once")  # CKR_ATTRIBUTE_TYPE_INVALID
    assert reason_of(lambda: store.generate(EC)) == ("pkcs11_key_unprotected", False, Scope.STORE)
    assert token.calls("C_GenerateKeyPair") == 2
    assert token.objects() == {}
    assert recorded(token) == set()


def test_a_trial_that_the_token_fails_shows_nothing(token: Token, opened: Open) -> None:
    store = opened(token, token.shimmed)
    assert isinstance(store, Trying)
    token.order("C_GenerateKeyPair 0x30")
    assert reason_of(lambda: store.try_out(EC)) == ("pkcs11_failed", True, Scope.DEVICE)


def test_a_module_that_does_not_start_again_is_tried_again(token: Token, opened: Open) -> None:
    store = opened(token, token.shimmed)
    key = store.generate(EC)
    token.order("C_SignInit 0x5", "C_Initialize 0x30")  # as where the module's own daemon is away
    assert reason_of(lambda: sign(store, key)) == ("pkcs11_failed", True, Scope.DEVICE)

    token.order()
    sign(store, key)


@pytest.mark.parametrize("code", [0xB3, 0x32, 0x101, 0x82, 0x60, 0x5])
def test_a_lost_session_costs_no_signature(token: Token, opened: Open, code: int) -> None:
    """CKR_SESSION_HANDLE_INVALID, DEVICE_REMOVED, USER_NOT_LOGGED_IN, OBJECT_, KEY_HANDLE_INVALID, GENERAL_ERROR."""
    store = opened(token, token.shimmed)
    key = store.generate(EC)
    before = token.calls("C_SignInit")
    token.order(f"C_SignInit {code:#x} once")

    sign(store, key)

    assert token.calls("C_SignInit") == before + 2


def test_a_token_that_is_away_comes_back(token: Token, opened: Open, tmp_path: Path) -> None:
    store = opened(token)
    key = store.generate(EC)
    away = token.hide(tmp_path / "drawer")

    store.close()
    assert reason_of(lambda: sign(store, key)) == ("pkcs11_token_missing", True, Scope.DEVICE)

    away()
    sign(store, key)


def test_a_token_that_was_initialised_anew_has_other_keys(token: Token, opened: Open) -> None:
    store = opened(token)
    key, identity = store.generate(EC), store.identity
    token.remove()
    Token.make(token.label, token.directory)

    store.close()
    assert store.identity != identity
    assert reason_of(lambda: sign(store, key)) == ("key_of_another_token", False, Scope.KEY)
    sign(store, store.generate(EC))


def test_two_tokens_that_fit_are_told_and_the_serial_number_decides(token: Token, opened: Open) -> None:
    serial = opened(token).description.split()[-1]
    Token.make(token.label, token.directory)

    store = opened(token)
    assert reason_of(lambda: store.generate(EC)) == ("pkcs11_token_ambiguous", False, Scope.STORE)
    uri = token.uri.replace("?", f";serial={serial}?")
    sign(later := opened(token, uri), later.generate(EC))


async def test_a_module_that_hangs_is_left_alone_until_it_returns(token: Token) -> None:
    """Another thread would enter a module that is for one: the store says so until the call is back."""
    keystore = KeyStoreThread(keystore_opener(token.shimmed, state_dir=token.directory))
    try:
        key = await on_keystore(keystore, lambda store: store.generate(EC), timeout=30)
        token.order("C_SignInit hang")
        with pytest.raises(KeyStoreError) as hung:
            await on_keystore(keystore, lambda store: sign(store, key), timeout=0.2)
        assert hung.value.reason == "keystore_timeout"
        before = token.calls("C_OpenSession")
        with pytest.raises(KeyStoreError) as meanwhile:
            await on_keystore(keystore, lambda store: store.supports(EC), timeout=5)
        assert meanwhile.value.transient
        assert token.calls("C_OpenSession") == before

        token.order()
        async with asyncio.timeout(30):
            while not await served(keystore, key):
                pass
    finally:
        token.order()
        keystore.close()


async def served(keystore: KeyStoreThread, key: KeyRef) -> bool:
    try:
        await on_keystore(keystore, lambda store: sign(store, key), timeout=10)
    except KeyStoreError as error:
        if not error.transient:
            raise
        return False
    return True
