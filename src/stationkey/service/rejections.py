"""Rejections, put on record soon after they were answered, in one transaction for many."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from stationkey.errors import StationKeyError
from stationkey.ledger import MAX_REJECTIONS
from stationkey.ledger.messages import REQUEST
from stationkey.ledger.worker import LedgerThread
from stationkey.service.rate_limit import TokenBucket
from stationkey.system.counters import Counts
from stationkey.system.tasks import note_failure

log = logging.getLogger(__name__)

RECORD_WITHIN: Final = 1.0
"""Seconds within which a rejection is on disk: what is refused meanwhile is written with it, in one transaction."""
RECORDED_A_MINUTE: Final = 60
"""How many rejections a minute are put on record once as many as are kept came in a row. What wears a flash memory is
written a flood or not, day after day; counted is every one."""


class Rejections:
    """Notes rejections, and has them written by a task of its own.

    Args:
        ledger: the ledger's thread.
        failures: counts what goes wrong.
    """

    def __init__(self, ledger: LedgerThread, failures: Counts) -> None:
        self._ledger = ledger
        self._failures = failures
        self._recordable = TokenBucket(per_minute=RECORDED_A_MINUTE, burst=MAX_REJECTIONS)
        self._recording: asyncio.Task[None] | None = None
        self._unrecorded = False  # whether there are some that the task has not come to yet
        self._closed = False

    def note(self, request_id: str, error: StationKeyError, *, now: int, name: str = REQUEST) -> None:
        """Note a rejection; it is on disk within `RECORD_WITHIN`, or at `aclose`. Nobody waits for that.

        Args:
            request_id: of the request.
            error: why it was refused.
            now: Unix time in milliseconds.
            name: what message it is; see `stationkey.ledger.messages`.
        """
        if not self._recordable.take(time.monotonic_ns()):
            return
        self._ledger.note_rejection(request_id, reason=error.reason, message=str(error), now=now, name=name)
        self._unrecorded = True
        if self._recording is None and not self._closed:
            self._recording = asyncio.create_task(self._record(), name="record-rejections")

    async def aclose(self) -> None:
        """Write what was noted.

        Raises:
            LedgerError: it cannot be written.
        """
        self._closed = True
        if self._recording is not None:
            self._recording.cancel()
        await self._write()

    async def _record(self) -> None:
        """Put on record what was refused lately. Where that fails it is kept, and written with what comes next."""
        try:
            while self._unrecorded:
                await asyncio.sleep(RECORD_WITHIN)
                self._unrecorded = False
                await self._write()
        except StationKeyError as error:
            log.error("rejections not recorded yet: %s", error, extra={"reason": error.reason})
        except Exception as error:  # noqa: BLE001 - the next rejection starts it again
            note_failure(error, "record-rejections", self._failures)
        finally:
            self._recording = None

    async def _write(self) -> None:
        while await self._ledger(lambda ledger: ledger.rejections.write()):
            pass  # in steps: what else the ledger is wanted for goes in between
