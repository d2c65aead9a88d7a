"""The renewal watch: what is due, and how often that is told, whatever the clock says."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from parts import E1, NOW, V2G, Authority, Station, pem, sqlite_of, station
from stationkey.config.settings import DAY, RenewalTerms
from stationkey.errors import LedgerError
from stationkey.ledger.hints import Hint
from stationkey.service.renewal import HINTS_AT_ONCE, LONGEST, DueCertificate, RenewalWatch, next_hint
from stationkey.x509.renewal import CLOCK_MARGIN, Due, RenewalRule

RULE: Final = RenewalRule(before=30 * 86_400, life_divisor=3)
START: Final = int(NOW.timestamp())
AUTHORITY: Final = Authority()


@pytest.mark.parametrize(
    ("life", "lead"),
    [
        pytest.param(365, 30, id="a-year"),
        pytest.param(90, 30, id="just-three-months"),
        pytest.param(60, 20, id="a-third-of-a-shorter-life"),
        pytest.param(0, 0, id="no-life"),
    ],
)
def test_a_certificate_is_due_30_days_before_its_end_or_for_the_last_third_of_its_life(life: int, lead: int) -> None:
    end = START + life * 86_400
    due = end - lead * 86_400
    assert RULE.due_at(START, end) == due
    assert RULE.judge(START, end, due) is (Due.DUE if lead else Due.EXPIRED)
    assert RULE.judge(START, end, due - 1) is Due.NO
    assert RULE.judge(START, end, end) is Due.EXPIRED


def test_a_clock_before_the_start_of_a_certificate_says_nothing_of_it() -> None:
    end = START + 86_400 * 365
    assert RULE.judge(START, end, 0) is Due.UNKNOWN
    assert RULE.judge(START, end, START - CLOCK_MARGIN) is Due.NO
    assert RULE.judge(None, end, 0) is Due.NO


class _Hints(logging.Handler):
    """Keeps the hints that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[str, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "hint"):
            self.given.append((record.key_id, record.hint))  # type: ignore[attr-defined]


@dataclass
class _Scene:
    """A station with an active key, and a watch on it that can be started again."""

    station: Station
    hints: _Hints
    terms: RenewalTerms = field(default_factory=RenewalTerms)
    watch: RenewalWatch = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin with a new watch that remembers nothing but the ledger."""
        self.watch = RenewalWatch(self.station.service.custody, self.terms)

    @property
    def acted(self) -> list[tuple[str, int]]:
        """The key of each hint so far, and how many in a row."""
        return self.hints.given

    async def install(self, folder: Path, evse_id: str, *, life: timedelta) -> str:
        csr = await self.station.csr(V2G, evse_id)
        leaf = AUTHORITY.sign(csr, begins=NOW, ends=NOW + life)
        (folder / f"{evse_id[-2:]}.pem").write_bytes(pem(leaf, AUTHORITY.sub))
        await self.station.told("installed", V2G, evse_id)
        (active,) = self.station.ledger.keys.active(str(V2G), evse_id)
        return active.key_id


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[tuple[_Scene, Path]]:
    certificates = folder / "certificates"
    certificates.mkdir()
    async with station(folder / "state", certificate_dir=certificates) as opened:
        hints = _Hints()
        logging.getLogger("stationkey.service.renewal").addHandler(hints)
        try:
            yield _Scene(opened, hints), certificates
        finally:
            logging.getLogger("stationkey.service.renewal").removeHandler(hints)


async def test_a_certificate_that_comes_due_is_told_once_and_a_restart_does_not_repeat_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(tmp_path) as (it, folder):
        key_id = await it.install(folder, E1, life=timedelta(days=90))
        await it.watch.look()
        assert (it.watch.due, it.acted) == ((), [])
        it.station.clocks.pass_by(61 * DAY)
        with caplog.at_level(logging.WARNING):
            for _ in range(5):
                await it.watch.look()
                it.restart()
        assert it.acted == [(key_id, 1)]
        (line,) = [record for record in caplog.records if getattr(record, "reason", "") == "certificate_due"]
        assert (line.key_id, line.evse_id, line.hint) == (key_id, E1, 1)  # type: ignore[attr-defined]
        assert it.station.service.counters.hints.items() == [((str(V2G), "due"), 1)]


async def test_after_a_month_without_power_an_expired_certificate_is_told_at_once_and_once(tmp_path: Path) -> None:
    async with scene(tmp_path) as (it, folder):
        key_id = await it.install(folder, E1, life=timedelta(days=90))
        it.station.clocks.pass_by(61 * DAY)
        await it.watch.look()
        it.station.clocks.wall += timedelta(days=31).total_seconds()  # nothing ran meanwhile
        for _ in range(5):
            it.restart()
            await it.watch.look()
        assert it.acted == [(key_id, 1), (key_id, 1)]
        assert [certificate.state for certificate in it.watch.due] == [Due.EXPIRED]


@pytest.mark.parametrize("wall", [0.0, (NOW - timedelta(days=2)).timestamp()], ids=["1970", "two-days-back"])
async def test_an_unset_clock_gives_no_hint_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wall: float
) -> None:
    async with scene(tmp_path) as (it, folder):
        await it.install(folder, E1, life=timedelta(days=90))
        it.station.clocks.wall = wall
        for _ in range(3):
            await it.watch.look()
        assert (it.watch.clock_behind, it.watch.due, it.acted) == (True, (), [])
        assert [record.reason for record in caplog.records if hasattr(record, "reason")] == ["clock_behind"]
        it.station.clocks.wall = (NOW + timedelta(days=80)).timestamp()
        await it.watch.look()
        assert (it.watch.clock_behind, len(it.acted)) == (False, 1)


async def test_a_clock_that_is_set_again_and_again_gives_one_hint_in_its_time(tmp_path: Path) -> None:
    """Far ahead and back, each minute, for a day of running time: one hint for each of the two states."""
    async with scene(tmp_path) as (it, folder):
        key_id = await it.install(folder, E1, life=timedelta(days=90))
        right = it.station.clocks.wall
        for minute in range(24 * 60 - 1):
            it.station.clocks.machine += 60
            it.station.clocks.wall = right + (0, 70, 3650, -20_000)[minute % 4] * 86_400
            await it.watch.look()
        assert it.acted == [(key_id, 1), (key_id, 1)]


async def test_many_due_at_once_are_told_a_few_at_a_time_the_first_to_expire_first(tmp_path: Path) -> None:
    async with scene(tmp_path) as (it, folder):
        keys = [
            await it.install(folder, f"DE*ABC*E{number:02}", life=timedelta(days=60 + number))
            for number in range(HINTS_AT_ONCE + 3)
        ]
        it.station.clocks.pass_by(59 * DAY)
        await it.watch.look()
        assert [key_id for key_id, _ in it.acted] == keys[:HINTS_AT_ONCE]
        await it.watch.look()
        await it.watch.look()
        assert [key_id for key_id, _ in it.acted] == keys


async def test_a_renewed_certificate_is_no_longer_due(tmp_path: Path) -> None:
    async with scene(tmp_path) as (it, folder):
        await it.install(folder, E1, life=timedelta(days=90))
        it.station.clocks.pass_by(61 * DAY)
        await it.watch.look()
        assert [certificate.state for certificate in it.watch.due] == [Due.DUE]
        await it.install(folder, E1, life=timedelta(days=300))
        await it.watch.look()
        assert it.watch.due == ()


async def test_a_command_that_cannot_be_started_is_told_at_the_start_and_the_watch_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looked = asyncio.Event()
    async with scene(tmp_path) as (it, _):
        it.terms = RenewalTerms(command=("/does/not/exist",))
        it.restart()
        watching = asyncio.create_task(it.watch.run(lambda _: looked.set()))
        async with asyncio.timeout(30):
            await looked.wait()
        watching.cancel()
        it.watch.close()
    assert [record.reason for record in caplog.records if hasattr(record, "reason")] == ["command_unstartable"]


async def test_a_hint_that_cannot_be_written_down_is_not_given(tmp_path: Path) -> None:
    """Else each minute would bring one while the disk is full, and each restart."""
    async with scene(tmp_path) as (it, folder):
        await it.install(folder, E1, life=timedelta(days=90))
        it.station.clocks.pass_by(61 * DAY)
        connection = sqlite_of(it.station.ledger)._connection  # noqa: SLF001 - the fault is injected here
        connection.execute("PRAGMA query_only=ON")
        with pytest.raises(LedgerError):
            await it.watch.look()
        connection.execute("PRAGMA query_only=OFF")
        assert (len(it.watch.due), it.acted) == (1, [])


@pytest.mark.parametrize("seed", range(8))
def test_over_a_thousand_days_no_hint_comes_before_its_time(seed: int) -> None:
    """With restarts, days off, and a clock that is set to anything: at most one hint in `repeat` of running time.

    The one exception, once for each certificate, is that it has expired.
    """
    chance = random.Random(seed)
    last: Hint | None = None
    running, wall = 0, float(START)
    end = START + 90 * 86_400
    given: list[Hint] = []
    for _ in range(1000 * 24):
        running += chance.choice((0, 1, 1, 1)) * DAY // 24  # some hours it is off
        wall += 3600
        seen = wall + (0 if chance.random() < 0.98 else chance.uniform(-4e9, 4e9))
        if wall > end + chance.uniform(0, 400) * 86_400:
            end = int(wall) + 90 * 86_400  # renewed, early or late
        state = RULE.judge(end - 90 * 86_400, end, seen)
        if state not in {Due.DUE, Due.EXPIRED}:
            continue
        certificate = DueCertificate("key", str(V2G), E1, end, state)
        if (hint := next_hint(last, certificate, running=running, repeat=DAY)) is not None:
            given.append(hint)
            last = hint
    assert len(given) > 1
    for before, after in pairwise(given):
        apart = after.running - before.running
        first_expired = after.expired and not before.expired and after.not_after == before.not_after
        wanted = DAY * min(LONGEST, 2 ** (before.count - 1)) if after.not_after == before.not_after else DAY
        assert apart >= wanted or first_expired
    # Once for each certificate, that exception: the state does not go back with the clock.
    for not_after in {hint.not_after for hint in given}:
        of_one = [hint.expired for hint in given if hint.not_after == not_after]
        assert of_one == sorted(of_one)
