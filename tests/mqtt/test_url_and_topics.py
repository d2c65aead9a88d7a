"""The URL of a broker, and the topics with a prefix before them."""

from __future__ import annotations

import pytest

from stationkey.errors import ConfigurationError
from stationkey.mqtt.topics import availability, renewal, topics
from stationkey.mqtt.url import Broker

# Names.


@pytest.mark.parametrize(
    ("url", "broker", "shown"),
    [
        pytest.param("mqtt://127.0.0.1:1884", Broker("127.0.0.1", 1884), "mqtt://127.0.0.1:1884", id="host-and-port"),
        pytest.param("mqtt://broker.local", Broker("broker.local"), "mqtt://broker.local:1883", id="host"),
        pytest.param("mqtt://[::1]:1884/", Broker("::1", 1884), "mqtt://[::1]:1884", id="ipv6"),
        pytest.param("mqtts://h", Broker("h", 8883, tls=True), "mqtts://h:8883", id="tls"),
        pytest.param("mqtts://h:1883", Broker("h", 1883, tls=True), "mqtts://h:1883", id="tls-and-port"),
    ],
)
def test_a_broker_is_named_by_host_and_port(url: str, broker: Broker, shown: str) -> None:
    assert Broker.parse(url) == broker
    assert str(broker) == shown


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("", id="empty"),
        pytest.param("127.0.0.1:1883", id="no-scheme"),
        pytest.param("http://127.0.0.1", id="another-scheme"),
        pytest.param("mqtt://", id="no-host"),
        pytest.param("mqtt://127.0.0.1:0", id="port-0"),
        pytest.param("mqtt://127.0.0.1:65536", id="port-too-high"),
        pytest.param("mqtt://127.0.0.1:port", id="port-no-number"),
        pytest.param("mqtt://127.0.0.1/path", id="path"),
        pytest.param("mqtt://127.0.0.1?query", id="query"),
        pytest.param("mqtt://[::1", id="bracket-not-closed"),
    ],
)
def test_what_is_no_broker_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigurationError, match="mqtt://127") as refused:  # words: the example
        Broker.parse(url)
    assert refused.value.reason == "broker_invalid"


@pytest.mark.parametrize("user", ["josev", "josev:secret", ":secret"])
def test_a_password_in_a_broker_url_is_refused_and_not_repeated(user: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Broker.parse(f"mqtt://{user}@127.0.0.1")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("prefix", "request_topic"),
    [
        pytest.param("", "josev/cs", id="none"),
        pytest.param("site/7", "site/7/josev/cs", id="levels"),
        pytest.param("site/7/", "site/7/josev/cs", id="with-its-slash"),
        pytest.param("/", "/josev/cs", id="empty-level"),
    ],
)
def test_a_prefix_is_put_before_both_topics(prefix: str, request_topic: str) -> None:
    assert topics(prefix) == (request_topic, request_topic.replace("josev/cs", "cs/josev"))


@pytest.mark.parametrize("prefix", ["a/+", "#", "a\0b", "$SYS", "\ud800", "x" * 2000])
def test_a_prefix_that_cannot_begin_a_topic_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        topics(prefix)
    assert refused.value.reason == "topic_prefix_invalid"


@pytest.mark.parametrize(
    ("prefix", "whole"),
    [
        pytest.param("", "cs/stationkey/availability", id="none"),
        pytest.param("site/7", "site/7/cs/stationkey/availability", id="levels"),
    ],
)
def test_a_prefix_is_put_before_the_availability_topic(prefix: str, whole: str) -> None:
    assert availability(prefix, "cs/stationkey/availability") == whole


@pytest.mark.parametrize("topic", ["", "a/+", "#", "$SYS/a", "a\0", "josev/cs", "cs/josev", "x" * 2000])
def test_an_availability_topic_that_cannot_be_one_is_refused(topic: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        availability("", topic)
    assert refused.value.reason == "availability_topic_invalid"


@pytest.mark.parametrize("topic", ["", "a/#", "+", "cs/josev", "josev/cs", "cs/stationkey/availability"])
def test_a_renewal_topic_that_cannot_be_one_is_refused(topic: str) -> None:
    assert renewal("site/7", "cs/stationkey/renewal") == "site/7/cs/stationkey/renewal"
    with pytest.raises(ConfigurationError) as refused:
        renewal("", topic, availability_topic="cs/stationkey/availability")
    assert refused.value.reason == "renewal_topic_invalid"
