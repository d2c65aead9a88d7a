"""``stationkey serve`` whose database takes no writes while a file exists: ``unwritable_daemon.py FILE [OPTION ...]``.

The refusal is SQLite's own, and the one that it gives on a file system that went read-only under it.
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import Any

from stationkey import cli


def main() -> None:
    """Set the switch, and serve."""
    switch = Path(sys.argv[1])

    class Connection(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            super().execute(f"PRAGMA query_only={'ON' if switch.exists() else 'OFF'}")
            return super().execute(*arguments)

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)  # type: ignore[assignment]
    cli.main(["serve", "--log-format", "json", *sys.argv[2:]])


if __name__ == "__main__":
    main()
