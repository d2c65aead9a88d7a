"""What a connection needs before it can begin: TLS context, user name and password.

`ssl` and OpenSSL are loaded only where TLS is used: see `stationkey.system.spared`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from msgspec import Struct

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.errors import BrokerError, ConfigurationError
from stationkey.mqtt.url import Broker
from stationkey.mqtt.waiting import CONNECT_TIMEOUT, in_thread
from stationkey.system.addresses import is_loopback

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)


class Introduction(Struct, frozen=True):
    """TLS context and credentials of a connection.

    Attributes:
        tls: the context, or None without TLS.
        username: user name, or None.
        password: password, or None.
    """

    tls: ssl.SSLContext | None
    username: str | None
    password: bytes | None

    def __repr__(self) -> str:
        """Show all but the password."""
        return f"Introduction(tls={self.tls!r}, username={self.username!r})"


def introduction(terms: MqttTerms, *, tls: bool) -> Introduction:
    """Read the files of `terms`. Blocks; a key in a TPM is loaded there.

    Args:
        terms: TLS and credentials.
        tls: whether TLS is used.

    Raises:
        ConfigurationError: a file is unreadable or invalid, or needs TLS.
        BrokerError: the TPM does not load the key now.
    """
    if not tls and any((terms.ca_file, terms.certificate_file, terms.key_file, terms.server_name)):
        raise ConfigurationError(
            "the broker's URL is without TLS, but CA file, certificate, key or server name are set",
            reason="tls_options_unused",
            hint="begin the URL with mqtts://, or remove them",
        )
    username, password = _credentials(terms)
    if not tls:
        return Introduction(None, username, password)
    from stationkey.mqtt.tls import client_context  # noqa: PLC0415 - with `ssl`

    return Introduction(client_context(terms), username, password)


async def check(broker: Broker, terms: MqttTerms) -> None:
    """Check the terms before the first connection, without connecting.

    Raises:
        ConfigurationError: a file is unreadable or invalid, or not applicable to this broker.
    """
    if terms.password is not None and not broker.tls and not is_loopback(broker.host):
        log.warning("the password crosses the network to %s in the clear: use mqtts://", broker)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await in_thread(lambda: introduction(terms, tls=broker.tls))
    except (BrokerError, TimeoutError) as error:
        log.debug("the TPM does not provide the TLS key yet: %s", error)  # each connection retries, and logs it


def _credentials(terms: MqttTerms) -> tuple[str | None, bytes | None]:
    username = terms.username
    if isinstance(username, SecretReference):
        try:
            username = username.read().decode()
        except UnicodeDecodeError:  # [MQTT 5 3.1.3.5]
            raise ConfigurationError("the user name for the broker is not UTF-8", reason="secret_unreadable") from None
    return username, None if terms.password is None else terms.password.read()
