"""Changes of keys: creation, owner, events.

The functions that take a connection run in their caller's transaction.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from stationkey.config.settings import Bounds
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.errors import LedgerError, Scope
from stationkey.ledger.engine import Engine, Sql
from stationkey.ledger.lifecycle import INITIAL, MADE_AHEAD, IllegalTransition, KeyEvent, KeyState, step
from stationkey.ledger.migrations import LIVING, of_types
from stationkey.ledger.records import MAKING, read_state

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef


_NEW_KEY: Final = (
    "INSERT INTO key (key_id, scheme, key_type, station, certificate_type, evse_id, algorithm, common_name,"
    " organization_name, country_name, state, created_at, public, due, asked)"
    " VALUES (:key_id, :scheme, :key_type, :station, :certificate_type, :evse_id, :algorithm, :common_name,"
    " :organization_name, :country_name, :state, :created_at, :public, :due, {next_event})"
    " ON CONFLICT (key_id) DO NOTHING RETURNING number, asked"
)

_NEW_OWNER: Final = (
    "UPDATE key SET station = :station, certificate_type = :certificate_type, evse_id = :evse_id,"
    " algorithm = :algorithm, common_name = :common_name, organization_name = :organization_name,"
    " country_name = :country_name, due = :due, asked = {next_event}"
    " WHERE key_id = :key_id AND certificate_type = '' AND state = 'pre-activation' RETURNING number, asked"
)

_ALSO: Final = {
    KeyEvent.INSTALLED: ", installed = :seq",
    KeyEvent.CONFIRMED: ", confirmed = :seq",
    KeyEvent.DELETED: ", deleted = :seq",
    KeyEvent.INSTALLATION_FAILED: ", failed = 1",
}
"""Columns that an event changes besides `state` and `due`."""

_ENDED: Final = (
    ", hint = NULL, ended = 1 + coalesce("
    "(SELECT max(before.ended) FROM key AS before WHERE before.ended IS NOT NULL AND before.station = key.station), 0)"
)
"""Numbers the destroyed keys of a station without gaps."""


class Transitions:
    """Changes of keys, each in its own transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def make_ahead(self, key: KeyRef, *, now: int, due: int, seconds: float) -> None:
        """Record a key without an owner; a later request can take it.

        Args:
            key: the key with its wrapped private part.
            now: Unix time in milliseconds.
            due: expiry if no request takes it, in milliseconds of running time.
            seconds: how long the key store took to generate it.

        Raises:
            LedgerError: nothing was written.
        """
        with self._engine.transaction() as sql:
            (number,) = sql.execute(
                "INSERT INTO key (key_id, scheme, key_type, state, created_at, public, due)"
                " VALUES (:key_id, :scheme, :key_type, :state, :created_at, :public, :due) RETURNING number",
                {"key_id": key.key_id, "due": due, **_made(key, now)},
            ).fetchone()
            _keep_secret(sql, number, key)
            note(sql, number, MADE_AHEAD, INITIAL, reason="", now=now, message_id=None)
            sql.execute(
                "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (f"{MAKING}{key.scheme} {key.key_type}", str(seconds)),
            )

    def apply(
        self,
        key_id: str,
        event: KeyEvent,
        *,
        reason: str,
        now: int,
        due: int | None = None,
        message_id: str | None = None,
    ) -> KeyState:
        """Record an event and the state after it; wipe the private part if that is destroyed.

        Other keys of the owner stay as they are: see `activate`, `restore` and `confirm` for events that change them.

        Args:
            key_id: the key.
            event: what happened.
            reason: why, for the history.
            now: Unix time in milliseconds.
            due: the key's new expiry in milliseconds of running time, or None for no expiry.
            message_id: id of the message that caused it.

        Returns:
            The state after the event.

        Raises:
            IllegalTransition: the event is illegal in the key's state; nothing was written.
            LedgerError: nothing was written.
        """
        with self._engine.transaction() as sql:
            if event is KeyEvent.DELETED:
                _confirm_successor(sql, key_id, now=now)
            state = advance(sql, key_id, event, reason=reason, now=now, due=due, message_id=message_id)
        if state is KeyState.DESTROYED:
            # The key is destroyed even if this fails; the daemon retries with every sweep.
            with suppress(LedgerError):
                self._engine.checkpoint()
        return state

    def activate(
        self,
        key_id: str,
        *,
        chain: str | None,
        not_after: int | None,
        useful_until: int,
        reason: str,
        now: int,
        grace_due: int,
        message_id: str | None,
        root: str = "",
        bounds: Bounds | None = None,
    ) -> list[str]:
        """Make a pending key the active one of its owner and deactivate the one before, in one transaction.

        Args:
            key_id: the key whose certificate was installed.
            chain: certificate and chain in PEM, if known.
            not_after: expiry of the certificate, Unix time in seconds, if known.
            useful_until: when the certificate has certainly expired, in milliseconds of running time.
            reason: why, for the history.
            now: Unix time in milliseconds.
            grace_due: end of a grace period that begins now, in milliseconds of running time.
            message_id: id of the message that caused it.
            root: which root the certificate leads to; empty where roots are not told apart.
            bounds: how many keys may be active if this one replaces none; None for no limit.

        Returns:
            The ids of the replaced keys.

        Raises:
            IllegalTransition: the key cannot be activated in its state; nothing was written.
            LedgerError: nothing was written. With reason ``too_many_active`` or ``too_many_roots``, a bound is reached.
        """
        with self._engine.transaction() as sql:
            advance(sql, key_id, KeyEvent.INSTALLED, reason=reason, now=now, message_id=message_id)
            sql.execute(
                "UPDATE key SET chain = ?, not_after = ?, useful_until = ?, root = ? WHERE key_id = ?",
                (chain, not_after, useful_until, root, key_id),
            )
            return _displace(sql, key_id, KeyEvent.INSTALLED, now=now, grace_due=grace_due, bounds=bounds)

    def restore(
        self,
        key_id: str,
        *,
        reason: str,
        now: int,
        grace_due: int | None = None,
        message_id: str | None = None,
        bounds: Bounds | None = None,
    ) -> list[str]:
        """Make a deactivated key the active one of its owner again [A02.FR.28], in one transaction.

        Certificate and chain are those on record. The key that it replaces becomes the one to go back to.

        Args:
            key_id: the key.
            reason: why, for the history.
            now: Unix time in milliseconds.
            grace_due: end of a grace period that begins now, in milliseconds of running time; None to let the daemon
                set it (`Retention.adopt`).
            message_id: id of the message that caused it.
            bounds: as for `activate`.

        Returns:
            The ids of the replaced keys.

        Raises:
            IllegalTransition: the key is not deactivated; nothing was written.
            LedgerError: nothing was written.
        """
        with self._engine.transaction() as sql:
            back = _is_previous(sql, key_id)
            advance(sql, key_id, KeyEvent.RESTORED, reason=reason, now=now, message_id=message_id)
            return _displace(sql, key_id, KeyEvent.RESTORED, now=now, grace_due=grace_due, bounds=bounds, back=back)

    def confirm(self, key_id: str, *, reason: str, now: int, grace_due: int | None = None) -> None:
        """Record that the station connected with an active key; the grace period of the one before begins.

        Args:
            key_id: the key.
            reason: why, for the history.
            now: Unix time in milliseconds.
            grace_due: as for `restore`.

        Raises:
            IllegalTransition: the key is not active; nothing was written.
            LedgerError: nothing was written.
        """
        with self._engine.transaction() as sql:
            advance(sql, key_id, KeyEvent.CONFIRMED, reason=reason, now=now)
            for rival in _rivals(sql, key_id):
                if not rival.active:
                    sql.execute("UPDATE key SET due = ? WHERE key_id = ?", (grace_due, rival.key_id))

    def seen(self, message_id: str, *, station: str = "") -> bool:
        """Return whether a message of a station has caused an event before: it was redelivered or repeated."""
        with self._engine.reading() as sql:
            row = sql.execute(
                "SELECT 1 FROM event JOIN key ON number = key_number"
                " WHERE message_id = ? AND event != 'CSR answered' AND station = ? LIMIT 1",
                (message_id, station),
            ).fetchone()
        return row is not None


def give_owner(
    sql: Sql, request: GenerateCsrRequest, key: KeyRef, *, station: str, now: int, due: int, ahead: bool
) -> tuple[int, int]:
    """Record a key with its owner, or give an owner to a key made ahead.

    Returns:
        The key's number, and the sequence number for the event.

    Raises:
        LedgerError: the key has an owner or is destroyed (``key_taken``).
    """
    owner = {
        "key_id": key.key_id,
        "station": station,
        "certificate_type": request.data.certificate_type,
        "evse_id": request.evse_id or "",
        "algorithm": request.algorithm,
        "common_name": request.data.common_name,
        "organization_name": request.data.organization_name,
        "country_name": request.data.country_name,
        "due": due,
    }
    if ahead:
        row = sql.execute(_NEW_OWNER.format(next_event=sql.next_event), owner).fetchone()
    else:
        row = sql.execute(_NEW_KEY.format(next_event=sql.next_event), {**owner, **_made(key, now)}).fetchone()
    if row is not None:
        number, asked = row
        if not ahead:
            _keep_secret(sql, number, key)
        return number, asked
    raise LedgerError(f"key {key.key_id} has an owner already, or is gone", reason="key_taken", scope=Scope.KEY)


def _keep_secret(sql: Sql, number: int, key: KeyRef) -> None:
    """Record the private part of a key just inserted."""
    sql.execute("INSERT INTO secret (key_number, private) VALUES (?, ?)", (number, key.private))


def _made(key: KeyRef, now: int) -> dict[str, object]:
    """Return the columns of a new key that do not depend on its owner."""
    return {
        "scheme": key.scheme,
        "key_type": str(key.key_type),
        "state": INITIAL,
        "created_at": now,
        "public": key.public,
    }


def advance(
    sql: Sql,
    key_id: str,
    event: KeyEvent,
    *,
    reason: str,
    now: int,
    due: int | None = None,
    message_id: str | None = None,
) -> KeyState:
    """Record an event and the state after it, as `Transitions.apply` does."""
    row = sql.execute("SELECT number, state, certificate_type FROM key WHERE key_id = ?", (key_id,)).fetchone()
    if row is None:
        raise LedgerError(f"no key {key_id} on record", reason="key_not_found", scope=Scope.KEY)
    number, before, certificate_type = row
    state = step(read_state(before), event)
    if not certificate_type and event in {KeyEvent.INSTALLED, KeyEvent.INSTALLATION_FAILED}:
        raise IllegalTransition(
            f"a key that no request has taken cannot have the event '{event}'", reason="illegal_transition"
        )
    if state is KeyState.DESTROYED:
        sql.destroy_private(number)
        if not certificate_type:
            # It never had an owner, so its history is of no use.
            sql.execute("DELETE FROM event WHERE key_number = ?", (number,))
            sql.execute("DELETE FROM key WHERE number = ?", (number,))
            return state
    seq = note(sql, number, event, state, reason=reason, now=now, message_id=message_id)
    also = _ALSO.get(event, "") + (_ENDED if state is KeyState.DESTROYED else "")
    sql.execute(
        f"UPDATE key SET state = :state, due = :due, previous = 0{also} WHERE number = :number",  # noqa: S608 - `also` is this module's own text
        {"state": state, "due": due, "seq": seq, "number": number},
    )
    return state


def note(sql: Sql, number: int, event: str, state: KeyState, *, reason: str, now: int, message_id: str | None) -> int:
    """Record an event; return its sequence number."""
    (seq,) = sql.execute(
        "INSERT INTO event (key_number, at, event, state, reason, message_id) VALUES (?, ?, ?, ?, ?, ?) RETURNING seq",
        (number, now, event, state, reason, message_id),
    ).fetchone()
    return int(seq)


_KEPT: Final = (
    f"WHERE state = :deactivated AND previous = 1 AND {LIVING}"  # noqa: S608 - `LIVING` is this package's own text
    " AND station = (SELECT station FROM key WHERE key_id = :key_id)"
)
"""The keys to go back to, of the station of a key."""


class _Rival(NamedTuple):
    """Another key of the same owner and root that is active, or that the owner can go back to."""

    key_id: str
    active: bool
    confirmed: bool
    useful_until: int


_RIVALS: Final = (
    "SELECT other.key_id, other.state = :active, other.confirmed IS NOT NULL, coalesce(other.useful_until, 0)"
    " FROM key AS one JOIN key AS other USING (station, certificate_type, evse_id)"
    " WHERE one.key_id = :key_id AND other.key_id != :key_id"
    " AND (other.root = one.root OR '' IN (other.root, one.root))"
    " AND other.state IN (:active, :deactivated) AND other.state != 'destroyed'"
    " AND (other.state = :active OR other.previous = 1) ORDER BY other.installed"
)
"""A key whose root is not known may be of any root. The condition of the index `key_living` is there once more."""


def _rivals(sql: Sql, key_id: str) -> list[_Rival]:
    """Return the rivals of a key, the first installed first."""
    states = {"active": KeyState.ACTIVE, "deactivated": KeyState.DEACTIVATED}
    rows = sql.execute(_RIVALS, {"key_id": key_id, **states})
    return [_Rival(key_id, bool(active), bool(confirmed), until) for key_id, active, confirmed, until in rows]


def _displace(
    sql: Sql,
    key_id: str,
    event: KeyEvent,
    *,
    now: int,
    grace_due: int | None,
    bounds: Bounds | None,
    back: bool = False,
) -> list[str]:
    """Deactivate what a key that has just become active replaces, and mark the one to go back to.

    Args:
        sql: in a transaction.
        key_id: the key.
        event: what made it active.
        now: Unix time in milliseconds.
        grace_due: see `Transitions.restore`.
        bounds: see `Transitions.activate`.
        back: whether it was the key to go back to.

    Returns:
        The ids of the replaced keys.
    """
    rivals = _rivals(sql, key_id)
    replaced = [rival for rival in rivals if rival.active]
    if bounds is not None and not replaced:
        _refuse_beyond(sql, key_id, bounds)
    kept = _to_go_back_to(rivals, back=back)
    for rival in replaced:
        if rival is kept and not rival.confirmed and event is KeyEvent.INSTALLED:
            # No better one is known: there was no other, or its certificate has expired.
            advance(sql, rival.key_id, KeyEvent.CONFIRMED, reason=f"renewed by {key_id} while in use", now=now)
        advance(sql, rival.key_id, KeyEvent.REPLACED, reason=f"by {key_id}", now=now, due=grace_due)
    for rival in rivals:
        if not rival.active and rival is not kept:
            sql.execute("UPDATE key SET previous = 0, due = ? WHERE key_id = ?", (grace_due, rival.key_id))
    if kept is not None:
        root, confirmed, running = sql.execute(
            "SELECT root, confirmed, coalesce((SELECT CAST(value AS BIGINT) FROM meta WHERE name = 'running'), 0)"
            " FROM key WHERE key_id = ?",
            (key_id,),
        ).fetchone()
        held = confirmed is None and kept.useful_until > (running if grace_due is None else grace_due)
        due = kept.useful_until if held else grace_due
        sql.execute("UPDATE key SET previous = 1, due = ?, root = ? WHERE key_id = ?", (due, root, kept.key_id))
        if bounds is not None:
            _release_beyond(sql, key_id, bounds, grace_due)
    return [rival.key_id for rival in replaced]


def _release_beyond(sql: Sql, key_id: str, bounds: Bounds, grace_due: int | None) -> None:
    """Begin the grace period of keys to go back to, the oldest first, if a key's station has more than may be active.

    Only of owners without an active key, which result from deleting the certificates of many EVSEs. The others are
    bounded by the number of active keys.
    """
    types, named = of_types(bounds.types)
    kept = {"deactivated": KeyState.DEACTIVATED, "key_id": key_id, **named}
    (count,) = sql.execute(f"SELECT count(*) FROM key AS kept {_KEPT} AND {types}", kept).fetchone()  # noqa: S608 - `_KEPT` and `types` are this package's own text
    if count > bounds.active_limit:
        sql.execute(
            "UPDATE key SET previous = 0, due = :due WHERE number IN (SELECT number FROM key AS kept"  # noqa: S608 - same
            f" {_KEPT} AND {types} AND NOT EXISTS (SELECT 1 FROM key WHERE state = :active AND {LIVING}"
            " AND (station, certificate_type, evse_id, root) ="
            " (kept.station, kept.certificate_type, kept.evse_id, kept.root))"
            " ORDER BY installed LIMIT :beyond)",
            {**kept, "due": grace_due, "active": KeyState.ACTIVE, "beyond": count - bounds.active_limit},
        )


def _to_go_back_to(rivals: list[_Rival], *, back: bool) -> _Rival | None:
    """Return the key that an owner can go back to from now on.

    An unconfirmed key does not take the place of the one before it, unless the owner has just gone back.
    """
    replaced = [rival for rival in rivals if rival.active]
    before = [rival for rival in rivals if not rival.active]
    confirmed = [rival for rival in replaced if rival.confirmed]
    candidates = replaced if back else confirmed or before or replaced
    return candidates[-1] if candidates else None


def _is_previous(sql: Sql, key_id: str) -> bool:
    return sql.execute("SELECT 1 FROM key WHERE key_id = ? AND previous = 1", (key_id,)).fetchone() is not None


def _confirm_successor(sql: Sql, key_id: str, *, now: int) -> None:
    """Confirm the active key if `key_id`, whose certificate Josev deletes, is the one before it [A02.FR.10]."""
    if not _is_previous(sql, key_id):
        return
    for rival in _rivals(sql, key_id):
        if rival.active and not rival.confirmed:
            advance(sql, rival.key_id, KeyEvent.CONFIRMED, reason=f"Josev deleted the one before, {key_id}", now=now)


def _refuse_beyond(sql: Sql, key_id: str, bounds: Bounds) -> None:
    types, named = of_types(bounds.types)
    active, own = sql.execute(
        "SELECT count(*), count(*) FILTER (WHERE (certificate_type, evse_id) ="  # noqa: S608 - `LIVING` and `types` are this package's own text
        " (SELECT certificate_type, evse_id FROM key WHERE key_id = :key_id))"
        f" FROM key WHERE state = :active AND {types} AND {LIVING}"
        " AND station = (SELECT station FROM key WHERE key_id = :key_id)",
        {"key_id": key_id, "active": KeyState.ACTIVE, **named},
    ).fetchone()
    if active > bounds.active_limit:
        raise LedgerError(
            f"{bounds.active_limit} keys are active, each for another certificate type or EVSE, and no more may be",
            reason="too_many_active",
            hint="retire those that are not needed, or see [lifecycle] active_limit",
            scope=Scope.REQUEST,
        )
    if bounds.active_of_site and _active_of_site(sql, bounds) > bounds.active_of_site:
        raise LedgerError(
            f"{bounds.active_of_site} keys of all stations are active, and no more may be",
            reason="too_many_in_site",
            hint="are there stations that do not exist? see stationkey keys list and [site] active_keys",
            scope=Scope.REQUEST,
        )
    if own > bounds.root_limit:
        raise LedgerError(
            f"keys of {bounds.root_limit} roots are active for this certificate type and EVSE, and no more may be",
            reason="too_many_roots",
            hint="retire the key of a root that is not needed, or see [lifecycle] root_limit",
            scope=Scope.REQUEST,
        )


def _active_of_site(sql: Sql, bounds: Bounds) -> int:
    types, named = of_types(bounds.types)
    (count,) = sql.execute(
        f"SELECT count(*) FROM key WHERE state = :active AND {types} AND {LIVING}",  # noqa: S608 - this package's own text
        {"active": KeyState.ACTIVE, **named},
    ).fetchone()
    return int(count)
