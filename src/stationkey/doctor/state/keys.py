"""The ledger, the keys on record, and whether the files under ``active/`` match it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from stationkey.config.settings import DAY
from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.contract.profiles import CertificateType
from stationkey.doctor.config.certificates import MONTH
from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import Facts, look_at
from stationkey.doctor.host.ledger_reader import Contents
from stationkey.doctor.report import RUN_AS, Verdict, failure, listed, not_checked, ok, warning
from stationkey.errors import LedgerError
from stationkey.ledger import KeyRecord
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.migrations import SCHEMA_VERSION
from stationkey.system.files import read_regular
from stationkey.system.state_dir import DATABASE_NAME

_MAX_FILE: Final = 1024 * 1024
_LONG: Final = timedelta(days=7)
"""After which somebody should ask where a certificate is."""


def look_at_ledger(context: Context) -> tuple[Facts, Contents | LedgerError | str] | Verdict:
    """Look at the ledger, and read it without a trace."""
    path = context.settings.state_dir / DATABASE_NAME
    facts = look_at(path)
    if facts.kind == "unseen" or (facts.kind == "file" and not os.access(path, os.R_OK)):
        return not_checked(f"user {context.me.name} may not read {path}", RUN_AS)
    if facts.kind != "file" or facts.size == 0:
        return facts, "there is nothing to read"
    try:
        return facts, context.ledger()
    except LedgerError as error:
        return facts, error


def judge_ledger(facts: Facts, contents: Contents | LedgerError | str) -> Verdict:
    """Judge the ledger. `contents`: what is in it, or why that is not known."""
    path = facts.path
    if facts.kind == "missing":
        return ok("there is no ledger yet; the daemon makes it at its first start", stops=True)
    if facts.kind != "file":
        return failure(f"{path} is a {facts.kind}, not a file", "move it away; docs/operations.md lists every file")
    if facts.size == 0:
        return warning(
            f"{path} is empty: nothing was ever recorded in it, or a loss of power took it",
            "if the station had keys, restore a backup before the daemon starts; else the daemon fills it",
            stops=True,
        )
    if isinstance(contents, str):
        return not_checked(contents)
    if isinstance(contents, LedgerError):
        if contents.reason == "ledger_older":
            return warning(contents.message, contents.hint, stops=True)
        if contents.reason == "ledger_busy":
            return warning(contents.message, "which program holds it (fuser)? Requests are rejected", stops=True)
        return failure(contents.message, contents.hint or "restore a backup of the state directory, or move it away")
    return ok(f"the ledger is intact, of version {SCHEMA_VERSION}, and has {len(contents.keys)} keys on record")


def look_at_keys(context: Context) -> tuple[Sequence[KeyRecord], float, int, tuple[CertificateType, ...]] | Verdict:
    """Look at the keys on record."""
    contents = context.ledger()
    if isinstance(contents, str):
        return not_checked(contents)
    return contents.keys, time.time(), contents.running, context.settings.policy.certificate_types


def judge_keys(
    keys: Sequence[KeyRecord], now: float, running: int, served: tuple[CertificateType, ...]
) -> list[Verdict]:
    """Judge the keys that somebody should look at.

    Args:
        keys: all on record.
        now: Unix time.
        running: milliseconds of running time.
        served: certificate types that may be asked for.
    """
    living = [key for key in keys if key.has_owner and key.state is not KeyState.DESTROYED]
    pending = [key for key in living if key.state is KeyState.PRE_ACTIVATION]
    waiting = [key for key in pending if not key.failed]
    ages = [timedelta(seconds=now - key.created_at / 1000) for key in waiting]
    old = [age for age in ages if age > _LONG]
    failed = [_called(key) for key in pending if key.failed]
    overdue = [key for key in living if key.due is not None and key.due < running - DAY]
    owners = {key.owner for key in living if key.state is KeyState.ACTIVE}
    found = [verdict for key in keys for verdict in _judge_key(key, now)]
    if not owners:
        found.append(
            warning(
                "no key is active: no certificate was installed, or it was not reported as installed",
                "ask for a CSR, have it signed, and report certificate_installation_status (docs/integration.md)",
            )
        )
    if old:
        found.append(
            warning(
                f"{len(old)} of {len(waiting)} pending keys wait for their certificate for up to {max(old).days} days",
                "does the CSMS sign? stationkey keys list shows them; they expire by themselves",
            )
        )
    if failed:
        found.append(
            warning(f"the certificate of {listed(failed)} was not installed", "stationkey keys history ID; Josev's log")
        )
    if overdue:
        found.append(warning(f"{len(overdue)} keys are overdue", "does the daemon run, and may it write?"))
    if all(not verdict.advice for verdict in found):
        found.append(ok(f"{len(owners)} keys are active, {len(waiting)} are pending; none needs attention"))
    if owners and (missing := [one for one in served if all(owner[0] != one for owner in owners)]):
        found.append(ok(f"no key is active for {listed(missing)}, which may be right"))
    return found


def _called(key: KeyRecord) -> str:
    return f"{key.key_id} ({f'{key.certificate_type} {key.evse_id or str()}'.strip()})"


def _judge_key(key: KeyRecord, now: float) -> Iterator[Verdict]:
    if key.state is KeyState.COMPROMISED:
        yield warning(
            f"{_called(key)} is marked as compromised and still on record",
            f"once its certificate is revoked: stationkey keys destroy {key.key_id}",
        )
    if key.state is not KeyState.ACTIVE:
        return
    if key.not_after is None:
        yield ok(f"the expiry of the certificate of {_called(key)} is not known: [josev] certificate_dir is not set")
        return
    left, ends = timedelta(seconds=key.not_after - now), f"{datetime.fromtimestamp(key.not_after, UTC):%Y-%m-%d}"
    what = f"the certificate of the active key {_called(key)}"
    if left <= timedelta():
        yield failure(
            f"{what} expired on {ends}", "request a new one (OCPP TriggerMessage, or Josev); is the clock right?"
        )
    elif left < MONTH:
        yield warning(f"{what} expires on {ends}, in {left.days} days", "request a new one [A03.FR.02]")


def look_at_active(context: Context) -> tuple[Facts, Mapping[str, bytes | None], Mapping[str, bytes], str] | Verdict:
    """Look at what is under ``active/``, and at what should be."""
    contents, directory = context.ledger(), context.settings.state_dir / DIRECTORY_NAME
    if isinstance(contents, str):
        return not_checked(contents)
    facts = look_at(directory)
    expected = contents.active_files
    try:
        present = _files_in(directory) if facts.kind == "directory" else {}
    except OSError:
        return not_checked(f"{directory} may not be read by this user", RUN_AS)
    when = "within a minute; if it does not, its log says why" if context.daemon.running else "at its start"
    return facts, present, expected, f"the daemon corrects it {when}"


def _files_in(directory: Path) -> dict[str, bytes | None]:
    contents: dict[str, bytes | None] = {}
    for name in os.listdir(directory)[:1000]:  # noqa: PTH208 - names, and no more than these
        try:
            contents[name] = read_regular(directory / name, limit=_MAX_FILE, follow=False)
        except OSError:
            contents[name] = None
    return contents


def judge_active(
    directory: Facts, contents: Mapping[str, bytes | None], expected: Mapping[str, bytes], when: str
) -> Verdict:
    """Judge whether the files under ``active/`` are what the ledger says.

    Args:
        directory: ``active/`` itself.
        contents: by name; None for what is not a file or may not be read.
        expected: by name, as the ledger has it.
        when: when the daemon corrects it, in words.
    """
    if directory.kind == "unseen":
        return not_checked(f"{directory.path} may not be read by this user", RUN_AS)
    if directory.kind not in {"directory", "missing"}:
        return failure(
            f"{directory.path} is a {directory.kind}: the daemon does not write there, and services read other keys",
            f"rm {directory.path}, and find out who made it",
        )
    present = {name: content for name, content in contents.items() if name != ".lock" and not name.endswith(".new")}
    missing, more = sorted(expected.keys() - present.keys()), sorted(present.keys() - expected.keys())
    differ = sorted(name for name in expected.keys() & present.keys() if present[name] != expected[name])
    if differ:
        return failure(f"not what the ledger says, so useless or another's: {listed(differ)} under active/", when)
    if missing:
        return failure(f"missing under active/, so no service can use the key: {listed(missing)}", when)
    if more:
        return warning(f"not known to the ledger: {listed(more)} under active/", f"{when}, and deletes it")
    return ok(f"the {len(expected)} files under active/ are what the ledger says")
