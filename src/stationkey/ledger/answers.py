"""Accepted answers: record, find, redeliver, and the bounds on pending keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from stationkey.config.settings import Bounds
from stationkey.contract.active_names import Owner
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.ledger.engine import Engine, Sql
from stationkey.ledger.lifecycle import CSR_ANSWERED, INITIAL, KeyEvent, KeyState
from stationkey.ledger.migrations import LIVING, of_types
from stationkey.ledger.records import Answered, content_digest
from stationkey.ledger.transitions import advance, give_owner

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef


_PART: Final = 1000
"""How many ids `Answers.ids` returns at most."""

_PENDING_OWNERS: Final = (
    "SELECT certificate_type, evse_id, own FROM (SELECT certificate_type, evse_id, count(*) AS own,"  # noqa: S608 - `LIVING` is this package's own text
    " min(asked) AS oldest, sum(count(*)) OVER (PARTITION BY certificate_type) AS of_type FROM key"
    f" WHERE state = :pending AND station = :station AND {{types}} AND {LIVING}"
    " GROUP BY certificate_type, evse_id) AS waiting ORDER BY of_type DESC,"
    " EXISTS (SELECT 1 FROM key WHERE state = :active AND station = :station"
    f" AND certificate_type = waiting.certificate_type AND evse_id = waiting.evse_id AND {LIVING}),"
    " own DESC, oldest LIMIT 2"
)
"""The two owners of a station that are first to lose a pending key, with their number of pending keys; see
`_most_crowded`."""


_PENDING_STATIONS: Final = (
    "SELECT station, own FROM (SELECT station, count(*) AS own, min(asked) AS oldest FROM key"  # noqa: S608 - `LIVING` is this package's own text
    f" WHERE state = :pending AND {{types}} AND {LIVING}{{mine}} GROUP BY station) AS waiting ORDER BY own DESC,"
    f" EXISTS (SELECT 1 FROM key WHERE state = :active AND station = waiting.station AND {LIVING}), oldest LIMIT 2"
)
"""The two stations of a shard that are first to lose a pending key, with their number of pending keys."""

_AT_ONCE: Final = 32
"""Keys of other stations that one request destroys at most, after a limit was lowered."""


_COUNTED: Final = 4096
"""Most upper bounds kept in memory: one per station and key store."""


class Crowded(NamedTuple):
    """A pending key that was destroyed to keep a bound, and the station that it was made for."""

    key_id: str
    station: str


class _AtMost:
    """Upper bounds on numbers of pending keys, so that they are counted only when a limit may be reached.

    Only `Answers.record` adds a pending key. A failed commit leaves the bound one too high.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def excess(self, which: Hashable, limit: int, count: Callable[[], int]) -> int:
        """Return by how many the pending keys exceed a limit after one was added; 0 or less if they do not.

        Args:
            which: what is counted.
            limit: most pending keys.
            count: counts them, with the one that was added.
        """
        known = self._known.get(which, limit) + 1
        excess = 0
        if known > limit:
            known = count()
            excess = known - limit
        if len(self._known) >= _COUNTED:
            self._known.clear()
        self._known[which] = known
        return excess


class Answers:
    """The accepted answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending = _AtMost()

    def find(self, request_id: str, *, station: str = "") -> Answered | None:
        """Return the accepted answer to a station's request, or None. The letter case of the id does not matter."""
        with self._engine.reading() as sql:
            row = sql.execute(
                "SELECT request_id, digest, csr, key_id, answer.station"
                " FROM answer JOIN key ON key.number = answer.key_number"
                " WHERE answer.station = ? AND canonical_id = ?",
                (station, request_id.lower()),
            ).fetchone()
        return None if row is None else Answered(*row)

    def ids(self, *, after: tuple[str, str] = ("", "")) -> list[tuple[str, str]]:
        """Return the next answered ids after `after`, sorted; none if that was the last.

        Returns:
            Each as its station and the id in lower case.
        """
        with self._engine.reading() as sql:
            return sql.execute(
                "SELECT station, canonical_id FROM answer WHERE (station, canonical_id) > (?, ?)"  # noqa: S608 - the engine's own text
                f"{sql.mine('answer')} ORDER BY station, canonical_id LIMIT ?",
                (*after, _PART),
            ).fetchall()

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
        station: str = "",
    ) -> list[Crowded]:
        """Record a key and the answer with its CSR in one transaction.

        Args:
            request: the request.
            key: the key with its wrapped private part.
            csr: the CSR in PEM.
            now: Unix time in milliseconds.
            running: running time in milliseconds.
            due: expiry of the key if no certificate is installed, in milliseconds of running time.
            bounds: how many keys of the station, and of all stations of the shard, may be pending.
            ahead: whether the key was made ahead: then it is on record and gets its owner now.
            station: which station asks.

        Returns:
            The older pending keys destroyed to keep the bounds.

        Raises:
            LedgerError: nothing was written. With reason ``key_taken``, the key has an owner or was destroyed; try
                another.
        """
        data = request.data
        owner = Owner(station, data.certificate_type, request.evse_id or "")
        with self._engine.transaction() as sql:
            number, seq = give_owner(sql, request, key, station=station, now=now, due=due, ahead=ahead)
            sql.execute(
                "INSERT INTO answer (key_number, station, canonical_id, request_id, digest, csr, answered_at, running)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (number, station, request.id.lower(), request.id, content_digest(request), csr, now, running),
            )
            sql.execute(
                "INSERT INTO event (seq, key_number, at, event, state, reason, message_id)"
                " VALUES (?, ?, ?, ?, ?, '', ?)",
                (seq, number, now, CSR_ANSWERED, INITIAL, request.id),
            )
            return _make_room(sql, owner, bounds, self._pending, now=now)

    def withdraw(self, request_id: str, *, now: int, station: str = "") -> None:
        """Delete an answer that must not be published and destroy its key; the id may be used again.

        Raises:
            LedgerError: nothing was written.
        """
        with self._engine.transaction() as sql:
            answered = self.find(request_id, station=station)
            if answered is None:
                return
            advance(sql, answered.key_id, KeyEvent.EXPIRED, reason="its CSR did not verify", now=now)
            sql.execute("DELETE FROM answer WHERE station = ? AND canonical_id = ?", (station, request_id.lower()))

    def mark_delivered(self, request_id: str, *, station: str = "") -> None:
        """Note that the broker has the answer. Any thread may call this; it does not wait for the disk.

        Written with the next transaction. If a crash loses it, the answer is published again.
        """
        self._engine.defer(
            "UPDATE answer SET delivered = 1 WHERE station = ? AND canonical_id = ?", station, request_id.lower()
        )

    def undelivered(self) -> list[Answered]:
        """Return the answers that no broker has confirmed, oldest first."""
        with self._engine.reading() as sql:
            rows = sql.execute(
                "SELECT request_id, digest, csr, key_id, answer.station"  # noqa: S608 - the engine's own text
                " FROM answer JOIN key ON key.number = answer.key_number"
                f" WHERE delivered = 0{sql.mine('answer')} ORDER BY running"
            ).fetchall()
        return [Answered(*row) for row in rows]


def _make_room(sql: Sql, owner: Owner, bounds: Bounds, pending: _AtMost, *, now: int) -> list[Crowded]:
    """Destroy the oldest pending keys beyond the bounds, and return them. Keys made ahead do not count."""
    types, named = of_types(bounds.types)
    of_owner = {"station": owner.station, "type": owner.certificate_type, "evse_id": owner.evse_id}
    own = _count(sql, "station = :station AND certificate_type = :type AND evse_id = :evse_id", of_owner)
    crowded = []
    if own > bounds.pending_limit:
        crowded = _end_oldest(sql, owner, count=own - bounds.pending_limit, now=now)

    # The owner's own keys came first: each that goes saves one of another owner.
    of_station = partial(_count, sql, f"station = :station AND {types}", {"station": owner.station, **named})
    for _ in range(pending.excess((owner.station, bounds.types), bounds.pending_total, of_station)):
        crowded += _end_oldest(sql, _most_crowded(sql, owner, bounds), count=1, now=now)
    if bounds.pending_of_shard is not None:
        of_shard = partial(_count, sql, types + sql.mine("key"), named)
        for _ in range(min(pending.excess(bounds.types, bounds.pending_of_shard, of_shard), _AT_ONCE)):
            crowded += _end_oldest(sql, _most_crowded(sql, _in_largest(sql, owner, bounds), bounds), count=1, now=now)
    return crowded


def _count(sql: Sql, which: str, named: Mapping[str, object]) -> int:
    """Count pending keys."""
    (count,) = sql.execute(
        f"SELECT count(*) FROM key WHERE state = :pending AND {LIVING} AND {which}",  # noqa: S608 - this package's own text
        {"pending": INITIAL, **named},
    ).fetchone()
    return int(count)


def _in_largest(sql: Sql, newest: Owner, bounds: Bounds) -> Owner:
    """Return an owner in the station of the shard that loses a pending key for the one that `newest` just got.

    That with the most pending keys, so that a flood of one station costs another nothing; among equals one without an
    active key; then that with the oldest. It is `newest` itself in its own station, so that its key is not the one.
    """
    types, named = of_types(bounds.types)
    stations = sql.execute(
        _PENDING_STATIONS.format(types=types, mine=sql.mine("key")),
        {"pending": INITIAL, "active": KeyState.ACTIVE, **named},
    ).fetchall()
    station = next((name for name, own in stations if name != newest.station or own > 1), newest.station)
    return newest if station == newest.station else Owner(station, "", "")


def _most_crowded(sql: Sql, newest: Owner, bounds: Bounds) -> Owner:
    """Return the owner that loses a pending key for the one that `newest` just got.

    One of the same station, from the certificate type with the most pending keys: requests for one type cost another
    type a key only if that has more. Among its EVSEs first one without an active key, because EVSE IDs are easily made
    up; then the one with the most pending keys; then the one with the oldest.
    """
    types, named = of_types(bounds.types)
    owners = sql.execute(
        _PENDING_OWNERS.format(types=types),
        {"pending": INITIAL, "active": KeyState.ACTIVE, "station": newest.station, **named},
    ).fetchall()
    found = [(Owner(newest.station, certificate_type, evse_id), own) for certificate_type, evse_id, own in owners]
    others = [owner for owner, own in found if owner != newest or own > 1]
    return others[0] if others else newest


def _end_oldest(sql: Sql, owner: Owner, *, count: int, now: int) -> list[Crowded]:
    rows = sql.execute(
        f"SELECT key_id FROM key WHERE state = ? AND station = ? AND certificate_type = ? AND evse_id = ? AND {LIVING}"  # noqa: S608 - `LIVING` is this package's own text
        " ORDER BY asked LIMIT ?",
        (INITIAL, *owner, count),
    ).fetchall()
    for (key_id,) in rows:
        advance(sql, key_id, KeyEvent.EXPIRED, reason="too many keys were pending", now=now)
    return [Crowded(key_id, owner.station) for (key_id,) in rows]
