"""The small HTTP server: where it listens, what it says to whom, and what it makes of those who only hold it up.

Asked over real sockets, with bytes as they are on the wire.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import pytest
from peers import free_port

from stationkey.errors import ConfigurationError
from stationkey.observability import http
from stationkey.observability.http import MAX_CONNECTIONS, MAX_HEAD, Endpoint, Reply, is_loopback_host
from stationkey.system.listener import Address, Listener

BOUND = 30.0
"""Seconds after which a test that waits for something has failed."""
PAGE = b"the page\n"


async def page() -> Reply:
    return Reply(PAGE)


async def ill() -> Reply:
    return Reply(b"{}", "application/json", HTTPStatus.SERVICE_UNAVAILABLE)


async def broken() -> Reply:
    raise RuntimeError("a fault")


@asynccontextmanager
async def serving(address: Address | None = None) -> AsyncIterator[Address]:
    address = address or Address.parse(f"127.0.0.1:{free_port()}")
    with Listener(address) as listener:
        async with Endpoint(listener, {"/page": page, "/ill": ill, "/broken": broken}, for_machines=["/page"]):
            yield address


async def connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.path is not None:
        return await asyncio.open_unix_connection(address.path)
    return await asyncio.open_connection(address.host, address.port)


async def exchange(address: Address, sent: bytes) -> bytes:
    """What comes back until the other side closes."""
    reader, writer = await connect(address)
    writer.write(sent)
    async with asyncio.timeout(BOUND):
        received = await reader.read()
    writer.close()
    return received


async def get(address: Address, path: str = "/page", method: str = "GET") -> bytes:
    return await exchange(address, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


class TestAddress:
    @pytest.mark.parametrize(
        "text", ["127.0.0.1:9464", "127.8.8.8:1", "[::1]:65535", "unix:/run/stationkey/metrics.sock"]
    )
    def test_one_of_this_machine_alone_is_taken(self, text: str) -> None:
        assert str(Address.parse(text)) == text

    @pytest.mark.parametrize(
        "text", ["0.0.0.0:9464", "192.0.2.1:9464", "[::]:9464", "[2001:db8::1]:9464", "255.255.255.255:1"]
    )
    def test_one_that_others_reach_is_refused_and_it_is_said_what_to_do(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="reverse proxy") as refused:  # words: what helps
            Address.parse(text)
        assert refused.value.reason == "metrics_not_loopback"

    @pytest.mark.parametrize(
        "text",
        [
            *("9464", ":9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1"),
            *("127.0.0.1:http", "127.0.0.1:٩", "localhost:9464", "::1:9464", "[127.0.0.1]:9464", "[::1]", "", "x"),
            *("unix:", "unix:metrics.sock", "unix:/" + "x" * 107, "unix:/a\0b", "http://127.0.0.1:9464/"),
        ],
    )
    def test_what_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigurationError) as refused:
            Address.parse(text)
        assert refused.value.reason == "metrics_listen_invalid"


class TestListener:
    def test_a_port_in_use_is_refused_in_words(self) -> None:
        address = Address.parse(f"127.0.0.1:{free_port()}")
        why = os.strerror(errno.EADDRINUSE)
        with Listener(address), pytest.raises(ConfigurationError, match=why) as refused:  # words: the system's own
            Listener(address)
        assert refused.value.reason == "metrics_cannot_listen"

    def test_a_directory_that_is_not_there_is_refused_in_words(self, tmp_path: Path) -> None:
        why = os.strerror(errno.ENOENT)
        with pytest.raises(ConfigurationError, match=why) as refused:  # words: the system's own
            Listener(Address(path=tmp_path / "nowhere" / "socket"))
        assert refused.value.reason == "metrics_cannot_listen"

    @pytest.mark.parametrize("mask", [0o077, 0o022, 0])
    def test_a_socket_is_for_owner_and_group_whatever_the_mask_and_goes_with_its_listener(
        self, tmp_path: Path, mask: int
    ) -> None:
        path = tmp_path / "socket"
        before = os.umask(mask)
        try:
            with Listener(Address(path=path)):
                found = path.lstat()
            after = os.umask(0)
        finally:
            os.umask(before)
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert found.st_uid == os.geteuid()
        assert after == mask
        assert not path.exists()

    def test_a_socket_that_a_killed_run_has_left_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        with Listener(Address(path=path)), socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(path))

    def test_a_socket_that_somebody_listens_at_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with Listener(Address(path=path)):
            with pytest.raises(ConfigurationError, match="another program") as refused:  # words: other faults have
                Listener(Address(path=path))
            assert refused.value.reason == "metrics_cannot_listen"  # this reason as well
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(str(path))

    @pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "link to a socket", "dangling link"])
    def test_what_is_no_socket_is_refused_and_left_alone(self, tmp_path: Path, kind: str) -> None:
        path, target = tmp_path / "socket", tmp_path / "target"
        target.write_text("precious")
        match kind:
            case "file":
                path.write_text("precious")
            case "directory":
                path.mkdir()
            case "link to a socket":
                target.unlink()
                with socket.socket(socket.AF_UNIX) as left:
                    left.bind(str(target))
                path.symlink_to(target)
            case "dangling link":
                target.unlink()
                path.symlink_to(target)
            case _:
                path.symlink_to(target)
        before = path.lstat(), os.path.lexists(target)
        with pytest.raises(ConfigurationError, match="socket") as refused:  # words: other faults have this reason
            Listener(Address(path=path))
        assert refused.value.reason == "metrics_cannot_listen"
        assert (path.lstat().st_ino, os.path.lexists(target)) == (before[0].st_ino, before[1])

    def test_a_file_that_has_taken_its_place_is_not_removed_with_it(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with Listener(Address(path=path)):
            path.rename(tmp_path / "moved")
            path.write_text("another's")
        assert path.read_text() == "another's"


class TestRequests:
    async def test_a_page_is_shown_whole_and_the_connection_closed(self) -> None:
        async with serving() as address:
            head, _, body = (await get(address)).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0] == "HTTP/1.1 200 OK"
        assert set(lines[1:]) >= {f"Content-Length: {len(PAGE)}", "Connection: close", "Cache-Control: no-store"}
        assert body == PAGE

    async def test_head_gets_the_same_without_the_page(self) -> None:
        async with serving() as address:
            shown = await get(address)
            assert await get(address, method="HEAD") == shown.removesuffix(PAGE)

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            pytest.param("GET /page?x=1 HTTP/1.1\r\nHost: 127.0.0.1:9464", 200, id="query"),
            pytest.param("GET http://localhost/page HTTP/1.1\r\nHost: localhost", 200, id="absolute form"),
            pytest.param("GET /page HTTP/1.0", 200, id="HTTP/1.0"),
            pytest.param("GET /page HTTP/1.1\r\nhOsT: [::1]:9464", 200, id="IPv6"),
            pytest.param("GET /page HTTP/1.1\r\nHost:LOCALHOST\r\nConnection: keep-alive", 200, id="keep-alive"),
            pytest.param("GET /ill HTTP/1.1\r\nHost: localhost", 503, id="a page that says so"),
            pytest.param("GET / HTTP/1.1\r\nHost: localhost", 404, id="no page"),
            pytest.param("GET /page/ HTTP/1.1\r\nHost: localhost", 404, id="a slash more"),
            pytest.param("GET /../page HTTP/1.1\r\nHost: localhost", 404, id="dots"),
            pytest.param("GET //page HTTP/1.1\r\nHost: localhost", 404, id="two slashes"),
            pytest.param("POST /page HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4", 405, id="POST"),
            pytest.param("get /page HTTP/1.1\r\nHost: localhost", 405, id="methods are case-sensitive"),
            pytest.param("CONNECT localhost:1 HTTP/1.1\r\nHost: localhost", 405, id="CONNECT"),
            pytest.param("GET /page HTTP/1.1", 400, id="no Host"),
            pytest.param("GET /page HTTP/1.1\r\nHost: localhost\r\nHost: localhost", 400, id="two Hosts"),
            pytest.param("GET http://[/page HTTP/1.1\r\nHost: localhost", 400, id="no URL"),
            pytest.param("GET /page", 400, id="HTTP/0.9"),
            pytest.param("GET  /page HTTP/1.1\r\nHost: localhost", 400, id="two spaces"),
            pytest.param("\r\nGET /page HTTP/1.1\r\nHost: localhost", 400, id="an empty line first"),
            pytest.param("\x16\x03\x01\x02\x00", 400, id="TLS"),
            pytest.param("PRI * HTTP/2.0", 505, id="HTTP/2"),
            pytest.param("GET /page HTTP/1.1\r\nHost: evil.example", 421, id="DNS rebinding"),
            pytest.param("GET /page HTTP/1.1\r\nHost: localhost.evil.example:9464", 421, id="a longer name"),
            pytest.param("GET /page HTTP/1.1\r\nHost: 192.0.2.1", 421, id="another address"),
            pytest.param("GET /page HTTP/1.1\r\nHost: ", 421, id="empty Host"),
        ],
    )
    async def test_each_request_gets_its_status(self, sent: str, status: int) -> None:
        async with serving() as address:
            received = await exchange(address, sent.encode("latin-1") + b"\r\n\r\n")
        assert received.startswith(f"HTTP/1.1 {status} ".encode())
        assert (PAGE in received) == (status == 200)
        assert (b"\r\nAllow: GET, HEAD\r\n" in received) == (status == 405)

    async def test_over_a_socket_in_the_file_system_any_host_is_asked_for(self, tmp_path: Path) -> None:
        async with serving(Address(path=tmp_path / "socket")) as address:
            received = await exchange(address, b"GET /page HTTP/1.1\r\nHost: station-7.example\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 200 ")

    @pytest.mark.parametrize(("host", "status"), [("localhost:9464", 200), ("evil.example", 421)])
    async def test_a_page_for_people_is_guarded_there_too(self, tmp_path: Path, host: str, status: int) -> None:
        """A browser reaches it by a port that ssh forwards, and there a name may be rebound."""
        address = Address(path=tmp_path / "socket")
        with Listener(address) as listener:
            async with Endpoint(listener, {"/page": page}):
                received = await exchange(address, f"GET /page?x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert received.startswith(f"HTTP/1.1 {status} ".encode())

    async def test_it_listens_on_ipv6_too(self) -> None:
        async with serving(Address.parse(f"[::1]:{free_port()}")) as address:
            assert PAGE in await get(address)

    async def test_a_head_that_is_too_long_is_refused(self) -> None:
        sent = b"GET /page HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MAX_HEAD * 8 + b"\r\n\r\n"
        async with serving() as address:
            assert (await exchange(address, sent)).startswith(b"HTTP/1.1 431 ")

    async def test_a_fault_in_a_page_is_logged_and_the_next_one_shown(self, caplog: pytest.LogCaptureFixture) -> None:
        async with serving() as address:
            assert (await get(address, "/broken")).startswith(b"HTTP/1.1 500 ")
            assert PAGE in await get(address)
        [record] = [record for record in caplog.records if record.exc_info]
        assert record.name == "stationkey.observability.http"

    @pytest.mark.parametrize(
        ("host", "is_one"),
        [
            ("127.0.0.1", True),
            ("127.1.2.3:80", True),
            ("::1", False),
            ("[::1]", True),
            ("localhost:", True),
            ("*", False),
        ],
    )
    def test_a_loopback_name_is_told_from_others(self, host: str, is_one: bool) -> None:
        assert is_loopback_host(host) is is_one


def open_files() -> int:
    """How many this process has, without the sockets by which the tests keep ports for themselves."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    kept = {f"socket:[{row[6]}]" for row in rows if row[-1].startswith("@stationkey-port-")}
    links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(link not in kept for link in links)


class TestWhoeverHoldsItUp:
    @pytest.mark.parametrize("sent", [b"", b"GET /page HTTP/1.1\r\nHost: lo"], ids=["nothing", "half a request"])
    async def test_half_open_connections_keep_nobody_out_are_few_and_fill_no_log(
        self, sent: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving() as address, AsyncExitStack() as stack:
            held = []
            for _ in range(200):
                reader, writer = await connect(address)
                stack.callback(writer.close)
                writer.write(sent)
                held.append(reader)
            assert PAGE in await get(address)
            async with asyncio.timeout(BOUND):
                for reader in held[:-MAX_CONNECTIONS]:
                    with suppress(ConnectionError):  # a reset is as good as an end
                        assert await reader.read() == b""
            assert PAGE in await get(address)
        assert caplog.records == []

    async def test_a_connection_lasts_no_longer_than_its_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http, "TIME_LIMIT", 0.05)
        async with serving() as address:
            assert await exchange(address, b"GET /page HTTP/1.1\r\n") == b""

    async def test_one_that_does_not_read_or_goes_away_leaves_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        before = open_files()
        async with serving() as address:
            for _ in range(3 * MAX_CONNECTIONS):
                _, writer = await connect(address)
                writer.write(b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n")
                writer.transport.abort()
            assert PAGE in await get(address)
        async with asyncio.timeout(BOUND):
            assert caplog.records == []
            while open_files() > before:  # noqa: ASYNC110 - nobody tells when a transport has closed its file
                await asyncio.sleep(0.01)

    async def test_when_all_places_wait_for_their_page_the_oldest_has_to_go(self) -> None:
        go_on, asked = asyncio.Event(), asyncio.Semaphore(0)

        async def slow() -> Reply:
            asked.release()
            await go_on.wait()
            return Reply(PAGE)

        address = Address.parse(f"127.0.0.1:{free_port()}")
        with Listener(address) as listener:
            async with Endpoint(listener, {"/slow": slow, "/page": page}):
                asking = [asyncio.create_task(get(address, "/slow")) for _ in range(MAX_CONNECTIONS)]
                async with asyncio.timeout(BOUND):
                    for _ in asking:
                        await asked.acquire()
                assert PAGE in await get(address)
                go_on.set()
                answers = await asyncio.gather(*asking, return_exceptions=True)
        assert sum(isinstance(answer, bytes) and PAGE in answer for answer in answers) == MAX_CONNECTIONS - 1

    async def test_at_the_end_all_connections_end(self) -> None:
        async with serving() as address:
            reader, writer = await connect(address)
            writer.write(b"GET ")
            assert PAGE in await get(address)
        async with asyncio.timeout(BOUND):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
