"""Opening a connection to PostgreSQL so that a refusal has its SQLSTATE, in whatever language the server speaks.

libpq reads the SQLSTATE of a refusal and does not hand it on, but in the text of its error at `_VERBOSE`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from ctypes import c_int, c_void_p
from importlib import import_module
from typing import Final

import psycopg
from psycopg import pq
from psycopg.abc import PQGenConn
from psycopg.pq.abc import PGconn
from psycopg.waiting import Wait

_DEFAULT, _VERBOSE = 1, 2
"""libpq's PGVerbosity."""
_STATE: Final = re.compile(r":  ([0-9A-Z]{5}): ")
"""An SQLSTATE behind the severity: libpq puts two spaces between them, in every language."""
_WHERE: Final = re.compile(r"\n[^\n:]+:  \w+, \w+\.\w+:\d+")
"""The place in the server's source code."""


def opening(conninfo: str) -> PQGenConn[PGconn]:
    """Connect; yield what to wait for, as psycopg's own generator does.

    Args:
        conninfo: of one server, for libpq.

    Raises:
        psycopg.Error: no connection; the class of the error has the SQLSTATE, if the server said one.
    """
    conn = pq.PGconn.connect_start(conninfo.encode())
    _set_verbosity(conn, _VERBOSE)
    while conn.status != pq.ConnStatus.BAD:
        polled = conn.connect_poll()
        if polled == pq.PollingStatus.OK:
            _set_verbosity(conn, _DEFAULT)
            conn.nonblocking = 1
            return conn
        if polled == pq.PollingStatus.FAILED:
            break
        while not (yield conn.socket, Wait.R if polled == pq.PollingStatus.READING else Wait.W):
            pass
    refusal = refusal_of(conn.get_error_message("utf-8"))
    conn.finish()
    raise refusal


def refusal_of(text: str) -> psycopg.Error:
    """Return the error of a failed connection from libpq's text, without what only its verbosity has added."""
    found = _STATE.search(text)
    kind: type[psycopg.Error] = psycopg.OperationalError
    if found is not None:
        with suppress(KeyError):  # not one of PostgreSQL's
            kind = psycopg.errors.lookup(found[1])
    return kind(_STATE.sub(":  ", _WHERE.sub("", text)))


def _set_verbosity(conn: PGconn, verbosity: int) -> None:
    """Set the verbosity of a connection's errors, which psycopg lacks.

    Nothing is set with another implementation of psycopg than the pure Python one: it may bring a libpq of its own.
    """
    pointer = getattr(conn, "pgconn_ptr", None)
    if pq.__impl__ == "python" and pointer:
        import_module("psycopg.pq._pq_ctypes").pq.PQsetErrorVerbosity(c_void_p(pointer), c_int(verbosity))
