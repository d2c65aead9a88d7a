"""``stationkey requests``: the last requests and statuses, with outcome and reason."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Final

import click

from stationkey.cli._ledger import opened_ledger
from stationkey.cli._options import Configured, configured, json_option
from stationkey.cli._table import SHORT_ID, Column, labelled, lined_up, write
from stationkey.cli.keys import utc
from stationkey.errors import StationKeyError
from stationkey.ledger.engine import Engine
from stationkey.ledger.lifecycle import CSR_ANSWERED
from stationkey.ledger.messages import REQUEST, STATUS, newest
from stationkey.ledger.overview import REJECTED, Happening

_COLUMNS: Final = (
    Column("TIME"),
    Column("ID"),
    Column("OUTCOME", most=16),
    Column("CERTIFICATE TYPE"),
    Column("KEY", 1),
    Column("EVSE", 2, most=20),
)
_SITE_COLUMNS: Final = (*_COLUMNS[:2], Column("STATION"), *_COLUMNS[2:])
_LOOK: Final = 1.0
"""Seconds between two queries with --follow; the daemon writes rejections once a second."""
_MOST: Final = 10_000


@click.command()
@click.argument("message_id", metavar="[ID]", default="")
@click.option("--limit", type=click.IntRange(1, _MOST), default=20, help="Number of messages, the newest.")
@click.option("--follow", is_flag=True, help="Also print new ones, until Ctrl-C.")
@configured(state_dir="Where the ledger is kept.", needs_keystore=False)
@json_option
def requests(message_id: str, limit: int, follow: bool, as_json: bool, settings: Configured) -> None:
    """Show the last requests and statuses.

    Each with its outcome and the reason. With ID, a message's id or the beginning of it, show everything on record
    about that message. Works with and without a running daemon. --json prints one object per line.
    """
    rows = partial(_print_rows, site=bool(settings().site.stations))
    show = _print_json if as_json else _print_whole if message_id else rows
    with opened_ledger(settings()) as ledger:
        show(_found(ledger.database, message_id, limit, follow=follow))


def _found(engine: Engine, message_id: str, limit: int, *, follow: bool) -> Iterator[list[Happening]]:
    """Yield the newest messages, and with `follow` those that come after them; no empty list.

    Raises:
        StationKeyError: no message has this id.
    """
    found, place = newest(engine, limit, beginning=message_id)
    if message_id and not found and not follow:
        raise StationKeyError(
            f"no message on record has an id that begins with {message_id}",
            reason="message_not_found",
            hint="a rejection is on record within a second; a message without a valid id is only in the log",
        )
    while True:
        if found:
            yield found
        if not follow:
            return
        sys.stdout.flush()
        time.sleep(_LOOK)
        found, place = newest(engine, _MOST, after=place, beginning=message_id)


def _outcome(message: Happening) -> str:
    return "accepted" if message.event == CSR_ANSWERED else message.event


def _name(message: Happening) -> str:
    return REQUEST if message.event in {CSR_ANSWERED, REJECTED} else STATUS


def _print_rows(found: Iterable[list[Happening]], *, site: bool) -> None:
    parts = (map(partial(_row, site=site), part) for part in found)
    write(lined_up(_SITE_COLUMNS if site else _COLUMNS, parts, empty="no requests on record yet"))


def _row(message: Happening, *, site: bool) -> tuple[str, ...]:
    """Return the cells of a message, and its reason as a note."""
    return (
        utc(message.at),
        message.message_id[:SHORT_ID],
        *((message.station or "-",) if site else ()),
        _outcome(message),
        message.certificate_type or "-",
        message.key_id[:SHORT_ID] or "-",
        message.evse_id or "-",
        ": ".join(filter(None, (message.reason, message.words))),
    )


def _print_json(found: Iterable[list[Happening]]) -> None:
    for message in chain.from_iterable(found):
        click.echo(json.dumps(_as_object(message)))


def _as_object(message: Happening) -> dict[str, str | None]:
    """Return a message for JSON."""
    return {
        "at": utc(message.at),
        "id": message.message_id,
        **({"station": message.station} if message.station else {}),
        "name": _name(message),
        "outcome": _outcome(message),
        "reason": message.reason or None,
        "message": message.words or None,
        "key_id": message.key_id or None,
        "certificate_type": message.certificate_type or None,
        "evse_id": message.evse_id or None,
    }


def _print_whole(found: Iterable[list[Happening]]) -> None:
    for number, message in enumerate(chain.from_iterable(found)):
        sys.stdout.write("\n" * (number > 0))
        for name, value in _as_object(message).items():
            write(labelled(name.replace("_", " "), value or "-", indent=18))
