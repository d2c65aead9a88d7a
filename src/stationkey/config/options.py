"""What an option is. Options are declared where their values are: as annotations in `stationkey.config.settings`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import fields

FORM: Final = "form"
"""Name in msgspec's `Meta.extra` of words for a type that has a pattern."""


class Form(Struct, frozen=True):
    """How an option is written in the file, where that differs from the value that the program uses.

    Attributes:
        written: its type in the file, bounds included, as msgspec takes it.
        read: parses the written value. It returns UNSET if that does not set the option, and raises
            ValueError, or an error of ours, where it is invalid.
    """

    written: Any
    read: Callable[[Any], Any]


class Option(Struct, frozen=True):
    """Annotation of a field that the configuration sets.

    Attributes:
        help: what it does, in one line. Also the text of ``--help``.
        form: see `Form`; None where it is written as its field's type says.
        place: where it is in the file, where that is not the field's own name in the table of its class: a name, or
            ``table.name``.
        metavar: the placeholder of its value in ``--help``, if it is an option there.
        default: words for the default, where the field's own does not say it.
        example: what may be in the file, in TOML, where the field's own default does not show it.
    """

    help: str
    form: Form | None = None
    place: str = ""
    metavar: str = ""
    default: str = ""
    example: str = ""


class Declared(Struct, frozen=True):
    """An option with what follows from where it is declared.

    Attributes:
        option: its annotation.
        table: the table of the file that it is in; empty at the top.
        name: its name there.
        path: the field that it sets, by the names of the fields that lead to it.
        written: its type in the file.
        default: its default as text; empty if it has none, or an empty one.
    """

    option: Option
    table: str
    name: str
    path: tuple[str, ...]
    written: Any
    default: str
    example: str

    @property
    def place(self) -> str:
        """Where it is in the file, such as ``pool.rsa``."""
        return f"{self.table}.{self.name}".removeprefix(".")

    @property
    def is_table(self) -> bool:
        """Whether it is a table with names that the operator chooses."""
        return get_origin(getattr(self.written, "__origin__", None)) is dict

    def read(self, value: object) -> Any:
        """Parse the value in the file; UNSET if that leaves it unset.

        Raises:
            ValueError: it is invalid.
            ConfigurationError: it names a secret in a way that is invalid.
        """
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            raise ValueError("a text has a NUL character in it")
        written = msgspec.convert(value, self.written)
        return self.option.form.read(written) if self.option.form else written


def _toml(default: object) -> str:
    """Return a default as it is written in the file; empty where it cannot be."""
    plain = str(default) if isinstance(default, Path) else default
    return json.dumps(plain, ensure_ascii=False) if plain and isinstance(plain, str | int | float) else ""


@cache
def options_of(declared: type[Struct], table: str = "", path: tuple[str, ...] = ()) -> tuple[Declared, ...]:
    """Find the options among the fields of a class.

    A field whose type is a struct is a table of the file. Inside that, it is more of the same table.

    Args:
        declared: the class.
        table: the table of the file that its options are in.
        path: the fields that lead to it.
    """
    found: list[Declared] = []
    for field in fields(declared):
        name, hint = field.name, field.type
        if isinstance(hint, type) and issubclass(hint, Struct):
            found += options_of(hint, table or name, (*path, name))
        for option in get_args(hint) if get_origin(hint) is Annotated else ():
            if isinstance(option, Option):
                home, _, own = (option.place or name).rpartition(".")
                written = option.form.written if option.form else hint
                shown = "" if field.default in {None, False, NODEFAULT} else str(field.default)
                example = option.example or _toml(field.default)
                default = option.default or shown
                found.append(Declared(option, home or table, own, (*path, name), written, default, example))
    return tuple(found)
