"""A small HTTP server for this machine alone: figures and health are asked for here, and nothing can be changed.

It stands on asyncio's streams, in the event loop that answers requests. So what it reads is read on one thread, what it
costs is bounded in one place, and a loop that hangs does not say that it is well. Whoever connects gets one request, of
bounded length, in bounded time. When all places are taken the connection that has waited longest has to go, so that
nobody who only holds connections open keeps others out.

What listens is on a loopback address or in the file system. A web page in a browser on this machine can reach a
loopback address too, and by DNS rebinding read what comes back. So the Host asked for has to be a loopback name.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from stationkey.errors import ConfigurationError

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
"""How many connections there may be at a time. Prometheus holds one, for milliseconds."""
BACKLOG: Final = 128
"""How many the kernel holds until they are looked at. What it has no place for comes again a second later."""
MAX_HEAD: Final = 8 * 1024
"""Bytes of request line and header fields."""
TIME_LIMIT: Final = 5.0
"""Seconds that a connection may last, all in all."""
MAX_IGNORED: Final = 64 * 1024
"""Bytes after the head that are read and thrown away, so that the answer is not lost with them."""
SOCKET_MODE: Final = 0o660
_UNIX: Final = "unix:"
_MAX_UNIX: Final = 107
"""Bytes of a path to a socket [unix(7)]."""
_HINT: Final = "for example 127.0.0.1:9464, [::1]:9464 or unix:/run/stationkey/metrics.sock"
_REQUEST_LINE: Final = re.compile(r"([!-~]+) ([!-~]+) HTTP/(\d)\.(\d)")
_MAX_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a loopback address and a port, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``127.0.0.1:PORT``, ``[::1]:PORT`` or ``unix:PATH``.

        Raises:
            ConfigurationError: it is none of these, or would be reached from another machine.
        """
        if text.startswith(_UNIX):
            path = Path(text.removeprefix(_UNIX))
            if not path.is_absolute() or "\0" in text or len(os.fsencode(path)) > _MAX_UNIX:
                raise ConfigurationError(
                    f"[metrics] listen: {text!r} must name an absolute path of {_MAX_UNIX} bytes at the most",
                    reason="metrics_listen_invalid",
                    hint=_HINT,
                )
            return cls(path=path)
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            address = ipaddress.ip_address(bare)
            number = int(port) if port.isascii() and port.isdecimal() else 0
        except ValueError:
            address, number = None, 0
        if address is None or not 0 < number <= _MAX_PORT or (address.version == 6) != (bare != host):  # noqa: PLR2004 - IPv6
            raise ConfigurationError(
                f"[metrics] listen: {text!r} is no address with a port, and no unix:PATH",
                reason="metrics_listen_invalid",
                hint=_HINT,
            )
        if not address.is_loopback:
            raise ConfigurationError(
                f"[metrics] listen: {text} can be reached from other machines, and there is no TLS and no password",
                reason="metrics_not_loopback",
                hint=f"listen on a loopback address and put a reverse proxy or an agent in front; {_HINT}",
            )
        return cls(str(address), number)

    def __str__(self) -> str:
        if self.path is not None:
            return f"{_UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Listener:
    """A socket that listens at an address, until it is closed. The file of a UNIX socket is removed then.

    Args:
        address: where.

    Raises:
        ConfigurationError: it is in use, or may not be used.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._file: tuple[int, int] | None = None
        try:
            if address.path is None:
                family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                self.socket = socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
            else:
                self.socket = self._in_file(address.path)
        except OSError as error:
            raise ConfigurationError(
                f"[metrics] listen: {address} cannot be used: {error.strerror or error}",
                reason="metrics_cannot_listen",
                hint="does another program use it, or does the directory not exist?",
            ) from None

    def _in_file(self, path: Path) -> socket.socket:
        _remove_stale(path)
        listening = socket.socket(socket.AF_UNIX)
        # Made with its mode: to change that afterwards would be to follow a link that somebody has put there since.
        mask = os.umask(0o777 & ~SOCKET_MODE)
        try:
            listening.bind(str(path))
        except OSError:
            listening.close()
            raise
        finally:
            os.umask(mask)
        made = path.lstat()
        self._file = made.st_dev, made.st_ino
        listening.listen(BACKLOG)
        return listening

    def close(self) -> None:
        """Listen no more."""
        if self._file is not None and self.address.path is not None:
            with contextlib.suppress(OSError):
                there = self.address.path.lstat()
                if (there.st_dev, there.st_ino) == self._file:  # and not another one's by now
                    self.address.path.unlink()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_stale(path: Path) -> None:
    """Make room for a socket: one that nobody listens at any more is left of a run that was killed.

    Raises:
        ConfigurationError: something else is there, or somebody listens.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(
            f"[metrics] listen: {path} is there, and is no socket",
            reason="metrics_cannot_listen",
            hint="nothing was removed; name another path",
        )
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigurationError(
        f"[metrics] listen: another program listens at {path}", reason="metrics_cannot_listen", hint="name another path"
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """What a page says."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


Page = Callable[[], Awaitable[Reply]]


class _Refused(Exception):
    """The request gets no page, and this status."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


@dataclass(slots=True, eq=False)
class _Connection:
    writer: asyncio.StreamWriter
    answering: bool = False
    task: asyncio.Task[None] | None = field(default_factory=asyncio.current_task)


class Endpoint:
    """Shows pages to whoever asks at a listener; for the length of an ``async with`` block.

    Args:
        listener: where; closed by its owner.
        pages: by path, such as ``/metrics``.
    """

    def __init__(self, listener: Listener, pages: Mapping[str, Page]) -> None:
        self._listener = listener
        self._pages = pages
        # Whoever reaches a UNIX socket is no browser, and a proxy may pass on any Host.
        self._any_host = listener.address.path is not None
        self._open: dict[_Connection, None] = {}  # in the order of their coming
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, sock=self._listener.socket, limit=MAX_HEAD, backlog=BACKLOG
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [connection.task for connection in self._open if connection.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its beginning to its end."""
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
            pass  # it was too slow, or has gone
        finally:
            self._open.pop(connection, None)
            writer.transport.abort()

    def _make_room(self) -> None:
        """End the connection that has waited longest for its request, or the oldest where none does."""
        if len(self._open) < MAX_CONNECTIONS:
            return
        oldest = next((one for one in self._open if not one.answering), next(iter(self._open)))
        del self._open[oldest]
        oldest.writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, connection: _Connection) -> bytes:
        """Head and body of the response to the one request of a connection."""
        method = ""
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) from None
            connection.answering = True
            method, page = self._find(head.decode("latin-1").split("\r\n"))
            reply = await page()
        except _Refused as refused:
            reply = Reply(f"{refused.status.phrase}\n".encode(), status=refused.status)
        except Exception:
            log.exception("a page could not be made; this is a fault of stationkey")
            reply = Reply(b"a fault of stationkey; see its log\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)
        return _response(reply, with_body=method != "HEAD")

    def _find(self, lines: list[str]) -> tuple[str, Page]:
        """Method and page of a request [RFC 9112 2 and 3]."""
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
        if hosts and not self._any_host and not is_loopback_host(hosts[0]):
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST)
        if method not in {"GET", "HEAD"}:
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            page = self._pages.get(urlsplit(target).path)
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST) from None
        if page is None:
            raise _Refused(HTTPStatus.NOT_FOUND)
        return method, page


def is_loopback_host(host: str) -> bool:
    """Whether a Host field [RFC 9110 7.2] means this machine by a name that no other can have."""
    name = re.sub(r":\d*$", "", host)
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _response(reply: Reply, *, with_body: bool) -> bytes:
    fields = [
        f"HTTP/1.1 {reply.status.value} {reply.status.phrase}",
        f"Content-Type: {reply.content_type}",
        f"Content-Length: {len(reply.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    if reply.status is HTTPStatus.METHOD_NOT_ALLOWED:
        fields.append("Allow: GET, HEAD")
    return "\r\n".join([*fields, "", ""]).encode("ascii") + (reply.body if with_body else b"")
