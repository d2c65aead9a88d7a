"""A small read-only HTTP server for this machine: metrics, health and the status page.

It uses asyncio's streams in the event loop that answers requests, so its cost is bounded in one place, and a hung loop
is not reported as healthy. A connection gets one request, of bounded length, in bounded time. A new connection beyond
the limit closes the one that has waited longest, so that idle connections do not block others.

It listens on a loopback address or a UNIX socket. A web page in a browser on this machine can reach a loopback address
by DNS rebinding, so the Host must be a loopback name.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from http import HTTPStatus
from typing import Final, Self
from urllib.parse import urlsplit

from msgspec import Struct, field

from stationkey.system.addresses import is_loopback
from stationkey.system.listener import BACKLOG, Listener

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
"""Most open connections. Prometheus needs one, for milliseconds."""
MAX_HEAD: Final = 8 * 1024
"""Bytes of request line and header fields."""
TIME_LIMIT: Final = 5.0
"""Longest duration of a connection in seconds."""
MAX_IGNORED: Final = 64 * 1024
"""Bytes after the head that are read and discarded, so that the response is not lost by a reset."""
_REQUEST_LINE: Final = re.compile(r"([!-~]+) ([!-~]+) HTTP/(\d)\.(\d)")


class Reply(Struct, frozen=True):
    """The content of a page, with its header fields."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    fields: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[], Awaitable[Reply]]


class _Refused(Exception):
    """The request gets this status and no page."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


class _Connection(Struct, eq=False):
    writer: asyncio.StreamWriter
    answering: bool = False
    task: asyncio.Task[None] | None = field(default_factory=asyncio.current_task)


class Endpoint:
    """Serves pages at a listener while an ``async with`` block runs.

    Args:
        listener: where to listen; closed by its owner.
        pages: by path, such as ``/metrics``.
        for_machines: paths that accept any Host over a UNIX socket, because a proxy passes it on. The others are for
            browsers, which may reach the socket by a port that ssh forwards.
    """

    def __init__(self, listener: Listener, pages: Mapping[str, Page], *, for_machines: Collection[str] = ()) -> None:
        self._listener = listener
        self._pages = pages
        self._for_machines = for_machines
        self._any_host = listener.address.path is not None
        self._open: dict[_Connection, None] = {}  # in order of arrival
        self._server: asyncio.Server | None = None
        self._ending = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, sock=self._listener.socket, limit=MAX_HEAD, backlog=BACKLOG
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._ending = True
        self._server.close()
        tasks = [connection.task for connection in self._open if connection.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self._make_room()
        connection = _Connection(writer)
        self._open[connection] = None
        try:
            async with asyncio.timeout(TIME_LIMIT):
                writer.write(await self._answer(reader, connection))
                await writer.drain()
                connection.answering = False
                writer.write_eof()
                ignored = 0
                while ignored < MAX_IGNORED and (more := await reader.read(MAX_HEAD)):
                    ignored += len(more)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # too slow, or closed by the peer
        except asyncio.CancelledError:
            if not self._ending:  # else shutting down; asyncio would log the cancellation as an error
                raise
        finally:
            self._open.pop(connection, None)
            writer.transport.abort()

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its request, or the oldest if none waits."""
        if len(self._open) < MAX_CONNECTIONS:
            return
        oldest = next((one for one in self._open if not one.answering), next(iter(self._open)))
        del self._open[oldest]
        oldest.writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, connection: _Connection) -> bytes:
        """Return head and body of the response to the connection's only request."""
        method = ""
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) from None
            connection.answering = True
            method, page = self._find(head.decode("latin-1").split("\r\n"))
            reply = await _shown(page)
        except _Refused as refused:
            reply = Reply(f"{refused.status.phrase}\n".encode(), status=refused.status)
        return _response(reply, with_body=method != "HEAD")

    def _find(self, lines: list[str]) -> tuple[str, Page]:
        """Return method and page of a request [RFC 9112 2 and 3]."""
        request = _REQUEST_LINE.fullmatch(lines[0])
        if request is None:
            raise _Refused(HTTPStatus.BAD_REQUEST)
        method, target, major, minor = request.groups()
        if major != "1":
            raise _Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
        fields = [line.partition(":") for line in lines[1:]]
        hosts = [value.strip() for name, _, value in fields if name.lower() == "host"]
        if len(hosts) > 1 or (not hosts and minor != "0"):
            raise _Refused(HTTPStatus.BAD_REQUEST)
        try:
            path = urlsplit(target).path
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST) from None
        any_host = self._any_host and path in self._for_machines
        if hosts and not any_host and not is_loopback_host(hosts[0]):
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST)
        if method not in {"GET", "HEAD"}:
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED)
        page = self._pages.get(path)
        if page is None:
            raise _Refused(HTTPStatus.NOT_FOUND)
        return method, page


async def _shown(page: Page) -> Reply:
    try:
        return await page()
    except Exception:
        log.exception("page failed; this is a bug of stationkey")
        return Reply(b"a fault of stationkey; see its log\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)


def is_loopback_host(host: str) -> bool:
    """Return whether a Host field [RFC 9110 7.2] is a loopback name."""
    return is_loopback(re.sub(r":\d*$", "", host).removeprefix("[").removesuffix("]"))


def _response(reply: Reply, *, with_body: bool) -> bytes:
    fields = [
        f"HTTP/1.1 {reply.status.value} {reply.status.phrase}",
        f"Content-Type: {reply.content_type}",
        f"Content-Length: {len(reply.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(f"{name}: {value}" for name, value in reply.fields.items()),
    ]
    if reply.status is HTTPStatus.METHOD_NOT_ALLOWED:
        fields.append("Allow: GET, HEAD")
    return "\r\n".join([*fields, "", ""]).encode("ascii") + (reply.body if with_body else b"")
