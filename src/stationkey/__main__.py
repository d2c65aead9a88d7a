"""``python -m stationkey`` is the ``stationkey`` command."""

from stationkey.cli import main

if __name__ == "__main__":
    main()
