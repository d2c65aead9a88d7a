"""The doctor on TPMs broken in real ways: swtpm and tpm2-tools."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from doctors import look, tool, used, write_config
from peers import Mosquitto, Swtpm, free_port

from stationkey.contract.profiles import Algorithm
from stationkey.doctor.report import Level
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.ledger import Ledger
from stationkey.system.state_dir import DATABASE_NAME


class TestTpm:
    def test_a_tpm_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        found = look(tmp_path, keystore=f"tpm2:swtpm:host=127.0.0.1,port={free_port()}")
        assert found.level("tpm.reachable") is Level.FAILURE
        assert found.reasons("tpm.reachable") == {"unreachable"}
        assert found.level("tpm.lockout") is Level.NOT_CHECKED

    @pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/tty", "{}/file"])
    def test_what_is_no_tpm_is_not_written_to(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").touch()
        found = look(tmp_path, keystore=f"tpm2:device:{path.format(tmp_path)}")
        assert found.level("tpm.device") is Level.FAILURE
        assert found.level("tpm.reachable") is Level.NOT_CHECKED
        assert (tmp_path / "file").read_bytes() == b""

    def test_a_library_that_is_not_installed_is_named(self, tmp_path: Path) -> None:
        found = look(tmp_path, keystore="tpm2:bogus:device")
        assert found.reasons("tpm.reachable") == {"tcti"}
        assert "libtss2-tcti-bogus" in found.text("tpm.reachable")

    def test_a_tpm_that_waits_for_its_start_up_is_not_started(self, tmp_path: Path) -> None:
        with Swtpm(tmp_path / "tpm", startup=False) as tpm:
            for _ in range(2):
                found = look(tmp_path, keystore=tpm.uri)
                assert found.level("tpm.started") is Level.WARNING
                assert "TPM2_Startup" in found.text("tpm.lockout")

    def test_a_lockout_is_a_failure_with_the_way_out(self, tmp_path: Path, swtpm: Swtpm) -> None:
        lock = ("--max-tries=1", "--recovery-time=1000", "--lockout-recovery-time=1000")
        tool(swtpm, "tpm2_dictionarylockout", "--setup-parameters", *lock)
        primary = str(tmp_path / "primary")
        tool(swtpm, "tpm2_createprimary", "-C", "e", "-G", "ecc", "-p", "right", "-c", primary)
        files = ("-u", str(tmp_path / "public"), "-r", str(tmp_path / "private"))
        tool(swtpm, "tpm2_create", "-C", primary, "-P", "wrong", *files, fails=True)
        found = look(tmp_path, keystore=swtpm.uri)
        assert found.reasons("tpm.lockout") == {"locked"}
        assert "tpm2_dictionarylockout --clear-lockout" in found.text("tpm.lockout")
        tool(swtpm, "tpm2_dictionarylockout", "--clear-lockout")
        assert look(tmp_path, keystore=swtpm.uri).level("tpm.lockout") is Level.OK

    def test_slots_full_of_what_others_left_are_told(self, tmp_path: Path, swtpm: Swtpm) -> None:
        for number in range(3):
            tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "ecc", "-c", str(tmp_path / str(number)))
        found = look(tmp_path, keystore=swtpm.uri)
        assert found.reasons("tpm.slots") == {"full"}

    def test_another_key_in_the_place_of_the_storage_root_key_is_a_failure(self, tmp_path: Path, swtpm: Swtpm) -> None:
        primary = str(tmp_path / "primary")
        tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "rsa2048", "-c", primary)
        tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", primary, "0x81000001")
        found = look(tmp_path, keystore=swtpm.uri)
        assert all(word in found.text("tpm.srk") for word in ("RSA", "0x81000001"))
        config = write_config(tmp_path, "[tpm]\nsrk_handle = 0x81000002\n")
        assert look(tmp_path, keystore=swtpm.uri, config_file=config).level("tpm.srk") is Level.OK

    def test_an_owner_s_password_that_nobody_names_is_a_failure(self, tmp_path: Path, swtpm: Swtpm) -> None:
        tool(swtpm, "tpm2_changeauth", "-c", "owner", "hunter2")
        found = look(tmp_path, keystore=swtpm.uri)
        assert found.reasons("tpm.srk") == {"owner_auth"}

    @pytest.mark.parametrize(("value", "level"), [("hunter2", Level.OK), ("hunter3", Level.FAILURE)])
    def test_the_owner_s_password_is_tried(self, tmp_path: Path, swtpm: Swtpm, value: str, level: Level) -> None:
        tool(swtpm, "tpm2_changeauth", "-c", "owner", "hunter2")
        tool(swtpm, "tpm2_changeauth", "-c", "lockout", "hunter4")
        (tmp_path / "owner").write_text(value)
        (tmp_path / "owner").chmod(0o600)
        config = write_config(tmp_path, f'[tpm]\nowner_auth = "{tmp_path}/owner"\n')
        found = look(tmp_path, keystore=swtpm.uri, config_file=config)
        assert found.level("tpm.authorisation") is level
        assert found.level("tpm.lockout") is Level.OK
        assert "hunter" not in json.dumps(found.report.to_json())

    @pytest.mark.parametrize("noda", [True, False])
    def test_a_storage_root_key_with_a_password_is_found_out_without_a_wrong_try(
        self, tmp_path: Path, swtpm: Swtpm, noda: bool
    ) -> None:
        """Where wrong tries are counted nothing is tried: to look must not bring the TPM nearer to its lockout."""
        attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt" + "|noda" * noda
        key, words = str(tmp_path / "key"), ("-G", "ecc256:aes128cfb", "-p", "hunter2", "-a", attributes)
        tool(swtpm, "tpm2_createprimary", "-C", "o", *words, "-c", key)
        tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", key, "0x81000001")
        tool(swtpm, "tpm2_flushcontext", "-t")
        found = look(tmp_path, keystore=swtpm.uri)
        assert found.level("tpm.srk") is (Level.FAILURE if noda else Level.WARNING)
        assert found.level("tpm.lockout") is Level.OK
        if noda:
            assert found.reasons("tpm.srk") == {"srk_auth"}
            tool(swtpm, *found.text("tpm.srk").rpartition(": ")[2].split())
            assert look(tmp_path, keystore=swtpm.uri).level("tpm.srk") is Level.OK

    def test_advice_about_what_has_a_password_says_where_it_goes(self, tmp_path: Path, swtpm: Swtpm) -> None:
        key = str(tmp_path / "key")
        tool(swtpm, "tpm2_createprimary", "-C", "o", "-G", "ecc384:aes256cfb", "-g", "sha384", "-c", key)
        tool(swtpm, "tpm2_evictcontrol", "-C", "o", "-c", key, "0x81000001")
        tool(swtpm, "tpm2_flushcontext", "-t")
        tool(swtpm, "tpm2_changeauth", "-c", "owner", "hunter2")
        found = look(tmp_path, keystore=swtpm.uri)
        assert "P-384" in found.text("tpm.srk")
        command = found.text("tpm.srk").partition("needs it: ")[2].partition(";")[0]
        tool(swtpm, *command.replace("PASSWORD", "hunter2").split())
        assert look(tmp_path, keystore=swtpm.uri).reasons("tpm.srk") == {"owner_auth"}

    @pytest.mark.parametrize("password", [[], ["-p", "hunter2"]], ids=["without a password", "with one"])
    def test_a_protection_that_is_switched_off_is_told(self, tmp_path: Path, swtpm: Swtpm, password: list[str]) -> None:
        off = ("--setup-parameters", "--max-tries=3", "--recovery-time=0", "--lockout-recovery-time=0")
        tool(swtpm, "tpm2_dictionarylockout", *off)
        if password:
            tool(swtpm, "tpm2_changeauth", "-c", "lockout", "hunter2")
        (found,) = look(tmp_path, keystore=swtpm.uri)["tpm.lockout"]
        assert found.level is Level.WARNING
        tool(swtpm, *found.advice.replace("PASSWORD", "hunter2").split())
        assert look(tmp_path, keystore=swtpm.uri).level("tpm.lockout") is Level.OK

    @pytest.mark.parametrize(
        ("tcti", "name", "reason"),
        [
            pytest.param("swtpm:host=127.0.0.1,port={control}", "tpm.reachable", "unreachable", id="its other port"),
            pytest.param("swtpm:host=127.0.0.1,port={broker}", "tpm.reachable", "unreachable", id="a broker"),
            pytest.param("swtpm:path={folder}/none", "tpm.device", "no_socket", id="no such socket"),
            pytest.param("swtpm:path={folder}/file", "tpm.device", "no_socket", id="no socket"),
            pytest.param(" swtpm:port=1", "tpm.reachable", "tcti", id="a blank"),
            pytest.param("device:{folder}/link", "tpm.device", "dangling", id="a link that leads nowhere"),
        ],
    )
    def test_what_is_wrong_with_the_way_to_it_is_told(
        self, tmp_path: Path, swtpm: Swtpm, mosquitto: Mosquitto, tcti: str, name: str, reason: str
    ) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to(tmp_path / "nothing")
        tcti = tcti.format(folder=tmp_path, control=swtpm.port + 1, broker=mosquitto.port)
        found = look(tmp_path, keystore=f"tpm2:{tcti}")
        assert found.level(name) is Level.FAILURE
        assert found.reasons(name) == {reason}

    def test_active_keys_of_another_tpm_are_named(self, tmp_path: Path, swtpm: Swtpm) -> None:
        state = used(tmp_path, keystore=swtpm.uri)
        swtpm.terminate()
        swtpm.new_chip()
        swtpm.start()
        cleared = look(tmp_path, keystore=swtpm.uri)
        assert cleared.level("tpm.srk") is cleared.level("tpm.keys") is Level.FAILURE
        with closing(Tpm2KeyStore(swtpm.tcti)) as store:
            store.generate(Algorithm.ECDSA_SHA256)  # another chip, with a storage root key of its own
        exchanged = look(tmp_path, keystore=swtpm.uri)
        with closing(Ledger(state / DATABASE_NAME, read_only=True)) as ledger:
            (key,) = ledger.keys.all()
        assert exchanged.reasons("tpm.keys") == {"another_tpm"}
        assert f"{key.key_id} (v2g_certificate)" in exchanged.text("tpm.keys")

    def test_software_keys_are_a_warning_where_they_are_allowed(self, tmp_path: Path) -> None:
        assert look(tmp_path).level("tpm.keystore") is Level.FAILURE
        assert look(tmp_path, allow_software_keys=True).level("tpm.keystore") is Level.WARNING


def test_the_version_of_tpm2_openssl_matters_where_a_tls_server_has_an_active_key(tmp_path: Path) -> None:
    asked = ["dpkg-query", "--show", "--showformat", "${source:Upstream-Version}", "tpm2-openssl"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    found = look(tmp_path, keystore="tpm2:device:/dev/null/none")
    assert found.level("software.openssl") is Level.OK
    assert version in found.text("software.openssl")
    (tmp_path / "state" / "active").mkdir(parents=True)
    (tmp_path / "state" / "active" / "v2g_certificate.pem").touch()
    found = look(tmp_path, keystore="tpm2:device:/dev/null/none")
    old = tuple(map(int, version.split("."))) < (1, 3)
    assert found.level("software.openssl") is (Level.WARNING if old else Level.OK)
    assert version in found.text("software.openssl")
