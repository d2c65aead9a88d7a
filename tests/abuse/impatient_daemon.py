"""``stationkey serve`` with short waits between its connections, so that a minute has room for many of them."""

from __future__ import annotations

from stationkey.mqtt import waiting

setattr(waiting, "CONNECT_TIMEOUT", 1.5)  # noqa: B010 - before it is imported elsewhere

import hasty_daemon  # noqa: E402, F401 - same; its delays are those of this one

from stationkey.cli import main  # noqa: E402 - same
from stationkey.mqtt import connection, gateway  # noqa: E402 - same

for module, name, seconds in ((connection, "MQTT5_TIMEOUT", 0.7), (gateway, "QUOTA_FIRST", 0.05)):
    setattr(module, name, seconds)

if __name__ == "__main__":
    main(prog_name="stationkey")
