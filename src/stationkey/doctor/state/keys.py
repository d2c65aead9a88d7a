"""The ledger, read without a trace; the keys on record, and whether the files under ``active/`` match it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from stationkey.config.settings import DAY
from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.contract.profiles import CertificateType
from stationkey.doctor.config.certificates import MONTH
from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import Facts, look_at
from stationkey.doctor.report import Finding, failure, hidden, listed, ok, refusal, unknown, warning
from stationkey.doctor.runner import Check, within
from stationkey.errors import LedgerError, StationKeyError
from stationkey.keystore.pkcs11.uri import identifier_of
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.migrations import SCHEMA_VERSION
from stationkey.system.files import read_regular
from stationkey.system.state_dir import DATABASE_NAME

_MAX_FILE: Final = 1024 * 1024
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own in it, closed to others
_MAX_COPIED: Final = 64 * 1024 * 1024
_LOG: Final = "-wal"
_PATIENCE: Final = 2.0
"""Seconds that a check of something else waits for the ledger."""
_LONG: Final = timedelta(days=7).total_seconds()
"""After which somebody should ask where a certificate is."""
_PASSING: Final = frozenset({"ledger_older", "ledger_busy"})
"""Reasons of the ledger by which nothing is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What matters of a ledger.

    Attributes:
        keys: all on record.
        active_files: what each file under ``active/`` should hold, by its name.
        running: milliseconds of running time.
        wrapped: the private part of each active key in a TPM, wrapped by that, by the key's name.
        in_tokens: CKA_ID of each key in a PKCS#11 token.
    """

    keys: tuple[KeyRecord, ...]
    active_files: dict[str, bytes] = field(repr=False)
    running: int
    wrapped: dict[str, bytes] = field(repr=False)
    in_tokens: frozenset[bytes] = frozenset()


def read_ledger(path: Path, *, running: bool) -> Contents | str:
    """Read a ledger, and leave no trace.

    SQLite makes files beside a database even to read it, and they would be this user's. So a ledger that nobody has
    open is read in place. If its last run was cut short, part of its content is in a log: then both are copied to
    memory, and read there.

    Args:
        path: of the database.
        running: whether the daemon has it open.

    Returns:
        What is in it; or why it cannot be read without a trace.

    Raises:
        LedgerError: it is damaged, busy or of another version.
    """
    facts, log = look_at(path), look_at(path.with_name(path.name + _LOG))
    if facts.kind != "file":
        return f"no ledger at {path}" if facts.kind == "missing" else f"{path} is not a file to read"
    if running:
        return _contents(Ledger(path, read_only=True))
    if not log.there or log.size == 0:
        return _contents(Ledger(path, read_only=True, alone=True))
    if log.kind != "file" or facts.size + log.size > _MAX_COPIED or not _MEMORY.is_dir():
        return "the last run of the daemon was cut short; start it once, and the ledger is in order"
    with tempfile.TemporaryDirectory(prefix="stationkey-doctor-", dir=_MEMORY) as directory:
        copy = Path(directory, DATABASE_NAME)
        try:
            shutil.copyfile(path, copy, follow_symlinks=False)
            shutil.copyfile(log.path, copy.with_name(log.path.name), follow_symlinks=False)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return _contents(Ledger(copy, read_only=True))


def _contents(opened: Ledger) -> Contents:
    with closing(opened) as ledger:
        keys = ledger.keys.all()
        active = [key.key_id for key in keys if key.state is KeyState.ACTIVE and key.scheme == "tpm2"]
        references = {key_id: ledger.keys.ref(key_id) for key_id in active}
        return Contents(
            keys=tuple(keys),
            active_files=ledger.keys.active_files(),
            running=ledger.retention.running,
            wrapped={key_id: one.private for key_id, one in references.items() if one is not None},
            in_tokens=frozenset(identifier_of(f"pkcs11:{key.location}") for key in ledger.keys.refs("pkcs11")),
        )


def contents(context: Context) -> Contents | str:
    """Read the ledger, once for all checks; see `read_ledger`."""
    return context.once(_read)


def contents_soon(context: Context) -> Contents | None:
    """Read it for a check that can do without; None if it cannot be read, or not within 2 s."""
    try:
        late: Contents | str = "it takes too long"
        found = within(_PATIENCE, lambda: contents(context), late)
    except (StationKeyError, OSError):
        return None  # the check of the ledger says why
    return None if isinstance(found, str) else found


def _read(context: Context) -> Contents | str:
    return read_ledger(context.settings.state_dir / DATABASE_NAME, running=context.daemon.running)


def _look_at_ledger(context: Context) -> tuple[Facts, Contents | LedgerError | str] | Finding:
    path = context.settings.state_dir / DATABASE_NAME
    facts = look_at(path)
    if facts.kind == "unseen" or (facts.kind == "file" and not os.access(path, os.R_OK)):
        return hidden(path)
    if facts.kind != "file" or facts.size == 0:
        return facts, "there is nothing to read"
    try:
        return facts, contents(context)
    except LedgerError as error:
        return facts, error


def _judge_ledger(facts: Facts, contents: Contents | LedgerError | str) -> Finding:
    """Judge the ledger. `contents`: what is in it, or why that is not known."""
    path = facts.path
    if facts.kind == "missing":
        return ok("no ledger yet; the daemon creates it at its first start", stops=True)
    if facts.kind != "file":
        return failure("not_a_file", f"{path} is a {facts.kind}, not a file", "find out who made it, and move it away")
    if facts.size == 0:
        advice = "if the station had keys, restore a backup before the daemon starts; else the daemon fills it"
        return warning("empty", f"{path} is empty: new, or lost with the power", advice, stops=True)
    if isinstance(contents, LedgerError):
        if contents.reason in _PASSING:
            advice = contents.hint or "which program holds it (fuser)? Requests are rejected"
            return warning(contents.reason, contents.message, advice, stops=True)
        return refusal(contents, "restore a backup of the state directory, or move it away")
    if isinstance(contents, str):
        return unknown(contents)
    return ok(f"the ledger is intact, of version {SCHEMA_VERSION}, and has {len(contents.keys)} keys on record")


def _look_at_keys(context: Context) -> tuple[Sequence[KeyRecord], float, int, tuple[CertificateType, ...]] | Finding:
    found = contents(context)
    if isinstance(found, str):
        return unknown(found)
    return found.keys, time.time(), found.running, context.settings.policy.certificate_types


def _judge_keys(
    keys: Sequence[KeyRecord], now: float, running: int, served: tuple[CertificateType, ...]
) -> list[Finding]:
    """Judge the keys on record. `now` is Unix time, `running` milliseconds of running time."""
    living = [key for key in keys if key.has_owner and key.state is not KeyState.DESTROYED]
    pending = [key for key in living if key.state is KeyState.PRE_ACTIVATION]
    waiting = [key for key in pending if not key.failed]
    old = [key for key in waiting if now - key.created_at / 1000 > _LONG]
    failed = [_called(key) for key in pending if key.failed]
    overdue = [key for key in living if key.due is not None and key.due < running - DAY]
    owners = {key.owner for key in living if key.state is KeyState.ACTIVE}
    kept = {(key.owner, key.root) for key in living if key.previous}
    renewed = [key for key in living if key.state is KeyState.ACTIVE and (key.owner, key.root) in kept]
    unconfirmed = [_called(key) for key in renewed if not key.confirmed]
    found = [finding for key in keys for finding in _judge_key(key, now)]
    if not owners:
        told = "no key is active: no certificate was installed, or it was not reported as installed"
        found.append(warning("none_active", told, "request a certificate; Josev then reports it as installed"))
    if old:
        told = f"{len(old)} of {len(waiting)} pending keys have waited for their certificate for more than 7 days"
        found.append(warning("waiting", told, "does the CSMS sign? stationkey keys list shows them; they expire"))
    if failed:
        told = f"the certificate of {listed(failed)} was not installed"
        found.append(warning("not_installed", told, "stationkey keys history ID; Josev's log"))
    if overdue:
        found.append(warning("overdue", f"{len(overdue)} keys are overdue", "does the daemon run, and may it write?"))
    if not any(finding.advice for finding in found):
        found.append(ok(f"{len(owners)} keys are active, {len(waiting)} are pending; none needs attention"))
    if unconfirmed:
        found.append(ok(f"the key before is kept until the renewed one is confirmed: {listed(unconfirmed)}"))
    if owners and (missing := [one for one in served if all(owner[0] != one for owner in owners)]):
        found.append(ok(f"no key is active for {listed(missing)}, which may be right"))
    return found


def _called(key: KeyRecord) -> str:
    return f"{key.key_id} ({f'{key.certificate_type} {key.evse_id or str()}'.strip()})"


def _judge_key(key: KeyRecord, now: float) -> Iterator[Finding]:
    if key.state is KeyState.COMPROMISED:
        advice = f"once its certificate is revoked: stationkey keys destroy {key.key_id}"
        yield warning("compromised", f"{_called(key)} is marked as compromised and still on record", advice)
    if key.state is not KeyState.ACTIVE:
        return
    if key.not_after is None:
        yield ok(f"the expiry of the certificate of {_called(key)} is not known: [josev] certificate_dir is not set")
        return
    left, ends = timedelta(seconds=key.not_after - now), f"{datetime.fromtimestamp(key.not_after, UTC):%Y-%m-%d}"
    what = f"the certificate of the active key {_called(key)}"
    if left <= timedelta():
        advice = "request a new one (OCPP TriggerMessage, or Josev); is the clock right?"
        yield failure("expired", f"{what} expired on {ends}", advice)
    elif left < MONTH:
        yield warning("expires", f"{what} expires on {ends}, in {left.days} days", "request a new one [A03.FR.02]")


def _look_at_active(context: Context) -> tuple[Facts, Mapping[str, bytes | None], Mapping[str, bytes], str] | Finding:
    found, directory = contents(context), context.settings.state_dir / DIRECTORY_NAME
    if isinstance(found, str):
        return unknown(found)
    facts = look_at(directory)
    try:
        present = _files_in(directory) if facts.kind == "directory" else {}
    except OSError:
        return hidden(directory)
    when = "within a minute; if it does not, its log says why" if context.daemon.running else "at its start"
    return facts, present, found.active_files, f"the daemon corrects it {when}"


def _files_in(directory: Path) -> dict[str, bytes | None]:
    contents: dict[str, bytes | None] = {}
    for name in os.listdir(directory)[:1000]:  # noqa: PTH208 - names, and no more than these
        try:
            contents[name] = read_regular(directory / name, limit=_MAX_FILE, follow=False)
        except OSError:
            contents[name] = None
    return contents


def _judge_active(
    directory: Facts, contents: Mapping[str, bytes | None], expected: Mapping[str, bytes], when: str
) -> Finding:
    """Judge the files under ``active/``, None for what cannot be read; `when` the daemon corrects them, in words."""
    if directory.kind == "unseen":
        return hidden(directory.path)
    if directory.kind not in {"directory", "missing"}:
        told = f"{directory.path} is a {directory.kind}: the daemon does not write there, and services read other keys"
        return failure("not_a_directory", told, "find out who made it, and move it away")
    present = {name: content for name, content in contents.items() if name != ".lock" and not name.endswith(".new")}
    missing, more = sorted(expected.keys() - present.keys()), sorted(present.keys() - expected.keys())
    differ = sorted(name for name in expected.keys() & present.keys() if present[name] != expected[name])
    if differ:
        return failure("differs", f"not what the ledger says: {listed(differ)} under active/", when)
    if missing:
        return failure("missing", f"missing, so that no service can use the key: {listed(missing)} under active/", when)
    if more:
        return warning("unknown_file", f"not known to the ledger: {listed(more)} under active/", f"{when}: deletes it")
    return ok(f"the {len(expected)} files under active/ are what the ledger says")


_LEDGER: Final = ("state.ledger",)
CHECKS: Final = (
    Check("state.ledger", _look_at_ledger, _judge_ledger, reads=("state_dir",)),
    Check("state.keys", _look_at_keys, _judge_keys, _LEDGER),
    Check("state.active", _look_at_active, _judge_active, _LEDGER),
)
