"""The daemon with all that protects keys in the TPM at once: request, installation, another firmware, and back."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from outside import Josev, Station, generate_csr
from peers import Mosquitto, Swtpm

from protection import SECRET, tool, write_secret
from stationkey.keystore.tpm2.keyfile import read_pem


@pytest.fixture
def station(tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm) -> Iterator[Station]:
    """A station that is not started yet."""
    secret = write_secret(tmp_path / "secret", SECRET)
    configuration = tmp_path / "stationkey.toml"
    lines = ["[tpm]", f'key_auth = "{secret}"', "pcrs = [7, 16]", 'session = "encrypted"', "[pool]", "rsa = 0"]
    configuration.write_text("\n".join(lines))
    options = ("--broker", mosquitto.url, "--keystore", swtpm.uri, "--config", str(configuration))
    station = Station(tmp_path, *options, TSS2_LOG="all+trace")
    yield station
    station.kill()


def installed(certificate_type: str) -> dict[str, object]:
    data = {"certificate_type": certificate_type, "status": "installed"}
    return {"id": str(uuid.uuid4()), "name": "certificate_installation_status", "type": "update", "data": data}


def test_a_key_with_value_registers_and_sessions_goes_from_request_to_active(
    station: Station, mosquitto: Mosquitto, swtpm: Swtpm
) -> None:
    with Josev(mosquitto) as josev:
        station.start()
        station.wait_for("PCR 7, 16 (sha256)")
        assert josev.ask(generate_csr()).csr
        josev.publish(installed("charging_station_certificate"))
        station.wait_for("key active")
        station.wait_for("written")
        assert station.stop() == 0

        tool(swtpm, "tpm2_pcrextend", "16:sha256=" + "00" * 32)
        station.start()
        (event,) = station.wait_for(reason="pcr_changed")
        assert event["certificate_type"] == "charging_station_certificate"
        josev.publish(installed("charging_station_certificate"))
        assert josev.ask(generate_csr()).csr, "a new key is bound to the registers of now"
        assert station.stop() == 0

        tool(swtpm, "tpm2_pcrreset", "16")
        station.start()
        (event,) = station.wait_for(reason="pcr_changed")
        assert event["state"] == "pre-activation", "the other one works again"
        assert station.stop() == 0
    key = read_pem((station.state_dir / "active" / "charging_station_certificate.pem").read_bytes())
    assert key is not None
    assert not key.empty_auth
    assert len(key.policy) == 2
    said = "".join(station.lines)
    assert SECRET not in said
    assert SECRET.encode().hex() not in re.sub(r"\s", "", said)


def test_a_changed_authorisation_value_is_told_of_each_key_at_the_start_and_locks_nothing(
    tmp_path: Path, station: Station, mosquitto: Mosquitto, swtpm: Swtpm
) -> None:
    with Josev(mosquitto) as josev:
        station.start()
        for _ in range(5):  # more than wrong values would take to lock the TPM
            josev.ask(generate_csr())
        assert station.stop() == 0
        write_secret(tmp_path / "secret", "another")
        station.start()
        assert len(station.wait_for(count=5, reason="key_auth_wrong")) == 5
        assert josev.ask(generate_csr()).csr
        assert station.stop() == 0
        write_secret(tmp_path / "secret", SECRET)
        station.start()
        assert station.wait_for(reason="key_auth_wrong")
        assert josev.ask(generate_csr()).csr
        assert station.stop() == 0
    assert "TPM2_PT_LOCKOUT_COUNTER: 0x0" in tool(swtpm, "tpm2_getcap", "properties-variable")


def test_a_daemon_does_not_start_with_a_value_that_no_key_can_have(tmp_path: Path, station: Station) -> None:
    write_secret(tmp_path / "secret", "x" * 33)
    station.launch()
    assert station.ended() == 1
    assert any("32 bytes" in line for line in station.lines)  # words: the limit
    assert "xxxxx" not in "".join(station.lines)
