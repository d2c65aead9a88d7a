"""What the doctor says of what was seen: judgements alone, as tables. Real set-ups are in test_doctor_setups.py."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # ships none

from stationkey.config.file import File, read_file, settle
from stationkey.config.options import options_of
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import DAY, Settings
from stationkey.contract.profiles import CertificateType
from stationkey.doctor import AREAS, Finding, Level, Report
from stationkey.doctor.broker import reachability as broker_reachability
from stationkey.doctor.broker import rights
from stationkey.doctor.broker.probe import Rights, Visit
from stationkey.doctor.checks import CHECKS
from stationkey.doctor.config import consistency
from stationkey.doctor.config import file as configuration
from stationkey.doctor.config import secrets as named
from stationkey.doctor.config.certificates import judge_dates
from stationkey.doctor.host import clock, machine, software
from stationkey.doctor.host.context import Configured, Daemon, Unit, find_lock
from stationkey.doctor.host.files import Facts, User, permits
from stationkey.doctor.report import Verdict, failure, ok, printable
from stationkey.doctor.runner import DEADLINE, Answer, Check, ask, run
from stationkey.doctor.state import daemon as running_daemon
from stationkey.doctor.state import directory, disk
from stationkey.doctor.state import keys as records
from stationkey.doctor.tpm import capabilities, device, reachability
from stationkey.doctor.tpm import state as condition
from stationkey.doctor.tpm.device import Chip, Way
from stationkey.doctor.tpm.facts import Probe, Seen
from stationkey.doctor.tpm.reachability import Told
from stationkey.errors import BrokerError, ConfigurationError
from stationkey.ledger import KeyRecord
from stationkey.ledger.lifecycle import KeyState
from stationkey.mqtt.url import Broker

OK, WARNING, FAILURE, NOT_CHECKED = Level.OK, Level.WARNING, Level.FAILURE, Level.NOT_CHECKED
DOCUMENT = (Path(__file__).parents[2] / "docs/doctor.md").read_text()
ROOT, STATION, STRANGER = User(0, 0), User(990, 990, frozenset({109})), User(1234, 1234)


def settings(text: str = "", tmp_path: Path | None = None) -> Settings:
    file = File()
    if tmp_path is not None:
        (tmp_path / "c.toml").write_text(text)
        file = read_file(tmp_path / "c.toml")
    return settle(file, keystore="tpm2:device:/dev/tpmrm0")


def worst(found: Verdict | Iterable[Verdict]) -> Level:
    findings = [found] if isinstance(found, Verdict) else found
    order = [FAILURE, WARNING, OK, NOT_CHECKED]
    return min((finding.level for finding in findings), key=order.index)


def said(found: Verdict | Iterable[Verdict]) -> str:
    findings = [found] if isinstance(found, Verdict) else found
    return " ".join(f"{finding.message} {finding.advice}" for finding in findings)


class TestReport:
    def test_the_document_has_every_check_and_no_other(self) -> None:
        listed: dict[str, str] = {}
        for part in re.split(r"^### ", DOCUMENT, flags=re.MULTILINE)[1:]:
            area, _, rows = part.partition("\n")
            listed |= dict.fromkeys(re.findall(r"^\| `([a-z_.]+)` \|", rows, re.MULTILINE), area)
        assert list(listed.items()) == list(AREAS.items())

    def test_no_name_is_in_two_checks_and_each_comes_after_what_it_depends_on(self) -> None:
        seen: set[str] = set()
        for check in (check for rows in CHECKS.values() for check in rows):
            assert check.id not in seen
            assert seen.issuperset(check.after)
            seen.add(check.id)

    def test_what_a_check_reads_is_in_the_configuration_file(self) -> None:
        names = {name for rows in CHECKS.values() for check in rows for name in check.reads}
        assert names <= {option.table or option.name for option in options_of(Settings)}

    def test_the_schema_in_the_document_is_that_of_the_report(self) -> None:
        (schema,) = re.findall(r"^```json\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
        Draft202012Validator.check_schema(json.loads(schema))
        report = Report((Finding("tpm.srk", OK, "there"), Finding("tpm.lockout", FAILURE, "locked", "wait")))
        Draft202012Validator(json.loads(schema)).validate(report.to_json())
        assert report.exit_code == 1
        assert report.summary == "1 failure, 0 warnings, 1 ok"

    def test_the_deadline_of_all_checks_is_below_ten_seconds(self) -> None:
        assert DEADLINE < 10

    @pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\u202eevil", "\udcff", "\x00"])
    def test_what_is_said_is_printable(self, text: str) -> None:
        assert printable(text).isprintable()
        assert Finding("tpm.srk", OK, text, text).message.isprintable()

    def test_what_is_said_is_of_bounded_length(self) -> None:
        assert len(printable("x" * 10_000)) < 1000


def well(_: str) -> Verdict:
    return ok("well")


def see(_: None) -> tuple[str]:
    return ("seen",)


class TestRunning:
    def test_a_check_that_never_ends_is_left_behind_and_told(self) -> None:
        forever = threading.Event()

        def stuck(_: None) -> tuple[str]:
            forever.wait()
            return ("never",)

        checks = [
            Check("a.first", see, well),
            Check("a.second", stuck, well),
            Check("a.third", see, well, ("a.second",)),
            Check("a.fourth", see, well, ("a.third",)),
        ]
        found, left_behind = run(checks, None, deadline=0.1)
        forever.set()
        assert [finding.level for finding in found] == [OK, FAILURE, NOT_CHECKED, NOT_CHECKED]
        assert all("a.second" in finding.message for finding in found[2:])
        assert left_behind

    def test_checks_run_at_once(self) -> None:
        both = threading.Barrier(2, timeout=10)

        def meet(_: None) -> tuple[str]:
            both.wait()
            return ("met",)

        found, _ = run([Check("a.b", meet, well), Check("a.c", meet, well)], None)
        assert [finding.level for finding in found] == [OK, OK]

    @pytest.mark.parametrize(
        ("before", "level"),
        [
            (ok("well"), OK),
            (ok("nothing more to see", stops=True), NOT_CHECKED),
            (failure("broken", "mend it"), NOT_CHECKED),
            (failure("weak", "mend it", stops=False), OK),
        ],
    )
    def test_what_depends_on_a_check_that_stops_is_not_checked_because_of_it(
        self, before: Verdict, level: Level
    ) -> None:
        checks = [
            Check("a.a", lambda _: before, well),
            Check("a.b", see, well, ("a.a",)),
            Check("a.c", see, well, ("a.b",)),
        ]
        found, _ = run(checks, None)
        assert [finding.level for finding in found[1:]] == [level, level]
        assert level is OK or all("a.a" in finding.message for finding in found[1:])

    def test_what_hangs_on_a_name_that_cannot_be_read_is_not_checked(self) -> None:
        checks = [Check("a.a", see, well, (), ("mqtt",)), Check("a.b", see, well)]
        found, _ = run(checks, None, unread={"mqtt"})
        assert [finding.level for finding in found] == [NOT_CHECKED, OK]
        assert "config.file" in found[0].message

    def test_a_program_that_hangs_is_killed(self) -> None:
        began = time.monotonic()
        answer = ask(["sh", "-c", "echo begun; exec sleep 60"], seconds=0.2)
        assert answer == Answer(None, "begun\n", "")
        assert time.monotonic() - began < 30

    def test_a_program_that_is_not_there_is_no_fault(self) -> None:
        assert ask(["/no/such/program"], seconds=1).status == -1


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


def facts(**changes: Any) -> Facts:
    return dataclasses.replace(Facts(path=Path("/x/y"), kind="file", mode=0o600, uid=990, gid=990), **changes)


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
        assert worst(configuration.judge_rights(facts(**changes), STATION)) is level

    def test_a_directory_on_the_way_that_is_closed_is_named(self) -> None:
        assert "/x is closed" in said(configuration.judge_rights(facts(closed=Path("/x")), STATION))

    def test_a_file_that_is_not_named_and_there_is_told(self) -> None:
        configured = Configured(file=None, complaints=(), settings=settings(), keystore=None)
        assert configuration.judge_file(configured, Path("/x")).level is WARNING
        assert configuration.judge_file(configured, None).level is OK

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
        assert worst(configuration.judge_environment(environment, None)) is level

    def test_a_log_format_that_is_none_is_a_failure(self) -> None:
        assert worst(configuration.judge_environment({}, "xml")) is FAILURE

    @pytest.mark.parametrize(
        ("text", "level", "words"),
        [
            ('broker = "mqtt://a"\n[mqtt]\nca_file = "/x"', FAILURE, "mqtts://"),
            ('broker = "mqtt://a"\n[mqtt]\nusername = "u"\npassword_file = "/x"', FAILURE, "in the clear"),
            ('broker = "mqtts://a"\n[mqtt]\nusername = "u"\npassword_file = "/x"', OK, ""),
            ('[mqtt]\nusername = "u"', WARNING, "neither password nor certificate"),
            ('[mqtt]\navailability_topic = "a/#"', FAILURE, "cannot be the availability topic"),
            ('[tpm]\nkey_auth = "generated"', WARNING, "listens on the bus"),
            ('[tpm]\npcrs = [7]\npcr_bank = "sha1"', WARNING, "SHA-1"),
            ("allow_software_keys = true", WARNING, "not used"),
            ('[policy]\nalgorithms = ["ECDSA_SHA256", "RSA_SHA256"]', FAILURE, "the only algorithm"),
            ('[policy]\nalgorithms = ["ECDSA_SHA256", "ECDSA_SHA512"]', WARNING, "[pool] makes 1 RSA"),
            ("[policy]\ncertificate_types = []", FAILURE, "a list is empty"),
            ("[deadlines]\nec = 0.5", WARNING, "busy"),
            ('[metrics]\nlisten = "0.0.0.0:9100"', FAILURE, "from other machines"),
            ('[metrics]\nlisten = "[::1]:9100"', OK, ""),
            ('[metrics]\nlisten = "unix:/run/x"', OK, ""),
        ],
    )
    def test_settings_that_contradict_each_other(self, tmp_path: Path, text: str, level: Level, words: str) -> None:
        found = list(consistency.judge_settings(settings(text, tmp_path)))
        assert worst(found) is level
        assert words in said(found)

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
        seen = named.SecretSeen(where="[mqtt] password_file", source="credential:pw", facts=None)
        unit = None if properties is None else Unit(properties=properties)
        assert worst(named.judge_secrets([seen], STATION, unit)) is level

    def test_every_secret_that_can_be_named_is_looked_at(self, tmp_path: Path) -> None:
        text = '[mqtt]\nusername_file = "/a"\npassword_file = "/b"\n[tpm]\n' + "\n".join(
            f'{name} = "/{name}"' for name in ("owner_auth", "srk_auth", "endorsement_auth", "key_auth")
        )
        found = dict(consistency.named_secrets(settings(text, tmp_path)))
        assert len(found) == 6
        assert found["[tpm] key_auth"] == SecretReference("/key_auth")


class TestDevice:
    WAY = Way.parse("device:/dev/tpmrm0")
    TPM = facts(path=Path("/dev/tpmrm0"), kind="character device", mode=0o660, uid=109, gid=109)

    @pytest.mark.parametrize(
        ("changes", "chip", "user", "level", "words"),
        [
            ({}, Chip(known=True, major="2"), STATION, OK, ""),
            ({}, Chip(known=True, major="2"), STRANGER, FAILURE, "usermod -a -G"),
            ({}, Chip(known=True, major="1"), STATION, FAILURE, "TPM 1.2"),
            ({"mode": 0o666}, Chip(known=True), STATION, WARNING, "chmod o="),
            ({"mode": 0o600, "uid": 0, "gid": 0}, Chip(known=True), STATION, FAILURE, "tpm-udev"),
            ({"kind": "file"}, Chip(known=True, is_tpm=False), STATION, FAILURE, "not a TPM"),
            ({"kind": "missing"}, Chip(known=False), STATION, FAILURE, "the kernel has found no TPM"),
            ({"kind": "missing"}, Chip(known=True, devices=("/dev/tpm0",)), STATION, FAILURE, "/dev/tpm0"),
        ],
    )
    def test_the_device_file(self, changes: dict[str, Any], chip: Chip, user: User, level: Level, words: str) -> None:
        found = device.judge_device(self.WAY, dataclasses.replace(self.TPM, **changes), chip, user)
        assert worst(found) is level
        assert words in said(found)

    @pytest.mark.parametrize(
        ("tcti", "managed"),
        [
            ("device:/dev/tpmrm0", True),
            ("device:/dev/tpm0", False),
            ("device", False),
            ("tabrmd", True),
            ("tabrmd:bus_type=session", True),
            ("swtpm:host=127.0.0.1,port=2321", False),
            ("mssim:port=x", False),
            ("/usr/lib/libtss2-tcti-device.so.0:/dev/tpmrm0", False),
        ],
    )
    def test_a_resource_manager_is_told_by_the_tcti(self, tcti: str, managed: bool) -> None:
        assert Way.parse(tcti).is_managed is managed
        assert reachability.judge_manager(Way.parse(tcti)).level is (OK if managed else WARNING)


PROPERTIES = {
    0x100: 0x322E3000,
    0x102: 138,
    0x105: int.from_bytes(b"IFX\0", "big"),
    0x106: int.from_bytes(b"SLB9", "big"),
    0x107: int.from_bytes(b"670\0", "big"),
    0x108: 0,
    0x109: 0,
    0x10B: 7 << 16 | 85,
    0x10C: 0,
    0x200: 4,  # lockoutAuthSet
    0x201: 0x8000000F,
    0x204: 3,
    0x206: 64,
    0x207: 3,
    0x209: 7,
    0x20E: 0,
    0x20F: 32,
    0x210: 7200,
    0x211: 86400,
}
GOOD_SRK = {"type": 0x23, "curve": 3, "attributes": 0x30472}
VALUES: dict[str, Any] = {
    "open": None,
    "test_result": 0,
    "loaded_sessions": [],
    "transient": [],
    "persistent": [0x81000001],
    "algorithms": [1, 4, 6, 0x0B, 0x0C, 0x0D, 0x14, 0x18, 0x23, 0x43],
    "curves": [3, 4, 5],
    "rsa": [2048, 3072],
    "banks": {"11": list(range(24))},
    "srk": GOOD_SRK,
    "keys": {},
}


def chip(
    *,
    properties: dict[int, int] | None = None,
    text: str = "",
    tmp_path: Path | None = None,
    tcti: str = "device:/dev/tpmrm0",
    keys: dict[str, str] | None = None,
    errors: dict[str, int] | None = None,
    **values: Any,
) -> Seen:
    """A TPM as it should be, but for what is said otherwise."""
    merged = PROPERTIES | (properties or {})
    answers = VALUES | {"properties": {str(number): value for number, value in merged.items()}} | values
    lost = errors or {}
    probe = Probe(values={part: value for part, value in answers.items() if part not in lost}, errors=lost)
    return Seen(probe=probe, way=Way.parse(tcti), settings=settings(text, tmp_path), keys=keys or {})


ANSWERS: dict[str, Any] = {check.id: check for check in CHECKS["Key store"] if isinstance(check.look, Told)}


def judged(name: str, seen: Seen) -> Level:
    """What a check of the TPM's answers says, at its worst."""
    check = ANSWERS[name]
    there = check.look.of(seen)
    return worst(there if isinstance(there, Verdict) else check.judge(*there))


BARE = "device:/dev/tpm0"
SWTPM = {0x105: int.from_bytes(b"IBM\0", "big"), 0x106: int.from_bytes(b"SW  ", "big")}
ST = int.from_bytes(b"STM ", "big")


class TestTpm:
    def test_a_good_chip_has_no_complaint(self) -> None:
        for name in ANSWERS:
            assert judged(name, chip()) is OK, name

    @pytest.mark.parametrize(
        ("judge", "seen", "level", "words"),
        [
            pytest.param("started", chip(errors={"properties": 0x100}), WARNING, "TPM2_Startup", id="not started"),
            pytest.param("self_test", chip(test_result=0x101), FAILURE, "failure mode", id="failure mode"),
            pytest.param("self_test", chip(errors={"properties": 0x101}), FAILURE, "failure mode", id="refuses all"),
            pytest.param("self_test", chip(test_result=0x153), OK, "not finished", id="not tested yet"),
            pytest.param("self_test", chip(test_result=0x12F), FAILURE, "0x12f", id="a bad result"),
            pytest.param("version", chip(properties={0x100: 0x312E3200}), FAILURE, "TPM 1.2", id="TPM 1.2"),
            pytest.param("firmware", chip(properties={0x10B: 7 << 16 | 61}), FAILURE, "ROCA", id="ROCA, the last"),
            pytest.param("firmware", chip(properties={0x10B: 7 << 16 | 62}), OK, "IFX", id="ROCA, mended"),
            pytest.param("firmware", chip(properties={0x10B: 5 << 16}), FAILURE, "ROCA", id="ROCA, the first"),
            pytest.param(
                "firmware", chip(properties={0x105: ST, 0x10B: 73 << 16 | 4}), FAILURE, "TPM-Fail", id="TPM-Fail"
            ),
            pytest.param(
                "firmware", chip(properties={0x105: ST, 0x10B: 73 << 16 | 20}), OK, "STM", id="TPM-Fail, mended"
            ),
            pytest.param("firmware", chip(properties={0x105: ST, 0x10B: 7 << 16 | 61}), OK, "STM", id="another maker"),
            pytest.param("firmware", chip(properties={0x106: 0x1B5B324A}), OK, "?[2J", id="a hostile name"),
            pytest.param("simulated", chip(properties=SWTPM), WARNING, "simulated", id="simulated, behind a device"),
            pytest.param(
                "simulated", chip(tcti="swtpm:port=1"), WARNING, "simulated", id="simulated, by the way there"
            ),
            pytest.param("algorithms", chip(curves=[3, 4]), OK, "ECDSA_SHA512 (no secp521r1)", id="no P-521"),
            pytest.param("algorithms", chip(curves=[5]), FAILURE, "storage root key", id="no P-256"),
            pytest.param("certificate_types", chip(curves=[3]), WARNING, "secp521r1", id="no -20"),
            pytest.param(
                "certificate_types",
                chip(algorithms=[1, 6, 11, 12, 20, 24, 35, 67]),
                WARNING,
                "SHA-512",
                id="no SHA-512",
            ),
            pytest.param("certificate_types", chip(rsa=[2048]), OK, "ECDSA_SHA256", id="RSA 2048 only"),
            pytest.param("certificate_types", chip(algorithms=[]), FAILURE, "none of the", id="nothing"),
            pytest.param(
                "certificate_types", chip(curves=[5]), WARNING, "its profile wants", id="not as the profile wants"
            ),
            pytest.param("hierarchies", chip(properties={0x201: 0xD}), FAILURE, "storage hierarchy", id="no storage"),
            pytest.param("hierarchies", chip(properties={0x201: 0xB}), WARNING, "endorsement", id="no endorsement"),
            pytest.param("srk", chip(srk=None), OK, "makes it", id="none yet"),
            pytest.param(
                "srk", chip(srk=None, properties={0x200: 1}), FAILURE, "owner_auth", id="none, owner's password"
            ),
            pytest.param("srk", chip(srk=None, properties={0x209: 0}), FAILURE, "no room", id="none, and no room"),
            pytest.param("srk", chip(srk=None, keys={"k": "v2g"}), FAILURE, "cleared", id="none, and active keys"),
            pytest.param("srk", chip(srk=GOOD_SRK | {"curve": 4}), FAILURE, "curve", id="on another curve"),
            pytest.param("srk", chip(srk={"type": 1, "attributes": 0x30472}), FAILURE, "RSA", id="RSA"),
            pytest.param(
                "srk", chip(srk=GOOD_SRK | {"attributes": 0x40472}), FAILURE, "signing key", id="a signing key"
            ),
            pytest.param("srk", chip(srk=GOOD_SRK | {"attributes": 0x30072}), WARNING, "noda", id="without noda"),
            pytest.param("authorisation", chip(properties={0x200: 7}), WARNING, "endorsement_auth", id="passwords"),
            pytest.param("authorisation", chip(properties={0x200: 4}), OK, "lockout: with a password", id="lockout's"),
            pytest.param("authorisation", chip(properties={0x200: 0}), WARNING, "may clear it", id="open to clearing"),
            pytest.param("authorisation", chip(properties={0x200: 1 << 8}), OK, "lockout: no", id="clearing disabled"),
            pytest.param("lockout", chip(properties={0x200: 1 << 9}), FAILURE, "exempt", id="in lockout"),
            pytest.param(
                "lockout",
                chip(properties={0x200: 1 << 9}, srk=GOOD_SRK | {"attributes": 0x30072}),
                FAILURE,
                "no request is served",
                id="in lockout, and the storage root key with it",
            ),
            pytest.param("lockout", chip(properties={0x20E: 3}), WARNING, "3 of 32", id="tries used up"),
            pytest.param("lockout", chip(properties={0x20F: 0}), WARNING, "no wrong", id="no try allowed"),
            pytest.param(
                "slots", chip(tcti=BARE, transient=[1, 2, 3], properties={0x207: 0}), WARNING, "full", id="full"
            ),
            pytest.param("slots", chip(tcti=BARE, transient=[1]), WARNING, "1 objects", id="strays"),
            pytest.param("slots", chip(tcti=BARE, properties={0x207: 1}), FAILURE, "two are needed", id="no room"),
            pytest.param(
                "slots", chip(properties={0x207: 0}), OK, "resource manager", id="a resource manager makes room"
            ),
            pytest.param("sessions", chip(properties={0x206: 0}), WARNING, "tpm2_flushcontext", id="no sessions"),
            pytest.param("sessions", chip(tcti=BARE, loaded_sessions=[1]), WARNING, "1 sessions", id="stray sessions"),
            pytest.param(
                "keys", chip(keys={"k": "v2g"}, srk=None), FAILURE, "root key is gone", id="no root for a key"
            ),
        ],
    )
    def test_each_state_is_told(self, judge: str, seen: Seen, level: Level, words: str) -> None:
        found = ANSWERS[f"tpm.{judge}"].judge(seen)
        found = [found] if isinstance(found, Verdict) else list(found)
        assert worst(found) is level
        assert words in said(found)

    @pytest.mark.parametrize(
        ("code", "level", "words"),
        [
            (0, OK, "takes the active key"),
            (0x1DF, FAILURE, "another TPM"),
            (0xB0000 | 0x1DF, FAILURE, "another TPM"),
            (0x902, NOT_CHECKED, "no free slot"),
            (-1, FAILURE, "damaged"),
            (0x98E, FAILURE, "0x98e"),
        ],
    )
    def test_what_becomes_of_a_key_that_is_tried(self, code: int, level: Level, words: str) -> None:
        seen = chip()
        values = dict(seen.probe.values, keys={"k": code})
        seen = dataclasses.replace(seen, probe=dataclasses.replace(seen.probe, values=values), keys={"k": "v2g"})
        found = list(condition.judge_keys(seen))
        assert worst(found) is level
        assert words in said(found)

    @pytest.mark.parametrize(
        ("text", "level"),
        [
            ("[tpm]\npcrs = [0, 7]", WARNING),
            ('[tpm]\npcrs = [0, 7]\npcr_bank = "sha512"', FAILURE),
            ("", OK),
        ],
    )
    def test_registers_that_keys_are_bound_to(self, tmp_path: Path, text: str, level: Level) -> None:
        assert worst(condition.judge_pcrs(chip(text=text, tmp_path=tmp_path))) is level

    @pytest.mark.parametrize(
        ("there", "level"),
        [
            (None, FAILURE),
            ({"type": 0x23, "attributes": 0x50072}, OK),
            ({"type": 0x23, "attributes": 0x40072}, FAILURE),
        ],
    )
    def test_the_attestation_key(self, tmp_path: Path, there: dict[str, int] | None, level: Level) -> None:
        seen = chip(text="[tpm]\nak_handle = 0x81010002", tmp_path=tmp_path, ak=there)
        assert worst(condition.judge_attestation_key(seen)) is level

    def test_keys_are_not_tried_in_a_bare_tpm_that_the_daemon_works_with(self) -> None:
        busy = dataclasses.replace(chip(tcti=BARE, keys={"k": "v2g"}), daemon_running=True)
        assert worst(condition.judge_keys(busy)) is NOT_CHECKED
        cleared = dataclasses.replace(chip(tcti=BARE, keys={"k": "v2g"}, srk=None), daemon_running=True)
        assert worst(condition.judge_keys(cleared)) is worst(condition.judge_srk(cleared)) is FAILURE

    def test_a_certificate_type_that_is_not_served_is_not_judged(self, tmp_path: Path) -> None:
        text = '[policy]\ncertificate_types = ["v2g_certificate"]'
        assert worst(capabilities.judge_certificate_types(chip(text=text, tmp_path=tmp_path, curves=[3]))) is OK

    @pytest.mark.parametrize("name", ANSWERS)
    def test_a_tpm_that_tells_nothing_keeps_no_judge_from_ending(self, name: str) -> None:
        seen = dataclasses.replace(chip(), probe=Probe(values={"open": None}), keys={"k": "v2g"})
        assert judged(name, seen) in {OK, FAILURE, NOT_CHECKED}

    @pytest.mark.parametrize(
        ("probe", "level", "words"),
        [
            (Probe(values={"open": None, "properties": {}}), OK, "answers"),
            (Probe(hung=True), FAILURE, "held by x"),
            (Probe(errors={"open": 0xA000A}), FAILURE, "cannot be reached"),
            (Probe(errors={"open": 0xA0015}), FAILURE, "libtss2-tcti-device"),
            (Probe(errors={"device": 16}), FAILURE, "another program"),
            (Probe(errors={"device": 13}), NOT_CHECKED, "run it as root"),
            (Probe(errors={"device": 6}), FAILURE, "ENXIO"),
            (Probe(said="ImportError: libtss2-esys.so.0"), FAILURE, "libtss2-esys.so.0"),
            (Probe(values={"open": None, "properties": {}}, hung=True), FAILURE, "and then no more"),
            (Probe(values={"open": None}, errors={"properties": 0xA000A}), FAILURE, "was lost"),
        ],
    )
    def test_why_it_cannot_be_reached(self, probe: Probe, level: Level, words: str) -> None:
        seen = dataclasses.replace(chip(tcti=BARE), probe=probe)
        finding = reachability.judge_reachable(seen, ["x"])
        assert finding.level is level
        assert words in said(finding)

    def test_lines_that_are_no_answers_are_passed_over(self) -> None:
        answer = Answer(
            0, 'noise\n{"part": "open", "value": 1}\n{"part": "x", "error": 5}\n{"part": "y", "fault": "E"}', ""
        )
        assert Probe.read(answer) == Probe(values={"open": 1}, errors={"x": 5})


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
    return dataclasses.replace(record, **changes)


class TestState:
    DIRECTORY = facts(path=Path("/s"), kind="directory", mode=0o700)

    @pytest.mark.parametrize(
        ("changes", "user", "level", "words"),
        [
            ({}, STATION, OK, ""),
            ({"uid": 0, "gid": 0}, STATION, FAILURE, "chown -R"),
            ({"mode": 0o755}, STATION, WARNING, "look into"),
            ({"mode": 0o777}, STATION, FAILURE, "others may write"),
            ({"mode": 0o500}, STATION, FAILURE, "may not write"),
            ({"kind": "file"}, STATION, FAILURE, "state_dir"),
            ({"kind": "unseen"}, STATION, NOT_CHECKED, ""),
            ({"kind": "missing"}, STATION, FAILURE, "may not make it"),
            ({"kind": "missing"}, ROOT, WARNING, "never run"),
        ],
    )
    def test_the_directory(self, changes: dict[str, Any], user: User, level: Level, words: str) -> None:
        seen = dataclasses.replace(self.DIRECTORY, **changes)
        nearest = facts(path=Path("/"), kind="directory", mode=0o755, uid=0, gid=0)
        found = directory.judge_directory(seen, user, nearest, None, False)
        assert worst(found) is level
        assert words in said(found)

    @pytest.mark.parametrize(
        ("changes", "level", "words"),
        [
            ({}, OK, ""),
            ({"uid": 0, "gid": 0}, FAILURE, "chown -R"),
            ({"mode": 0o644}, WARNING, "others may read"),
            ({"mode": 0o666}, FAILURE, "others may write"),
            ({"mode": 0o400}, FAILURE, "may not write its own"),
            ({"kind": "link"}, FAILURE, "symbolic links"),
        ],
    )
    def test_a_file_in_it(self, changes: dict[str, Any], level: Level, words: str) -> None:
        inside = [facts(path=Path("/s/lock")), facts(**{"path": Path("/s/ledger.sqlite3"), **changes})]
        found = list(directory.judge_files(inside, 990, STATION, None))
        assert worst(found) is level
        assert words in said(found)

    def test_what_the_daemon_says_of_the_directory_is_passed_on(self) -> None:
        refused = ConfigurationError("another's", reason="state_dir_foreign", hint="give it back")
        nearest = facts(path=Path("/"), kind="directory", mode=0o755, uid=0, gid=0)
        found = directory.judge_directory(self.DIRECTORY, ROOT, nearest, refused, False)
        assert (found.level, found.message, found.advice) == (FAILURE, refused.message, refused.hint)
        assert worst(directory.judge_files([], 990, STATION, refused)) is FAILURE
        assert directory.judge_directory(self.DIRECTORY, STATION, nearest, None, True).level is FAILURE

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
        assert running_daemon.config_of(words, variables) == named

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
        assert running_daemon.judge_settings(named, Path("/x"), file, 100.0).level is level

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
        assert disk.judge_room(disk.Room(path=Path("/"), octets=octets, files=files, needed=4 * 1024**2)).level is level

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
        mount = disk.Mount(point="/s", kind=kind, options=frozenset({"ro"} if read_only else ()))
        assert disk.judge_filesystem(Path("/s"), mount).level is level

    def test_the_last_of_the_longest_mount_points_counts(self, tmp_path: Path) -> None:
        lines = [
            "1 0 8:1 / / rw - ext4 /dev/a rw",
            f"2 1 0:2 / {tmp_path} rw - tmpfs none rw",
            f"3 1 0:3 / {tmp_path} rw - xfs /dev/b rw",
            f"4 1 0:4 / {tmp_path}x rw - nfs c rw",
            "nonsense",
        ]
        mount = disk.find_mount(lines, tmp_path)
        assert mount is not None
        assert mount.kind == "xfs"

    @pytest.mark.parametrize(
        ("changes", "level", "words"),
        [
            ({}, OK, "none needs attention"),
            ({"not_after": 1}, FAILURE, "1970-01-01"),
            ({"not_after": int(time.time()) + 5 * 86_400}, WARNING, "A03.FR.02"),
            ({"not_after": None}, OK, "not known"),
            ({"state": KeyState.COMPROMISED}, WARNING, "compromised"),
            ({"state": KeyState.PRE_ACTIVATION}, WARNING, "no key is active"),
            ({"state": KeyState.PRE_ACTIVATION, "failed": True}, WARNING, "stationkey keys history"),
            ({"state": KeyState.PRE_ACTIVATION, "created_at": 0}, WARNING, "days"),
            ({"due": -DAY - 1}, WARNING, "overdue"),
        ],
    )
    def test_keys_that_need_attention(self, changes: dict[str, Any], level: Level, words: str) -> None:
        found = records.judge_keys([key(**changes)], time.time(), 0, tuple(CertificateType))
        assert worst(found) is level
        assert words in said(found)


BROKER, TLS = Broker("b", 1883), Broker("b", 8883, tls=True)
NAMED = Visit(named=True, own=Rights(asks=False, answers=True), subscribed=True, josev=True, single=0.001, pair=0.002)


class TestBroker:
    @pytest.mark.parametrize(
        ("changes", "reach", "name", "level"),
        [
            ({}, None, "broker.own_rights", OK),
            ({"mqtt5": False}, None, "broker.version", WARNING),
            ({"mqtt5": False}, None, "broker.publish", NOT_CHECKED),
            ({"own": Rights(asks=False, answers=False)}, None, "broker.publish", FAILURE),
            ({"own": Rights(asks=True, answers=True)}, None, "broker.own_rights", FAILURE),
            ({"named": False}, None, "broker.anonymous", WARNING),
            ({"named": False}, "every machine", "broker.anonymous", FAILURE),
            ({"anonymous": Rights(asks=True)}, None, "broker.anonymous", FAILURE),
            ({"anonymous": Rights(listens=True)}, None, "broker.anonymous", FAILURE),
            ({"anonymous": Rights(asks=False)}, None, "broker.anonymous", OK),
            ({"anonymous": Rights(asks=False)}, "every machine", "broker.anonymous", WARNING),
            ({"anonymous_why": "it is gone"}, None, "broker.anonymous", NOT_CHECKED),
            ({"subscribed": False}, None, "broker.subscribe", FAILURE),
            ({"subscribed": None, "cut": "gone"}, None, "broker.subscribe", FAILURE),
            ({"josev": False}, None, "broker.josev", WARNING),
            ({"josev": None}, None, "broker.josev", NOT_CHECKED),
            ({"retained": ("josev/cs",)}, None, "broker.retained", WARNING),
            ({"pair": 0.041}, None, "broker.delay", WARNING),
            ({"single": 0.2, "pair": 0.201}, None, "broker.delay", OK),
        ],
    )
    def test_what_was_seen_at_the_broker(
        self, changes: dict[str, Any], reach: str | None, name: str, level: Level
    ) -> None:
        seen = dataclasses.replace(NAMED, **changes)
        check: Any = next(check for check in CHECKS["Broker"] if check.id == name)
        given = (seen, reach) if check.look is rights.look_at_reach else (seen,)
        assert worst(check.judge(*given)) is level

    def test_somebody_who_is_let_in_where_we_are_not_is_told(self) -> None:
        refused = Visit(refused=BrokerError("no", reason="broker_refuses"), named=True, anonymous=Rights(asks=True))
        assert rights.judge_login(BROKER, refused, False).stops
        assert rights.judge_anonymous(refused, None).level is FAILURE
        assert rights.judge_anonymous(dataclasses.replace(refused, anonymous=None), None).level is NOT_CHECKED

    @pytest.mark.parametrize(
        ("ends", "level"),
        [(timedelta(days=90), OK), (timedelta(days=10), WARNING)],
    )
    def test_the_end_of_the_broker_s_certificate(self, ends: timedelta, level: Level) -> None:
        now = datetime.now(UTC)
        text = (now + ends).strftime("%b %d %H:%M:%S %Y GMT")
        assert broker_reachability.judge_tls(TLS, "TLSv1.3", text, None, now).level is level

    @pytest.mark.parametrize(
        ("begins", "ends", "level"),
        [(-10, 90, OK), (-10, 10, WARNING), (-10, -1, FAILURE), (1, 90, FAILURE)],
    )
    def test_the_time_of_a_certificate(self, begins: int, ends: int, level: Level) -> None:
        now = datetime.now(UTC)
        dates = now + timedelta(days=begins), now + timedelta(days=ends)
        assert worst([*judge_dates("it", *dates, now), ok("")]) is level


class TestClockAndMachine:
    NOW = clock.WRITTEN + 86_400.0

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
        clocks = clock.Clocks(now=now, latest=latest, synchronised=True, battery=None)
        assert clock.judge_time(clocks).level is level

    @pytest.mark.parametrize(("battery", "level"), [(None, WARNING), (NOW, OK), (0.0, WARNING)])
    def test_the_battery(self, battery: float | None, level: Level) -> None:
        clocks = clock.Clocks(now=self.NOW, latest=None, synchronised=True, battery=battery)
        assert clock.judge_battery(clocks).level is level

    @pytest.mark.parametrize(
        ("me", "user", "tss", "level"),
        [
            (ROOT, STATION, (109, frozenset[str]()), OK),
            (STATION, STATION, (109, frozenset[str]()), OK),
            (STRANGER, STATION, None, WARNING),
            (ROOT, ROOT, None, WARNING),
            (ROOT, STRANGER, (109, frozenset[str]()), WARNING),
        ],
    )
    def test_users(self, me: User, user: User, tss: tuple[int, frozenset[str]] | None, level: Level) -> None:
        daemon = Daemon(running=False, pid=None, user=user, known_by="so")
        assert machine.judge_user(me, daemon, tss).level is level

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
        unit, daemon = Unit(properties=properties), Daemon(running=False, pid=None, user=STATION, known_by="so")
        assert machine.judge_unit(unit, daemon).level is level

    @pytest.mark.parametrize(
        ("properties", "level", "words"),
        [
            ({}, OK, ""),
            ({"DevicePolicy": "closed", "DeviceAllow": "/dev/null r /dev/tpmrm0 rw"}, OK, ""),
            ({"DevicePolicy": "closed", "DeviceAllow": "char-tpmrm rw"}, OK, ""),
            ({"DevicePolicy": "closed", "DeviceAllow": "/dev/tpm0 rw"}, FAILURE, "DeviceAllow=/dev/tpmrm0"),
            ({"PrivateDevices": "yes"}, FAILURE, "hides"),
            ({"ProtectSystem": "strict", "StateDirectory": "stationkey"}, OK, ""),
            ({"ProtectSystem": "strict", "ReadWritePaths": "/srv /var/lib"}, OK, ""),
            ({"ProtectSystem": "strict", "StateDirectory": "other"}, FAILURE, "ReadWritePaths"),
            ({"PrivateNetwork": "yes"}, FAILURE, "without a network"),
            ({"IPAddressDeny": "0.0.0.0/0 ::/0", "IPAddressAllow": "127.0.0.0/8"}, FAILURE, "IPAddressAllow=192.0.2.7"),
            ({"IPAddressDeny": "0.0.0.0/0 ::/0", "IPAddressAllow": "127.0.0.0/8 192.0.2.0/24"}, OK, ""),
            ({"IPAddressDeny": "198.51.100.0/24"}, OK, ""),
        ],
    )
    def test_what_the_unit_takes_from_the_daemon(self, properties: dict[str, str], level: Level, words: str) -> None:
        unit = Unit(properties={"LoadState": "loaded", **properties})
        finding = machine.judge_sandbox(unit, "/dev/tpmrm0", "/var/lib/stationkey", ("192.0.2.7",))
        assert finding.level is level
        assert words in said(finding)

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
        assert machine.judge_core_dumps(pattern, limits, None).level is level

    @pytest.mark.parametrize(
        ("text", "level"),
        [("MemAvailable:   1000000 kB\n", OK), ("MemAvailable:   1000 kB\n", WARNING), ("", NOT_CHECKED)],
    )
    def test_memory(self, text: str, level: Level) -> None:
        assert machine.judge_memory(text).level is level

    @pytest.mark.parametrize(
        ("seen", "level"),
        [
            (software.OpenSsl(version="3.0.2", modules="/m", provider=True, loads=True), OK),
            (software.OpenSsl(version="3.0.2", modules="/m", provider=True, complaint="no symbol"), WARNING),
            (software.OpenSsl(version="3.0.2", modules="/m"), WARNING),
            (software.OpenSsl(version="1.1.1"), WARNING),
            (software.OpenSsl(), WARNING),
        ],
    )
    def test_openssl(self, seen: software.OpenSsl, level: Level) -> None:
        assert software.judge_openssl(seen).level is level

    def test_versions(self) -> None:
        assert software.judge_tss((3, 2, 1), ("device", True)).level is OK
        assert software.judge_tss((3, 2, 1), ("device", False)).level is FAILURE
        assert software.judge_tss((2, 4, 0), None).level is WARNING
        assert software.judge_tss(None, None).level is FAILURE
