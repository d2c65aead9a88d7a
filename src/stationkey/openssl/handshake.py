"""The side of a loopback handshake with the key, in its own process.

`stationkey.openssl.check` is the other side.

Run as a script and with the standard library only: ``OPENSSL_CONF`` applies to a whole process, so what is loaded here
is what a service would load, and nothing more.

Use: handshake.py ROLE FILE ENGINE TIMES THREADED PORT, where ROLE is ``server`` (PORT 0 for a free one; it is printed)
or ``client``, ENGINE is the engine for the key, or empty, and THREADED is 1 for a server with a thread for each
connection, else 0. The key's password is in the file ``pin`` in ``CREDENTIALS_DIRECTORY``.
"""

from __future__ import annotations

import ctypes
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 30.0

Greet = Callable[[socket.socket, bool], None]
"""Makes a handshake, as a server or not, and sends one byte each way: in TLS 1.3 a client's certificate is judged only
after the client is done."""


def by_provider(role: str, file: str, password: Path) -> Greet:
    """Load key and chain from `file` as Python programs do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key that is checked is this side's
    # A password is never asked for on a terminal: without one, a key that needs one fails at once.
    context.load_cert_chain(file, password=password.read_bytes())

    def greet(connection: socket.socket, server: bool) -> None:
        with context.wrap_socket(connection, server_side=server) as session:
            session.sendall(b"k")
            session.recv(1)

    return greet


def by_engine(engine: str, file: str, password: Path) -> Greet:
    """Load key and chain from `file` by OpenSSL's own functions: Python's `ssl` knows no engines."""
    tls, crypto = ctypes.CDLL("libssl.so.3"), ctypes.CDLL("libcrypto.so.3")

    def done(returned: int | None) -> ctypes.c_void_p:
        if not returned or returned < 0:
            crypto.ERR_print_errors_fp(ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr"))
            raise OSError("OpenSSL failed")
        return ctypes.c_void_p(returned)

    for function in (tls.TLS_method, tls.SSL_CTX_new, tls.SSL_new, crypto.ENGINE_by_id, crypto.ENGINE_load_private_key):
        function.restype = ctypes.c_void_p
    context = done(tls.SSL_CTX_new(done(tls.TLS_method())))
    done(tls.SSL_CTX_use_certificate_chain_file(context, file.encode()))
    loaded = done(crypto.ENGINE_by_id(engine.encode()))
    done(crypto.ENGINE_init(loaded))
    named = Path(file).read_bytes().splitlines()[0] + b"?pin-source=" + bytes(password)
    done(tls.SSL_CTX_use_PrivateKey(context, done(crypto.ENGINE_load_private_key(loaded, named, None, None))))

    def greet(connection: socket.socket, server: bool) -> None:
        connection.settimeout(None)  # OpenSSL waits; the other side ends this process if it waits too long
        session = done(tls.SSL_new(context))
        done(tls.SSL_set_fd(session, connection.fileno()))
        done((tls.SSL_accept if server else tls.SSL_connect)(session))
        tls.SSL_write(session, b"k", 1)
        tls.SSL_read(session, ctypes.create_string_buffer(1), 1)
        tls.SSL_free(session)

    return greet


def main(role: str, file: str, engine: str, times: int, threaded: int, port: int) -> None:
    """Load key and chain from `file`, and make `times` handshakes: one after the other, or `threaded`."""
    password = Path(os.environ["CREDENTIALS_DIRECTORY"], "pin")
    greet = by_engine(engine, file, password) if engine else by_provider(role, file, password)
    print("loaded", flush=True)  # noqa: T201 - read by the other side
    if role == "client":
        for _ in range(times):
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
                greet(connection, False)
        return
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(TIMEOUT)
        print(listener.getsockname()[1], flush=True)  # noqa: T201 - same
        for _ in range(times):
            connection, _ = listener.accept()
            connection.settimeout(TIMEOUT)
            if threaded:
                threading.Thread(target=_serve, args=(greet, connection)).start()
            else:
                _serve(greet, connection)


def _serve(greet: Greet, connection: socket.socket) -> None:
    with connection:
        greet(connection, True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
