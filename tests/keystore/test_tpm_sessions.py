"""Sessions with the TPM, and somebody on the bus who listens to them or takes a hand."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from peers import Swtpm
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE

from protection import P256, SECRET, Opener, Openers, leftovers, refusal, sign, tool
from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from wire import Meddler, Noise, Wire, flipped, untouched

SRK = 0x81000001
SESSIONS = ("none", "hmac", "encrypted")

# Command codes [TPM 2.0 part 2, 6.5.2].
CREATE_PRIMARY, CREATE, LOAD, SIGN = 0x131, 0x153, 0x157, 0x15D
UNSEAL, FLUSH_CONTEXT, CREATE_LOADED = 0x15E, 0x165, 0x191
START_AUTH_SESSION = 0x176


# Sessions.


@pytest.mark.parametrize("session", ["hmac", "encrypted"])
def test_sessions_do_not_keep_a_tpm_from_going_away_and_coming_back(swtpm: Swtpm, opened: Opener, session: str) -> None:
    store = opened(session=session, pcrs=(16,))
    key = sign(store)
    for startup in (True, False):
        swtpm.kill()
        swtpm.startup = startup
        swtpm.start()
        sign(store, key)
    swtpm.kill()
    assert refusal(lambda: sign(store, key)).reason == "tpm_unreachable"
    swtpm.startup = True
    swtpm.start()
    sign(store, key)
    store.close()
    assert leftovers(swtpm) == []


def test_sessions_are_kept_from_one_request_to_the_next(swtpm: Swtpm, opened: Opener) -> None:
    sign(opened())  # makes the storage root key
    with Wire(swtpm) as wire:
        store = opened(tcti=wire.tcti, session="encrypted", pcrs=(0,))
        for _ in range(5):
            sign(store)
        store.close()
    assert wire.codes.count(START_AUTH_SESSION) == 2  # one of each kind
    assert leftovers(swtpm) == []


def test_behind_a_resource_manager_a_session_lasts_no_longer_than_a_job(
    swtpm: Swtpm, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the table is everybody's. The real one of ``tests/car`` does not tell what is in the TPM behind it."""
    sign(opened())
    with Wire(swtpm) as wire:
        store = opened(tcti=wire.tcti, session="encrypted", pcrs=(0,))
        monkeypatch.setattr(store, "_resource_manager", True)
        assert store.supports(P256)
        wire.exchanges.clear()
        for _ in range(3):
            sign(store)
            store.unload()  # as `KeyStoreThread` does after each job
    assert wire.codes.count(START_AUTH_SESSION) == 6  # one of each kind for each job
    assert leftovers(swtpm) == []


kinds = pytest.mark.parametrize("kind", [TPM2_SE.HMAC, TPM2_SE.POLICY], ids=["hmac", "policy"])


@pytest.mark.usefixtures("alone")
@kinds
def test_sessions_that_a_dead_program_left_do_not_keep_the_store_from_working(
    swtpm: Swtpm, opened: Opener, kind: Any
) -> None:
    """On a TPM that one program at a time can open."""
    fill_sessions(swtpm, kind)
    assert len(leftovers(swtpm)) == 3
    store = opened(session="encrypted", pcrs=(0,))
    sign(store)
    store.close()
    assert leftovers(swtpm) == []


@pytest.mark.usefixtures("alone")
def test_sessions_that_were_saved_are_left_alone(swtpm: Swtpm, opened: Opener) -> None:
    """As tpm2_startauthsession leaves them, and as the kernel's resource manager keeps those of its clients."""
    for name in ("one", "two"):
        tool(swtpm, "tpm2_startauthsession", "--policy-session", "-S", name)
    saved = leftovers(swtpm)
    assert len(saved) == 2
    store = opened(session="hmac")
    sign(store)
    store.close()
    assert leftovers(swtpm) == saved


@pytest.mark.usefixtures("alone")
@kinds
def test_a_session_table_that_is_full_in_mid_life_is_emptied(swtpm: Swtpm, opened: Opener, kind: Any) -> None:
    store = opened(session="hmac", pcrs=(0,))
    key = store.generate(P256)  # no policy session yet
    store.unload()
    fill_sessions(swtpm, kind)
    sign(store, key)
    sign(store)
    store.close()
    assert leftovers(swtpm) == []


def fill_sessions(tpm: Swtpm, kind: Any) -> None:
    esapi = ESAPI(tpm.tcti)
    code = 0
    while not code:
        try:
            esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, kind, None, TPM2_ALG.SHA256)
        except TSS2_Exception as full:
            code = full.rc
    assert code == 0x903
    esapi.close()


@pytest.mark.parametrize("code", [0x903, 0x905])
def test_a_session_table_that_stays_full_is_told(opened: Opener, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As it may be behind a resource manager, where sessions are others' to end."""
    store = opened(session="hmac")
    store.within(0.1)

    def refuse(*_: object, **__: object) -> None:
        raise TSS2_Exception(code)

    monkeypatch.setattr(ESAPI, "start_auth_session", refuse)
    error = refusal(lambda: store.generate(P256))
    assert error.reason == "tpm_full"
    assert "session" in error.message


@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.parametrize("pcrs", [(), (16,)], ids=["plain", "registers"])
def test_a_refused_signature_leaves_nothing_in_the_tpm(
    swtpm: Swtpm, opened: Opener, session: str, pcrs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(session=session, pcrs=pcrs, key_auth="generated")
    key = store.generate(P256)

    def refuse(*_: object) -> None:
        raise TpmError(0x101)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "sign", refuse)
        assert refusal(lambda: sign(store, key)).reason == "tpm_error"
    sign(store, key)
    store.close()
    assert leftovers(swtpm) == []


def test_an_abandoned_store_ends_no_session_of_the_one_that_took_over(swtpm: Swtpm, opened: Openers) -> None:
    """The TPM gives the same handles to both."""
    store = opened(session="hmac")
    sign(store)
    store.abandon()
    with closing(Tpm2KeyStore(swtpm.tcti, terms=store._terms, state_dir=store._kept.path.parent)) as successor:  # type: ignore[union-attr]  # noqa: SLF001 - the same again
        key = sign(successor)
        store.close()
        sign(successor, key)
    sign(opened(session="hmac"))  # clears away what the abandoned one has left
    opened.close()
    assert leftovers(swtpm) == []


# Whose storage root key it is.


@pytest.mark.parametrize("session", ["hmac", "encrypted"])
def test_sessions_are_salted_with_no_other_storage_root_key_than_the_first_time(
    swtpm: Swtpm, opened: Opener, tmp_path: Path, session: str
) -> None:
    store = opened(session=session)
    sign(store)
    store.close()
    file = tmp_path / "tpm" / "srk-81000001.name"
    tool(swtpm, "tpm2_readpublic", "-c", f"{SRK:#x}", "-n", "name")
    assert bytes.fromhex(file.read_text()) == (swtpm.directory / "name").read_bytes()
    swtpm.kill()
    swtpm.new_chip()
    swtpm.start()
    for _ in range(2):
        error = refusal(lambda: store.generate(P256))
        assert (error.reason, error.scope) == ("srk_changed", Scope.STORE)
        assert str(file) in error.hint
    store.close()
    assert leftovers(swtpm) == []
    file.unlink()
    sign(store)


@pytest.mark.parametrize("session", ["hmac", "encrypted"])
def test_every_session_has_a_salt_that_a_listener_does_not_know(swtpm: Swtpm, opened: Opener, session: str) -> None:
    """The storage root key has no authorisation value by default: what is not salted is secured by nothing secret.

    The session before there is a storage root key has a salt, too, and so has one that shows a policy.
    """
    with Wire(swtpm) as wire:
        sign(opened(tcti=wire.tcti, session=session, key_auth=SECRET, pcrs=(0,)))
    begun = [exchange.command for exchange in wire.exchanges if exchange.code == START_AUTH_SESSION]

    assert [salt_of(command)[0] == SRK for command in begun] == [False, True, True]
    salts = {salt_of(command)[1] for command in begun}
    assert len(salts) == len(begun)
    assert min(map(len, salts)) > 2 * 32  # a point on P-256


def salt_of(command: bytes) -> tuple[int, bytes]:
    """The key that TPM2_StartAuthSession names for the salt, and the salt as encrypted to it [TPM 2.0 part 3, 11.1]."""
    nonce = int.from_bytes(command[18:20], "big")
    size = int.from_bytes(command[20 + nonce : 22 + nonce], "big")
    return int.from_bytes(command[10:14], "big"), command[22 + nonce : 22 + nonce + size]


def test_a_name_that_was_put_there_in_the_factory_is_held_to(opened: Opener, tmp_path: Path) -> None:
    """So the first time need not be trusted."""
    (tmp_path / "tpm").mkdir()
    (tmp_path / "tpm" / "srk-81000001.name").write_text("000b" + "00" * 32 + "\n")
    assert refusal(lambda: opened(session="hmac").generate(P256)).reason == "srk_changed"


def test_the_commands_of_the_document_put_the_name_there_and_it_is_held_to(
    swtpm: Swtpm, opened: Opener, tmp_path: Path
) -> None:
    """docs/tpm.md, run before the first start; only the state directory and its owner are this test's."""
    document = (Path(__file__).parents[2] / "docs/tpm.md").read_text()
    (script,) = (
        block
        for block in re.findall(r"^```sh\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
        if "evictcontrol" in block
    )
    assert script.count("/var/lib/stationkey/") == script.count(" -o stationkey -g stationkey ") == 2
    script = script.replace("/var/lib/stationkey", str(tmp_path)).replace(" -o stationkey -g stationkey ", " ")
    tool(swtpm, "sh", "-euc", script)

    store = opened(session="encrypted")
    sign(store)
    store.close()
    tool(swtpm, "tpm2_clear", "-c", "p")
    assert refusal(lambda: store.generate(P256)).reason == "srk_changed"


def test_a_damaged_name_is_told_and_left_alone(opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "tpm").mkdir()
    file = tmp_path / "tpm" / "srk-81000001.name"
    file.write_text("nonsense")
    error = refusal(lambda: opened(session="hmac").generate(P256))
    assert (error.reason, error.scope) == ("tpm_file_damaged", Scope.STORE)
    assert file.read_text() == "nonsense"


@pytest.mark.parametrize("altered", [1, 2])
def test_a_public_part_that_is_told_otherwise_the_second_time_is_noticed(
    swtpm: Swtpm, opened: Opener, altered: int
) -> None:
    """We read it, and then tpm2-tss for itself; salts are encrypted to what tpm2-tss has read."""
    sign(opened(session="hmac"))
    seen = 0

    def swap(response: bytes) -> bytes:
        nonlocal seen
        if b"\x00\x23\x00\x0b" not in response:  # the public area of an ECC key
            return response
        seen += 1
        return flipped(response, 60) if seen == altered else response

    with Wire(swtpm, responses=swap) as wire:
        store = opened(tcti=wire.tcti, session="hmac")
        assert refusal(lambda: store.generate(P256)).reason == "tpm_altered"
        store.close()
    assert seen == altered


# Somebody on the bus.


@pytest.mark.usefixtures("alone")
def test_on_the_default_path_a_key_and_its_signature_take_two_commands(swtpm: Swtpm, opened: Opener) -> None:
    """And one to unload it. What is not asked for costs nothing."""
    with Wire(swtpm) as wire:
        store = opened(tcti=wire.tcti)
        sign(store)
        store.unload()
        wire.exchanges.clear()
        key = sign(store)
        store.unload()
        assert wire.codes == [CREATE_LOADED, SIGN, FLUSH_CONTEXT]
        wire.exchanges.clear()
        sign(store, key)
        store.check(key)
        store.unload()
        assert wire.codes == [LOAD, SIGN, FLUSH_CONTEXT], "to check a key is no more than to load it"
        store.close()


@pytest.mark.parametrize("session", SESSIONS)
def test_only_with_encrypted_sessions_no_secret_crosses_the_bus_in_the_clear(
    swtpm: Swtpm, opened: Opener, session: str
) -> None:
    """Values that are put into new keys, made by the daemon, sealed and unsealed: from the first command on."""
    owner, srk, key = "owner's own secret", "the root key's secret", "secret of the keys"
    tool(swtpm, "tpm2_changeauth", "-c", "o", owner)
    with Wire(swtpm) as wire:
        options = {"tcti": wire.tcti, "session": session, "owner_auth": owner, "srk_auth": srk}
        sign(opened(**options, key_auth=key))
        store = opened(**options, key_auth="generated", pcrs=(0,))
        sealed = sign(store)
        generated = store.auth_value(sealed.private)
        store.close()
        sign(store, sealed)
        store.close()
    assert {CREATE_PRIMARY, CREATE_LOADED, CREATE, LOAD, UNSEAL, SIGN} <= set(wire.codes)
    heard = {
        name: value in wire.heard
        for name, value in {
            "owner": owner.encode(),
            "srk": srk.encode(),
            "key": key.encode(),
            "generated": generated,
        }.items()
    }
    # An HMAC session shows that one has the value and does not say it; but what is made with it, and unsealed, it does.
    assert (
        heard
        == {
            "none": {"owner": True, "srk": True, "key": True, "generated": True},
            "hmac": {"owner": False, "srk": True, "key": True, "generated": True},
            "encrypted": {"owner": False, "srk": False, "key": False, "generated": False},
        }[session]
    )


@pytest.mark.parametrize("session", ["hmac", "encrypted"])
@pytest.mark.parametrize(
    ("code", "at", "response"),
    [
        pytest.param(CREATE_LOADED, -1, False, id="template"),
        pytest.param(CREATE_LOADED, 40, True, id="new-private-part"),
        pytest.param(CREATE_LOADED, 260, True, id="new-public-key"),
        pytest.param(SIGN, -50, False, id="digest"),
        pytest.param(SIGN, 30, True, id="signature"),
        pytest.param(SIGN, -1, True, id="HMAC"),
        pytest.param(LOAD, 100, False, id="private-part"),
    ],
)
def test_a_bit_that_is_changed_on_the_bus_is_noticed_and_the_next_request_succeeds(
    swtpm: Swtpm, opened: Opener, session: str, code: int, at: int, response: bool
) -> None:
    with Wire(swtpm) as wire:
        store = opened(tcti=wire.tcti, session=session)
        key = sign(store)
        store.unload()
        Meddler(wire, code, at, response=response)
        use = (lambda: sign(store, key)) if code == LOAD else (lambda: sign(store))
        assert refusal(use).reason == "tpm_altered"
        wire.commands = wire.responses = untouched
        sign(store, key)
        sign(store)
        store.close()
    assert leftovers(swtpm) == []


@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.parametrize("auth", [None, SECRET], ids=["no-value", "value"])
@pytest.mark.parametrize("at", [30, 11, -1], ids=["nonce", "handle", "end"])
def test_a_session_whose_beginning_was_altered_is_not_kept(
    swtpm: Swtpm, opened: Opener, session: str, auth: str | None, at: int
) -> None:
    """The registers need a session in any case."""
    options = {"session": session, "pcrs": (0,)} | ({} if auth is None else {"key_auth": auth})
    key = sign(opened(**options))
    with Wire(swtpm) as wire:
        store = opened(tcti=wire.tcti, **options)
        Meddler(wire, START_AUTH_SESSION, at, response=True)
        if session != "none" or auth is not None:
            refusal(lambda: sign(store, key))
        wire.commands = wire.responses = untouched
        sign(store, key)
        store.close()
    store = opened(**options)
    sign(store, key)
    store.close()
    assert leftovers(swtpm) == []


@pytest.mark.parametrize("session", ["hmac", "encrypted"])
@pytest.mark.parametrize("seed", [1, 2, 3, 14, 19])
def test_whatever_bit_is_flipped_nothing_wrong_is_signed_and_the_next_request_succeeds(
    swtpm: Swtpm, opened: Opener, session: str, seed: int
) -> None:
    """Of any command or answer, on an open connection or while one is opened."""
    generator = Random(seed)
    options = {"session": session, "pcrs": (0,), "key_auth": "generated"}
    key = sign(opened(**options))
    with Wire(swtpm) as wire:
        store = opened(tcti=wire.tcti, **options)
        for number in range(1, 41):
            if number % 4 == 0:
                store.close()
            Noise(wire, generator.randrange(1, 28), generator)
            with suppress(KeyStoreError):
                sign(store, generator.choice([key, None]))  # verifies what was signed
            wire.commands = wire.responses = untouched
            sign(store, key)
        store.close()


def test_without_sessions_another_digest_is_signed_and_nobody_notices(swtpm: Swtpm, opened: Opener) -> None:
    """What the sessions are for; the CSR's own verification would notice this one."""
    with Wire(swtpm) as wire:
        store = opened(tcti=wire.tcti)
        key = sign(store)
        Meddler(wire, SIGN, -20, response=False)
        with store.signer(key) as private:
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            assert private.sign(b"data", ec.ECDSA(hashes.SHA256()))
        store.close()


def test_a_service_that_signs_through_openssl_says_the_value_in_the_clear_whatever_our_sessions_are(
    swtpm: Swtpm, opened: Opener, tmp_path: Path
) -> None:
    """As docs/tls.md says: sessions are the daemon's, and tpm2-openssl has none."""
    store = opened(key_auth=SECRET, session="encrypted")
    (tmp_path / "key.pem").write_bytes(store.generate(P256).pem())
    store.close()
    with Wire(swtpm) as wire:
        command = ["openssl", "dgst", "-provider", "default", "-provider", "tpm2", "-propquery", "?tpm2.signature=yes"]
        subprocess.run(
            [*command, "-sha256", "-sign", "key.pem", "-passin", "file:key_auth", "-out", "signature", "key.pem"],
            cwd=tmp_path,
            env=os.environ | {"TPM2OPENSSL_TCTI": wire.tcti},
            capture_output=True,
            check=True,
        )
    assert SECRET.encode() in wire.heard
