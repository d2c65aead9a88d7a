"""The options by which a command that is a client of the broker reaches it, once for all such commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from stationkey.cli._options import broker_option, setting_option, topic_prefix_option
from stationkey.config.file import read_table, settle

if TYPE_CHECKING:
    from stationkey.config.settings import MqttTerms
    from stationkey.mqtt.url import Broker

_OPTIONS: Final = ("ca_file", "certificate_file", "key_file", "server_name", "username", "password_file")
"""Options of ``[mqtt]``: there is none for a password itself, which all could read."""


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

        mqtt = {name: others.pop(f"mqtt_{name}") or "" for name in _OPTIONS}
        settings = settle(
            read_table({"mqtt": mqtt}, "the command line"),
            broker=broker,
            topic_prefix=topic_prefix,
            needs_keystore=False,
        )
        reach = Reach(Broker.parse(settings.broker), settings.mqtt, settings.topic_prefix)
        return command(reach=reach, **others)

    decorated: Callable[..., Any] = with_reach
    for name in reversed(_OPTIONS):
        decorated = setting_option(f"mqtt.{name}")(decorated)
    return broker_option(topic_prefix_option(decorated))
