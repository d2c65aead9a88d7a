"""The requests and statuses on record, each with what became of it. Nothing here writes."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from stationkey.ledger.database import Database
from stationkey.ledger.overview import IGNORED, REJECTED, Happening, read_happening

REQUEST: Final = "generate_csr"
STATUS: Final = "certificate_installation_status"


class Place(Struct, frozen=True):
    """How far the record was read: the last event of a key, and the last rejection."""

    event: int = 0
    rejection: int = 0


_START: Final = Place()
_EVENTS: Final = (
    "SELECT seq, at, event, '', reason, certificate_type, evse_id, common_name, key_id, message_id FROM event"
    " JOIN key ON number = key_number WHERE message_id IS NOT NULL AND seq > ?1"
    " AND lower(substr(message_id, 1, length(?2))) = ?2 ORDER BY seq DESC LIMIT ?3"
)
_REJECTIONS: Final = (
    f"SELECT seq, at, iif(name = '{REQUEST}', '{REJECTED}', '{IGNORED}'), reason, message, '', '', '', '', request_id"  # noqa: S608 - this package's own text
    " FROM rejection WHERE seq > ?1 AND lower(substr(request_id, 1, length(?2))) = ?2 ORDER BY seq DESC LIMIT ?3"
)


def newest(
    database: Database, limit: int, *, after: Place = _START, beginning: str = ""
) -> tuple[list[Happening], Place]:
    """Return the newest messages, oldest first, and how far that was read.

    Args:
        database: the ledger's.
        limit: how many at most.
        after: leave out messages that were read before.
        beginning: only messages whose id begins with this, in either letter case.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    with database.reading() as sql:
        events = sql.execute(_EVENTS, (after.event, beginning.lower(), limit)).fetchall()
        rejections = sql.execute(_REJECTIONS, (after.rejection, beginning.lower(), limit)).fetchall()
    read = Place(
        event=max((after.event, *(row[0] for row in events))),
        rejection=max((after.rejection, *(row[0] for row in rejections))),
    )
    found = [read_happening(row[1:]) for row in (*reversed(events), *reversed(rejections))]
    return sorted(found, key=lambda happening: happening.at)[-limit:], read
