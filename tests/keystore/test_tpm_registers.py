"""Keys in the TPM that are bound to platform configuration registers, and the file format that says so."""

from __future__ import annotations

import hashlib
import subprocess
from typing import Any

import pytest
from msgspec.structs import replace
from peers import Swtpm
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.types import TPM2B_PRIVATE, TPM2B_PUBLIC, TPMT_SIG_SCHEME

from protection import P256, SECRET, Opener, leftovers, load_with_tools, refusal, sign, sign_with_tools, tool
from stationkey.errors import Scope
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.keyfile import Command, KeyFile, policy_digest
from stationkey.keystore.tpm2.pcr import PcrPolicy, Registers
from stationkey.keystore.tpm2.store import Tpm2KeyStore

SRK, OTHER = 0x81000001, 0x81000010
SESSIONS = ("none", "hmac", "encrypted")


# Registers.


@pytest.mark.parametrize("auth", [None, SECRET, "generated"], ids=["no-auth", "file", "generated"])
@pytest.mark.parametrize("session", SESSIONS)
def test_a_key_is_of_no_use_while_its_registers_have_other_values(
    swtpm: Swtpm, opened: Opener, session: str, auth: str | None
) -> None:
    """PCR 16 is there for trying: it can be reset without a reboot."""
    options = {"pcrs": (7, 16), "session": session} | ({} if auth is None else {"key_auth": auth})
    store = opened(**options)
    key = sign(store)
    store.close()
    extend(swtpm)
    for use in (sign, Tpm2KeyStore.check):
        error = refusal(lambda: use(store, key))  # noqa: B023 - called at once
        assert error.reason == "pcr_changed"
        assert "PCR 7, 16 (sha256)" in error.message
    sign(store)  # a new key is bound to the values of now
    store.close()
    tool(swtpm, "tpm2_pcrreset", "16")
    sign(store, key)
    store.close()
    assert leftovers(swtpm) == []


def extend(tpm: Swtpm, bank: str = "sha256", number: int = 16) -> None:
    tool(tpm, "tpm2_pcrextend", f"{number}:{bank}={hashlib.new(bank, b'other firmware').hexdigest()}")


def test_the_policy_is_the_one_that_tpm2_tools_computes(swtpm: Swtpm, opened: Opener) -> None:
    extend(swtpm)
    store = opened(pcrs=(0, 16, 23), key_auth=SECRET)
    key = sign(store)
    store.close()
    tool(swtpm, "tpm2_startauthsession", "-S", "trial.ctx")
    tool(swtpm, "tpm2_policypcr", "-S", "trial.ctx", "-l", "sha256:0,16,23")
    tool(swtpm, "tpm2_policyauthvalue", "-S", "trial.ctx", "-L", "policy")
    tool(swtpm, "tpm2_flushcontext", "trial.ctx")
    load_with_tools(swtpm, key)
    said = tool(swtpm, "tpm2_readpublic", "-c", "key.ctx")
    tool(swtpm, "tpm2_flushcontext", "-t")
    assert f"authorization policy: {(swtpm.directory / 'policy').read_bytes().hex()}" in said
    attributes = next(line for line in said.splitlines() if "fixedtpm|" in line)
    assert "userwithauth" not in attributes, "or the value alone would do"
    assert "adminwithpolicy" not in attributes, "or it could not be certified"
    assert policy_digest(KeyFile.read(key.private).policy) == (swtpm.directory / "policy").read_bytes()


def test_neither_the_value_alone_nor_the_registers_alone_let_anyone_sign(swtpm: Swtpm, opened: Opener) -> None:
    store = opened(pcrs=(16,), key_auth=SECRET)
    key = sign(store)
    store.close()
    assert "0x12F" in sign_with_tools(swtpm, key, "-p", SECRET, fails=True)  # TPM_RC_AUTH_UNAVAILABLE
    tool(swtpm, "tpm2_startauthsession", "--policy-session", "-S", "s.ctx")
    tool(swtpm, "tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:16")
    assert "0x99D" in sign_with_tools(swtpm, key, "-p", "session:s.ctx", fails=True)  # TPM_RC_POLICY_FAIL


@pytest.mark.parametrize("auth", [None, SECRET], ids=["no-auth", "auth"])
def test_a_key_that_is_bound_to_registers_can_still_be_certified(
    swtpm: Swtpm, opened: Opener, auth: str | None
) -> None:
    """TPM2_Certify needs the ADMIN role, which without adminWithPolicy is the authorisation value's."""
    store = opened(pcrs=(16,), **({} if auth is None else {"key_auth": auth}))
    key = sign(store)
    store.close()
    esapi = ESAPI(swtpm.tcti)
    file = KeyFile.read(key.private)
    loaded = esapi.load(
        esapi.tr_from_tpmpublic(SRK), TPM2B_PRIVATE.unmarshal(file.private)[0], TPM2B_PUBLIC.unmarshal(file.public)[0]
    )
    esapi.tr_set_auth(loaded, auth or "")
    none = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
    attest, _ = esapi.certify(loaded, ESYS_TR.NULL, b"nonce", none)
    assert b"nonce" in bytes(attest)
    esapi.flush_context(loaded)
    esapi.close()


def test_a_key_keeps_the_registers_that_it_was_made_with_when_the_configuration_changes(
    swtpm: Swtpm, opened: Opener
) -> None:
    before = sign(opened())
    bound = sign(opened(pcrs=(16,)))
    for options in ({}, {"pcrs": (23,), "pcr_bank": "sha1"}, {"pcrs": (16,), "pcr_bank": "sha512"}):
        store = opened(**options)
        sign(store, bound)
        sign(store, before)
    store.close()
    extend(swtpm)
    assert refusal(lambda: sign(store, bound)).reason == "pcr_changed"
    sign(store, before)


@pytest.mark.parametrize("bank", ["sha1", "sha256", "sha384", "sha512"])
def test_more_registers_than_the_tpm_tells_at_a_time_are_bound_in_every_bank(opened: Opener, bank: str) -> None:
    sign(opened(pcrs=tuple(range(24)), pcr_bank=bank))


def test_a_bank_that_is_not_active_is_refused_in_words_before_a_key_is_made(
    swtpm: Swtpm, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(swtpm, "tpm2_pcrallocate", "sha1:none+sha256:all+sha384:none+sha512:none")
    swtpm.kill()
    swtpm.start()
    store = opened(pcrs=(0,), pcr_bank="sha384")
    monkeypatch.setattr(Context, "create_loaded", None)
    for use in (lambda: store.supports(P256), lambda: store.generate(P256)):
        error = refusal(use)
        assert (error.reason, error.scope) == ("pcr_bank_inactive", Scope.STORE)
        assert "PCR 0 (sha384)" in error.message


def test_a_register_that_is_not_there_is_not_taken_for_another(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPM may leave some out of a bank, and then tells the others alone."""
    real = ESAPI.pcr_read

    def without_three(esapi: ESAPI, selection: Any, *sessions: Any) -> Any:
        numbers = [number for number in Registers.unmarshal(selection.marshal()).numbers if number != 3]
        return real(esapi, Registers("sha256", tuple(numbers)).structure(), *sessions)

    monkeypatch.setattr(ESAPI, "pcr_read", without_three)
    store = opened(pcrs=(3, 5))
    error = refusal(lambda: store.generate(P256))
    assert error.reason == "pcr_bank_inactive"
    assert "PCR 3, 5 (sha256)" in error.message


def test_a_register_that_changes_while_the_policy_is_shown_costs_a_second_try(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any register: the TPM counts all changes together, and answers TPM_RC_PCR_CHANGED."""
    store = opened(pcrs=(16,))
    key = sign(store)
    real, calls = ESAPI.sign, []

    def once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise TSS2_Exception(0x128)
        return real(*arguments)

    monkeypatch.setattr(ESAPI, "sign", once)
    sign(store, key)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param((Command(0x16B),), id="auth-value-alone"),
        pytest.param((Command(0x17F, b""),), id="no-selection"),
        pytest.param((Command(0x17F, Registers("sha256", (1,)).marshal() + bytes(32)), Command(0x16C)), id="more"),
    ],
)
def test_a_policy_of_another_kind_is_told_as_damage(opened: Opener, policy: tuple[Command, ...]) -> None:
    store = opened()
    key = sign(store)
    other = replace(key, private=replace(KeyFile.read(key.private), policy=policy).der())
    assert refusal(lambda: sign(store, other)).reason == "key_damaged"


# The file format.


def test_without_a_policy_a_key_file_is_byte_for_byte_that_of_the_tss_project(opened: Opener) -> None:
    for options in ({}, {"key_auth": SECRET}, {"srk_handle": OTHER}):
        key = opened(**options).generate(P256)
        theirs = TSSPrivKey.from_der(key.private)
        assert theirs.to_der() == key.private
        assert theirs.empty_auth is ("key_auth" not in options)
        assert theirs.parent == options.get("srk_handle", SRK)


def test_with_a_policy_it_stands_in_the_place_that_the_format_has_for_it(opened: Opener) -> None:
    key = opened(pcrs=(0, 9), key_auth=SECRET).generate(P256)
    said = subprocess.run(
        ["openssl", "asn1parse", "-inform", "DER"], input=key.private, capture_output=True, check=True
    ).stdout.decode()
    assert "cont [ 0 ]" in said
    assert "cont [ 1 ]" in said
    assert "017F" in said
    file = KeyFile.read(key.private)
    assert KeyFile.read(file.der()) == file
    assert PcrPolicy.read(file.policy) == PcrPolicy(Registers("sha256", (0, 9)), hashlib.sha256(bytes(64)).digest())
