"""The doctor on configurations broken in real ways."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from doctors import Pki, as_nobody, look, write_config
from peers import free_port

from stationkey.doctor.report import Level


class TestConfiguration:
    def test_every_mistake_is_told_at_once_and_what_is_right_is_used(self, tmp_path: Path) -> None:
        text = f'broker = "mqtt://127.0.0.1:{free_port()}"\nbrocker = 1\n[pool]\nrsa = "many"\n[deadlines]\nec = -1\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text), broker=None)
        assert all(word in found.text("config.file") for word in ("brocker", "pool.rsa", "deadlines.ec"))
        assert text.split('"')[1] in found.text("broker.url")

    @pytest.mark.parametrize("text", ["broker = ", "\x00", "a = 1\na = 2", "broker = 1\nkeystore = 2\nstate_dir = 3\n"])
    def test_a_wrong_file_is_the_only_failure(self, tmp_path: Path, text: str) -> None:
        """What it says of the rest is not known; that nothing is where it is guessed says nothing."""
        config = write_config(tmp_path, text)
        found = look(tmp_path, config_file=config, broker=None, keystore=None, state_dir=None)
        assert found.failures == {"config.file"}
        assert found.reasons("config.file") == {"invalid"}
        assert found.level("tpm.keystore") is found.level("broker.url") is Level.NOT_CHECKED
        assert "config.file" in found.text("broker.port")

    def test_one_mistake_in_a_section_does_not_cost_the_rest_of_it(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        text = f'[mqtt]\nusername = "us"\npassword_file = "{secret}"\nca_fiel = "ca"\nserver_name = 1\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text))
        assert all(word in found.text("config.file") for word in ("ca_fiel", "server_name"))
        assert str(secret) in found.text("config.secrets")

    def test_what_two_names_are_together_is_told_too(self, tmp_path: Path) -> None:
        text = '[mqtt]\npassword_file = "/x"\nca_fiel = "ca"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text))
        assert all(word in found.text("config.file") for word in ("ca_fiel", "no username"))

    def test_a_byte_order_mark_is_no_mistake(self, tmp_path: Path) -> None:
        """Nobody sees it, and what is said of it would point at a line without a fault."""
        config = write_config(tmp_path, "")
        config.write_bytes(b"\xef\xbb\xbfbroker = 'mqtt://127.0.0.1:1'\n")
        found = look(tmp_path, config_file=config, broker=None)
        assert found.level("config.file") is Level.OK
        assert "mqtt://127.0.0.1:1" in found.text("broker.url")

    def test_a_file_that_this_user_may_not_read_says_nothing_of_the_daemon(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("root makes a file that another user may not read")
        for directory in (tmp_path, *tmp_path.parents):
            if len(directory.parts) > 3:
                directory.chmod(0o711)
        found = as_nobody(tmp_path, config=write_config(tmp_path, ""))
        assert found.level("config.file") is Level.NOT_CHECKED
        assert found.reasons("config.file") == {"hidden"}

    @pytest.mark.parametrize("line", ['state_dir = "state"', '[mqtt]\nca_file = "~/ca.pem"', '[tpm]\nsrk_auth = "a/b"'])
    def test_a_path_that_leads_elsewhere_for_a_service_is_told(self, tmp_path: Path, line: str) -> None:
        found = look(tmp_path, config_file=write_config(tmp_path, line + "\n"), state_dir=None)
        assert line.split('"')[1] in found.text("config.sense")

    @pytest.mark.parametrize(
        ("listen", "reason"),
        [
            pytest.param("127.0.0.1:{port}", "listen_taken", id="a port that is taken"),
            pytest.param("unix:{folder}/none/socket", "listen_missing", id="a directory that is not there"),
            pytest.param("nonsense", "metrics_listen_invalid", id="no address"),
            pytest.param("0.0.0.0:9464", "metrics_not_loopback", id="open to others"),
        ],
    )
    def test_where_the_daemon_could_not_listen_is_a_failure(self, tmp_path: Path, listen: str, reason: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            where = listen.format(port=other.getsockname()[1], folder=tmp_path)
            found = look(tmp_path, config_file=write_config(tmp_path, f'[metrics]\nlisten = "{where}"\n'))
        assert found.level("config.sense") is Level.FAILURE
        assert found.reasons("config.sense") == {reason}

    def test_an_availability_topic_that_is_one_of_the_others_is_a_failure(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, 'topic_prefix = "a"\n[mqtt]\navailability_topic = "josev/cs"\n')
        assert "availability_topic_invalid" in look(tmp_path, config_file=config).reasons("config.sense")

    def test_a_file_that_others_may_write_is_a_failure(self, tmp_path: Path) -> None:
        found = look(tmp_path, config_file=write_config(tmp_path, "", mode=0o666))
        assert found.level("config.rights") is Level.FAILURE
        assert found.reasons("config.rights") == {"replaceable"}

    @pytest.mark.parametrize(
        ("content", "mode", "level", "reasons"),
        [
            pytest.param("hunter2\n", 0o600, Level.OK, set(), id="as it should be"),
            pytest.param("hunter2\n", 0o644, Level.FAILURE, {"secret_unreadable"}, id="open to everybody"),
            pytest.param("", 0o600, Level.FAILURE, {"secret_unreadable"}, id="empty"),
            pytest.param("hunter2 \n", 0o600, Level.WARNING, {"padded"}, id="a blank at the end"),
            pytest.param("h" * 5000, 0o600, Level.FAILURE, {"secret_unreadable"}, id="too long"),
        ],
    )
    def test_of_a_secret_its_file_is_told_and_never_its_content(
        self, tmp_path: Path, content: str, mode: int, level: Level, reasons: set[str]
    ) -> None:
        (tmp_path / "password").write_text(content)
        (tmp_path / "password").chmod(mode)
        text = f'[mqtt]\nusername = "us"\npassword_file = "{tmp_path}/password"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text))
        assert found.level("config.secrets") is level
        assert found.reasons("config.secrets") == reasons
        assert "hunter2" not in json.dumps(found.report.to_json())

    def test_a_password_in_place_of_its_file_s_name_is_not_shown(self, tmp_path: Path) -> None:
        text = '[mqtt]\nusername = "us"\npassword_file = "hunter2"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text), broker="mqtt://user:hunter3@localhost")
        assert found.level("config.secrets") is Level.FAILURE
        assert "hunter" not in json.dumps(found.report.to_json())

    @pytest.mark.parametrize(
        ("harm", "level"),
        [
            ("", Level.OK),
            ("mode", Level.WARNING),
            ("file", Level.FAILURE),
            ("missing", Level.FAILURE),
            ("many", Level.FAILURE),
            ("loop", Level.FAILURE),
        ],
    )
    def test_the_directory_of_certificates_is_looked_at(self, tmp_path: Path, harm: str, level: Level) -> None:
        directory = tmp_path / "certificates"
        if harm == "file":
            directory.touch()
        elif harm == "loop":
            directory.symlink_to(directory)
        elif harm != "missing":
            directory.mkdir()
            directory.chmod(0o777 if harm == "mode" else 0o755)
        for number in range(1100 if harm == "many" else 0):
            (directory / str(number)).touch()
        config = write_config(tmp_path, f'[josev]\ncertificate_dir = "{directory}"\n')
        assert look(tmp_path, config_file=config).level("config.certificate_dir") is level

    @pytest.mark.parametrize(
        ("harm", "level", "words"),
        [
            ("", Level.OK, ""),
            ("missing", Level.FAILURE, "ca.pem"),
            ("no certificate", Level.FAILURE, "station.pem"),
            ("no key", Level.FAILURE, "station.key"),
            ("no CA", Level.WARNING, "ca_file"),
            ("broken", Level.FAILURE, "station.pem"),
            ("broken key", Level.FAILURE, "station.key"),
            ("another key", Level.FAILURE, "station.key"),
            ("in the TPM", Level.OK, ""),
            ("large", Level.FAILURE, "ca.pem"),
            ("DER", Level.FAILURE, "openssl x509 -inform DER"),
            ("PKCS #12", Level.FAILURE, "openssl pkcs12"),
        ],
    )
    def test_the_files_of_tls_are_judged(self, tmp_path: Path, harm: str, level: Level, words: str) -> None:
        pki = Pki(tmp_path / "pki")
        certificate, key = pki.issue("station")
        ca = certificate if harm == "no CA" else pki.ca_file
        if harm == "missing":
            ca.unlink()
        written = {
            "no certificate": (certificate, b""),
            "no key": (key, certificate.read_bytes()),
            "broken": (certificate, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            "broken key": (key, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
            "another key": (key, pki.issue("other")[1].read_bytes()),
            "in the TPM": (key, b"-----BEGIN TSS2 PRIVATE KEY-----\nAAAA\n-----END TSS2 PRIVATE KEY-----\n"),
            "DER": (ca, x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)),
            "PKCS #12": (ca, b"\x30\x82\x01\x00" + bytes(256)),
            "large": (ca, bytes(2**20 + 1)),
        }
        if harm in written:
            written[harm][0].write_bytes(written[harm][1])
        text = f'[mqtt]\nca_file = "{ca}"\ncertificate_file = "{certificate}"\nkey_file = "{key}"\n'
        found = look(tmp_path, config_file=write_config(tmp_path, text), broker="mqtts://localhost:1")
        assert found.level("config.tls") is level
        assert words in found.text("config.tls")
