"""The names of the stations of a site, and the patterns that choose them.

A name is a part of MQTT topics, so whoever may publish there may invent one. It is checked before anything is done for
it. The single station of a daemon without a site has the empty name.
"""

from __future__ import annotations

from typing import Final

MAX_STATION: Final = 64
"""Bytes of a station's name in UTF-8."""
ANY_LEVEL: Final = "+"
"""A level of a pattern that matches any level of a name [MQTT 5 4.7.1.3]."""
_WILDCARDS: Final = frozenset("+#")


def station_flaw(name: str) -> str:
    """Return what is wrong with the name of a station; empty if nothing."""
    levels = name.split("/")
    if any(_WILDCARDS & set(level) for level in levels):
        return "has a wildcard of MQTT"
    if name.startswith("$"):
        return "begins with $, which is reserved for the broker"
    return _text_flaw(name, levels)


def pattern_flaw(pattern: str) -> str:
    """Return what is wrong with a pattern of stations; empty if nothing."""
    levels = pattern.split("/")
    if any(level != ANY_LEVEL and (_WILDCARDS | {"$"}) & set(level) for level in levels):
        return "has a +, # or $ in a level; only a whole level can be +"
    return _text_flaw(pattern, levels)


def _text_flaw(text: str, levels: list[str]) -> str:
    if "" in levels:
        return "has an empty level"
    if not text.isprintable():  # control, invisible and bidirectional characters, unpaired surrogates
        return "has a character that cannot be printed"
    if len(text.encode()) > MAX_STATION:
        return f"has more than {MAX_STATION} bytes"
    return ""
