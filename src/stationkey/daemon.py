"""The composition root: puts the parts together, and takes them apart again."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from typing import Final

from stationkey import __version__
from stationkey.bridge import on_keystore
from stationkey.config import Settings
from stationkey.errors import PASSING, KeyStoreError
from stationkey.keystore import KeyStore, keystore_opener
from stationkey.keystore.thread import KeyStoreThread
from stationkey.ledger import Ledger
from stationkey.mqtt import Broker, MqttEdge, unless
from stationkey.policy import Policy
from stationkey.profiles import Algorithm
from stationkey.service import StationKeyService
from stationkey.state import StateDirectory

log = logging.getLogger(__name__)

DRAIN: Final = 7.0
"""Seconds that requests in hand get after SIGTERM; with what closing takes, the process ends within 10."""
FIRST_LOOK: Final = 10.0
"""Seconds that the key store gets at start to say what it is, before the daemon goes on without having heard."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        StationKeyError: it cannot start.
    """
    broker = Broker.parse(settings.broker)
    open_store = keystore_opener(settings.keystore, allow_software_keys=settings.allow_software_keys)
    os.umask(0o077)
    state = StateDirectory(settings.state_dir)
    try:
        ledger = Ledger(state.database)
        keystore = KeyStoreThread(open_store)
        try:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, _stopping, stop)
            # A TPM that hangs must not keep a signal waiting.
            await unless(asyncio.create_task(stop.wait(), name="stop"), _introduce(settings, keystore))
            service = StationKeyService(
                keystore,
                ledger,
                profiles=settings.profiles,
                policy=Policy(settings.policy, settings.profiles),
                deadline=settings.deadlines.ec,
                rsa_deadline=settings.deadlines.rsa,
                terms=settings.terms,
                pool=settings.pool,
                certificate_dir=settings.certificate_dir,
            )
            await service.custody.show_active()
            # What has been made so far stays: the garbage collector need not look at it again and again.
            gc.freeze()
            edge = MqttEdge(
                broker,
                service,
                client_id=settings.client_id or ledger.client_id(),
                topic_prefix=settings.topic_prefix,
                queue=settings.policy.queue,
                payload_bytes=settings.policy.payload_bytes,
                on_ready=_ready,
            )
            try:
                async with asyncio.TaskGroup() as tasks:
                    sweeping = tasks.create_task(service.custody.run(), name="sweep")
                    telling = tasks.create_task(service.custody.tell_unusable(), name="tell-unusable")
                    learning = tasks.create_task(service.learn_ids(), name="learn-ids")
                    making = tasks.create_task(service.pool.run(), name="make-ahead")
                    await edge.run(stop, drain=DRAIN)
                    sweeping.cancel()
                    telling.cancel()
                    making.cancel()
                    learning.cancel()
            finally:
                await service.aclose()
            log.info("stopped", extra=dict(service.counts))
        finally:
            keystore.close()
            ledger.close()
    finally:
        state.close()


async def _introduce(settings: Settings, keystore: KeyStoreThread) -> None:
    """Log which key store this is and what it can do; refuse to start with one that will never do."""
    log.info("stationkey %s", __version__, extra={"keystore": settings.keystore, "state_dir": str(settings.state_dir)})

    def look(store: KeyStore) -> tuple[str, dict[Algorithm, str]]:
        supported = {algorithm: store.supports(algorithm) for algorithm in Algorithm}
        return store.description, {
            algorithm: str(support.key_type) if support else support.missing for algorithm, support in supported.items()
        }

    try:
        description, algorithms = await on_keystore(keystore, look, timeout=FIRST_LOOK)
    except KeyStoreError as failure:
        if failure.reason not in PASSING:
            raise
        log.error("requests will be rejected until this is over: %s", failure, extra={"reason": failure.reason})
        return
    level = logging.WARNING if settings.allow_software_keys and settings.keystore == "software:" else logging.INFO
    log.log(level, "key store: %s", description, extra={str(name): words for name, words in algorithms.items()})


def _ready() -> None:
    log.info("ready")
    notify_systemd("READY=1")


def _stopping(stop: asyncio.Event) -> None:
    if not stop.is_set():
        log.info("stopping: what is in hand is finished first")
        notify_systemd("STOPPING=1")
    stop.set()


def notify_systemd(state: str) -> None:
    """Tell the service manager, where there is one [sd_notify(3)]. Ten lines; the packages for it are long unkept."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notification:
            notification.sendto(state.encode(), address)
    except OSError as error:
        log.warning("the service manager cannot be told %s: %s", state, error)


def run(settings: Settings) -> None:
    """`serve`, from a program without an event loop.

    Raises:
        StationKeyError: it cannot start.
    """
    asyncio.run(serve(settings))
