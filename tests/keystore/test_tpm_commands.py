"""TPM commands as bytes: the same bytes as ESAPI's, and no response that was altered passes for a good one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from peers import Swtpm
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_RH, TPM2_ST, TPM2_SU, TPMA_OBJECT
from tpm2_pytss.TCTILdr import TCTILdr
from tpm2_pytss.types import (
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_TEMPLATE,
    TPMS_SENSITIVE_CREATE,
    TPMT_PUBLIC,
    TPMT_PUBLIC_PARMS,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
    TPMT_TK_HASHCHECK,
)
from tpm2_stores import loaded_objects

from protection import sign, write_secret
from stationkey.contract.profiles import SECP256R1, SECP521R1, KeyType, RsaModulus
from stationkey.keystore.tpm2 import templates
from stationkey.keystore.tpm2.commands import CURVES, HANDLES, OWNER, PROPERTIES, Commands, entries
from stationkey.keystore.tpm2.esapi import Esapi, public_of, sensitive_of
from stationkey.keystore.tpm2.return_codes import MALFORMED, TpmError
from stationkey.keystore.tpm2.signing import public_key, signing_scheme
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.keystore.tpm2.tcti import Tcti
from wire import HEADER, Wire, flipped

PARENT: Final = 0x81000001
NO_TICKET: Final = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
ECDSA: Final = signing_scheme(TPM2_ALG.ECDSA, "sha256")


@pytest.fixture
def wire(swtpm: Swtpm) -> Iterator[Wire]:
    with Wire(swtpm) as wire:
        yield wire


@pytest.fixture
def tcti(wire: Wire) -> Iterator[Tcti]:
    with closing(Tcti(wire.tcti)) as tcti:
        yield tcti


@pytest.mark.parametrize("auths", [(b"", b""), (b"of the parent", b"of the key")], ids=["no-auth", "auth"])
@pytest.mark.parametrize(
    ("kind", "scheme", "size"),
    [
        pytest.param(SECP256R1, ECDSA, 32, id="P-256"),
        pytest.param(SECP521R1, signing_scheme(TPM2_ALG.ECDSA, "sha512"), 64, id="P-521"),
        pytest.param(RsaModulus(2048), signing_scheme(TPM2_ALG.RSASSA, "sha256"), 32, id="RSA-2048"),
    ],
)
def test_each_command_is_what_esapi_sends_and_its_answer_is_read_alike(
    wire: Wire, kind: KeyType, scheme: bytes, size: int, auths: tuple[bytes, bytes]
) -> None:
    """Of the storage root key, and of a key under it."""
    parent_auth, auth = auths
    secret, template, digest = templates.sensitive(auth=auth), templates.key(kind), bytes(range(size))
    of_parent = templates.sensitive(auth=parent_auth)
    with closing(ESAPI(wire.tcti)) as esapi:
        primary, srk_public, *_ = esapi.create_primary(sensitive_of(of_parent), public_of(templates.srk()))
        srk = esapi.evict_control(ESYS_TR.OWNER, primary, PARENT)
        esapi.flush_context(primary)
        esapi.tr_set_auth(srk, parent_auth)
        esapi.create(srk, sensitive_of(secret), public_of(template))
        made, private, public = esapi.create_loaded(srk, sensitive_of(secret), TPM2B_TEMPLATE(template[2:]))
        esapi.flush_context(made)
        loaded = esapi.load(srk, private, public)
        esapi.tr_set_auth(loaded, auth)
        esapi.sign(loaded, digest, TPMT_SIG_SCHEME.unmarshal(scheme)[0], NO_TICKET)
        esapi.flush_context(loaded)
        esapi.evict_control(ESYS_TR.OWNER, srk, PARENT)
    by_esapi = [exchange.command for exchange in wire.exchanges]

    wire.exchanges.clear()
    with closing(Tcti(wire.tcti)) as tcti:
        commands, wrapped, area = Commands(tcti), private.marshal(), public.marshal()
        at, of_srk = commands.create_primary(of_parent, templates.srk(), OWNER, b"")
        commands.evict_control(OWNER, at, PARENT, b"")
        commands.flush_context(at)
        created = commands.create(PARENT, secret, template, parent_auth)
        loaded_at, *created_loaded = commands.create_loaded(PARENT, secret, template, parent_auth)
        commands.flush_context(loaded_at)
        for made_private, made_public in (created, created_loaded):
            assert TPM2B_PRIVATE.unmarshal(made_private)[1] == len(made_private)
            assert TPM2B_PUBLIC.unmarshal(made_public)[1] == len(made_public)
            assert made_public != area
            assert templates.is_key(kind, made_public)
        again = commands.load(PARENT, wrapped, area, parent_auth)
        signature = commands.sign(again, digest, scheme, auth)
        commands.flush_context(again)
        commands.evict_control(OWNER, PARENT, PARENT, b"")
    assert [exchange.command for exchange in wire.exchanges] == by_esapi

    assert of_srk == srk_public.marshal()
    assert TPMT_SIGNATURE.unmarshal(signature)[0].marshal() == signature
    verify(public_key(kind, area), signature, digest)
    assert (at, loaded_at, again) == (0x80000000, 0x80000001, 0x80000001)  # a parent has a slot during a command


def test_each_question_is_what_esapi_asks_and_its_answer_is_read_alike(wire: Wire) -> None:
    wrong = templates.rsa_parameters(RsaModulus(1000))
    with closing(Tpm2KeyStore(wire.tcti)) as store:
        assert store.description  # it makes the SRK
    wire.exchanges.clear()
    with closing(ESAPI(wire.tcti)) as esapi:
        esapi.startup(TPM2_SU.CLEAR)
        more, curves = esapi.get_capability(TPM2_CAP.ECC_CURVES, 0, 2)
        handles = esapi.get_capability(TPM2_CAP.HANDLES, PARENT, 64)[1]
        properties = esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, 0x100, 3)[1]
        clock = esapi.read_clock().clockInfo
        srk = esapi.tr_from_tpmpublic(PARENT)
        esapi.test_parms(TPMT_PUBLIC_PARMS.unmarshal(templates.rsa_parameters(RsaModulus(2048)))[0])
        with pytest.raises(TSS2_Exception) as refused:
            esapi.test_parms(TPMT_PUBLIC_PARMS.unmarshal(wrong)[0])
        public, name, _ = esapi.read_public(srk)
    by_esapi = [exchange.command for exchange in wire.exchanges]

    wire.exchanges.clear()
    with closing(Tcti(wire.tcti)) as tcti:
        commands = Commands(tcti)
        commands.startup()
        assert commands.get_capability(CURVES, 0, 2) == (bool(more), curves.marshal())
        assert commands.get_capability(HANDLES, PARENT, 64) == (False, handles.marshal())
        assert commands.get_capability(PROPERTIES, 0x100, 3) == (True, properties.marshal())
        assert commands.read_clock() == (int(clock.resetCount), int(clock.restartCount))
        assert commands.read_public(PARENT) == (public.marshal(), bytes(name))
        commands.test_parms(templates.rsa_parameters(RsaModulus(2048)))
        with pytest.raises(TpmError) as also_refused:
            commands.test_parms(wrong)
        commands.read_public(PARENT)
    assert [exchange.command for exchange in wire.exchanges] == by_esapi

    assert also_refused.value.rc == int(refused.value.rc)
    assert str(also_refused.value) == str(refused.value)
    assert [int.from_bytes(entry) for entry in entries(HANDLES, handles.marshal())] == [PARENT]
    assert [int.from_bytes(entry) for entry in entries(CURVES, curves.marshal())] == list(
        map(int, curves.data.eccCurves)
    )
    assert [int.from_bytes(entry[4:]) for entry in entries(PROPERTIES, properties.marshal())] == [
        int(entry.value) for entry in properties.data.tpmProperties
    ]
    assert templates.name_of(public.marshal()) == bytes(name)


ALGORITHM: Final[dict[KeyType, str]] = {
    SECP256R1: "ecc256:null",
    SECP521R1: "ecc521:null",
    RsaModulus(3072): "rsa3072:null:null",
}
OURS: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.SIGN_ENCRYPT
)


@pytest.mark.parametrize("policy", [b"", bytes(range(32))], ids=["no-policy", "policy"])
@pytest.mark.parametrize("kind", ALGORITHM, ids=str)
def test_each_template_is_what_tpm2_pytss_makes_of_the_same(kind: KeyType, policy: bytes) -> None:
    area = TPMT_PUBLIC.parse(ALGORITHM[kind], objectAttributes=OURS, authPolicy=policy)
    if policy:
        area.objectAttributes &= ~TPMA_OBJECT.USERWITHAUTH
    assert templates.key(kind, policy) == TPM2B_PUBLIC(publicArea=area).marshal()


def test_the_other_structures_are_what_tpm2_pytss_makes_of_the_same() -> None:
    storage = (OURS & ~TPMA_OBJECT.SIGN_ENCRYPT) | TPMA_OBJECT.RESTRICTED | TPMA_OBJECT.DECRYPT
    assert templates.srk() == TPM2B_PUBLIC(TPMT_PUBLIC.parse("ecc256:aes128cfb", objectAttributes=storage)).marshal()
    sealing = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.NODA
    assert templates.sealed() == TPM2B_PUBLIC(TPMT_PUBLIC.parse("keyedhash", objectAttributes=sealing)).marshal()
    for auth, data in ((b"", b""), (b"value", b""), (b"", b"data"), (b"value", b"data")):
        secret = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=auth, data=data))
        assert templates.sensitive(auth=auth, data=data) == secret.marshal()


@pytest.mark.parametrize("kind", ALGORITHM, ids=str)
def test_a_public_area_is_taken_for_one_of_ours_only_if_nothing_in_it_is_amiss(kind: KeyType) -> None:
    """tpm2-tss reads any other."""
    numbers = 1 if isinstance(kind, RsaModulus) else 2
    area = templates.key(kind)[2 : -2 * numbers] + numbers * templates.sized(bytes(66))
    public = templates.sized(area)
    assert templates.is_key(kind, public)
    assert not any(templates.is_key(other, public) for other in ALGORITHM if other != kind)
    assert not any(templates.is_key(kind, public[:length]) for length in range(len(public)))
    assert not any(templates.is_key(kind, templates.sized(area[:length])) for length in range(len(area)))
    assert not templates.is_key(kind, public + b"\0")
    assert not templates.is_key(kind, templates.sized(area + b"\0"))
    assert not any(templates.is_key(kind, flipped(public, at)) for at in range(len(public) - numbers * 68))


@pytest.mark.parametrize(
    "tcti", ["nonsense:x", "nonsense", "swtpm:prt=2321", "swtpm:host=127.0.0.1,port=1", "device:/"]
)
def test_a_tcti_that_cannot_be_opened_gives_the_code_that_tpm2_pytss_gives(tcti: str) -> None:
    with pytest.raises(TSS2_Exception) as by_pytss:
        TCTILdr.parse(tcti)
    with pytest.raises(TpmError) as by_us:
        Tcti(tcti)
    assert by_us.value.rc == int(by_pytss.value.rc)
    assert str(by_us.value) == str(by_pytss.value)


@pytest.mark.parametrize("code", [0x101, 0x921, 0x1C4, 0x98E, 0xA000A, 0x70007, 0xB0143, 0xFFFFFFFF])
def test_a_return_code_has_the_words_of_tpm2_tss(code: int) -> None:
    assert str(TpmError(code)) == str(TSS2_Exception(code))


def test_the_usual_store_works_without_tpm2_pytss(swtpm: Swtpm, tmp_path: Path) -> None:
    """From the first start on, when the storage root key is made; with all kinds of keys, and with their values."""
    write_secret(tmp_path / "value", b"secret")
    program = f"""
import sys
from pathlib import Path
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import TpmTerms
from stationkey.contract.profiles import Algorithm
from stationkey.keystore.tpm2.store import Tpm2KeyStore
for terms in (TpmTerms(), TpmTerms(key_auth=SecretReference({str(tmp_path / "value")!r}))):
    store = Tpm2KeyStore({swtpm.tcti!r}, terms=terms, state_dir=Path({str(tmp_path)!r}))
    assert store.description and all(store.supports(algorithm) for algorithm in Algorithm)
    key = store.generate(Algorithm.ECDSA_SHA256)
    store.unload()
    store.check(key)
    with store.signer(key) as private:
        private.sign(b"data", ec.ECDSA(hashes.SHA256()))
    store.destroy(key)
    store.close()
print("tpm2_pytss" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("False", "", 0)


def verify(public: Any, signature: bytes, digest: bytes) -> None:
    hashed = Prehashed(SHA256() if len(digest) == 32 else SHA512())
    if isinstance(public, rsa.RSAPublicKey):
        public.verify(signature[6:], digest, padding.PKCS1v15(), hashed)
        return
    end = 6 + int.from_bytes(signature[4:6], "big")
    r, s = signature[6:end], signature[end + 2 :]
    public.verify(encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big")), digest, ec.ECDSA(hashed))


def test_the_two_ways_take_turns_on_one_tcti(swtpm: Swtpm) -> None:
    """A key of one is a key of the other, by its handle, and a refused command of one leaves the other alone."""
    with closing(Tpm2KeyStore(swtpm.tcti)) as store:
        sign(store)
    with closing(Tcti(swtpm.tcti)) as tcti, closing(Esapi(tcti)) as esapi:
        commands, srk = Commands(tcti), esapi.tr_from_tpmpublic(PARENT)
        for _ in range(3):
            parts = templates.sensitive(), templates.key(SECP256R1)
            handle, _, public = commands.create_loaded(PARENT, *parts, b"")
            ours = esapi.tr_from_tpmpublic(handle)
            assert esapi.read_public(ours)[0].marshal() == public
            with pytest.raises(TpmError):
                commands.sign(PARENT, bytes(32), ECDSA, b"")
            assert esapi.sign(ours, bytes(32), ECDSA, ESYS_TR.PASSWORD)
            with pytest.raises(TpmError):
                esapi.sign(srk, bytes(32), ECDSA, ESYS_TR.PASSWORD)
            assert commands.sign(handle, bytes(32), ECDSA, b"")
            esapi.tr_close(ours)
            commands.flush_context(handle)


# What an answer may be instead.


@dataclass
class Canned:
    """A TCTI on which every command gets one answer."""

    answer: bytes = b""

    def transmit(self, command: bytes) -> None:
        """Say nothing to anybody."""

    def receive(self) -> bytes:
        return self.answer


@dataclass(frozen=True)
class Recorded:
    """A command with what the TPM has answered to it, and what is made of that."""

    run: Callable[[Commands], Any]
    answer: bytes
    read: Any


@pytest.fixture
def recorded(wire: Wire) -> dict[str, Recorded]:
    with closing(Tpm2KeyStore(wire.tcti)) as store:
        assert store.description  # it makes the SRK
    with closing(Tcti(wire.tcti)) as tcti:
        commands = Commands(tcti)
        found: dict[str, Recorded] = {}

        def record(name: str, *arguments: Any) -> Any:
            def run(commands: Commands) -> Any:
                read = getattr(commands, name)(*arguments)
                return [read[0], *entries(arguments[0], read[1])] if name == "get_capability" else read

            read = run(commands)
            found[name] = Recorded(run, wire.exchanges[-1].response, read)
            return read

        parts = templates.sensitive(), templates.key(SECP256R1)
        handle, private, public = record("create_loaded", PARENT, *parts, b"")
        record("flush_context", handle)
        record("create", PARENT, *parts, b"")
        record("sign", record("load", PARENT, private, public, b""), bytes(32), ECDSA, b"")
        record("read_public", PARENT)
        record("read_clock")
        record("test_parms", templates.rsa_parameters(RsaModulus(2048)))
        record("get_capability", CURVES, 0, 64)
        primary, _ = record("create_primary", templates.sensitive(), templates.srk(), OWNER, b"")
        record("evict_control", OWNER, primary, PARENT + 1, b"")
    return found


def outcome(recorded: Recorded, answer: bytes) -> Any:
    """What comes of an answer: the return code of the refusal, or what was read."""
    try:
        return recorded.run(Commands(Canned(answer)))
    except TpmError as error:
        return error.rc


def resized(answer: bytes) -> bytes:
    """The same with a size that fits, as the TCTI goes by it."""
    return answer[:2] + len(answer).to_bytes(4, "big") + answer[6:]


def test_an_answer_that_is_cut_off_or_too_long_is_malformed(recorded: dict[str, Recorded]) -> None:
    for one in recorded.values():
        assert outcome(one, one.answer) == one.read
        for length in range(len(one.answer)):
            assert outcome(one, one.answer[:length]) == MALFORMED
            if length >= HEADER:
                assert outcome(one, resized(one.answer[:length])) == MALFORMED
        for more in (b"\0", b"\0\0", bytes(5), one.answer):
            assert outcome(one, one.answer + more) == MALFORMED
            assert outcome(one, resized(one.answer + more)) == MALFORMED


def test_an_answer_with_a_byte_put_in_or_taken_out_is_malformed(recorded: dict[str, Recorded]) -> None:
    """Whatever it is a byte of: each has its place, and every size is checked against the whole."""
    for one in recorded.values():
        for at in range(HEADER, len(one.answer)):
            assert outcome(one, resized(one.answer[:at] + one.answer[at + 1 :])) == MALFORMED
            assert outcome(one, resized(one.answer[:at] + b"\0" + one.answer[at:])) == MALFORMED


FORM: Final[dict[str, Callable[[Any], object]]] = {
    "create_loaded": lambda read: (read[0] >> 24, len(read[1]), read[2]),
    "create_primary": lambda read: (read[0] >> 24, read[1]),
    "create": lambda read: [len(part) for part in read],
    "load": lambda handle: handle >> 24,
    "sign": lambda signature: (len(signature), signature[:6]),
    "read_public": lambda read: [len(part) for part in read],
    "get_capability": lambda read: [len(entry) for entry in read[1:]],
    "read_clock": len,
}
"""What is left of a read answer when a bit of it was flipped; all of it where nothing is said."""


def test_a_flipped_bit_gives_no_other_public_key_and_no_shorter_signature(recorded: dict[str, Recorded]) -> None:
    """What cannot be seen here is seen later: a wrong blob does not load, a wrong signature does not verify.

    Of an answer that no name or session protects, what is read has its form.
    """
    for name, one in recorded.items():
        for at in range(len(one.answer)):
            for bit in range(8):
                answer = bytearray(one.answer)
                answer[at] ^= 1 << bit
                found = outcome(one, bytes(answer))
                if 6 <= at < HEADER:
                    assert found == 1 << bit + 8 * (HEADER - 1 - at), "the TPM's own refusal"
                elif found != MALFORMED:
                    assert FORM.get(name, str)(found) == FORM.get(name, str)(one.read)


@pytest.mark.parametrize("code", [0x922, 0x908, 0x90A, 0x902, 0x98E, 0xB0902, 0x1E])
def test_a_refusal_is_raised_as_the_tpm_put_it(recorded: dict[str, Recorded], code: int) -> None:
    """Its own, the resource manager's; by the tag of its own, or by that of TPM 1.2 [TPM 2.0 part 3, 5.2]."""
    for one in recorded.values():
        for tag in (b"\x80\x01", b"\x00\xc4"):
            assert outcome(one, tag + (HEADER).to_bytes(4, "big") + code.to_bytes(4, "big")) == code


def test_a_malformed_answer_costs_a_second_try_and_no_slot(swtpm: Swtpm, wire: Wire, tmp_path: Path) -> None:
    """As a lost TPM does: the context is opened again, what stayed loaded is unloaded, and the request is served."""
    with closing(Tpm2KeyStore(wire.tcti, state_dir=tmp_path)) as store:
        sign(store)
        for code in (0x191, 0x15D):
            meddle(wire, code)
            sign(store)
            assert wire.codes.count(code) >= 2
    assert loaded_objects(swtpm) == []


def meddle(wire: Wire, code: int) -> None:
    """Alter the next answer to a command: of its last part, a size."""
    current: list[int] = []

    def command(message: bytes) -> bytes:
        current.append(int.from_bytes(message[6:10], "big"))
        return message

    def response(message: bytes) -> bytes:
        if current[-1] != code or current.count(code) > 1:
            return message
        return flipped(message, len(message) - 1)

    wire.commands, wire.responses = command, response
