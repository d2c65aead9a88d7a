"""What TLS servers are configured with so that they serve an active key; printed by ``tls-config --for``.

Tried with each by `tests/car/test_servers.py`, 60 handshakes, six at a time.
"""

from __future__ import annotations

from typing import Final

PORT: Final = 15118
"""Stands for the port in what is printed; SDP tells a car the real one [ISO 15118-2 7.10.1]."""

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
}
"""A whole configuration for each, with key and chain where systemd's ``LoadCredential=secc.pem:`` puts them."""
