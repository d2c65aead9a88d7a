"""A connection to PostgreSQL: what is refused and in which words, and that nothing hangs."""

from __future__ import annotations

import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from issuing import issue
from peers import free_port
from postgresql import Database

from stationkey.config.secrets import SecretReference
from stationkey.errors import LedgerError
from stationkey.ledger.postgresql import connection as module
from stationkey.ledger.postgresql.connection import Connection, Server, connect, explained, judged, of_error

pytest_plugins = ["postgresql"]


def opened(database: Database) -> Connection:
    return connect(database.uri, database.password, name="test")


def refused(uri: str, password: SecretReference | None = None) -> LedgerError:
    """The error by which a connection is refused."""
    with pytest.raises(LedgerError) as caught:
        connect(uri, password, name="test")
    return caught.value


def test_a_connection_is_named_and_bounded(database: Database) -> None:
    with closing(opened(database)) as connection:
        settings = connection.execute(
            "SELECT current_setting('application_name'), current_setting('statement_timeout'),"
            " current_setting('idle_in_transaction_session_timeout'), current_setting('search_path'),"
            " current_setting('client_connection_check_interval'), current_setting('tcp_keepalives_idle')::int"
            " + current_setting('tcp_keepalives_interval')::int * current_setting('tcp_keepalives_count')::int"
        ).fetchone()

    assert settings == ("stationkey test", "6s", "4s", "stationkey", "2s", 11)


def test_a_wrong_password_is_refused_and_not_shown(database: Database, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("hunter2")
    (tmp_path / "wrong").chmod(0o600)

    error = refused(database.uri, SecretReference(str(tmp_path / "wrong")))

    assert (error.reason, error.transient) == ("ledger_login_refused", False)
    assert "hunter2" not in str(error)
    assert refused(database.uri).reason == "ledger_login_refused"


def test_a_server_that_is_not_there_is_tried_again_later() -> None:
    error = refused(f"postgresql://u@127.0.0.1:{free_port()}/x")

    assert (error.reason, error.transient) == ("ledger_unreachable", True)


def test_a_host_without_a_name_is_unreachable() -> None:
    assert refused("postgresql://u@host.invalid/x").reason == "ledger_unreachable"


def test_a_database_that_is_missing_is_told_from_a_server_that_is(database: Database) -> None:
    assert refused(f"{database.uri}_more", database.password).reason == "ledger_missing"


def test_the_first_host_that_takes_changes_is_used(database: Database) -> None:
    port = database.server.port
    uri = database.uri.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free_port()},127.0.0.1:{port}")

    with closing(connect(uri, database.password, name="test")) as connection:
        assert connection.info.port == port


@pytest.mark.parametrize("setting", ["synchronous_commit", "default_transaction_read_only"])
def test_a_user_whose_settings_make_the_ledger_unsafe_is_refused(database: Database, setting: str) -> None:
    value = {"synchronous_commit": "off", "default_transaction_read_only": "on"}[setting]
    database.admin(f"ALTER DATABASE {database.name} SET {setting} = {value}")

    reason = {"synchronous_commit": "ledger_not_durable", "default_transaction_read_only": "ledger_read_only"}[setting]
    assert refused(database.uri, database.password).reason == reason


@contextmanager
def with_tls(database: Database, folder: Path) -> Iterator[Path]:
    """Give the server a certificate for 127.0.0.1; its file, for who connects."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "database")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    ends = now + timedelta(days=1)
    made = issue(name, key.public_key(), [(address, False)], issuer=name, key=key, begins=now, ends=ends)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for file, content in {"server.crt": made.public_bytes(Encoding.PEM), "server.key": private}.items():
        (folder / file).write_bytes(content)
        placed = database.server.data / file
        placed.write_bytes(content)
        placed.chmod(0o600)
        if database.server.user is not None:
            shutil.chown(placed, database.server.user)
    for change in ("ALTER SYSTEM SET ssl = on", "SELECT pg_reload_conf()"):
        database.admin(change)
    try:
        yield folder / "server.crt"
    finally:
        for change in ("ALTER SYSTEM RESET ssl", "SELECT pg_reload_conf()"):
            database.admin(change)


def test_a_server_is_verified_where_the_uri_says_so(database: Database, tmp_path: Path) -> None:
    plain = refused(f"{database.uri}?sslmode=require", database.password)
    with with_tls(database, tmp_path) as certificate:
        verified = f"{database.uri}?sslmode=verify-full&sslrootcert={certificate}"
        wait_for(lambda: connects(verified, database))
        with closing(connect(verified, database.password, name="test")) as connection:
            assert connection.pgconn.ssl_in_use
        other = refused(verified.replace("127.0.0.1", "localhost"), database.password)

    assert (plain.reason, other.reason) == ("ledger_untrusted", "ledger_untrusted")


def connects(uri: str, database: Database) -> bool:
    try:
        connect(uri, database.password, name="test").close()
    except LedgerError:
        return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)  # a reload of the server's configuration tells nobody


@contextmanager
def speaking_german(database: Database) -> Iterator[None]:
    """Have the server speak German, where its messages are installed."""
    for change in ("ALTER SYSTEM SET lc_messages = 'C.UTF-8'", "SELECT pg_reload_conf()"):
        database.admin(change)
    try:
        wait_for(lambda: database.admin("SHOW lc_messages") == [("C.UTF-8",)])
        yield
    finally:
        for change in ("ALTER SYSTEM RESET lc_messages", "SELECT pg_reload_conf()"):
            database.admin(change)


def test_a_refusal_has_its_reason_in_every_language(database: Database, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("hunter2")
    (tmp_path / "wrong").chmod(0o600)
    with speaking_german(database):
        login = refused(database.uri, SecretReference(str(tmp_path / "wrong")))
        missing = refused(f"{database.uri}_more", database.password)
        database.admin(f"ALTER DATABASE {database.name} CONNECTION LIMIT 1")
        with closing(opened(database)):
            crowded = refused(database.uri, database.password)

    reasons = [error.reason for error in (login, missing, crowded)]
    assert reasons == ["ledger_login_refused", "ledger_missing", "ledger_crowded"]


SSL_REQUEST = 80877103


@contextmanager
def refusing(state: str) -> Iterator[str]:
    """A server that refuses each connection with an SQLSTATE, and words that nobody knows; its URI."""
    fields = {b"S": "SEVERE", b"V": "FATAL", b"C": state, b"M": "keine Lust: 28P01", b"F": "a.c", b"L": "1", b"R": "f"}
    body = b"".join(kind + value.encode() + b"\0" for kind, value in fields.items()) + b"\0"

    def refuse() -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                with client, client.makefile("rb") as sent:
                    length, code = struct.unpack("!II", sent.read(8))
                    if code == SSL_REQUEST:
                        client.sendall(b"N")
                        length, _ = struct.unpack("!II", sent.read(8))
                    sent.read(length - 8)
                    client.sendall(b"E" + struct.pack("!I", len(body) + 4) + body)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=refuse)
        thread.start()
        try:
            yield f"postgresql://u@127.0.0.1:{listener.getsockname()[1]}/x"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("state", "reason", "transient"),
    [
        ("28000", "ledger_login_refused", False),
        ("3D000", "ledger_missing", False),
        ("42501", "ledger_unusable", False),
        ("53300", "ledger_crowded", True),
        ("57P03", "ledger_unreachable", True),
        ("08P01", "ledger_unsupported", False),
        ("ZZ999", "ledger_unreachable", True),
    ],
)
def test_a_refusal_is_told_by_its_state_alone(state: str, reason: str, *, transient: bool) -> None:
    with refusing(state) as uri:
        error = refused(uri)

    assert (error.reason, error.transient) == (reason, transient)
    assert error.message.endswith("SEVERE: keine Lust: 28P01")


def test_of_several_refusals_the_last_one_counts(database: Database) -> None:
    with refusing("57P03") as other:
        first = other.removeprefix("postgresql://u@").removesuffix("/x")
        uri = database.uri.replace("127.0.0.1", f"{first},127.0.0.1")

        assert refused(f"{uri}_more", database.password).reason == "ledger_missing"


def test_a_handshake_that_is_cut_off_is_tried_again() -> None:
    cut = "connection failed: SSL error: unexpected eof while reading"

    assert of_error("opened", psycopg.OperationalError(cut)).transient


FIT = Server(15, False, True, True, "on", "", "UTF8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 14}, "ledger_unsupported"),
        ({"encoding": "SQL_ASCII"}, "ledger_unsupported"),
        ({"read_only": True}, "ledger_read_only"),
        ({"fsync": False}, "ledger_not_durable"),
        ({"full_page_writes": False}, "ledger_not_durable"),
        ({"synchronous_commit": "off"}, "ledger_not_durable"),
        ({"synchronous_commit": "local", "standbys": "other"}, "ledger_not_durable"),
    ],
)
def test_a_server_that_may_lose_a_commit_is_refused(change: dict[str, Any], reason: str) -> None:
    unfit = judged(FIT._replace(**change))

    assert unfit is not None
    assert unfit.reason == reason


@pytest.mark.parametrize(
    "change",
    [{}, {"version": 17}, {"synchronous_commit": "local"}, {"synchronous_commit": "remote_apply", "standbys": "other"}],
)
def test_a_server_that_keeps_what_it_confirms_is_taken(change: dict[str, Any]) -> None:
    assert judged(FIT._replace(**change)) is None


def test_a_server_without_places_is_tried_again_later(database: Database) -> None:
    database.admin(f"ALTER DATABASE {database.name} CONNECTION LIMIT 2")
    with closing(opened(database)), closing(opened(database)):
        error = refused(database.uri, database.password)

    assert (error.reason, error.transient) == ("ledger_crowded", True)


def test_a_server_that_accepts_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, mock.patch.dict(module.PARAMETERS, connect_timeout=2):
        assert refused(f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/x").reason == "ledger_unreachable"


def test_a_stopped_server_is_given_up(database: Database) -> None:
    with closing(opened(database)) as connection, mock.patch.object(module, "HANG", 0.2):
        database.signal(signal.SIGSTOP)
        try:
            with pytest.raises(LedgerError) as caught, explained("read"):
                connection.execute("SELECT 1")
        finally:
            database.signal(signal.SIGCONT)

    assert (caught.value.reason, caught.value.transient) == ("ledger_unreachable", True)


def test_another_thread_ends_a_call_that_waits(database: Database) -> None:
    with closing(opened(database)) as connection:
        threading.Timer(0.1, connection.hang_up).start()
        with pytest.raises(LedgerError) as caught, explained("read"):
            connection.execute("SELECT pg_sleep(60)")
        connection.close()
        connection.hang_up()  # which changes nothing any more

    assert caught.value.reason == "ledger_unreachable"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("SELECT pg_terminate_backend(pg_backend_pid())", "ledger_unreachable"),
        ("SET statement_timeout = 1; SELECT pg_sleep(9)", "ledger_busy"),
        ("CREATE SCHEMA pg_mine", "ledger_error"),
        ("SELECT * FROM pg_authid", "ledger_unusable"),
        ("SELECT 1 FROM nothing", "ledger_error"),
        *(
            (f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$", reason)
            for state, reason in {"53100": "disk_full", "XX001": "ledger_damaged", "SK001": "key_given_up"}.items()
        ),
    ],
)
def test_a_failed_statement_has_its_reason(database: Database, statement: str, reason: str) -> None:
    with closing(opened(database)) as connection, pytest.raises(LedgerError) as caught, explained("read"):
        connection.execute(statement.encode())

    assert caught.value.reason == reason


def test_a_value_of_a_row_is_in_no_message(database: Database) -> None:
    with closing(opened(database)) as connection:
        connection.execute("CREATE TEMP TABLE t (a text UNIQUE)")
        connection.execute("INSERT INTO t VALUES ('hunter2')")
        with pytest.raises(LedgerError) as caught, explained("written"):
            connection.execute("INSERT INTO t VALUES ('hunter2')")

    assert "hunter2" not in str(caught.value)
