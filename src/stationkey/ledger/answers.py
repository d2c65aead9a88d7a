"""Accepted answers, each with the key that its CSR is for."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Final

from stationkey.config.settings import Bounds
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.ledger.database import Database
from stationkey.ledger.lifecycle import CSR_ANSWERED, INITIAL, KeyEvent, KeyState
from stationkey.ledger.migrations import LIVING
from stationkey.ledger.records import Answered, content_digest
from stationkey.ledger.transitions import advance, give_owner, note

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef


_PART: Final = 1000
"""How many ids are read at a time."""

_PENDING_OWNERS: Final = (
    "SELECT certificate_type, evse_id, own FROM (SELECT certificate_type, evse_id, count(*) AS own,"  # noqa: S608 - `LIVING` is this package's own text
    " min(asked) AS oldest, sum(count(*)) OVER (PARTITION BY certificate_type) AS of_type FROM key"
    f" WHERE state = :pending AND certificate_type > '' AND {LIVING} GROUP BY certificate_type, evse_id) AS waiting"
    " ORDER BY of_type DESC, EXISTS (SELECT 1 FROM key WHERE state = :active AND certificate_type ="
    f" waiting.certificate_type AND evse_id = waiting.evse_id AND {LIVING}), own DESC, oldest LIMIT 2"
)
"""Who has pending keys and how many: the two who are first to lose one, see `_most_crowded`."""


class Answers:
    """The accepted answers on record."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, request_id: str) -> Answered | None:
        """The accepted answer to `request_id` in any letter case, or None."""
        with self._database.reading() as sql:
            row = sql.execute(
                "SELECT request_id, digest, csr, key_id FROM answer JOIN key ON key.number = answer.key_number"
                " WHERE canonical_id = ?",
                (request_id.lower(),),
            ).fetchone()
        return None if row is None else Answered(*row)

    def ids(self, *, after: str = "") -> list[str]:
        """Ids that were answered, in lower case and in order, a part at a time: those that come after `after`."""
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT canonical_id FROM answer WHERE canonical_id > ? ORDER BY canonical_id LIMIT ?", (after, _PART)
            ).fetchall()
        return [row[0] for row in rows]

    def record(
        self,
        request: GenerateCsrRequest,
        key: KeyRef,
        csr: str,
        *,
        now: int,
        running: int,
        due: int,
        bounds: Bounds,
        ahead: bool = False,
    ) -> list[str]:
        """Write down a key and the answer that carries its CSR, durably and both or neither.

        A key that was made ahead gets its owner by this; any other is put on record.

        Args:
            request: the request answered.
            key: the key made for it, or taken from those made ahead, wrapped private part included.
            csr: the PEM.
            now: Unix time in milliseconds.
            running: the running time now, in milliseconds.
            due: when the key expires if no certificate comes, in milliseconds of running time.
            bounds: how many keys may be pending.
            ahead: whether the key was made ahead: then it is on record, and must have no owner yet.

        Returns:
            The names of older pending keys that had to make room, and are destroyed.

        Raises:
            LedgerError: nothing was written. With reason ``key_taken``, the key has an owner already, or was made ahead
                and is destroyed since: another one can be tried.
        """
        data = request.data
        owner = (data.certificate_type, request.evse_id or "")
        with self._database.transaction() as sql:
            number = give_owner(sql, request, key, now=now, due=due, ahead=ahead)
            sql.execute(
                "INSERT INTO answer (key_number, canonical_id, request_id, digest, csr, answered_at, running)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, request.id.lower(), request.id, content_digest(request), csr, now, running),
            )
            note(sql, number, CSR_ANSWERED, INITIAL, reason="", now=now, message_id=request.id)
            return _make_room(sql, owner, bounds, now=now)

    def withdraw(self, request_id: str, *, now: int) -> None:
        """Take back an answer that must not go out: its key is destroyed, and its id may be asked again.

        Raises:
            LedgerError: nothing was written.
        """
        with self._database.transaction() as sql:
            answered = self.find(request_id)
            if answered is None:
                return
            advance(sql, answered.key_id, KeyEvent.EXPIRED, reason="its CSR did not verify", now=now)
            sql.execute("DELETE FROM answer WHERE canonical_id = ?", (request_id.lower(),))

    def mark_delivered(self, request_id: str) -> None:
        """Note that the broker has the answer. May be called from any thread.

        Written with the next transaction: forgotten in a crash, the same answer is only published once more.
        """
        self._database.defer("UPDATE answer SET delivered = 1 WHERE canonical_id = ?", request_id.lower())

    def undelivered(self) -> list[Answered]:
        """The accepted answers that no broker has confirmed, oldest first."""
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT request_id, digest, csr, key_id FROM answer JOIN key ON key.number = answer.key_number"
                " WHERE delivered = 0 ORDER BY running"
            ).fetchall()
        return [Answered(*row) for row in rows]


def _make_room(sql: sqlite3.Connection, owner: tuple[str, str], bounds: Bounds, *, now: int) -> list[str]:
    """End the oldest pending keys beyond the bounds; those made ahead are none of them."""
    pending = f"SELECT count(*) FROM key WHERE state = ?1 AND {LIVING} AND certificate_type"  # noqa: S608 - `LIVING` is this package's own text
    own, every = sql.execute(
        f"SELECT ({pending} = ?2 AND evse_id = ?3), ({pending} > '')", (INITIAL, *owner)
    ).fetchone()
    crowded = []
    if own > bounds.pending_limit:
        crowded = _end_oldest(sql, owner, count=own - bounds.pending_limit, now=now)
    # After its own: where one of those went, nobody else's has to.
    for _ in range(every - len(crowded) - bounds.pending_total):
        crowded += _end_oldest(sql, _most_crowded(sql, owner), count=1, now=now)
    return crowded


def _most_crowded(sql: sqlite3.Connection, newest: tuple[str, str]) -> tuple[str, str]:
    """The owner who loses a pending key for the one that `newest` just got, and has another one to lose.

    Of the certificate type that has the most of them: what is asked of one type never costs another type a key,
    unless that has more. In it, of an EVSE that has no key in use, before one that does: EVSE IDs are quickly made
    up. Then of the one that has the most, and of several such whoever has the oldest.
    """
    owners = sql.execute(_PENDING_OWNERS, {"pending": INITIAL, "active": KeyState.ACTIVE}).fetchall()
    others = [row[:2] for row in owners if row[:2] != newest or row[2] > 1]
    return others[0] if others else newest


def _end_oldest(sql: sqlite3.Connection, owner: tuple[str, str], *, count: int, now: int) -> list[str]:
    rows = sql.execute(
        f"SELECT key_id FROM key WHERE state = ? AND certificate_type = ? AND evse_id = ? AND {LIVING}"  # noqa: S608 - `LIVING` is this package's own text
        " ORDER BY asked LIMIT ?",
        (INITIAL, *owner, count),
    ).fetchall()
    for (key_id,) in rows:
        advance(sql, key_id, KeyEvent.EXPIRED, reason="too many keys were pending", now=now)
    return [key_id for (key_id,) in rows]
