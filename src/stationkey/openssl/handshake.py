"""The side of a loopback handshake with the key, in its own process.

`stationkey.openssl.check` is the other side.

Run as a script and with the standard library only: ``OPENSSL_CONF`` applies to a whole process, so what is loaded here
is what a service would load, and nothing more.

Use: handshake.py ROLE FILE TIMES THREADED PORT PASSWORD, where ROLE is ``server`` (PORT 0 for a free one; it is
printed) or ``client``, THREADED is 1 for a server with a thread for each connection, else 0, and PASSWORD is a
descriptor that the key's password is read from.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
import threading

TIMEOUT = 30.0


def main(role: str, file: str, times: int, threaded: int, port: int, password: int) -> None:
    """Load key and chain from `file`, and make `times` handshakes: one after the other, or `threaded`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key that is checked is this side's
    # A password is never asked for on a terminal: without one, a key that needs one fails at once.
    with os.fdopen(password, "rb") as pipe:
        context.load_cert_chain(file, password=pipe.read())
    print("loaded", flush=True)  # noqa: T201 - read by the other side
    if role == "client":
        for _ in range(times):
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
                _greet(context.wrap_socket(connection))
        return
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(TIMEOUT)
        print(listener.getsockname()[1], flush=True)  # noqa: T201 - same
        for _ in range(times):
            connection, _ = listener.accept()
            connection.settimeout(TIMEOUT)
            if threaded:
                threading.Thread(target=_serve, args=(context, connection)).start()
            else:
                _serve(context, connection)


def _serve(context: ssl.SSLContext, connection: socket.socket) -> None:
    with connection:
        _greet(context.wrap_socket(connection, server_side=True))


def _greet(session: ssl.SSLSocket) -> None:
    """One byte each way: in TLS 1.3 a client's certificate is judged only after the client is done."""
    with session:
        session.sendall(b"k")
        session.recv(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
