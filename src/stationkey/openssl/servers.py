"""What TLS servers are configured with so that they serve an active key; printed by ``tls-config --for``.

Tried with each by `tests/car/test_servers.py` and `test_token_servers.py`, 60 handshakes, six at a time; stunnel needs
tpm2-openssl 1.3.0 for it.
"""

from __future__ import annotations

from typing import Final

PORT: Final = 15118
"""The example port in the output; SDP announces the real one to a car [ISO 15118-2 7.10.1]."""

PLAIN_PORT: Final = 15119
"""Stands for the port of a server without TLS."""

_ONE: Final = "tpm2-openssl 1.1.1 (Debian 12) fails with more than one. 1.3.0 (Debian 13) does not."

SERVERS: Final = {
    "nginx": f"""\
# {_ONE}
worker_processes 1;
events {{}}
http {{
    server {{
        listen {PORT} ssl;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_certificate /run/credentials/nginx.service/secc.pem;
        ssl_certificate_key /run/credentials/nginx.service/secc.pem;
        return 204;
    }}
}}
""",
    "haproxy": f"""\
global
    # {_ONE}
    nbthread 1
defaults
    mode http
    timeout client 60s
    timeout connect 10s
    timeout server 60s
frontend secc
    bind :{PORT} ssl crt /run/credentials/haproxy.service/secc.pem
    http-request return status 204
""",
    "haproxy-tcp": f"""\
# TLS for a server without: Apache, stunnel's service, or a Python program.
global
    # {_ONE}
    nbthread 1
defaults
    mode tcp
    timeout client 60s
    timeout connect 10s
    timeout server 60s
frontend secc
    bind :{PORT} ssl crt /run/credentials/haproxy.service/secc.pem
    default_backend plain
backend plain
    server plain 127.0.0.1:{PLAIN_PORT}
""",
    "apache": f"""\
# {_ONE}
# One worker serves one connection at a time. For more with 1.1.1: tls-config --for haproxy-tcp, and Apache without TLS.
LoadModule mpm_prefork_module /usr/lib/apache2/modules/mod_mpm_prefork.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule alias_module /usr/lib/apache2/modules/mod_alias.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
User www-data
Group www-data
ServerName secc
PidFile /run/apache2/apache2.pid
ErrorLog /dev/stderr
StartServers 1
ServerLimit 1
MaxRequestWorkers 1
KeepAlive Off
Listen {PORT}
SSLEngine on
SSLProtocol -all +TLSv1.2 +TLSv1.3
SSLCertificateFile /run/credentials/apache2.service/secc.pem
SSLCertificateKeyFile /run/credentials/apache2.service/secc.pem
RedirectMatch 204 .*
""",
    "stunnel": f"""\
# With tpm2-openssl 1.3.0 (Debian 13) only. It aborts with 1.1.1 (Debian 12): there, use tls-config --for haproxy-tcp.
foreground = yes
pid =
[secc]
accept = {PORT}
connect = 127.0.0.1:{PLAIN_PORT}
cert = /run/credentials/stunnel.service/secc.pem
key = /run/credentials/stunnel.service/secc.pem
""",
    "python": f"""\
# {_ONE}
# asyncio has one thread for all connections. ThreadingHTTPServer has one for each: not with 1.1.1.
import asyncio
import os
import ssl

ANSWER = b"HTTP/1.1 204 No Content\\r\\nConnection: close\\r\\n\\r\\n"


async def serve(reader, writer):
    try:
        await reader.readuntil(b"\\r\\n\\r\\n")
        writer.write(ANSWER)
        await writer.drain()
    finally:
        writer.close()


async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(os.environ["CREDENTIALS_DIRECTORY"], "secc.pem"))
    server = await asyncio.start_server(serve, port={PORT}, ssl=context)
    await server.serve_forever()


asyncio.run(main())
""",
    "node": f"""\
// node --openssl-shared-config FILE: without this option, Node.js does not read OPENSSL_CONF.
// An official build of Node.js also needs OPENSSL_MODULES, as `openssl version -m` says.
// Node.js makes all handshakes in one thread, as tpm2-openssl 1.1.1 (Debian 12) needs: no cluster, no worker threads.
const fs = require("node:fs");
const https = require("node:https");
const pem = fs.readFileSync(`${{process.env.CREDENTIALS_DIRECTORY}}/secc.pem`);
https
  .createServer({{ key: pem, cert: pem, minVersion: "TLSv1.2" }}, (request, response) => response.writeHead(204).end())
  .listen({PORT});
""",
}
"""A whole configuration, or program, for each, with a key in a TPM, and the chain with it where
``LoadCredential=secc.pem:`` puts them."""


def _for_token(server: str) -> str:
    """Return the same without what is said of tpm2-openssl 1.1.1."""
    return "".join(line for line in SERVERS[server].splitlines(keepends=True) if "1.1.1" not in line)


TOKEN_BY_PROVIDER: Final = {server: _for_token(server) for server in ("nginx", "node", "python", "stunnel")}
"""The same for a key in a PKCS#11 token, by pkcs11-provider. haproxy aborts with its version 1.0."""

_BY_FILE: Final = "ssl_certificate_key /run/credentials/nginx.service/secc.pem;"
TOKEN_BY_ENGINE: Final = {
    "nginx": """\
# nginx takes the URI of a key only from its configuration. So let systemd write it at each start, in nginx.service.d/:
#   [Service]
#   Environment=OPENSSL_CONF=/etc/stationkey/openssl.cnf
#   LoadCredential=secc.pem:/var/lib/stationkey/active/v2g_certificate.pem
#   LoadCredential=pin:/etc/stationkey/pin
#   RuntimeDirectory=secc
#   WorkingDirectory=/run/secc
#   ExecStartPre=
#   ExecStartPre=sed -n 's|^pkcs11:.*|ssl_certificate_key "engine:pkcs11:&?pin-source=%d/pin";|w key' %d/secc.pem
"""
    + _for_token("nginx").replace(_BY_FILE, "include /run/secc/key;"),
}
"""The same by the engine, for what can name one."""
