"""Whether this daemon can serve: another one may reach the broker or the key store from where this one does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final

from stationkey.daemon import Process
from stationkey.errors import StationKeyError
from stationkey.keystore.stores import Store
from stationkey.keystore.worker import Task, Turn, on_keystore
from stationkey.observability.status import StoreCondition
from stationkey.site.adoption import Adoption
from stationkey.site.shard import Dialling, Shard

log = logging.getLogger(__name__)

PROBE: Final = 5.0
"""Seconds between two attempts to reach what could not be reached."""
PROBE_DEADLINE: Final = 30.0
"""Seconds for the key store's answer to a probe."""


class Fitness:
    """Notes how long the broker or a key store has been out of reach.

    Args:
        process: the broker, and the key stores.
        shards: returns the shards of this daemon.
        adoption: returns the adoption that this daemon is about, or None.
        dial: connects to the broker.
        client_id: client identifier for probes of the broker.
        patience: seconds after which this daemon does not count as fit.
    """

    def __init__(
        self,
        process: Process,
        shards: Callable[[], Collection[Shard]],
        adoption: Callable[[], Adoption | None],
        dial: Dialling,
        *,
        client_id: str,
        patience: float,
    ) -> None:
        self._process = process
        self._shards = shards
        self._adoption = adoption
        self._dial = dial
        self._client_id = client_id
        self._patience = patience
        self._now = asyncio.get_running_loop().time
        self._since: dict[str, float] = {}  # by what is out of reach
        self._told = ""

    def trouble(self) -> str:
        """Return why this daemon cannot serve; empty if it can, as far as is known."""
        shards = [shard for shard in self._shards() if shard.admitted and not shard.draining]
        if shards:  # else what was known of the broker stays so, until a probe
            self._note("broker", well=any(shard.connected for shard in shards))
        elif (adoption := self._adoption()) is not None:
            self._note("broker", well=adoption.connected)
        reasons = {"broker": "broker_unreachable"}
        for store in self._process.keystores:
            condition = StoreCondition(store.name, store.thread.stuck, store.thread.last)
            # Reachable alone: what store or record refuse to this daemon, they refuse to others, too.
            self._note(f"store {store.name}", well=condition.reachable)
            reasons[f"store {store.name}"] = (condition.last and condition.last[1].reason) or "keystore_timeout"
        long_enough = [what for what, since in self._since.items() if self._now() - since > self._patience]
        reason = reasons[long_enough[0]] if long_enough else ""
        if reason and not self._told:
            log.warning("not fit to serve: shards are left to daemons that are", extra={"reason": reason})
        elif self._told and not reason:
            log.info("fit to serve again")
        self._told = reason
        return reason

    def _note(self, what: str, *, well: bool) -> None:
        if well:
            self._since.pop(what, None)
        else:
            self._since.setdefault(what, self._now())

    async def probe(self) -> None:
        """Ask what is out of reach whether it is back, where no shard or request notices that. Until cancelled."""
        while True:
            await asyncio.sleep(PROBE)
            if "broker" in self._since and not self._shards():
                with suppress(StationKeyError):
                    await self._probe_broker()
            for store in self._process.keystores:
                if f"store {store.name}" in self._since:
                    with suppress(StationKeyError):
                        await self._probe_store(store)

    async def _probe_broker(self) -> None:
        process = self._process
        connection = await self._dial(
            process.broker, client_id=self._client_id, persistent=False, terms=process.settings.mqtt
        )
        await connection.close()
        self._note("broker", well=True)

    async def _probe_store(self, store: Store) -> None:
        await on_keystore(
            store.thread, lambda opened: opened.description, timeout=PROBE_DEADLINE, turn=Turn.SPARE, task=Task.PROBE
        )
