"""The composition root: starts and stops the parts of the daemon."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import replace

from stationkey._version import __version__
from stationkey.config.settings import Settings
from stationkey.contract.profiles import Algorithm
from stationkey.contract.renewal import renewal_update
from stationkey.errors import StationKeyError
from stationkey.keystore import KeyStore
from stationkey.keystore.stores import KeyStores, Store, checked_stores
from stationkey.keystore.worker import Task, on_keystore, overdue
from stationkey.ledger import Ledger
from stationkey.mqtt.connection import MqttConnection, connect
from stationkey.mqtt.gateway import MqttEdge
from stationkey.mqtt.introduction import check
from stationkey.mqtt.retained import RetainedTopic
from stationkey.mqtt.topics import Stations, renewal
from stationkey.mqtt.url import Broker
from stationkey.mqtt.waiting import unless
from stationkey.observability.health import Health
from stationkey.service.policy import Policy
from stationkey.service.renewal import DueCertificate
from stationkey.service.requests import StationKeyService
from stationkey.service.strays import Strays, tell_left_behind
from stationkey.system.backoff import Backoff
from stationkey.system.counters import Counters, Counts
from stationkey.system.hardening import close_to_others
from stationkey.system.state_dir import StateDirectory
from stationkey.system.systemd import ServiceManager
from stationkey.system.tasks import Work, background, keep_running, note_failure

if TYPE_CHECKING:
    from stationkey.observability.http import Page
    from stationkey.observability.page import StatusPage

log = logging.getLogger(__name__)

DRAIN: Final = 7.0
"""Seconds that requests in flight get after SIGTERM; with closing, the process ends within 10."""
FIRST_LOOK: Final = 10.0
"""Seconds to wait at start for the key store's description, before the daemon goes on without it."""
SECOND_LOOK: Final = 3.0
"""The same where another key store has answered: one that hangs must not delay the others."""


class Process(Struct, frozen=True):
    """What each daemon has, whatever it serves.

    Attributes:
        settings: the configuration.
        broker: the broker.
        state_dir: the state directory.
        keystores: the key stores.
        counters: outcomes of this run.
        health: tells systemd and HTTP clients.
        stop: set by the first signal that ends the daemon.
        received: the signals so far.
    """

    settings: Settings
    broker: Broker
    state_dir: Path
    keystores: KeyStores
    counters: Counters
    health: Health
    stop: asyncio.Event
    received: list[signal.Signals]


class Part(Struct, frozen=True):
    """A ledger's service, its session at the broker, and their background tasks.

    Attributes:
        service: answers requests.
        edge: brings them.
        tasks: its background tasks, by name.
        failures: counts failures of the tasks.
    """

    service: StationKeyService
    edge: MqttEdge
    tasks: Mapping[str, Work]
    failures: Counts

    async def run(self, stop: asyncio.Event, more: Mapping[str, Work] | None = None) -> None:
        """Serve until `stop` is set and the messages in flight are answered. Closes the service.

        Args:
            stop: ends the service.
            more: further background tasks.
        """
        try:
            async with background({**self.tasks, **(more or {})}, self.failures):
                await keep_running(
                    partial(self.edge.run, stop, drain=DRAIN),
                    "mqtt",
                    self.failures,
                    backoff=Backoff(0.1, 1.0),  # SIGTERM waits for it
                )
        finally:
            await self.service.aclose()


async def serve(settings: Settings) -> signal.Signals:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The signal.

    Raises:
        StationKeyError: it cannot start.
    """
    broker = Broker.parse(settings.broker)
    start_stores = checked_stores(settings)
    with state_of(settings) as state:
        ledger = Ledger(state.database)
        try:
            async with running(settings, broker, start_stores) as process:
                # A hung TPM must not delay a signal.
                stopped = asyncio.create_task(process.stop.wait(), name="stop")
                await unless(stopped, check(broker, settings.mqtt))
                degraded = await unless(stopped, introduce(process)) or ""
                service = service_of(process, ledger)
                await service.custody.show_active()
                collect_garbage()
                stations = Stations(settings.topic_prefix, settings.site.stations)
                part = part_of(
                    process,
                    service,
                    client_id=settings.client_id or ledger.client_id(),
                    stations=stations,
                    stale=ledger.stale_filters(stations.filters, site=stations.several),
                    on_ready=partial(_ready, process.health, degraded),
                    on_away=process.health.away,
                )
                process.health.watch(service, part.edge)
                await part.run(process.stop, _of_one_ledger(process, service))
                log.info("stopped", extra=dict(process.counters.outcomes()))
        finally:
            ledger.close()
        return process.received[0]


@contextmanager
def state_of(settings: Settings) -> Iterator[StateDirectory]:
    """Lock the state directory while the block runs, after closing this process to others."""
    close_to_others()
    os.umask(0o077)
    state = StateDirectory(settings.state_dir)
    try:
        yield state
    finally:
        state.close()


@asynccontextmanager
async def running(settings: Settings, broker: Broker, start_stores: Callable[[], KeyStores]) -> AsyncIterator[Process]:
    """Start what each daemon has: key stores, health, signal handlers; end it after the block.

    Raises:
        ConfigurationError: the address of ``[metrics]`` is unusable or not allowed.
    """
    keystores = start_stores()
    watching = AsyncExitStack()
    try:
        counters = Counters()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(partial(_note_unhandled, counters.task_failures))
        health = await watching.enter_async_context(_watching(settings, keystores, str(broker), counters.task_failures))
        stop = asyncio.Event()
        received: list[signal.Signals] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _stopping, number, received, stop, health)
        yield Process(settings, broker, settings.state_dir, keystores, counters, health, stop, received)
    finally:
        await watching.aclose()  # last, so that keep-alives are sent until then
        keystores.close()


def service_of(process: Process, ledger: Ledger) -> StationKeyService:
    """Return a service on a ledger. Reads the ledger."""
    settings = process.settings
    return StationKeyService(
        process.keystores,
        ledger,
        profiles=settings.profiles,
        policy=Policy(settings.policy, settings.profiles),
        deadline=settings.deadlines.ec,
        rsa_deadline=settings.deadlines.rsa,
        terms=settings.lifecycle,
        pool=settings.pool,
        renewal=settings.renewal,
        certificate_dir=settings.certificate_dir,
        on_change=process.health.keys_changed,
        counters=process.counters,
    )


def collect_garbage() -> None:
    """Enable garbage collection, without the objects of the start: they are permanent."""
    gc.freeze()
    gc.enable()


def part_of(
    process: Process,
    service: StationKeyService,
    *,
    client_id: str,
    stations: Stations,
    on_ready: Callable[[], None],
    on_away: Callable[[], None],
    share: str = "",
    serves: Callable[[str], bool] = lambda _: True,
    stale: Sequence[str] = (),
    dial: Callable[..., Coroutine[Any, Any, MqttConnection]] = connect,
) -> Part:
    """Return a service with its edge to the broker.

    Args:
        process: what the daemon has.
        service: answers the requests.
        client_id: client identifier of the persistent session.
        stations: the stations that are served.
        on_ready: called after each subscription.
        on_away: called whenever a connection is lost or fails.
        share: end of the topics on which something is retained, where several parts do so.
        serves: which of the stations are served; see `MqttEdge`.
        stale: topic filters to unsubscribe from.
        dial: makes a connection.
    """
    settings, failures = process.settings, process.counters.task_failures
    due = _renewal_topic(settings, share)
    terms = settings.mqtt
    if share and terms.availability_topic is not None:
        terms = replace(terms, availability_topic=terms.availability_topic + share)
    edge = MqttEdge(
        process.broker,
        service,
        client_id=client_id,
        topic_prefix=settings.topic_prefix,
        stations=stations,
        serves=serves,
        stale=stale,
        terms=terms,
        queue=settings.policy.queue,
        payload_bytes=settings.policy.payload_bytes,
        retained=due,
        failures=failures,
        on_ready=on_ready,
        on_away=on_away,
        connect=dial,
    )
    tasks: dict[str, Work] = {
        "sweep": service.expiry.run,
        "learn-ids": service.learn_ids,
        "renewal-watch": partial(service.renewal.run, partial(_show_due, due)),
    }
    return Part(service, edge, tasks, failures)


def _of_one_ledger(process: Process, service: StationKeyService) -> dict[str, Work]:
    """Return the tasks of a service that has the key stores to itself."""
    tasks: dict[str, Work] = {
        "tell-unusable": service.expiry.tell_unusable,
        "tell-left-behind": partial(tell_left_behind, service.custody, process.settings.state_dir),
    }
    for store, pool in service.pools.items():
        tasks[f"make-ahead{store.suffix}"] = pool.run
        if store.uri.scheme.resident:
            tasks[f"strays{store.suffix}"] = Strays(service.custody, store).run
    return tasks


async def introduce(process: Process) -> str:
    """Log the key stores and their algorithms; refuse to start if none of them can ever serve.

    Returns:
        Why one of them cannot serve yet; empty if all can.
    """
    settings, keystores, health = process.settings, process.keystores, process.health
    named = {"keystore" + store.suffix: str(store.uri) for store in keystores}
    log.info("stationkey %s", __version__, extra={**named, "state_dir": str(settings.state_dir)})
    looks = {asyncio.create_task(_introduce_one(store, health)): store for store in keystores}
    done, waiting = await asyncio.wait(looks, return_when=asyncio.FIRST_COMPLETED)
    if waiting:
        serves = any(look.result() is None for look in done)
        await asyncio.wait(waiting, timeout=SECOND_LOOK if serves else None)
    results = {store: look.result() if look.done() else overdue() for look, store in looks.items()}
    failures = {store: failure for store, failure in results.items() if failure is not None}
    if failures.keys() == set(keystores) and not any(failure.transient for failure in failures.values()):
        raise next(iter(failures.values()))
    for store, failure in failures.items():
        about = {"reason": failure.reason, "certificate_types": ",".join(sorted(store.types)), **store.about}
        log.error("rejecting requests until the key store works: %s", failure, extra=about)
    return "; ".join(failure.message for failure in failures.values())


async def _introduce_one(store: Store, health: Health) -> StationKeyError | None:
    """Log a key store and its algorithms, or return why it does not answer."""

    def look(opened: KeyStore) -> tuple[str, dict[Algorithm, str]]:
        supported = {algorithm: opened.supports(algorithm) for algorithm in store.algorithms}
        return opened.description, {
            algorithm: str(support.key_type) if support else support.missing for algorithm, support in supported.items()
        }

    try:
        description, algorithms = await on_keystore(store.thread, look, timeout=FIRST_LOOK, task=Task.LOOK)
    except StationKeyError as failure:
        return failure
    health.descriptions[store.name] = description
    level = logging.INFO if store.uri.scheme.protected else logging.WARNING
    served = {str(name): words for name, words in algorithms.items()}
    log.log(level, "key store: %s", description, extra={**served, **store.about})
    return None


def _renewal_topic(settings: Settings, share: str) -> RetainedTopic | None:
    """Return the topic of due certificates, if one is configured."""
    topic = settings.renewal.topic
    if topic is None:
        return None
    taken, site = settings.mqtt.availability_topic, bool(settings.site.stations)
    return RetainedTopic(renewal(settings.topic_prefix, topic + share, availability_topic=taken, site=site))


def _show_due(topic: RetainedTopic | None, due: tuple[DueCertificate, ...]) -> None:
    if topic is not None:
        topic.set(renewal_update(tuple(certificate.told() for certificate in due)))


def _note_unhandled(failures: Counts, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Count and log an exception that a callback or a task of the event loop did not handle."""
    error = context.get("exception")
    if error is None:
        loop.default_exception_handler(context)
    else:
        note_failure(error, "event-loop", failures)


def _ready(health: Health, degraded: str) -> None:
    """Log the subscription, and at the first time why requests are rejected, if they still are."""
    if degraded and health.condition().troubles and not health.connections:
        log.warning("serving degraded: %s", degraded)
    else:
        log.info("ready")
    health.connected()


def _stopping(number: signal.Signals, received: list[signal.Signals], stop: asyncio.Event, health: Health) -> None:
    received.append(number)
    if not stop.is_set():
        log.info("stopping: finishing messages in flight")
        health.stopping()
    stop.set()


@asynccontextmanager
async def _watching(settings: Settings, keystores: KeyStores, broker: str, failures: Counts) -> AsyncIterator[Health]:
    """Report health to systemd, if it is there, and at ``[metrics] listen``, if set.

    Raises:
        ConfigurationError: the address is unusable or not allowed.
    """
    health = Health(
        keystores,
        ServiceManager.of(os.environ),
        broker=broker,
        patience=settings.deadlines.ec,
        failures=failures,
    )
    async with health.watching(probing=settings.metrics is not None), AsyncExitStack() as stack:
        if settings.metrics is not None:
            from stationkey.observability.http import Endpoint  # noqa: PLC0415 - loaded only if configured
            from stationkey.system.listener import Address, Listener  # noqa: PLC0415 - same

            listener = stack.enter_context(Listener(Address.parse(settings.metrics)))
            pages = _pages(health, names=listener.address.path is not None)
            await stack.enter_async_context(Endpoint(listener, pages, for_machines=("/metrics", "/health")))
            log.info("serving page, metrics and health at %s", listener.address)
        yield health


def _pages(health: Health, *, names: bool) -> Mapping[str, Page]:
    from http import HTTPStatus  # noqa: PLC0415 - loaded only if configured

    from stationkey.observability.http import Reply  # noqa: PLC0415 - same
    from stationkey.observability.metrics import CONTENT_TYPE, Exposition  # noqa: PLC0415 - same

    exposition = Exposition(health)

    @cache
    def page() -> StatusPage:
        from stationkey.observability.page import StatusPage  # noqa: PLC0415 - loaded when the page is first requested

        return StatusPage(health, names=names)

    async def once() -> Reply:
        return await page().once()

    async def live() -> Reply:
        return await page().live()

    async def metrics() -> Reply:
        return Reply(await exposition.text(), CONTENT_TYPE)

    async def how() -> Reply:
        await health.figures()  # checks whether the ledger answers
        condition = health.condition()
        status = HTTPStatus.OK if condition.healthy else HTTPStatus.SERVICE_UNAVAILABLE
        return Reply(condition.report(), "application/json", status)

    return {"/": once, "/live": live, "/metrics": metrics, "/health": how}


def run(
    settings: Settings, program: Callable[[Settings], Coroutine[Any, Any, signal.Signals]] = serve
) -> signal.Signals:
    """Run `serve`, or another program, in an event loop.

    Raises:
        StationKeyError: it cannot start.
    """
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        serving = loop.create_task(program(settings), name="serve")
        while not serving.done():
            # The event loop itself needs memory for each turn; where it gets none, the next turn is tried. CPython
            # sometimes forgets to say that it was the memory, and raises SystemError.
            with suppress(MemoryError, SystemError):
                loop.run_until_complete(serving)
        return serving.result()
