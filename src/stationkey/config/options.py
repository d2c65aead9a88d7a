"""Declaration of options, as annotations of the fields in `stationkey.config.settings`."""

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
"""Name in msgspec's `Meta.extra` of the description of a type with a pattern."""


class Form(Struct, frozen=True):
    """The form of an option in the file, if it differs from the program's value.

    Attributes:
        written: its type in the file, bounds included, as msgspec takes it.
        read: parses the written value. Returns UNSET if that does not set the option, raises ValueError or a
            `StationKeyError` if it is invalid.
    """

    written: Any
    read: Callable[[Any], Any]


class Option(Struct, frozen=True):
    """Annotation of a field that the configuration sets.

    Attributes:
        help: what it does, in one line. Also the text of ``--help``.
        form: see `Form`; None if it is written as the type of its field.
        place: its name in the file, or ``table.name``, if that is not the field's name in the table of its class.
        metavar: the placeholder of its value in ``--help``, if it is an option there.
        default: text of the default, if the field's own value does not show it.
        example: a value in TOML, if the default does not show the form.
    """

    help: str
    form: Form | None = None
    place: str = ""
    metavar: str = ""
    default: str = ""
    example: str = ""


class Declared(Struct, frozen=True):
    """An option, with its place and type by its declaration.

    Attributes:
        option: its annotation.
        table: the table of the file that it is in; empty at the top.
        name: its name there.
        path: the names of the fields that lead to the field that it sets.
        written: its type in the file.
        default: its default as text; empty if none or an empty one.
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
        """Its place in the file, such as ``pool.rsa``."""
        return f"{self.table}.{self.name}".removeprefix(".")

    @property
    def is_table(self) -> bool:
        """Whether it is a table with names that the operator chooses."""
        return get_origin(getattr(self.written, "__origin__", None)) is dict

    def read(self, value: object) -> Any:
        """Parse the value in the file; UNSET if that leaves it unset.

        Raises:
            ValueError: it is invalid.
            ConfigurationError: it is an invalid reference to a secret.
        """
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            raise ValueError("a text has a NUL character in it")
        written = msgspec.convert(value, self.written)
        return self.option.form.read(written) if self.option.form else written


def _toml(default: object) -> str:
    """Return a default in TOML; empty if that is not possible."""
    plain = str(default) if isinstance(default, Path) else default
    return json.dumps(plain, ensure_ascii=False) if plain and isinstance(plain, str | int | float) else ""


@cache
def options_of(declared: type[Struct], table: str = "", path: tuple[str, ...] = ()) -> tuple[Declared, ...]:
    """Find the options among the fields of a class.

    A field whose type is a struct is a table of the file; a struct inside that belongs to the same table.

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
