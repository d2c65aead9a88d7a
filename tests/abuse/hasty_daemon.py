"""``stationkey serve`` with next to no wait before it connects again, for tests that end many of its connections."""

from __future__ import annotations

from stationkey.cli import main
from stationkey.mqtt import gateway

for name, seconds in (("FIRST_DELAY", 0.01), ("LAST_DELAY", 0.05), ("UNSTEADY_DELAY", 0.02)):
    setattr(gateway, name, seconds)

if __name__ == "__main__":
    main(prog_name="stationkey")
