"""What installs with no extra: the contract, CSRs and the judge of evidence work, and what is missing is said in words.

Tried in a virtual environment that has the packages of requirements/core.txt and this one, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from forgery import Object, an_ak, evidence
from peers import free_port
from unit import ROOT

from stationkey.attestation import documents

CORE = (ROOT / "requirements/core.txt").read_text()
PINS = re.findall(r"^([\w.-]+)==", CORE, re.MULTILINE)
LEFT_OUT = ("tpm2_pytss", "prometheus_client", "jinja2", "rich", "ocpp", "websockets")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the core alone; what is installed here is linked there, so that nothing is fetched."""
    venv = tmp_path_factory.mktemp("core")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    installed = Path(sysconfig.get_path("purelib"))
    for name in PINS:
        for top in {file.parts[0] for file in metadata.distribution(name).files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(installed / top)
    (packages / "stationkey.pth").write_text(f"{ROOT / 'src'}\n")
    return venv / "bin/python"


def run(core: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STATIONKEY_")}
    return subprocess.run([core, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60)


def command(core: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(core, "-m", "stationkey", *arguments)


def test_nothing_else_is_there(core: Path) -> None:
    found = run(core, "-c", f"import importlib.util as u; print([m for m in {LEFT_OUT} if u.find_spec(m)])")
    assert (found.stdout, found.returncode) == ("[]\n", 0)


def test_what_is_pinned_for_the_core_is_a_part_of_what_is_pinned_for_a_station() -> None:
    station = (ROOT / "requirements/station.txt").read_text()
    assert [pin for pin in re.findall(r"^[\w.-]+==\S+", CORE, re.MULTILINE) if pin not in station] == []
    assert {"click", "cryptography", "msgspec"} <= set(PINS)


def test_schemas_are_printed(core: Path) -> None:
    said = command(core, "schema")
    assert said.returncode == 0, said.stderr
    assert "generate_csr.request" in json.loads(said.stdout)


def test_evidence_is_judged(core: Path, tmp_path: Path) -> None:
    ak = an_ak()
    (tmp_path / "evidence").write_text(documents.write_evidence(evidence(Object(), ak)))
    (tmp_path / "ak.pem").write_bytes(ak.pem)
    said = command(core, "verify-attestation", tmp_path / "evidence", "--ak", tmp_path / "ak.pem", "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["verified"] is True


BUILDS = """
from cryptography.hazmat.primitives.asymmetric import ec
import stationkey

names = {"common_name": "CS-7", "organization_name": "Example CPO", "country_name": "DE"}
data = stationkey.GenerateCsrData(certificate_type=stationkey.CertificateType("v2g_certificate"), **names)
request = stationkey.generate_csr("e7d4", data)
print(stationkey.to_pem(stationkey.build_csr(request, ec.generate_private_key(ec.SECP256R1()))))
"""


def test_a_csr_is_built_and_checked_and_openssl_verifies_it(core: Path, tmp_path: Path) -> None:
    said = run(core, "-c", BUILDS)
    assert said.returncode == 0, said.stderr
    (tmp_path / "csr.pem").write_text(said.stdout)
    inspected = command(core, "csr", "inspect", tmp_path / "csr.pem")
    assert inspected.returncode == 0, inspected.stderr
    checked = command(core, "csr", "check", tmp_path / "csr.pem", "--certificate-type", "v2g_certificate", "--json")
    assert json.loads(checked.stdout)["would_be_signed"] is True, checked.stderr
    judged = ["openssl", "req", "-verify", "-noout"]
    subprocess.run(judged, input=said.stdout, text=True, check=True, capture_output=True)


NAMES = ("--common-name", "CS-7", "--organization-name", "Example CPO", "--country-name", "DE")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("attest",), "[station]"),
        (("keys", "list", "--state-dir", "STATE"), "[station]"),
        (("josev", "--help"), "[josev]"),
        (("csms",), "[josev]"),
    ],
)
def test_what_needs_an_extra_says_which(core: Path, tmp_path: Path, arguments: tuple[str, ...], extra: str) -> None:
    said = command(core, *(str(tmp_path) if argument == "STATE" else argument for argument in arguments))
    assert said.returncode == 1
    assert "Traceback" not in said.stderr
    assert extra in said.stderr  # words: which extra is missing
    assert "pip install" not in said.stderr  # words: a station's package is no package of an index


def test_mqtt_needs_no_extra(core: Path) -> None:
    said = command(core, "request", "v2g_certificate", *NAMES, "--broker", f"mqtt://127.0.0.1:{free_port()}")
    assert said.returncode == 1
    assert "no broker at mqtt://127.0.0.1" in said.stderr  # words: the broker is missing, no library
