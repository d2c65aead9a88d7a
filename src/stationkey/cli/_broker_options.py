"""The options by which a command that is a client of the broker reaches it, once for all such commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from stationkey.cli._options import broker_option, option, topic_prefix_option
from stationkey.config import file as config

if TYPE_CHECKING:
    from stationkey.config.settings import MqttTerms
    from stationkey.mqtt.url import Broker

_OPTIONS: Final = {
    "ca_file": ("FILE", "Certificates (PEM) that the broker's must lead to.  [default: those of this machine]"),
    "certificate_file": ("FILE", "Our certificate (PEM) for the broker: a path, or credential:NAME."),
    "key_file": ("FILE", "Its private key (PEM), where it is not in the same file; it may be a TPM's."),
    "server_name": ("NAME", "Name in the broker's certificate.  [default: the host]"),
    "username": ("NAME", "User name at the broker."),
    "password_file": ("FILE", "Where the password for the broker is: a path, or credential:NAME."),
}
"""The names of `stationkey.config.file.Mqtt`, as options: there is none for a password itself, which all could read."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Which broker, and by which terms.

    Attributes:
        broker: where it is.
        terms: TLS and credentials.
        topic_prefix: put before both topics.
    """

    broker: Broker
    terms: MqttTerms
    topic_prefix: str


def reaches_broker(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options. It gets what they say as its argument `reach`, a `Reach`."""

    @wraps(command)
    def with_reach(*, broker: str | None, topic_prefix: str | None, **others: Any) -> Any:
        from stationkey.mqtt.url import Broker  # noqa: PLC0415 - --help needs no MQTT client

        said = {name: others.pop(f"mqtt_{name}") or "" for name in _OPTIONS}
        where = Broker.parse(broker or config.DEFAULT_BROKER)
        reach = Reach(where, config.Mqtt(**said).terms(), topic_prefix or "")
        return command(reach=reach, **others)

    decorated: Callable[..., Any] = with_reach
    for name, (metavar, text) in reversed(_OPTIONS.items()):
        decorated = option(f"--mqtt-{name.replace('_', '-')}", metavar=metavar, help=text)(decorated)
    return broker_option(topic_prefix_option(decorated))
