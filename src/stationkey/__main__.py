"""``python -m stationkey`` is the ``stationkey`` command."""

from __future__ import annotations

import gc
import sys

from stationkey.system.interrupts import leave_at_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from stationkey.errors import StationKeyError


def _report(failure: StationKeyError | ModuleNotFoundError, file: Path | None) -> int:
    from stationkey.cli import report  # noqa: PLC0415 - only for its words

    return report(failure, file)


def run() -> None:
    """Run the command. Ctrl-C ends it without a traceback from here on, while it is imported too."""
    leave_at_once()
    try:
        if sys.argv[1:2] == ["serve"]:
            from stationkey.system.spared import spare  # noqa: PLC0415 - this is what may be interrupted

            gc.disable()  # nothing is garbage yet; `daemon` enables it when it is ready
            spare()
            from stationkey.serving import serve  # noqa: PLC0415 - same

            if (status := serve(sys.argv[2:], _report)) is not None:
                sys.exit(status)
        from stationkey.cli import main  # noqa: PLC0415 - same

        main()
    finally:
        leave_at_once()


if __name__ == "__main__":
    run()
