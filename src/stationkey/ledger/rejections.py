"""Refused requests: noted at once, written later."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from stationkey.ledger.database import Database

MAX_REJECTIONS: Final = 10_000
"""How many refused requests are remembered: the oldest go first. A few hundred bytes each, so some MiB at the most."""

_PART: Final = 1000
"""How many are written at a time."""


class Rejections:
    """The newest refused requests, and why they were refused."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rejections: deque[tuple[str, str, str, int]] = deque(maxlen=MAX_REJECTIONS)
        self._noting = threading.Lock()

    def note(self, request_id: str, *, reason: str, message: str, now: int) -> None:
        """Note why a request was refused. May be called from any thread; nothing waits for the disk.

        `write` and `Ledger.close` write it down. Of what was noted and not written, the oldest beyond
        `MAX_REJECTIONS` are forgotten; a crash takes it all.
        """
        with self._noting:
            self._rejections.append((request_id, reason, message, now))

    def write(self) -> bool:
        """Write down what was noted, a part at a time. The oldest on record beyond `MAX_REJECTIONS` are forgotten.

        Returns:
            Whether there is more.

        Raises:
            LedgerError: nothing was written, and the notes are kept.
        """
        with self._noting:
            part = [self._rejections.popleft() for _ in range(min(_PART, len(self._rejections)))]
        if not part:
            return False
        try:
            with self._database.transaction() as sql:
                sql.executemany("INSERT INTO rejection (request_id, reason, message, at) VALUES (?, ?, ?, ?)", part)
                sql.execute(
                    "DELETE FROM rejection WHERE seq <= (SELECT max(seq) FROM rejection) - ?", (MAX_REJECTIONS,)
                )
        except BaseException:
            with self._noting:
                room = MAX_REJECTIONS - len(self._rejections)
                self._rejections.extendleft(reversed(part[max(0, len(part) - room) :]))
            raise
        return bool(self._rejections)
