"""``stationkey status``: one screen, whether the daemon runs or not."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from stationkey.cli import _site
from stationkey.cli._ledger import opened_ledger
from stationkey.cli._options import CHOSEN, Configured, configured, json_option
from stationkey.cli._table import SHORT_ID, Column, labelled, listed
from stationkey.cli.health import ask
from stationkey.cli.keys import utc
from stationkey.config.settings import DEFAULT_STORE, Settings
from stationkey.doctor.host.context import holder_of
from stationkey.doctor.host.files import look_at
from stationkey.errors import StationKeyError
from stationkey.ledger import overview
from stationkey.system.listener import Address
from stationkey.system.state_dir import LOCK_NAME

_KEYS: Final = 20
_HAPPENINGS: Final = 8
_INTERVAL: Final = 2.0
"""Seconds between two screens of --watch."""
_KEY_COLUMNS: Final = (
    Column("KEY"),
    Column("STATE"),
    Column("CERTIFICATE TYPE"),
    Column("EVSE", 1, most=20),
    Column("CERTIFICATE EXPIRES"),
    Column("COMMON NAME", 2),
)
_STATION: Final = Column("STATION", most=20)
"""Where a key or event on the screen is of a station of a site: after the first column."""
_HAPPENING_COLUMNS: Final = (
    Column("TIME"),
    Column("EVENT"),
    Column("REASON", most=30),
    Column("KEY", 1),
    Column("ID", 2),
)


@click.command()
@click.option("--watch", is_flag=True, help="Refresh every two seconds, until Ctrl-C.")
@click.option("--site", is_flag=True, help="Show the site: shards, their holders, stations and backlog.")
@configured("broker", "keystore", state_dir="Where the ledger is kept.", needs_keystore=False)
@json_option
def status(watch: bool, site: bool, as_json: bool, settings: Configured) -> None:
    """Show the station's state on one screen.

    Daemon, broker, TPM, ledger, keys with their expiry, and the last events. The daemon's health is shown if [metrics]
    listen is set. Changes nothing, and does not use the TPM.

    With --site, all daemons that share a ledger on PostgreSQL, from any machine that may read it.

    \b
    Exit status: 0 the daemon runs and is healthy, as far as is known (--site: every shard has a holder),
    1 it does not run or is not healthy, 2 wrong usage.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    seen, shown = (_site.look, _site.lines) if site else (look, lines)
    while True:
        found = seen(settings())
        if as_json:
            click.echo(json.dumps(found, indent=2 if not watch else None))
        else:
            if watch and os.environ.get("TERM") != "dumb":
                click.clear()
            for line in shown(found):
                click.echo(line, nl=False)
        if not watch:
            sys.exit(0 if found["healthy"] else 1)
        time.sleep(_INTERVAL)


def look(settings: Settings) -> dict[str, Any]:
    """Return the station's state, for JSON; unknown parts say why."""
    health: dict[str, Any] | None = None
    file = click.get_current_context().meta.get(CHOSEN)
    unasked = "[metrics] listen is not set"
    if settings.metrics:
        try:
            health = json.loads(ask(Address.parse(settings.metrics))[1])
        except (StationKeyError, ValueError) as error:
            unasked = str(error)
    lock = look_at(settings.state_dir / LOCK_NAME)
    runs = health is not None or holder_of(lock)[0]
    silent = "unknown" if lock.kind == "unseen" else "not running"
    found: dict[str, Any] = {
        "healthy": runs and (health is None or health.get("status") == "ok"),
        "daemon": "running" if runs else silent,
        "health": health,
        "health_unknown": None if health else unasked,
        "configuration": None if file is None else str(file),
        "broker": settings.broker,
        "keystore": settings.keystore or None,
        "keystores": {store.name: store.uri for store in settings.stores},
        "state_dir": str(settings.state_dir),
        "ledger": "ok",
        "keys": [],
        "happenings": [],
    }
    try:
        with opened_ledger(settings) as ledger:
            seen = overview.look(ledger.database, keys=_KEYS, happenings=_HAPPENINGS)
    except StationKeyError as error:
        found |= {"ledger": str(error), "healthy": False}
        return found
    found["keys"] = [
        {
            "key_id": key.key_id,
            "state": str(key.state),
            **({"station": key.station} if key.station else {}),
            "certificate_type": key.certificate_type,
            "evse_id": key.evse_id or None,
            "common_name": key.common_name,
            "certificate_expires_at": None if key.not_after is None else utc(key.not_after * 1000),
        }
        for key in seen.keys
    ]
    found["happenings"] = [
        {
            "at": utc(one.at),
            "event": one.event,
            **({"station": one.station} if one.station else {}),
            "reason": one.reason or one.words or None,
            "key_id": one.key_id or None,
            "id": one.message_id or None,
        }
        for one in seen.happenings
    ]
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the screen."""
    health, seen = found["health"] or {}, found["ledger"] == "ok"
    broker, keystores, ledger = (health.get(part, {}) for part in ("broker", "keystores", "ledger"))
    stores = found["keystores"] or {DEFAULT_STORE: "default"}
    several = len(stores) > 1
    shown = [
        ("daemon", f"{found['daemon']}" + (f", {health['status']}" if health else f" ({found['health_unknown']})")),
        ("broker", found["broker"] + _state(broker, connected=True)),
        *(
            ("key store", f"{name}: " * several + uri + _state(keystores.get(name, {}), reachable=True))
            for name, uri in stores.items()
        ),
        ("file", found["configuration"] or "no configuration file: the defaults apply"),
        ("ledger", f"{found['state_dir']}, {ledger.get('trouble') or 'ok'}" if seen else found["ledger"]),
    ]
    for name, words in shown:
        first, *more = labelled(name, words, indent=11)
        yield first.replace(name, click.style(name, bold=True), 1)
        yield from more
    if not seen:
        return
    yield "\n"
    yield from _table(_KEY_COLUMNS, _key_row, found["keys"], empty="no keys yet")
    yield "\n"
    yield from _table(_HAPPENING_COLUMNS, _happening_row, found["happenings"], empty="nothing has happened yet")


def _table(
    columns: tuple[Column, ...],
    row: Callable[[dict[str, Any]], tuple[str, ...]],
    items: list[dict[str, Any]],
    *,
    empty: str,
) -> Iterator[str]:
    """Yield the lines of a table, with a column for the station if one has a name."""
    if not any("station" in item for item in items):
        return listed(columns, map(row, items), empty=empty)
    rows = ((first, item.get("station", "-"), *rest) for item in items for first, *rest in (row(item),))
    return listed((columns[0], _STATION, *columns[1:]), rows, empty=empty)


def _state(part: dict[str, Any], **wanted: bool) -> str:
    ((name, good),) = wanted.items()
    return "" if name not in part else f", {name}" if part[name] is good else f", NOT {name}"


def _key_row(key: dict[str, Any]) -> tuple[str, ...]:
    return (
        key["key_id"][:SHORT_ID],
        key["state"],
        key["certificate_type"],
        key["evse_id"] or "-",
        (key["certificate_expires_at"] or "-").partition("T")[0],
        key["common_name"],
    )


def _happening_row(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        one["at"],
        one["event"],
        one["reason"] or "-",
        (one["key_id"] or "-")[:SHORT_ID],
        (one["id"] or "-")[:SHORT_ID],
    )
