"""What is recorded of the keys in tokens, where there is more than one token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from softhsm import Token

from parts import V2G, V2G20, station
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.errors import KeyStoreError, LedgerError
from stationkey.keystore import KeyStore, KeyStoreUri, Sweeping, keystore_opener
from stationkey.keystore.pkcs11.inventory import FileInventory, recorded
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.stores import KeyStores, Store
from stationkey.keystore.worker import KeyStoreThread
from stationkey.ledger.lifecycle import KeyState
from stationkey.service.strays import Strays, tell_left_behind

EC = Algorithm.ECDSA_SHA256


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Token]:
    made = Token.make("inventory", tmp_path)
    yield made
    made.remove()


@contextmanager
def opened(token: Token) -> Iterator[KeyStore]:
    with closing(keystore_opener(token.uri, state_dir=token.directory)()) as store:
        yield store


def test_what_is_in_another_token_of_the_same_name_is_neither_destroyed_nor_forgotten(token: Token) -> None:
    with opened(token) as store:
        key = store.generate(EC)
    drawer = token.directory / "drawer"
    bring_back = token.hide(drawer)
    exchanged = Token.make("inventory", token.directory)
    with opened(exchanged) as store:
        with pytest.raises(KeyStoreError) as refused:
            store.destroy(key)
        assert refused.value.reason == "key_of_another_token"
        assert isinstance(store, Sweeping)
        assert store.sweep([]).destroyed == 0
        assert len(recorded(token.directory)) == 1
    exchanged.remove()
    bring_back()
    assert len(token.objects()) == 2
    with opened(token) as store:
        assert isinstance(store, Sweeping)
        assert store.sweep([]).destroyed == 1
    assert (token.objects(), recorded(token.directory)) == ({}, set())


def test_a_refused_pin_of_one_token_is_not_taken_for_that_of_another(token: Token) -> None:
    (token.directory / "pin").write_text("wrong")
    with opened(token) as store, pytest.raises(KeyStoreError):
        store.supports(EC)
    other = Token.make("another", token.directory)
    with opened(other) as store:
        assert store.supports(EC)
    other.remove()
    assert len(list((token.directory / "pkcs11").glob("pin-refused-*"))) == 1


def in_token(token: Token, state_dir: Path) -> KeyStores:
    """Only V2G20 has its keys in the token."""
    others = frozenset(CertificateType) - {V2G20}
    thread = KeyStoreThread(keystore_opener(token.uri, state_dir=state_dir))
    return KeyStores(
        [
            Store("default", KeyStoreUri.parse("software:"), others, KeyStoreThread(SoftwareKeyStore)),
            Store("se", KeyStoreUri.parse(token.uri), frozenset({V2G20}), thread),
        ]
    )


async def test_a_key_destroyed_while_its_token_is_not_configured_is_destroyed_there_later(
    token: Token, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = tmp_path / "state"
    async with station(state_dir, keystore=in_token(token, state_dir)) as here:
        key = await here.key(V2G20)
        await here.key(V2G)
    assert len(token.objects()) == 2

    async with station(state_dir) as here:
        await tell_left_behind(here.service.custody, state_dir)
        assert here.service.counters.left_behind == 0  # the ledger still has it
        with caplog.at_level(logging.WARNING):
            await here.told("deleted", V2G20, private_key_path=f"/keys/{key}.pem")
        assert here.states(key) == [KeyState.DESTROYED]
        assert [vars(one)["key_id"] for one in caplog.records if "still in its device" in one.getMessage()] == [key]
    assert len(token.objects()) == 2

    async with station(state_dir) as here:
        await tell_left_behind(here.service.custody, state_dir)
        assert here.service.counters.left_behind == 1
        assert "keystore_unconfigured" in {vars(one).get("reason") for one in caplog.records}

    keystores = in_token(token, state_dir)
    async with station(state_dir, keystore=keystores) as here:
        await tell_left_behind(here.service.custody, state_dir)
        assert here.service.counters.left_behind == 0
        [_, store] = keystores
        await Strays(here.service.custody, store).sweep()
    assert (token.objects(), recorded(state_dir)) == ({}, set())


def test_two_tokens_by_two_modules_are_used_in_one_process_and_each_is_swept_for_itself(
    token: Token, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Token.make("other", tmp_path / "other")
    uris = (token.uri, other.shimmed)
    with ExitStack() as open_stores:
        for uri in uris:
            open_stores.enter_context(closing(keystore_opener(uri, state_dir=tmp_path)())).generate(EC)
    assert (len(token.objects()), len(other.objects())) == (2, 2)

    with ExitStack() as open_stores:  # as a daemon that starts again
        stores = [open_stores.enter_context(closing(keystore_opener(uri, state_dir=tmp_path)())) for uri in uris]
        for store, left in zip(stores, ((0, 2), (0, 0)), strict=True):
            assert isinstance(store, Sweeping)
            assert store.sweep([]).destroyed == 1
            assert (len(token.objects()), len(other.objects())) == left
    other.remove()


class AwayInventory(FileInventory):
    """A record that can be written once."""

    def end(self, identifier: bytes) -> bool:
        raise LedgerError(f"no way to record {identifier.hex()}", reason="ledger_unreachable", transient=True)


def test_a_failure_of_the_token_is_told_although_its_record_is_away_by_then(token: Token, tmp_path: Path) -> None:
    opener = keystore_opener(token.shimmed, state_dir=tmp_path, inventory=AwayInventory(tmp_path / "pkcs11"))
    with closing(opener()) as store:
        token.order("C_GenerateKeyPair 0x30")
        with pytest.raises(KeyStoreError) as failed:
            store.generate(EC)
        assert failed.value.reason == "pkcs11_failed"
        token.order()
    assert len(recorded(tmp_path)) == 1
