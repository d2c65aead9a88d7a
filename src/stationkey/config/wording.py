"""Messages about a configuration file: the expected form of an option, its line, and suggestions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from msgspec import inspect

from stationkey.config.options import FORM

_HEADER: Final = re.compile(r"\s*\[\[?\s*([^\]#]+?)\s*\]")
_NAME: Final = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_LENGTH: Final = re.compile(r" of \d+ to \d+ characters")
_LINE: Final = re.compile(r"\(at line (\d+)")
_FORM: Final = '(an option is NAME = VALUE, with text in quotes, e.g. broker = "mqtt://127.0.0.1:1883")'
_HANDLES: Final = 0x8000_0000
"""Numbers from here on are TPM handles, and shown in hexadecimal."""
_QUOTES_AND_SPACES: Final = re.compile(r"""["'\s]""")


def required(written: Any, value: object) -> str:
    """Return the expected form of a value, such as ``a whole number, at least 0 and at most 16``.

    Args:
        written: its type in the file, as msgspec takes it.
        value: the invalid value; the length of a text is mentioned only for a text.
    """
    words = _describe(inspect.type_info(written))
    return words if isinstance(value, str | list) else _LENGTH.sub("", words)


def _describe(kind: inspect.Type) -> str:  # noqa: PLR0911 - one for each kind
    match kind:
        case inspect.Metadata():
            return str((kind.extra or {}).get(FORM) or _describe(kind.type))
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType():
            name = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
            bounds = (("at least", kind.ge), ("more than", kind.gt), ("at most", kind.le), ("less than", kind.lt))
            said = " and ".join(f"{words} {_number(bound)}" for words, bound in bounds if bound is not None)
            return f"{name}, {said}" if said else name
        case inspect.StrType():
            return f"text of {kind.min_length or 0} to {kind.max_length} characters" if kind.max_length else "text"
        case inspect.LiteralType():
            return _one_of(kind.values)
        case inspect.EnumType():
            return _one_of([member.value for member in kind.cls])
        case inspect.VarTupleType():
            return f"a list, each {_describe(kind.item_type)}"
    return "another value"


def _number(bound: float) -> str:
    return f"{bound:#x}" if isinstance(bound, int) and bound >= _HANDLES else f"{bound}"


def _one_of(values: Iterable[object]) -> str:
    return "one of " + ", ".join(f'"{value}"' for value in values)


def meant(name: str, table: str, known: Mapping[str, Iterable[str]]) -> str:
    """Return a suggestion for an unknown option, as the end of a sentence; empty if none.

    Args:
        name: the unknown name.
        table: its table; empty at the top.
        known: the names in each table.
    """
    here = list(known.get(table, ()))
    if not table:
        here += [one for one in known if one]
    elsewhere = [one for one, names in known.items() if one != table and name in names]
    if elsewhere:
        places = (f"in [{one}]" if one else "at the top, before all tables" for one in elsewhere)
        return f"; it belongs {' or '.join(places)}"
    import difflib  # noqa: PLC0415 - only a typo needs it

    if close := difflib.get_close_matches(name, here, 1):
        return f"; did you mean {close[0]}?"
    for one, names in known.items():
        if close := difflib.get_close_matches(name, list(names), 1, 0.8):
            return f"; did you mean {close[0]} " + (f"in [{one}]?" if one else "at the top?")
    return ""


def lines_of(text: str) -> dict[str, int]:
    """Return the line on which each table and option begins, by its place such as ``pool.rsa``.

    Read line by line, so a line inside a multi-line text may be taken for an option if there is no other of its name.
    """
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            table = _QUOTES_AND_SPACES.sub("", header[1])
            found.setdefault(table, number)
        elif name := _NAME.match(line):
            found.setdefault(f"{table}.{_QUOTES_AND_SPACES.sub('', name[1])}".removeprefix("."), number)
    return found


def not_toml(error: str, text: str) -> str:
    """Return the error of a text that is not valid TOML, with its line.

    Args:
        error: the error of `tomllib`, which ends with the place.
        text: the text.
    """
    place = _LINE.search(error)
    if place is None:
        return "not valid TOML: the file ends in the middle of a value, or a value is far too long"
    line = text.split("\n")[int(place[1]) - 1].strip()
    twice = "is set a second time" if "overwrite" in error or "twice" in error else ""
    return f"line {place[1]}: not valid TOML: {line} {twice or _FORM}"
