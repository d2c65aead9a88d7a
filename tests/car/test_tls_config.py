"""``stationkey tls-config``: the configuration, and what --check says about a key, in words and by exit status."""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from authority import Authority, pem, write
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from peers import Swtpm
from reasons import Ended, command

from protection import SECRET, terms
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import TpmTerms
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.errors import ConfigurationError
from stationkey.keystore import keystore_opener
from stationkey.openssl import check, failures

CHARGING_STATION, V2G, V2G20 = CertificateType
CLIENT_ONLY = [(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)]
TIOCSPTLCK, TIOCGPTPEER = 0x40045431, 0x5441
"""Unlock a pseudo-terminal; open its other end without its name [ioctl_tty(2)]."""
TCTI = "device:/dev/tpmrm0"


@dataclass(frozen=True)
class Bench:
    """A TPM with nothing in front of it, a CA, and a state directory."""

    tpm: Swtpm
    authority: Authority
    state_dir: Path

    def active(
        self,
        certificate_type: CertificateType,
        algorithm: Algorithm = Algorithm.ECDSA_SHA256,
        *,
        evse: str = "",
        days: int = 60,
        chain: bool = True,
        terms: TpmTerms | None = None,
    ) -> Path:
        """Key and chain as the daemon puts them under ``active/``."""
        store = keystore_opener(self.tpm.uri, terms=terms, state_dir=self.state_dir)()
        try:
            key = store.generate(algorithm)
        finally:
            store.close()
        public = serialization.load_der_public_key(key.public)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "DEABCS0123456789")])
        wanted = CLIENT_ONLY if certificate_type is CHARGING_STATION else []
        leaf = self.authority.issuer.sign(name, public, wanted, days=days)
        directory = self.state_dir / "active"
        directory.mkdir(exist_ok=True)
        certificates = pem([leaf]) + self.authority.sub_cas if chain else ""
        return write(directory / f"{certificate_type}{evse}.pem", key.pem().decode() + certificates)

    def protected(self, **options: Any) -> TpmTerms:
        """Terms for `active`, and the same in the configuration file for the commands."""
        found = terms(self.state_dir, **options)
        lines = [f"{name} = {json.dumps(_in_toml(getattr(found, name)))}" for name in options]
        self.configuration.write_text("\n".join(["[tpm]", *lines, ""]))
        return found

    @property
    def configuration(self) -> Path:
        return self.state_dir / "stationkey.toml"

    def check(self, checked: str | Path, *, keystore: str | None = None, **environment: str) -> Ended:
        return command("tls-config", "--check", str(checked), *self.options(keystore), **environment)

    def options(self, keystore: str | None = None) -> list[str]:
        """Of every command here."""
        options = ["--keystore", keystore or self.tpm.uri, "--state-dir", str(self.state_dir)]
        return [*options, "--config", str(self.configuration)] if self.configuration.exists() else options


def _in_toml(value: object) -> object:
    if isinstance(value, SecretReference):
        return value.source
    return list(value) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with Swtpm(tmp_path_factory.mktemp("tls-config") / "swtpm") as tpm:
        yield tpm


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority(ec.SECP256R1())


@pytest.fixture
def bench(tpm: Swtpm, authority: Authority, tmp_path: Path) -> Bench:
    return Bench(tpm, authority, tmp_path)


def test_the_configuration_loads_default_before_tpm2_and_prefers_only_the_tpms_signatures() -> None:
    parser = configparser.ConfigParser()
    parser.read_string("[top]\n" + check.setup_of(f"tpm2:{TCTI}").configuration)
    start = parser[parser["top"]["openssl_conf"]]
    assert list(parser[start["providers"]]) == ["default", "tpm2"]
    assert parser[start["alg_section"]]["default_properties"] == "?tpm2.signature=yes"


def test_openssl_itself_reads_the_configuration(bench: Bench, tmp_path: Path) -> None:
    configuration = tmp_path / "openssl.cnf"
    arguments = ["tls-config", "--keystore", bench.tpm.uri, "--out", str(configuration)]
    done = command(*arguments)
    assert (done.exit_code, done.output) == (0, "")
    variables = check.setup_of(bench.tpm.uri).write(configuration)
    listed = subprocess.run(
        ["openssl", "list", "-providers"], env=variables, capture_output=True, text=True, check=True
    )
    assert [line.strip() for line in listed.stdout.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "default",
        "tpm2",
    ]


def test_what_is_printed_names_both_variables_that_a_service_needs(bench: Bench) -> None:
    done = command("tls-config", "--keystore", bench.tpm.uri)
    assert done.exit_code == 0
    assert done.stdout == check.setup_of(bench.tpm.uri).configuration
    assert "OPENSSL_CONF" in done.stdout
    assert f"TPM2OPENSSL_TCTI  {bench.tpm.tcti}" in done.stdout


def test_a_tcti_cannot_add_lines_to_the_configuration() -> None:
    with pytest.raises(ConfigurationError) as refused:
        check.setup_of("tpm2:device:/dev/tpm0\n[evil]")
    assert refused.value.reason == "keystore_uri_invalid"


@pytest.mark.parametrize(
    ("kind", "algorithm", "said"),
    [
        pytest.param(V2G, Algorithm.ECDSA_SHA256, "TLSv1.2 server, ECDHE-ECDSA-AES128-SHA256: ok", id="iso15118-2"),
        pytest.param(V2G20, Algorithm.ECDSA_SHA512, "TLSv1.3 server, TLS_AES_256_GCM_SHA384: ok", id="iso15118-20"),
    ],
)
def test_a_good_key_is_checked_as_a_car_would(
    bench: Bench, kind: CertificateType, algorithm: Algorithm, said: str
) -> None:
    file = bench.active(kind, algorithm)
    done = bench.check(kind)
    assert (done.exit_code, done.output) == (0, f"{file.name}: {said}\n")


def test_all_evses_of_a_type_are_checked(bench: Bench) -> None:
    for evse in ("", ".DE%2AABC%2AE1", ".DE%2AABC%2AE2"):
        bench.active(V2G, evse=evse)
    done = bench.check(V2G)
    assert done.exit_code == 0
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [
        "v2g_certificate.DE%2AABC%2AE1.pem",
        "v2g_certificate.DE%2AABC%2AE2.pem",
        "v2g_certificate.pem",
    ]


def test_a_file_of_any_name_is_checked_in_both_versions_of_tls(bench: Bench, tmp_path: Path) -> None:
    file = bench.active(V2G).rename(tmp_path / "any.pem")
    done = bench.check(file)
    assert done.exit_code == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["TLSv1.2", "TLSv1.3"]


def test_a_key_for_clients_finds_no_room_in_a_tpm_without_resource_manager(bench: Bench) -> None:
    """Three slots are too few for a TLS client; test_wss.py shows the same with a resource manager."""
    bench.active(CHARGING_STATION)
    done = bench.check(CHARGING_STATION)
    assert done.exit_code == failures.EXIT_DEVICE, done.output
    assert done.reason == "tls_tpm_failed"
    assert "no room" in done.stderr  # words: other faults have this reason as well
    assert "tpm2:device:/dev/tpmrm0" in done.stderr  # words: what helps


# Keys that need more than to be loaded: the table in docs/tls.md.


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"key_auth": SECRET}, id="value-in-a-file"),
        pytest.param({"key_auth": "generated", "session": "encrypted"}, id="value-that-the-tpm-sealed"),
        pytest.param({"srk_handle": 0x81000010}, id="another-parent"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "algorithm"), [(V2G, Algorithm.ECDSA_SHA256), (V2G20, Algorithm.ECDSA_SHA512)], ids=["TLS-1.2", "TLS-1.3"]
)
def test_a_key_serves_tls_with_its_authorisation_value_and_under_any_parent(
    bench: Bench, options: dict[str, Any], kind: CertificateType, algorithm: Algorithm
) -> None:
    """Python's ``load_cert_chain(password=…)``, in the process of the check."""
    file = bench.active(kind, algorithm, terms=bench.protected(**options))
    done = bench.check(kind)
    assert (done.exit_code, done.output[: len(file.name)]) == (0, file.name), done.output


@pytest.mark.parametrize(
    ("given", "reason"),
    [pytest.param("wrong", "tls_tpm_failed", id="wrong"), pytest.param(None, "key_auth_wrong", id="none")],
)
def test_a_wrong_authorisation_value_is_told(bench: Bench, given: str | None, reason: str) -> None:
    bench.active(V2G, terms=bench.protected(key_auth=SECRET))
    bench.configuration.unlink()
    if given is not None:
        bench.protected(key_auth=given)
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == reason
    assert SECRET not in done.output


def test_a_sealed_value_that_is_lost_is_told(bench: Bench) -> None:
    bench.active(V2G, terms=bench.protected(key_auth="generated"))
    for file in (bench.state_dir / "tpm").iterdir():
        file.unlink()
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == "key_auth_wrong"
    assert list((bench.state_dir / "tpm").iterdir()) == [], "a check makes nothing"


def test_a_policy_is_told_as_what_openssl_cannot_use(bench: Bench) -> None:
    bench.active(V2G, terms=bench.protected(pcrs=(0, 7)))
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == "tls_policy"


def test_a_root_key_with_an_authorisation_value_is_told_as_what_openssl_cannot_use(bench: Bench, swtpm: Swtpm) -> None:
    other = Bench(swtpm, bench.authority, bench.state_dir)
    other.active(V2G, terms=other.protected(srk_auth=SECRET))
    done = other.check(V2G)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == "tls_tpm_failed"
    assert "storage root key" in done.stderr  # words: other faults have this reason as well


@pytest.mark.parametrize("auth", [SECRET, "generated"], ids=["file", "generated"])
def test_openssl_is_given_the_value_through_a_pipe(bench: Bench, auth: str) -> None:
    """As docs/tls.md has it, `stationkey key-auth` and all; by a command line that has no secret in it."""
    file = bench.active(V2G, terms=bench.protected(key_auth=auth))
    giver = [sys.executable, "-m", "stationkey", "key-auth", str(V2G), *bench.options()]
    with subprocess.Popen(giver, stdout=subprocess.PIPE) as giving:
        assert giving.stdout is not None
        value = giving.stdout.read()
    assert giving.returncode == 0
    assert len(value) == (32 if auth == "generated" else len(SECRET))
    configuration = bench.state_dir / "openssl.cnf"
    asked = ["openssl", "req", "-new", "-key", str(file), "-passin", "stdin", "-subj", "/CN=x", "-verify"]
    done = subprocess.run(
        [*asked, "-noout"],
        env=os.environ | check.setup_of(bench.tpm.uri).write(configuration),
        input=value,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"verify OK" in done.stderr + done.stdout


@contextmanager
def terminal(folder: Path) -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal; in a bare root, which has none, of a file system of this test's own."""
    mounted = None
    try:
        ours, theirs = os.openpty()
    except OSError:
        mounted = folder / "pts"
        mounted.mkdir()
        subprocess.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", str(mounted)], check=True)
        ours = os.open(mounted / "ptmx", os.O_RDWR | os.O_NOCTTY)
        fcntl.ioctl(ours, TIOCSPTLCK, bytes(4))
        theirs = fcntl.ioctl(ours, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    try:
        yield ours, theirs
    finally:
        os.close(theirs)
        os.close(ours)
        if mounted is not None:
            subprocess.run(["umount", str(mounted)], check=True)


def test_the_value_is_never_written_to_a_terminal(bench: Bench, tmp_path: Path) -> None:
    bench.active(V2G, terms=bench.protected(key_auth=SECRET))
    giver = [sys.executable, "-m", "stationkey", "key-auth", str(V2G), *bench.options()]
    with terminal(tmp_path) as (ours, theirs):
        done = subprocess.run(giver, stdout=theirs, stderr=subprocess.PIPE, check=False)
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
    assert done.returncode == 1
    assert done.stderr.startswith(b"stationkey: ")
    assert SECRET.encode() not in done.stderr


@pytest.mark.parametrize("keys", [("",), ("", ".DE%2AABC%2AE1")], ids=["no value", "different values"])
def test_a_value_that_is_not_clear_is_not_given(bench: Bench, keys: tuple[str, ...]) -> None:
    bench.active(V2G)
    for evse in keys[1:]:
        bench.active(V2G, evse=evse, terms=bench.protected(key_auth=SECRET))
    done = command("key-auth", str(V2G), *bench.options())
    assert done.exit_code == 1
    assert done.reason == "key_auth_unclear"
    assert done.stdout == ""


def test_a_missing_provider_is_told_with_the_package_to_install(bench: Bench, tmp_path: Path) -> None:
    bench.active(V2G)
    done = bench.check(V2G, OPENSSL_MODULES=str(tmp_path))
    assert done.exit_code == failures.EXIT_MODULE
    assert done.reason == "tls_provider_missing"
    assert "tpm2-openssl" in done.stderr  # words: the package


def test_a_tpm_that_is_not_there_is_told(bench: Bench) -> None:
    bench.active(V2G)
    done = bench.check(V2G, keystore="tpm2:device:/dev/null/none")
    assert done.exit_code == failures.EXIT_DEVICE
    assert done.reason == "tls_tpm_failed"


def test_a_tpm_that_hangs_is_told_within_the_bound(bench: Bench, swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.active(V2G)
    monkeypatch.setattr(check, "TIMEOUT", 1.0)
    swtpm.freeze()
    done = bench.check(V2G, keystore=swtpm.uri)
    swtpm.thaw()
    assert done.exit_code == failures.EXIT_DEVICE
    assert done.reason == "tls_tpm_failed"
    assert "hangs" in done.stderr  # words: other faults have this reason as well


def test_a_key_of_another_tpm_is_told(bench: Bench, swtpm: Swtpm) -> None:
    Bench(swtpm, bench.authority, bench.state_dir).active(V2G)
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == "tls_tpm_failed"
    assert "another TPM" in done.stderr  # words: other faults have this reason as well


def test_an_expired_certificate_is_told(bench: Bench) -> None:
    bench.active(V2G, days=-1)
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == "tls_handshake_failed"
    assert "expired" in done.stderr  # words: other faults have this reason as well


def test_a_key_that_no_car_of_iso15118_2_can_use_is_told(bench: Bench) -> None:
    bench.active(V2G, Algorithm.RSA_SHA256)
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == "tls_handshake_failed"


def test_a_certificate_of_another_key_is_told(bench: Bench) -> None:
    one, other = bench.active(V2G), bench.active(V2G, evse=".DE%2AABC%2AE1")
    head, mark, _ = one.read_text().partition("-----BEGIN CERTIFICATE-----")
    write(one, head + mark + other.read_text().partition(mark)[2])
    done = bench.check(one)
    assert done.exit_code == failures.EXIT_KEY
    assert done.reason == "tls_handshake_failed"
    assert "belong together" in done.stderr  # words: other faults have this reason as well


def _with_certificates(file: Path, certificates: str) -> Path:
    key, mark, _ = file.read_text().partition("-----END TSS2 PRIVATE KEY-----\n")
    return write(file, key + mark + certificates)


def test_a_chain_of_which_a_sub_ca_is_missing_is_told(bench: Bench, tmp_path: Path) -> None:
    """The root may be left out, and may be there [RFC 8446 4.4.2]."""
    file = bench.active(V2G)
    leaf, *subs = (pem([one]) for one in x509.load_pem_x509_certificates(file.read_bytes()))
    roots = write(tmp_path / "roots.pem", bench.authority.root)
    anchored = ("--trust-anchors", str(roots))
    cases: list[tuple[list[str], tuple[str, ...], str | None]] = [
        ([leaf], (), "tls_chain_incomplete"),
        ([leaf], anchored, "tls_chain_incomplete"),
        ([leaf, *subs[:-1]], anchored, "tls_chain_incomplete"),
        ([leaf, *subs], anchored, None),
        ([leaf, *subs, bench.authority.root], anchored, None),
        ([leaf, *subs, bench.authority.root], (), None),
        ([leaf, *subs], (), None),
    ]
    for certificates, options, reason in cases:
        _with_certificates(file, "".join(certificates))
        done = command("tls-config", "--check", V2G, *options, *bench.options())
        assert done.exit_code == (0 if reason is None else failures.EXIT_KEY), done.output
        assert reason is None or done.reason == reason


def test_a_leaf_that_a_root_issued_needs_no_other_certificate(bench: Bench, tmp_path: Path) -> None:
    """Which only the roots can tell from one whose Sub-CA is missing."""
    file = bench.active(V2G)
    sub = write(tmp_path / "roots.pem", bench.authority.sub_cas)
    _with_certificates(file, pem(x509.load_pem_x509_certificates(file.read_bytes())[:1]))
    done = command("tls-config", "--check", V2G, "--trust-anchors", str(sub), *bench.options())
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("content", [None, "", "no PEM"], ids=["no-file", "empty", "no-PEM"])
def test_trust_anchors_that_cannot_be_read_are_told(bench: Bench, tmp_path: Path, content: str | None) -> None:
    bench.active(V2G)
    roots = tmp_path / "roots.pem"
    if content is not None:
        write(roots, content)
    done = command("tls-config", "--check", V2G, "--trust-anchors", str(roots), *bench.options())
    assert done.exit_code == (failures.EXIT_FILE if content is None else failures.EXIT_KEY)
    assert done.reason == ("tls_file_missing" if content is None else "tls_chain_incomplete")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "tls_file_missing", id="no-file"),
        pytest.param("key", "tls_file_missing", id="key-without-chain"),
        pytest.param("chain", "tls_file_missing", id="chain-without-key"),
    ],
)
def test_what_is_missing_under_active_is_told(bench: Bench, content: str | None, reason: str) -> None:
    if content == "key":
        bench.active(V2G, chain=False)
    elif content == "chain":
        file = bench.active(V2G)
        write(file, file.read_text().partition("-----END TSS2 PRIVATE KEY-----\n")[2])
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_FILE
    assert done.reason == reason


def test_a_software_key_store_needs_no_configuration() -> None:
    done = command("tls-config", "--keystore", "software:")
    assert done.exit_code == 1
    assert done.reason == "keystore_uri_invalid"


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    done = command("tls-config", "--keystore", f"tpm2:{TCTI}", "--out", str(tmp_path / "no" / "file"))
    assert done.exit_code == 1
    assert done.reason == "out_unwritable"


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "a link to the right file": lambda file, right: file.symlink_to(right),
    "a FIFO": lambda file, _: os.mkfifo(file),
    "a directory": lambda file, _: file.mkdir(),
    "a file that never ends": lambda file, _: os.truncate(write(file, ""), 2**40),
}


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("name", ["tls-config", "key-auth"])
def test_what_the_daemons_user_planted_under_active_leads_root_nowhere_and_keeps_him_waiting_for_nothing(
    bench: Bench, tmp_path: Path, plant: str, name: str
) -> None:
    file = bench.active(V2G)
    right = file.rename(tmp_path / "elsewhere.pem")
    PLANTED[plant](file, right)
    named = ["--check", str(V2G)] if name == "tls-config" else [str(V2G)]
    done = command(name, *named, *bench.options())
    assert done.exit_code == failures.EXIT_FILE, done.output
    assert done.reason == "tls_file_missing"
    assert str(file) in done.stderr


def test_a_link_in_the_place_of_active_leads_root_nowhere(bench: Bench, tmp_path: Path) -> None:
    directory = bench.active(V2G).parent
    directory.symlink_to(directory.rename(tmp_path / "elsewhere"))
    done = bench.check(V2G)
    assert done.exit_code == failures.EXIT_FILE
    assert done.reason == "tls_file_missing"
    assert str(directory) in done.stderr


def test_a_file_that_the_operator_named_may_be_a_link(bench: Bench, tmp_path: Path) -> None:
    named = tmp_path / "mine.pem"
    named.symlink_to(bench.active(V2G))
    done = bench.check(named)
    assert done.exit_code == 0, done.output
