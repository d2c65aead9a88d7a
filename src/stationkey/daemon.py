"""The composition root: starts and stops the parts of the daemon."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

from stationkey._version import __version__
from stationkey.config.settings import Settings
from stationkey.contract.profiles import Algorithm
from stationkey.contract.renewal import renewal_update
from stationkey.errors import StationKeyError
from stationkey.keystore import KeyStore
from stationkey.keystore.stores import KeyStores, Store, checked_stores
from stationkey.keystore.worker import Task, on_keystore, overdue
from stationkey.ledger import Ledger
from stationkey.mqtt.gateway import MqttEdge
from stationkey.mqtt.retained import RetainedTopic
from stationkey.mqtt.tls import check
from stationkey.mqtt.topics import renewal
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


async def serve(settings: Settings) -> signal.Signals:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The signal.

    Raises:
        StationKeyError: it cannot start.
    """
    broker = Broker.parse(settings.broker)
    start_stores = checked_stores(settings)
    close_to_others()
    os.umask(0o077)
    state = StateDirectory(settings.state_dir)
    try:
        ledger = Ledger(state.database)
        keystores = start_stores()
        watching = AsyncExitStack()
        try:
            counters = Counters()
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(partial(_note_unhandled, counters.task_failures))
            health = await watching.enter_async_context(
                _watching(settings, keystores, str(broker), counters.task_failures)
            )
            stop = asyncio.Event()
            received: list[signal.Signals] = []
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, _stopping, number, received, stop, health)
            # A hung TPM must not delay a signal.
            stopped = asyncio.create_task(stop.wait(), name="stop")
            await unless(stopped, check(broker, settings.mqtt))
            degraded = await unless(stopped, _introduce(settings, keystores, health)) or ""
            service = StationKeyService(
                keystores,
                ledger,
                profiles=settings.profiles,
                policy=Policy(settings.policy, settings.profiles),
                deadline=settings.deadlines.ec,
                rsa_deadline=settings.deadlines.rsa,
                terms=settings.lifecycle,
                pool=settings.pool,
                renewal=settings.renewal,
                certificate_dir=settings.certificate_dir,
                on_change=health.keys_changed,
                counters=counters,
            )
            await service.custody.show_active()
            # The objects of the start are permanent: exclude them from garbage collection.
            gc.freeze()
            gc.enable()
            due = _renewal_topic(settings)
            edge = MqttEdge(
                broker,
                service,
                client_id=settings.client_id or ledger.client_id(),
                topic_prefix=settings.topic_prefix,
                terms=settings.mqtt,
                queue=settings.policy.queue,
                payload_bytes=settings.policy.payload_bytes,
                retained=due,
                failures=counters.task_failures,
                on_ready=partial(_ready, health, degraded),
                on_away=health.away,
            )
            health.watch(service, edge)
            tasks: dict[str, Work] = {
                "sweep": service.expiry.run,
                "tell-unusable": service.expiry.tell_unusable,
                "tell-left-behind": partial(tell_left_behind, service.custody, settings.state_dir),
                "learn-ids": service.learn_ids,
                "renewal-watch": partial(service.renewal.run, partial(_show_due, due)),
            }
            for store, pool in service.pools.items():
                tasks[f"make-ahead{store.suffix}"] = pool.run
                if store.uri.scheme.resident:
                    tasks[f"strays{store.suffix}"] = Strays(service.custody, store).run
            try:
                async with background(tasks, counters.task_failures):
                    await keep_running(
                        partial(edge.run, stop, drain=DRAIN),
                        "mqtt",
                        counters.task_failures,
                        backoff=Backoff(0.1, 1.0),  # SIGTERM waits for it
                    )
            finally:
                await service.aclose()
            log.info("stopped", extra=dict(service.counters.outcomes()))
        finally:
            await watching.aclose()  # last, so that keep-alives are sent until then
            keystores.close()
            ledger.close()
        return received[0]
    finally:
        state.close()


async def _introduce(settings: Settings, keystores: KeyStores, health: Health) -> str:
    """Log the key stores and their algorithms; refuse to start if none of them can ever serve.

    Returns:
        Why one of them cannot serve yet; empty if all can.
    """
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


def _renewal_topic(settings: Settings) -> RetainedTopic | None:
    """Return the topic of due certificates, if one is configured."""
    topic = settings.renewal.topic
    if topic is None:
        return None
    return RetainedTopic(renewal(settings.topic_prefix, topic, availability_topic=settings.mqtt.availability_topic))


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


def run(settings: Settings) -> signal.Signals:
    """Run `serve` in an event loop.

    Raises:
        StationKeyError: it cannot start.
    """
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        serving = loop.create_task(serve(settings), name="serve")
        while not serving.done():
            # The event loop itself needs memory for each turn; where it gets none, the next turn is tried.
            with suppress(MemoryError):
                loop.run_until_complete(serving)
        return serving.result()
