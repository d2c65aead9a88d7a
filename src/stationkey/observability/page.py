"""The status page for a browser at ``[metrics] listen``.

The template beside this file makes HTML with every value escaped; there is no script, and the Content-Security-Policy
allows none. Jinja2 is loaded when the page is first requested.

Every user of this machine can open a loopback port, so there the page shows no names from requests except those in
``/metrics``. Over a UNIX socket, which only its owner and group can open, it shows them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from stationkey._version import __version__
from stationkey.contract.profiles import PROFILES, CertificateType
from stationkey.errors import LedgerError
from stationkey.keystore.stores import Store
from stationkey.ledger import Figures
from stationkey.ledger.lifecycle import CSR_ANSWERED, KeyEvent, KeyState
from stationkey.ledger.overview import REJECTED, Happening, KeyGlance, Overview
from stationkey.observability.health import LEDGER_PATIENCE, Health
from stationkey.observability.http import Reply
from stationkey.observability.kept import Kept
from stationkey.observability.problems import problems
from stationkey.observability.status import SiteCondition, SiteGlance, StoreCondition
from stationkey.system.text import printable

if TYPE_CHECKING:
    from jinja2 import Template

KEYS: Final = 48
"""Most keys shown."""
HAPPENINGS: Final = 20
"""Most requests and statuses shown."""

_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86400
_LIVE_SECONDS: Final = 10
_SHORT_ID: Final = 10
"""Characters of a key id, as in `stationkey keys list`."""

_TITLES: Final = {str(kind): profile.title for kind, profile in PROFILES.items()}
_OUTCOMES: Final = {
    CSR_ANSWERED: ("CSR accepted", "good"),
    REJECTED: ("CSR rejected", "bad"),
    KeyEvent.INSTALLED: ("certificate installed", "good"),
    KeyEvent.CONFIRMED: ("certificate in use confirmed", "good"),
    KeyEvent.RESTORED: ("previous key restored", "good"),
    KeyEvent.INSTALLATION_FAILED: ("installation failed", "bad"),
    KeyEvent.COMPROMISE_REPORTED: ("key reported as compromised", "bad"),
    KeyEvent.DELETED: ("certificate deleted", ""),
    KeyEvent.EXPIRED: ("key expired", ""),
    KeyEvent.REPLACED: ("key replaced", ""),
    KeyEvent.RETIRED: ("key retired", ""),
    KeyEvent.DESTRUCTION_ORDERED: ("key destroyed by an operator", ""),
}
"""Name and colour of each event of the ledger."""


class _Template(Struct, frozen=True):
    template: Template
    fields: dict[str, str]


class StatusPage:
    """The status page, with and without reload.

    Args:
        health: knows the parts.
        names: whether names from requests may be shown.
        clock: Unix time in seconds.
    """

    def __init__(self, health: Health, *, names: bool, clock: Callable[[], float] = time.time) -> None:
        self._health = health
        self._names = names
        self._clock = clock
        self._loaded: _Template | None = None
        self._once = Kept(partial(self._make, live=0))
        self._live = Kept(partial(self._make, live=_LIVE_SECONDS))

    async def once(self) -> Reply:
        """Return the page as it is now."""
        return await self._shown(self._once)

    async def live(self) -> Reply:
        """Return the page that reloads itself."""
        return await self._shown(self._live)

    async def _shown(self, kept: Kept) -> Reply:
        body = await kept.text()
        assert self._loaded is not None  # by the first body
        return Reply(body, "text/html; charset=utf-8", fields=self._loaded.fields)

    async def _make(self, *, live: int) -> bytes:
        if self._loaded is None:
            self._loaded = _load()
        figures = await self._health.figures()
        view = self._view(figures, None if figures is None else await self._overview())
        condition = self._health.condition().site
        view["site"] = None if condition is None else _site_view(condition, await self._glance())
        return self._loaded.template.render(view, live=live).encode()

    async def _overview(self) -> Overview | None:
        service = self._health.service
        if service is None or service.closed:
            return None
        try:
            async with asyncio.timeout(LEDGER_PATIENCE):
                return await service.overview(keys=KEYS, happenings=HAPPENINGS)
        except (LedgerError, TimeoutError):
            return None

    async def _glance(self) -> SiteGlance | None:
        """Return all shards and daemons of the site; None if the database does not show them."""
        if self._health.glance is None:
            return None
        try:
            async with asyncio.timeout(LEDGER_PATIENCE):
                return await self._health.glance()
        except (LedgerError, TimeoutError):
            return None

    def _view(self, figures: Figures | None, overview: Overview | None) -> dict[str, Any]:
        """Return the values of the template."""
        now, condition, service = self._clock(), self._health.condition(), self._health.service
        keys = () if overview is None else overview.keys
        running = 0 if service is None else service.running
        due = set() if service is None else {certificate.key_id for certificate in service.renewal.due}
        views = [self._key(key, now, running, due=key.key_id in due) for key in keys]
        found = problems(self._health, figures, keys)
        state = "trouble" if not condition.healthy else "notice" if found else "ok"
        return {
            "version": __version__,
            "made": _moment(now, now),
            "state": state,
            "headline": {"trouble": "Not serving", "notice": "Serving, with notices", "ok": "Serving"}[state],
            "problems": found,
            "names": self._names,
            "broker": {
                "url": condition.broker,
                "connected": condition.connected,
                "since": _moment(condition.changed, now),
                "connections": condition.connections,
                "in_hand": 0 if self._health.edge is None else self._health.edge.in_hand,
                "waiting": 0 if self._health.edge is None else self._health.edge.waiting,
            },
            "keystores": [
                self._store_view(*both) for both in zip(self._health.keystores, condition.stores, strict=True)
            ],
            "ledger": {
                "trouble": condition.ledger,
                "size": None if figures is None else f"{figures.size / 1024:,.0f} KiB",
                "active": _count(figures, KeyState.ACTIVE),
                "pending": _count(figures, KeyState.PRE_ACTIVATION),
                "destroyed": None if figures is None else figures.destroyed,
                "running": _span(running / 1000),
            },
            "pool": self._pool(),
            "requests": self._requests(),
            "readable": overview is not None,
            "keys": [view for view in views if view["state"] != KeyState.PRE_ACTIVATION],
            "pending": [view for view in views if view["state"] == KeyState.PRE_ACTIVATION],
            "hidden": 0 if figures is None else max(0, sum(figures.keys.values()) - len(keys)),
            "happenings": [] if overview is None else [self._happening(one, now) for one in overview.happenings],
        }

    def _store_view(self, store: Store, condition: StoreCondition) -> dict[str, Any]:
        if condition.last is None:
            state, level, last = "not asked yet", "warn", "none yet"
        else:
            ago, outcome = condition.last
            state = "hangs" if condition.stuck else "reachable" if condition.reachable else "unreachable"
            level = "good" if condition.reachable else "bad"
            last = f"{outcome.reason or 'ok'}, {_span(ago)} ago"
        return {
            "id": f"keystore{store.suffix}",
            "name": "TPM" if store.uri.scheme.name == "tpm2" else "Key store",
            "uri": str(store.uri),
            "types": [_kind(kind) for kind in CertificateType if kind in store.types],
            "description": printable(self._health.descriptions[store.name]),
            "state": state,
            "level": level,
            "last": last,
            "waiting": sum(store.thread.waiting.values()),
            "busy": store.thread.busy,
        }

    def _pool(self) -> list[tuple[str, int, int]]:
        """Return for each key type how many keys are ready and how many are configured."""
        service = self._health.service
        if service is None:
            return []
        return [
            (f"{kind} in {store.name}" if len(service.pools) > 1 else str(kind), pool.ready().get(kind, 0), wanted)
            for store, pool in service.pools.items()
            for kind, wanted in pool.wanted().items()
        ]

    def _requests(self) -> dict[str, int]:
        """Return the number of requests in this run, by outcome."""
        totals = dict.fromkeys(("accepted", "repeated", "rejected"), 0)
        if self._health.service is not None:
            for (_, outcome, _), count in self._health.service.counters.requests.items():
                totals[outcome] = totals.get(outcome, 0) + count
        return totals

    def _key(self, key: KeyGlance, now: float, running: int, *, due: bool) -> dict[str, Any]:
        known = key.not_after is not None
        named = self._names or (key.state == KeyState.ACTIVE and known)  # as /metrics
        begun = (key.installed_at or key.asked_at) / 1000
        return {
            "kind": _kind(key.certificate_type),
            "station": printable(key.station) if self._names else "",
            "evse_id": printable(key.evse_id) if named else "",
            "common_name": printable(key.common_name) if self._names else "",
            "key_id": key.key_id[:_SHORT_ID] if self._names else "",
            "key_type": key.key_type,
            "state": str(key.state),
            "asked": _moment(key.asked_at / 1000, now),
            "installed": None if key.installed_at is None else _moment(key.installed_at / 1000, now),
            "expires": None if key.not_after is None else _moment(key.not_after, now),
            "left": None if key.not_after is None else _left(begun, key.not_after, now),
            "level": "" if key.not_after is None else "bad" if key.not_after <= now else "warn" if due else "good",
            "due": None if key.due is None else _span(max(0, key.due - running) / 1000),
            "failed": key.failed,
        }

    def _happening(self, one: Happening, now: float) -> dict[str, Any]:
        words, level = _OUTCOMES.get(one.event, (one.event, ""))
        return {
            "at": _moment(one.at / 1000, now),
            "kind": _kind(one.certificate_type) if one.certificate_type else "",
            "outcome": words,
            "level": level,
            "reason": one.reason,
            "words": printable(one.words) if self._names else "",
            "station": printable(one.station) if self._names else "",
            "common_name": printable(one.common_name) if self._names else "",
            "evse_id": printable(one.evse_id) if self._names else "",
            "message_id": printable(one.message_id) if self._names else "",
        }


def _load() -> _Template:
    """Return the template, and header fields that allow its style sheet only."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - loaded when the page is first requested

    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    fields = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    return _Template(environment.from_string((here / "page.html").read_text(encoding="utf-8")), fields)


def _kind(certificate_type: str) -> str:
    """Return the display name of a certificate type; an unknown one is its own name."""
    return _TITLES.get(certificate_type, printable(certificate_type))


def _site_view(condition: SiteCondition, glance: SiteGlance | None) -> dict[str, Any]:
    """Return this daemon's part in a site, and all shards and daemons if the database shows them."""
    return {
        "shards": condition.shards,
        "own": [shard.number for shard in condition.held],
        "trouble": condition.words,
        "shown": glance is not None,
        "all": [
            {
                "number": shard.number,
                "holder": printable(shard.holder) or ("unknown" if shard.held else "nobody"),
                "level": "good" if shard.held else "bad",
                "since": "never taken" if shard.seconds is None else f"for {_span(shard.seconds)}",
                "epoch": shard.epoch,
                "stations": shard.stations,
                "backlog": f"{shard.in_hand} in hand, {shard.waiting} waiting, {shard.undelivered} undelivered",
            }
            for shard in (() if glance is None else glance.shards)
        ],
        "daemons": [
            {
                "name": printable(daemon.name),
                "version": daemon.version,
                "level": "bad" if not daemon.living else "warn" if daemon.trouble else "good",
                "state": (daemon.trouble or "running") if daemon.living else f"gone for {_span(daemon.seconds)}",
                "shards": daemon.shards,
            }
            for daemon in (() if glance is None else glance.daemons)
        ],
    }


def _count(figures: Figures | None, state: KeyState) -> int | None:
    return None if figures is None else sum(count for (of, _), count in figures.keys.items() if of == state)


def _moment(seconds: float, now: float) -> dict[str, str]:
    """Return a time in the forms for machines and people, and relative to now."""
    at = datetime.fromtimestamp(seconds, UTC)
    apart = _span(abs(seconds - now))
    return {
        "iso": at.isoformat(timespec="seconds"),
        "shown": f"{at:%Y-%m-%d %H:%M} UTC",
        "day": f"{at:%Y-%m-%d}",
        "apart": "now" if abs(seconds - now) < 1 else f"in {apart}" if seconds > now else f"{apart} ago",
    }


def _span(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two."""
    for unit, words in ((_DAY, "days"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {words}"
    return f"{seconds:.0f} s"


def _left(begun: float, ends: float, now: float) -> int:
    """Return the percentage of a certificate's time that is left."""
    return round(100 * min(1.0, max(0.0, (ends - now) / max(1.0, ends - begun))))
