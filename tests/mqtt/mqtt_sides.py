"""The sides of a connection for tests: Josev, a broker, and a server in front of one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from peers import Mosquitto

from stationkey.mqtt.connection import (
    MqttConnection,
    connect,
)
from stationkey.mqtt.url import Broker

BOUND: Final = 30.0
"""Seconds after which a test that waits for something has failed."""


@asynccontextmanager
async def josev(broker: Broker) -> AsyncIterator[MqttConnection]:
    """The other side, subscribed to the answers."""
    async with await connect(broker, client_id="josev", persistent=False) as connection:
        await connection.subscribe("cs/josev")
        yield connection


def at(mosquitto: Mosquitto) -> Broker:
    return Broker("127.0.0.1", mosquitto.port)


class Reasons(logging.Handler):
    """The reasons that the edge, or a part of it, logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._news = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._news.set()

    def named(self, reason: str) -> list[logging.LogRecord]:
        return [record for record in self.records if getattr(record, "reason", None) == reason]

    async def until(self, reason: str) -> None:
        async with asyncio.timeout(BOUND):
            while not self.named(reason):
                self._news.clear()
                await self._news.wait()


@contextmanager
def reasons() -> Iterator[Reasons]:
    logger, handler = logging.getLogger("stationkey.mqtt"), Reasons()
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


class Front:
    """Stands before a Mosquitto. What arrives from a client is first shown to `judge`.

    `judge` gives bytes to answer in the broker's place; b"" to close the connection; None to let it through.
    """

    def __init__(self, broker: Broker, judge: Callable[[bytes], bytes | None]) -> None:
        self._behind = broker
        self._judge = judge
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Broker:
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        return Broker("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection(self._behind.host, self._behind.port)
        answering = asyncio.create_task(self._pass(there, writer))
        try:
            while data := await reader.read(65536):
                match self._judge(data):
                    case None:
                        back.write(data)
                    case b"":
                        break
                    case answer:
                        writer.write(answer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            answering.cancel()
            writer.close()
            back.close()
            await asyncio.gather(answering, writer.wait_closed(), back.wait_closed(), return_exceptions=True)
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()
