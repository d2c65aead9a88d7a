"""The requests and statuses on record, each with what became of it. Nothing here writes."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from stationkey.ledger.engine import Engine
from stationkey.ledger.overview import IGNORED, REJECTED, Happening, read_happening

REQUEST: Final = "generate_csr"
STATUS: Final = "certificate_installation_status"


class Place(Struct, frozen=True):
    """How far the record was read: the last event of a key, and the last rejection."""

    event: int = 0
    rejection: int = 0


_START: Final = Place()
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
    wanted = {"beginning": beginning, "length": len(beginning), "limit": limit}
    with engine.reading() as sql:
        events = sql.execute(_EVENTS.format(mine=sql.mine("key")), {**wanted, "after": after.event}).fetchall()
        rejections = sql.execute(
            _REJECTIONS.format(mine=sql.mine("rejection")), {**wanted, "after": after.rejection}
        ).fetchall()
    read = Place(
        event=max((after.event, *(row[0] for row in events))),
        rejection=max((after.rejection, *(row[0] for row in rejections))),
    )
    found = [read_happening(row[1:]) for row in (*reversed(events), *reversed(rejections))]
    return sorted(found, key=lambda happening: happening.at)[-limit:], read
