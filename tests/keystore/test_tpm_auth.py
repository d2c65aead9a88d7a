"""What keys in the TPM hang on and are authorised by: other parents, authorisation values, sealed ones among them."""

from __future__ import annotations

import base64
import os
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from peers import Swtpm
from tpm2_pytss import ESAPI

from protection import (
    P256,
    SECRET,
    Opener,
    leftovers,
    lockout_counter,
    refusal,
    sealed_files,
    sign,
    sign_with_tools,
    tool,
    write_secret,
)
from stationkey.config.settings import TpmTerms
from stationkey.errors import Scope
from stationkey.keystore.protocol import KeyRef
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.keyfile import KeyFile, read_pem
from stationkey.keystore.tpm2.sealed import MAX_SEALED
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.system.pem import to_pem

SRK, OTHER = 0x81000001, 0x81000010
SESSIONS = ("none", "hmac", "encrypted")


# Another storage root key.


def test_the_storage_root_key_is_where_the_configuration_says(swtpm: Swtpm, opened: Opener) -> None:
    store = opened(srk_handle=OTHER)
    key = sign(store)
    store.close()
    assert KeyFile.read(key.private).parent == OTHER
    assert tool(swtpm, "tpm2_getcap", "handles-persistent").split() == ["-", f"{OTHER:#X}".replace("X", "x")]


def test_a_key_goes_on_being_used_under_the_parent_that_it_has(opened: Opener) -> None:
    old = sign(opened())
    store = opened(srk_handle=OTHER)
    new = sign(store)
    sign(store, old)
    sign(opened(), new)


def test_a_key_whose_parent_is_gone_is_refused_in_words(swtpm: Swtpm, opened: Opener) -> None:
    old = sign(opened())
    store = opened(srk_handle=OTHER)
    new = sign(store)
    store.close()
    tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", f"{SRK:#x}")
    error = refusal(lambda: sign(store, old))
    assert error.reason == "parent_missing"
    assert "0x81000001" in error.message
    sign(store, new)


def test_a_key_under_a_hierarchy_is_refused_in_words(opened: Opener) -> None:
    """As other programs write them: its parent is made anew at each use, and none of ours was."""
    store = opened()
    key = sign(store)
    other = replace(key, private=replace(KeyFile.read(key.private), parent=0x40000001).der())
    assert refusal(lambda: sign(store, other)).reason == "parent_missing"


# Authorisation of hierarchy and storage root key.


@pytest.mark.parametrize("session", SESSIONS)
def test_the_owner_s_authorisation_value_is_used_to_make_the_storage_root_key(
    swtpm: Swtpm, opened: Opener, session: str
) -> None:
    tool(swtpm, "tpm2_changeauth", "-c", "o", SECRET)
    sign(opened(owner_auth=SECRET, session=session))
    sign(opened(session=session))  # it is needed for nothing else


@pytest.mark.parametrize("given", [None, "wrong"])
def test_an_owner_authorisation_that_is_missing_or_wrong_is_told_by_its_option(
    swtpm: Swtpm, opened: Opener, given: str | None
) -> None:
    tool(swtpm, "tpm2_changeauth", "-c", "o", SECRET)
    store = opened(**({} if given is None else {"owner_auth": given}))
    for _ in range(5):
        error = refusal(lambda: store.generate(P256))
        assert error.reason == "tpm_auth"
        assert "owner_auth" in error.message
    store.close()
    assert lockout_counter(swtpm) == 0
    assert leftovers(swtpm) == []


def test_keys_go_on_working_while_the_tpm_is_in_lockout(swtpm: Swtpm, opened: Opener) -> None:
    """Whoever may open the TPM can bring that about, by wrong values for an object of his own."""
    store = opened(key_auth=SECRET)
    key = sign(store)
    store.close()
    his = "0x81000009"
    tool(swtpm, "tpm2_createprimary", "-C", "o", "-p", "right", "-c", "his.ctx")
    tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", "his.ctx", his)
    tool(swtpm, "tpm2_flushcontext", "-t")
    for _ in range(3):
        tool(swtpm, "tpm2_create", "-C", his, "-P", "wrong", fails=True)
    said = tool(swtpm, "tpm2_create", "-C", his, "-P", "right", fails=True)
    assert "0x921" in said  # TPM_RC_LOCKOUT

    sign(store, key)
    sign(store)


@pytest.mark.parametrize("session", SESSIONS)
def test_a_storage_root_key_gets_its_authorisation_value_and_is_used_with_it(
    swtpm: Swtpm, opened: Opener, session: str
) -> None:
    key = sign(opened(srk_auth=SECRET, session=session))
    sign(opened(srk_auth=SECRET, session=session), key)
    for wrong in ({}, {"srk_auth": "wrong"}):
        store = opened(session=session, **wrong)
        error = refusal(lambda: sign(store, key))  # noqa: B023 - called at once
        assert error.reason == "tpm_auth"
        assert "srk_auth" in error.message
        store.close()
    assert lockout_counter(swtpm) == 0, "the template has noda"
    assert leftovers(swtpm) == []


@pytest.mark.parametrize("session", SESSIONS)
def test_a_wrong_value_for_a_storage_root_key_that_counts_them_is_tried_once(
    swtpm: Swtpm, opened: Opener, tmp_path: Path, session: str
) -> None:
    """What tpm2_createprimary makes has no noda: three wrong tries would lock the TPM. A corrected file is noticed."""
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt"
    tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "ecc256", "-a", attributes, "-p", SECRET, "-c", "primary.ctx")
    tool(swtpm, "tpm2_flushcontext", "-t")
    tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", "primary.ctx", f"{SRK:#x}")
    tool(swtpm, "tpm2_flushcontext", "-t")
    store = opened(srk_auth="wrong", session=session)
    for _ in range(10):
        assert refusal(lambda: store.generate(P256)).reason == "tpm_auth"
    store.close()
    assert lockout_counter(swtpm) == 1
    write_secret(tmp_path / "srk_auth", SECRET)
    sign(store)


@pytest.mark.parametrize(
    "secret",
    [
        pytest.param(b"x" * 33, id="too-long"),
        pytest.param(b"abc\0", id="zero-at-the-end"),
        pytest.param(b"ab\0c", id="zero-inside"),
        pytest.param(b"one\ntwo", id="two-lines"),
    ],
)
def test_a_value_that_the_tpm_or_openssl_would_take_for_another_is_refused_before_a_key_is_made(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, secret: bytes
) -> None:
    store = opened(key_auth=secret)
    monkeypatch.setattr(Context, "create_loaded", None)
    error = refusal(lambda: store.generate(P256))
    assert (error.reason, error.scope) == ("auth_value_unfit", Scope.STORE)
    assert "key_auth" in error.message


def test_a_value_of_as_many_bytes_as_the_tpm_takes_works(opened: Opener) -> None:
    sign(opened(key_auth="x" * 32))


def test_a_secret_that_cannot_be_read_is_told_by_its_option(opened: Opener, tmp_path: Path) -> None:
    store = opened(key_auth=SECRET)
    (tmp_path / "key_auth").unlink()
    error = refusal(lambda: store.generate(P256))
    assert (error.reason, error.scope) == ("secret_unreadable", Scope.STORE)
    assert "[tpm] key_auth" in error.message


# Authorisation of keys.


def make_file(opened: Opener, **options: Any) -> tuple[Tpm2KeyStore, KeyRef]:
    store = opened(key_auth=SECRET, **options)
    return store, sign(store)


@pytest.mark.parametrize("session", SESSIONS)
def test_only_the_keys_with_an_authorisation_value_need_it(swtpm: Swtpm, opened: Opener, session: str) -> None:
    before = sign(opened(session=session))
    store, key = make_file(opened, session=session)
    assert [KeyFile.read(each.private).empty_auth for each in (before, key)] == [True, False]
    sign(store, before)
    for wrong in ({}, {"key_auth": "wrong"}):
        store = opened(session=session, **wrong)
        for _ in range(4):
            for use in (sign, Tpm2KeyStore.check):
                error = refusal(lambda: use(store, key))  # noqa: B023 - called at once
                assert error.reason == "key_auth_wrong"
        sign(store, before)
        sign(store)  # new keys get the value of now
    store.close()
    assert lockout_counter(swtpm) == 0
    assert leftovers(swtpm) == []


def test_the_tpm_itself_refuses_to_sign_without_the_value(swtpm: Swtpm, opened: Opener) -> None:
    store, key = make_file(opened)
    store.close()
    for password, fails in (("", True), ("wrong", True), (SECRET, False)):
        said = sign_with_tools(swtpm, key, *(["-p", password] if password else []), fails=fails)
        assert fails is ("0x9A2" in said)


# A value that the TPM has sealed.


@pytest.mark.parametrize("pcrs", [(), (0, 7)], ids=["plain", "registers"])
@pytest.mark.parametrize("session", SESSIONS)
def test_a_generated_value_outlives_store_and_power_and_is_on_disk_only_sealed(
    swtpm: Swtpm, opened: Opener, tmp_path: Path, session: str, pcrs: tuple[int, ...]
) -> None:
    options = {"key_auth": "generated", "session": session, "pcrs": pcrs}
    store = opened(**options)
    one, two = sign(store), sign(store)
    value = store.auth_value(one.private)
    assert value == store.auth_value(two.private)
    assert len(value) == 32
    assert value.isascii()
    (file,) = sealed_files(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    content = file.read_bytes()
    assert value not in base64.b64decode(b"".join(content.splitlines()[1:-1]))
    assert all(value not in each.read_bytes() for each in tmp_path.rglob("*") if each.is_file())
    store.close()
    swtpm.kill()
    swtpm.start()
    again = opened(**options)
    sign(again, one)
    assert again.auth_value(one.private) == value
    assert sealed_files(tmp_path) == [file]
    again.close()
    assert leftovers(swtpm) == []


def test_no_two_stations_have_the_same_generated_value(swtpm: Swtpm, tmp_path: Path) -> None:
    values = set()
    for name in "ab":
        with closing(
            Tpm2KeyStore(swtpm.tcti, terms=TpmTerms(key_auth="generated"), state_dir=tmp_path / name)
        ) as store:
            (tmp_path / name).mkdir()
            values.add(store.auth_value(sign(store).private))
    assert len(values) == 2


def test_a_lost_value_is_told_and_new_keys_get_another(opened: Opener, tmp_path: Path) -> None:
    store = opened(key_auth="generated")
    lost = sign(store)
    store.close()
    (file,) = sealed_files(tmp_path)
    file.unlink()
    error = refusal(lambda: store.check(lost))
    assert error.reason == "key_auth_wrong"
    sign(store)
    assert refusal(lambda: store.check(lost)).reason == "key_auth_wrong", "it has another value"


@pytest.mark.parametrize("damage", [b"", b"no key", "cut", "flipped"], ids=["empty", "other", "cut-short", "flipped"])
def test_a_damaged_value_is_told_and_not_overwritten(opened: Opener, tmp_path: Path, damage: bytes | str) -> None:
    """As with the ledger: a backup may bring it back, and a key must not be cut off by a guess."""
    store = opened(key_auth="generated")
    key = sign(store)
    store.close()
    (file,) = sealed_files(tmp_path)
    whole = file.read_bytes()
    match damage:
        case "cut":
            content = whole[:-60]
        case "flipped":
            blob = read_pem(whole)
            assert blob is not None
            broken = replace(blob, private=blob.private[:-1] + bytes([blob.private[-1] ^ 1]))
            content = to_pem("TSS2 PRIVATE KEY", broken.der())
        case _:
            assert isinstance(damage, bytes)
            content = damage
    file.write_bytes(content)
    for use, scope in ((lambda: sign(store, key), Scope.REQUEST), (lambda: store.generate(P256), Scope.STORE)):
        error = refusal(use)
        assert (error.reason, error.scope) == ("tpm_file_damaged", scope)
        assert str(file) in error.message
    assert file.read_bytes() == content
    file.write_bytes(whole)
    sign(store, key)


def test_a_value_that_cannot_be_kept_is_not_given_to_a_key(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever dies before the file is whole, there is no key yet that needs it."""
    store = opened(key_auth="generated")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("fsync", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(os, place, full)
            patch.setattr(Context, "create_loaded", None)
            assert refusal(lambda: store.generate(P256)).reason == "tpm_file_unusable"
        assert [file for file in sealed_files(tmp_path) if file.suffix == ".pem"] == []
    sign(store)


def test_of_two_that_make_a_value_at_once_both_use_the_first(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that was given up may come back late; what it made must not take the place of what keys depend on."""
    one = opened(key_auth="generated")
    key = sign(one)
    one.close()
    (file,) = sealed_files(tmp_path)
    first = file.read_bytes()
    file.unlink()
    late = opened(key_auth="generated")
    create = ESAPI.create

    def overtaken(*arguments: Any, **options: Any) -> Any:
        file.write_bytes(first)
        return create(*arguments, **options)

    monkeypatch.setattr(ESAPI, "create", overtaken)
    late.generate(P256)
    assert file.read_bytes() == first
    sign(late, key)


def test_a_cleared_tpm_gets_a_value_of_its_own_and_the_old_one_is_kept(
    swtpm: Swtpm, opened: Opener, tmp_path: Path
) -> None:
    store = opened(key_auth="generated")
    old = sign(store)
    store.close()
    (file,) = sealed_files(tmp_path)
    content = file.read_bytes()
    swtpm.kill()
    chip = {each: each.read_bytes() for each in swtpm.directory.glob("*.permall")}
    swtpm.new_chip()
    swtpm.start()
    sign(store)
    assert refusal(lambda: sign(store, old)).reason in {"key_of_another_tpm", "key_auth_wrong"}
    assert file.read_bytes() == content
    assert len(sealed_files(tmp_path)) == 2
    store.close()
    swtpm.kill()
    for each, state in chip.items():
        each.write_bytes(state)
    swtpm.start()
    sign(store, old)  # the board is back


def test_sealed_values_are_bounded_and_the_oldest_goes_first(opened: Opener, tmp_path: Path) -> None:
    directory = tmp_path / "tpm"
    directory.mkdir()
    for number in range(MAX_SEALED + 5):
        file = directory / f"auth-{number:016x}.pem"
        file.touch()
        os.utime(file, (number, number))
    sign(opened(key_auth="generated"))
    left = sealed_files(tmp_path)
    assert len(left) == MAX_SEALED
    assert (directory / f"auth-{MAX_SEALED + 4:016x}.pem") in left
    assert (directory / f"auth-{0:016x}.pem") not in left


def test_a_link_in_the_place_of_a_sealed_value_is_not_followed(opened: Opener, tmp_path: Path) -> None:
    store = opened(key_auth="generated")
    sign(store)
    store.close()
    (file,) = sealed_files(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert refusal(lambda: store.generate(P256)).reason == "tpm_file_unusable"
