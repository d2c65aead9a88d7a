"""Connections to PostgreSQL: every wait is bounded, every failure is explained, and a commit is durable or refused."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple, Self, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.abc import PQGen, PQGenConn
from psycopg.rows import TupleRow

from stationkey.config.secrets import SecretReference
from stationkey.errors import LedgerError, Scope
from stationkey.ledger.postgresql.opening import opening

T = TypeVar("T")

SCHEMA: Final = "stationkey"
"""Schema of all tables. Only it is searched, so that nobody else's tables or functions are found."""
CONNECT_TIMEOUT: Final = 3
"""Seconds for a connection to each host and address."""
STATEMENT_TIMEOUT: Final = 6.0
"""Seconds after which the server ends a statement. Most take less than a millisecond."""
HANG: Final = STATEMENT_TIMEOUT + 2
"""Seconds after which the server counts as hung, and the connection as lost."""
_LOCK_TIMEOUT: Final = 5
"""Seconds to wait for another transaction; SQLite's are as many."""
_IDLE_TIMEOUT: Final = 4
"""Seconds after which the server ends the transaction of a stopped daemon: its locks keep another from taking over."""
_LOST_AFTER: Final = 2
"""Seconds after which a statement ends whose client is gone: it keeps locks."""
_OLDEST: Final = 15
"""Version of PostgreSQL."""

PARAMETERS: Final = {
    "connect_timeout": CONNECT_TIMEOUT,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8_000,  # milliseconds
    "gssencmode": "disable",  # no look for a Kerberos ticket first
    "client_encoding": "UTF8",
    "options": " ".join(
        f"-c {name}={value}"
        for name, value in {
            "search_path": SCHEMA,
            "statement_timeout": int(STATEMENT_TIMEOUT * 1000),
            "lock_timeout": _LOCK_TIMEOUT * 1000,
            "idle_in_transaction_session_timeout": _IDLE_TIMEOUT * 1000,
            "client_connection_check_interval": _LOST_AFTER * 1000,
            # Else the server waits for hours for the rest of a message whose sender is gone.
            "tcp_keepalives_idle": 5,
            "tcp_keepalives_interval": 2,
            "tcp_keepalives_count": 3,
            "jit": "off",
        }.items()
    ),
}
"""libpq's, of every connection; an operator cannot set them otherwise."""

_ASKED: Final = (
    "SELECT current_setting('server_version_num')::int / 10000,"
    " pg_is_in_recovery() OR current_setting('transaction_read_only')::bool,"
    " current_setting('fsync')::bool, current_setting('full_page_writes')::bool,"
    " current_setting('synchronous_commit'), current_setting('synchronous_standby_names'),"
    " current_setting('server_encoding'),"
    # The second is the time of the last recovery after a crash, which the first outlives if a backend has crashed.
    " pg_postmaster_start_time() || ' ' || coalesce((SELECT stats_reset FROM pg_stat_bgwriter)::text, '')"
)


_Nature = tuple[str, str, bool]
"""Reason, hint, and whether it is transient."""

_UNREACHABLE: Final = ("ledger_unreachable", "is PostgreSQL running, and does the network lead there?", True)
_LOGIN: Final = (
    "ledger_login_refused",
    "user and host must be allowed in pg_hba.conf, with the password of ledger_password_file",
    False,
)
_READ_ONLY: Final = ("ledger_read_only", "this is a standby, or read-only by its settings: name the primary", True)
_CROWDED: Final = ("ledger_crowded", "raise max_connections of PostgreSQL, or end other programs", True)
_POOLED: Final = ("ledger_unsupported", "connect to PostgreSQL itself: a pooler keeps no locks of a session", False)
_UNTRUSTED: Final = ("ledger_untrusted", "see sslmode and sslrootcert in the URI, and the server's certificate", False)
_BUSY: Final = ("ledger_busy", "does a stationkey keys command or another program hold a lock?", True)
_NO_DATABASE: Final = ("ledger_missing", "create it: CREATE DATABASE NAME OWNER USER", False)
_FULL: Final = ("disk_full", "free some space on the database's machine", True)
_DAMAGED: Final = ("ledger_damaged", "restore a backup of the database. Nothing was overwritten", False)
_FORBIDDEN: Final = ("ledger_unusable", "the user must own the database, or its schema stationkey", False)

_BY_STATE: Final = {
    "28": _LOGIN,
    "3D000": _NO_DATABASE,
    "25006": _READ_ONLY,
    "53300": _CROWDED,
    "53100": _FULL,
    "55P03": _BUSY,
    "57014": _BUSY,
    "40P01": _BUSY,
    "40001": _BUSY,
    "42501": _FORBIDDEN,
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
    "08": _UNREACHABLE,
    "57P": _UNREACHABLE,
    "25P03": _UNREACHABLE,
}
"""The nature of an SQLSTATE, or of those that begin with it [PostgreSQL, Appendix A]."""
_BY_WORDS: Final = (
    (re.compile("certificate|SSL was|SSL error: (?!unexpected eof)"), _UNTRUSTED),
    (re.compile("no password|authentication"), _LOGIN),
    (re.compile("read-only|read/write"), _READ_ONLY),
)
"""The nature of what libpq says itself, without an SQLSTATE: in English, because Python does not set LC_MESSAGES."""


class Connection(psycopg.Connection[TupleRow]):
    """A connection on which no call hangs: the server may be stopped, or the network silent.

    Attributes:
        hang: seconds after which the server counts as hung.
        run: the same for all connections to a server until it is restarted, by a crash too.
    """

    hang: float | None = None
    run: str = ""

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        """Connect; psycopg's own loses the SQLSTATE of a refusal."""
        return cls((yield from opening(conninfo)))

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for the server; see psycopg's.

        Raises:
            psycopg.OperationalError: it did not answer in time. The connection cannot be used further.
        """
        return super().wait(gen, interval, timeout or self.hang or HANG)

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Let a statement take longer."""
        self.hang = seconds + 2
        try:
            self.execute("SELECT set_config('statement_timeout', %s, false)", (f"{seconds}s",))
            yield
            self.execute("SELECT set_config('statement_timeout', %s, false)", (f"{STATEMENT_TIMEOUT}s",))
        finally:
            self.hang = None

    def hang_up(self) -> None:
        """End the connection by its socket. Any thread may call this, also while another waits for the server."""
        with suppress(psycopg.OperationalError, OSError):
            descriptor = self.pgconn.socket
            with socket.socket(fileno=descriptor) as shared:
                try:
                    shared.shutdown(socket.SHUT_RDWR)
                finally:
                    shared.detach()  # libpq closes it


def connect(uri: str, password: SecretReference | None, *, name: str) -> Connection:
    """Connect, in autocommit mode, to a server whose commits are durable.

    Args:
        uri: of the database; see `stationkey.config.site`.
        password: its password.
        name: who this is, for ``pg_stat_activity``; 63 bytes at most.

    Raises:
        LedgerError: the server is unreachable, refuses, is a standby, is too old or could lose a commit.
        ConfigurationError: the password cannot be read.
    """
    secret = {} if password is None else {"password": password.read().decode(errors="surrogateescape")}
    several = {"target_session_attrs": "read-write"} if "," in uri else {}
    with explained("opened"):
        parameters: dict[str, Any] = {**several, **conninfo.conninfo_to_dict(uri), **PARAMETERS, **secret}
        try:
            who = f"stationkey {name}"[:63]
            connection = Connection.connect("", autocommit=True, application_name=who, **parameters)
        except psycopg.errors.ProtocolViolation as error:  # PostgreSQL itself takes libpq's start-up message
            raise _error("opened", _words(error), _POOLED) from None
    try:
        with explained("opened"):
            _refuse_unfit(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_unfit(connection: Connection) -> None:
    row = connection.execute(_ASKED).fetchone()
    assert row is not None
    server = Server(*row)
    if unfit := judged(server):
        raise unfit
    connection.run = server.run


class Server(NamedTuple):
    """What a server says of itself, in the order of `_ASKED`."""

    version: int
    read_only: bool
    fsync: bool
    full_page_writes: bool
    synchronous_commit: str
    standbys: str
    encoding: str
    run: str = ""


def judged(server: Server) -> LedgerError | None:
    """Return why a server is unfit: too old, without changes, or it may lose a commit that it confirmed."""
    if server.version < _OLDEST or server.encoding != "UTF8":
        return LedgerError(
            f"the ledger is on PostgreSQL {server.version} with the encoding {server.encoding}",
            reason="ledger_unsupported",
            hint=f"it needs {_OLDEST} or newer, and a database with ENCODING 'UTF8'",
        )
    if server.read_only:
        return _error("opened", "the server takes no changes", _READ_ONLY)
    commits = server.synchronous_commit
    weak = {
        "fsync=off": not server.fsync,
        "full_page_writes=off": not server.full_page_writes,
        f"synchronous_commit={commits}": commits == "off" or (commits == "local" and bool(server.standbys)),
    }
    wrong = [setting for setting, is_weak in weak.items() if is_weak]
    if not wrong:
        return None
    return LedgerError(
        f"PostgreSQL may lose the ledger's last commits: {', '.join(wrong)}",
        reason="ledger_not_durable",
        hint="set it to on for the server, the database and the user; a lost answer would get a second key",
    )


@contextmanager
def explained(act: str) -> Iterator[None]:
    """Turn an error of psycopg into a `LedgerError`.

    Args:
        act: what failed, for the error's message.
    """
    try:
        yield
    except psycopg.Error as error:
        raise of_error(act, error) from None


def of_error(act: str, error: psycopg.Error) -> LedgerError:
    """Return the error in our words. PostgreSQL's own never have a password in them; some have values of a row."""
    if error.sqlstate == "SK001":  # raised by `tokens.SCHEMA`
        return LedgerError(_words(error), reason="key_given_up", transient=True, scope=Scope.KEY)
    return _error(act, _words(error), nature_of(error))


def nature_of(error: psycopg.Error) -> _Nature:
    """Return reason, hint and whether it is transient."""
    state = error.sqlstate or ""
    for length in (5, 3, 2):
        if nature := _BY_STATE.get(state[:length]):
            return nature
    if state or not isinstance(error, psycopg.OperationalError):
        return ("ledger_error", "", False)
    words = str(error)
    return next((nature for pattern, nature in _BY_WORDS if pattern.search(words)), _UNREACHABLE)


def is_lost(error: psycopg.Error) -> bool:
    """Return whether the connection is lost, rather than a statement refused."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return nature_of(error) is _UNREACHABLE


def _words(error: psycopg.Error) -> str:
    """Return PostgreSQL's own words on one line, without its detail, which may be values of a row."""
    text = error.diag.message_primary or str(error)
    return re.sub(r"\s+", " ", text.removeprefix("connection failed: ")).strip()[:300]


def _error(act: str, words: str, nature: _Nature) -> LedgerError:
    reason, hint, transient = nature
    return LedgerError(
        f"the ledger on PostgreSQL cannot be {act}: {words}",
        reason=reason,
        hint=hint,
        transient=transient,
    )
