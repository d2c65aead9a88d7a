"""A TPM that says "later": no command is given up before its call's time is over, and nothing is misjudged for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Final

import pytest
from peers import Swtpm

from protection import Openers, leftovers, refusal, sign
from stationkey.attestation.credential import make_challenge
from stationkey.attestation.structures import read_public
from stationkey.contract.profiles import Algorithm
from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore import KeyStore
from stationkey.keystore.tpm2.attest import AttestationTerms, attest, attestation_key
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.keystore.worker import KeyStoreThread
from wire import Later, Wire, untouched

P256 = Algorithm.ECDSA_SHA256
HIDDEN: Final = 6
"""How often tpm2-tss submits a command that is answered RETRY, YIELDED or TESTING before it says so, at least."""

# [TPM 2.0 part 2, 6.6.3]
BUSY = [
    pytest.param(0x901, id="CONTEXT_GAP"),
    pytest.param(0x904, id="MEMORY"),
    pytest.param(0x908, id="YIELDED"),
    pytest.param(0x909, id="CANCELED"),
    pytest.param(0x90A, id="TESTING"),
    pytest.param(0x920, id="NV_RATE"),
    pytest.param(0x922, id="RETRY"),
    pytest.param(0x923, id="NV_UNAVAILABLE"),
]
FULL = [
    pytest.param(0x902, id="OBJECT_MEMORY"),
    pytest.param(0x903, id="SESSION_MEMORY"),
    pytest.param(0x905, id="SESSION_HANDLES"),
    pytest.param(0x906, id="OBJECT_HANDLES"),
]


@pytest.fixture
def wire(swtpm: Swtpm) -> Iterator[Wire]:
    with Wire(swtpm) as wire:
        yield wire


COMMANDS: Final = {
    "EvictControl": 0x120,
    "CreatePrimary": 0x131,
    "ActivateCredential": 0x147,
    "Certify": 0x148,
    "PolicySecret": 0x151,
    "Create": 0x153,
    "Load": 0x157,
    "Sign": 0x15D,
    "Unseal": 0x15E,
    "FlushContext": 0x165,
    "PolicyAuthValue": 0x16B,
    "ReadPublic": 0x173,
    "StartAuthSession": 0x176,
    "GetCapability": 0x17A,
    "PCR_Read": 0x17E,
    "PolicyPCR": 0x17F,
    "PolicyRestart": 0x180,
    "TestParms": 0x18A,
    "CreateLoaded": 0x191,
}
"""Of a first start and all that a store does after it."""


PROTECTED: Final = {"session": "encrypted", "key_auth": "generated", "pcrs": (0,)}


def do_everything(opened: Openers, tcti: str, seconds: float) -> None:
    """All that a store does; `opened` closes it."""
    store = opened(tcti=tcti, **PROTECTED)
    store.within(seconds)
    assert all(store.supports(algorithm) for algorithm in Algorithm)
    key = sign(store)
    store.unload()
    store.check(key)
    store = opened(tcti=tcti)  # with all that protects it, a bare TPM has no session left to attest
    store.within(seconds)
    key, terms = sign(store), AttestationTerms()
    attest(store, key, qualifying=b"once", terms=terms)
    told = attestation_key(store, terms=terms)
    ek = read_public(told.endorsement_keys[0].public or b"", "EK").key
    challenge, _ = make_challenge(ek, read_public(told.public, "AK").name, believed="given")
    attest(store, key, qualifying=b"twice", terms=terms, challenge=challenge)


@pytest.mark.parametrize("code", BUSY)
def test_a_tpm_that_says_later_to_every_command_is_asked_again(
    swtpm: Swtpm, opened: Openers, wire: Wire, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first start on, when the storage root key is made. How long it waits each time makes no difference."""
    monkeypatch.setattr("stationkey.keystore.tpm2.context._FIRST", 1e-5)
    later = Later(wire, code, times=HIDDEN if code in {0x908, 0x90A, 0x922} else 2)
    do_everything(opened, wire.tcti, 600)
    assert set(COMMANDS.values()) <= later.refused
    opened.close()
    assert leftovers(swtpm) == []


@pytest.mark.parametrize("code", FULL)
def test_behind_a_resource_manager_a_tpm_that_is_full_for_a_while_is_asked_again(
    swtpm: Swtpm, wire: Wire, code: int
) -> None:
    """What fills it is others', and they may let go of it."""
    later = Later(wire, code, times=2)
    with closing(Tpm2KeyStore(wire.tcti, guest=True)) as store:
        store.within(600)
        sign(store)
    assert {0x120, 0x131, 0x15D, 0x165, 0x191} <= later.refused
    assert leftovers(swtpm) == []


@pytest.mark.parametrize(("name", "of"), COMMANDS.items(), ids=COMMANDS)
def test_a_tpm_that_says_later_until_the_end_costs_the_call_and_no_more(
    swtpm: Swtpm, opened: Openers, wire: Wire, name: str, of: int
) -> None:
    """Whatever command it is: one reason, no other judgement, and the next call succeeds."""
    Later(wire, 0x923, times=None, of=of)
    if name == "FlushContext":  # what was asked for is done by then
        with suppress(KeyStoreError):
            do_everything(opened, wire.tcti, 0.1)
    else:
        error = refusal(lambda: do_everything(opened, wire.tcti, 0.1))
        assert (error.reason, error.transient, error.scope) == ("tpm_busy", True, Scope.STORE)
    wire.commands = wire.responses = untouched
    do_everything(opened, wire.tcti, 600)
    opened.close()
    assert leftovers(swtpm) == []


def test_the_time_of_a_job_is_what_tries_may_take(wire: Wire) -> None:
    """It ends with its own reason, before whoever waits gives up; and one that is given up ends at once."""
    later = Later(wire, 0x923, times=None)

    def generate(store: KeyStore) -> object:
        return store.generate(P256)

    with closing(KeyStoreThread(lambda: Tpm2KeyStore(wire.tcti))) as thread:
        error = thread.submit(generate, timeout=1.0).exception(1.0)
        assert isinstance(error, KeyStoreError)
        assert error.reason == "tpm_busy"
        assert not thread.hung
    assert later.refusals > HIDDEN


def test_a_store_that_is_abandoned_while_it_waits_ends_at_once(wire: Wire) -> None:
    store = Tpm2KeyStore(wire.tcti)
    store.within(600)
    later = Later(wire, 0x923, times=None)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(store.generate, P256)
        assert later.began.wait(30)
        store.abandon()
        error = call.exception(30)
    store.close()
    assert isinstance(error, KeyStoreError)
    assert error.reason == "keystore_timeout"


def test_a_lockout_is_told_at_once(opened: Openers, wire: Wire) -> None:
    """It takes hours."""
    Later(wire, 0x921, times=None, of=0x191)
    store = opened(tcti=wire.tcti)
    store.within(600)
    assert refusal(lambda: store.generate(P256)).reason == "tpm_lockout"
