"""Which shard a station belongs to: the same rule here and in the database's generated column ``slot``."""

from __future__ import annotations

import hashlib
from typing import Final

SLOTS: Final = 4096
"""Slots of stations. A shard is a range of them, so that an index finds its rows, whatever the number of shards."""
SLOT_COLUMN: Final = (
    "slot integer NOT NULL GENERATED ALWAYS AS (('x' || substr(md5(station), 1, 3))::bit(12)::integer) STORED"
)
"""The slot of a row with a column ``station``."""


def slot_of(station: str) -> int:
    """Return the slot of a station."""
    return int(hashlib.md5(station.encode(), usedforsecurity=False).hexdigest()[:3], 16)


def shard_of(station: str, shards: int) -> int:
    """Return the number of the shard of a station, from 0.

    Args:
        station: its name.
        shards: how many shards there are.
    """
    return slot_of(station) * shards // SLOTS


def slots_of(shard: int, shards: int) -> range:
    """Return the slots of a shard."""
    return range(-(-shard * SLOTS // shards), -(-(shard + 1) * SLOTS // shards))
