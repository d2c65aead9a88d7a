"""Which ids may have been answered: never wrong about one that was, and seldom about another."""

from __future__ import annotations

import sys
import uuid

from stationkey.service.seen_ids import SeenIds

IDS = [str(uuid.UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128))) for number in range(1, 20_001)]


def test_an_id_that_was_added_is_always_known_in_any_letter_case() -> None:
    seen = SeenIds()
    seen.update(IDS[:10_000])
    assert all(known in seen and known.upper() in seen for known in IDS[:10_000])


def test_an_id_that_was_not_is_hardly_ever_taken_for_one_that_was() -> None:
    """By chance one in 40,000 is; a hundred in 10,000 would be a fault."""
    seen = SeenIds()
    assert IDS[0] not in seen
    seen.update(IDS[:10_000])
    assert sum(new in seen for new in IDS[10_000:]) < 100


def test_it_takes_the_same_room_however_many_there_are() -> None:
    seen = SeenIds()
    before = sys.getsizeof(seen._table)  # noqa: SLF001 - what it is made of
    seen.update(IDS)
    assert sys.getsizeof(seen._table) == before < 132 * 1024  # noqa: SLF001 - same
