"""The topics of requests, responses, availability and renewal, with their prefix."""

from __future__ import annotations

from typing import Final

from stationkey.contract.messages import REQUEST_TOPIC, RESPONSE_TOPIC
from stationkey.errors import ConfigurationError

MAX_PREFIX: Final = 1024
"""Largest topic prefix in bytes; MQTT allows 64 KiB [MQTT 5 1.5.4]."""


def topics(prefix: str) -> tuple[str, str]:
    """Return the topics of requests and responses, with `prefix`.

    Args:
        prefix: one topic level or several, or empty; a missing ``/`` at its end is added.

    Raises:
        ConfigurationError: it has a wildcard, a NUL or an unpaired surrogate, is too long, or begins with ``$``, which
            is reserved for the broker.
    """
    if not _is_topic(prefix):
        raise ConfigurationError(f"{prefix[:80]!r} is not a valid topic prefix", reason="topic_prefix_invalid")
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    return prefix + REQUEST_TOPIC, prefix + RESPONSE_TOPIC


def availability(prefix: str, topic: str) -> str:
    """Return the availability topic, with `prefix`.

    Raises:
        ConfigurationError: it is not a valid topic, or is one of the others.
    """
    return _of_ours(prefix, topic, ("availability_topic_invalid", "the availability topic"))


def renewal(prefix: str, topic: str, *, availability_topic: str | None = None) -> str:
    """Return the topic of certificates that are due for renewal, with `prefix`.

    Raises:
        ConfigurationError: it is not a valid topic, or is one of the others.
    """
    return _of_ours(prefix, topic, ("renewal_topic_invalid", "the renewal topic"), taken=availability_topic)


def _of_ours(prefix: str, topic: str, kind: tuple[str, str], *, taken: str | None = None) -> str:
    request, response = topics(prefix)
    whole = request.removesuffix(REQUEST_TOPIC) + topic
    if not topic or not _is_topic(whole) or whole in {request, response} or topic == taken:
        reason, words = kind
        raise ConfigurationError(f"{topic[:80]!r} cannot be {words}", reason=reason)
    return whole


def _is_topic(text: str) -> bool:
    """Return whether a text is a valid topic to publish on, or a valid prefix [MQTT 5 4.7.1, 4.7.2, 4.7.3]."""
    if any("\ud800" <= character <= "\udfff" or character in "+#\0" for character in text):
        return False
    return len(text.encode()) <= MAX_PREFIX and not text.startswith("$")
