"""The TLS side of an SECC as an OEM would write it in Python: the standard library, and a file from ``active/``.

It knows nothing of this project: OPENSSL_CONF and TPM2OPENSSL_TCTI in the environment make its OpenSSL use the TPM.
Speaks as ``openssl s_server -rev`` does: sends each line back reversed, and ends on ``CLOSE``.

Use: secc.py FILE VERSION [ROOT-OF-VEHICLES]
"""

from __future__ import annotations

import socket
import ssl
import sys

file, version, *vehicle_root = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
context.load_cert_chain(file)
if vehicle_root:
    context.load_verify_locations(vehicle_root[0])
    context.verify_mode = ssl.CERT_REQUIRED
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(f"ACCEPT 127.0.0.1:{listener.getsockname()[1]}", flush=True)  # noqa: T201 - as s_server does
    connection, _ = listener.accept()
    with context.wrap_socket(connection, server_side=True) as session, session.makefile("rb") as lines:
        while (line := lines.readline().rstrip(b"\n")) != b"CLOSE":
            session.sendall(line[::-1] + b"\n")
        session.unwrap()
