"""The table of checks, the report and the runner."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
from doctor_reasons import LEVELS, reasons_of
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # ships none
from judging import FAILURE, NOT_CHECKED, OK

from stationkey.config.options import options_of
from stationkey.config.settings import Settings
from stationkey.doctor.examination import AREAS, CHECKS
from stationkey.doctor.report import Finding, Level, Report, failure, ok, printable
from stationkey.doctor.runner import DEADLINE, AnyCheck, Check, ask, run

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/doctor.md").read_text()
CODE = "".join(path.read_text() for path in sorted((ROOT / "src/stationkey/doctor").rglob("*.py")))


class TestReport:
    def test_the_document_has_every_check_and_no_other(self) -> None:
        listed: dict[str, str] = {}
        for part in re.split(r"^### ", DOCUMENT, flags=re.MULTILINE)[1:]:
            area, _, rows = part.partition("\n")
            listed |= dict.fromkeys(re.findall(r"^\| `([a-z_.]+)` \|", rows, re.MULTILINE), area)
        assert list(listed.items()) == list(AREAS.items())

    @pytest.mark.parametrize("check", [check for rows in CHECKS.values() for check in rows], ids=lambda check: check.id)
    def test_the_document_has_every_reason_of_a_check_and_no_other(self, check: AnyCheck) -> None:
        (row,) = re.findall(rf"^\| `{re.escape(check.id)}` \| .*? \| ?(.*?) \| ?(.*?) \|$", DOCUMENT, re.MULTILINE)
        listed = [re.search(r"\(((?:`\w+`(?:, )?)+)\)$", cell) for cell in row]
        found = [set(re.findall(r"\w+", cell[1])) if cell else set[str]() for cell in listed]
        assert dict(zip(LEVELS, found, strict=True)) == reasons_of(check)

    def test_advice_names_what_is_installed(self) -> None:
        """By ``scripts/installed_docs.py``."""
        named = set(re.findall(r"/usr/share/doc/stationkey/([\w./-]*\w)", CODE))
        assert named
        assert all((ROOT / re.sub("^examples/", "packaging/", path)).exists() for path in named)
        assert re.findall(r"[\" (](?:packaging/|README|make (?:setup|deb|demo)|pip install)", CODE) == []

    @pytest.mark.parametrize("command", ["chown -R", "chmod -R", "rm -", "tpm2_clear", "systemctl mask", "kill -9"])
    def test_no_advice_harms_a_daemon_at_work_or_its_keys(self, command: str) -> None:
        assert command not in CODE

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
        report = Report(
            (Finding(OK, "ok", "there", id="tpm.srk"), Finding(FAILURE, "locked", "yes", "wait", id="tpm.lockout"))
        )
        Draft202012Validator(json.loads(schema)).validate(report.to_json())
        assert report.exit_code == 1
        assert report.summary == "1 failure, 0 warnings, 1 ok"

    def test_the_deadline_of_all_checks_is_below_ten_seconds(self) -> None:
        assert DEADLINE < 10

    @pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\u202eevil", "\udcff", "\x00"])
    def test_what_is_said_is_printable(self, text: str) -> None:
        assert printable(text).isprintable()
        assert Finding(OK, "ok", text, text).message.isprintable()

    def test_what_is_said_is_of_bounded_length(self) -> None:
        assert len(printable("x" * 10_000)) < 1000


def well(_: str) -> Finding:
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
        both = threading.Barrier(2, timeout=30)

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
            (failure("broken", "it is broken", "mend it"), NOT_CHECKED),
            (failure("weak", "it is weak", "mend it", stops=False), OK),
        ],
    )
    def test_what_depends_on_a_check_that_stops_is_not_checked_because_of_it(
        self, before: Finding, level: Level
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
        answer = ask(["sh", "-c", "cat; exec sleep 60"], seconds=0.2, given="begun")
        assert answer == (None, "begun")
        assert time.monotonic() - began < 30

    def test_a_program_that_is_not_there_is_no_fault(self) -> None:
        assert ask(["/no/such/program"], seconds=1)[0] == -1
