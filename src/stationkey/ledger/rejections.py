"""Rejected requests: noted in memory at once, written later in batches."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from stationkey.ledger.database import Database
from stationkey.ledger.messages import REQUEST

MAX_REJECTIONS: Final = 10_000
"""How many of the newest rejections are kept, in memory and on disk. A few hundred bytes each, some MiB at most."""

_PART: Final = 1000
"""How many are written at a time."""


class Rejections:
    """The newest rejected requests and ignored statuses, with their reasons."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._noted: deque[tuple[str, str, str, int, str]] = deque(maxlen=MAX_REJECTIONS)
        self._lock = threading.Lock()

    def note(self, request_id: str, *, reason: str, message: str, now: int, name: str = REQUEST) -> None:
        """Note a rejection in memory. Any thread may call this; it does not wait for the disk.

        `write` and `Ledger.close` write it; a crash before that loses it. Beyond `MAX_REJECTIONS` the oldest are
        dropped.

        Args:
            request_id: the request.
            reason: the error's stable reason.
            message: the error in words.
            now: Unix time in milliseconds.
            name: what message it is, `REQUEST` or `STATUS`.
        """
        with self._lock:
            self._noted.append((request_id, reason, message, now, name))

    def write(self) -> bool:
        """Write the next `_PART` noted rejections, and delete the oldest on disk beyond `MAX_REJECTIONS`.

        Returns:
            Whether there are more.

        Raises:
            LedgerError: nothing was written, and the notes are kept.
        """
        with self._lock:
            part = [self._noted.popleft() for _ in range(min(_PART, len(self._noted)))]
        if not part:
            return False
        try:
            with self._database.transaction() as sql:
                sql.executemany(
                    "INSERT INTO rejection (request_id, reason, message, at, name) VALUES (?, ?, ?, ?, ?)", part
                )
                sql.execute(
                    "DELETE FROM rejection WHERE seq <= (SELECT max(seq) FROM rejection) - ?", (MAX_REJECTIONS,)
                )
        except BaseException:
            with self._lock:
                room = MAX_REJECTIONS - len(self._noted)
                self._noted.extendleft(reversed(part[max(0, len(part) - room) :]))
            raise
        return bool(self._noted)
