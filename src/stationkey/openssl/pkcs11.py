"""OpenSSL with keys in a PKCS#11 token, by pkcs11-provider, or by the engine of libp11 where that is missing.

A key under ``active/`` is its URI, on a line of text and as a ``PKCS#11 PROVIDER URI``. Python and all that opens key
files by OpenSSL needs the provider. The engine (Debian 12) is for programs that name an engine and the URI themselves.
"""

from __future__ import annotations

import re
from typing import Final

from stationkey.errors import ConfigurationError
from stationkey.keystore.pkcs11.keyfile import LABEL
from stationkey.keystore.pkcs11.uri import TokenUri
from stationkey.openssl.servers import TOKEN_BY_ENGINE, TOKEN_BY_PROVIDER
from stationkey.openssl.setups import HEAD, TAIL, Setup
from stationkey.system.pem import blocks, from_pem

_VERBATIM: Final = re.compile(r"[A-Za-z0-9/._+:@,=-]+")
"""What OpenSSL takes as it is in a value of its configuration [config(5)]."""

_HEAD: Final = HEAD.format(device="PKCS#11 token")
_PIN: Final = "pkcs11-module-token-pin = file:$ENV::CREDENTIALS_DIRECTORY/pin\n"

_PROVIDER: Final = f"""\
{_HEAD}\
# They need two environment variables:
#   OPENSSL_CONF           where this file is
#   CREDENTIALS_DIRECTORY  where the PIN is, in a file named pin; systemd sets it, with LoadCredential=pin:FILE

openssl_conf = stationkey_init

[stationkey_init]
providers = stationkey_providers
ssl_conf = stationkey_ssl

[stationkey_providers]
default = stationkey_default
pkcs11 = stationkey_pkcs11

[stationkey_default]
activate = 1

[stationkey_pkcs11]
activate = 1
pkcs11-module-path = {{module}}
{{pin}}\
# Not closed at the end of the process, when some modules crash.
pkcs11-module-quirks = no-deinit
{TAIL}"""

_ENGINE: Final = f"""\
{_HEAD}\
# They need an environment variable:
#   OPENSSL_CONF  where this file is
# They name the engine pkcs11, and the key by the first line of its file, with ?pin-source=FILE behind it for the PIN.

openssl_conf = stationkey_init

[stationkey_init]
engines = stationkey_engines
ssl_conf = stationkey_ssl

[stationkey_engines]
pkcs11 = stationkey_pkcs11

[stationkey_pkcs11]
engine_id = pkcs11
MODULE_PATH = {{module}}
{TAIL}"""


def setup(location: str) -> Setup:
    """Return the setup for a token: by the provider if this system has it, or else by the engine if it has that.

    Args:
        location: PKCS#11 URI without its scheme [RFC 7512].

    Raises:
        ConfigurationError: invalid URI, or a path of the module that OpenSSL's configuration cannot hold.
    """
    token = TokenUri.parse(location)
    if not _VERBATIM.fullmatch(str(token.module)):
        raise ConfigurationError(
            f"module-path {str(token.module)!r} cannot stand in OpenSSL's configuration",
            reason="keystore_uri_invalid",
            hint="use a path of letters, digits and / . _ + : @ , = -",
        )
    provider, engine = (
        Setup(
            device="token",
            module="pkcs11",
            engine=by_engine,
            package=package,
            install="pkcs11-provider, or libengine-pkcs11-openssl on Debian 12",
            configuration=text.format(module=token.module, pin=_PIN if token.pin else ""),
            shared=True,
            servers=servers,
            locked_part=_locked_part,
            reason="tls_token_failed",
        )
        for by_engine, package, text, servers in (
            (False, "pkcs11-provider", _PROVIDER, TOKEN_BY_PROVIDER),
            (True, "libengine-pkcs11-openssl", _ENGINE, TOKEN_BY_ENGINE),
        )
    )
    return engine if engine.installed() and not provider.installed() else provider


def _locked_part(_: str, content: bytes) -> bytes | None:
    """Return the key: each needs the PIN; see `Setup`."""
    try:
        return from_pem(blocks(content, LABEL)[0])
    except (IndexError, ValueError):
        return None  # the check says so
