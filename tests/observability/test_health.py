"""How the daemon is: what is said of it in each condition, what asking costs, and what can be told by hostile names."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from left_behind import left_behind
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from parts import V2G, Station, sqlite_of, station
from stationkey.errors import LedgerError, Scope
from stationkey.keystore import KeyStore
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import KeyStoreThread, Outcome
from stationkey.ledger import Figures
from stationkey.observability import health as module
from stationkey.observability.health import EXPIRIES, FRESH, PROBE_INTERVAL, Health
from stationkey.observability.metrics import UNANSWERABLE, Exposition
from stationkey.observability.status import Condition, StoreCondition
from stationkey.system.counters import BUCKETS, MAX_SERIES, Counts, Durations
from stationkey.system.systemd import ServiceManager

BOUND = 30.0
"""Seconds after which a test that waits for something has failed."""

WELL = Condition(
    ready=True,
    stopping=False,
    broker="mqtt://127.0.0.1:1883",
    connected=True,
    connections=1,
    changed=1_700_000_000.0,
    stores=(StoreCondition("default", stuck=False, last=(3.0, Outcome())),),
    ledger="",
    ledger_stuck=False,
    due=0,
    expired=0,
    clock_behind=False,
    watchdog=True,
)
THREE = Figures(
    keys={("active", "v2g_certificate"): 3, ("pre-activation", "v2g_certificate"): 5},
    expiries=(("v2g_certificate", "DE*ABC*E1", 1_800_000_000),),
    unknown=2,
    destroyed=0,
    size=4096,
)


class _Edge:
    """Connected, with nothing to do."""

    connected, in_hand, waiting = True, 0, 0


def watching(here: Station) -> Health:
    health = Health(here.keystores, ServiceManager(), broker="mqtt://127.0.0.1:1883", patience=BOUND)
    health.watch(here.service, _Edge())
    health.connected()
    return health


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    async with station(tmp_path) as here:
        yield here


def in_store(*, stuck: bool = False, last: tuple[float, Outcome] | None = (3.0, Outcome())) -> dict[str, Any]:
    return {"stores": (StoreCondition("default", stuck, last),)}


class TestCondition:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            pytest.param({}, "", id="well"),
            pytest.param(
                in_store(last=(3.0, Outcome("key_of_another_tpm", Scope.KEY))), "", id="one key is another TPM's"
            ),
            pytest.param(
                in_store(last=(3.0, Outcome("algorithm_unsupported_by_tpm", Scope.REQUEST))),
                "",
                id="one algorithm is not there",
            ),
            pytest.param({"ready": False}, "", id="not started"),
            pytest.param(in_store(last=None), "", id="not asked yet"),
            pytest.param({"stopping": True}, "stopping", id="stopping"),
            pytest.param({"connected": False}, "no connection to mqtt://127.0.0.1:1883", id="no broker"),
            pytest.param(in_store(stuck=True), "the key store hangs", id="TPM hangs"),
            pytest.param(
                in_store(last=(0.1, Outcome("tpm_lockout", Scope.STORE))), "cannot serve (tpm_lockout)", id="TPM locked"
            ),
            pytest.param(
                in_store(last=(0.1, Outcome("tpm_unreachable", Scope.DEVICE))),
                "cannot serve (tpm_unreachable)",
                id="TPM gone",
            ),
            pytest.param({"ledger": "disk_full"}, "the ledger fails (disk_full)", id="disk full"),
            pytest.param(
                {"ledger": "no_answer", "ledger_stuck": True}, "the ledger fails (no_answer)", id="ledger hangs"
            ),
        ],
    )
    def test_each_trouble_is_told_and_only_then_is_it_not_well(
        self, change: dict[str, object], words: str, request: pytest.FixtureRequest
    ) -> None:
        condition = replace(WELL, **change)
        quiet = {"well", "one key is another TPM's", "one algorithm is not there"}
        assert condition.healthy == (request.node.callspec.id in quiet)
        report = json.loads(condition.report())
        assert report["status"] == ("ok" if condition.healthy else "trouble")
        assert report["watchdog"]["fed"] == (request.node.callspec.id not in {"TPM hangs", "ledger hangs"})
        assert words in condition.sentence(None)

    def test_of_several_key_stores_the_one_in_trouble_is_named(self) -> None:
        [well] = WELL.stores
        away = StoreCondition("se", stuck=False, last=(0.1, Outcome("pkcs11_token_missing", Scope.DEVICE)))
        condition = replace(WELL, stores=(well, away))
        report = json.loads(condition.report())
        assert not condition.healthy
        assert report["keystore"] == report["keystores"]["se"]
        assert [one["reachable"] for one in report["keystores"].values()] == [True, False]
        assert "key store se cannot serve (pkcs11_token_missing)" in condition.sentence(None)

    def test_the_line_of_status_says_where_how_many_and_until_when(self) -> None:
        line = "connected to mqtt://127.0.0.1:1883, 3 keys active, next certificate expires 2027-01-15"
        assert WELL.sentence(THREE) == line

    @pytest.mark.parametrize("scope", Scope)
    def test_what_is_unreachable_is_in_trouble(self, scope: Scope) -> None:
        condition = replace(WELL, **in_store(last=(0.1, Outcome("tpm_error", scope))))
        assert condition.stores[0].reachable == (scope is not Scope.DEVICE)
        assert bool(condition.troubles) == (scope in {Scope.DEVICE, Scope.STORE})


class TestAsking:
    async def test_however_often_it_is_asked_the_ledger_is_asked_once_a_second(
        self, here: Station, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        health, looks = watching(here), mock.AsyncMock(wraps=here.service.figures)
        monkeypatch.setattr(here.service, "figures", looks)
        with mock.patch("stationkey.observability.health.time.monotonic", return_value=100.0) as clock:
            await asyncio.gather(*(health.figures() for _ in range(100)))
            clock.return_value += FRESH - 0.1
            await health.figures()
            assert looks.await_count == 1
            clock.return_value += 0.2
            await health.figures()
        assert looks.await_count == 2

    async def test_keys_that_have_changed_are_looked_at_anew(self, tmp_path: Path) -> None:
        changed = mock.Mock()
        async with station(tmp_path, on_change=changed) as here:
            health = watching(here)
            changed.side_effect = health.keys_changed
            await here.key()
            with mock.patch("stationkey.observability.health.time.monotonic", return_value=100.0):
                before = await health.figures()
                await here.told("installed")
                after = await health.figures()
        assert before is not None
        assert after is not None
        assert (before.keys, after.keys) == ({("pre-activation", V2G): 1}, {("active", V2G): 1})

    async def test_a_flood_of_scrapes_makes_the_text_once(self, here: Station) -> None:
        exposition = Exposition(watching(here))
        with mock.patch("stationkey.observability.metrics.generate_latest", return_value=b"text") as made:
            assert await asyncio.gather(*(exposition.text() for _ in range(100))) == [b"text"] * 100
        assert made.call_count == 1

    async def test_a_ledger_that_does_not_answer_is_told_of_and_kept_nobody_waiting(
        self, here: Station, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LEDGER_PATIENCE", 0.05)
        monkeypatch.setattr(module, "FRESH", 0.0)
        health, go_on = watching(here), threading.Event()
        held = here.service._ledger(lambda _: go_on.wait(BOUND))  # noqa: SLF001 - a disk that hangs
        assert await health.figures() is None
        assert (health.condition().ledger, health.condition().healthy) == ("no_answer", False)
        assert b"stationkey_keys{" not in await Exposition(health).text()
        go_on.set()
        await held
        monkeypatch.setattr(module, "LEDGER_PATIENCE", BOUND)
        assert await health.figures() is not None
        assert health.condition().ledger == ""

    async def test_a_ledger_that_hangs_gives_no_sign_of_life(
        self, here: Station, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("stationkey.ledger.worker.LEDGER_PATIENCE", 0.05)
        manager, signs = mock.Mock(watchdog=0.02), asyncio.Queue[None]()
        manager.alive.side_effect = lambda: signs.put_nowait(None)
        health, go_on = Health(here.keystores, manager, broker="", patience=BOUND), threading.Event()
        health.watch(here.service, _Edge())
        looks, condition = asyncio.Queue[None](), health.condition

        def look() -> Condition:
            looks.put_nowait(None)
            return condition()

        monkeypatch.setattr(health, "condition", look)
        async with health.watching(), asyncio.timeout(BOUND):
            await signs.get()
            held = here.service._ledger(lambda _: go_on.wait(BOUND))  # noqa: SLF001 - a disk that hangs
            while not (errors := [record for record in caplog.records if record.levelno == logging.ERROR]):
                await looks.get()
            [record] = errors
            while not signs.empty():  # they have come until then
                signs.get_nowait()
            for _ in range(looks.qsize() + 5):
                await looks.get()
            assert signs.empty()
            assert (record.name, record.exc_info) == ("stationkey.observability.health", None)
            assert "ledger" in record.getMessage()  # words: what hangs
            go_on.set()
            await held
            await signs.get()

    async def test_a_ledger_that_cannot_be_written_is_told_of_until_it_can(self, here: Station) -> None:
        health = watching(here)
        await here.key()
        sqlite_of(here.ledger)._connection.execute("PRAGMA busy_timeout=0")  # noqa: SLF001 - no need to wait
        with closing(sqlite3.connect(sqlite_of(here.ledger).path, isolation_level=None)) as another:
            another.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError):
                await here.service.expiry.sweep()
            assert health.condition().ledger == "ledger_busy"
            assert b"stationkey_ledger_writable 0.0" in await Exposition(health).text()
            another.execute("ROLLBACK")
        await here.service.expiry.sweep()
        assert health.condition().ledger == ""

    async def test_a_ledger_that_cannot_be_read_leaves_the_rest_to_be_shown(
        self, here: Station, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        damaged = mock.AsyncMock(side_effect=LedgerError("damaged", reason="ledger_damaged"))
        monkeypatch.setattr(here.service, "figures", damaged)
        text = await Exposition(watching(here)).text()
        assert b"stationkey_keys{" not in text
        assert b"stationkey_ready 1.0" in text

    async def test_a_service_that_has_ended_is_not_asked(self, here: Station) -> None:
        health = watching(here)
        await here.service.aclose()
        assert await health.figures() is None
        assert b"stationkey_keys{" not in await Exposition(health).text()

    async def test_before_there_is_a_service_the_rest_is_shown(self, here: Station) -> None:
        health = Health(here.keystores, ServiceManager(), broker="mqtt://127.0.0.1:1883", patience=BOUND)
        text = (await Exposition(health).text()).decode()
        assert "stationkey_ready 0.0" in text
        assert "stationkey_keystore_jobs_in_hand" in text

    async def test_many_expositions_leave_nothing_behind(self, here: Station, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("stationkey.observability.kept.FRESH", 0.0)
        exposition = Exposition(watching(here))
        await here.key()
        assert await left_behind(exposition.text) < 0.5  # not an object for each


HOSTILE = ['"} 1\nstationkey_ready 7\n#', "\\", "DE*ABC*E\N{NO-BREAK SPACE}", "\x00\x1b[2J", "{}", "E" * 4096]
"""EVSE IDs that no message brings through the contract; a ledger that somebody has written to might."""


class TestExpiries:
    async def expire(self, here: Station, evse_ids: list[str]) -> list[str]:
        """Active keys for EVSEs, whose certificates expire in this order."""
        for number, evse_id in enumerate(evse_ids, 1):
            key_id = await here.key(V2G, f"DE*ABC*E{number}")
            here.ledger.transitions.activate(
                key_id,
                chain="",
                not_after=2_000_000_000 + number,
                reason="",
                now=0,
                grace_due=0,
                useful_until=0,
                message_id=None,
            )
            sqlite_of(here.ledger)._connection.execute("UPDATE key SET evse_id = ? WHERE key_id = ?", (evse_id, key_id))  # noqa: SLF001
        return evse_ids

    async def shown(self, here: Station) -> list[tuple[dict[str, str], float]]:
        text = (await Exposition(watching(here)).text()).decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        unknown = families["stationkey_certificates_expiry_unknown"].samples[0].value
        found = [
            (sample.labels, sample.value)
            for sample in families["stationkey_certificate_expiry_timestamp_seconds"].samples
        ]
        return [*found, ({}, unknown)]

    async def test_those_that_expire_first_are_shown_and_the_others_counted(self, here: Station) -> None:
        names = await self.expire(here, [f"DE*ABC*E{number}" for number in range(1, EXPIRIES + 4)])
        *found, (_, unknown) = await self.shown(here)
        expected = [
            ({"certificate_type": "v2g_certificate", "evse_id": name}, 2_000_000_000.0 + number)
            for number, name in enumerate(names[:EXPIRIES], 1)
        ]
        assert found == expected
        assert unknown == 3

    async def test_no_evse_id_can_forge_a_line(self, here: Station) -> None:
        await self.expire(here, HOSTILE)
        *found, _ = await self.shown(here)
        assert [labels["evse_id"] for labels, _ in found] == HOSTILE


async def test_what_alerts_count_is_shown_before_it_happens(here: Station) -> None:
    """increase() does not see what a series begins with."""
    text = (await Exposition(watching(here)).text()).decode()
    shown = {
        (one.name, *one.labels.values()): one.value
        for each in text_string_to_metric_families(text)
        for one in each.samples
    }
    assert shown["stationkey_rejected_requests_total",] == 0
    assert {shown["stationkey_unanswerable_messages_total", reason] for reason in UNANSWERABLE} == {0}
    here.service.counters.requests.add("unknown", "rejected", "not_json")
    here.service.counters.requests.add("v2g_certificate", "rejected", "rate_limited")
    here.service.counters.requests.add("v2g_certificate", "accepted", "")
    text = (await Exposition(watching(here)).text()).decode()
    assert "\nstationkey_rejected_requests_total 2.0\n" in text


class TestProbing:
    def thread(self, clock: list[float]) -> KeyStoreThread:
        return KeyStoreThread(SoftwareKeyStore, clock=lambda: clock[0])

    async def test_a_quiet_key_store_is_asked_and_stays_idle(self) -> None:
        clock = [0.0]
        with closing(self.thread(clock)) as thread:
            health = Health(KeyStores.only("software:", thread), ServiceManager(), broker="", patience=BOUND)
            clock[0] = 100.0
            health._probe(PROBE_INTERVAL)  # noqa: SLF001 - what the loop does each time
            while thread.last is None:  # noqa: ASYNC110 - nobody is told when a probe ends
                await asyncio.sleep(0.001)
            assert thread.idle == 100.0
            health._probe(PROBE_INTERVAL)  # noqa: SLF001 - it has just been heard of
            assert not any(thread.waiting.values())
            assert thread.durations()["probe"][0][-1] == 1

    async def test_a_key_store_that_works_or_hangs_is_asked_nothing_more(self) -> None:
        clock, begun, go_on = [0.0], threading.Event(), threading.Event()

        def work(_: KeyStore) -> None:
            begun.set()
            assert go_on.wait(BOUND)

        with closing(self.thread(clock)) as thread:
            health = Health(KeyStores.only("software:", thread), ServiceManager(), broker="", patience=BOUND)
            thread.submit(work, timeout=1.0)
            assert begun.wait(BOUND)
            for _ in range(100):
                clock[0] += PROBE_INTERVAL
                health._probe(PROBE_INTERVAL)  # noqa: SLF001 - what the loop does each time
            assert thread.stuck
            assert (sum(thread.waiting.values()), thread.abandoned) == (0, 0)
            go_on.set()


async def test_the_line_of_status_tells_of_a_hang_long_before_the_next_sign_of_life_is_due(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/health knows at once; whoever looks at systemctl status must not read the contrary for half a minute."""
    monkeypatch.setattr(module, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(module, "STATUS_PAUSE", 0.01)
    told, go_on = asyncio.Event(), threading.Event()

    def status(line: str) -> None:
        if "hangs" in line:
            told.set()

    manager = mock.Mock(watchdog=60.0, status=status)
    health = Health(here.keystores, manager, broker="mqtt://127.0.0.1:1883", patience=BOUND)
    health.watch(here.service, _Edge())
    health.connected()
    async with health.watching():
        here.keystore.submit(lambda _: go_on.wait(BOUND), timeout=0.05)
        try:
            await asyncio.wait_for(told.wait(), BOUND)
        finally:
            go_on.set()
    assert manager.alive.call_count == 1


class _Broken(ServiceManager):
    """Fails at its first sign of life."""

    def alive(self) -> None:
        raise RuntimeError("a fault")


async def test_a_watchdog_that_fails_gives_no_sign_of_life_and_is_counted(
    here: Station, caplog: pytest.LogCaptureFixture
) -> None:
    failures = Counts()
    health = Health(here.keystores, _Broken("/nowhere", watchdog=1.0), broker="", patience=BOUND, failures=failures)
    async with health.watching():
        while not failures.items():  # noqa: ASYNC110 - nobody is told of it
            await asyncio.sleep(0)
    assert failures.items() == [(("watchdog", "internal_error"), 1)]
    [record] = [record for record in caplog.records if record.name == "stationkey.system.tasks"]
    assert (record.levelno, bool(record.exc_info)) == (logging.ERROR, True)


class TestServiceManager:
    def test_an_abstract_address_is_understood(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind("")  # the kernel gives it an abstract name
            name = manager.getsockname()[1:].decode()
            ServiceManager.of({"NOTIFY_SOCKET": "@" + name}).ready()
            assert manager.recv(64) == b"READY=1"

    def test_one_that_is_not_there_is_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        ServiceManager(str(tmp_path / "nowhere")).ready()
        [record] = caplog.records
        assert "READY" in record.getMessage()  # words: what it is not told

    def test_one_that_does_not_read_holds_nobody_up(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            told = ServiceManager(str(tmp_path / "notify"), watchdog=1.0)
            with caplog.at_level(logging.WARNING):
                while not caplog.records:
                    told.alive()
        assert all("WATCHDOG" in record.getMessage() for record in caplog.records)  # words: what it is not told

    def test_without_one_there_is_no_watchdog_either(self) -> None:
        manager = ServiceManager.of({"WATCHDOG_USEC": "1000000"})
        assert not manager
        assert manager.watchdog is None


class TestCounters:
    def test_what_is_counted_apart_is_bounded_and_nothing_is_lost(self) -> None:
        counts = Counts()
        for number in range(3 * MAX_SERIES):
            counts.add("rejected", f"reason_{number}")
        found = dict(counts.items())
        assert len(found) == MAX_SERIES + 1
        assert found["other", "other"] == 2 * MAX_SERIES
        counts.add("rejected", "reason_0")
        assert dict(counts.items())["rejected", "reason_0"] == 2

    def test_a_duration_belongs_to_the_bucket_that_it_does_not_exceed(self) -> None:
        durations = Durations()
        for seconds in (0.0, BUCKETS[0], BUCKETS[0] + 0.0001, BUCKETS[-1] + 1):
            durations.add(seconds)
        assert durations.cumulative()[:2] == [2, 3]
        assert durations.cumulative()[-2:] == [3, 4]
        assert durations.count == 4
        assert durations.sum == pytest.approx(301.0021)
