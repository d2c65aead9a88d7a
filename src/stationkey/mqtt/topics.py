"""The topics of requests, responses, availability and renewal, with their prefix."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Final, Self

from stationkey.contract.messages import REQUEST_TOPIC, RESPONSE_TOPIC
from stationkey.contract.stations import ANY_LEVEL, pattern_flaw, station_flaw
from stationkey.errors import ConfigurationError

MAX_PREFIX: Final = 1024
"""Largest topic prefix in bytes; MQTT allows 64 KiB [MQTT 5 1.5.4]."""


class Stations:
    """The stations that are served, and their topics.

    In a site, a station is the text that a pattern matches: with the pattern ``depot7/+``, the station of the topic
    ``depot7/s1/josev/cs`` is ``depot7/s1``. Without patterns there is one station, whose name is empty.

    Args:
        prefix: see `topics`.
        patterns: topic levels, each a text or ``+``; see `stationkey.contract.stations`.

    Attributes:
        filters: the topic filters to subscribe to.
        several: whether this is a site.

    Raises:
        ConfigurationError: the prefix or a pattern is invalid.
    """

    def __init__(self, prefix: str = "", patterns: Iterable[str] = ()) -> None:
        self._request, self._response = topics(prefix)
        self._prefix = self._request.removesuffix(REQUEST_TOPIC)
        self._patterns = tuple(dict.fromkeys(patterns))
        self._levels = [pattern.split("/") for pattern in self._patterns]
        for pattern in self._patterns:
            if flaw := pattern_flaw(pattern):
                words = f"the pattern of stations {pattern[:80]!r} {flaw}"
                raise ConfigurationError(words, reason="stations_invalid", hint="see [site] stations")
        self.several = bool(self._patterns)
        self.filters = tuple(map(self.request_topic, self._patterns)) if self._patterns else (self._request,)

    def draining(self) -> Self:
        """Return the same stations without topic filters: nothing is subscribed, and what still comes is answered."""
        other = copy(self)
        other.filters = ()
        return other

    def of(self, topic: str) -> str | None:
        """Return the station of a topic of requests; None if it is none of ours, or has a name that is not served."""
        if not self.several:
            return "" if topic == self._request else None
        name = self._name(topic)
        return None if name is None or station_flaw(name) else name

    def flaw(self, topic: str) -> str:
        """Return what is wrong with the station's name in a topic that is subscribed; empty for any other topic."""
        name = self._name(topic) if self.several else None
        return "" if name is None else station_flaw(name)

    def example(self, level: str) -> str:
        """Return the name of a station that the first pattern matches, with `level` for any level."""
        return "/".join(level if part == ANY_LEVEL else part for part in next(iter(self._levels), ()))

    def request_topic(self, station: str) -> str:
        """Return the topic of a station's requests and statuses."""
        return f"{self._prefix}{station}/{REQUEST_TOPIC}" if station else self._request

    def response_topic(self, station: str) -> str:
        """Return the topic of the responses to a station."""
        return f"{self._prefix}{station}/{RESPONSE_TOPIC}" if station else self._response

    def _name(self, topic: str) -> str | None:
        """Return the part of a topic that a pattern matches, or None."""
        end = "/" + REQUEST_TOPIC
        if not (topic.startswith(self._prefix) and topic.endswith(end)) or len(topic) < len(self._prefix) + len(end):
            return None
        name = topic[len(self._prefix) : -len(end)]
        levels = name.split("/")
        return name if any(_matches(pattern, levels) for pattern in self._levels) else None


def _matches(pattern: list[str], levels: list[str]) -> bool:
    """Return whether a name matches a pattern, level by level."""
    pairs = zip(pattern, levels, strict=False)
    return len(pattern) == len(levels) and all(wanted in {ANY_LEVEL, level} for wanted, level in pairs)


def topics(prefix: str, station: str = "") -> tuple[str, str]:
    """Return the topics of requests and responses, with `prefix`.

    Args:
        prefix: one topic level or several, or empty; a missing ``/`` at its end is added.
        station: a station of a site.

    Raises:
        ConfigurationError: the prefix has a wildcard, a NUL or an unpaired surrogate, is too long, or begins with
            ``$``, which is reserved for the broker; or the station's name is invalid.
    """
    if not _is_topic(prefix):
        raise ConfigurationError(f"{prefix[:80]!r} is not a valid topic prefix", reason="topic_prefix_invalid")
    if station and (flaw := station_flaw(station)):
        raise ConfigurationError(f"the station's name {station[:80]!r} {flaw}", reason="station_invalid")
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    if station:
        prefix += station + "/"
    return prefix + REQUEST_TOPIC, prefix + RESPONSE_TOPIC


def availability(prefix: str, topic: str, *, site: bool = False) -> str:
    """Return the availability topic, with `prefix`. In a site it is the daemon's, not a station's.

    Raises:
        ConfigurationError: it is not a valid topic, or is one of the others.
    """
    return _of_ours(prefix, topic, ("availability_topic_invalid", "the availability topic"), site=site)


def renewal(prefix: str, topic: str, *, availability_topic: str | None = None, site: bool = False) -> str:
    """Return the topic of certificates that are due for renewal, with `prefix`.

    Raises:
        ConfigurationError: it is not a valid topic, or is one of the others.
    """
    return _of_ours(prefix, topic, ("renewal_topic_invalid", "the renewal topic"), taken=availability_topic, site=site)


def _of_ours(prefix: str, topic: str, kind: tuple[str, str], *, taken: str | None = None, site: bool) -> str:
    request, response = topics(prefix)
    whole = request.removesuffix(REQUEST_TOPIC) + topic
    of_a_station = site and whole.endswith(("/" + REQUEST_TOPIC, "/" + RESPONSE_TOPIC))
    if not topic or not _is_topic(whole) or whole in {request, response} or of_a_station or topic == taken:
        reason, words = kind
        raise ConfigurationError(f"{topic[:80]!r} cannot be {words}", reason=reason)
    return whole


def _is_topic(text: str) -> bool:
    """Return whether a text is a valid topic to publish on, or a valid prefix [MQTT 5 4.7.1, 4.7.2, 4.7.3]."""
    if any("\ud800" <= character <= "\udfff" or character in "+#\0" for character in text):
        return False
    return len(text.encode()) <= MAX_PREFIX and not text.startswith("$")
