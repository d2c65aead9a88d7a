"""A key store is a row of the registry, and the general code asks that row."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from msgspec.structs import replace

from stationkey.errors import ConfigurationError
from stationkey.keystore import KeyStore, KeyStoreUri, keystore_opener, registry
from stationkey.keystore.schemes import SCHEMES, Scheme
from stationkey.keystore.software import SoftwareKeyStore

OTHER = Scheme(
    name="other",
    opener=f"{__name__}:opener",
    example="other:token=a",
    located=True,
    secret_query=True,
    protected=True,
    attests=False,
    pem_label="OTHER KEY",
    openssl_provider=None,
)
"""A store that is not part of the project."""


def opener(location: str, **options: Any) -> Callable[[], KeyStore]:
    def open_store() -> KeyStore:
        store: Any = SoftwareKeyStore()
        store.given = (location, options)
        return store  # type: ignore[no-any-return] # its attribute is for this test

    return open_store


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Scheme:
    monkeypatch.setattr(registry, "SCHEMES", MappingProxyType({**SCHEMES, OTHER.name: OTHER}))
    return OTHER


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_each_row_can_be_loaded_and_its_example_be_parsed(scheme: Scheme) -> None:
    assert callable(pkgutil.resolve_name(scheme.opener))
    where = KeyStoreUri.parse(scheme.example)
    assert (where.scheme, str(where)) == (scheme, scheme.example)
    assert bool(where.location) == scheme.located


@pytest.mark.usefixtures("other")
def test_a_new_store_is_a_row_and_gets_its_location_and_its_terms(tmp_path: Path) -> None:
    store: Any = keystore_opener("other:token=a?pin=1", terms="its own", state_dir=tmp_path)()
    assert store.given == ("token=a?pin=1", {"terms": "its own", "state_dir": tmp_path, "guest": False})


@pytest.mark.usefixtures("other")
def test_a_secret_in_a_uri_is_not_shown() -> None:
    shown = str(KeyStoreUri.parse("other:token=a?pin-value=1234"))
    assert shown == "other:token=a?…"
    assert str(KeyStoreUri.parse("tpm2:cmd:socat ?")) == "tpm2:cmd:socat ?"


def test_a_store_without_protection_has_to_be_allowed(other: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(other, protected=False)
    monkeypatch.setattr(registry, "SCHEMES", {"other": bare})
    with pytest.raises(ConfigurationError) as refused:
        keystore_opener("other:x")
    assert refused.value.reason == "software_keys_refused"
    assert callable(keystore_opener("other:x", allow_software_keys=True))


@pytest.mark.parametrize("uri", ["", "other", "pkcs12:x", "TPM2:x", "software", "software:/tmp/keys"])
def test_an_invalid_uri_is_refused(uri: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        KeyStoreUri.parse(uri)
    assert refused.value.reason == "keystore_uri_invalid"


def test_the_registry_loads_no_store() -> None:
    script = "import sys, stationkey.keystore; print([name for name in sys.modules if name.startswith('stationkey.')])"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "stationkey.keystore.registry" in loaded
    assert "stationkey.keystore.software" not in loaded
    assert "stationkey.keystore.tpm2" not in loaded
