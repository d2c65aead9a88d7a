"""Lets Python's `ssl` use a key by OpenSSL's engine pkcs11: imported before a program that knows nothing of it.

For Debian 12, which has no pkcs11-provider. Python has no option for an engine, so the key goes straight into the
SSL_CTX behind the context. Standard library only: it runs in the other program's Python.
"""

from __future__ import annotations

import ctypes
import os
import ssl
from pathlib import Path
from typing import Any

tls, crypto = ctypes.CDLL("libssl.so.3"), ctypes.CDLL("libcrypto.so.3")
crypto.ENGINE_by_id.restype = crypto.ENGINE_load_private_key.restype = ctypes.c_void_p
by_file = ssl.SSLContext.load_cert_chain


def load_cert_chain(context: ssl.SSLContext, certfile: str, keyfile: str | None = None, password: Any = None) -> None:
    """Load a chain, and its key from a token if the file begins with a URI."""
    first = Path(keyfile or certfile).read_bytes().splitlines()[0]
    if not first.startswith(b"pkcs11:"):
        by_file(context, certfile, keyfile, password)
        return
    ssl_ctx = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)  # PySSLContext.ctx
    engine = ctypes.c_void_p(crypto.ENGINE_by_id(b"pkcs11"))
    named = first + b"?pin-source=" + os.environb[b"CREDENTIALS_DIRECTORY"] + b"/pin"
    if not crypto.ENGINE_init(engine) or not tls.SSL_CTX_use_certificate_chain_file(ssl_ctx, os.fsencode(certfile)):
        raise ssl.SSLError("no engine, or no chain")
    key = crypto.ENGINE_load_private_key(engine, named, None, None)
    if not key or not tls.SSL_CTX_use_PrivateKey(ssl_ctx, ctypes.c_void_p(key)):
        raise ssl.SSLError("no such key in the token")


ssl.SSLContext.load_cert_chain = load_cert_chain  # type: ignore[assignment,method-assign] # so that the program gets it
