"""The names of the tests that there are, for tests of documents that name them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_TEST: Final = re.compile(r"^ *(?:async )?def (test_\w+)\(", re.MULTILINE)


def names_of(path: Path) -> set[str]:
    """Return the names of the tests in a file. It is not parsed: that takes seconds for all files."""
    return set(_TEST.findall(path.read_text()))


def names_in(folder: Path) -> set[str]:
    """Return the names of the tests in a folder and below."""
    return {name for path in folder.rglob("test_*.py") for name in names_of(path)}
