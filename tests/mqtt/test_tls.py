"""TLS and credentials towards a real Mosquitto, and what is said where they are not right."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from peers import Mosquitto
from tls_brokers import BOUND, VERSIONS, echo, opened

from secured import NAME, Authority, Identity, SecuredMosquitto, terms
from stationkey.errors import BrokerError
from stationkey.mqtt import connection as mqtt
from stationkey.mqtt import tls
from stationkey.mqtt.codec import V5
from stationkey.mqtt.connection import ConnectionLost, MqttConnection, ProtocolRefused
from stationkey.mqtt.url import Broker
from stationkey.mqtt.waiting import MAX_CONNECTING
from stationkey.system.threads import Workers

pytest_plugins = ["tls_brokers"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[SecuredMosquitto]:
    """A broker that wants no client certificate, for the tests that leave it as it was."""
    with SecuredMosquitto(tmp_path_factory.mktemp("broker"), authority.broker()) as broker:
        yield broker


# Who the broker is.


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_broker_whose_certificate_leads_to_the_ca_file_is_spoken_to(
    shared: SecuredMosquitto, authority: Authority, version: int
) -> None:
    connection = MqttConnection(
        shared.tls, client_id="test", persistent=False, terms=terms(authority), protocol=version
    )
    async with connection:
        await connection.open()
        assert connection.is_v5 is (version == V5)
        assert await echo(connection) == b"echo"
        transport = connection._transport  # noqa: SLF001 - the socket is nobody else's business
        assert isinstance(transport, tls.TlsTransport)
        assert transport.tls.version() == "TLSv1.3"
        assert transport.tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.parametrize(
    ("begins", "address", "by", "said"),
    [
        # words: OpenSSL's own, and what helps
        pytest.param(0, "127.0.0.1", None, "unable to get local issuer certificate.*ca_file", id="unknown-issuer"),
        pytest.param(60, "127.0.0.1", {}, "expired.*clock", id="expired"),
        pytest.param(-60, "127.0.0.1", {}, "not yet valid.*clock", id="not-yet-valid"),
        pytest.param(0, "127.0.0.2", {}, "IP address mismatch.*server_name", id="another-address"),
        pytest.param(
            0, "127.0.0.1", {"server_name": "other.test"}, "Hostname mismatch.*server_name", id="another-name"
        ),
    ],
)
async def test_a_broker_that_is_not_to_be_trusted_is_refused_and_the_message_says_why(
    tmp_path: Path, authority: Authority, begins: int, address: str, by: dict[str, Any] | None, said: str
) -> None:
    server = authority.elsewhere(tmp_path / "server").broker(age=begins, address=address)
    ca = Authority(tmp_path / "other") if by is None else authority
    with SecuredMosquitto(tmp_path / "mosquitto", server) as broker:
        with pytest.raises(BrokerError, match=said) as refused:
            await opened(broker.tls, terms(ca, **(by or {})))
        assert refused.value.reason == "broker_untrusted"
        assert "as us-" not in broker.log  # it did not hear who we are


async def test_the_broker_may_have_another_name_than_the_host(shared: SecuredMosquitto, authority: Authority) -> None:
    async with await opened(shared.tls, terms(authority, server_name=NAME)) as connection:
        assert await echo(connection) == b"echo"


async def test_without_a_ca_file_those_of_the_machine_count(
    shared: SecuredMosquitto, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BrokerError) as refused:
        await opened(shared.tls)
    assert refused.value.reason == "broker_untrusted"
    assert "ca_file" in refused.value.hint  # words: the option that helps; of an unknown issuer alone
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))  # where OpenSSL finds them
    async with await opened(shared.tls) as connection:
        assert await echo(connection) == b"echo"


async def test_tls_below_1_2_is_not_spoken(authority: Authority) -> None:
    server = authority.broker()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, pytest.raises(ssl.SSLError):
            context.wrap_socket(connection, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)  # where nobody comes, the test has failed and must not hang
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with pytest.raises(BrokerError) as refused:
            await opened(Broker("127.0.0.1", listener.getsockname()[1], tls=True), terms(authority))
        thread.join()
    assert refused.value.reason in {"broker_tls_failed", "broker_refuses"}


async def test_a_listener_without_tls_is_told_from_one_that_is_not_trusted(
    mosquitto: Mosquitto, authority: Authority
) -> None:
    with pytest.raises(BrokerError) as refused:
        await opened(Broker("127.0.0.1", mosquitto.port, tls=True), terms(authority))
    assert refused.value.reason == "broker_unreachable"
    assert "TLS" in refused.value.hint  # words: what to look at


async def test_a_listener_that_hangs_up_is_an_error_in_words(authority: Authority) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        with pytest.raises(BrokerError, match="closed by peer") as refused:  # words: other faults have this reason
            await opened(Broker("127.0.0.1", server.sockets[0].getsockname()[1], tls=True), terms(authority))
    assert refused.value.reason == "broker_tls_failed"


async def test_a_handshake_that_never_ends_is_given_up(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(BrokerError) as refused:
        await opened(Broker("127.0.0.1", server.getsockname()[1], tls=True), terms(authority))
    assert refused.value.reason == "broker_unreachable"


async def test_what_hangs_for_ever_costs_a_bounded_number_of_threads(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, hanging = threading.Event(), threading.Semaphore(0)

    def hang(*_: object, **__: object) -> None:
        """As a TPM that hangs."""
        hanging.release()
        assert release.wait(BOUND)

    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT", 0.01)
    monkeypatch.setattr(mqtt, "introduction", hang)
    team = Workers(name := "connect-in-this-test", MAX_CONNECTING)
    monkeypatch.setattr("stationkey.mqtt.waiting._connecting", lambda: team)
    try:
        for _ in range(MAX_CONNECTING):
            with pytest.raises(BrokerError) as late:
                await opened(Broker("127.0.0.1", 1, tls=True), terms(authority))
            assert late.value.reason == "broker_unreachable"
            assert hanging.acquire(timeout=BOUND)
        with pytest.raises(BrokerError) as refused:
            await opened(Broker("127.0.0.1", 1, tls=True), terms(authority))
        assert refused.value.reason == "broker_unreachable"
        assert sum(thread.name.startswith(name) for thread in threading.enumerate()) == MAX_CONNECTING
        assert not hanging.acquire(blocking=False)
    finally:
        release.set()
        team.close()


# What comes over it.


class TlsServer:
    """Speaks just so much MQTT over TLS that a client is connected; then it sends what it is given, in one go."""

    def __init__(self, identity: Identity) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.certificate, identity.key)

    @asynccontextmanager
    async def sending(self, burst: bytes) -> AsyncIterator[Broker]:
        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"MQTT\x05")
            writer.write(bytes([0x20, 3, 0, 0, 0]) + burst)  # CONNACK [MQTT 5 3.2], and then
            await reader.read()
            writer.close()

        server = await asyncio.start_server(client, "127.0.0.1", 0, ssl=self._context)
        async with server:
            yield Broker("127.0.0.1", server.sockets[0].getsockname()[1], tls=True)


async def test_after_a_close_without_a_word_the_key_in_the_tpm_is_loaded_anew(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset takes the alert with it that would say that the TPM had not signed; so it is taken for possible."""
    identity = authority.broker()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)  # CONNECT
        writer.close()

    stale = tls._Tpm()  # noqa: SLF001 - whether it would load the key anew is the point
    monkeypatch.setattr(tls, "_TPM", stale)
    async with await asyncio.start_server(close, "127.0.0.1", 0, ssl=context) as server:
        with pytest.raises(ProtocolRefused) as refused:
            await opened(Broker("127.0.0.1", server.sockets[0].getsockname()[1], tls=True), terms(authority))
    assert refused.value.reason == "broker_refuses"
    assert stale._stale  # noqa: SLF001 - same


def publish_packet(payload: bytes) -> bytes:
    """A PUBLISH of QoS 0 on the topic ``t`` [MQTT 5 3.3]."""
    body = b"\x00\x01t\x00" + payload
    length, encoded = len(body), b""
    while length:
        length, digit = divmod(length, 128)
        encoded += bytes([digit | (0x80 if length else 0)])
    return b"\x30" + encoded + body


@pytest.mark.parametrize(
    "payloads",
    [
        pytest.param([b"%d" % number for number in range(1000)], id="a-thousand-in-one-record"),
        pytest.param([bytes([number]) * 40_000 for number in range(5)], id="larger-than-a-record"),
        pytest.param([b"x" * 16_000, b"y" * 16_384, b"z" * 50_000, b"."], id="across-records"),
    ],
)
async def test_all_that_was_decrypted_is_read_though_the_socket_has_nothing_more(
    authority: Authority, payloads: list[bytes]
) -> None:
    burst = b"".join(map(publish_packet, payloads))
    async with TlsServer(authority.broker()).sending(burst) as broker, await opened(broker, terms(authority)) as there:
        async with asyncio.timeout(BOUND):
            assert [(await there.receive()).payload for _ in payloads] == payloads


async def test_a_burst_at_qos_1_is_received_and_acknowledged_whole(
    shared: SecuredMosquitto, authority: Authority
) -> None:
    count = 1000
    lines = b"".join(b"%d\n" % number for number in range(count))
    command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(shared.port), "-q", "1", "-t", "burst", "-l"]
    async with await opened(shared.tls, terms(authority)) as connection:
        await connection.subscribe("burst")
        publishing = asyncio.create_task(
            asyncio.to_thread(subprocess.run, command, input=lines, check=True, timeout=BOUND)
        )
        async with asyncio.timeout(BOUND):
            for number in range(count):
                message = await connection.receive()
                assert message.payload == b"%d" % number
                message.acknowledge()  # the broker has no more than 64 under way
        await publishing


async def test_large_messages_go_both_ways(shared: SecuredMosquitto, authority: Authority) -> None:
    payload = bytes(range(256)) * 16_000  # more than sockets hold
    async with await opened(shared.tls, terms(authority)) as connection:
        assert await echo(connection, payload) == payload


async def test_a_read_that_has_to_wait_for_a_write_goes_on_when_there_is_room(
    shared: SecuredMosquitto, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a broker changes its keys [RFC 8446 4.6.3] while the connection is full."""
    loop = asyncio.get_running_loop()
    faults = iter([True])
    recv = ssl.SSLSocket.recv

    def wants_to_write(sock: ssl.SSLSocket, *arguments: int) -> bytes:
        if next(faults, False):
            loop.remove_reader(sock)  # the kernel has nothing more to tell of
            raise ssl.SSLWantWriteError
        return recv(sock, *arguments)

    async with await opened(shared.tls, terms(authority)) as connection:
        monkeypatch.setattr(ssl.SSLSocket, "recv", wants_to_write)
        async with asyncio.timeout(BOUND):
            await connection.subscribe("t")
        assert next(faults, None) is None


async def test_a_broker_that_is_killed_is_noticed_and_one_that_renewed_its_certificate_is_taken(
    tmp_path: Path, authority: Authority
) -> None:
    with SecuredMosquitto(tmp_path / "mosquitto", authority.broker()) as broker:
        async with await opened(broker.tls, terms(authority)) as connection:
            waiting = asyncio.create_task(connection.receive())
            broker.kill()
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(waiting, BOUND)
        authority.broker()  # writes the same files anew
        broker.start()
        async with await opened(broker.tls, terms(authority)) as connection:
            assert await echo(connection) == b"echo"
