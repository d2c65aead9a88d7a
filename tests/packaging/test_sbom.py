"""The SBOM is what is pinned for a station, neither more nor less, and is CycloneDX."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import sbom
from cryptography.hazmat.backends.openssl.backend import backend
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from unit import ROOT

STATION = (ROOT / "requirements/station.txt").read_text()
PINS: dict[str, str] = dict(re.findall(r"^([\w.-]+)==([\w.]+)", STATION, re.MULTILINE))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As ``make sbom`` makes it, with one package of the system."""
    file = tmp_path_factory.mktemp("sbom") / "stationkey.cdx.json"
    assert sbom.main([str(file), "--debian", "libc6"]) == 0
    return file.read_text()


@pytest.fixture(scope="module")
def document(text: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(text)
    return read


@pytest.fixture(scope="module")
def pinned(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its Python packages."""
    return {sbom.name_of(part): part for part in document["components"] if part["purl"].startswith("pkg:pypi/")}


def test_it_is_to_the_specification(text: str, document: dict[str, Any]) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    read = Bom.from_json(document)  # type: ignore[attr-defined] # made by a decorator
    assert len(read.components) == len(PINS) + 1


def test_it_is_of_this_version_of_the_project(document: dict[str, Any]) -> None:
    of = document["metadata"]["component"]
    assert (of["name"], of["version"], of["type"]) == ("stationkey", version("stationkey"), "application")
    assert of["licenses"][0]["license"]["id"] == "Apache-2.0"
    assert document["metadata"]["timestamp"]


def test_its_packages_are_those_that_are_pinned_for_a_station(pinned: dict[str, dict[str, Any]]) -> None:
    assert {name: part["version"] for name, part in pinned.items()} == PINS


@pytest.mark.parametrize("name", PINS)
def test_each_has_its_licence_its_name_and_its_hashes(name: str, pinned: dict[str, dict[str, Any]]) -> None:
    part = pinned[name]
    assert part["licenses"]
    assert part["purl"] == f"pkg:pypi/{name}@{PINS[name]}"
    said = {digest["content"] for link in part["externalReferences"] for digest in link.get("hashes", [])}
    (block,) = re.findall(rf"^{re.escape(name)}==.*?(?=^\S|\Z)", STATION, re.MULTILINE | re.DOTALL)
    assert said == set(re.findall(r"sha256:(\w+)", block))


def test_the_openssl_that_cryptography_has_in_it_is_named(pinned: dict[str, dict[str, Any]]) -> None:
    inside = {part["name"]: part["version"] for part in pinned["cryptography"]["components"]}
    assert backend.openssl_version_text().split()[1] == inside["openssl"]


def test_a_package_of_the_system_is_told_from_ours(document: dict[str, Any]) -> None:
    (system,) = [part for part in document["components"] if part["purl"].startswith("pkg:deb/")]
    assert system["purl"].startswith("pkg:deb/debian/libc6@")
    assert system["properties"] == [{"name": "stationkey:provided-by", "value": "the operating system"}]


def test_it_says_what_needs_what(document: dict[str, Any], pinned: dict[str, dict[str, Any]]) -> None:
    needs = {entry["ref"]: set(entry["dependsOn"]) for entry in document["dependencies"]}
    references = {name: part["bom-ref"] for name, part in pinned.items()}
    direct = {
        re.split(r"[^\w-]", name)[0]
        for name in requires("stationkey") or []
        if not re.search("extra == .(josev|pkcs11|site)", name)
    }
    assert needs["root-component"] == {references[name] for name in direct} | {"debian/libc6"}
    assert references["cffi"] in needs[references["tpm2-pytss"]]


def test_the_same_sources_make_the_same_document(text: str, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    sbom.main([str(again), "--debian", "libc6"])
    assert again.read_text() == text


def test_an_environment_that_is_not_what_is_pinned_gets_none(tmp_path: Path) -> None:
    empty = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    with pytest.raises(SystemExit, match=r"pinned to .* not installed"):  # words: there is no reason but these
        sbom.main(["--python", str(empty / "bin/python"), str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()
    shutil.rmtree(empty)


def test_what_is_pinned_for_a_station_is_what_is_pinned_for_all_without_the_extra() -> None:
    """A test may find the one file younger than the other, where ``make pin`` was not run whole."""
    runtime = (ROOT / "requirements/runtime.txt").read_text()
    assert [line for line in re.findall(r"^[\w.-]+==\S+", STATION, re.MULTILINE) if line not in runtime] == []
    assert {"ocpp", "websockets", "jsonschema"} & PINS.keys() == set()
