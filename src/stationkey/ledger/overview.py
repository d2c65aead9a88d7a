"""What a person is shown of the ledger at a glance: the living keys and what happened last."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from stationkey.ledger.engine import Engine
from stationkey.ledger.lifecycle import MADE_AHEAD, KeyState
from stationkey.ledger.migrations import LIVING
from stationkey.ledger.records import read_state, read_time

REJECTED: Final = "rejected"
IGNORED: Final = "ignored"
"""What a status is that changed nothing."""

_SCANNED: Final = 10
"""How many events are read for each that is wanted: those of keys made ahead are passed over."""
_SCANNED_OF_SITE: Final = 160
"""The same for a shard: those of the other shards are passed over."""


class KeyGlance(Struct, frozen=True, kw_only=True):
    """A living key with an owner.

    Attributes:
        key_type: such as ``secp256r1`` or ``RSA-3072``.
        evse_id: the EVSE of the key, or an empty text.
        asked_at: when its CSR was answered; Unix time in milliseconds.
        installed_at: when it became active, or None; the same.
        not_after: expiry of the certificate, Unix time in seconds, or None if not known.
        due: when its time is over, in milliseconds of running time; None where it has no end.
        failed: whether an installation of its certificate failed.
        station: of the key; empty for a single station.
    """

    key_id: str
    certificate_type: str
    evse_id: str
    key_type: str
    common_name: str
    state: KeyState
    asked_at: int
    installed_at: int | None
    not_after: int | None
    due: int | None
    failed: bool
    station: str = ""


class Happening(Struct, frozen=True, kw_only=True):
    """A rejected request, or an event of a key.

    Attributes:
        at: Unix time in milliseconds by the station's clock, which may have been wrong.
        event: a `KeyEvent`, ``CSR answered``, `REJECTED` or `IGNORED`.
        reason: stable reason of a rejection, else empty.
        words: the reason as text; may contain names from the request.
        certificate_type: of the key; empty for a rejection.
        key_id: of the key; empty for a rejection.
        message_id: id of the message that caused it, or an empty text.
        station: of the key or the request; empty for a single station.
    """

    at: int
    event: str
    reason: str
    words: str
    certificate_type: str
    evse_id: str
    common_name: str
    key_id: str
    message_id: str
    station: str = ""


class Overview(Struct, frozen=True):
    """The keys of the ledger, those in use first, and what happened last, newest first."""

    keys: tuple[KeyGlance, ...]
    happenings: tuple[Happening, ...]


def look(engine: Engine, *, keys: int, happenings: int) -> Overview:
    """Return an overview.

    Args:
        engine: the ledger's.
        keys: how many keys to return at most: active ones first, the first to expire first.
        happenings: how many happenings to return at most.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    with engine.reading() as sql:
        scanned = _SCANNED_OF_SITE if sql.mine("key") else _SCANNED
        living = sql.execute(
            "SELECT key_id, certificate_type, evse_id, key_type, common_name, key.state,"  # noqa: S608 - `LIVING` is this package's own text
            " coalesce(asking.at, created_at), installing.at, not_after, due, failed, station"
            f" FROM (SELECT number FROM key WHERE {LIVING} AND certificate_type > ''{sql.mine('key')}"
            "   ORDER BY state != ?, not_after IS NULL, not_after, asked DESC LIMIT ?) AS first JOIN key USING (number)"
            " LEFT JOIN event AS asking ON asking.seq = key.asked"
            " LEFT JOIN event AS installing ON installing.seq = key.installed"
            " ORDER BY key.state != ?, not_after IS NULL, not_after, asked DESC",
            (KeyState.ACTIVE, keys, KeyState.ACTIVE),
        ).fetchall()
        events = sql.execute(
            "SELECT at, event, '', reason, certificate_type, evse_id, common_name, key_id, coalesce(message_id, ''),"  # noqa: S608 - this package's own text
            " station FROM event JOIN key ON key.number = key_number"
            f" WHERE seq > (SELECT max(seq) FROM event) - ? AND event != ?{sql.mine('key')} ORDER BY seq DESC LIMIT ?",
            (happenings * scanned, MADE_AHEAD, happenings),
        ).fetchall()
        rejections = sql.execute(
            f"SELECT at, '{REJECTED}', reason, message, '', '', '', '', request_id, station FROM rejection"  # noqa: S608 - this package's own text
            f" WHERE name = 'generate_csr'{sql.mine('rejection')} ORDER BY seq DESC LIMIT ?",
            (happenings,),
        ).fetchall()
    newest = sorted((*events, *rejections), key=lambda row: -row[0])[:happenings]
    return Overview(tuple(map(_read_key, living)), tuple(map(read_happening, newest)))


def _read_key(
    row: tuple[str, str, str, str, str, str, int, int | None, int | None, int | None, int, str],
) -> KeyGlance:
    key_id, certificate_type, evse_id, key_type, common_name, state, asked_at, installed_at = row[:8]
    not_after, due, failed, station = row[8:]
    return KeyGlance(
        key_id=key_id,
        certificate_type=certificate_type,
        evse_id=evse_id,
        key_type=key_type,
        common_name=common_name,
        state=read_state(state),
        asked_at=read_time(asked_at, milliseconds=True),
        installed_at=None if installed_at is None else read_time(installed_at, milliseconds=True),
        not_after=None if not_after is None else read_time(not_after),
        due=due,
        failed=bool(failed),
        station=station,
    )


def read_happening(row: tuple[int, str, str, str, str, str, str, str, str, str]) -> Happening:
    """Return the happening of a row: time, event, reason, words, and its key or request."""
    at, event, reason, words, certificate_type, evse_id, common_name, key_id, message_id, station = row
    return Happening(
        at=read_time(at, milliseconds=True),
        event=event,
        reason=reason,
        words=words,
        certificate_type=certificate_type,
        evse_id=evse_id,
        common_name=common_name,
        key_id=key_id,
        message_id=message_id,
        station=station,
    )
