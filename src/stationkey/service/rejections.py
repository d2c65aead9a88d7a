"""Record rejections shortly after they were answered, many in one transaction."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from stationkey.errors import StationKeyError
from stationkey.ledger import MAX_REJECTIONS
from stationkey.ledger.messages import REQUEST
from stationkey.ledger.worker import LedgerThread
from stationkey.service.rate_limit import Allowances, TokenBucket
from stationkey.system.counters import Counts
from stationkey.system.tasks import note_failure

log = logging.getLogger(__name__)

RECORD_WITHIN: Final = 1.0
"""Seconds within which a rejection is on disk: those of this time are written in one transaction."""
RECORDED_A_MINUTE: Final = 60
"""Rejections recorded per minute after as many in a row as are kept, to spare flash memory. All are counted."""
OF_A_STATION: Final = 20
"""Divisor of both for one station of a site."""


class Rejections:
    """Collects rejections, and writes them in its own task.

    Args:
        ledger: the ledger's thread.
        failures: counts failures of the task.
    """

    def __init__(self, ledger: LedgerThread, failures: Counts) -> None:
        self._ledger = ledger
        self._failures = failures
        self._recordable = TokenBucket(per_minute=RECORDED_A_MINUTE, burst=MAX_REJECTIONS)
        self._of_stations = Allowances(
            per_minute=RECORDED_A_MINUTE / OF_A_STATION, burst=MAX_REJECTIONS // OF_A_STATION
        )
        self._recording: asyncio.Task[None] | None = None
        self._unrecorded = False  # whether some are not written yet
        self._closed = False

    def note(
        self, request_id: str, error: StationKeyError, *, now: int, name: str = REQUEST, station: str = ""
    ) -> None:
        """Note a rejection; it is on disk within `RECORD_WITHIN`, or at `aclose`. Does not wait for that.

        Args:
            request_id: id of the request.
            error: reason of the rejection.
            now: Unix time in milliseconds.
            name: kind of message; see `stationkey.ledger.messages`.
            station: the station.
        """
        time_ns = time.monotonic_ns()
        if (station and not self._of_stations.take(station, time_ns)) or not self._recordable.take(time_ns):
            return
        self._ledger.note_rejection(
            request_id, reason=error.reason, message=str(error), now=now, name=name, station=station
        )
        self._unrecorded = True
        if self._recording is None and not self._closed:
            self._recording = asyncio.create_task(self._record(), name="record-rejections")

    async def aclose(self) -> None:
        """Write the noted rejections.

        Raises:
            LedgerError: it cannot be written.
        """
        self._closed = True
        if self._recording is not None:
            self._recording.cancel()
        await self._write()

    async def _record(self) -> None:
        """Write the noted rejections. If that fails, they are written with the next ones."""
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
            pass  # in steps, so that other calls of the ledger go in between
