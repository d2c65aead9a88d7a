"""The daemon of the simulation: the real parts, put together as `stationkey.daemon` does it."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from simulation.broker import ADDRESS, Broker
from simulation.keystores import SimulatedStore, Tpm
from simulation.machine import Machine
from simulation.scheduler import Scheduler, SimulatedWorker
from stationkey.config.settings import Bounds, PolicyTerms, PoolTerms, Terms
from stationkey.contract.profiles import PROFILES, Algorithm
from stationkey.errors import KeyStoreError
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import KeyStoreThread, Task, on_keystore
from stationkey.ledger import Ledger
from stationkey.ledger.database import Database
from stationkey.mqtt.gateway import MqttEdge
from stationkey.service.policy import Policy
from stationkey.service.requests import StationKeyService
from stationkey.system.backoff import Backoff
from stationkey.system.state_dir import StateDirectory
from stationkey.system.tasks import Work, background, keep_running

_MINUTE: Final = 60_000
BOUNDS: Final = Bounds(pending_limit=3, pending_total=6, active_limit=4, history_limit=200)
TERMS: Final = Terms(
    pending=30 * _MINUTE, failed=5 * _MINUTE, grace=10 * _MINUTE, answers=100_000 * _MINUTE, bounds=BOUNDS
)
POOL: Final = PoolTerms(ec=2, rsa=0, idle=1.0, age=60 * _MINUTE)
QUEUE: Final = 8
DRAIN: Final = 7.0


def database_of(ledger: Ledger) -> Database:
    """Its database, which is SQLite's."""
    assert isinstance(ledger.database, Database)
    return ledger.database


@dataclass(frozen=True, slots=True)
class Setting:
    """How one station is set up.

    Attributes:
        certificate_dir: whether it knows Josev's directory.
        pool: whether keys are made ahead.
        queue: how many messages may be in hand.
    """

    certificate_dir: bool
    pool: bool
    queue: int = QUEUE

    @classmethod
    def of(cls, rng: random.Random) -> Setting:
        return cls(rng.random() < 0.8, rng.random() < 0.5)


class Station:
    """One run of the daemon.

    Args:
        machine: what it runs on.
        setting: how it is set up.
        broker: its broker.
        tpm: its TPM.
        certificates: Josev's certificate directory.

    Attributes:
        task: the daemon's; done when it has ended.
        acknowledged: how many statuses it has acknowledged.

    Raises:
        StationKeyError: it cannot start.
    """

    def __init__(self, machine: Machine, setting: Setting, broker: Broker, tpm: Tpm, certificates: Path) -> None:
        self.machine = machine
        self.setting = setting
        self.broker = broker
        self.certificates = certificates
        self.scheduler = tpm.scheduler = Scheduler(machine)
        self.stopping = asyncio.Event()
        self.keystore = KeyStoreThread(
            lambda: SimulatedStore(tpm), clock=self.scheduler.seconds, worker=SimulatedWorker
        )
        self.service: StationKeyService | None = None
        self.edge: MqttEdge | None = None
        self.acknowledged = 0
        self.ledger: Ledger | None = None
        self.state: StateDirectory | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin.

        Raises:
            StationKeyError: it cannot start.
        """
        self.state = StateDirectory(self.machine.disk / "state")
        self.ledger = Ledger(self.state.database)
        self.task = self.scheduler.loop.create_task(self._serve(self.ledger), name="daemon")

    async def _serve(self, ledger: Ledger) -> None:
        with suppress(KeyStoreError):
            await on_keystore(
                self.keystore, lambda store: [store.supports(one) for one in Algorithm], timeout=10.0, task=Task.LOOK
            )
        self.service = service = StationKeyService(
            KeyStores.only("tpm2:simulated", self.keystore),
            ledger,
            policy=Policy(PolicyTerms(), PROFILES),
            terms=TERMS,
            pool=POOL if self.setting.pool else None,
            certificate_dir=self.certificates if self.setting.certificate_dir else None,
            worker=SimulatedWorker,
        )
        await service.custody.show_active()
        failures = service.counters.task_failures
        self.edge = edge = MqttEdge(
            ADDRESS,
            service,
            client_id=ledger.client_id(),
            queue=self.setting.queue,
            failures=failures,
            connect=self.broker.connect,
        )
        tasks: dict[str, Work] = {
            "sweep": service.expiry.run,
            "tell-unusable": service.expiry.tell_unusable,
            "learn-ids": service.learn_ids,
            "make-ahead": next(iter(service.pools.values())).run,
            "renewal-watch": partial(service.renewal.run, lambda _: None),
        }
        try:
            async with background(tasks, failures):
                await keep_running(
                    partial(edge.run, self.stopping, drain=DRAIN), "mqtt", failures, backoff=Backoff(0.1, 1.0)
                )
        finally:
            await service.aclose()
            self.keystore.close()
            ledger.close()

    @property
    def busy(self) -> bool:
        """Whether the ledger is in the middle of a call."""
        return any(worker.name == "ledger" and worker.in_hand for worker in self.scheduler.workers)

    def end(self) -> None:
        """End the process at once. The machine must be dead, or the daemon have stopped."""
        self.scheduler.end()
        if self.ledger is not None:
            with suppress(Exception):
                database_of(self.ledger)._connection.close()  # noqa: SLF001 - as the kernel does when a process ends
        if self.state is not None:
            with suppress(OSError):
                self.state.close()
