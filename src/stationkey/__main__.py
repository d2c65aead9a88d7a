"""``python -m stationkey`` is the ``stationkey`` command."""

from stationkey.system.interrupts import leave_at_once


def run() -> None:
    """Run the command. Ctrl-C ends it without a traceback from here on, while it is imported too."""
    leave_at_once()
    from stationkey.cli import main  # noqa: PLC0415 - this is what may be interrupted

    try:
        main()
    finally:
        leave_at_once()


if __name__ == "__main__":
    run()
