"""``stationkey serve`` whose clock a file sets wrong: ``wrong_clock_daemon.py FILE [OPTION ...]``.

The file holds how many seconds the clock is ahead, and may change at any time. So that a test need not wait for the
next look at what is due, there is one every tenth of a second, and the log tells of each that is over.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from stationkey import cli
from stationkey.service import custody, expiry, renewal, requests

log = logging.getLogger(__name__)


def main() -> None:
    """Set the clock, and serve."""
    ahead = Path(sys.argv[1])
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() + float(ahead.read_text())
    time.time_ns = lambda: right_ns() + int(float(ahead.read_text()) * 1e9)  # the log's, from Python 3.13 on
    sweep = expiry.Expiry.sweep

    async def sweep_and_tell(self: expiry.Expiry) -> None:
        await sweep(self)
        log.info("swept")

    expiry.Expiry.sweep = sweep_and_tell  # type: ignore[method-assign]
    expiry.SWEEP = 0.1  # type: ignore[misc]
    expiry.SAVE = 0  # type: ignore[misc]
    renewal.LOOK = 0.1  # type: ignore[misc]
    # Default arguments were bound to the right clock when the classes were made.
    for part in (custody.Custody, requests.StationKeyService):
        defaults = part.__init__.__kwdefaults__
        assert defaults is not None
        defaults["clock"] = time.time
    cli.main(["serve", "--log-format", "json", *sys.argv[2:]])


if __name__ == "__main__":
    main()
