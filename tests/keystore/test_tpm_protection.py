"""What is told of the protection of keys in the TPM, and to whom it is refused; and where no secret may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import Swtpm

from protection import SECRET, Opener, refusal, sign, terms, write_secret
from stationkey.config.settings import TpmTerms
from stationkey.errors import ConfigurationError
from stationkey.keystore import keystore_opener

OTHER = 0x81000010


# What the daemon tells.


def test_a_store_says_what_new_keys_are_protected_by(opened: Opener) -> None:
    assert ";" not in opened().description
    said = opened(key_auth="generated", pcrs=(0, 7), session="encrypted").description
    assert "authorisation value; new keys are bound to PCR 0, 7 (sha256); sessions: encrypted" in said


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, {"key_auth": SECRET}, id="value"),
        pytest.param({"key_auth": SECRET}, {}, id="no-value"),
        pytest.param({}, {"pcrs": (0,)}, id="registers"),
        pytest.param({"pcrs": (0,)}, {"pcrs": (1,)}, id="other-registers"),
        pytest.param({}, {"srk_handle": OTHER}, id="parent"),
    ],
)
def test_a_key_made_ahead_is_held_to_the_protection_of_now(
    opened: Opener, before: dict[str, Any], after: dict[str, Any]
) -> None:
    store = opened(**before)
    key = sign(store)
    store.check(key, as_new=True)
    assert refusal(lambda: opened(**after).check(key, as_new=True)).reason == "key_protection_differs"


# Where a TPM is needed for it.


@pytest.mark.parametrize(
    "options",
    [
        {"srk_handle": OTHER},
        {"owner_auth": SECRET},
        {"srk_auth": SECRET},
        {"key_auth": SECRET},
        {"key_auth": "generated"},
        {"pcrs": (0,)},
        {"session": "hmac"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_software_key_store_refuses_what_only_a_tpm_can_do(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        keystore_opener("software:", allow_software_keys=True, terms=terms(tmp_path, **options), state_dir=tmp_path)
    assert caught.value.reason == "tpm_terms_without_tpm"
    assert next(iter(options)) in caught.value.message


@pytest.mark.parametrize("options", [{"key_auth": "generated"}, {"session": "hmac"}], ids=["generated", "session"])
def test_what_needs_a_file_needs_a_state_directory(swtpm: Swtpm, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        keystore_opener(swtpm.uri, terms=TpmTerms(**options))
    assert caught.value.reason == "state_dir_unnamed"


# No secret where it does not belong.


def test_no_secret_is_in_what_is_shown_of_terms_store_or_error(opened: Opener) -> None:
    store = opened(key_auth=SECRET, srk_auth="the root key's secret")
    key = sign(store)
    shown = [repr(store), repr(store._terms), repr(store._loaded), repr(key), store.description]  # noqa: SLF001 - what a debugger would show
    shown += [str(refusal(lambda: opened(key_auth="wrong", srk_auth="the root key's secret").check(key)))]
    shown += [str(refusal(lambda: opened(key_auth=SECRET, srk_auth="another").check(key)))]
    assert not any(secret in text for text in shown for secret in (SECRET, "root key's", "another secret"))


@pytest.mark.parametrize("level", ["all+trace", "all+DEBUG", "esys+trace,sys+debug,tcti+trace"])
def test_no_secret_is_printed_by_tpm2_tss_whatever_its_log_level(swtpm: Swtpm, tmp_path: Path, level: str) -> None:
    """At these it would print whole commands. Whoever needs them has pcap: as the TCTI."""
    write_secret(tmp_path / "key_auth", SECRET)
    program = (
        "import sys, pathlib\n"
        "from stationkey.keystore.tpm2.store import Tpm2KeyStore\n"
        "from stationkey.config.settings import TpmTerms\n"
        "from stationkey.config.secrets import SecretReference\n"
        "from stationkey.contract.profiles import Algorithm\n"
        "home = pathlib.Path(sys.argv[2])\n"
        "for auth in (SecretReference(str(home / 'key_auth')), 'generated'):\n"
        "    store = Tpm2KeyStore(sys.argv[1], terms=TpmTerms(key_auth=auth), state_dir=home)\n"
        "    key = store.generate(Algorithm.ECDSA_SHA256)\n"
        "    store.check(key)\n"
        "print('VALUE', store.auth_value(key.private).decode())\n"
        "store.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, swtpm.tcti, str(tmp_path)],
        env=os.environ | {"TSS2_LOG": level},
        capture_output=True,
        text=True,
        check=True,
    )
    generated = done.stdout.removeprefix("VALUE ").strip()
    assert len(generated) == 32
    for secret in (SECRET, generated):
        assert secret not in done.stderr
        assert secret.encode().hex()[:16] not in done.stderr.replace(" ", "").lower()
