"""``stationkey serve``, with each path noted that it writes to, makes, renames, removes or gives away.

The first argument is the file for the notes; the others are the command's own. Noted is what Python is asked for, and
which database SQLite is: that one makes its own files beside it.
"""

from __future__ import annotations

import os
import sys
from typing import Final
from urllib.parse import unquote, urlsplit

CHANGES: Final = {
    "os.mkdir": 1,
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "sqlite3.connect": 1,
}
"""Python's audit events of what changes the file system, and how many of their arguments are paths."""
WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

notes = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def note(event: str, arguments: tuple[object, ...]) -> None:
    """Write down what is about to be changed."""
    if event == "open":
        path, _, flags = arguments
        changed = [path] if isinstance(flags, int) and flags & WRITING else []
    else:
        changed = list(arguments[: CHANGES.get(event, 0)])
    for path in changed:
        if isinstance(path, str) and path.startswith("file:"):  # SQLite's
            path = unquote(urlsplit(path).path)  # noqa: PLW2901 - the same, as a path
        if isinstance(path, str | bytes | os.PathLike):
            os.write(notes, os.fsencode(os.path.abspath(path)) + b"\0")  # noqa: PTH100 - pathlib would make events, too


sys.addaudithook(note)

from stationkey.cli import main  # noqa: E402 - what it does at its import is noted, too

if __name__ == "__main__":
    main(prog_name="stationkey")
