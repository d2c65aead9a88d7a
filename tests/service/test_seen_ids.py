"""Which ids may have been answered: never wrong about one that was, and seldom about another."""

from __future__ import annotations

import sys
import uuid

import pytest

from stationkey.service.seen_ids import SeenIds

IDS = [str(uuid.UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128))) for number in range(1, 20_001)]
ADDED = [("", known) for known in IDS[:10_000]]


@pytest.mark.parametrize("station", ["", "depot7/s1"])
def test_an_id_that_was_added_is_always_known_in_any_letter_case(station: str) -> None:
    seen = SeenIds()
    seen.update((station, known) for known in IDS[:10_000])
    assert all(seen.may_have(known, station) and seen.may_have(known.upper(), station) for known in IDS[:10_000])


def test_an_id_that_was_not_is_hardly_ever_taken_for_one_that_was() -> None:
    """By chance one in 40,000 is; a hundred in 10,000 would be a fault."""
    seen = SeenIds()
    assert not seen.may_have(IDS[0])
    seen.update(ADDED)
    assert sum(map(seen.may_have, IDS[10_000:])) < 100


def test_an_id_of_one_station_is_hardly_ever_taken_for_that_of_another() -> None:
    seen = SeenIds()
    seen.update(ADDED)
    assert sum(seen.may_have(known, "depot7/s1") for known in IDS[:10_000]) < 100


def test_it_takes_the_same_room_however_many_there_are() -> None:
    seen = SeenIds()
    before = sys.getsizeof(seen._table)  # noqa: SLF001 - what it is made of
    seen.update(("", known) for known in IDS)
    assert sys.getsizeof(seen._table) == before < 132 * 1024  # noqa: SLF001 - same
