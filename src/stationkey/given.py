"""The configuration that a command is given: by its options, by the environment and by the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from stationkey.config import file as configuration
from stationkey.config.file import Given, place_of, read_file, read_table
from stationkey.errors import ConfigurationError, StationKeyError

PREFIX: Final = "STATIONKEY"
"""Prefix of the options' environment variables."""
CHECKED: Final = {
    "broker": ("stationkey.mqtt.url", "Broker.parse"),
    "topic_prefix": ("stationkey.mqtt.topics", "topics"),
    "keystore": ("stationkey.keystore", "KeyStoreUri.parse"),
    "keystores": ("stationkey.keystore", "KeyStoreUri.parse"),
    "metrics.listen": ("stationkey.system.listener", "Address.parse"),
}
"""Module and name of the parser that checks an option's text, loaded only for options that are given."""


def file_of(given: Path | None) -> Path | None:
    """Return the configuration file to read: the given one, or that of the system if this user may read it.

    An empty STATIONKEY_CONFIG names none.
    """
    if given is None and os.environ.get(f"{PREFIX}_CONFIG") != "" and os.access(configuration.SYSTEM_FILE, os.R_OK):
        return configuration.SYSTEM_FILE
    return given


def checked(place: str, value: str) -> None:
    """Check the text of an option of `CHECKED` with its parser.

    Raises:
        StationKeyError: of the parser.
    """
    module, reader = CHECKED[place]
    attrgetter(reader)(import_module(module))(value)


def refused_texts(path: Path, given: Given) -> Iterator[ConfigurationError]:
    """Yield the errors of the options of `CHECKED` in a file that is otherwise valid."""
    for place in CHECKED:
        value = given.get((place.removesuffix(".listen"),))
        texts = {f".{name}": text for name, text in value.items()} if isinstance(value, Mapping) else {"": value}
        for name, text in texts.items():
            try:
                if text is not None:
                    checked(place, str(text))
            except StationKeyError as error:
                told = f"{place_of(path, place + name)}: {error.message}"
                yield ConfigurationError(told, reason=error.reason, hint=error.hint)


def read(path: Path | None, told: dict[str, Any] | None) -> Given:
    """Read a file; unless `told` is None, check the options of `CHECKED` in it that `told` does not replace."""
    filed = read_file(path)
    if path is not None and told is not None:
        for error in refused_texts(path, {name: value for name, value in filed.items() if not told.get(name[0])}):
            raise error
    return filed


def combined(given: Mapping[str, dict[str, Any]], filed: Given) -> Given:
    """Return the values of the file, replaced by those of options and environment.

    Args:
        given: the latter, by table and name; None or an empty text where they are not set.
        filed: the former.

    Raises:
        StationKeyError: a value of an option is invalid.
    """
    for place in CHECKED:
        if value := given[""].get(place):
            checked(place, value)
    tables = {
        table: {name: value or "" for name, value in options.items()} for table, options in given.items() if table
    }
    return {**filed, **read_table(tables, source="the command line")}
