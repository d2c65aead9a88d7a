"""``stationkey attest`` beside a running daemon, and ``stationkey verify-attestation`` with no TPM at all."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from outside import BOUND, Done, Josev, Station, generate_csr, run
from peers import Mosquitto, ResourceManager, Swtpm
from test_attest_endorsement import ca_certificate, certify_ek

from parts import Authority, key_id_in, new_id, pem
from stationkey.attestation.trust import read_key

NONCE = "00112233445566778899aabbccddeeff"


@dataclass
class Pole:
    """A station by the road: daemon, broker, and a TPM behind a resource manager."""

    folder: Path
    station: Station
    josev: Josev
    environment: Mapping[str, str]
    tcti: str

    def attest(self, *arguments: str | Path) -> Done:
        """``stationkey attest …`` beside the daemon."""
        where = ("--keystore", f"tpm2:{self.tcti}", "--state-dir", str(self.station.state_dir))
        return run("attest", *map(str, arguments), *where, **self.environment)

    def tool(self, *command: str) -> None:
        """A program of tpm2-tools, through the same resource manager."""
        environment = {**os.environ, **self.environment, "TPM2TOOLS_TCTI": self.tcti}
        subprocess.run(command, cwd=self.folder, env=environment, check=True, capture_output=True, timeout=BOUND)

    def key(self, **data: str) -> tuple[str, Path]:
        """A new key: its name, and the file of its CSR."""
        csr = self.josev.ask(generate_csr(None, **data)).csr
        file = self.folder / f"{key_id_in(csr)}.csr"
        file.write_text(csr)
        return key_id_in(csr), file


@pytest.fixture(scope="module")
def pole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pole]:
    folder = tmp_path_factory.mktemp("pole")
    with (
        Mosquitto(folder / "mosquitto") as broker,
        Swtpm(folder / "swtpm") as tpm,
        ResourceManager(folder / "manager", tpm=tpm.tcti) as manager,
    ):
        options = ("--broker", broker.url, "--keystore", f"tpm2:{manager.tcti}")
        with Station(folder, *options, **manager.environment) as station, Josev(broker) as josev:
            yield Pole(folder, station, josev, manager.environment, manager.tcti)
            assert station.process is not None
            assert station.process.poll() is None, "the daemon has to live through all of this"


@pytest.fixture(scope="module")
def ak(pole: Pole) -> Path:
    """What a factory records: the attestation key, with the endorsement keys."""
    file = pole.folder / "ak.json"
    assert pole.attest("--ak", "--json", "--out", file).returncode == 0
    return file


def verify(*arguments: str | Path) -> Done:
    return run("verify-attestation", *map(str, arguments))


def verdict_of(*arguments: str | Path) -> Any:
    """The verdict on evidence that must be verified."""
    done = verify(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(*arguments: str | Path) -> str:
    """Why evidence is not verified; in words, and in JSON."""
    done, told = verify(*arguments), verify(*arguments, "--json")
    assert done.returncode == told.returncode == 3
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    answer = json.loads(told.stdout)
    assert answer["verified"] is False
    assert answer["message"] in done.stderr
    return str(answer["reason"])


# The recipe.


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({}, id="P-256"),
        pytest.param({"certificate_type": "v2g20_certificate", "algorithm": "ECDSA_SHA512"}, id="P-521"),
        pytest.param({"algorithm": "RSA_SHA256"}, id="RSA"),
    ],
)
def test_a_ca_sees_that_the_key_of_a_csr_was_born_in_a_recorded_tpm(
    pole: Pole, ak: Path, tmp_path: Path, data: dict[str, str]
) -> None:
    key_id, csr = pole.key(**data)
    evidence = tmp_path / "evidence.json"
    assert pole.attest(key_id[:12], "--nonce", NONCE, "--out", evidence).returncode == 0
    ak_pem = tmp_path / "ak.pem"
    ak_pem.write_text(pole.attest("--ak").stdout)

    for recorded in (ak, ak_pem):
        verdict = verdict_of(evidence, "--ak", recorded, "--csr", csr, "--nonce", NONCE)
        without = verdict_of(evidence, "--ak", recorded)
        assert len(verdict["proved"]) == len(without["proved"]) + 1  # one more for the CSR
        assert len(verdict["not_proved"]) < len(without["not_proved"])  # without a nonce, how fresh it is
    in_csr = subprocess.run(
        ["openssl", "req", "-in", csr, "-pubkey", "-noout"], capture_output=True, text=True, check=True
    )
    assert verdict["public_key"] == in_csr.stdout
    assert refused(evidence, "--ak", ak, "--csr", pole.key()[1]) == "key_differs"
    assert refused(evidence, "--ak", ak, "--nonce", "ff" * 16) == "nonce_differs"


def test_a_factory_certifies_the_attestation_key_with_openssl(pole: Pole, tmp_path: Path) -> None:
    """As docs/attestation.md has it."""
    evidence = tmp_path / "evidence.json"
    evidence.write_text(pole.attest(pole.key()[0]).stdout)
    (tmp_path / "ak.pem").write_text(pole.attest("--ak").stdout)
    (tmp_path / "ak.ext").write_text("extendedKeyUsage=2.23.133.8.3\nbasicConstraints=critical,CA:false\n")
    ca = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", "ca.key"]
    ca += ["-subj", "/CN=factory CA", "-days", "30", "-out", "ca.pem"]
    sign = ["x509", "-new", "-subj", "/CN=station42 attestation key", "-force_pubkey", "ak.pem", "-CA", "ca.pem"]
    sign += ["-CAkey", "ca.key", "-days", "30", "-extfile", "ak.ext", "-out", "ak.crt.pem"]
    for command in (ca, sign):
        subprocess.run(["openssl", *command], cwd=tmp_path, check=True, capture_output=True, timeout=BOUND)

    verdict = verdict_of(evidence, "--ak", tmp_path / "ak.crt.pem", "--ak-ca", tmp_path / "ca.pem")

    assert any("CN=factory CA" in line for line in verdict["proved"])


def test_the_name_and_pem_of_the_attestation_key_are_what_openssl_reads(pole: Pole, ak: Path) -> None:
    printed = pole.attest("--ak").stdout
    assert printed.startswith("name 000b")

    command = ["openssl", "pkey", "-pubin", "-text", "-noout"]
    read = subprocess.run(command, input=printed, text=True, capture_output=True, check=True)

    assert "prime256v1" in read.stdout
    assert ak.stat().st_size > 0


def test_a_key_is_attested_after_its_certificate_was_installed_too(pole: Pole, ak: Path, tmp_path: Path) -> None:
    key_id, csr = pole.key(certificate_type="v2g_certificate")
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(pem(Authority().sign(csr.read_text())))
    data = {"certificate_type": "v2g_certificate", "status": "installed", "private_key_path": f"/keys/{key_id}.pem"}
    pole.josev.publish({"id": new_id(), "name": "certificate_installation_status", "type": "update", "data": data})
    pole.station.wait_for("key active", key_id=key_id)

    evidence = tmp_path / "evidence.json"
    evidence.write_text(pole.attest(key_id).stdout)

    assert json.loads(evidence.read_text())["not_attested"]["state"] == "active"
    verdict = verdict_of(evidence, "--ak", ak, "--certificate", certificate)
    without = verdict_of(evidence, "--ak", ak)
    assert len(verdict["proved"]) == len(without["proved"]) + 1  # that the certificate is for this key
    assert set(verdict["not_proved"]) - set(without["not_proved"])  # who issued it


def test_with_only_the_endorsement_key_known_a_challenge_proves_it(pole: Pole, ak: Path, tmp_path: Path) -> None:
    key_id, csr = pole.key()
    ek = tmp_path / "ek.pem"
    pole.tool("tpm2_createek", "-c", str(tmp_path / "ek.ctx"), "-G", "rsa", "-f", "pem", "-u", str(ek))
    challenge, secret, evidence = (tmp_path / name for name in ("challenge", "secret", "evidence"))
    made = verify(ak, "--ek", ek, "--make-challenge", challenge, "--secret-out", secret)
    assert (made.returncode, made.stderr) == (0, "")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600

    assert pole.attest(key_id, "--challenge", challenge, "--out", evidence).returncode == 0

    verdict = verdict_of(evidence, "--secret", secret, "--ek", ek, "--csr", csr)
    assert verdict["proved"]
    assert json.loads(secret.read_text())["secret"] not in evidence.read_text()
    assert refused(evidence, "--secret", secret, "--ek", pole_ak_pem(pole, tmp_path)) == "ek_differs"
    again = tmp_path / "secret-2"
    assert verify(ak, "--ek", ek, "--make-challenge", challenge, "--secret-out", again).returncode == 0
    assert refused(evidence, "--secret", again) == "challenge_unanswered"
    plain = tmp_path / "plain"
    plain.write_text(pole.attest(key_id, "--nonce", json.loads(secret.read_text())["nonce"]).stdout)
    assert refused(plain, "--secret", secret) == "challenge_unanswered"


def test_an_endorsement_key_is_believed_by_the_certificate_of_its_maker(pole: Pole, ak: Path, tmp_path: Path) -> None:
    def file(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    ek = tmp_path / "ek.pem"
    pole.tool("tpm2_createek", "-c", str(tmp_path / "ek.ctx"), "-G", "ecc", "-f", "pem", "-u", str(ek))
    maker, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    certificate = certify_ek(read_key(ek.read_bytes())[0], maker)
    ca, other_ca = file("ca.pem", pem(ca_certificate(maker))), file("other.pem", pem(ca_certificate(other)))
    ek_pem = file("ek.crt.pem", pem(certificate))
    told = json.loads(ak.read_text())
    told["endorsement_keys"].append({"certificate": b64encode(certificate.public_bytes(Encoding.DER)).decode()})
    document = file("told.json", json.dumps(told).encode())
    challenge, secret, evidence = (tmp_path / name for name in ("challenge", "secret", "evidence"))
    make = ("--make-challenge", challenge, "--secret-out", secret)

    for believed in ((document, "--ek-ca", ca), (ak, "--ek", ek_pem, "--ek-ca", ca)):
        assert verify(*believed, *make).returncode == 0
        assert pole.attest(pole.key()[0], "--challenge", challenge, "--out", evidence).returncode == 0
        verdict = verdict_of(evidence, "--secret", secret)
        assert any("CN=TPM maker" in line for line in verdict["proved"])
    for wrong in ((document, "--ek-ca", other_ca), (ak, "--ek-ca", ca), (ak, "--ek", ek_pem, "--ek-ca", other_ca)):
        assert refused(*wrong, *make) == "certificate_untrusted"
    assert verify(ak, "--ek", ek, "--ek-ca", ca, *make).returncode == 2
    assert verify(evidence, "--secret", secret, "--certificate", ek).returncode == 1


def pole_ak_pem(pole: Pole, folder: Path) -> Path:
    file = folder / "some-other-key.pem"
    file.write_text(pole.attest("--ak").stdout)
    return file


def test_the_daemon_serves_on_beside_it(pole: Pole) -> None:
    key_id, _ = pole.key()
    attesting = [pole.attest(key_id) for _ in range(3)]

    assert [done.returncode for done in attesting] == [0, 0, 0]
    assert pole.key()[0] != key_id
    assert not [event for event in pole.station.events() if event.get("level") in {"ERROR", "error"}]


# The judge has no TPM.


def test_the_judge_runs_where_there_is_no_tpm_stack_and_nothing_of_the_station(
    pole: Pole, ak: Path, tmp_path: Path
) -> None:
    key_id, csr = pole.key()
    evidence = tmp_path / "evidence.json"
    evidence.write_text(pole.attest(key_id).stdout)
    program = (
        "import sys\n"
        "for name in ('tpm2_pytss', 'stationkey.mqtt', 'sqlite3', 'stationkey.keystore', 'stationkey.ledger'):\n"
        "    sys.modules[name] = None\n"  # to import it fails
        "from stationkey.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, "verify-attestation", str(evidence), "--ak", str(ak), "--csr", str(csr)]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nverified\n")


def test_evidence_is_taken_from_standard_input(pole: Pole, ak: Path) -> None:
    evidence = pole.attest(pole.key()[0]).stdout
    command = [sys.executable, "-m", "stationkey", "verify-attestation", "-", "--ak", str(ak)]

    done = subprocess.run(command, input=evidence, capture_output=True, text=True, check=False, timeout=BOUND)

    assert done.returncode == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 50_000, b'{"format": "\\ud800"}', b"\0" * 1000])
def test_a_file_that_is_no_evidence_is_not_verified(ak: Path, tmp_path: Path, content: bytes) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(content)

    assert refused(junk, "--ak", ak) == "evidence_malformed"


EVIDENCE = "evidence.json"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="nothing"),
        pytest.param((EVIDENCE,), id="nobody to believe"),
        pytest.param((EVIDENCE, "--ak", "a", "--secret", "b"), id="two to believe"),
        pytest.param((EVIDENCE, "--ak-ca", "a"), id="a CA for no certificate"),
        pytest.param((EVIDENCE, "--ek", "a"), id="an endorsement key, and no challenge"),
        pytest.param((EVIDENCE, "--secret", "a", "--ek-ca", "b"), id="a CA too late"),
        pytest.param((EVIDENCE, "--ak", "a", "--ek", "b"), id="an endorsement key besides"),
        pytest.param((EVIDENCE, "--make-challenge", "a"), id="a challenge without its secret"),
        pytest.param((EVIDENCE, "--secret-out", "a"), id="a secret without its challenge"),
        pytest.param(
            (EVIDENCE, "--make-challenge", "a", "--secret-out", "b", "--ak", "c"), id="a challenge, and an AK"
        ),
        pytest.param((EVIDENCE, "--ak", "a", "--nonce", "0011"), id="a nonce that is too short"),
        pytest.param((EVIDENCE, "--ak", "a", "--nonce", "00" * 65), id="a nonce that is too long"),
        pytest.param((EVIDENCE, "--ak", "a", "--nonce", "0x" + "00" * 16), id="a nonce that is no hexadecimal"),
    ],
)
def test_wrong_usage_of_the_judge_exits_2(arguments: tuple[str, ...]) -> None:
    done = verify(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: " in done.stderr


def test_a_challenge_needs_an_endorsement_key(ak: Path, tmp_path: Path) -> None:
    done = verify(ak, "--make-challenge", tmp_path / "a", "--secret-out", tmp_path / "b")

    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--ak", "--secret", "--csr", "--certificate"])
@pytest.mark.parametrize("content", [None, b"junk", b"0" * 300_000], ids=["missing", "junk", "too large"])
def test_a_file_of_the_judge_s_own_that_cannot_be_used_is_told(
    ak: Path, tmp_path: Path, option: str, content: bytes | None
) -> None:
    file, evidence = tmp_path / "file", tmp_path / "evidence"
    evidence.write_text("{}")
    if content is not None:
        file.write_bytes(content)
    others = () if option in {"--ak", "--secret"} else ("--ak", ak)

    done = verify(evidence, option, file, *others)

    # A CSR that is none is a fault of whoever sent it.
    assert done.returncode == (3 if (option, content) == ("--csr", b"junk") else 1)
    assert done.stderr.startswith("stationkey: ")
    assert "Traceback" not in done.stderr


def test_the_secret_is_written_through_no_link_and_open_to_nobody(ak: Path, pole: Pole, tmp_path: Path) -> None:
    ek, target, link, open_file = (tmp_path / name for name in ("ek.pem", "target", "link", "open"))
    pole.tool("tpm2_createek", "-c", str(tmp_path / "ek.ctx"), "-G", "ecc", "-f", "pem", "-u", str(ek))
    link.symlink_to(target)
    open_file.touch(mode=0o644)
    make = (ak, "--ek", ek, "--make-challenge", tmp_path / "challenge", "--secret-out")

    assert verify(*make, link).returncode == 1
    assert not target.exists()
    assert verify(*make, open_file).returncode == 0
    assert stat.S_IMODE(open_file.stat().st_mode) == 0o600


# What the station refuses.


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="nothing"),
        pytest.param(("--ak", "00"), id="a key, and --ak"),
        pytest.param(("--ak", "--nonce", NONCE), id="--ak with a nonce"),
        pytest.param(("00", "--nonce", NONCE, "--challenge", "a"), id="two nonces"),
        pytest.param(("00", "--nonce", "0011"), id="a nonce that is too short"),
        pytest.param(("00", "--timeout", "0"), id="no time"),
    ],
)
def test_wrong_usage_on_the_station_exits_2(arguments: tuple[str, ...]) -> None:
    done = run("attest", *arguments, "--keystore", "tpm2:device:/dev/null")

    assert (done.returncode, done.stdout) == (2, "")


def test_a_software_key_is_not_attested(tmp_path: Path, mosquitto: Mosquitto) -> None:
    options = ("--broker", mosquitto.url, "--keystore", "software:", "--allow-software-keys")
    with Station(tmp_path, *options) as station, Josev(mosquitto) as josev:
        key_id = key_id_in(josev.ask(generate_csr()).csr)
        state = ("--state-dir", str(station.state_dir))
        by_store = run("attest", key_id, *state, "--keystore", "software:")
        by_record = run("attest", key_id, *state, "--keystore", "tpm2:device:/dev/null")

    for done in (by_store, by_record):
        assert (done.returncode, done.stdout) == (1, "")
        assert done.reason == "attest_no_tpm"


def test_what_is_not_there_is_told(pole: Pole, tmp_path: Path) -> None:
    key_id, _ = pole.key()
    done = run("keys", "destroy", key_id, "--yes", "--state-dir", str(pole.station.state_dir))
    assert done.returncode == 0
    junk = tmp_path / "junk"
    junk.write_text("{}")

    for arguments, reason in [
        ((key_id,), "attest_key_destroyed"),
        (("ffffffffffffffffffff",), "key_not_found"),
        ((pole.key()[0], "--challenge", junk), "challenge_unreadable"),
        ((pole.key()[0], "--challenge", tmp_path / "nothing"), "file_unreadable"),
        ((pole.key()[0], "--out", tmp_path / "no" / "folder"), "out_unwritable"),
    ]:
        done = pole.attest(*arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert done.reason == reason
        assert "Traceback" not in done.stderr


def test_beside_a_daemon_on_a_bare_tpm_it_ends_at_once_and_disturbs_nothing(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
) -> None:
    with Station(tmp_path, "--broker", mosquitto.url, "--keystore", swtpm.uri) as station, Josev(mosquitto) as josev:
        key_id = key_id_in(josev.ask(generate_csr()).csr)
        where = ("--state-dir", str(station.state_dir), "--keystore", swtpm.uri)

        done = [run("attest", *asked, *where) for asked in ([key_id], ["--ak"])]

        assert [each.returncode for each in done] == [1, 1]
        assert [each.reason for each in done] == ["tpm_in_use", "tpm_in_use"]
        assert all("/dev/tpmrm0" in each.stderr for each in done)  # words: what helps
        assert josev.ask(generate_csr()).csr
        assert station.stop() == 0
    assert run("attest", key_id, *where).returncode == 0


def test_a_bare_tpm_that_another_program_holds_is_not_waited_for_for_ever(tmp_path: Path, swtpm: Swtpm) -> None:
    with socket.create_connection(("127.0.0.1", swtpm.port)):
        done = run("attest", "--ak", "--keystore", swtpm.uri, "--state-dir", str(tmp_path), "--timeout", "1")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.reason == "tpm_in_use"


def test_the_configuration_names_the_value_of_the_endorsement_hierarchy(tmp_path: Path, swtpm: Swtpm) -> None:
    value, configuration = tmp_path / "value", tmp_path / "stationkey.toml"
    value.write_text("a value\n")
    value.chmod(0o600)
    configuration.write_text(f'keystore = "{swtpm.uri}"\n[tpm]\nendorsement_auth = "{value}"\n')
    command = ["tpm2_changeauth", "-c", "e", "a value"]
    subprocess.run(command, env={**os.environ, "TPM2TOOLS_TCTI": swtpm.tcti}, check=True, timeout=BOUND)

    without = run("attest", "--ak", "--keystore", swtpm.uri, "--state-dir", str(tmp_path))
    given = run("attest", "--ak", "--config", str(configuration), "--state-dir", str(tmp_path))

    assert (without.returncode, given.returncode) == (1, 0)
    assert "[tpm] endorsement_auth" in without.stderr  # words: the option that helps
