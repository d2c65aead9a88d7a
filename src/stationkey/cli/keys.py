"""``stationkey keys``: the keys in the ledger."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

import click
import msgspec

from stationkey.cli._ledger import opened_ledger
from stationkey.cli._options import Configured, chosen_file, configured, json_option
from stationkey.cli._table import SHORT_ID, Column, in_parts, listed, write
from stationkey.config.file import read_file, settle
from stationkey.config.settings import RenewalTerms
from stationkey.errors import Scope, StationKeyError
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.service.active_files import ActiveDirectory
from stationkey.system.pem import to_pem
from stationkey.system.text import printable

_COLUMNS: Final = (
    Column("KEY"),
    Column("STATE"),
    Column("CERTIFICATE TYPE"),
    Column("EVSE", 3),
    Column("ALGORITHM", 4),
    Column("COMMON NAME", 5),
    Column("AGE", 2),
    Column("CERTIFICATE EXPIRES", 1),
)
_SITE_COLUMNS: Final = (_COLUMNS[0], Column("STATION"), *_COLUMNS[1:])
_EVENT_COLUMNS: Final = (
    Column("TIME"),
    Column("EVENT"),
    Column("STATE AFTER IT", 1),
    Column("REASON", 2, most=26),
    Column("MESSAGE", 3),
)

_PART = 100
"""Keys that are encoded together, so that a list needs bounded memory."""
_COMPLETED = 100
"""Most ids that completion offers."""
_EMPTYING = 0.5
"""Seconds to wait until the write-ahead log can be emptied; other processes take milliseconds."""

_configured = configured(state_dir="Where the ledger is kept.", needs_keystore=False)


@click.group()
def keys() -> None:
    """List, show and end keys.

    Works while the daemon runs.
    """


def _renewal(terms: RenewalTerms, key: KeyRecord) -> str | None:
    """Return whether the certificate of an active key is due for renewal (`Due`), or None if not asked for."""
    if key.state is not KeyState.ACTIVE or key.not_after is None:
        return None
    from stationkey.x509.renewal import RenewalRule  # noqa: PLC0415 - a ledger without active keys needs no X.509

    rule = RenewalRule(before=terms.before // 1000, life_divisor=terms.life_divisor)
    return str(rule.judge_chain(key.chain, key.not_after, time.time()))


def _key_json(key: KeyRecord, renewal: Callable[[KeyRecord], str | None]) -> dict[str, object]:
    return {
        "key_id": key.key_id,
        "state": str(key.state),
        "installation_failed": key.failed,
        "confirmed": key.confirmed,
        "previous": key.previous,
        "root": key.root or None,
        **({"station": key.station} if key.station else {}),
        "certificate_type": key.certificate_type or None,
        "evse_id": key.evse_id,
        "algorithm": key.algorithm or None,
        "key_type": key.key_type,
        "keystore": key.scheme,
        "common_name": key.common_name or None,
        "organization_name": key.organization_name or None,
        "country_name": key.country_name or None,
        "created_at": utc(key.created_at),
        "certificate_expires_at": None if key.not_after is None else utc(key.not_after * 1000),
        "renewal_due": renewal(key),
        "request_ids": list(key.request_ids),
        "subject_public_key_info": b64encode(key.public).decode(),
    }


def utc(milliseconds: int) -> str:
    """Return a Unix time for people and programs."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds // 1000))


def _age(milliseconds: int) -> str:
    """Return an age by this machine's clock, in days, hours or minutes."""
    minutes = max(0, int(time.time() - milliseconds / 1000)) // 60
    for unit, length in (("d", 24 * 60), ("h", 60)):
        if minutes >= length:
            return f"{minutes // length}{unit}"
    return f"{minutes}min"


@keys.command("list")
@click.option("--station", metavar="NAME", help="Only the keys of this station of a site.")
@_configured
@json_option
def keys_list(station: str | None, settings: Configured, as_json: bool) -> None:
    """List the keys, oldest first."""
    with opened_ledger(settings()) as ledger:
        found = ledger.keys.stream(station=station)
        renewal = partial(_renewal, settings().renewal)
        if as_json:
            write(_json_array(_key_json(key, renewal) for key in found))
        else:
            site = bool(settings().site.stations)
            rows = (_key_row(key, renewal(key), site=site) for key in found)
            write(listed(_SITE_COLUMNS if site else _COLUMNS, rows, empty="no keys yet"))


def _json_array(items: Iterable[object]) -> Iterator[str]:
    """Yield a JSON array in the format of `json.dumps` with indent 2, a part at a time."""
    before = "["
    for part in in_parts(items, _PART):
        # With indent, json.dumps encodes in Python: five times the processor time.
        yield before + msgspec.json.format(json.dumps(part), indent=2)[1:-2]
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def _state_text(key: KeyRecord) -> str:
    if key.failed and key.state is KeyState.PRE_ACTIVATION:
        return f"{key.state}, failed"
    return f"{key.state}, previous" if key.previous else str(key.state)


def _key_row(key: KeyRecord, renewal: str | None, *, site: bool) -> tuple[str, ...]:
    expires = "-" if key.not_after is None else utc(key.not_after * 1000).partition("T")[0]
    return (
        key.key_id[:SHORT_ID],
        *((key.station or "-",) if site else ()),
        _state_text(key),
        key.certificate_type or "(made ahead)",
        key.evse_id or "-",
        key.algorithm or key.key_type,
        key.common_name or "-",
        _age(key.created_at),
        f"{expires}, {renewal}" if renewal in {"due", "expired"} else expires,
    )


def complete_key_id(context: click.Context, _parameter: click.Parameter, beginning: str) -> list[str]:
    """Return the ids with this prefix; none if the ledger cannot be read."""
    given, file = context.params.get("state_dir"), context.params.get("config_file")
    try:
        with context.scope(cleanup=False):
            settings = settle(read_file(chosen_file(file)), needs_keystore=False, state_dir=given)
        with opened_ledger(settings) as ledger:
            return [key.key_id for key in ledger.keys.all(beginning)[:_COMPLETED]]
    except StationKeyError:
        return []


_key_id = click.argument("key_id", metavar="ID", shell_complete=complete_key_id)


@keys.command("show")
@_key_id
@_configured
@json_option
def keys_show(key_id: str, settings: Configured, as_json: bool) -> None:
    """Show one key.

    ID is its id, or a unique prefix of it.
    """
    with opened_ledger(settings()) as ledger:
        shown = _key_json(ledger.keys.named(key_id), partial(_renewal, settings().renewal))
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    for name, value in shown.items():
        text = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name.replace('_', ' '):<24}{'-' if text is None else printable(str(text))}")


@keys.command("export-csr")
@_key_id
@_configured
def keys_export_csr(key_id: str, settings: Configured) -> None:
    """Print the CSR (PEM) of a key that is not destroyed."""
    with opened_ledger(settings()) as ledger:
        key = ledger.keys.named(key_id)
        found = [ledger.answers.find(request_id, station=key.station) for request_id in reversed(key.request_ids)]
    csr = next((answer.csr for answer in found if answer is not None and answer.csr), None)
    if csr is None:
        raise StationKeyError(
            f"no CSR on record for {key.key_id} ({key.state})",
            reason="csr_not_found",
            hint="it is deleted with the key, and after [lifecycle] answer_days; a key made ahead has none yet",
            scope=Scope.KEY,
        )
    click.echo(csr, nl=False)


@keys.command("history")
@_key_id
@_configured
@json_option
def keys_history(key_id: str, settings: Configured, as_json: bool) -> None:
    """Show the events of a key, with time and reason."""
    with opened_ledger(settings()) as ledger:
        events = ledger.keys.history(ledger.keys.named(key_id).key_id)
    if as_json:
        shown = [
            {
                "at": utc(event.at),
                "event": event.event,
                "state": event.state,
                "reason": event.reason,
                "message_id": event.message_id,
            }
            for event in events
        ]
        click.echo(json.dumps(shown, indent=2))
        return
    rows = ((utc(one.at), one.event, one.state, one.reason or "-", one.message_id or "-") for one in events)
    write(listed(_EVENT_COLUMNS, rows, empty="nothing yet"))


def _order(key_id: str, event: KeyEvent, reason: str, settings: Configured, *, ask: str | None = None) -> None:
    """Apply an operator's order to a key, in the ledger and under active/."""
    with opened_ledger(settings(), write=True) as ledger:
        key = ledger.keys.named(key_id)
        if ask is not None:
            named = printable(f"{key.key_id} ({key.certificate_type}, {key.state})")
            click.confirm(f"{ask} {named}?", abort=True, err=True)
            if (now := ledger.keys.named(key.key_id).state) != key.state:
                raise StationKeyError(
                    f"{key.key_id} has become {now} meanwhile; nothing was changed",
                    reason="key_changed",
                    hint="retry",
                )
        at, state = int(time.time() * 1000), KeyState.ACTIVE
        match event:
            case KeyEvent.RESTORED:
                bounds = settings().bounds_of(key.certificate_type)
                ledger.transitions.restore(key.key_id, reason=reason, now=at, bounds=bounds)
            case KeyEvent.CONFIRMED:
                ledger.transitions.confirm(key.key_id, reason=reason, now=at)
            case _:
                state = ledger.transitions.apply(key.key_id, event, reason=reason, now=at)
        done = printable(f"{key.key_id} is {state}")
        try:
            _clean_up(ledger, done)
        finally:
            click.echo(done)  # last: standard output may be closed


def _clean_up(ledger: Ledger, done: str) -> None:
    """Write active/ and wipe the traces of destroyed keys; a site's daemons do that, each for its own stations.

    Args:
        ledger: with the new state of the key.
        done: the change, for the beginning of the message.

    Raises:
        StationKeyError: a step failed; the message says what was done and what was not.
    """
    if not ledger.database.local:
        return
    failed: dict[str, StationKeyError] = {}
    for what, act in {
        "active/ is not up to date": lambda: ActiveDirectory(ledger.database.directory).sync(ledger.keys.active_files),
        "traces of destroyed keys are not wiped": ledger.retention.wipe,
    }.items():
        try:
            act()
        except StationKeyError as error:
            failed[what] = error
    if failed:
        first = next(iter(failed.values()))
        words = "; ".join(f"{what}: {error.message}" for what, error in failed.items())
        raise StationKeyError(f"{done}, but {words}", reason=first.reason, hint=first.hint)
    if not _emptied(ledger):
        click.echo("another process reads the ledger: the daemon empties the write-ahead log when it ends", err=True)


def _emptied(ledger: Ledger) -> bool:
    """Empty the write-ahead log when no other process uses it; holds no lock while waiting."""
    end = time.monotonic() + _EMPTYING
    while not ledger.database.checkpoint():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)  # SQLite has no event for the end of a reader
    return True


_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_reason = click.option("--reason", default="by the operator", help="For the history.")


@keys.command("retire")
@_key_id
@_reason
@_configured
def keys_retire(key_id: str, reason: str, settings: Configured) -> None:
    """Take an active key out of use.

    It is kept for the grace period, and then destroyed.
    """
    _order(key_id, KeyEvent.RETIRED, reason, settings)


@keys.command("restore")
@_key_id
@_reason
@_configured
def keys_restore(key_id: str, reason: str, settings: Configured) -> None:
    """Make a deactivated key active again.

    The active key in its place is deactivated, and can be restored in turn.
    """
    _order(key_id, KeyEvent.RESTORED, reason, settings)


@keys.command("confirm")
@_key_id
@_reason
@_configured
def keys_confirm(key_id: str, reason: str, settings: Configured) -> None:
    """Confirm that the station connected with a key.

    The grace period of the key before begins.
    """
    _order(key_id, KeyEvent.CONFIRMED, reason, settings)


@keys.command("destroy")
@_key_id
@_yes
@_reason
@_configured
def keys_destroy(key_id: str, yes: bool, reason: str, settings: Configured) -> None:
    """Destroy a key permanently.

    Its private part is wiped from the ledger and from active/.
    """
    ask = None if yes else "Destroy"
    _order(key_id, KeyEvent.DESTRUCTION_ORDERED, reason, settings, ask=ask)


@keys.command("mark-compromised")
@_key_id
@_yes
@_reason
@_configured
def keys_mark_compromised(key_id: str, yes: bool, reason: str, settings: Configured) -> None:
    """Mark a key as possibly known to others.

    It is taken out of use at once. Have its certificate revoked.
    """
    ask = None if yes else "Mark as compromised"
    _order(key_id, KeyEvent.COMPROMISE_REPORTED, reason, settings, ask=ask)


@keys.command("export-public")
@_key_id
@_configured
def keys_export_public(key_id: str, settings: Configured) -> None:
    """Print the public key (PEM) of a key."""
    with opened_ledger(settings()) as ledger:
        key = ledger.keys.named(key_id)
    # The standard library has armour for certificates only; the lines in between are the same [RFC 7468 13].
    click.echo(to_pem("PUBLIC KEY", key.public), nl=False)
