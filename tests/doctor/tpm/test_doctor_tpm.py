"""What the doctor says of a TPM, as tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from judging import (
    FAILURE,
    NOT_CHECKED,
    OK,
    STATION,
    STRANGER,
    WARNING,
    facts,
    judge,
    look_of,
    reasons,
    settings,
    worst,
)

from stationkey.contract.profiles import Algorithm
from stationkey.doctor.host.files import User
from stationkey.doctor.probes import Answers
from stationkey.doctor.report import Finding, Level
from stationkey.doctor.tpm.device import Chip
from stationkey.doctor.tpm.facts import Seen, Way
from stationkey.doctor.tpm.state import CHECKS


class TestDevice:
    WAY = Way.parse("device:/dev/tpmrm0")
    TPM = facts(path=Path("/dev/tpmrm0"), kind="character device", mode=0o660, uid=109, gid=109)

    @pytest.mark.parametrize(
        ("changes", "chip", "user", "level", "expected"),
        [
            ({}, Chip(known=True, major="2"), STATION, OK, set()),
            ({}, Chip(known=True, major="2"), STRANGER, FAILURE, {"no_rights"}),
            ({}, Chip(known=True, major="1"), STATION, FAILURE, {"tpm_1"}),
            ({"mode": 0o666}, Chip(known=True), STATION, WARNING, {"open"}),
            ({"mode": 0o600, "uid": 0, "gid": 0}, Chip(known=True), STATION, FAILURE, {"no_udev"}),
            ({"kind": "file"}, Chip(known=True, is_tpm=False), STATION, FAILURE, {"not_a_tpm"}),
            ({"kind": "missing"}, Chip(known=False), STATION, FAILURE, {"no_tpm"}),
            ({"kind": "missing"}, Chip(known=True, devices=("/dev/tpm0",)), STATION, FAILURE, {"missing"}),
        ],
    )
    def test_the_device_file(
        self, changes: dict[str, Any], chip: Chip, user: User, level: Level, expected: set[str]
    ) -> None:
        found = judge("tpm.device", self.WAY, dataclasses.replace(self.TPM, **changes), chip, user)
        assert worst(found) is level
        assert reasons(found) == expected

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
        assert worst(judge("tpm.manager", Way.parse(tcti))) is (OK if managed else WARNING)


TOLD = [check.id for check in CHECKS]

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


GOOD_SRK = {"attributes": 0x30472, "unlike_srk": ""}


VALUES: dict[Any, Any] = {
    "open": None,
    "test_result": 0,
    "loaded_sessions": [],
    "transient": [],
    "persistent": [0x81000001],
    "algorithms": [1, 4, 6, 0x0B, 0x0C, 0x0D, 0x14, 0x18, 0x23, 0x43],
    "curves": [3, 4, 5],
    "supported": dict.fromkeys(Algorithm, ""),
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
    answers = VALUES | {"properties": merged} | values
    lost = errors or {}
    told = {part: value for part, value in answers.items() if part not in lost}
    return Seen(
        way=Way.parse(tcti),
        settings=settings(text, tmp_path),
        keys=keys or {},
        answers=Answers(values=told, errors=lost),
    )


def judged(name: str, seen: Seen) -> list[Finding]:
    """What a check of the TPM's answers says."""
    there = seen.told(*look_of(name).wanted)
    return [there] if isinstance(there, Finding) else judge(name, *there)


NO_P521 = VALUES["supported"] | {Algorithm.ECDSA_SHA512: "no P-521"}
NO_P256 = VALUES["supported"] | {Algorithm.ECDSA_SHA256: "no P-256"}


BARE = "device:/dev/tpm0"


SWTPM = {0x105: int.from_bytes(b"IBM\0", "big"), 0x106: int.from_bytes(b"SW  ", "big")}


ST = int.from_bytes(b"STM ", "big")


class TestTpm:
    def test_a_good_chip_has_no_complaint(self) -> None:
        for name in TOLD:
            assert worst(judged(name, chip())) is OK, name

    @pytest.mark.parametrize(
        ("check", "seen", "level", "expected"),
        [
            pytest.param("started", chip(errors={"properties": 0x100}), WARNING, {"not_started"}, id="not started"),
            pytest.param("self_test", chip(test_result=0x101), FAILURE, {"failure_mode"}, id="failure mode"),
            pytest.param("self_test", chip(errors={"properties": 0x101}), FAILURE, {"failure_mode"}, id="refuses all"),
            pytest.param("self_test", chip(test_result=0x153), OK, set(), id="not tested yet"),
            pytest.param("self_test", chip(test_result=0x12F), FAILURE, {"test_result"}, id="a bad result"),
            pytest.param("version", chip(properties={0x100: 0x312E3200}), FAILURE, {"not_tpm_2"}, id="TPM 1.2"),
            pytest.param("firmware", chip(properties={0x10B: 7 << 16 | 61}), FAILURE, {"weak"}, id="ROCA, the last"),
            pytest.param("firmware", chip(properties={0x10B: 7 << 16 | 62}), OK, set(), id="ROCA, mended"),
            pytest.param("firmware", chip(properties={0x10B: 5 << 16}), FAILURE, {"weak"}, id="ROCA, the first"),
            pytest.param(
                "firmware", chip(properties={0x105: ST, 0x10B: 73 << 16 | 4}), FAILURE, {"weak"}, id="TPM-Fail"
            ),
            pytest.param(
                "firmware", chip(properties={0x105: ST, 0x10B: 73 << 16 | 20}), OK, set(), id="TPM-Fail, mended"
            ),
            pytest.param("firmware", chip(properties={0x105: ST, 0x10B: 7 << 16 | 61}), OK, set(), id="another maker"),
            pytest.param("firmware", chip(properties={0x106: 0x1B5B324A}), OK, set(), id="a hostile name"),
            pytest.param("simulated", chip(properties=SWTPM), WARNING, {"simulated"}, id="simulated, behind a device"),
            pytest.param(
                "simulated", chip(tcti="swtpm:port=1"), WARNING, {"simulated"}, id="simulated, by the way there"
            ),
            pytest.param("certificate_types", chip(supported=NO_P521), WARNING, {"not_possible"}, id="no P-521"),
            pytest.param(
                "certificate_types",
                chip(algorithms=[], supported=dict.fromkeys(Algorithm, "all")),
                FAILURE,
                {"no_storage", "not_possible", "none_possible"},
                id="nothing",
            ),
            pytest.param(
                "certificate_types",
                chip(curves=[5], supported=NO_P256),
                FAILURE,
                {"no_storage", "not_preferred"},
                id="no P-256",
            ),
            pytest.param("hierarchies", chip(properties={0x201: 0xD}), FAILURE, {"no_storage"}, id="no storage"),
            pytest.param(
                "hierarchies", chip(properties={0x201: 0xB}), WARNING, {"no_endorsement"}, id="no endorsement"
            ),
            pytest.param("srk", chip(srk=None), OK, set(), id="none yet"),
            pytest.param(
                "srk", chip(srk=None, properties={0x200: 1}), FAILURE, {"owner_auth"}, id="none, owner's password"
            ),
            pytest.param("srk", chip(srk=None, properties={0x209: 0}), FAILURE, {"no_room"}, id="none, and no room"),
            pytest.param("srk", chip(srk=None, keys={"k": "v2g"}), FAILURE, {"cleared"}, id="none, and active keys"),
            pytest.param("srk", chip(srk=GOOD_SRK | {"unlike_srk": "RSA"}), FAILURE, {"another_key"}, id="another key"),
            pytest.param("srk", chip(srk=GOOD_SRK | {"attributes": 0x30072}), WARNING, {"no_noda"}, id="without noda"),
            pytest.param("authorisation", chip(properties={0x200: 7}), WARNING, {"not_named"}, id="passwords"),
            pytest.param("authorisation", chip(properties={0x200: 4}), OK, set(), id="lockout's"),
            pytest.param("authorisation", chip(properties={0x200: 0}), WARNING, {"clear_open"}, id="open to clearing"),
            pytest.param("authorisation", chip(properties={0x200: 1 << 8}), OK, set(), id="clearing disabled"),
            pytest.param("lockout", chip(properties={0x200: 1 << 9}), FAILURE, {"locked"}, id="in lockout"),
            pytest.param(
                "lockout",
                chip(properties={0x200: 1 << 9}, srk=GOOD_SRK | {"attributes": 0x30072}),
                FAILURE,
                {"locked_srk"},
                id="in lockout, and the storage root key with it",
            ),
            pytest.param("lockout", chip(properties={0x20E: 3}), WARNING, {"tries"}, id="tries used up"),
            pytest.param("lockout", chip(properties={0x20F: 0}), WARNING, {"no_try"}, id="no try allowed"),
            pytest.param(
                "slots", chip(tcti=BARE, transient=[1, 2, 3], properties={0x207: 0}), WARNING, {"full"}, id="full"
            ),
            pytest.param("slots", chip(tcti=BARE, transient=[1]), WARNING, {"strays"}, id="strays"),
            pytest.param("slots", chip(tcti=BARE, properties={0x207: 1}), FAILURE, {"no_room"}, id="no room"),
            pytest.param("slots", chip(properties={0x207: 0}), OK, set(), id="a resource manager makes room"),
            pytest.param("sessions", chip(properties={0x206: 0}), WARNING, {"no_room"}, id="no sessions"),
            pytest.param("sessions", chip(tcti=BARE, loaded_sessions=[1]), WARNING, {"strays"}, id="stray sessions"),
            pytest.param("keys", chip(keys={"k": "v2g"}, srk=None), FAILURE, {"no_srk"}, id="no root for a key"),
        ],
    )
    def test_each_state_is_told(self, check: str, seen: Seen, level: Level, expected: set[str]) -> None:
        found = judged(f"tpm.{check}", seen)
        assert worst(found) is level
        assert reasons(found) == expected

    @pytest.mark.parametrize(
        ("code", "level", "expected"),
        [
            (0, OK, set()),
            (0x1DF, FAILURE, {"another_tpm"}),
            (0xB0000 | 0x1DF, FAILURE, {"another_tpm"}),
            (0x902, NOT_CHECKED, {"unknown"}),
            (-1, FAILURE, {"damaged"}),
            (0x98E, FAILURE, {"refused"}),
        ],
    )
    def test_what_becomes_of_a_key_that_is_tried(self, code: int, level: Level, expected: set[str]) -> None:
        seen = chip()
        seen = dataclasses.replace(
            seen, answers=Answers(values=seen.answers.values | {"keys": {"k": code}}), keys={"k": "v2g"}
        )
        found = judged("tpm.keys", seen)
        assert worst(found) is level
        assert reasons(found) == expected

    @pytest.mark.parametrize(
        ("text", "level"),
        [
            ("[tpm]\npcrs = [0, 7]", WARNING),
            ('[tpm]\npcrs = [0, 7]\npcr_bank = "sha512"', FAILURE),
            ("", OK),
        ],
    )
    def test_registers_that_keys_are_bound_to(self, tmp_path: Path, text: str, level: Level) -> None:
        assert worst(judged("tpm.pcrs", chip(text=text, tmp_path=tmp_path))) is level

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
        assert worst(judged("tpm.attestation_key", seen)) is level

    def test_keys_are_not_tried_in_a_bare_tpm_that_the_daemon_works_with(self) -> None:
        busy = dataclasses.replace(chip(tcti=BARE, keys={"k": "v2g"}), daemon_running=True)
        assert worst(judged("tpm.keys", busy)) is NOT_CHECKED
        cleared = dataclasses.replace(chip(tcti=BARE, keys={"k": "v2g"}, srk=None), daemon_running=True)
        assert worst(judged("tpm.keys", cleared)) is worst(judged("tpm.srk", cleared)) is FAILURE

    def test_a_certificate_type_that_is_not_served_is_not_judged(self, tmp_path: Path) -> None:
        text = '[policy]\ncertificate_types = ["v2g_certificate"]'
        assert worst(judged("tpm.certificate_types", chip(text=text, tmp_path=tmp_path, supported=NO_P521))) is OK

    @pytest.mark.parametrize("name", TOLD)
    def test_a_tpm_that_tells_nothing_keeps_no_judge_from_ending(self, name: str) -> None:
        seen = dataclasses.replace(chip(), answers=Answers(values={"open": None}), keys={"k": "v2g"})
        assert worst(judged(name, seen)) in {OK, FAILURE, NOT_CHECKED}

    @pytest.mark.parametrize(
        ("answers", "level", "expected"),
        [
            ({"values": {"open": None, "properties": {}}}, OK, set()),
            ({"hung": True}, FAILURE, {"silent"}),
            ({"errors": {"open": 0xA000A}}, FAILURE, {"unreachable"}),
            ({"errors": {"open": 0xA0015}}, FAILURE, {"tcti"}),
            ({"errors": {"device": 16}}, FAILURE, {"busy"}),
            ({"errors": {"device": 13}}, NOT_CHECKED, {"hidden"}),
            ({"errors": {"device": 6}}, FAILURE, {"not_opened"}),
            ({"said": "ImportError: libtss2-esys.so.0"}, FAILURE, {"no_tss"}),
            ({"values": {"open": None, "properties": {}}, "hung": True}, FAILURE, {"hung"}),
            ({"values": {"open": None}, "errors": {"properties": 0xA000A}}, FAILURE, {"lost"}),
        ],
    )
    def test_why_it_cannot_be_reached(self, answers: dict[str, Any], level: Level, expected: set[str]) -> None:
        seen = dataclasses.replace(chip(tcti=BARE), answers=Answers(**answers))
        finding = judge("tpm.reachable", seen, ["x"])
        assert worst(finding) is level
        assert reasons(finding) == expected

    def test_lines_that_are_no_answers_are_passed_over(self) -> None:
        printed = 'noise\n{"part": "open", "value": 1}\n{"part": "x", "error": 5}\n{"part": "y", "fault": "E"}\n[1]\n'
        seen = Answers.read(0, printed)
        assert (seen.values, seen.errors, seen.hung) == ({"open": 1}, {"x": 5}, False)
