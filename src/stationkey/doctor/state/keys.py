"""The ledger, the keys on record, and whether the files under ``active/`` show what it says."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from stationkey.config.settings import DAY
from stationkey.contract.active_names import DIRECTORY_NAME, file_name
from stationkey.contract.profiles import CertificateType
from stationkey.doctor.config.certificates import MONTH
from stationkey.doctor.host.context import UNREADABLE, Subject
from stationkey.doctor.host.files import (
    Facts,
    look_at,
)
from stationkey.doctor.report import CannotLookError, Finding, failure, listed, not_checked, ok, warning
from stationkey.errors import LedgerError
from stationkey.ledger import KeyRecord
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.migrations import SCHEMA_VERSION
from stationkey.system.state_dir import DATABASE_NAME

LEDGER_IDS: Final = ("state.ledger", "state.keys", "state.active")
DEADLINE: Final = 7.0
"""Seconds: SQLite waits five for a lock that another program holds."""
_LONG: Final = 7 * DAY
"""Milliseconds after which somebody should ask where a certificate is."""


def check_ledger(subject: Subject) -> Iterator[Finding]:
    """The ledger, read and not changed; then its keys, and whether ``active/`` shows what it says."""
    name, path = "state.ledger", subject.settings.state_dir / DATABASE_NAME
    facts = look_at(path)
    if facts.kind == "missing" and "state_dir" in subject.configured.lost:
        raise CannotLookError(UNREADABLE)
    if facts.kind == "missing" and look_at(path.parent, follow=True).kind != "unseen":
        yield ok(name, "there is no ledger yet; the daemon makes it at its first start")
        raise CannotLookError("there is no ledger")
    if facts.kind == "unseen" or (facts.kind == "file" and not os.access(path, os.R_OK)):
        yield not_checked(
            name, f"user {subject.me.name} may not read {path}", "run it as root, or as the daemon's user"
        )
        raise CannotLookError("the ledger may not be read by this user")
    if facts.kind != "file":
        yield failure(
            name, f"{path} is a {facts.kind}, and no file", "move it away; docs/operations.md lists every file"
        )
        raise CannotLookError("the ledger cannot be read")
    if facts.size == 0:
        yield warning(
            name,
            f"{path} is empty: nothing was ever recorded in it, or a loss of power took it",
            "if the station had keys, restore a backup before the daemon starts; else the daemon fills it",
        )
        raise CannotLookError("the ledger is empty")
    try:
        contents = subject.ledger.contents(subject)
    except LedgerError as error:
        yield _judge_unreadable(error)
        raise CannotLookError("the ledger cannot be read") from None
    yield ok(name, f"the ledger is whole, of version {SCHEMA_VERSION}, and has {len(contents.keys)} keys on record")
    served = subject.settings.policy.certificate_types
    yield from judge_keys(contents.keys, now=time.time(), running=contents.running, served=served)
    directory = subject.settings.state_dir / DIRECTORY_NAME
    expected = {file_name(owner): content for owner, content in contents.active_files.items()}
    yield judge_active(look_at(directory), _contents(directory), expected, running=subject.daemon.running)


def _judge_unreadable(error: LedgerError) -> Finding:
    name = "state.ledger"
    if error.reason == "ledger_older":
        return warning(name, error.message, error.hint)
    if error.reason == "ledger_busy":
        return warning(name, error.message, "which program holds it (fuser)? Requests are rejected meanwhile")
    return failure(name, error.message, error.hint or "restore a backup of the state directory, or move it away")


def judge_keys(
    keys: Sequence[KeyRecord], *, now: float, running: int, served: tuple[CertificateType, ...] = tuple(CertificateType)
) -> Iterator[Finding]:
    """The keys that somebody should look at.

    Args:
        keys: all on record.
        now: Unix time.
        running: milliseconds of running time.
        served: certificate types that may be asked for.
    """
    name, found = "state.keys", list[Finding]()
    for key in keys:
        if key.state is KeyState.ACTIVE:
            found += _judge_active_key(key, now)
        elif key.state is KeyState.COMPROMISED:
            found.append(
                warning(
                    name,
                    f"{_called(key)} is marked as compromised and still on record",
                    f"once its certificate is revoked: stationkey keys destroy {key.key_id}",
                )
            )
    living = [key for key in keys if key.has_owner and key.state is not KeyState.DESTROYED]
    owners = {key.owner for key in living if key.state is KeyState.ACTIVE}
    if not owners:
        found.append(
            warning(
                name,
                "no key is active: no certificate was installed, or it was not reported as installed",
                "ask for a CSR, have it signed, and report certificate_installation_status (docs/integration.md)",
            )
        )
    else:
        missing = [one for one in served if all(owner[0] != one for owner in owners)]
        if missing:
            found.append(ok(name, f"no key is active for {listed(missing)}, which may be right"))
    waiting = [key for key in living if key.state is KeyState.PRE_ACTIVATION and not key.failed]
    old = [key for key in waiting if now - key.created_at / 1000 > _LONG / 1000]
    if old:
        longest = max(int(now - key.created_at / 1000) // 86_400 for key in old)
        found.append(
            warning(
                name,
                f"{len(old)} of {len(waiting)} pending keys wait for their certificate since a week and more "
                f"({longest} days)",
                "does the CSMS sign? stationkey keys list shows them; they end by themselves",
            )
        )
    failed = [key for key in living if key.failed and key.state is KeyState.PRE_ACTIVATION]
    if failed:
        found.append(
            warning(
                name,
                f"the installation of a certificate failed for {listed(map(_called, failed))}",
                "stationkey keys history ID says more; so does the log of Josev",
            )
        )
    overdue = [key for key in living if key.due is not None and key.due < running - DAY]
    if overdue:
        found.append(
            warning(name, f"{len(overdue)} keys should have ended by now", "does the daemon run, and may it write?")
        )
    if all(not finding.advice for finding in found):
        found.append(ok(name, f"{len(owners)} keys are active, {len(waiting)} are pending; none needs attention"))
    yield from found


def _called(key: KeyRecord) -> str:
    return f"{key.key_id} ({f'{key.certificate_type} {key.evse_id or str()}'.strip()})"


def _judge_active_key(key: KeyRecord, now: float) -> Iterator[Finding]:
    name = "state.keys"
    if key.not_after is None:
        yield ok(name, f"when the certificate of {_called(key)} ends is not known: [josev] certificate_dir is not set")
        return
    left = key.not_after - now
    ends = datetime.fromtimestamp(key.not_after, UTC).strftime("%Y-%m-%d")
    if left <= 0:
        yield failure(
            name,
            f"the certificate of the active key {_called(key)} ended on {ends}",
            "have a new one asked for (OCPP TriggerMessage, or Josev); is the clock right?",
        )
    elif left < MONTH.total_seconds():
        yield warning(
            name,
            f"the certificate of the active key {_called(key)} ends on {ends}, in {int(left // 86_400)} days",
            "have a new one asked for: one month before its end is the rule [A03.FR.02]",
        )


def _contents(directory: Path) -> dict[str, bytes | None] | None:
    """What is in ``active/``; None for what is no file or may not be read, and for all where it cannot be listed."""
    try:
        names = os.listdir(directory)[:1000]  # noqa: PTH208 - names, and no more than these
    except FileNotFoundError:
        return {}
    except OSError:
        return None
    contents: dict[str, bytes | None] = {}
    for name in names:
        path = directory / name
        try:
            contents[name] = path.read_bytes() if look_at(path).kind == "file" else None
        except OSError:
            contents[name] = None
    return contents


def judge_active(
    directory: Facts, contents: dict[str, bytes | None] | None, expected: dict[str, bytes], *, running: bool
) -> Finding:
    """Whether the files under ``active/`` are what the ledger says.

    Args:
        directory: ``active/`` itself.
        contents: by name; None for all where they may not be listed.
        expected: by name, as the ledger has it.
        running: whether the daemon runs: it then makes them right within a minute.
    """
    name = "state.active"
    when = "the daemon makes it right within a minute; if it stays so, its log says why"
    when = when if running else "the daemon makes it right at its start"
    if directory.kind == "link" or (directory.kind not in {"directory", "missing", "unseen"}):
        return failure(
            name,
            f"{directory.path} is a {directory.kind}: the daemon does not write there, and services read who knows "
            "what",
            f"rm {directory.path}, and find out who made it",
        )
    if contents is None or directory.kind == "unseen":
        return not_checked(name, f"{directory.path} may not be looked into by this user", "run it as root")
    present = {known: content for known, content in contents.items() if known != ".lock" and not known.endswith(".new")}
    missing, more = sorted(expected.keys() - present.keys()), sorted(present.keys() - expected.keys())
    differ = sorted(known for known in expected.keys() & present.keys() if present[known] != expected[known])
    if differ:
        return failure(
            name, f"not what the ledger says, and so of no use or another's: {listed(differ)} under active/", when
        )
    if missing:
        return failure(name, f"missing under active/, so no service can use the key: {listed(missing)}", when)
    if more:
        return warning(
            name, f"under active/ lies what the ledger knows nothing of: {listed(more)}", f"{when}: it is deleted"
        )
    return ok(name, f"the {len(expected)} files under active/ are what the ledger says")
