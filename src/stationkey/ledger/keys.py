"""Queries of keys; nothing here writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from stationkey.contract.active_names import Owner, file_name
from stationkey.errors import Scope, StationKeyError
from stationkey.ledger.engine import Engine
from stationkey.ledger.lifecycle import INITIAL, KeyState
from stationkey.ledger.migrations import LIVING
from stationkey.ledger.records import (
    MAKING,
    EventRecord,
    Figures,
    KeyRecord,
    read_key,
    read_key_ref,
    read_time,
)
from stationkey.ledger.retention import histories

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef


_UNCONFIRMED: Final = (
    "SELECT count(*) FROM key JOIN key AS before USING (station, certificate_type, evse_id, root)"
    " WHERE key.state = ? AND key.state != 'destroyed' AND key.confirmed IS NULL"
    " AND before.state = ? AND before.state != 'destroyed' AND before.previous = 1{mine}"
)
"""How many keys are active and not confirmed, with a key to go back to. For the index, see `LIVING`."""

_LAST: Final = "\U0010ffff"
"""Sorts after every other character."""

_PART: Final = 1000
"""How many keys `Keys.stream` reads at a time."""


class Keys:
    """The keys on record."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def all(self, prefix: str = "") -> list[KeyRecord]:
        """Return the keys whose name begins with `prefix`, oldest first."""
        prefix = prefix.lower()
        # A range, because SQLite uses no index for LIKE or substr().
        return self._select("key_id >= ? AND key_id < ?", prefix, prefix + _LAST, order="number")

    def stream(self, *, station: str | None = None) -> Iterator[KeyRecord]:
        """Iterate over all keys, or those of a station, oldest first, in bounded memory.

        Each part is a query of its own: an open one would keep the daemon from emptying its write-ahead log. So this is
        no snapshot: keys made meanwhile come last.

        Raises:
            LedgerError: the database cannot be read.
        """
        last = 0
        where, named = ("number > ?", ()) if station is None else ("number > ? AND key.station = ?", (station,))
        while rows := self._rows(where, last, *named, order=f"number LIMIT {_PART}"):
            yield from map(read_key, rows)
            *_, last = rows[-1]

    def named(self, beginning: str) -> KeyRecord:
        """Return the one key whose name begins with `beginning`.

        Raises:
            StationKeyError: no key, or more than one (``key_not_found``).
        """
        found = self.all(beginning) if beginning else []
        if len(found) != 1:
            raise StationKeyError(
                f"{len(found)} keys begin with {beginning}" if found else f"no key {beginning}",
                reason="key_not_found",
                hint="stationkey keys list shows them all",
                scope=Scope.KEY,
            )
        return found[0]

    def pending(self, certificate_type: str, evse_id: str | None, *, station: str = "") -> list[KeyRecord]:
        """Return the pending keys of a certificate type, oldest first; of all EVSEs if `evse_id` is None."""
        return self._owned(station, certificate_type, evse_id, KeyState.PRE_ACTIVATION)

    def active(self, certificate_type: str, evse_id: str | None, *, station: str = "") -> list[KeyRecord]:
        """Return the active keys of a certificate type; of all EVSEs if `evse_id` is None."""
        return self._owned(station, certificate_type, evse_id, KeyState.ACTIVE)

    def deactivated(self, certificate_type: str, evse_id: str | None, *, station: str = "") -> list[KeyRecord]:
        """Return the deactivated keys of a certificate type; of all EVSEs if `evse_id` is None."""
        return self._owned(station, certificate_type, evse_id, KeyState.DEACTIVATED)

    def expiring(self, *, until: int, limit: int) -> list[KeyRecord]:
        """Return up to `limit` active keys whose certificate ends by `until`, Unix seconds; the first to end first."""
        where = f"state = ? AND not_after <= ? AND {LIVING}"
        return self._mine(where, KeyState.ACTIVE, until, order=f"not_after, number LIMIT {limit:d}")

    def newest_installed(self) -> KeyRecord | None:
        """Return the active key with a known certificate that was installed last, or None."""
        where = f"state = ? AND not_after IS NOT NULL AND {LIVING}"
        found = self._mine(where, KeyState.ACTIVE, order="installed DESC LIMIT 1")
        return found[0] if found else None

    def usable(self) -> list[KeyRecord]:
        """Return the keys that have a private part, oldest first, including those made ahead."""
        return self._mine("number IN (SELECT key_number FROM secret)", order="number")

    def ref(self, key_id: str) -> KeyRef | None:
        """Return a key with its private part, or None if it has none."""
        with self._engine.reading() as sql:
            row = sql.execute(
                "SELECT scheme, key_type, public, private FROM key JOIN secret ON secret.key_number = key.number"
                " WHERE key_id = ?",
                (key_id,),
            ).fetchone()
        return None if row is None else read_key_ref(*row)

    def refs(self, scheme: str) -> list[KeyRef]:
        """Return the keys of a kind of key store that have a private part, of all stations: the others are strays.

        Args:
            scheme: of the key store's URI.
        """
        with self._engine.reading() as sql:
            rows = sql.execute(
                "SELECT scheme, key_type, public, private FROM key JOIN secret ON secret.key_number = key.number"
                " WHERE scheme = ?",
                (scheme,),
            ).fetchall()
        return [read_key_ref(*row) for row in rows]

    def made_ahead(self) -> list[tuple[KeyRef, int]]:
        """Return the keys made ahead that have no owner yet, oldest first.

        Returns:
            Each with its private part and its expiry in milliseconds of running time.
        """
        with self._engine.reading() as sql:
            rows = sql.execute(
                "SELECT scheme, key_type, public, private, coalesce(due, 0)"  # noqa: S608 - `LIVING` is this package's own text
                " FROM key JOIN secret ON secret.key_number = key.number"
                f" WHERE state = ? AND station = '' AND certificate_type = '' AND {LIVING} ORDER BY number",
                (INITIAL,),
            ).fetchall()
        return [(read_key_ref(*row), due) for *row, due in rows]

    def seconds_to_make(self, scheme: str) -> dict[str, float]:
        """Return, by key type, the seconds that the last key made ahead took in a kind of key store.

        Args:
            scheme: of the key store's URI.
        """
        prefix = f"{MAKING}{scheme} "
        with self._engine.reading() as sql:
            rows = sql.execute("SELECT name, value FROM meta WHERE name > ?", (prefix,)).fetchall()
        return {name.removeprefix(prefix): float(value) for name, value in rows if name.startswith(prefix)}

    def history(self, key_id: str) -> list[EventRecord]:
        """Return the events of a key, oldest first."""
        with self._engine.reading() as sql:
            rows = sql.execute(
                "SELECT seq, at, event, state, reason, message_id FROM event"
                " WHERE key_number = (SELECT number FROM key WHERE key_id = ?) ORDER BY seq",
                (key_id,),
            ).fetchall()
        return [EventRecord(seq, read_time(at, milliseconds=True), *rest) for seq, at, *rest in rows]

    def active_files(self, station: str | None = None) -> dict[str, bytes]:
        """Return the content of each file under ``active/`` by its name: key, then leaf and chain if known.

        Of one station, or of all that the engine serves.

        Active keys come first, so that what is in use is written first.
        """
        named, which = ("", ()) if station is None else (" AND station = ?", (station,))
        files = {}
        with self._engine.reading() as sql:
            for condition, state in (("", KeyState.ACTIVE), (" AND previous = 1", KeyState.DEACTIVATED)):
                rows = sql.execute(
                    "SELECT scheme, key_type, public, private, station, certificate_type, evse_id, root, previous,"  # noqa: S608 - this package's own text
                    " chain FROM key JOIN secret ON secret.key_number = key.number"
                    f" WHERE state = ? AND {LIVING}{condition}{named}{sql.mine('key')} ORDER BY asked",
                    (state, *which),
                ).fetchall()
                for *ref, of_station, certificate_type, evse_id, root, previous, chain in rows:
                    owner = Owner(of_station, certificate_type, evse_id)
                    files[file_name(owner, root, bool(previous))] = read_key_ref(*ref).pem() + (chain or "").encode()
        return files

    def changed_stations(self, after: int | None) -> tuple[set[str], int]:
        """Return the stations of this shard whose keys have had an event, and the number of the last event.

        The events of a shard are numbered in the order of their commits, an operator's included. Those of others need
        not be: a number that is still to come may be less than theirs.

        Args:
            after: the number that was returned before; None for all stations with living keys.
        """
        with self._engine.reading() as sql:
            if after is None:
                last = sql.execute(
                    "SELECT seq FROM event JOIN key ON number = key_number"  # noqa: S608 - the engine's own text
                    f" WHERE seq > 0{sql.mine('key')} ORDER BY seq DESC LIMIT 1"
                ).fetchone()
                rows = sql.execute(f"SELECT DISTINCT station FROM key WHERE {LIVING}{sql.mine('key')}").fetchall()  # noqa: S608 - same
                return {station for (station,) in rows}, 0 if last is None else int(last[0])
            rows = sql.execute(
                "SELECT station, max(seq) FROM event JOIN key ON number = key_number"  # noqa: S608 - same
                f" WHERE seq > ?{sql.mine('key')} GROUP BY station",
                (after,),
            ).fetchall()
        return {station for station, _ in rows}, max([after, *(int(seq) for _, seq in rows)])

    def others_installed(self, key: KeyRecord) -> bool:
        """Return whether a certificate of another key of the same owner may still be installed.

        True if one was installed and not reported as deleted before the certificate of `key` was installed.
        """
        another = (
            "SELECT 1 FROM key WHERE station = ? AND certificate_type = ? AND evse_id = ? AND installed IS NOT NULL"
            " AND key_id != ? AND deleted"
        )
        with self._engine.reading() as sql:
            row = sql.execute(
                f"{another} IS NULL UNION ALL {another} > ? LIMIT 1",
                (*key.owner, key.key_id, *key.owner, key.key_id, key.installed),
            ).fetchone()
        return row is not None

    def figures(self, *, expiries: int) -> Figures:
        """Count the records.

        Args:
            expiries: how many certificate expiries to return at most.
        """
        states = [state for state in KeyState if state is not KeyState.DESTROYED]
        with self._engine.reading() as sql:
            mine = sql.mine("key")
            counted = sql.execute(
                "SELECT state, certificate_type, count(*) FROM key"  # noqa: S608 - `LIVING` is this package's own text
                f" WHERE state IN ({', '.join('?' * len(states))}) AND certificate_type > '' AND {LIVING}"
                f"{mine} GROUP BY state, certificate_type",
                states,
            ).fetchall()
            first = sql.execute(
                "SELECT certificate_type, evse_id, not_after FROM key"  # noqa: S608 - `LIVING` is this package's own text
                f" WHERE state = ? AND not_after IS NOT NULL AND {LIVING}{mine} ORDER BY not_after LIMIT ?",
                (KeyState.ACTIVE, expiries),
            ).fetchall()
            if self._engine.local:
                destroyed = sum(one.newest - one.oldest + 1 for one in histories(sql))
            else:  # of many stations, those of other shards included, it is quicker to count
                (destroyed,) = sql.execute(f"SELECT count(*) FROM key WHERE ended IS NOT NULL{mine}").fetchone()  # noqa: S608 - the engine's own text
            (unconfirmed,) = sql.execute(
                _UNCONFIRMED.format(mine=mine), (KeyState.ACTIVE, KeyState.DEACTIVATED)
            ).fetchone()
        keys = {(state, certificate_type): count for state, certificate_type, count in counted}
        active = sum(count for (state, _), count in keys.items() if state == KeyState.ACTIVE)
        earliest: dict[tuple[str, str], int] = {}
        for kind, evse_id, not_after in first:
            earliest.setdefault((kind, evse_id), not_after)
        return Figures(
            keys=keys,
            expiries=tuple((*owner, not_after) for owner, not_after in earliest.items()),
            unknown=active - len(first),
            destroyed=destroyed,
            size=self._engine.size(),
            unconfirmed=unconfirmed,
        )

    def _owned(self, station: str, certificate_type: str, evse_id: str | None, state: KeyState) -> list[KeyRecord]:
        where = f"state = ? AND key.station = ? AND certificate_type = ? AND {LIVING}"
        if evse_id is None:
            return self._select(where, state, station, certificate_type)
        return self._select(f"{where} AND evse_id = ?", state, station, certificate_type, evse_id)

    def _mine(self, where: str, *arguments: object, order: str = "asked") -> list[KeyRecord]:
        """Return such keys of the stations that the engine serves."""
        with self._engine.reading() as sql:
            return self._select(where + sql.mine("key"), *arguments, order=order)

    def _select(self, where: str, *arguments: object, order: str = "asked") -> list[KeyRecord]:
        return [read_key(row) for row in self._rows(where, *arguments, order=order)]

    def _rows(self, where: str, *arguments: object, order: str) -> list[tuple[Any, ...]]:
        """Return the rows that `read_key` reads; the last column is the key's number."""
        with self._engine.reading() as sql:
            return sql.execute(
                "SELECT key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name,"  # noqa: S608 - `where` and `order` are this module's own text
                " organization_name, country_name, state, created_at, public, due, failed, chain, not_after, asked,"
                " installed, request_id, root, previous, confirmed, key.station, number"
                f" FROM key LEFT JOIN answer ON answer.key_number = key.number WHERE {where} ORDER BY {order}",
                arguments,
            ).fetchall()
