"""How the daemon is at a moment, as a value: for ``/health``, for ``systemctl status`` and for the metrics."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from msgspec import Struct

from stationkey._version import __version__
from stationkey.errors import Scope
from stationkey.keystore.worker import Outcome
from stationkey.ledger import Figures
from stationkey.ledger.lifecycle import KeyState


class StoreCondition(Struct, frozen=True):
    """How a key store is at a moment.

    Attributes:
        name: in the configuration.
        stuck: a call to it hangs; see `stationkey.observability.health`.
        last: how many seconds ago it did something last, and how that ended.
    """

    name: str
    stuck: bool
    last: tuple[float, Outcome] | None

    @property
    def reachable(self) -> bool:
        """Whether there is a key store to speak with."""
        return not self.stuck and (self.last is None or self.last[1].scope is not Scope.DEVICE)

    def trouble(self, name: str) -> str:
        """Return what is wrong with it, in words; empty if nothing is.

        Args:
            name: what the words call it.
        """
        if self.stuck:
            return f"{name} hangs"
        if self.last is not None and self.last[1].scope in {Scope.DEVICE, Scope.STORE}:
            return f"{name} cannot serve ({self.last[1].reason})"
        return ""

    def report(self) -> dict[str, object]:
        """Return the same for JSON."""
        ago, outcome = self.last or (None, None)
        return {
            "reachable": self.reachable,
            "stuck": self.stuck,
            "last_result": None if outcome is None else outcome.reason or "ok",
            "last_result_seconds_ago": None if ago is None else round(ago, 1),
        }


class Condition(Struct, frozen=True, kw_only=True):
    """How the daemon is at a moment.

    Attributes:
        ready: it serves, as far as the broker lets it.
        stopping: it was told to end.
        broker: URL of the broker.
        connected: whether the broker's subscription stands.
        connections: how often it has stood in this run.
        changed: since when it stands, or does not; Unix time in seconds.
        stores: the key stores.
        ledger: reason of the ledger's last failure, or ``no_answer``; an empty text where there is nothing wrong.
        due: certificates of active keys that are due for renewal, those that are expired left out.
        expired: certificates of active keys that are expired.
        clock_behind: the clock is before the newest certificate, so nobody knows which are due.
        watchdog: whether systemd waits for signs of life.
    """

    ready: bool
    stopping: bool
    broker: str
    connected: bool
    connections: int
    changed: float
    stores: tuple[StoreCondition, ...]
    ledger: str
    due: int
    expired: int
    clock_behind: bool
    watchdog: bool

    @property
    def stuck(self) -> bool:
        """Whether a call to a key store hangs."""
        return any(store.stuck for store in self.stores)

    def called(self, store: StoreCondition) -> str:
        """Return what a key store is called, in words; by its name if there are others."""
        return "the key store" if len(self.stores) == 1 else f"key store {store.name}"

    @property
    def troubles(self) -> list[str]:
        """What is wrong with key stores and ledger, in words."""
        troubles = [trouble for store in self.stores if (trouble := store.trouble(self.called(store)))]
        if self.ledger:
            troubles.append(f"the ledger fails ({self.ledger})")
        return troubles

    @property
    def healthy(self) -> bool:
        """Whether the next request would be answered, as far as is known."""
        well = all(store.last is not None for store in self.stores) and not self.troubles
        return self.ready and not self.stopping and self.connected and well

    def report(self) -> bytes:
        """The same as JSON."""
        worst = next((store for store in self.stores if store.trouble("it")), self.stores[0])
        report = {
            "status": "ok" if self.healthy else "trouble",
            "version": __version__,
            "ready": self.ready,
            "stopping": self.stopping,
            "broker": {
                "url": self.broker,
                "connected": self.connected,
                "since": datetime.fromtimestamp(self.changed, UTC).isoformat(timespec="seconds"),
                "connections": self.connections,
            },
            "keystore": worst.report(),
            "keystores": {store.name: store.report() for store in self.stores},
            "ledger": {"writable": not self.ledger, "trouble": self.ledger or None},
            "renewal": {"due": self.due, "expired": self.expired, "clock_behind": self.clock_behind},
            "watchdog": {"wanted": self.watchdog, "fed": self.watchdog and not self.stuck},
        }
        return json.dumps(report, indent=2).encode() + b"\n"

    def sentence(self, figures: Figures | None) -> str:
        """The same in a line, for ``systemctl status``."""
        parts = [f"{'connected to' if self.connected else 'no connection to'} {self.broker}", *self.troubles]
        if self.stopping:
            parts.insert(0, "stopping")
        if figures is not None:
            active = sum(count for (state, _), count in figures.keys.items() if state == KeyState.ACTIVE)
            parts.append(f"{active} {'key' if active == 1 else 'keys'} active")
            if figures.expiries:
                expires = datetime.fromtimestamp(figures.expiries[0][2], UTC)
                parts.append(f"next certificate expires {expires:%Y-%m-%d}")
        parts.extend(
            f"{count} {words}" for count, words in ((self.due, "due for renewal"), (self.expired, "expired")) if count
        )
        return ", ".join(parts)
