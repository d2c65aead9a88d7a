"""Many stations on one ledger: each has its own ids, keys, files and statuses, whatever it is called."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from parts import E1, E2, NOW, STATION, V2G, Authority, Station, key_id_in, new_id, pem, request, station, status
from stationkey.config.settings import DAY
from stationkey.contract.active_names import percent_encoded
from stationkey.contract.stations import station_flaw
from stationkey.errors import KeyStoreError, MessageError
from stationkey.ledger.lifecycle import KeyState
from stationkey.service import statuses
from stationkey.site.adoption import AllShards
from stationkey.site.shard import Shard
from stationkey.system.state_dir import DATABASE_NAME
from stationkey.x509.certificate import prove

AUTHORITY = Authority()
PENDING, ACTIVE, DEACTIVATED, DESTROYED = (
    KeyState.PRE_ACTIVATION,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.DESTROYED,
)
A, B = "depot7/s1", "depot7/s2"
ODD = [
    "..",
    ".",
    "%2e%2e",
    "v2g_certificate",
    "x.previous",
    "previous",
    "root-0123456789abcdef",
    "a/../b",
    "a b",
    "'\"",
]
ODD += ["$x/y", "~", "-", "é" * 32, "\U0001f50c" * 16, "x" * 64, "station-a", "station_a", "a\\b", "{station}", "con"]


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    async with station(tmp_path / "state") as made:
        yield made


def rejections(here: Station) -> list[tuple[str, ...]]:
    """Id and reason of what is on record, with its station."""
    with closing(sqlite3.connect(here.state_dir / DATABASE_NAME)) as connection:
        return connection.execute("SELECT station, request_id, reason FROM rejection ORDER BY seq").fetchall()


# Ids.


async def test_the_same_id_of_two_stations_is_two_requests_and_each_gets_its_own_csr_again(here: Station) -> None:
    asked = request()
    first = {name: await here.service.answer(asked, station=name) for name in ("", A, B)}
    again = {name: await here.service.answer(asked, station=name) for name in ("", A, B)}

    assert again == first
    assert len({response.data.csr for response in first.values()}) == 3
    other = request(request_id=asked.id, common_name="another")
    assert (await here.service.answer(other, station=A)).data.status == "rejected"
    assert (await here.service.answer(other, station="depot7/s3")).data.status == "accepted"


async def test_the_same_id_of_two_stations_at_once_is_two_requests(here: Station) -> None:
    asked, other = request(), request(common_name="another")
    other = request(request_id=asked.id, common_name="another")
    answers = await asyncio.gather(
        here.service.answer(asked, station=A),
        here.service.answer(other, station=B),
        here.service.answer(asked, station=A),
    )
    assert [answer.data.status for answer in answers] == ["accepted"] * 3
    assert answers[0] == answers[2] != answers[1]


async def test_after_a_restart_each_station_gets_its_answer_again_and_what_it_did_not_get(tmp_path: Path) -> None:
    asked = request()
    async with station(tmp_path / "state") as before:
        answers = {name: await before.service.answer(asked, station=name) for name in (A, B)}
        await before.service.delivered(answers[A], station=A)
        await before.service.reject(asked.id, MessageError("wrong", reason="wrong"), station=B)
    async with station(tmp_path / "state") as after:
        assert await after.service.undelivered() == [(B, answers[B])]
        await after.service.learn_ids()
        for name, answer in answers.items():
            assert await after.service.answer(asked, station=name) == answer
        assert rejections(after) == [(B, asked.id, "wrong")]


async def test_the_log_names_the_station_where_there_is_one(here: Station, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stationkey"):
        for name in ("", A):
            await here.csr(station=name)
            await asyncio.sleep(0)  # the line is written after the answer
            await here.told("installed", station=name)
            await here.told("installed", station=name)
            await here.service.reject(new_id(), MessageError("wrong", reason="wrong"), station=name)
    told = [getattr(record, "station", "") for record in caplog.records if not hasattr(record, "file")]
    assert told == [""] * (len(told) // 2) + [A] * (len(told) // 2)


# Keys.


async def test_each_station_has_an_active_key_and_a_file_of_its_own(here: Station) -> None:
    keys = {name: await here.key(station=name) for name in ("", A, B)}
    for name in keys:
        await here.told("installed", station=name)
    assert here.states(*keys.values()) == [ACTIVE] * 3
    assert here.shown() == {
        "v2g_certificate.pem": keys[""],
        "station-depot7%2Fs1.v2g_certificate.pem": keys[A],
        "station-depot7%2Fs2.v2g_certificate.pem": keys[B],
    }


async def test_a_change_of_one_station_leaves_the_files_of_others_and_removes_its_own(here: Station) -> None:
    keys = {name: await here.key(station=name) for name in ("", A, B)}
    for name in keys:
        await here.told("installed", station=name)
    files = here.shown()
    planted, foreign = here.active_dir / "station-depot7%2Fs1.v2g_certificate.old.pem", here.active_dir / "x.new"
    for path in (planted, foreign):
        path.write_text("")
    (here.active_dir / "station-depot7%2Fs2.v2g_certificate.pem").write_text("changed by another")
    await here.told("deleted", private_key_path=here.active_dir / "station-depot7%2Fs1.v2g_certificate.pem", station=A)
    assert here.shown() == {name: key for name, key in files.items() if key == keys[""]}
    assert not foreign.exists()
    await here.service.custody.show_active()  # as with each sweep
    assert here.shown() == {name: key for name, key in files.items() if key != keys[A]}
    assert not planted.exists()


async def test_no_status_of_a_station_touches_a_key_of_another_however_it_names_it(here: Station) -> None:
    """By type, EVSE, key id, the file of the active key, that of the key before, and an id that was seen."""
    old = await here.key(V2G, E1, station=A)
    await here.told("installed", V2G, E1, station=A)
    active = await here.key(V2G, E1, station=A)
    await here.told("installed", V2G, E1, station=A)
    pending = await here.key(V2G, E1, station=A)
    before, files = here.states(old, active, pending), here.shown()
    assert before == [DEACTIVATED, ACTIVE, PENDING]
    paths = [*(here.active_dir / name for name in files), *(f"/x/{key}.pem" for key in (old, active, pending)), None]
    assert len(paths) == 6

    for other in (B, "", "depot7", "depot7/s", "depot7/s1/x"):
        for path in paths:
            for evse_id in (E1, None):
                for verb in ("installed", "deleted", "failed_installation"):
                    await here.told(verb, V2G, evse_id, private_key_path=path, station=other)

    assert (here.states(old, active, pending), here.shown()) == (before, files)
    assert not here.record(pending).failed
    assert set(here.counts) == {"accepted", "installed", "status_fits_no_key"}


async def test_a_message_id_of_one_station_is_no_repeat_of_anothers(here: Station) -> None:
    keys = {name: await here.key(station=name) for name in (A, B)}
    same = new_id()
    for name in keys:
        await here.told("installed", message_id=same, station=name)
    assert here.states(*keys.values()) == [ACTIVE] * 2


async def test_the_limits_of_pending_keys_are_of_each_station(here: Station) -> None:
    mine = await here.key(V2G, E1, station=B)
    flood = [await here.key(V2G, E2, station=A) for _ in range(20)]
    assert here.states(mine) == [PENDING]
    assert DESTROYED in here.states(*flood)


async def test_keys_of_each_station_expire(here: Station) -> None:
    keys = [await here.key(station=name) for name in ("", A, B)]
    await here.pass_by(400 * DAY)
    assert here.states(*keys) == [DESTROYED] * 3


# Names.


@pytest.mark.parametrize("name", ODD)
async def test_an_odd_name_is_one_station_with_one_file_inside_active(tmp_path: Path, name: str) -> None:
    assert not station_flaw(name) or name.startswith("$")
    async with station(tmp_path / "state") as here:
        single = await here.key()
        await here.told("installed")
        for number in range(2):
            key = await here.key(V2G, E1, station=name)
            path = next((here.active_dir / file for file, shown in here.shown().items() if shown != single), None)
            await here.told("installed", V2G, E1, station=name)
            assert here.states(key, single) == [ACTIVE, ACTIVE]
            assert len(here.shown()) == 2 + number
        assert path is not None
        assert path.parent == here.active_dir
        assert len(path.name.encode()) < 250
        await here.told("deleted", private_key_path=path, station=name)
        assert here.states(key, single) == [DESTROYED, ACTIVE]
        await here.told("deleted", private_key_path=here.active_dir / "v2g_certificate.pem", station=name)
        assert here.states(single) == [ACTIVE]


async def test_all_odd_names_side_by_side_are_as_many_stations(here: Station) -> None:
    keys = {name: await here.key(station=name) for name in ["", *ODD]}
    for name in keys:
        await here.told("installed", station=name)
    assert set(here.shown().values()) == set(keys.values())
    assert here.counts["active_unwritable"] == 0
    for name, key in keys.items():
        [path] = [here.active_dir / file for file, shown in here.shown().items() if shown == key]
        await here.told("deleted", private_key_path=path, station=name)
        assert here.states(key) == [DESTROYED]
    assert here.shown() == {}


# The certificate directory.


def install(folder: Path, csr: str, *, days: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    leaf = AUTHORITY.sign(csr, begins=NOW - timedelta(days=days))
    (folder / "secc.pem").write_bytes(pem(leaf, AUTHORITY.sub))


async def test_each_station_has_a_certificate_directory_of_its_own(tmp_path: Path) -> None:
    async with station(tmp_path / "state", certificate_dir=tmp_path / "{station}" / "certificates") as here:
        keys = {}
        for name in (A, "..", B):
            csr = await here.csr(station=name)
            keys[name] = key_id_in(csr)
            install(tmp_path / percent_encoded(name) / "certificates", csr)
            await here.key(station=name)  # a newer one, whose certificate is not there
        for name in (A, ".."):
            await here.told("installed", station=name)
        assert here.states(*keys.values()) == [ACTIVE, ACTIVE, PENDING]
        of_a, of_b = (tmp_path / percent_encoded(name) / "certificates" for name in (A, B))
        (of_b / "secc.pem").rename(of_a / "b.pem")
        await here.told("installed", station=B)
        assert here.states(keys[B]) == [PENDING]
        assert here.counts["certificate_of_another_key"] == 1


async def test_a_directory_that_names_no_station_decides_nothing_for_one(tmp_path: Path) -> None:
    """It may hold the certificates of others, and lack its own: so it is as if it were not known."""
    shared = tmp_path / "certificates"
    async with station(tmp_path / "state", certificate_dir=shared) as here:
        older = await here.csr(station=A)
        install(shared, older)
        newer = await here.key(station=A)
        await here.told("installed", station=A)
        assert here.states(key_id_in(older), newer) == [PENDING, ACTIVE]


# Waiting.


async def test_while_a_key_store_is_away_a_flood_of_statuses_leaves_anothers_in_order_and_applied(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flood is given up beyond its share; of the other station nothing is."""
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.01)
    keys = {name: await here.key(station=name) for name in (A, B)}
    away, tries, known, loop = [True], [0], asyncio.Event(), asyncio.get_running_loop()

    def proved(*arguments: object) -> None:
        if away[0]:
            tries[0] += 1
            if tries[0] > 1:  # a second try: what the first waits for is known, and no further one need be patient
                loop.call_soon_threadsafe(known.set)
            raise KeyStoreError("away", reason="tpm_unreachable", transient=True)
        prove(*arguments)  # type: ignore[arg-type] # the original's

    monkeypatch.setattr(statuses, "prove", proved)
    async with asyncio.TaskGroup() as group:
        group.create_task(here.told("installed", station=A))
        await known.wait()
        for _ in range(99):
            group.create_task(here.told("installed", station=A))
        for verb in ("installed", "deleted"):
            group.create_task(here.told(verb, private_key_path=f"/x/{keys[B]}.pem", station=B))
        while here.counts["tpm_unreachable"] < 100 - statuses.MAX_WAITING:  # noqa: ASYNC110 - a count has no event
            await asyncio.sleep(0.01)
        away[0] = False
    assert here.states(keys[A], keys[B]) == [ACTIVE, DESTROYED]
    assert here.events(keys[B])[-2:] == ["installed", "deleted"]


async def test_one_station_that_waits_for_its_key_holds_up_no_other(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {name: await here.key(station=name) for name in (A, B)}
    reached, gate, complete = asyncio.Event(), asyncio.Event(), here.service._josev_files.look  # noqa: SLF001 - where it waits

    async def slow(told: object, whose: str) -> object:
        if whose == A:
            reached.set()
            await gate.wait()
        return await complete(told, whose)  # type: ignore[arg-type] # the original's

    monkeypatch.setattr(here.service._josev_files, "look", slow)  # noqa: SLF001 - same
    waiting = asyncio.create_task(here.told("installed", station=A))
    await reached.wait()
    await here.told("installed", station=B)
    assert here.states(keys[A], keys[B]) == [PENDING, ACTIVE]
    gate.set()
    await waiting
    assert here.states(keys[A]) == [ACTIVE]


# Renewal.


async def test_a_certificate_that_is_due_is_told_with_its_station(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with station(tmp_path / "state", certificate_dir=tmp_path / "{station}") as here:
        for name in (A, B):
            csr = await here.csr(STATION, station=name)
            install(tmp_path / percent_encoded(name), csr)
            await here.told("installed", STATION, station=name)
        here.clocks.pass_by(80 * DAY)
        with caplog.at_level(logging.WARNING):
            await here.service.renewal.look()
        due = here.service.renewal.due
        assert sorted(certificate.station for certificate in due) == [A, B]
        assert [certificate.told()[4] for certificate in due] == [certificate.station for certificate in due]
        told = [record for record in caplog.records if getattr(record, "reason", "") == "certificate_due"]
        assert sorted(record.station for record in told) == [A, B]  # type: ignore[attr-defined]


async def test_a_station_whose_certificates_are_all_due_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationkey.service.renewal.WATCHED", 6)
    monkeypatch.setattr("stationkey.service.renewal.WATCHED_OF_STATION", 3)
    async with station(tmp_path / "state", certificate_dir=tmp_path / "{station}") as here:
        for name, evse_ids in ((A, range(6)), (B, range(1))):
            for number in evse_ids:
                csr = await here.csr(V2G, f"DE*ABC*E{number}", station=name)
                install(tmp_path / percent_encoded(name), csr, days=2 if name == A else 1)
                await here.told("installed", V2G, f"DE*ABC*E{number}", station=name)
        here.clocks.pass_by(80 * DAY)
        await here.service.renewal.look()
        assert sorted(certificate.station for certificate in here.service.renewal.due) == [A, A, A, B]


async def test_a_status_from_an_old_session_is_not_followed_by_its_copy_from_the_new_one(here: Station) -> None:
    """It came before the station had a key, and is read again when it has one."""
    opened = asyncio.Event()
    opened.set()
    shard = cast("Shard", SimpleNamespace(service=here.service, opened=opened))
    early = status("deleted", V2G)
    await AllShards(lambda _: shard).note_status(early, station=A)
    key = await here.key(station=A)
    await here.told("installed", station=A)

    await here.service.note_status(early, station=A)
    assert here.states(key) == [ACTIVE]
    await here.service.note_status(early, station=A)  # sent once more, which nothing tells from a new one
    assert here.states(key) == [DESTROYED]


async def test_the_copies_that_are_expected_are_bounded(here: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statuses, "MAX_COPIES", 2)
    key = await here.key(station=A)
    await here.told("installed", station=A)
    early = [status("deleted", V2G) for _ in range(3)]
    for one in early:
        here.service.expect_copy(one, station=A)

    for one in reversed(early[1:]):
        await here.service.note_status(one, station=A)
    assert here.states(key) == [ACTIVE]
    await here.service.note_status(early[0], station=A)
    assert here.states(key) == [DESTROYED]
