"""The key store in a TPM that is lost, restarted, cleared or replaced; and one that was abandoned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from peers import Swtpm
from tpm2_pytss.constants import ESYS_TR
from tpm2_stores import P256, loaded_objects, refuse_with, store_of, works

from protection import reason_of
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2.commands import Commands
from stationkey.keystore.tpm2.store import Tpm2KeyStore

pytest_plugins = ["tpm2_stores"]


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
            patch.setattr(Commands, "create_loaded", create_loaded)
            assert reason_of(lambda: store.generate(P256)) == "keystore_timeout"
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            private.sign(b"data", ec.ECDSA(hashes.SHA256()))
