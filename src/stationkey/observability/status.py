"""The daemon's condition at one moment, for ``/health``, ``systemctl status`` and metrics."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from msgspec import Struct, to_builtins

from stationkey._version import __version__
from stationkey.errors import Scope
from stationkey.keystore.worker import Outcome
from stationkey.ledger import Figures
from stationkey.ledger.lifecycle import KeyState


class StoreCondition(Struct, frozen=True):
    """A key store's condition at one moment.

    Attributes:
        name: in the configuration.
        stuck: a call to it hangs; see `stationkey.observability.health`.
        last: age in seconds and outcome of its last job.
    """

    name: str
    stuck: bool
    last: tuple[float, Outcome] | None

    @property
    def reachable(self) -> bool:
        """Whether the key store answered the last time."""
        return not self.stuck and (self.last is None or self.last[1].scope is not Scope.DEVICE)

    def trouble(self, name: str) -> str:
        """Return its problem as text; empty if it works.

        Args:
            name: its name in the text.
        """
        if self.stuck:
            return f"{name} hangs"
        if self.last is not None and self.last[1].scope in {Scope.DEVICE, Scope.STORE}:
            return f"{name} cannot serve ({self.last[1].reason})"
        return ""

    def report(self) -> dict[str, object]:
        """Return the condition for JSON."""
        ago, outcome = self.last or (None, None)
        return {
            "reachable": self.reachable,
            "stuck": self.stuck,
            "last_result": None if outcome is None else outcome.reason or "ok",
            "last_result_seconds_ago": None if ago is None else round(ago, 1),
        }


class ShardCondition(Struct, frozen=True):
    """A shard of this daemon.

    Attributes:
        number: of the shard.
        epoch: counts who has taken it.
        connected: whether it is subscribed at the broker.
        in_hand: messages in flight.
        waiting: messages that wait.
    """

    number: int
    epoch: int
    connected: bool
    in_hand: int
    waiting: int


class SiteCondition(Struct, frozen=True):
    """A daemon's part in a site.

    Attributes:
        shards: number of shards of the site.
        leased: whether PostgreSQL has confirmed the lease within its time.
        lease_age: seconds since then.
        trouble: reason why this daemon serves nothing, or of the last failure of the lease; empty if there is none.
        held: the shards of this daemon.
    """

    shards: int
    leased: bool
    lease_age: float
    trouble: str
    held: tuple[ShardCondition, ...]

    @property
    def words(self) -> str:
        """Its problem as text; empty if there is none."""
        if self.trouble:
            return f"the site's shards cannot be held ({self.trouble})"
        return "" if self.leased else "no lease on the site's shards"

    def report(self) -> dict[str, object]:
        """Return the condition for JSON."""
        age = None if self.lease_age == float("inf") else round(self.lease_age, 1)
        return {
            "shards": self.shards,
            "leased": self.leased,
            "lease_confirmed_seconds_ago": age,
            "trouble": self.trouble or None,
            "held": [to_builtins(shard) for shard in self.held],
        }


class ShardGlance(Struct, frozen=True, kw_only=True):
    """A shard of the site, whoever has it.

    Attributes:
        number: of the shard, from 0.
        holder: name of the daemon that has it; empty if none has.
        held: whether a living connection has its lock.
        seconds: since when its holder has it, or nobody; None if it never had one.
        epoch: how often it was taken.
        stations: how many of its stations have a key.
        in_hand: messages in flight, at the holder's last heartbeat.
        waiting: messages that wait at the holder.
        undelivered: answers on record that no broker has acknowledged.
    """

    number: int
    holder: str
    held: bool
    seconds: float | None
    epoch: int
    stations: int
    in_hand: int
    waiting: int
    undelivered: int


class DaemonGlance(Struct, frozen=True, kw_only=True):
    """A daemon of the site.

    Attributes:
        name: the same after a restart.
        version: of stationkey.
        living: whether its connection to PostgreSQL lives.
        seconds: since its last heartbeat, by PostgreSQL's clock.
        shards: how many it holds.
        trouble: reason why it serves nothing; empty if none.
    """

    name: str
    version: str
    living: bool
    seconds: float
    shards: int
    trouble: str


class SiteGlance(Struct, frozen=True, kw_only=True):
    """A site with all its daemons, as its database shows it.

    Attributes:
        shards: by their number.
        daemons: the living ones, and those that ended without a word within a day.
    """

    shards: tuple[ShardGlance, ...]
    daemons: tuple[DaemonGlance, ...]

    @property
    def healthy(self) -> bool:
        """Whether every shard has a holder."""
        return bool(self.shards) and all(shard.held for shard in self.shards)


class Condition(Struct, frozen=True, kw_only=True):
    """The daemon's condition at one moment.

    Attributes:
        ready: it serves, apart from the broker.
        stopping: it is shutting down.
        broker: URL of the broker.
        connected: whether it is subscribed at the broker.
        connections: number of subscriptions in this run.
        changed: when `connected` last changed; Unix time in seconds.
        stores: the key stores.
        ledger: reason of the ledger's last failure, or ``no_answer``; empty if it works.
        ledger_stuck: a call to the ledger hangs.
        due: certificates of active keys that are due for renewal, without the expired ones.
        expired: certificates of active keys that are expired.
        clock_behind: the clock is before the newest certificate, so it is unknown which are due.
        watchdog: whether systemd expects keep-alives.
        site: this daemon's part in a site, if it is one of a site's.
    """

    ready: bool
    stopping: bool
    broker: str
    connected: bool
    connections: int
    changed: float
    stores: tuple[StoreCondition, ...]
    ledger: str
    ledger_stuck: bool
    due: int
    expired: int
    clock_behind: bool
    watchdog: bool
    site: SiteCondition | None = None

    @property
    def stuck(self) -> bool:
        """Whether a call to a key store or to the ledger hangs, so that keep-alives stop."""
        return self.ledger_stuck or any(store.stuck for store in self.stores)

    def called(self, store: StoreCondition) -> str:
        """Return the text for a key store, with its name if there are several."""
        return "the key store" if len(self.stores) == 1 else f"key store {store.name}"

    @property
    def troubles(self) -> list[str]:
        """Return the problems of key stores and ledger, as text."""
        troubles = [trouble for store in self.stores if (trouble := store.trouble(self.called(store)))]
        if self.ledger:
            troubles.append(f"the ledger fails ({self.ledger})")
        if self.site is not None and self.site.words:
            troubles.append(self.site.words)
        return troubles

    @property
    def healthy(self) -> bool:
        """Whether the next request would be served, as far as is known."""
        well = all(store.last is not None for store in self.stores) and not self.troubles
        return self.ready and not self.stopping and self.connected and well

    def report(self) -> bytes:
        """Return the condition as JSON."""
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
        if self.site is not None:
            report["site"] = self.site.report()
        return json.dumps(report, indent=2).encode() + b"\n"

    def sentence(self, figures: Figures | None) -> str:
        """Return the condition as one line, for ``systemctl status``."""
        parts = [f"{'connected to' if self.connected else 'no connection to'} {self.broker}", *self.troubles]
        if self.stopping:
            parts.insert(0, "stopping")
        if self.site is not None:
            parts.append(f"{len(self.site.held)} of {self.site.shards} shards")
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
