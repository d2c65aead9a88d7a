"""Evidence from a real TPM simulator, and tpm2-tools as the second judge of each step.

What is made here is taken by tpm2-tools, and what tpm2-tools make is taken here.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import forgery
import pytest
from attested_tpms import NONCE, TERMS, ak_of, attested, ek_of, guest, new_key
from cryptography.hazmat.primitives.asymmetric import ec
from peers import Swtpm
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE,
    TPMT_SENSITIVE,
    TPMT_SIG_SCHEME,
    TPMU_SENSITIVE_COMPOSITE,
)

from protection import reason_of, tool
from stationkey.attestation import credential, trust, verifier
from stationkey.attestation.documents import AttestationKey, Challenge, EndorsementKey, Evidence
from stationkey.attestation.structures import read_public
from stationkey.attestation.trust import RecordedName
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import TpmTerms
from stationkey.contract.profiles import Algorithm
from stationkey.errors import NotVerified
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2 import attest as attestation
from stationkey.keystore.tpm2 import capabilities
from stationkey.keystore.tpm2.attest import AttestationTerms
from stationkey.keystore.tpm2.endorsement import endorsement
from stationkey.keystore.tpm2.store import Tpm2KeyStore

pytest_plugins = ["attested_tpms"]


AK_HANDLE = 0x81010002


TOOLS_MAGIC = struct.pack(">II", 0xBADCC0DE, 1)
"""What tpm2-tools put before a credential."""


def anchor_of(peer: Swtpm) -> RecordedName:
    return RecordedName(read_public(ak_of(peer).public, "AK").name, "recorded")


def loaded(peer: Swtpm) -> str:
    """What is loaded in the TPM, objects and sessions."""
    with closing(ESAPI(peer.tcti)) as esapi:
        ranges = [(first << 24, first << 24 | 0xFFFFFF) for first in (0x80, 0x02, 0x03)]
        return " ".join(f"{handle:#x}" for part in ranges for handle in capabilities.handles(esapi, *part))


# Evidence of a TPM.


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_key_of_each_kind_is_attested(tpm: Swtpm, keys: dict[Algorithm, KeyRef], algorithm: Algorithm) -> None:
    verdict = verifier.verify(attested(tpm, keys[algorithm]), anchor_of(tpm), nonce=NONCE)

    assert verdict.spki == keys[algorithm].public
    assert "the attestation names it as a primary key of the endorsement hierarchy" in verdict.proved
    assert loaded(tpm) == ""


@pytest.mark.parametrize(
    "protection",
    [
        pytest.param({"auth": True}, id="an authorisation value"),
        pytest.param({"pcrs": (7,)}, id="registers"),
        pytest.param({"auth": True, "pcrs": (0, 7)}, id="both"),
        pytest.param({"session": "hmac"}, id="HMAC sessions"),
        pytest.param({"auth": True, "pcrs": (7,), "session": "encrypted"}, id="everything"),
    ],
)
def test_a_key_that_is_protected_besides_is_attested(swtpm: Swtpm, tmp_path: Path, protection: dict[str, Any]) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("sesame")
    terms = TpmTerms(
        key_auth=SecretReference(str(secret)) if protection.get("auth") else None,
        pcrs=protection.get("pcrs", ()),
        session=protection.get("session", "none"),
    )
    with closing(Tpm2KeyStore(swtpm.tcti, terms=terms, state_dir=tmp_path)) as store:
        key = store.generate(Algorithm.ECDSA_SHA256)
    qualifying = verifier.qualifying_data(NONCE)

    with closing(Tpm2KeyStore(swtpm.tcti, terms=terms, state_dir=tmp_path, guest=True)) as store:
        evidence = attestation.attest(store, key, qualifying=qualifying, terms=TERMS)

    assert verifier.verify(evidence, anchor_of(swtpm), nonce=NONCE).spki == key.public
    assert loaded(swtpm) == ""


def test_the_evidence_of_one_tpm_is_not_believed_for_another(
    tpm: Swtpm, keys: dict[Algorithm, KeyRef], swtpm: Swtpm
) -> None:
    evidence = attested(tpm, keys[Algorithm.ECDSA_SHA256])

    with pytest.raises(NotVerified) as refused:
        verifier.verify(evidence, anchor_of(swtpm))
    assert refused.value.reason == "ak_untrusted"


def test_the_tpm_signs_no_statement_that_it_did_not_make_up_itself(tpm: Swtpm, keys: dict[Algorithm, KeyRef]) -> None:
    """What "restricted" is worth: the very bytes of an attestation, handed in for a signature."""
    statement = attested(tpm, keys[Algorithm.ECDSA_SHA256]).attestation
    primary = ("tpm2_createprimary", "-C", "e", "-G", "ecc256:ecdsa-sha256:null", "-g", "sha256", "-c", "forger.ctx")
    tool(tpm, *primary, "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign")
    (tpm.directory / "statement").write_bytes(statement)

    refused = subprocess.run(
        ["tpm2_sign", "-c", "forger.ctx", "-g", "sha256", "-s", "ecdsa", "-o", "forged", "statement"],
        cwd=tpm.directory,
        env=os.environ | {"TPM2TOOLS_TCTI": tpm.tcti},
        capture_output=True,
        text=True,
        check=False,
    )
    tool(tpm, "tpm2_flushcontext", "-t")

    assert refused.returncode != 0
    assert not (tpm.directory / "forged").exists()


@pytest.fixture
def outsider(tpm: Swtpm) -> Iterator[Callable[[forgery.Object], tuple[ESAPI, Any]]]:
    """Loads the public part of a key in software into the TPM: that has any attributes that one likes."""
    with closing(ESAPI(tpm.tcti)) as esapi, ExitStack() as left:

        def load(key: forgery.Object) -> tuple[ESAPI, Any]:
            handle = esapi.load_external(TPM2B_PUBLIC.unmarshal(key.public)[0], hierarchy=ESYS_TR.ENDORSEMENT)
            left.callback(esapi.flush_context, handle)
            return esapi, handle

        yield load


AUTH_UNAVAILABLE = 0x12F


def test_the_tpm_attests_no_key_that_is_in_software(outsider: Callable[[forgery.Object], tuple[ESAPI, Any]]) -> None:
    """Though its public area claims that it was made there."""
    esapi, handle = outsider(forgery.Object())

    with (
        attestation._attestation_key(esapi, TERMS) as (ak, _),  # noqa: SLF001 - an attacker has all that we have
        pytest.raises(TSS2_Exception) as refused,
    ):
        esapi.certify(handle, ak, b"", TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL))

    assert refused.value.rc == AUTH_UNAVAILABLE


def test_the_tpm_opens_no_challenge_for_an_attestation_key_that_is_in_software(
    outsider: Callable[[forgery.Object], tuple[ESAPI, Any]],
) -> None:
    """Though the verifier has made one for it, as it could not know."""
    software = forgery.an_ak()
    esapi, handle = outsider(software)
    with endorsement(esapi, b"") as hierarchy:
        made = hierarchy.make_ek("EK-ECC256")
        assert made is not None
        ek, public = made
        blob, secret = credential.make_credential(read_public(public, "EK").key, software.name, bytes(32))
        opened = (TPM2B_ID_OBJECT(blob[2:]), TPM2B_ENCRYPTED_SECRET(secret[2:]))
        with hierarchy.policy_secret() as policy, pytest.raises(TSS2_Exception) as refused:
            esapi.activate_credential(handle, ek, *opened, session2=policy)
        esapi.flush_context(ek)

    assert refused.value.rc == AUTH_UNAVAILABLE


def test_the_tpm_takes_no_private_key_in_that_claims_to_be_its_own(tpm: Swtpm) -> None:
    key = forgery.Object()
    assert isinstance(key.private, ec.EllipticCurvePrivateKey)
    sensitive = TPM2B_SENSITIVE(
        sensitiveArea=TPMT_SENSITIVE(
            sensitiveType=TPM2_ALG.ECC,
            sensitive=TPMU_SENSITIVE_COMPOSITE(ecc=key.private.private_numbers().private_value.to_bytes(32, "big")),
        )
    )
    public = TPM2B_PUBLIC.unmarshal(key.public)[0]
    with closing(ESAPI(tpm.tcti)) as esapi, pytest.raises(TSS2_Exception) as refused:
        esapi.load_external(public, sensitive, hierarchy=ESYS_TR.NULL)

    assert refused.value.rc & 0xBF == 0x82  # TPM_RC_ATTRIBUTES


def test_clearing_the_tpm_ends_the_keys_and_leaves_the_attestation_key(swtpm: Swtpm) -> None:
    key, before = new_key(swtpm), ak_of(swtpm)

    tool(swtpm, "tpm2_clear", "-c", "p")

    assert ak_of(swtpm) == before
    assert reason_of(lambda: attested(swtpm, key)) == "key_of_another_tpm"


# As a guest.


def test_what_others_have_loaded_on_a_bare_tpm_stays_loaded(swtpm: Swtpm) -> None:
    key = new_key(swtpm)
    tool(swtpm, "tpm2_createprimary", "-C", "o", "-c", "theirs.ctx")
    theirs = loaded(swtpm)

    evidence = attested(swtpm, key)

    assert theirs == loaded(swtpm) == "0x80000000"
    assert verifier.verify(evidence, anchor_of(swtpm), nonce=NONCE).spki == key.public


def test_a_bare_tpm_that_others_have_filled_is_told(swtpm: Swtpm) -> None:
    key = new_key(swtpm)
    for number in range(2):
        tool(swtpm, "tpm2_createprimary", "-C", "o", "-c", f"{number}.ctx")

    assert reason_of(lambda: attested(swtpm, key)) == "tpm_full"
    assert loaded(swtpm) == "0x80000000 0x80000001"


@pytest.mark.parametrize("failing", ["certify", "create_primary", "read_public"])
def test_nothing_of_ours_stays_loaded_where_the_tpm_refuses(
    swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    key = new_key(swtpm)

    def refuse(*_: object, **__: object) -> None:
        raise TSS2_Exception(0x1C4)  # TPM_RC_VALUE, parameter 1

    with guest(swtpm) as store:
        assert store.description  # it is open
        with monkeypatch.context() as patch:
            patch.setattr(ESAPI, failing, refuse)
            attest = lambda: attestation.attest(store, key, qualifying=b"", terms=TERMS)  # noqa: E731 - the fault is there only now
            assert reason_of(attest) == "tpm_error"
    assert loaded(swtpm) == ""


# The attestation key.


def test_tpm2_tools_make_the_same_attestation_key_by_the_documented_template(tpm: Swtpm) -> None:
    primary = ("tpm2_createprimary", "-C", "e", "-G", "ecc256:ecdsa-sha256:null", "-g", "sha256", "-c", "ak.ctx")
    tool(tpm, *primary, "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign")
    tool(tpm, "tpm2_readpublic", "-c", "ak.ctx", "-n", "ak.name", "-o", "ak.pub")
    tool(tpm, "tpm2_flushcontext", "-t")

    public = ak_of(tpm).public

    assert (tpm.directory / "ak.pub").read_bytes() == public
    assert (tpm.directory / "ak.name").read_bytes() == read_public(public, "AK").name


def provision(peer: Swtpm, *arguments: str) -> None:
    """Put an attestation key under an endorsement key, and keep it, by tpm2-tools."""
    tool(peer, "tpm2_createek", "-c", "0x81010001", "-G", "ecc", "-u", "ek.pub")
    tool(peer, "tpm2_createak", "-C", "0x81010001", "-c", "ak.ctx", "-u", "ak.pem", "-f", "pem", *arguments)
    tool(peer, "tpm2_evictcontrol", "-C", "o", "-c", "ak.ctx", f"{AK_HANDLE:#x}")
    tool(peer, "tpm2_flushcontext", "-t")


@pytest.mark.parametrize("kind", [("-G", "ecc", "-g", "sha256", "-s", "ecdsa"), ("-G", "rsa", "-g", "sha256")])
def test_a_provisioned_attestation_key_is_used_and_believed_by_its_pem(swtpm: Swtpm, kind: tuple[str, ...]) -> None:
    key = new_key(swtpm)
    provision(swtpm, *kind)
    anchor = trust.read_ak((swtpm.directory / "ak.pem").read_bytes(), now=datetime.now(UTC))

    verdict = verifier.verify(attested(swtpm, key, terms=AttestationTerms(ak_handle=AK_HANDLE)), anchor, nonce=NONCE)

    assert "the attestation names it as a child of an endorsement key" in verdict.proved
    assert loaded(swtpm) == ""


def test_what_is_at_the_handle_must_be_an_attestation_key(swtpm: Swtpm) -> None:
    key, terms = new_key(swtpm), AttestationTerms(ak_handle=AK_HANDLE)
    assert reason_of(lambda: attested(swtpm, key, terms=terms)) == "ak_unfit"

    tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "ecc256", "-c", "ak.ctx", "-a", "fixedtpm|fixedparent|"
         "sensitivedataorigin|userwithauth|sign")  # fmt: skip
    tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", "ak.ctx", f"{AK_HANDLE:#x}")
    tool(swtpm, "tpm2_flushcontext", "-t")

    assert reason_of(lambda: attested(swtpm, key, terms=terms)) == "ak_unfit"


# The endorsement hierarchy.


def test_the_value_of_the_endorsement_hierarchy_is_needed_and_never_crosses_the_bus(
    swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, value = new_key(swtpm), b"a value that is long enough"
    tool(swtpm, "tpm2_changeauth", "-c", "e", value.decode())
    told = ak_of(swtpm, AttestationTerms(endorsement_auth=value))
    ak = read_public(told.public, "AK")
    challenge, secret = credential.make_challenge(ek_of(told, "ECC"), ak.name, believed="given")

    assert reason_of(lambda: attested(swtpm, key)) == "endorsement_auth"
    assert reason_of(lambda: attested(swtpm, key, terms=AttestationTerms(endorsement_auth=b"x"))) == "endorsement_auth"
    bus = tmp_path / "bus.pcap"
    monkeypatch.setenv("TCTI_PCAP_FILE", str(bus))
    with closing(Tpm2KeyStore(f"pcap:{swtpm.tcti}", guest=True)) as store:
        evidence = attestation.attest(
            store,
            key,
            qualifying=verifier.qualifying_data(challenge.nonce),
            terms=AttestationTerms(endorsement_auth=value),
            challenge=challenge,
        )

    assert verifier.verify(evidence, secret).spki == key.public
    assert evidence.attestation[6:40] in bus.read_bytes()  # it is the bus that was listened to
    assert value not in bus.read_bytes()
    assert repr(value) not in repr(AttestationTerms(endorsement_auth=value))
    assert loaded(swtpm) == ""


def test_an_endorsement_hierarchy_that_is_disabled_is_told(swtpm: Swtpm) -> None:
    key = new_key(swtpm)
    tool(swtpm, "tpm2_hierarchycontrol", "-C", "p", "ehEnable", "clear")

    assert reason_of(lambda: attested(swtpm, key)) == "endorsement_unusable"


# The challenge.


@pytest.mark.parametrize("kind", ["ECC", "RSA"])
def test_a_challenge_is_opened_by_the_tpm_that_it_was_made_for_and_no_other(
    tpm: Swtpm, keys: dict[Algorithm, KeyRef], swtpm: Swtpm, kind: str
) -> None:
    told = ak_of(tpm)
    ak = read_public(told.public, "AK")
    challenge, secret = credential.make_challenge(ek_of(told, kind), ak.name, believed="given")
    key = keys[Algorithm.ECDSA_SHA256]

    assert verifier.verify(attested(tpm, key, challenge=challenge), secret).spki == key.public
    other = new_key(swtpm)
    assert reason_of(lambda: attested(swtpm, other, challenge=challenge)) == "challenge_not_ours"
    other_ak = read_public(ak_of(swtpm).public, "AK").name
    renamed = dataclasses.replace(challenge, ak_name=other_ak)
    assert reason_of(lambda: attested(swtpm, other, challenge=renamed)) == "challenge_not_ours"
    assert loaded(tpm) == loaded(swtpm) == ""


def test_a_challenge_that_was_changed_on_its_way_is_not_opened(tpm: Swtpm, keys: dict[Algorithm, KeyRef]) -> None:
    told = ak_of(tpm)
    challenge, _ = credential.make_challenge(ek_of(told, "ECC"), read_public(told.public, "AK").name, believed="given")
    blob = challenge.credential_blob
    for changed in (
        dataclasses.replace(challenge, credential_blob=blob[:-1] + bytes([blob[-1] ^ 1])),
        dataclasses.replace(challenge, credential_blob=b"\0\2ab"),
        dataclasses.replace(challenge, encrypted_secret=b"\0\2ab"),
        dataclasses.replace(challenge, credential_blob=b"\0\1ab"),
        dataclasses.replace(challenge, credential_blob=b"\4\0" + bytes(1024)),
        dataclasses.replace(challenge, encrypted_secret=b"\4\0" + bytes(1024)),
        dataclasses.replace(challenge, ek=b"junk"),
    ):
        attest = partial(attested, tpm, keys[Algorithm.ECDSA_SHA256], challenge=changed)
        assert reason_of(attest) == "challenge_not_ours"
    assert loaded(tpm) == ""


@pytest.mark.parametrize("kind", ["ecc", "rsa"])
def test_a_credential_of_tpm2_makecredential_is_opened_here(swtpm: Swtpm, kind: str) -> None:
    """With an endorsement key that persists."""
    key = new_key(swtpm)
    tool(swtpm, "tpm2_createek", "-c", "0x81010001", "-G", kind, "-u", "ek.pub")
    tool(swtpm, "tpm2_flushcontext", "-t")
    ak = read_public(ak_of(swtpm).public, "AK")
    secret = bytes(range(32))
    (swtpm.directory / "secret").write_bytes(secret)
    command = (
        "tpm2_makecredential",
        "-T",
        "none",
        "-u",
        "ek.pub",
        "-s",
        "secret",
        "-n",
        ak.name.hex(),
        "-o",
        "credential",
    )
    tool(swtpm, *command)
    made = (swtpm.directory / "credential").read_bytes().removeprefix(TOOLS_MAGIC)
    end = 2 + int.from_bytes(made[:2], "big")
    ek = read_public((swtpm.directory / "ek.pub").read_bytes(), "EK")
    challenge = Challenge(
        ak_name=ak.name, ek=ek.spki, credential_blob=made[:end], encrypted_secret=made[end:], nonce=NONCE
    )

    evidence = attested(swtpm, key, challenge=challenge)

    assert evidence.activation == credential.activation(secret, evidence.attestation)
    assert loaded(swtpm) == ""


@pytest.mark.parametrize("kind", ["ecc", "rsa"])
def test_a_credential_made_here_is_opened_by_tpm2_activatecredential(swtpm: Swtpm, kind: str) -> None:
    provision(swtpm, "-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-n", "ak.name")
    tool(swtpm, "tpm2_createek", "-c", "0x81010003", "-G", kind, "-u", "ek.pub")
    tool(swtpm, "tpm2_flushcontext", "-t")
    ek = read_public((swtpm.directory / "ek.pub").read_bytes(), "EK")
    made = credential.make_credential(ek.key, (swtpm.directory / "ak.name").read_bytes(), b"what is hidden")
    (swtpm.directory / "credential").write_bytes(TOOLS_MAGIC + b"".join(made))
    session = ("-S", "session.ctx")

    tool(swtpm, "tpm2_startauthsession", "--policy-session", *session)
    tool(swtpm, "tpm2_policysecret", *session, "-c", "e")
    tool(swtpm, "tpm2_activatecredential", "-c", f"{AK_HANDLE:#x}", "-C", "0x81010003", "-i", "credential", "-o", "out",
         "-P", "session:session.ctx")  # fmt: skip

    assert (swtpm.directory / "out").read_bytes() == b"what is hidden"


# tpm2-tools as the second judge.


def test_evidence_of_tpm2_certify_is_verified_here(swtpm: Swtpm) -> None:
    """Attestation key, key and statement by tpm2-tools; their nonce is a fixed one, so none is asked for."""
    provision(swtpm, "-G", "ecc", "-g", "sha256", "-s", "ecdsa")
    tool(swtpm, "tpm2_createprimary", "-C", "o", "-c", "parent.ctx", "-G", "ecc")
    tool(swtpm, "tpm2_create", "-C", "parent.ctx", "-G", "ecc256", "-u", "key.pub", "-r", "key.priv", "-a",
         "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign")  # fmt: skip
    tool(swtpm, "tpm2_flushcontext", "-t")
    tool(swtpm, "tpm2_load", "-C", "parent.ctx", "-u", "key.pub", "-r", "key.priv", "-c", "key.ctx")
    tool(swtpm, "tpm2_flushcontext", "-t")
    tool(swtpm, "tpm2_certify", "-c", "key.ctx", "-C", f"{AK_HANDLE:#x}", "-g", "sha256", "-o", "attest", "-s", "sig")
    tool(swtpm, "tpm2_readpublic", "-c", f"{AK_HANDLE:#x}", "-o", "ak.pub")
    read = {name: (swtpm.directory / name).read_bytes() for name in ("key.pub", "attest", "sig", "ak.pub", "ek.pub")}
    told = AttestationKey(
        public=read["ak.pub"], endorsement_keys=(EndorsementKey(public=read["ek.pub"], certificate=None),)
    )
    evidence = Evidence(
        key_public=read["key.pub"], attestation=read["attest"], signature=read["sig"], attestation_key=told
    )
    anchor = trust.read_ak((swtpm.directory / "ak.pem").read_bytes(), now=datetime.now(UTC))

    verdict = verifier.verify(evidence, anchor)

    assert verdict.spki == read_public(read["key.pub"], "key").spki
    assert any(words.startswith("when the attestation was made") for words in verdict.not_proved)


def test_evidence_made_here_is_verified_by_tpm2_tools(tpm: Swtpm, keys: dict[Algorithm, KeyRef], swtpm: Swtpm) -> None:
    """By another TPM, as docs/attestation.md does it by hand."""
    evidence = attested(tpm, keys[Algorithm.ECDSA_SHA512])
    for name, data in [
        ("ak.pub", evidence.attestation_key.public),
        ("attestation", evidence.attestation),
        ("signature", evidence.signature),
        ("key.pub", evidence.key_public),
    ]:
        (swtpm.directory / name).write_bytes(data)

    tool(swtpm, "tpm2_loadexternal", "-C", "n", "-u", "ak.pub", "-c", "ak.ctx", "-n", "ak.name")
    tool(swtpm, "tpm2_verifysignature", "-c", "ak.ctx", "-g", "sha256", "-m", "attestation", "-s", "signature")
    tool(swtpm, "tpm2_flushcontext", "-t")
    tool(swtpm, "tpm2_loadexternal", "-C", "n", "-u", "key.pub", "-c", "key.ctx", "-n", "key.name")
    tool(swtpm, "tpm2_flushcontext", "-t")

    assert evidence.attestation.startswith(bytes.fromhex("ff5443478017"))
    assert (swtpm.directory / "ak.name").read_bytes() == read_public(evidence.attestation_key.public, "AK").name
    assert evidence.attestation.count((swtpm.directory / "key.name").read_bytes()) == 1
