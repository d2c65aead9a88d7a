"""TPM commands as bytes: the same bytes as ESAPI's, and no response that was altered passes for a good one."""

from __future__ import annotations

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
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_RH, TPM2_ST
from tpm2_pytss.types import TPM2B_PRIVATE, TPM2B_PUBLIC, TPMT_SIGNATURE, TPMT_TK_HASHCHECK
from tpm2_stores import loaded_objects

from protection import sign
from stationkey.contract.profiles import SECP256R1, SECP521R1, KeyType, RsaModulus
from stationkey.keystore.tpm2 import templates
from stationkey.keystore.tpm2.commands import MALFORMED, Commands
from stationkey.keystore.tpm2.signing import public_key, signing_scheme
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from wire import HEADER, Wire, flipped

PARENT: Final = 0x81000001
NO_TICKET: Final = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
ECDSA: Final = signing_scheme(TPM2_ALG.ECDSA, "sha256")


@pytest.fixture
def wire(swtpm: Swtpm) -> Iterator[Wire]:
    with Wire(swtpm) as wire:
        yield wire


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
    wire: Wire, kind: KeyType, scheme: Any, size: int, auths: tuple[bytes, bytes]
) -> None:
    parent_auth, auth = auths
    secret, template, digest = templates.sensitive(auth=auth), templates.marshalled_key(kind), bytes(range(size))
    with closing(ESAPI(wire.tcti)) as esapi:
        primary = esapi.create_primary(templates.sensitive(auth=parent_auth), templates.srk())[0]
        srk = esapi.evict_control(ESYS_TR.OWNER, primary, PARENT)
        esapi.flush_context(primary)
        esapi.tr_set_auth(srk, parent_auth)

        wire.exchanges.clear()
        made, private, public = esapi.create_loaded(srk, secret, template)
        esapi.flush_context(made)
        loaded = esapi.load(srk, private, public)
        esapi.tr_set_auth(loaded, auth)
        esapi.sign(loaded, digest, scheme, NO_TICKET)
        esapi.flush_context(loaded)
        by_esapi = [exchange.command for exchange in wire.exchanges]

        wire.exchanges.clear()
        commands, wrapped, area = Commands(esapi.tcti), private.marshal(), public.marshal()
        handle, new_private, new_public = commands.create_loaded(
            PARENT, secret.marshal(), template.marshal(), parent_auth
        )
        commands.flush_context(handle)
        again = commands.load(PARENT, wrapped, area, parent_auth)
        signature = commands.sign(again, digest, scheme.marshal(), auth)
        commands.flush_context(again)
        assert [exchange.command for exchange in wire.exchanges] == by_esapi

        assert (new_public, TPM2B_PRIVATE.unmarshal(new_private)[1]) != (area, 0)
        assert TPM2B_PUBLIC.unmarshal(new_public)[1] == len(new_public)
        assert TPMT_SIGNATURE.unmarshal(signature)[0].marshal() == signature
        verify(public_key(kind, area), signature, digest)
    assert handle == again == 0x80000001  # the parent has the first slot as long as a command lasts


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
    with closing(ESAPI(swtpm.tcti)) as esapi:
        commands, srk = Commands(esapi.tcti), esapi.tr_from_tpmpublic(PARENT)
        for _ in range(3):
            parts = templates.sensitive().marshal(), templates.marshalled_key(SECP256R1).marshal()
            handle, _, public = commands.create_loaded(PARENT, *parts, b"")
            ours = esapi.tr_from_tpmpublic(handle)
            assert esapi.read_public(ours)[0].marshal() == public
            with pytest.raises(TSS2_Exception):
                commands.sign(PARENT, bytes(32), ECDSA.marshal(), b"")
            assert esapi.sign(ours, bytes(32), ECDSA, NO_TICKET) is not None
            with pytest.raises(TSS2_Exception):
                esapi.sign(srk, bytes(32), ECDSA, NO_TICKET)
            assert commands.sign(handle, bytes(32), ECDSA.marshal(), b"")
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
    with closing(ESAPI(wire.tcti)) as esapi:
        commands = Commands(esapi.tcti)
        found: dict[str, Recorded] = {}

        def record(name: str, *arguments: Any) -> Any:
            def run(commands: Commands) -> Any:
                return getattr(commands, name)(*arguments)

            read = run(commands)
            found[name] = Recorded(run, wire.exchanges[-1].response, read)
            return read

        parts = templates.sensitive().marshal(), templates.marshalled_key(SECP256R1).marshal()
        handle, private, public = record("create_loaded", PARENT, *parts, b"")
        record("flush_context", handle)
        record("sign", record("load", PARENT, private, public, b""), bytes(32), ECDSA.marshal(), b"")
    return found


def outcome(recorded: Recorded, answer: bytes) -> Any:
    """What comes of an answer: the return code of the refusal, or what was read."""
    try:
        return recorded.run(Commands(Canned(answer)))
    except TSS2_Exception as error:
        return int(error.rc)


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


def test_a_flipped_bit_gives_no_other_public_key_and_no_shorter_signature(recorded: dict[str, Recorded]) -> None:
    """What cannot be seen here is seen later: a wrong blob does not load, a wrong signature does not verify."""
    for name, one in recorded.items():
        for at in range(len(one.answer)):
            for bit in range(8):
                answer = bytearray(one.answer)
                answer[at] ^= 1 << bit
                found = outcome(one, bytes(answer))
                if 6 <= at < HEADER:
                    assert found == 1 << bit + 8 * (HEADER - 1 - at), "the TPM's own refusal"
                elif name == "create_loaded" and isinstance(found, tuple):
                    assert found[2] == one.read[2]
                    assert len(found[1]) == len(one.read[1])
                    assert found[0] >> 24 == 0x80
                elif name == "sign" and isinstance(found, bytes):
                    assert (len(found), found[:6]) == (len(one.read), one.read[:6])
                else:
                    assert found in {MALFORMED, one.read} or found >> 24 == 0x80


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
