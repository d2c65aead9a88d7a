"""The files under active/ of a shard: of the stations whose keys changed, whoever changed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from depots import open_engine, take
from postgresql import Database
from recording import answer, bring

from parts import V2G, request
from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.keystore.registry import keystore_opener
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import KeyStoreThread
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.postgresql.slots import shard_of
from stationkey.ledger.worker import LedgerThread
from stationkey.service import custody as module
from stationkey.service.active_files import ActiveDirectory
from stationkey.service.custody import Custody
from stationkey.service.running_time import RunningTime
from stationkey.system.counters import Counters

pytest_plugins = ["depots"]

STATIONS = [f"depot/s{number}" for number in range(30)]
MINE = [station for station in STATIONS if shard_of(station, 2) == 0]


class Shard:
    """The first of two shards, and an operator beside it."""

    def __init__(self, depot: Database, folder: Path) -> None:
        self.files = folder / DIRECTORY_NAME
        self.operator = Ledger.on(open_engine(depot, folder))
        self._ledger = Ledger.on(open_engine(depot, folder, shard=take(depot, 0, 2)))
        opener = keystore_opener("software:", allow_software_keys=True)
        self._thread = LedgerThread(self._ledger)
        self.custody = Custody(
            KeyStores.only("software:", KeyStoreThread(opener)),
            self._thread,
            ActiveDirectory(folder),
            running=RunningTime(0),
            counters=Counters(),
        )

    def close(self) -> None:
        self.custody.keystores.close()
        self._thread.close()
        self._ledger.close()
        self.operator.close()

    def install(self, station: str) -> str:
        key_id = answer(self.operator, request(V2G), station=station)
        bring(self.operator, key_id, KeyEvent.INSTALLED)
        return key_id

    def shown(self) -> int:
        return len([file for file in self.files.iterdir() if file.name != ".lock"])


@pytest.fixture
def shard(depot: Database, tmp_path: Path) -> Iterator[Shard]:
    with closing(Shard(depot, tmp_path)) as made:
        yield made


async def test_at_first_the_files_of_all_its_stations_are_written(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART", 2)
    for station in STATIONS:
        shard.install(station)

    await shard.custody.show_active()

    assert len(MINE) > 4
    assert shard.shown() == len(MINE)


async def test_then_only_those_of_stations_with_an_event_are_looked_at(shard: Shard) -> None:
    keys = {station: shard.install(station) for station in MINE}
    await shard.custody.show_active()
    [untouched, retired, *_] = MINE
    for file in shard.files.iterdir():
        if file.name != ".lock":
            file.write_bytes(b"touched")

    shard.operator.transitions.apply(keys[retired], KeyEvent.RETIRED, reason="", now=0)
    await shard.custody.show_active()

    assert shard.shown() == len(MINE) - 1
    assert {file.read_bytes() for file in shard.files.iterdir()} == {b"touched", b""}
    shard.install(untouched)
    await shard.custody.show_active()
    assert len({file.read_bytes() for file in shard.files.iterdir()}) > 2


async def test_what_a_killed_daemon_left_is_removed_and_others_files_stay(shard: Shard) -> None:
    other = next(station for station in STATIONS if station not in MINE)
    shard.install(MINE[0])
    shard.files.mkdir()
    for station in (MINE[1], other):
        name = f"station-{station.replace('/', '%2F')}.{V2G}.pem"
        (shard.files / name).write_bytes(b"left")

    await shard.custody.show_active()

    assert [file.name for file in shard.files.iterdir() if file.read_bytes() == b"left"] == [
        f"station-{other.replace('/', '%2F')}.{V2G}.pem"
    ]
    assert shard.shown() == 2


async def test_what_could_not_be_written_is_tried_again(shard: Shard) -> None:
    shard.install(MINE[0])
    shard.files.write_bytes(b"in the way")

    await shard.custody.show_active()
    shard.files.unlink()
    await shard.custody.show_active()

    assert shard.shown() == 1
