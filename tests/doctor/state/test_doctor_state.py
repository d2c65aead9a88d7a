"""What the doctor says of the state directory and what is in it, as tables."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from judging import FAILURE, NOT_CHECKED, OK, ROOT, STATION, WARNING, facts, judge, reasons, worst
from msgspec.structs import replace

from stationkey.config.settings import DAY
from stationkey.contract.profiles import CertificateType
from stationkey.doctor.host.files import Facts, User
from stationkey.doctor.report import Level
from stationkey.doctor.state import checks
from stationkey.errors import ConfigurationError
from stationkey.ledger import KeyRecord
from stationkey.ledger.lifecycle import KeyState


def key(**changes: Any) -> KeyRecord:
    now = datetime.now(UTC).timestamp()
    record = KeyRecord(
        key_id="ab" * 10,
        scheme="tpm2",
        key_type="secp256r1",
        certificate_type="v2g_certificate",
        evse_id=None,
        algorithm="ECDSA_SHA256",
        common_name="CN",
        organization_name="O",
        country_name="DE",
        state=KeyState.ACTIVE,
        created_at=int(now * 1000),
        public=b"",
        due=None,
        failed=False,
        chain=None,
        not_after=int(now + 90 * 86_400),
        asked=1,
        installed=2,
        request_ids=(),
    )
    return replace(record, **changes)


class TestState:
    DIRECTORY = facts(path=Path("/s"), kind="directory", mode=0o700)

    @pytest.mark.parametrize(
        ("changes", "user", "level", "expected"),
        [
            ({}, STATION, OK, set()),
            ({"uid": 0, "gid": 0}, STATION, FAILURE, {"unwritable"}),
            ({"mode": 0o755}, STATION, WARNING, {"others_read"}),
            ({"mode": 0o777}, STATION, FAILURE, {"others_write"}),
            ({"mode": 0o500}, STATION, FAILURE, {"unwritable"}),
            ({"kind": "unseen"}, STATION, NOT_CHECKED, {"hidden"}),
            ({"kind": "missing"}, STATION, FAILURE, {"not_creatable"}),
            ({"kind": "missing"}, ROOT, WARNING, {"missing"}),
        ],
    )
    def test_the_directory(self, changes: dict[str, Any], user: User, level: Level, expected: set[str]) -> None:
        seen = dataclasses.replace(self.DIRECTORY, **changes)
        nearest = facts(path=Path("/"), kind="directory", mode=0o755, uid=0, gid=0)
        found = judge("state.directory", seen, user, nearest, None, True)
        assert worst(found) is level
        assert reasons(found) == expected

    @pytest.mark.parametrize(
        ("changes", "level", "expected"),
        [
            ({}, OK, set()),
            ({"mode": 0o644}, WARNING, {"others_read"}),
            ({"mode": 0o666}, FAILURE, {"others_write"}),
            ({"mode": 0o400}, FAILURE, {"unwritable"}),
        ],
    )
    def test_a_file_in_it(self, changes: dict[str, Any], level: Level, expected: set[str]) -> None:
        inside = [facts(path=Path("/s/lock")), facts(**{"path": Path("/s/ledger.sqlite3"), **changes})]
        found = list(judge("state.files", inside, STATION, None))
        assert worst(found) is level
        assert reasons(found) == expected

    def test_what_the_daemon_says_of_the_directory_is_passed_on(self) -> None:
        refused = ConfigurationError("another's", reason="state_dir_foreign", hint="give it back")
        nearest = facts(path=Path("/"), kind="directory", mode=0o755, uid=0, gid=0)
        found = judge("state.directory", self.DIRECTORY, ROOT, nearest, refused, True)
        assert (found[0].level, found[0].message, found[0].advice) == (FAILURE, refused.message, refused.hint)
        assert worst(judge("state.files", [], STATION, refused)) is FAILURE
        assert worst(judge("state.directory", self.DIRECTORY, STATION, nearest, None, False)) is FAILURE

    @pytest.mark.parametrize(
        ("words", "variables", "named"),
        [
            (["python", "serve", "--config", "/a"], [], "/a"),
            (["python", "serve", "--config=/a"], ["STATIONKEY_CONFIG=/b"], "/a"),
            (["python", "serve"], ["STATIONKEY_CONFIG=/b"], "/b"),
            (["python", "serve", "--config"], ["A=b"], ""),
        ],
    )
    def test_the_configuration_of_the_running_daemon(self, words: list[str], variables: list[str], named: str) -> None:
        assert checks.config_of(words, variables) == named

    @pytest.mark.parametrize(
        ("named", "file", "level"),
        [
            ("", None, OK),
            ("/x/y", facts(modified=50.0), OK),
            ("y", facts(modified=50.0), OK),
            ("/x/y", facts(modified=150.0), WARNING),
            ("/x/z", facts(), WARNING),
            ("", facts(), WARNING),
            ("/x/y", None, WARNING),
        ],
    )
    def test_whether_the_daemon_has_what_is_examined(self, named: str, file: Facts | None, level: Level) -> None:
        assert worst(judge("state.settings", named, Path("/x"), file, 100.0)) is level

    @pytest.mark.parametrize(
        ("octets", "files", "level"),
        [
            (10**9, None, OK),
            (10**9, 10**6, OK),
            (20 * 1024**2, None, WARNING),
            (10**9, 500, WARNING),
            (1024**2, None, FAILURE),
            (10**9, 0, FAILURE),
        ],
    )
    def test_room(self, octets: int, files: int | None, level: Level) -> None:
        assert worst(judge("state.disk", Path("/"), octets, files, 4 * 1024**2)) is level

    @pytest.mark.parametrize(
        ("kind", "read_only", "level"),
        [
            ("ext4", False, OK),
            ("ext4", True, FAILURE),
            ("tmpfs", False, WARNING),
            ("vfat", False, FAILURE),
            ("nfs4", False, WARNING),
        ],
    )
    def test_file_systems(self, kind: str, read_only: bool, level: Level) -> None:
        mount = checks.Mount("/s", kind, frozenset({"ro"} if read_only else ()))
        assert worst(judge("state.filesystem", Path("/s"), mount)) is level

    def test_the_last_of_the_longest_mount_points_counts(self, tmp_path: Path) -> None:
        lines = [
            "1 0 8:1 / / rw - ext4 /dev/a rw",
            f"2 1 0:2 / {tmp_path} rw - tmpfs none rw",
            f"3 1 0:3 / {tmp_path} rw - xfs /dev/b rw",
            f"4 1 0:4 / {tmp_path}x rw - nfs c rw",
            "nonsense",
        ]
        mount = checks.find_mount(lines, tmp_path)
        assert mount is not None
        assert mount.kind == "xfs"

    @pytest.mark.parametrize(
        ("changes", "level", "expected"),
        [
            ({}, OK, set()),
            ({"not_after": 1}, FAILURE, {"expired"}),
            ({"not_after": int(time.time()) + 5 * 86_400}, WARNING, {"expires"}),
            ({"not_after": None}, OK, set()),
            ({"state": KeyState.COMPROMISED}, WARNING, {"compromised", "none_active"}),
            ({"state": KeyState.PRE_ACTIVATION}, WARNING, {"none_active"}),
            ({"state": KeyState.PRE_ACTIVATION, "failed": True}, WARNING, {"not_installed", "none_active"}),
            ({"state": KeyState.PRE_ACTIVATION, "created_at": 0}, WARNING, {"waiting", "none_active"}),
            ({"due": -DAY - 1}, WARNING, {"overdue"}),
        ],
    )
    def test_keys_that_need_attention(self, changes: dict[str, Any], level: Level, expected: set[str]) -> None:
        found = judge("state.keys", [key(**changes)], time.time(), 0, tuple(CertificateType))
        assert worst(found) is level
        assert reasons(found) == expected

    @pytest.mark.parametrize(
        ("changes", "told"), [({}, True), ({"confirmed": True}, False), ({"root": "0123456789abcdef"}, False)]
    )
    def test_a_renewed_key_that_is_not_confirmed_is_named(self, changes: dict[str, Any], told: bool) -> None:
        before = key(key_id="cd" * 10, state=KeyState.DEACTIVATED, previous=True, confirmed=True)
        found = judge("state.keys", [before, key(**changes)], time.time(), 0, tuple(CertificateType))
        assert worst(found) is OK
        assert any("ab" * 10 in finding.message for finding in found) is told
