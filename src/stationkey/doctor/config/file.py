"""The configuration file: what it says, who may read and write it, and what the environment changes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from stationkey.config.options import options_of
from stationkey.config.settings import Settings
from stationkey.doctor.host.context import Configured, Context
from stationkey.doctor.host.files import READ, Facts, User, look_at, octal
from stationkey.doctor.report import RUN_AS, Verdict, failure, listed, not_checked, ok, warning

_SHOWN: Final = 4
"""Mistakes that are told one by one."""
_USUAL: Final = Path("/etc/stationkey/stationkey.toml")
_PREFIX: Final = "STATIONKEY_"
_VARIABLES: Final = frozenset(
    f"{_PREFIX}{name}"
    for name in ("BROKER", "KEYSTORE", "ALLOW_SOFTWARE_KEYS", "STATE_DIR", "TOPIC_PREFIX", "LOG_FORMAT", "CONFIG")
)
_OTHERS: Final = frozenset(
    f"{_PREFIX}MQTT_{option.name.upper()}" for option in options_of(Settings) if option.table == "mqtt"
)
"""Read by the commands that are clients of the broker."""
_LOG_FORMATS: Final = ("text", "json")


def look_at_file(context: Context) -> tuple[Configured, Path | None] | Verdict:
    """Look at what came of the file, and at the usual one if none is named."""
    facts = context.configured.file
    if facts is not None and facts.kind in {"file", "unseen"} and not os.access(facts.path, os.R_OK):
        return not_checked(f"user {context.me.name} may not read {facts.path}", RUN_AS)
    unnamed = context.options.config_file is None and look_at(_USUAL).kind == "file"
    return context.configured, _USUAL if unnamed else None


def judge_file(configured: Configured, usual: Path | None) -> Verdict:
    """Judge whether the file can be read and is valid. `usual`: the file of the package, if none is named."""
    facts = configured.file
    if facts is not None and facts.kind == "missing":
        return failure(
            f"there is no configuration file {facts.path}, and the daemon does not start with it",
            "correct the path, or make the file; packaging/stationkey.toml says what can be in it",
        )
    if configured.complaints:
        more = len(configured.complaints) - _SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        return failure(
            f"{'; '.join(configured.complaints[:_SHOWN])}{rest}",
            "the daemon does not start with it. packaging/stationkey.toml says what each name may be. What is valid is "
            "used below; what needs the rest is not checked",
        )
    if usual is not None:
        return warning(
            f"no configuration file is named, so the defaults are examined; but there is {usual}",
            f"if the daemon uses it: stationkey doctor --config {usual}",
        )
    return ok("no configuration file is named: the defaults apply" if facts is None else f"{facts.path} is valid")


def look_at_rights(context: Context) -> tuple[Facts, User] | Verdict:
    """Look at the file itself."""
    facts = context.configured.file
    if facts is None:
        return not_checked("no file is named")
    if facts.kind != "file":
        return not_checked(f"{facts.path} is {'missing' if facts.kind == 'missing' else 'not visible from here'}")
    return look_at(facts.path, follow=True, user=context.daemon.user), context.daemon.user


def judge_rights(facts: Facts, user: User) -> Iterator[Verdict]:
    """Judge who may read and write the file."""
    path, mode = facts.path, octal(facts.mode)
    group = facts.mode & 0o020 and facts.gid != 0
    foreign, barred = facts.uid not in {0, user.uid}, facts.barred(user, READ)
    if facts.mode & 0o002:
        yield failure(f"every user may write {path} (mode {mode}): TPM, broker and policy", f"chmod o-w {path}")
    if facts.exposed is not None:
        yield failure(f"every user may replace {path}: {facts.exposed} is open", f"chmod o-w {facts.exposed}")
    if group:
        yield warning(f"group {facts.gid} may write {path} (mode {mode})", f"chmod g-w {path}")
    if foreign:
        yield warning(f"{path} belongs to uid {facts.uid}, not to root or {user.name}", f"chown root {path}")
    if barred is not None:
        yield failure(
            f"the daemon's user {user.name} may not read {path}" + (f": {barred} is closed" if barred != path else ""),
            f"chgrp {user.gid} {path} && chmod g+r {path}" if barred == path else f"chmod o+x {barred}",
        )
    if not (facts.mode & 0o002 or facts.exposed or group or foreign or barred):
        yield ok(f"{path} can be changed by its owner alone (mode {mode})")


def look_at_environment(context: Context) -> tuple[Mapping[str, str], str | None]:
    """Look at the variables of this shell, and the log format."""
    return os.environ, context.options.log_format


def judge_environment(environment: Mapping[str, str], log_format: str | None) -> Verdict:
    """Judge the variables of this shell. A service has its own."""
    ours = sorted(variable for variable in environment if variable.startswith(_PREFIX))
    strange = [variable for variable in ours if variable not in _VARIABLES | _OTHERS]
    if log_format is not None and log_format not in _LOG_FORMATS:
        return failure(
            f"invalid log format {log_format!r}: stationkey serve would not start",
            "STATIONKEY_LOG_FORMAT (or --log-format) is text or json",
        )
    if "OPENSSL_CONF" in environment:
        return warning(
            "OPENSSL_CONF is set: the configuration by which services use keys in the TPM is not for the daemon",
            "set it for those services alone (docs/tls.md)",
        )
    if strange:
        return warning(f"unknown variable {listed(strange)}; typo?", f"known: {listed(sorted(_VARIABLES), most=9)}")
    return ok(f"{listed(ours)} of this shell override the file" if ours else "no variable changes the settings")
