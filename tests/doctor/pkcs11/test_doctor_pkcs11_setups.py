"""The doctor beside tokens of SoftHSM: as they should be, and with one thing wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctors import look, used, write_config
from peers import Swtpm
from softhsm import PIN, Token

from stationkey.contract.profiles import Algorithm
from stationkey.doctor.report import Level
from stationkey.errors import KeyStoreError
from stationkey.keystore import KeyRef, keystore_opener
from wire import Wire, WithoutP521


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Token]:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "token").mkdir()
    made = Token.make(tmp_path.name[:32], tmp_path / "token")
    yield made
    made.order()
    made.remove()


def make_key(token: Token, state_dir: Path) -> KeyRef:
    """A key in the token that no ledger knows."""
    store = keystore_opener(token.uri, allow_software_keys=False, terms=None, state_dir=state_dir)()
    try:
        return store.generate(Algorithm.ECDSA_SHA256)
    finally:
        store.close()


def test_a_token_with_a_key_in_use_is_well_and_no_pin_is_tried(tmp_path: Path, token: Token) -> None:
    used(tmp_path, keystore=token.shimmed)
    before = token.calls("C_Login")
    found = look(tmp_path, keystore=token.shimmed)
    assert found.level("token.module") is found.level("token.pin") is found.level("token.room") is Level.OK
    assert found.level("token.certificate_types") is found.level("token.strays") is Level.OK
    assert found.reasons("token.found") == {"simulated"}
    assert found.level("token.trial") is Level.NOT_CHECKED
    assert token.calls("C_Login") == before


def test_keys_are_tried_when_asked_for_and_leave_nothing(tmp_path: Path, token: Token) -> None:
    config = write_config(tmp_path, '[policy]\nalgorithms = ["ECDSA_SHA256", "ECDSA_SHA512"]\n[pool]\nrsa = 0\n')
    found = look(tmp_path, keystore=token.uri, config_file=config, try_keys=True)
    assert [one.level for one in found["token.trial"]] == [Level.OK, Level.OK]
    assert token.objects() == {}
    assert list((tmp_path / "state").iterdir()) == []


def test_what_a_crash_left_and_what_is_not_on_record_is_told(tmp_path: Path, token: Token) -> None:
    state = used(tmp_path, keystore=token.uri)
    known = {path.name for path in (state / "pkcs11").iterdir()}
    make_key(token, state)
    assert look(tmp_path, keystore=token.uri).reasons("token.strays") == {"strays"}
    [stray] = {path.name for path in (state / "pkcs11").iterdir()} - known
    (state / "pkcs11" / stray).unlink()
    found = look(tmp_path, keystore=token.uri)
    assert found.reasons("token.strays") == {"not_recorded"}
    assert stray in found.text("token.strays")


def test_a_wrong_pin_is_remembered_and_seen_by_the_flags(tmp_path: Path, token: Token) -> None:
    pin = tmp_path / "token/pin"
    pin.write_text("0000")
    with pytest.raises(KeyStoreError):
        make_key(token, tmp_path / "state")
    found = look(tmp_path, keystore=token.shimmed)
    assert found.reasons("token.pin") == {"refused"}
    assert token.calls("C_Login") == 0
    pin.write_text(PIN)
    assert look(tmp_path, keystore=token.uri).reasons("token.pin") == {"count_low"}
    pin.unlink()
    missing = look(tmp_path, keystore=token.uri)
    assert missing.reasons("config.secrets") == {"missing"}
    assert missing.reasons("token.pin") == {"secret_unreadable"}


def test_which_token_is_meant(tmp_path: Path, token: Token) -> None:
    gone = look(tmp_path, keystore=token.uri.replace(f"token={token.label}", "token=gone"))
    assert gone.reasons("token.found") == {"pkcs11_token_missing"}
    assert gone.level("token.module") is Level.OK
    Token.make(token.label, tmp_path / "token")
    assert look(tmp_path, keystore=token.uri).reasons("token.found") == {"pkcs11_token_ambiguous"}


@pytest.mark.parametrize("function", ["C_GetSlotList", "C_FindObjectsInit"])
def test_a_module_that_hangs_is_told_in_time(
    tmp_path: Path, token: Token, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr("stationkey.doctor.pkcs11.checks._PATIENCE", 2.0)
    token.order(f"{function} hang")
    assert look(tmp_path, keystore=token.shimmed).reasons("token.module") == {"hung"}
    token.order()


def test_a_module_that_crashes_or_is_not_root_s_is_told(tmp_path: Path, token: Token) -> None:
    source, module = tmp_path / "crash.c", token.directory / "crash.so"
    source.write_text("#include <stdlib.h>\nvoid __attribute__((constructor)) crash(void) { abort(); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", module, source], check=True)
    uri = f"pkcs11:token=x?module-path={module}"
    assert look(tmp_path, keystore=uri).reasons("token.module") == {"crashed"}
    module.chmod(0o777)
    assert look(tmp_path, keystore=uri).reasons("token.module") == {"pkcs11_module_unsafe"}


def test_what_a_tpm_without_p521_can_never_serve_has_a_way_out(tmp_path: Path, token: Token, swtpm: Swtpm) -> None:
    config = write_config(tmp_path, f'[keystores]\nse = "{token.uri}"\n[keystore_for]\nv2g20_certificate = "se"\n')
    with Wire(swtpm) as wire:
        WithoutP521(wire)
        alone = look(tmp_path, keystore=f"tpm2:{wire.tcti}")
        both = look(tmp_path, keystore=f"tpm2:{wire.tcti}", config_file=config)
    [told] = [one for one in alone["tpm.certificate_types"] if one.reason == "not_possible"]
    assert "v2g20_certificate" in told.message
    assert "[keystore_for]" in told.advice
    assert both.level("tpm.certificate_types") is both.level("token.certificate_types") is Level.OK
    assert "v2g20_certificate" not in both.text("tpm.certificate_types")
    [only] = both["token.certificate_types"]
    assert only.message.startswith("keystores.se: v2g20_certificate ")
    assert len(both["tpm.keystore"]) == 2
