"""The names of the files under ``active/``: one for each active key, and one for the key before it."""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

DIRECTORY_NAME: Final = "active"
_SUFFIX: Final = ".pem"
_PREVIOUS: Final = "previous"
_ROOT: Final = "root-"
_ROOT_PART: Final = re.compile(rf"{_ROOT}([0-9a-f]{{16}})")
_RESERVED: Final = re.compile(rf"{_PREVIOUS}\Z|{_ROOT}")
"""Beginnings that an EVSE ID must not have in a file name."""

_STATION: Final = "station-"
_LONG_STATION: Final = "station_"
"""Begins a name whose station and EVSE ID are in base64url: percent-encoded they may be too long for a file name."""

_PERCENT_ENCODED: Final = 64
"""Characters. A station's name that is longer when percent-encoded is in base64url."""


class Owner(NamedTuple):
    """Whose keys they are; each owner has one active key at most, or one a root.

    Attributes:
        station: name of the station; empty for a single station.
        certificate_type: empty for a key made ahead, which has no owner yet.
        evse_id: empty if there is none.
    """

    station: str
    certificate_type: str
    evse_id: str


class ActiveName(NamedTuple):
    """The parts of the name of a file under ``active/``.

    Attributes:
        owner: the owner of the key.
        root: root of its certificate, 16 hexadecimal digits; empty if roots are not distinguished.
        previous: whether it is the key before the active one.
    """

    owner: Owner
    root: str = ""
    previous: bool = False


def file_name(owner: Owner, root: str = "", previous: bool = False) -> str:
    """Return ``[station-<station>.]<certificate_type>[.<evse_id>][.root-<root>][.previous].pem``.

    Station and EVSE ID are percent-encoded except letters, digits, ``_``, ``-`` and ``~``; so is the first character of
    an EVSE ID that looks like another part of the name. So they have no dot and no slash, and `read_name` can parse it.
    Where that makes the station too long, its part is ``station_<station>``, and both are in base64url.
    """
    station, certificate_type, evse_id = owner
    encoded = percent_encoded(evse_id)
    if _RESERVED.match(encoded):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    if station:
        if len(percent_encoded(station)) <= _PERCENT_ENCODED:
            station = _STATION + percent_encoded(station)
        else:
            station, encoded = _LONG_STATION + _base64(station), _base64(evse_id)
    parts = (station, certificate_type, encoded, root and _ROOT + root, _PREVIOUS if previous else "")
    return ".".join(filter(None, parts)) + _SUFFIX


def read_name(name: str) -> ActiveName | None:
    """Return the parts of a file name; None if `file_name` cannot produce it."""
    if not name.endswith(_SUFFIX):
        return None
    certificate_type, *parts = name.removesuffix(_SUFFIX).split(".", 5)
    station, decode = "", _from_percent
    if certificate_type.startswith((_STATION, _LONG_STATION)) and parts:
        decode = _from_percent if certificate_type.startswith(_STATION) else _from_base64
        station, certificate_type = certificate_type[len(_STATION) :], parts.pop(0)
    previous = parts[-1:] == [_PREVIOUS]
    if previous:
        parts.pop()
    root = _ROOT_PART.fullmatch(parts[-1]) if parts else None
    if root:
        parts.pop()
    try:
        owner = Owner(decode(station), certificate_type, decode("".join(parts)))
        read = ActiveName(owner, root.group(1) if root else "", previous)
        return read if file_name(*read) == name else None
    except ValueError:  # surrogates, bytes that are not UTF-8, and what is not base64
        return None


def percent_encoded(text: str) -> str:
    """Return a text of letters, digits, ``_``, ``-``, ``~`` and ``%`` that stands for any text without surrogates."""
    return quote(text, safe="").replace(".", "%2E")


def _from_percent(text: str) -> str:
    return unquote(text, errors="strict")


def _base64(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _from_base64(text: str) -> str:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
