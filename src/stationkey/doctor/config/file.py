"""The configuration file: what it says, who may read and write it, and what the environment says besides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from stationkey.config.options import options_of
from stationkey.config.settings import Settings
from stationkey.doctor.config.consistency import judge_sense
from stationkey.doctor.host.context import Configured, Options, Subject
from stationkey.doctor.host.files import READ, Facts, User, closed_on_the_way, look_at, octal, permits
from stationkey.doctor.report import Finding, failure, listed, not_checked, ok, warning
from stationkey.doctor.tpm.device import listeners_on
from stationkey.errors import ConfigurationError
from stationkey.system.listener import Address

FILE_IDS: Final = ("config.file", "config.rights", "config.environment", "config.sense")
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
"""What the commands that are clients of the broker read."""
_LOG_FORMATS: Final = ("text", "json")


def check_file(subject: Subject) -> Iterator[Finding]:
    """The file itself, who may do what with it, the environment, and whether it makes sense."""
    configured, user = subject.configured, subject.daemon.user
    usual = subject.options.config_file is None and look_at(_USUAL).kind == "file"
    closed = None if configured.file is None else closed_on_the_way(configured.file.path, user)
    closed_to_me = configured.file is not None and not os.access(configured.file.path, os.R_OK)
    yield judge_file(configured, subject.me, usual=usual, closed_to_me=closed_to_me)
    yield from judge_rights(configured.file, user, closed)
    yield from judge_environment(os.environ, subject.options)
    found = list(judge_sense(subject.settings))
    if subject.settings.metrics and not subject.daemon.running:
        found += judge_listening(subject.settings.metrics, listeners_on)
    yield from found or [ok("config.sense", "nothing in it contradicts itself")]


def judge_file(configured: Configured, me: User, *, usual: bool, closed_to_me: bool = False) -> Finding:
    """Whether the file can be read and is right.

    Args:
        configured: what came of it.
        me: who runs the doctor.
        usual: none is named, and there is one where the package puts it.
        closed_to_me: who runs the doctor may not read it, which says nothing of the daemon.
    """
    facts, name = configured.file, "config.file"
    if facts is not None and facts.kind == "missing":
        return failure(
            name,
            f"there is no configuration file {facts.path}, and the daemon does not start with it",
            "correct the path, or make the file; packaging/stationkey.toml says what can be in it",
        )
    if facts is not None and closed_to_me and facts.kind in {"file", "unseen"}:
        return not_checked(name, f"user {me.name} may not read {facts.path}", "run it as root, or as the daemon's user")
    if configured.complaints:
        said = "; ".join(configured.complaints[:_SHOWN])
        more = len(configured.complaints) - _SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        return failure(
            name,
            f"{said}{rest}",
            "the daemon does not start with it. Put it right by packaging/stationkey.toml, which says what each name "
            "may be. What is right in it is used below, and the defaults for the rest",
        )
    if usual:
        return warning(
            name,
            f"no configuration file is named, so the defaults are examined; but there is {_USUAL}",
            f"if the daemon uses it, say so here too: stationkey doctor --config {_USUAL}",
        )
    if facts is None:
        return ok(name, "no configuration file is named: the defaults hold, and what options and environment say")
    return ok(name, f"{facts.path} is valid")


def judge_rights(facts: Facts | None, user: User, closed: Path | None) -> Iterator[Finding]:
    """Who may read and write the file. `closed`: a directory on the way that the daemon's user may not enter."""
    name = "config.rights"
    if facts is None:
        yield not_checked(name, "no file is named")
        return
    path, before = facts.path, 0
    if facts.kind != "file":
        yield not_checked(name, f"{path} is {'not there' if facts.kind == 'missing' else 'not to be seen from here'}")
        return
    for bad, finding in (
        (
            facts.mode & 0o002 != 0,
            failure(
                name,
                f"every user of this machine may write {path} (mode {octal(facts.mode)}), and so choose the TPM, the "
                "broker and the policy",
                f"chmod o-w {path}",
            ),
        ),
        (
            facts.exposed is not None,
            failure(name, f"every user may exchange {path}: {facts.exposed} is open", f"chmod o-w {facts.exposed}"),
        ),
        (
            facts.mode & 0o020 != 0 and facts.gid != 0,
            warning(
                name,
                f"group {facts.gid} may write {path} (mode {octal(facts.mode)})",
                f"chmod g-w {path}, unless all of that group may change how the station's keys are kept",
            ),
        ),
        (
            facts.uid not in {0, user.uid},
            warning(
                name,
                f"{path} belongs to user number {facts.uid}, who is neither root nor the daemon's user ({user.name})",
                f"chown root {path}",
            ),
        ),
        (
            closed is not None or not permits(facts, user, READ),
            failure(
                name,
                f"the daemon's user {user.name} may not read {path}"
                + (f": {closed} is closed to it" if closed else f" (mode {octal(facts.mode)})"),
                f"chmod o+x {closed}" if closed else f"chgrp {user.gid} {path} && chmod g+r {path}",
            ),
        ),
    ):
        if bad:
            before += 1
            yield finding
    if not before:
        yield ok(name, f"{path} can be changed by its owner alone (mode {octal(facts.mode)})")


def judge_environment(environment: Mapping[str, str], options: Options) -> Iterator[Finding]:
    """The variables of this shell. A service has its own."""
    name = "config.environment"
    ours = sorted(variable for variable in environment if variable.startswith(_PREFIX))
    strange = [variable for variable in ours if variable not in _VARIABLES | _OTHERS]
    if options.log_format is not None and options.log_format not in _LOG_FORMATS:
        yield failure(
            name,
            f"the log format {options.log_format!r} is none: stationkey serve would not start",
            "STATIONKEY_LOG_FORMAT (or --log-format) is text or json",
        )
    elif "OPENSSL_CONF" in environment:
        yield warning(
            name,
            "OPENSSL_CONF is set: the configuration that makes services use keys in the TPM is not for the daemon",
            "set it for those services alone (docs/tls.md)",
        )
    elif strange:
        yield warning(
            name,
            f"nothing reads {listed(strange)}",
            f"is it a slip of the pen? What is read: {listed(sorted(_VARIABLES), most=9)}",
        )
    elif ours:
        yield ok(name, f"{listed(ours)} of this shell win over the file")
    else:
        yield ok(name, "no variable of this shell changes the settings")


def judge_listening(listen: str, listeners: Callable[[int], list[str]]) -> Iterator[Finding]:
    """Whether the daemon will be able to listen where figures are asked for; nothing where all is well.

    Args:
        listen: as ``[metrics] listen`` has it.
        listeners: what listens on a port of this machine; see `listeners_on`.
    """
    name = "config.sense"
    try:
        address = Address.parse(listen)
    except ConfigurationError:
        return  # said by judge_sense
    if address.path is not None and look_at(address.path.parent, follow=True).kind in {"missing", "file"}:
        yield failure(
            name,
            f"[metrics] listen: there is no directory {address.path.parent}, and the daemon does not start without",
            "RuntimeDirectory= in the unit makes one below /run; or name another path",
        )
    elif address.path is None and listeners(address.port):
        yield failure(
            name,
            f"[metrics] listen: another program listens on port {address.port}, and the daemon would not start",
            f"which one is it (ss -ltnp sport = :{address.port})? Name another port",
        )
