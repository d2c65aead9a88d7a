"""The names of the files under ``active/``: one for each active key, and one for the key before it."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

DIRECTORY_NAME: Final = "active"
_SUFFIX: Final = ".pem"
_PREVIOUS: Final = "previous"
_ROOT: Final = "root-"
_ROOT_PART: Final = re.compile(rf"{_ROOT}([0-9a-f]{{16}})")
_RESERVED: Final = re.compile(rf"{_PREVIOUS}\Z|{_ROOT}")
"""Beginnings that an EVSE ID must not have in a file name."""

Owner = tuple[str, str]
"""Certificate type and EVSE ID; the latter is empty if there is none."""


class ActiveName(NamedTuple):
    """The parts of the name of a file under ``active/``.

    Attributes:
        owner: certificate type and EVSE ID of the key.
        root: root of its certificate, 16 hexadecimal digits; empty if roots are not distinguished.
        previous: whether it is the key before the active one.
    """

    owner: Owner
    root: str = ""
    previous: bool = False


def file_name(owner: Owner, root: str = "", previous: bool = False) -> str:
    """Return ``<certificate_type>[.<evse_id>][.root-<root>][.previous].pem``.

    The EVSE ID is percent-encoded except letters, digits, ``_``, ``-`` and ``~``; so is its first character if it looks
    like another part of the name. So it has no dot and no slash, and `read_name` can parse it.
    """
    certificate_type, evse_id = owner
    encoded = quote(evse_id, safe="").replace(".", "%2E")
    if _RESERVED.match(encoded):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    parts = (certificate_type, encoded, root and _ROOT + root, _PREVIOUS if previous else "")
    return ".".join(filter(None, parts)) + _SUFFIX


def read_name(name: str) -> ActiveName | None:
    """Return the parts of a file name; None if `file_name` cannot produce it."""
    if not name.endswith(_SUFFIX):
        return None
    certificate_type, *parts = name.removesuffix(_SUFFIX).split(".", 4)
    previous = parts[-1:] == [_PREVIOUS]
    if previous:
        parts.pop()
    root = _ROOT_PART.fullmatch(parts[-1]) if parts else None
    if root:
        parts.pop()
    try:
        owner = (certificate_type, unquote("".join(parts), errors="strict"))
        read = ActiveName(owner, root.group(1) if root else "", previous)
        return read if file_name(*read) == name else None
    except UnicodeError:  # surrogates, and bytes that are not UTF-8
        return None
