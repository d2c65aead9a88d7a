"""Which keys' certificates were reported as due for renewal, and when: a restart must not report them again."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from stationkey.ledger.engine import Engine
from stationkey.ledger.migrations import LIVING
from stationkey.ledger.records import damaged


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

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def all(self) -> dict[str, Hint]:
        """Return the last hint of each living key that had one, by key id.

        Raises:
            LedgerError: an invalid value, so nothing is known of when the last hint was.
        """
        with self._engine.reading() as sql:
            rows = sql.execute(
                f"SELECT key_id, hint FROM key WHERE hint IS NOT NULL AND {LIVING}{sql.mine('key')}"  # noqa: S608 - `LIVING` is this package's own text
            ).fetchall()
        try:
            return {key_id: msgspec.json.decode(hint, type=Hint) for key_id, hint in rows}
        except (msgspec.DecodeError, TypeError):
            raise damaged("renewal hint") from None

    def write(self, key_id: str, hint: Hint) -> None:
        """Write the last hint of a key; it goes with the key."""
        with self._engine.transaction() as sql:
            sql.execute("UPDATE key SET hint = ? WHERE key_id = ?", (msgspec.json.encode(hint).decode(), key_id))
