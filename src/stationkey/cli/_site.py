"""``stationkey status --site``: the shards of a site, who holds them, and what waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import click

from stationkey.cli._table import Column, labelled, listed
from stationkey.config.settings import Settings
from stationkey.errors import ConfigurationError, StationKeyError

_SHARDS: Final = (
    Column("SHARD"),
    Column("HOLDER", most=24),
    Column("SINCE"),
    Column("EPOCH", 2),
    Column("STATIONS", 1),
    Column("IN HAND", 1),
    Column("WAITING"),
    Column("UNDELIVERED"),
)
_DAEMONS: Final = (
    Column("DAEMON", most=32),
    Column("VERSION"),
    Column("SHARDS"),
    Column("SEEN"),
    Column("STATE", most=30),
)
_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86400


def look(settings: Settings) -> dict[str, Any]:
    """Return the site's state, for JSON.

    Raises:
        ConfigurationError: this is no site with several daemons.
    """
    if not settings.ledger:
        raise ConfigurationError(
            "there are no shards: the ledger is SQLite, and one daemon serves all stations",
            reason="site_local",
            hint="stationkey status shows it",
        )
    from stationkey.ledger.postgresql import connection, schema  # noqa: PLC0415 - the extra [site] is not for a station
    from stationkey.site import overview  # noqa: PLC0415 - same

    found: dict[str, Any] = {
        "healthy": False,
        "stations": list(settings.site.stations),
        "shards_configured": settings.site.shards,
        "broker": settings.broker,
        "ledger": settings.ledger,
        "ledger_trouble": None,
        "shards": [],
        "daemons": [],
    }
    try:
        connected = connection.connect(settings.ledger, settings.ledger_password, name="status")
        try:
            schema.check(connected)
            with connection.explained("read"):
                seen = overview.look(connected)
        finally:
            connected.close()
    except StationKeyError as error:
        return {**found, "ledger_trouble": str(error)}
    shards = [
        {
            "number": shard.number,
            "holder": shard.holder or None,
            "held": shard.held,
            "seconds": None if shard.seconds is None else round(shard.seconds, 1),
            "epoch": shard.epoch,
            "stations": shard.stations,
            "in_hand": shard.in_hand,
            "waiting": shard.waiting,
            "undelivered": shard.undelivered,
        }
        for shard in seen.shards
    ]
    daemons = [
        {
            "name": daemon.name,
            "version": daemon.version,
            "living": daemon.living,
            "seconds": round(daemon.seconds, 1),
            "shards": daemon.shards,
            "trouble": daemon.trouble or None,
        }
        for daemon in seen.daemons
    ]
    return {**found, "healthy": seen.healthy, "shards": shards, "daemons": daemons}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the screen."""
    shards, trouble = found["shards"], found["ledger_trouble"]
    held = sum(shard["held"] for shard in shards)
    living = sum(daemon["living"] for daemon in found["daemons"])
    counted = f"{held} of {len(shards)} shards held by {living} {'daemon' if living == 1 else 'daemons'}"
    shown = (
        ("site", f"{', '.join(found['stations'])}: {'unknown' if trouble else counted}"),
        ("broker", found["broker"]),
        ("ledger", f"{found['ledger']}, {trouble or 'ok'}"),
    )
    for name, words in shown:
        first, *more = labelled(name, words, indent=11)
        yield first.replace(name, click.style(name, bold=True), 1)
        yield from more
    if trouble:
        return
    yield "\n"
    yield from listed(_SHARDS, map(_shard_row, shards), empty="no shards yet: start a daemon")
    yield "\n"
    yield from listed(_DAEMONS, map(_daemon_row, found["daemons"]), empty="no daemons")


def _shard_row(shard: dict[str, Any]) -> tuple[str, ...]:
    holder = (shard["holder"] or "unknown") if shard["held"] else "NONE"
    since = "-" if shard["seconds"] is None else _ago(shard["seconds"])
    counts = (shard[name] for name in ("epoch", "stations", "in_hand", "waiting", "undelivered"))
    return (str(shard["number"]), holder, since, *map(str, counts))


def _daemon_row(daemon: dict[str, Any]) -> tuple[str, ...]:
    state = "running" if daemon["living"] else "gone"
    words = f"{state}, {daemon['trouble']}" if daemon["living"] and daemon["trouble"] else state
    return (daemon["name"], daemon["version"], str(daemon["shards"]), _ago(daemon["seconds"]), words)


def _ago(seconds: float) -> str:
    """Return a time in its largest unit."""
    for unit, words in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{seconds // unit:.0f} {words}"
    return f"{max(seconds, 0):.0f} s"
