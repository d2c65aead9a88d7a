"""Rejected requests: noted in memory at once, written later in batches."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from stationkey.ledger.engine import Engine
from stationkey.ledger.messages import REQUEST

MAX_REJECTIONS: Final = 10_000
"""How many of the newest rejections are kept, in memory and on disk. A few hundred bytes each, some MiB at most."""

_PART: Final = 1000
"""How many are written at a time."""


class Rejections:
    """The newest rejected requests and ignored statuses, with their reasons."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._noted: deque[tuple[str, str, str, int, str, str]] = deque(maxlen=MAX_REJECTIONS)
        self._lock = threading.Lock()

    def note(
        self, request_id: str, *, reason: str, message: str, now: int, name: str = REQUEST, station: str = ""
    ) -> None:
        """Note a rejection in memory. Any thread may call this; it does not wait for the disk.

        `write` and `Ledger.close` write it; a crash before that loses it. Beyond `MAX_REJECTIONS` the oldest are
        dropped.

        Args:
            request_id: the request.
            reason: the error's stable reason.
            message: the error in words.
            now: Unix time in milliseconds.
            name: what message it is, `REQUEST` or `STATUS`.
            station: which station sent it.
        """
        with self._lock:
            self._noted.append((request_id, reason, message, now, name, station))

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
            with self._engine.transaction() as sql:
                sql.executemany(
                    "INSERT INTO rejection (request_id, reason, message, at, name, station) VALUES (?, ?, ?, ?, ?, ?)",
                    part,
                )
                sql.execute(
                    f"DELETE FROM rejection WHERE seq <= (SELECT max(seq) FROM rejection) - ?{sql.mine('rejection')}",  # noqa: S608 - the engine's own text
                    (MAX_REJECTIONS,),
                )
        except BaseException:
            with self._lock:
                room = MAX_REJECTIONS - len(self._noted)
                self._noted.extendleft(reversed(part[max(0, len(part) - room) :]))
            raise
        return bool(self._noted)
