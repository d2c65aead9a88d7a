"""The programs in examples/ do what their first lines say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import Swtpm

from stationkey import Algorithm, CertificateType, inspect_csr

EXAMPLES = Path(__file__).parent.parent / "examples"
REQUESTS = (EXAMPLES / "requests.jsonl").read_bytes()
PAGE_EXAMPLE, AGAIN, UPPER_CASE, WRONG_COUNTRY, NOT_OURS = REQUESTS.splitlines()


def run(program: str, *arguments: str, lines: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(EXAMPLES / program), *arguments]
    return subprocess.run(command, input=lines, capture_output=True, check=False, timeout=60)


def responses(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def id_of(request: bytes) -> str:
    return str(json.loads(request)["id"])


def openssl_verifies(csr: str) -> bool:
    judged = subprocess.run(
        ["openssl", "req", "-verify", "-noout"], input=csr, capture_output=True, text=True, check=True
    )
    return "verify OK" in judged.stderr + judged.stdout


def persistent_handles(tpm: Swtpm) -> str:
    command = ["tpm2_getcap", "handles-persistent", "--tcti", tpm.tcti]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class TestOwnKey:
    @pytest.mark.parametrize(
        ("request_line", "key"),
        [
            pytest.param(PAGE_EXAMPLE, "secp256r1", id="the page's example"),
            pytest.param(UPPER_CASE, "secp521r1", id="an upper-case id, ISO 15118-20"),
        ],
    )
    def test_a_request_is_answered_with_a_csr_that_openssl_verifies(self, request_line: bytes, key: str) -> None:
        done = run("own_key.py", lines=request_line)
        (response,) = responses(done)
        assert done.returncode == 0
        assert response["id"] == id_of(request_line)
        assert response["data"]["status"] == "accepted"
        assert openssl_verifies(response["data"]["csr"])
        assert inspect_csr(response["data"]["csr"]).key == key

    def test_the_request_may_be_the_argument(self) -> None:
        (response,) = responses(run("own_key.py", PAGE_EXAMPLE.decode()))
        assert response["data"]["status"] == "accepted"

    @pytest.mark.parametrize(
        ("request_line", "reason"),
        [
            pytest.param(WRONG_COUNTRY, "country_name_invalid", id="wrong by the contract"),
            pytest.param(
                PAGE_EXAMPLE.replace(Algorithm.ECDSA_SHA256.encode(), Algorithm.RSA_SHA256.encode()),
                "algorithm_unsupported",
                id="right by the contract, but not for this key",
            ),
        ],
    )
    def test_what_cannot_be_served_is_rejected_and_the_reason_stays_here(
        self, request_line: bytes, reason: str
    ) -> None:
        done = run("own_key.py", lines=request_line)
        (response,) = responses(done)
        assert done.returncode == 3
        assert response["id"] == id_of(request_line)
        assert response["data"] == {"status": "rejected"}
        assert done.stderr.decode().startswith(reason)

    @pytest.mark.parametrize(
        "line",
        [pytest.param(NOT_OURS, id="another message"), pytest.param(b"", id="nothing"), pytest.param(b"{", id="{")],
    )
    def test_what_has_no_answer_gets_none(self, line: bytes) -> None:
        done = run("own_key.py", lines=line)
        assert done.returncode == 1
        assert done.stdout == b""


class TestOwnTransport:
    def answers(self, *arguments: str) -> list[dict[str, Any]]:
        done = run("own_transport.py", *arguments, lines=REQUESTS)
        assert done.returncode == 0, done.stderr.decode()
        return responses(done)

    @pytest.fixture(params=["software", "tpm2"])
    def keystore(self, request: pytest.FixtureRequest) -> tuple[str, ...]:
        return () if request.param == "software" else (request.getfixturevalue("swtpm").uri,)

    def test_each_request_gets_what_the_contract_says(self, keystore: tuple[str, ...]) -> None:
        answers = self.answers(*keystore)
        statuses = sorted((answer["id"], answer["data"]["status"]) for answer in answers)
        accepted = [PAGE_EXAMPLE, AGAIN, UPPER_CASE]
        assert statuses == sorted(
            [*((id_of(line), "accepted") for line in accepted), (id_of(WRONG_COUNTRY), "rejected")]
        )
        csrs = {answer["id"]: answer["data"]["csr"] for answer in answers if "csr" in answer["data"]}
        assert all(map(openssl_verifies, csrs.values()))
        assert "O=Über Strom GmbH" in inspect_csr(csrs[id_of(UPPER_CASE)]).subject

    def test_a_request_that_comes_twice_gets_the_same_csr_twice(self) -> None:
        again = [answer["data"]["csr"] for answer in self.answers() if answer["id"] == id_of(PAGE_EXAMPLE)]
        assert len(again) == 2
        assert len(set(again)) == 1

    def test_with_a_tpm_the_keys_are_children_of_its_storage_root_key(self, swtpm: Swtpm) -> None:
        """A new TPM has none: the service makes it, at its well-known handle, for the keys to be under."""
        assert "0x81000001" not in persistent_handles(swtpm)
        self.answers(swtpm.uri)
        assert "0x81000001" in persistent_handles(swtpm)

    def test_a_key_store_that_names_nothing_is_refused_in_words(self) -> None:
        done = run("own_transport.py", "tpm2:")
        assert done.returncode == 1
        assert b"tpm2:device:/dev/tpmrm0" in done.stderr  # words: an example ends by them alone


def test_the_first_request_of_the_examples_is_the_page_s_own() -> None:
    assert json.loads(PAGE_EXAMPLE) == {
        "id": "123e4567-e89b-12d3-a456-426614174000",
        "name": "generate_csr",
        "type": "request",
        "data": {
            "certificate_type": CertificateType.CHARGING_STATION_CERTIFICATE,
            "common_name": "9783161484100",
            "organization_name": "EcoG",
            "country_name": "DE",
            "algorithm": Algorithm.ECDSA_SHA256,
            "evse_id": "DE*SEV*E123456789",
        },
    }
