"""``stationkey csr``: what a CSR contains, and what a CSMS would say of it; and ``keys export-csr``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from csms_parts import ORGANIZATION, V2G, csr_for
from reasons import Ended, command

from stationkey.cli import main

GOOD = csr_for(V2G)


def run(*arguments: str) -> Ended:
    return command("csr", *arguments)


@pytest.fixture
def good(tmp_path: Path) -> str:
    (tmp_path / "good.csr").write_text(GOOD)
    return str(tmp_path / "good.csr")


def test_inspect_shows_each_part_as_openssl_does(good: str) -> None:
    shown = json.loads(run("inspect", good, "--json").stdout)
    options = ("-noout", "-subject", "-nameopt", "RFC2253,utf8,-esc_msb")
    judged = subprocess.run(
        ["openssl", "req", "-in", good, *options], capture_output=True, text=True, check=True
    ).stdout

    assert shown["signature_valid"] is True
    assert shown["key"] == "secp256r1"
    assert sorted(shown["subject"].split(", ")) == sorted(judged.strip().removeprefix("subject=").split(","))
    text = CliRunner().invoke(main, ["csr", "inspect", "-"], input=GOOD).stdout
    assert all(line in text for line in shown["extensions"])


def test_a_good_csr_is_fit(good: str) -> None:
    done = run("check", good, "--certificate-type", str(V2G), "--organization-name", ORGANIZATION, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "certificate_type": str(V2G),
        "would_be_signed": True,
        "faults": [],
        "differences": [],
    }


def test_every_fault_is_told_at_once_and_what_differs(good: str) -> None:
    """A CSR for the charging station's DC and organisation is none for this type and CSMS."""
    done = run("check", good, "--certificate-type", "v2g20_certificate", "--organization-name", "Other", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert [fault["reason"] for fault in told["faults"]] == ["csr_organization_name", "csr_domain_component"]
    assert [difference.partition(":")[0] for difference in told["differences"]] == ["algorithm", "usage"]
    assert done.reason == "csr_unfit"


@pytest.mark.parametrize(
    "content", ["", "no PEM", GOOD[:200], GOOD.replace("MII", "AAA")], ids=["empty", "no-PEM", "cut", "altered"]
)
def test_what_is_no_csr_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "csr").write_text(content)
    checked = run("check", str(tmp_path / "csr"), "--certificate-type", str(V2G), "--json")
    assert checked.exit_code == 1
    assert [fault["reason"] for fault in json.loads(checked.stdout)["faults"]] == ["csr_unreadable"]
    inspected = run("inspect", str(tmp_path / "csr"))
    assert (inspected.exit_code, inspected.reason) == (1, "csr_unreadable")


@pytest.mark.parametrize(
    "arguments",
    [("check", "-"), ("check", "-", "--certificate-type", "v2g"), ("inspect",), ("inspect", "/nowhere/x.csr", "y")],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_no_program_for_trying_is_loaded(good: str) -> None:
    code = (
        "import sys; from stationkey.cli import main\n"
        f"main(['csr', 'check', {good!r}, '--certificate-type', 'v2g_certificate'], standalone_mode=False)\n"
        "assert not {'ocpp', 'websockets', 'stationkey.mqtt', 'tpm2_pytss', 'rich'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
