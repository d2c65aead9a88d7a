"""TPMs and evidence for the tests of attestation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from peers import Swtpm

from stationkey.attestation import verifier
from stationkey.attestation.documents import AttestationKey, Challenge, Evidence
from stationkey.attestation.structures import PublicKey, read_public
from stationkey.contract.profiles import Algorithm
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2 import attest as attestation
from stationkey.keystore.tpm2.attest import AttestationTerms
from stationkey.keystore.tpm2.store import Tpm2KeyStore

NONCE = bytes(range(16))


TERMS = AttestationTerms()


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    """A TPM for the tests that leave it as it was."""
    with Swtpm(tmp_path_factory.mktemp("swtpm")) as peer:
        yield peer


@pytest.fixture(scope="module")
def keys(tpm: Swtpm) -> dict[Algorithm, KeyRef]:
    """A key for each algorithm."""
    with closing(Tpm2KeyStore(tpm.tcti)) as store:
        return {algorithm: store.generate(algorithm) for algorithm in Algorithm}


@contextmanager
def guest(peer: Swtpm) -> Iterator[Tpm2KeyStore]:
    """A store as ``stationkey attest`` opens it."""
    with closing(Tpm2KeyStore(peer.tcti, guest=True)) as store:
        yield store


def attested(
    peer: Swtpm, key: KeyRef, *, terms: AttestationTerms = TERMS, challenge: Challenge | None = None
) -> Evidence:
    nonce = NONCE if challenge is None else challenge.nonce
    with guest(peer) as store:
        qualifying = verifier.qualifying_data(nonce)
        return attestation.attest(store, key, qualifying=qualifying, terms=terms, challenge=challenge)


def ak_of(peer: Swtpm, terms: AttestationTerms = TERMS) -> AttestationKey:
    with guest(peer) as store:
        return attestation.attestation_key(store, terms=terms)


def ek_of(told: AttestationKey, kind: str) -> PublicKey:
    publics = [read_public(ek.public, "EK") for ek in told.endorsement_keys if ek.public is not None]
    (found,) = [
        public.key for public in publics if isinstance(public.key, ec.EllipticCurvePublicKey) == (kind == "ECC")
    ]
    return found


def new_key(peer: Swtpm, algorithm: Algorithm = Algorithm.ECDSA_SHA256) -> KeyRef:
    with closing(Tpm2KeyStore(peer.tcti)) as store:
        return store.generate(algorithm)
