"""``stationkey serve``, without the library of the command line where nothing in it needs that.

click and all options take a fifth of the start. A line of known options with their values, as a service manager has it,
is read here; any other, and any error, is left to `stationkey.cli`, whose words it then has.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from stationkey.config.file import settle
from stationkey.config.settings import LogFormat, Settings
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.given import PREFIX, combined, file_of, read
from stationkey.system import logs
from stationkey.system.interrupts import EXIT_INTERRUPTED, clean_up_first

PLACES: Final = ("broker", "keystore", "allow_software_keys", "state_dir", "topic_prefix", "log_format")
"""Places in the configuration of the options that the command has."""
_FLAGS: Final = frozenset({"site", "allow_software_keys"})
_TEXTS: Final = frozenset({"config", *PLACES} - _FLAGS)
_PATHS: Final = frozenset({"config", "state_dir"})
Report = Callable[[StationKeyError | ModuleNotFoundError, Path | None], int]


def run(settled: Settings, *, site: bool) -> int:
    """Run the daemon until it is stopped; return its exit status.

    Args:
        settled: the configuration.
        site: whether it must be that of a site.

    Raises:
        StationKeyError: it cannot start.
    """
    if site and not settled.site.stations:
        raise ConfigurationError(
            "no site is configured: [site] stations is missing",
            reason="site_missing",
            hint="add it to the configuration file, or leave out --site",
        )
    from stationkey import daemon  # noqa: PLC0415 - with all its libraries, and not for --help

    logs.set_up(settled.log_format)
    if settled.ledger:
        from stationkey.site.site import run as run_site  # noqa: PLC0415 - same

        received = run_site(settled)
    else:
        received = daemon.run(settled)
    return EXIT_INTERRUPTED if received is signal.SIGINT else 0


def serve(arguments: Sequence[str], report: Report) -> int | None:
    """Run the daemon by the command line after ``serve``; return its exit status, or None if click has to read it.

    Args:
        arguments: the command line.
        report: prints an error, with the configuration file that was read, and returns the exit status.
    """
    told = _told(arguments)
    if told is None:
        return None
    try:
        path = file_of(told.pop("config"))
        site = bool(told.pop("site"))
        given: defaultdict[str, dict[str, Any]] = defaultdict(dict, {"": told})
        settled = settle(combined(given, read(path, told)), **told)
    except StationKeyError:
        return None
    clean_up_first()
    try:
        return run(settled, site=site)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (StationKeyError, ModuleNotFoundError) as failure:
        return report(failure, path)


def _told(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return the values of the options, those of the environment included; None if anything is unusual."""
    if None in {sys.stdin, sys.stdout} or any(name.endswith("_COMPLETE") for name in os.environ):
        return None
    texts: dict[str, str] = {}
    flags: set[str] = set()
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        option = name.replace("-", "_")
        if not word.startswith("--") or "_" in name or option not in _FLAGS | _TEXTS:
            return None
        if option in _FLAGS and not equals:
            flags.add(option)
            continue
        value = value if equals else next(words, "-")
        if option in _FLAGS or value.startswith("-"):
            return None
        texts[option] = value
    variables = {name: os.environ.get(f"{PREFIX}_{name.upper()}") for name in _FLAGS | _TEXTS}
    if any(variables[name] for name in _FLAGS):
        return None
    told: dict[str, Any] = {name: texts.get(name, variables[name] or None) for name in _TEXTS}
    if told["log_format"] not in {None, *get_args(LogFormat)}:
        return None
    paths = {name: None if told[name] is None else Path(told[name]) for name in _PATHS}
    return told | paths | {name: True if name in flags else None for name in _FLAGS}
