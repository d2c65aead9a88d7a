"""How a key ends: time, bounds and destruction. On real ledgers, with software keys and with a TPM's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from keys_told import ACTIVE, AUTHORITY, COMPROMISED, DEACTIVATED, DESTROYED, PENDING, YEAR, reference, said, until
from peers import Swtpm

from parts import (
    E1,
    E2,
    STATION,
    V2G,
    Clocks,
    Station,
    dump,
    key_id_in,
    new_id,
    pem,
    request,
    sqlite_of,
    station,
    status,
)
from stationkey.config.settings import DAY, Bounds, Terms
from stationkey.contract.profiles import SECP256R1, Algorithm
from stationkey.keystore import KeyRef
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.ledger.keys import Keys
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.retention import Retention
from stationkey.service.running_time import RunningTime

pytest_plugins = ["josevs", "keys_told"]

# Time.


async def test_a_pending_key_ends_when_no_certificate_comes(here: Station) -> None:
    key = await here.key()

    await here.pass_by(30 * DAY - 1000)
    assert here.states(key) == [PENDING]
    await here.pass_by(1000)
    assert here.states(key) == [DESTROYED]
    assert here.events(key) == ["CSR answered", "expired"]


async def test_a_key_whose_installation_failed_ends_after_a_day(here: Station) -> None:
    key = await here.key()
    await here.told("failed_installation")

    await here.pass_by(DAY - 1000)
    assert here.states(key) == [PENDING]
    await here.pass_by(1000)
    assert here.states(key) == [DESTROYED]


async def test_a_replaced_key_ends_a_grace_period_after_the_new_one_was_confirmed(here: Station) -> None:
    old = await here.key()
    await here.told("installed")
    new = await here.key()
    await here.told("installed")
    await here.pass_by(30 * DAY)
    here.ledger.transitions.confirm(new, reason="", now=0)
    await here.pass_by(0)

    await here.pass_by(7 * DAY - 1000)
    assert here.states(old, new) == [DEACTIVATED, ACTIVE]
    await here.pass_by(1000)
    assert here.states(old, new) == [DESTROYED, ACTIVE]


async def test_a_key_that_was_retired_by_hand_gets_its_grace_period(here: Station) -> None:
    key = await here.key()
    await here.told("installed")
    here.ledger.transitions.apply(key, KeyEvent.RETIRED, reason="", now=0)

    await here.pass_by(0)
    await here.pass_by(7 * DAY - 1000)
    assert here.states(key) == [DEACTIVATED]
    await here.pass_by(1000)
    assert here.states(key) == [DESTROYED]


async def test_active_and_compromised_keys_do_not_end_by_time(here: Station) -> None:
    evidence = await here.key()
    here.ledger.transitions.apply(evidence, KeyEvent.COMPROMISE_REPORTED, reason="", now=0)
    active = await here.key()
    await here.told("installed")

    await here.pass_by(10 * YEAR)

    assert here.states(evidence, active) == [COMPROMISED, ACTIVE]


@pytest.mark.parametrize(
    "jump", [pytest.param(-3600.0, id="an hour back"), pytest.param(10 * YEAR / 1000, id="ten years on")]
)
async def test_no_key_ends_by_a_jump_of_the_clock(tmp_path: Path, jump: float) -> None:
    """Neither while the clock is wrong nor when it has been set right again, nor over a restart in between."""
    clocks = Clocks()
    async with station(tmp_path / "state", clocks=clocks) as here:
        replaced = await here.key()
        await here.told("installed")
        failed, pending = await here.key(STATION), await here.key(V2G, E1)
        await here.told("failed_installation", STATION)
        active = await here.key()
        await here.told("installed")
        keys = (replaced, failed, pending, active)
        before = here.states(*keys)
        due = [here.record(key).due for key in keys]
        for change in (jump, -jump):
            clocks.wall += change
            await here.pass_by(0)
            assert here.states(*keys) == before
    clocks.wall += jump
    async with station(tmp_path / "state", clocks=clocks) as here:
        await here.pass_by(0)

        assert here.states(*keys) == before
        assert [here.record(key).due for key in keys] == due


async def test_running_time_goes_on_over_a_restart_and_a_station_that_is_off_does_not_age_its_keys(
    tmp_path: Path,
) -> None:
    clocks = Clocks()
    async with station(tmp_path / "state", clocks=clocks) as here:
        key = await here.key()
        await here.pass_by(20 * DAY)
    clocks.pass_by(100 * DAY)
    async with station(tmp_path / "state", clocks=clocks) as here:
        await here.pass_by(10 * DAY - 1000)
        assert here.states(key) == [PENDING]
        await here.pass_by(1000)
        assert here.states(key) == [DESTROYED]


async def test_running_time_never_goes_back(here: Station) -> None:
    await here.pass_by(5 * DAY)

    here.ledger.retention.write_running(DAY)

    assert here.ledger.retention.running == 5 * DAY


async def test_running_time_is_saved_every_quarter_of_an_hour_and_a_minute_without_events_writes_nothing(
    here: Station,
) -> None:
    await here.key()
    path = sqlite_of(here.ledger).path
    seen = []
    for _ in range(16):
        await here.pass_by(60_000)
        files = [file.stat() for file in (path, Path(f"{path}-wal"))]  # not opened: SQLite's locks would be lost
        seen.append([(file.st_size, file.st_mtime_ns) for file in files])

    assert seen[:13] == seen[:1] * 13
    assert 13 * 60_000 < here.ledger.retention.running < 16 * 60_000


def test_running_time_is_counted_from_where_it_was() -> None:
    clock = iter((100.0, 100.25))

    assert RunningTime(7000, lambda: next(clock)).now() == 7250


async def test_an_expiry_that_an_operator_was_faster_than_stops_nothing(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends one key between the daemon's look at what is due and its turn: the others still expire."""
    keys = [await here.key(V2G, evse_id) for evse_id in (E1, E2, None)]
    due = Retention.due

    def then_the_operator(retention: Retention, running: int) -> list[tuple[str, str, str]]:
        found = due(retention, running)
        if (keys[1], str(V2G), "") in found:
            here.ledger.transitions.apply(keys[1], KeyEvent.COMPROMISE_REPORTED, reason="", now=0)
        return found

    monkeypatch.setattr(Retention, "due", then_the_operator)

    await here.pass_by(30 * DAY)

    assert here.states(*keys) == [DESTROYED, COMPROMISED, DESTROYED]


async def test_an_expiry_that_an_operator_was_faster_than_at_the_last_moment_stops_nothing(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [await here.key(V2G, evse_id) for evse_id in (E1, E2)]
    ref = Keys.ref

    def then_the_operator(own: Keys, key_id: str) -> KeyRef | None:
        if key_id == keys[0]:
            here.ledger.transitions.apply(keys[0], KeyEvent.COMPROMISE_REPORTED, reason="", now=0)
        return ref(own, key_id)

    monkeypatch.setattr(Keys, "ref", then_the_operator)

    await here.pass_by(30 * DAY)

    assert here.states(*keys) == [COMPROMISED, DESTROYED]


async def test_the_sweep_goes_on_by_itself(tmp_path: Path) -> None:
    async with station(tmp_path / "state", terms=Terms(pending=0)) as here:
        key = await here.key()
        sweeping = asyncio.create_task(here.service.expiry.run())
        await until(lambda: here.counts["accepted"] == 1 and _is_destroyed(tmp_path / "state", key))
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping


def _is_destroyed(state_dir: Path, key_id: str) -> bool:
    return any(f"'{key_id}'" in line and "'destroyed'" in line for line in dump(state_dir / "ledger.sqlite3"))


# Retries and bounds.


async def test_a_retry_of_an_id_whose_key_is_gone_is_rejected(here: Station) -> None:
    asked = request()
    response = await here.service.answer(asked)
    assert isinstance(response.data.csr, str)
    here.ledger.transitions.apply(key_id_in(response.data.csr), KeyEvent.DESTRUCTION_ORDERED, reason="", now=0)

    again = await here.service.answer(asked)

    assert again.data.status == "rejected"
    assert here.counts["key_destroyed"] == 1


async def test_a_retry_gets_the_same_csr_for_as_long_as_its_key_is_pending(here: Station) -> None:
    asked = request()
    first = await here.service.answer(asked)
    await here.pass_by(30 * DAY - 1000)

    assert await here.service.answer(asked) == first


async def test_the_oldest_pending_key_makes_room(here: Station, caplog: pytest.LogCaptureFixture) -> None:
    keys = [await here.key() for _ in range(10)]
    other = await here.key(V2G, E1)

    assert here.states(*keys) == [DESTROYED] * 2 + [PENDING] * 8
    assert here.states(other) == [PENDING]
    assert len([text for text in said(caplog) if "too many pending keys" in text]) == 2


async def test_an_active_key_is_none_of_the_pending_ones(tmp_path: Path) -> None:
    bounds = Bounds(pending_limit=1, pending_total=1)
    async with station(tmp_path / "state", terms=Terms(bounds=bounds)) as here:
        active = await here.key()
        await here.told("installed")
        pending = await here.key()

        assert here.states(active, pending) == [ACTIVE, PENDING]


# Destruction.


def bytes_on_disk(state_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in state_dir.rglob("*") if path.is_file())


async def _deleted(here: Station, key: str) -> None:
    await here.told("deleted", private_key_path=f"/keys/{key}.pem")


async def _expired(here: Station, key: str) -> None:
    here.ledger.transitions.apply(key, KeyEvent.RETIRED, reason="", now=0)
    await here.pass_by(0)
    await here.pass_by(8 * DAY)


async def _ordered(here: Station, key: str) -> None:
    here.ledger.transitions.apply(key, KeyEvent.DESTRUCTION_ORDERED, reason="", now=0)
    await here.service.custody.show_active()


@pytest.mark.parametrize("end", [_deleted, _expired, _ordered])
async def test_a_destroyed_key_is_in_no_file_of_the_state_directory(
    either_store: Station, certificate_dir: Path, end: Callable[[Station, str], object]
) -> None:
    csr = await either_store.csr()
    key = key_id_in(csr)
    (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
    await either_store.told("installed")
    kept = [await either_store.key(STATION), await either_store.key(V2G, E1)]
    private = reference(either_store, key).private
    # Of PEM a line from the middle: the first ones say of what kind it is, and are the same for many.
    gone = [
        private,
        *(lines[len(lines) // 2] for lines in (reference(either_store, key).pem().split(), csr.encode().split())),
    ]
    before = bytes_on_disk(either_store.state_dir)
    assert all(secret in before for secret in gone)

    ended = end(either_store, key)
    assert asyncio.iscoroutine(ended)
    await ended

    after = bytes_on_disk(either_store.state_dir)
    assert either_store.states(key) == [DESTROYED]
    assert not any(secret in after for secret in gone)
    assert all(reference(either_store, other).private in after for other in kept)


async def test_the_sweep_writes_the_private_parts_anew_after_each_destruction(here: Station) -> None:
    """What SQLite may have left of a row that it once moved is nothing that a test can wait for."""
    for end in (_deleted, _ordered):
        key = await here.key()
        await end(here, key)
        await here.pass_by(0)

        assert here.states(key) == [DESTROYED]
        assert not here.ledger.retention.wipe(), "there was something left to do"


async def test_a_key_that_made_room_is_in_no_file_after_a_sweep(here: Station) -> None:
    first = await here.key()
    gone = reference(here, first).private
    for _ in range(8):
        await here.key()

    await here.pass_by(0)

    assert here.states(first) == [DESTROYED]
    assert gone not in bytes_on_disk(here.state_dir)


async def test_a_key_made_ahead_ends_in_the_sweep_after_its_time_and_leaves_no_trace(here: Station) -> None:
    store = SoftwareKeyStore()
    old, young = store.generate(Algorithm.ECDSA_SHA256), store.generate(Algorithm.ECDSA_SHA256)
    here.ledger.transitions.make_ahead(old, now=0, due=DAY, seconds=0)
    here.ledger.transitions.make_ahead(young, now=0, due=3 * DAY, seconds=0)
    await here.pass_by(0)
    assert [key for key, _ in here.ledger.keys.made_ahead()] == [old, young]

    await here.pass_by(2 * DAY)

    assert here.ledger.keys.made_ahead() == [(young, 3 * DAY)]
    assert [key.key_id for key in here.ledger.keys.usable()] == [young.key_id]
    assert old.private not in bytes_on_disk(here.state_dir)
    assert old.key_id.encode() not in bytes_on_disk(here.state_dir)


async def test_a_sweep_makes_the_file_small_again_after_a_flood(tmp_path: Path) -> None:
    async with station(tmp_path / "state", terms=Terms(bounds=Bounds(history_limit=0))) as here:
        for number in range(300):
            here.ledger.transitions.make_ahead(
                KeyRef(scheme="software", key_type=SECP256R1, public=number.to_bytes(2), private=bytes(2000)),
                now=0,
                due=1,
                seconds=0,
            )
        here.ledger.database.checkpoint()
        large = sqlite_of(here.ledger).path.stat().st_size
        for _ in range(3):
            await here.pass_by(1000)

        assert here.ledger.keys.all() == []
        assert sqlite_of(here.ledger).path.stat().st_size < large * 3 // 4


async def test_a_key_of_a_tpm_that_is_gone_can_still_be_destroyed(tmp_path: Path, swtpm: Swtpm) -> None:
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        key = await here.key()
        swtpm.kill()

        await here.told("deleted", private_key_path=f"/keys/{key}.pem")

        assert here.states(key) == [DESTROYED]


async def test_a_message_is_noted_with_what_it_brought(here: Station) -> None:
    key, message_id = await here.key(), new_id()

    await here.service.note_status(status("installed", message_id=message_id))

    event = here.ledger.keys.history(key)[-1]
    assert (event.event, event.state, event.message_id) == ("installed", "active", message_id)
    assert event.at == int(here.clocks.wall * 1000)
