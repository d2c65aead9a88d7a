"""Stores in a TPM for the tests, and what is loaded there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import NoReturn

import pytest
from peers import Swtpm
from tpm2_pytss import ESAPI

from protection import sign
from stationkey.contract.profiles import Algorithm
from stationkey.keystore import KeyRef
from stationkey.keystore.tpm2 import capabilities
from stationkey.keystore.tpm2.return_codes import TpmError
from stationkey.keystore.tpm2.store import Tpm2KeyStore

P256 = Algorithm.ECDSA_SHA256


TRANSIENT = 0x80000000


@pytest.fixture
def store(swtpm: Swtpm) -> Iterator[Tpm2KeyStore]:
    """A store in this test's own TPM."""
    with closing(store_of(swtpm)) as store:
        yield store


def store_of(tpm: Swtpm) -> Tpm2KeyStore:
    return Tpm2KeyStore(tpm.tcti)


def works(store: Tpm2KeyStore, key: KeyRef | None = None) -> bool:
    """Whether the store signs, with a new key where none is given."""
    sign(store, key)
    return True


@contextmanager
def connected(tpm: Swtpm) -> Iterator[ESAPI]:
    """A connection of the test's own; the TPM serves one at a time, so the store has to be closed."""
    esapi = ESAPI(tpm.tcti)
    try:
        yield esapi
    finally:
        esapi.close()


def loaded_objects(tpm: Swtpm) -> list[int]:
    with connected(tpm) as esapi:
        return capabilities.handles(esapi, TRANSIENT, TRANSIENT | 0xFFFFFF)


def refuse_with(code: int) -> Callable[..., NoReturn]:
    """A TPM command that fails with a return code."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise TpmError(code)

    return refuse
