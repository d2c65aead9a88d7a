"""How the daemon is at a moment, as a value: for ``/health``, for ``systemctl status`` and for the metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from stationkey._version import __version__
from stationkey.errors import Scope
from stationkey.keystore.worker import Outcome
from stationkey.ledger import Figures
from stationkey.ledger.lifecycle import KeyState


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """How the daemon is at a moment.

    Attributes:
        ready: it serves, as far as the broker lets it.
        stopping: it was told to end.
        broker: URL of the broker.
        connected: whether the broker's subscription stands.
        connections: how often it has stood in this run.
        changed: since when it stands, or does not; Unix time in seconds.
        stuck: a call to the key store hangs; see `stationkey.observability.health`.
        last: how many seconds ago the key store did something last, and how that ended.
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
    stuck: bool
    last: tuple[float, Outcome] | None
    ledger: str
    due: int
    expired: int
    clock_behind: bool
    watchdog: bool

    @property
    def reachable(self) -> bool:
        """Whether there is a key store to speak with."""
        return not self.stuck and (self.last is None or self.last[1].scope is not Scope.DEVICE)

    @property
    def troubles(self) -> list[str]:
        """What is wrong with key store and ledger, in words."""
        troubles = []
        if self.stuck:
            troubles.append("the key store hangs")
        elif self.last is not None and self.last[1].scope in {Scope.DEVICE, Scope.STORE}:
            troubles.append(f"the key store cannot serve ({self.last[1].reason})")
        if self.ledger:
            troubles.append(f"the ledger fails ({self.ledger})")
        return troubles

    @property
    def healthy(self) -> bool:
        """Whether the next request would be answered, as far as is known."""
        well = self.last is not None and not self.troubles
        return self.ready and not self.stopping and self.connected and well

    def report(self) -> bytes:
        """The same as JSON."""
        ago, outcome = self.last or (None, None)
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
            "keystore": {
                "reachable": self.reachable,
                "stuck": self.stuck,
                "last_result": None if outcome is None else outcome.reason or "ok",
                "last_result_seconds_ago": None if ago is None else round(ago, 1),
            },
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
