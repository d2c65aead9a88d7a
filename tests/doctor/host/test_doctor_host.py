"""What the doctor says of locks, rights, clock, users, unit and machine, as tables."""

from __future__ import annotations

import pytest
from judging import FAILURE, NOT_CHECKED, OK, ROOT, STATION, STRANGER, WARNING, facts, judge, reasons, worst

from stationkey.doctor.host import machine
from stationkey.doctor.host.context import Daemon, Unit, find_lock
from stationkey.doctor.host.files import User, permits
from stationkey.doctor.report import Level


class TestLocks:
    LINES = ("1: POSIX  ADVISORY  WRITE 11 fe:00:77 0 EOF", "2: FLOCK  ADVISORY  WRITE 22 fe:01:77 0 EOF")

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            pytest.param("2: FLOCK  ADVISORY  WRITE 22 fe:00:77 0 EOF", (True, 22), id="held"),
            pytest.param("2: FLOCK  ADVISORY  WRITE 0 fe:00:77 0 EOF", (True, None), id="by one of another namespace"),
            pytest.param("2: FLOCK  ADVISORY  READ 22 fe:00:77 0 EOF", (False, None), id="shared"),
            pytest.param("2: POSIX  ADVISORY  WRITE 22 fe:00:77 0 EOF", (False, None), id="of another kind"),
            pytest.param("2: -> FLOCK  ADVISORY  WRITE 22 fe:00:77 0 EOF", (False, None), id="only waited for"),
            pytest.param("2: FLOCK  ADVISORY  WRITE 22 fe:01:77 0 EOF", (False, None), id="on another disk"),
            pytest.param("", (False, None), id="none"),
        ],
    )
    def test_the_holder_of_a_lock_is_found_in_the_kernel_s_list(
        self, line: str, expected: tuple[bool, int | None]
    ) -> None:
        assert find_lock([line], device=0xFE00, inode=77) == expected


@pytest.mark.parametrize(
    ("mode", "user", "expected"),
    [
        (0o600, STATION, True),
        (0o060, STATION, False),  # the owner is judged by his own bits alone
        (0o060, User(1, 990), True),
        (0o060, User(1, 2, frozenset({990})), True),
        (0o660, STRANGER, False),
        (0o006, STRANGER, True),
        (0o000, ROOT, True),
    ],
)
def test_rights_are_judged_as_the_kernel_does(mode: int, user: User, expected: bool) -> None:
    assert permits(facts(mode=mode), user, 6) is expected


class TestClockAndMachine:
    NOW = machine.WRITTEN + 86_400.0

    @pytest.mark.parametrize(
        ("now", "latest", "level"),
        [
            (NOW, None, OK),
            (NOW, NOW - 10, OK),
            (NOW, NOW + 10, OK),
            (NOW, NOW + 86_400, WARNING),
            (0.0, None, FAILURE),
            (1e11, None, FAILURE),
        ],
    )
    def test_the_time(self, now: float, latest: float | None, level: Level) -> None:
        assert worst(judge("clock.time", now, latest)) is level

    @pytest.mark.parametrize(("battery", "level"), [(None, WARNING), (NOW, OK), (0.0, WARNING)])
    def test_the_battery(self, battery: float | None, level: Level) -> None:
        assert worst(judge("clock.battery", self.NOW, battery)) is level

    @pytest.mark.parametrize(
        ("me", "user", "tss", "level"),
        [
            (ROOT, STATION, (109, frozenset[str]()), OK),
            (STATION, STATION, (109, frozenset[str]()), OK),
            (STRANGER, STATION, None, NOT_CHECKED),
            (ROOT, ROOT, None, WARNING),
            (ROOT, STRANGER, (109, frozenset[str]()), WARNING),
        ],
    )
    def test_users(self, me: User, user: User, tss: tuple[int, frozenset[str]] | None, level: Level) -> None:
        daemon = Daemon(running=False, pid=None, user=user, known_by="so")
        assert worst(judge("machine.user", me, daemon, tss)) is level

    @pytest.mark.parametrize(
        ("properties", "level"),
        [
            ({"LoadState": "not-found"}, WARNING),
            ({"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled", "NRestarts": "0"}, OK),
            ({"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "disabled"}, WARNING),
            ({"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled", "NRestarts": "7"}, WARNING),
            ({"LoadState": "loaded", "ActiveState": "inactive"}, WARNING),
            ({"LoadState": "loaded", "ActiveState": "failed", "Result": "exit-code"}, FAILURE),
            ({"LoadState": "loaded", "ActiveState": "activating", "SubState": "auto-restart"}, FAILURE),
            ({"LoadState": "masked"}, FAILURE),
        ],
    )
    def test_the_unit(self, properties: dict[str, str], level: Level) -> None:
        unit, daemon = Unit(properties), Daemon(running=False, pid=None, user=STATION, known_by="so")
        assert worst(judge("machine.unit", unit, daemon)) is level

    @pytest.mark.parametrize(
        ("properties", "level", "expected"),
        [
            ({}, OK, set()),
            ({"DevicePolicy": "closed", "DeviceAllow": "/dev/null r /dev/tpmrm0 rw"}, OK, set()),
            ({"DevicePolicy": "closed", "DeviceAllow": "char-tpmrm rw"}, OK, set()),
            ({"DevicePolicy": "closed", "DeviceAllow": "/dev/tpm0 rw"}, FAILURE, {"device"}),
            ({"PrivateDevices": "yes"}, FAILURE, {"device"}),
            ({"ProtectSystem": "strict", "StateDirectory": "stationkey"}, OK, set()),
            ({"ProtectSystem": "strict", "ReadWritePaths": "/srv /var/lib"}, OK, set()),
            ({"ProtectSystem": "strict", "StateDirectory": "other"}, FAILURE, {"state_dir"}),
            ({"PrivateNetwork": "yes"}, FAILURE, {"network"}),
            ({"IPAddressDeny": "0.0.0.0/0 ::/0", "IPAddressAllow": "127.0.0.0/8"}, FAILURE, {"broker"}),
            ({"IPAddressDeny": "0.0.0.0/0 ::/0", "IPAddressAllow": "127.0.0.0/8 192.0.2.0/24"}, OK, set()),
            ({"IPAddressDeny": "198.51.100.0/24"}, OK, set()),
        ],
    )
    def test_what_the_unit_takes_from_the_daemon(
        self, properties: dict[str, str], level: Level, expected: set[str]
    ) -> None:
        unit = Unit({"LoadState": "loaded", **properties})
        finding = judge("machine.sandbox", unit, "/dev/tpmrm0", "/var/lib/stationkey", ("192.0.2.7",))
        assert worst(finding) is level
        assert reasons(finding) == expected

    @pytest.mark.parametrize(
        ("pattern", "limit", "level"),
        [
            ("core", "0", OK),
            ("core", "unlimited", WARNING),
            ("|/usr/lib/systemd/systemd-coredump", "0", OK),
            ("|/usr/lib/systemd/systemd-coredump", "unlimited", WARNING),
            ("core", None, NOT_CHECKED),
        ],
    )
    def test_core_dumps(self, pattern: str, limit: str | None, level: Level) -> None:
        limits = "" if limit is None else f"Limit  Soft\nMax core file size        {limit}     unlimited   bytes\n"
        assert worst(judge("machine.core_dumps", pattern, limits, None)) is level

    @pytest.mark.parametrize(
        ("text", "level"),
        [("MemAvailable:   1000000 kB\n", OK), ("MemAvailable:   1000 kB\n", WARNING), ("", NOT_CHECKED)],
    )
    def test_memory(self, text: str, level: Level) -> None:
        assert worst(judge("machine.memory", text)) is level

    @pytest.mark.parametrize(
        ("seen", "level"),
        [
            (("3.0.2", "/m", "", "", False), OK),
            (("3.0.2", "/m", "", "1.1.1", False), OK),
            (("3.0.2", "/m", "", "1.1.1", True), WARNING),
            (("3.0.2", "/m", "", "1.3.0", True), OK),
            (("3.0.2", "/m", "", "", True), OK),
            (("3.0.2", "/m", "no symbol", "", False), WARNING),
            (("3.0.2", "/m", None, "", False), WARNING),
            (("1.1.1", "", None, "", False), WARNING),
            (("", "", None, "", False), WARNING),
        ],
    )
    def test_openssl(self, seen: tuple[str, str, str | None, str, bool], level: Level) -> None:
        assert worst(judge("software.openssl", *seen)) is level
