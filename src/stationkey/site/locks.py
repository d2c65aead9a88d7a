"""The advisory locks in PostgreSQL by which daemons share a site.

A lock belongs to a connection: PostgreSQL releases it when the connection ends, whatever the daemon does. Each lock has
two numbers, a class and an object of it [PostgreSQL: Advisory Locks]; ``pg_locks`` shows who has them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final
from zlib import crc32

CHANNEL: Final = "stationkey_shards"
"""Notified when a shard becomes free, so that the next daemon takes it at once."""


class LockClass(IntEnum):
    """Classes of locks. A migration of the schema takes 0x534B0004."""

    PRESENCE = 0x534B0001
    """Shared by all daemons that can take shards; the object is their `layout`."""
    SHARD = 0x534B0002
    """Of the daemon that serves a shard; the object is the shard's number."""
    TAKING = 0x534B0003
    """Held in a transaction that takes shards; the object is 0."""


def layout(shards: int, client_id: str) -> int:
    """Return a number for a cut of the site: daemons with different ones must not serve together.

    Args:
        shards: number of shards.
        client_id: what the client identifiers of the MQTT sessions begin with.
    """
    return crc32(f"{shards} {client_id}".encode()) & 0x7FFFFFFF
