"""The requests and statuses on record, each with what became of it. Nothing here writes."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from stationkey.ledger.engine import Engine, Sql
from stationkey.ledger.overview import IGNORED, REJECTED, Happening, read_happening

REQUEST: Final = "generate_csr"
STATUS: Final = "certificate_installation_status"


class Place(Struct, frozen=True):
    """How far the record was read.

    Attributes:
        event: the last event of a key.
        rejection: the last rejection.
        events: those before it that are not to be read again.
        rejections: the same.
    """

    event: int = 0
    rejection: int = 0
    events: frozenset[int] = frozenset()
    rejections: frozenset[int] = frozenset()


_START: Final = Place()
_AGAIN: Final = 1000
"""How many events are read again where several daemons write: one may commit after the next in number was read."""
_EVENTS: Final = (
    "SELECT seq, at, event, '', reason, certificate_type, evse_id, common_name, key_id, message_id,"
    " station FROM event JOIN key ON number = key_number WHERE message_id IS NOT NULL AND seq > :after"
    " AND lower(substr(message_id, 1, :length)) = :beginning{mine} ORDER BY seq DESC LIMIT :limit"
)
_REJECTIONS: Final = (
    f"SELECT seq, at, CASE name WHEN '{REQUEST}' THEN '{REJECTED}' ELSE '{IGNORED}' END, reason, message, '', '', '',"  # noqa: S608 - this package's own text
    " '', request_id, station FROM rejection WHERE seq > :after"
    " AND lower(substr(request_id, 1, :length)) = :beginning{mine} ORDER BY seq DESC LIMIT :limit"
)


def newest(engine: Engine, limit: int, *, after: Place = _START, beginning: str = "") -> tuple[list[Happening], Place]:
    """Return the newest messages, oldest first, and how far that was read.

    Args:
        engine: the ledger's.
        limit: how many at most.
        after: leave out messages that were read before.
        beginning: only messages whose id begins with this, in either letter case.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    beginning = beginning.lower()
    again = 0 if engine.local else _AGAIN
    wanted = {"beginning": beginning, "length": len(beginning), "limit": limit + again}
    with engine.reading() as sql:
        # Before the rest is read: what is committed meanwhile is not among them, and is read the next time.
        known = [_numbers(sql, table, again) for table in ("event", "rejection")]
        read = sql.execute(_EVENTS.format(mine=sql.mine("key")), {**wanted, "after": after.event - again})
        events = [row for row in read.fetchall() if row[0] not in after.events]
        read = sql.execute(_REJECTIONS.format(mine=sql.mine("rejection")), {**wanted, "after": after.rejection - again})
        rejections = [row for row in read.fetchall() if row[0] not in after.rejections]
    seen = [numbers.union(row[0] for row in rows) for numbers, rows in zip(known, (events, rejections), strict=True)]
    place = Place(max((after.event, *seen[0])), max((after.rejection, *seen[1])), *(seen if again else ()))
    found = [read_happening(row[1:]) for row in (*reversed(events), *reversed(rejections))]
    return sorted(found, key=lambda happening: happening.at)[-limit:], place


def _numbers(sql: Sql, table: str, count: int) -> frozenset[int]:
    """Return the numbers of the last rows of a table."""
    if not count:
        return frozenset()
    statement = f"SELECT seq FROM {table} WHERE seq > (SELECT coalesce(max(seq), 0) FROM {table}) - ?"  # noqa: S608 - a name of ours
    return frozenset(seq for (seq,) in sql.execute(statement, (count,)).fetchall())
