"""The benchmark itself, and what the page says of its last whole run. No time is asserted here."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from math import inf
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from peers import Mosquitto, Swtpm

from bench import ROOT
from bench.__main__ import PAGE, PLOT, RESULTS
from bench.history import fill
from bench.machine import describe
from bench.measure import GROUPS, Measured, take_rounds
from bench.plot import draw
from bench.report import MET, MISSED, NOT_RUN, SHOWN, TABLES, Results, fill_in, verdict
from bench.rows import EXTRA, FLOOR, KINDS, OURS, ROWS, SIDES, How, Row, Series
from bench.sides import KIND, POOL_SIZE, Unavailable, composite
from bench.summary import Summary, percentile, summarize
from parts import Clocks, sqlite_of, station
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.ledger import Ledger

KEPT = msgspec.json.decode(RESULTS.read_bytes(), type=Results)


def summary(median: float) -> Summary:
    return Summary(count=5, median=median, p10=median / 2, p90=median * 2, p99=median * 3)


def results(**medians: float) -> Results:
    """Of a group ``g``, with a median for each side."""
    series = {"g": {side: summary(median) for side, median in medians.items()}}
    return Results(quick=False, machine={}, series=series, missing={}, faults={})


def row(how: How, limit: float) -> Row:
    return Row("name", "what", Series("g", "ours"), Series("g", "other"), how, limit)


TARGETS = {
    "request-loop-p256": 1.25,
    "request-loop-p521": 1.1,
    "pool-loop-p256": 1.4,
    "pool-loop-p521": 1.15,
    "processor-p256": 1.5,
    "request-p256": 1.5,
    "request-p521": 1.2,
    "pool-p256": 1.0,
    "pool-p521": 0.6,
    "pool-rsa3072": 0.04,
    "openssl-p256": 3,
    "openssl-p521": 2,
    "openssl-rsa3072": 20,
    "sustained-p256": 0.75,
    "sustained-p521": 0.9,
    "ledger": 1.1,
    "sweep": 1.3,
    "start": 1.3,
    "memory-idle": 40,
    "memory-growth": 2,
    "slow-request": inf,
    "slow-start": inf,
    "idle-wake-ups": 2,
    "idle-bytes": 0,
    "disk-request": 8,
    "disk-syncs": 1,
    "disk-ending": inf,
    "list-time": 3,
    "list-memory": 80,
    "json-time": 3,
    "json-memory": 80,
    "site": inf,
    "site-three": inf,
    "keys-list": 3,
    "schema": 3,
}
"""What is promised. Written out a second time, so that no target is softened in passing."""


class TestRows:
    def test_every_target_has_its_benchmark(self) -> None:
        assert {row.name: row.limit for row in ROWS} == TARGETS

    def test_each_name_is_there_once(self) -> None:
        assert len({row.name for row in ROWS}) == len(ROWS)

    def test_every_series_that_is_wanted_can_be_measured(self) -> None:
        assert {series.group for row in ROWS for series in row.needs} | {one.group for one in EXTRA} == set(GROUPS)

    def test_there_is_a_pool_for_every_kind_of_key(self) -> None:
        assert set(POOL_SIZE) == set(KINDS)

    @pytest.mark.parametrize(
        ("how", "limit", "ours", "other", "ratio", "met"),
        [
            pytest.param(How.OVER, 1.5, 3.0, 2.0, 1.5, True, id="as-much-over-as-may-be"),
            pytest.param(How.OVER, 1.5, 3.2, 2.0, 1.6, False, id="too-much-over"),
            pytest.param(How.RATE, 0.75, 75.0, 100.0, 0.75, True, id="as-low-a-rate-as-may-be"),
            pytest.param(How.RATE, 0.75, 70.0, 100.0, 0.7, False, id="too-low-a-rate"),
            pytest.param(How.FASTER, 4, 2.0, 8.0, 4.0, True, id="just-so-many-times-faster"),
            pytest.param(How.FASTER, 4, 4.0, 8.0, 2.0, False, id="too-few-times-faster"),
            pytest.param(How.VALUE, 48, 47.9, None, 47.9, True, id="little-enough"),
            pytest.param(How.VALUE, 48, 48.1, None, 48.1, False, id="too-much"),
            pytest.param(How.SHOWN, inf, 48.1, None, 48.1, True, id="no-target"),
        ],
    )
    def test_a_target_is_met_or_not(
        self, how: How, limit: float, ours: float, other: float | None, ratio: float, met: bool
    ) -> None:
        one = row(how, limit)
        assert one.ratio(ours, other) == pytest.approx(ratio)
        assert one.met(one.ratio(ours, other)) is met


class TestVerdict:
    def test_what_is_met_is_said(self) -> None:
        assert verdict(row(How.OVER, 1.5), results(ours=1.2, other=1.0)).met == MET

    def test_what_is_missed_is_said(self) -> None:
        one = verdict(row(How.OVER, 1.5), results(ours=2.0, other=1.0))
        assert (one.met, one.ratio, one.target) == (MISSED, "2.00", "≤ 1.5")

    def test_what_has_no_target_is_shown(self) -> None:
        one = verdict(row(How.SHOWN, inf), results(ours=2.0, other=1.0))
        assert (one.met, one.target) == (SHOWN, "")

    @pytest.mark.parametrize("side", ["ours", "other"])
    def test_without_one_of_the_two_there_is_no_verdict(self, side: str) -> None:
        one = verdict(row(How.OVER, 1.5), results(**{side: 1.0}))
        assert (one.met, one.ratio) == (NOT_RUN, "")

    def test_a_fault_outweighs_the_time(self) -> None:
        found = msgspec.structs.replace(results(ours=1.0, other=1.0), faults={"g": {"ours": "imports cryptography"}})
        assert verdict(row(How.OVER, 1.5), found).met == f"{MISSED}: imports cryptography"


class TestSummary:
    @pytest.mark.parametrize(
        ("percent", "value"),
        [
            pytest.param(1, 1, id="p1"),
            pytest.param(10, 10, id="p10"),
            pytest.param(50, 50, id="p50"),
            pytest.param(99, 99, id="p99"),
            pytest.param(99.5, 100, id="between-two"),
            pytest.param(100, 100, id="p100"),
        ],
    )
    def test_a_percentile_of_the_first_hundred_numbers_is_its_own_number(self, percent: float, value: int) -> None:
        assert percentile([float(number) for number in range(100, 0, -1)], percent) == value

    def test_a_p99_of_few_is_the_largest(self) -> None:
        assert percentile([3.0, 1.0, 2.0], 99) == 3.0

    def test_of_nothing_there_is_no_percentile(self) -> None:
        with pytest.raises(ValueError, match="samples"):  # words: what there is none of
            percentile([], 50)

    def test_a_summary_has_the_median_whatever_the_order(self) -> None:
        assert summarize([9.0, 1.0, 4.0, 2.0]) == Summary(count=4, median=3.0, p10=1.0, p90=9.0, p99=9.0)

    def test_a_summary_keeps_four_digits(self) -> None:
        assert summarize([1.23456]).median == 1.235


class TestMeasured:
    def test_a_side_that_fails_has_no_samples_and_a_reason(self) -> None:
        acts: Iterator[float | Unavailable] = iter([1.0, Unavailable("it is gone"), 3.0])

        def act() -> float:
            came = next(acts)
            if isinstance(came, Unavailable):
                raise came
            return came

        measured = Measured()
        for _ in range(3):
            measured.take("side", act)
        assert (measured.samples, measured.missing) == ({}, {"side": "it is gone"})


class TestSlowPhase:
    """A round in which the TPM alone takes twice as long as in the best one is taken again."""

    @staticmethod
    def taken(floors: list[float], count: int, *, rate: bool = False, steady: bool = True) -> Measured:
        measured, left = Measured(), iter(floors)

        def once(taken: Measured) -> None:
            floor = next(left)
            taken.samples |= {FLOOR: [floor], OURS: [floor * 2]}

        take_rounds(count, once, measured, rate=rate, steady=steady)
        return measured

    def test_a_slow_round_is_replaced_also_where_it_was_the_first(self) -> None:
        measured = self.taken([2.1, 1.0, 2.0, 3.0, 1.5], 3)
        assert measured.samples == {FLOOR: [1.0, 2.0, 1.5], OURS: [2.0, 4.0, 3.0]}
        assert measured.slow == 2

    def test_a_machine_that_stays_slow_is_not_waited_for(self) -> None:
        measured = self.taken([1.0, 9.0, 9.0, 9.0, 9.0, 9.0], 3)
        assert (measured.samples[FLOOR], measured.slow) == ([1.0], 5)

    def test_of_a_rate_half_is_slow(self) -> None:
        assert self.taken([40.0, 100.0, 60.0], 2, rate=True).samples[FLOOR] == [100.0, 60.0]

    def test_where_the_tpm_varies_by_itself_every_round_counts(self) -> None:
        assert self.taken([1.0, 9.0], 2, steady=False).samples[FLOOR] == [1.0, 9.0]


@pytest.mark.parametrize("ahead", [False, True], ids=["new-keys", "made-ahead"])
def test_the_composite_floor_keeps_the_promise(tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, ahead: bool) -> None:
    """What it is measured by is a CSR that verifies, on disk before it was sent."""
    with closing(Tpm2KeyStore(swtpm.tcti)) as store:
        assert store.description  # makes the storage root key
    with composite(tmp_path, mosquitto, swtpm, "loop", ahead=ahead) as one:
        for kind in ("P-256", "P-521", "P-256"):
            assert one.asker.act(KIND[kind])() > 0
    with closing(sqlite3.connect(tmp_path / "loop/answers.sqlite3")) as database:
        rows = database.execute("SELECT csr, public FROM answer").fetchall()
    found = [(x509.load_pem_x509_csr(csr.encode()), public) for csr, public in rows]
    assert all(csr.is_signature_valid for csr, _ in found)
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert [csr.public_key().public_bytes(*spki) for csr, _ in found] == [public for _, public in found]
    assert len({public for _, public in found}) == (2 if ahead else 3)


async def test_a_filled_ledger_has_as_many_keys_and_every_one_whole(tmp_path: Path) -> None:
    async with station(tmp_path / "state", clocks=Clocks()) as made:
        key_id = await made.key()
    fill(sqlite_of(made.ledger).path, key_id, 50)
    with closing(Ledger(sqlite_of(made.ledger).path)) as ledger:
        found = ledger.keys.usable()
        assert len({key.key_id for key in found}) == len({key.public for key in found}) == 50
        assert len({key.request_ids for key in found}) == 50
        assert all(ledger.answers.find(key.request_ids[0]) is not None for key in found)
        assert all([event.event for event in ledger.keys.history(key.key_id)] == ["CSR answered"] for key in found)
    with closing(sqlite3.connect(sqlite_of(made.ledger).path)) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


class TestPage:
    def test_it_shows_what_the_results_say(self) -> None:
        page = PAGE.read_text()
        assert fill_in(page, KEPT) == page

    def test_the_plot_is_that_of_the_results(self) -> None:
        assert PLOT.read_text() == draw(KEPT)

    def test_the_results_are_those_of_a_whole_run(self) -> None:
        assert not KEPT.quick
        assert set(KEPT.series) == set(GROUPS)

    def test_its_tables_have_every_row_and_every_side(self) -> None:
        page = PAGE.read_text()
        assert [row.name for row in ROWS if f"| {row.what} |" not in page] == []
        assert [(kind, side) for kind in KINDS for side in SIDES if f"| {kind} | {side} |" not in page] == []

    @pytest.mark.parametrize("name", TABLES)
    def test_a_marker_that_is_missing_is_told(self, name: str) -> None:
        with pytest.raises(ValueError, match=name):  # words: which marker
            fill_in(PAGE.read_text().replace(f"<!-- end of {name} -->", ""), KEPT)

    def test_filling_in_twice_changes_nothing_more(self) -> None:
        other = msgspec.structs.replace(KEPT, series={})
        once = fill_in(PAGE.read_text(), other)
        assert once != PAGE.read_text()
        assert fill_in(once, other) == once


class TestPlot:
    @pytest.mark.parametrize(
        "shown",
        [
            pytest.param(KEPT, id="the-last-run"),
            pytest.param(msgspec.structs.replace(KEPT, series={}), id="nothing-run"),
        ],
    )
    def test_it_is_well_formed_and_within_its_frame(self, shown: Results) -> None:
        picture = ET.fromstring(draw(shown))
        width, height = (float(picture.get(name, "0")) for name in ("width", "height"))
        for element in picture:
            for name, value in element.items():
                if re.fullmatch(r"c?[xy][12]?", name):
                    assert 0 <= float(value) <= (width if "x" in name else height)

    def test_it_has_every_side_by_name_on_a_ground_of_its_own(self) -> None:
        picture = ET.fromstring(draw(KEPT))
        words = [element.text for element in picture if element.tag.endswith("text")]
        assert set(SIDES) | set(KINDS) <= set(words)
        ground = next(element for element in picture if element.tag.endswith("rect"))
        assert (ground.get("width"), ground.get("fill")) == (picture.get("width"), "#ffffff")


def test_the_machine_is_named_by_its_properties_alone() -> None:
    """Neither host, nor user, nor a place on it."""
    assert set(KEPT.machine) == set(describe(ROOT))
    assert [value for value in KEPT.machine.values() if value.startswith("/")] == []


def test_the_command_names_its_benchmarks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [row.name for row in ROWS]
