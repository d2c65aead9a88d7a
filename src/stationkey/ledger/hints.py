"""Which keys' certificates were reported as due for renewal, and when: a restart must not report them again."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from stationkey.ledger.database import Database
from stationkey.ledger.migrations import LIVING
from stationkey.ledger.records import damaged

_HINT: Final = "renewal hint "
"""Prefix of a name in `meta`; the id of a key follows."""


class Hint(Struct, frozen=True):
    """The last hint that a certificate is due.

    Attributes:
        not_after: end of that certificate, Unix time in seconds.
        expired: whether it was expired already.
        count: how many hints in a row, this one included.
        running: when it was given, in milliseconds of running time (see `Retention.running`).
    """

    not_after: int
    expired: bool
    count: int
    running: int


class Hints:
    """The last hint of each key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> dict[str, Hint]:
        """Return the last hint of each living key that had one, by key id.

        Raises:
            LedgerError: an invalid value, so nothing is known of when the last hint was.
        """
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT name, value FROM meta WHERE name > ? AND name < ?", (_HINT, _HINT + "~")
            ).fetchall()
        try:
            return {name.removeprefix(_HINT): msgspec.json.decode(value, type=Hint) for name, value in rows}
        except (msgspec.DecodeError, TypeError):
            raise damaged("renewal hint") from None

    def write(self, key_id: str, hint: Hint) -> None:
        """Write the last hint of a key, and delete those of keys that no longer live."""
        with self._database.transaction() as sql:
            sql.execute(
                "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (_HINT + key_id, msgspec.json.encode(hint).decode()),
            )
            sql.execute(
                "DELETE FROM meta WHERE name > ? AND name < ? AND substr(name, ?) NOT IN"  # noqa: S608 - `LIVING` is this package's own text
                f" (SELECT key_id FROM key WHERE {LIVING})",
                (_HINT, _HINT + "~", len(_HINT) + 1),
            )
