"""What the doctor says of the configuration, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from judging import FAILURE, NOT_CHECKED, OK, STATION, WARNING, facts, judge, reasons, settings, worst

from stationkey.config.secrets import SecretReference
from stationkey.doctor.config import checks
from stationkey.doctor.config.checks import named_secrets
from stationkey.doctor.host.context import Configured, Unit
from stationkey.doctor.report import Level


class TestConfiguration:
    @pytest.mark.parametrize(
        ("changes", "level"),
        [
            ({}, OK),
            ({"uid": 0, "gid": 990, "mode": 0o640}, OK),
            ({"mode": 0o662}, FAILURE),
            ({"mode": 0o620}, WARNING),
            ({"uid": 1234, "mode": 0o644}, WARNING),
            ({"uid": 0, "gid": 0, "mode": 0o600}, FAILURE),
            ({"exposed": Path("/x")}, FAILURE),
        ],
    )
    def test_rights(self, changes: dict[str, Any], level: Level) -> None:
        assert worst(judge("config.rights", facts(**changes), STATION)) is level

    def test_a_directory_on_the_way_that_is_closed_is_named(self) -> None:
        (found,) = judge("config.rights", facts(closed=Path("/x")), STATION)
        assert found.reason == "unreadable"
        assert "/x;" in found.advice

    def test_no_file_is_needed(self) -> None:
        configured = Configured(file=None, complaints=(), settings=settings())
        assert worst(judge("config.file", configured)) is OK

    @pytest.mark.parametrize(
        ("environment", "level"),
        [
            ({}, OK),
            ({"STATIONKEY_BROKER": "x", "PATH": "y"}, OK),
            ({"STATIONKEY_KEYSTROE": "x"}, WARNING),
            ({"OPENSSL_CONF": "x"}, WARNING),
        ],
    )
    def test_variables(self, environment: dict[str, str], level: Level) -> None:
        assert worst(judge("config.environment", environment, None)) is level

    def test_a_log_format_that_is_none_is_a_failure(self) -> None:
        assert worst(judge("config.environment", {}, "xml")) is FAILURE

    @pytest.mark.parametrize(
        ("text", "level", "expected"),
        [
            ('broker = "mqtt://a"\n[mqtt]\nca_file = "/x"', FAILURE, {"tls_options_unused"}),
            ('broker = "mqtt://a"\n[mqtt]\nusername = "u"\npassword_file = "/x"', FAILURE, {"password_clear"}),
            ('broker = "mqtts://a"\n[mqtt]\nusername = "u"\npassword_file = "/x"', OK, set()),
            ('[mqtt]\nusername = "u"', WARNING, {"password_missing"}),
            ('[mqtt]\navailability_topic = "a/#"', FAILURE, {"availability_topic_invalid"}),
            ('[renewal]\ntopic = "cs/josev"', FAILURE, {"renewal_topic_invalid"}),
            ('[tpm]\nkey_auth = "generated"', WARNING, {"key_auth_clear"}),
            ('[tpm]\npcrs = [7]\npcr_bank = "sha1"', WARNING, {"sha1"}),
            ("allow_software_keys = true", WARNING, {"software_allowed"}),
            ('[policy]\nalgorithms = ["ECDSA_SHA256", "RSA_SHA256"]', FAILURE, {"algorithm_missing"}),
            ('[policy]\nalgorithms = ["ECDSA_SHA256", "ECDSA_SHA512"]', WARNING, {"pool_unused"}),
            ("[policy]\ncertificate_types = []", FAILURE, {"policy_empty"}),
            ("[deadlines]\nec = 0.5", WARNING, {"deadline_short"}),
            ('[metrics]\nlisten = "0.0.0.0:9100"', FAILURE, {"metrics_not_loopback"}),
            ('[metrics]\nlisten = "[::1]:9100"', OK, set()),
            ('[metrics]\nlisten = "unix:/run/x"', OK, set()),
        ],
    )
    def test_settings_that_contradict_each_other(
        self, tmp_path: Path, text: str, level: Level, expected: set[str]
    ) -> None:
        found = list(judge("config.sense", settings(text, tmp_path)))
        assert worst(found) is level
        assert expected <= reasons(found)

    @pytest.mark.parametrize(
        ("properties", "level"),
        [
            (None, NOT_CHECKED),
            ({"LoadState": "not-found"}, NOT_CHECKED),
            ({"LoadState": "loaded", "LoadCredential": "pw:/etc/x"}, OK),
            ({"LoadState": "loaded", "LoadCredential": "pwd:/etc/x"}, FAILURE),
        ],
    )
    def test_a_credential_is_looked_for_in_the_unit(self, properties: dict[str, str] | None, level: Level) -> None:
        seen = checks.SecretSeen(where="[mqtt] password_file", source="credential:pw", facts=None)
        unit = None if properties is None else Unit(properties)
        assert worst(judge("config.secrets", [seen], STATION, unit)) is level

    def test_every_secret_that_can_be_named_is_looked_at(self, tmp_path: Path) -> None:
        text = '[mqtt]\nusername_file = "/a"\npassword_file = "/b"\n[tpm]\n' + "\n".join(
            f'{name} = "/{name}"' for name in ("owner_auth", "srk_auth", "endorsement_auth", "key_auth")
        )
        found = {option.place: reference for option, reference in named_secrets(settings(text, tmp_path)).items()}
        assert len(found) == 6
        assert found["tpm.key_auth"] == SecretReference("/key_auth")
