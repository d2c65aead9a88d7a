"""Which key store makes a key, and which one has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from stationkey.config.file import read_table, settle
from stationkey.config.settings import Settings
from stationkey.contract.profiles import SECP256R1, Algorithm, CertificateType
from stationkey.errors import ConfigurationError, KeyStoreError
from stationkey.keystore import KeyRef, KeyStoreUri
from stationkey.keystore.pkcs11 import keyfile
from stationkey.keystore.pkcs11.uri import object_uri
from stationkey.keystore.stores import KeyStores, checked_stores

TPM = "tpm2:swtpm:host=127.0.0.1,port=1"
SE = "pkcs11:token=se?module-path=/usr/lib/se.so"


def settings(default: str, others: dict[str, str], chosen: dict[str, object]) -> Settings:
    table: dict[str, object] = {"keystore": default, "keystores": others, "keystore_for": chosen}
    return settle(read_table(table, source="here"), allow_software_keys=True)


def in_token(label: str, serial: str = "1") -> KeyRef:
    uri = object_uri({"token": label, "manufacturer": "Ä/B", "serial": serial, "model": "m"}, b"\x01")
    return KeyRef(scheme="pkcs11", key_type=SECP256R1, public=b"1", private=keyfile.encode(uri))


def in_tpm() -> KeyRef:
    return KeyRef(scheme="tpm2", key_type=SECP256R1, public=b"2", private=b"")


@pytest.fixture
def stores() -> Iterator[KeyStores]:
    configured = settings(TPM, {"soft": "software:"}, {"v2g20_certificate": "soft"})
    with closing(checked_stores(configured)()) as opened:
        yield opened


def test_a_type_is_made_in_its_own_store_by_its_own_thread(stores: KeyStores) -> None:
    making = {kind: stores.making(kind) for kind in CertificateType}
    assert {kind: store.name for kind, store in making.items()} == {
        CertificateType.CHARGING_STATION_CERTIFICATE: "default",
        CertificateType.V2G_CERTIFICATE: "default",
        CertificateType.V2G20_CERTIFICATE: "soft",
    }
    assert len({store.thread for store in making.values()}) == 2


def test_a_store_is_asked_only_for_what_its_types_may_want(stores: KeyStores) -> None:
    assert {store.name: store.algorithms for store in stores} == {
        "default": tuple(Algorithm),
        "soft": (Algorithm.ECDSA_SHA512,),
    }


def test_a_key_is_in_the_store_that_made_it_and_else_nowhere(stores: KeyStores) -> None:
    assert stores.holding(in_tpm()).name == "default"
    with pytest.raises(KeyStoreError) as refused:
        stores.holding(in_token("se"))
    assert (refused.value.reason, refused.value.transient) == ("keystore_unconfigured", False)


@pytest.mark.parametrize(
    ("uri", "held"),
    [
        ("pkcs11:token=se?module-path=/m", True),
        ("pkcs11:token=se;serial=1?module-path=/m", True),
        ("pkcs11:manufacturer=%C3%84%2FB;token=s%65?module-path=/m", True),
        ("pkcs11:token=se;serial=2?module-path=/m", False),
        ("pkcs11:token=other?module-path=/m", False),
        (TPM, False),
    ],
)
def test_a_key_in_a_token_is_found_by_what_names_its_token(uri: str, held: bool) -> None:
    assert KeyStoreUri.parse(uri).holds(in_token("se")) is held


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"b": "tpm2:device:/dev/tpmrm1"}, "keystores_conflict"),
        ({"b": SE, "c": "pkcs11:token=other?pin-source=file:/p&module-path=/usr/lib/se.so"}, "keystores_conflict"),
        ({"b": "nothing"}, "keystore_uri_invalid"),
    ],
)
def test_two_stores_that_cannot_be_in_one_process_are_refused(others: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        checked_stores(settings(TPM, others, {"existing_keys": list(others)}))
    assert refused.value.reason == reason
