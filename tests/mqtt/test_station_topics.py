"""The stations of a site: which topics are theirs, and one edge for many of them, against a real Mosquitto."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from gateways import Service, answers, payload, serving
from hypothesis import given
from hypothesis import strategies as st
from mqtt_sides import at
from peers import Mosquitto

from stationkey.contract.active_names import percent_encoded
from stationkey.contract.messages import (
    CertificateInstallationStatus,
    GenerateCsrResponse,
    rejected,
)
from stationkey.contract.stations import station_flaw
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.mqtt.connection import MqttConnection, connect
from stationkey.mqtt.topics import Stations, availability, renewal, topics

DEPOT = Stations("site", ["depot7/+"])


def requests_of(station: str) -> str:
    return f"site/{station}/josev/cs"


# Which topics are whose.


def test_without_patterns_there_is_one_station_with_todays_topics() -> None:
    single = Stations("site")
    assert (single.filters, single.several) == (("site/josev/cs",), False)
    assert (single.of("site/josev/cs"), single.of("site/a/josev/cs"), single.flaw("site/a/josev/cs")) == ("", None, "")
    assert (single.request_topic(""), single.response_topic("")) == topics("site")


def test_a_station_is_what_the_pattern_matches_and_is_answered_on_its_own_topic() -> None:
    assert (DEPOT.filters, DEPOT.several) == (("site/depot7/+/josev/cs",), True)
    assert DEPOT.of("site/depot7/s1/josev/cs") == "depot7/s1"
    assert DEPOT.response_topic("depot7/s1") == "site/depot7/s1/cs/josev"
    assert topics("site", "depot7/s1") == ("site/depot7/s1/josev/cs", "site/depot7/s1/cs/josev")


@pytest.mark.parametrize(
    "topic",
    [
        *("site/josev/cs", "site/depot7/josev/cs", "site/depot7/a/b/josev/cs", "site/depot8/a/josev/cs"),
        *("depot7/a/josev/cs", "site/depot7/a/cs/josev", "site/depot7/a/josev/cs/x", "josev/cs", "/josev/cs", ""),
    ],
)
def test_other_topics_are_of_no_station(topic: str) -> None:
    assert (DEPOT.of(topic), DEPOT.flaw(topic)) == (None, "")


@pytest.mark.parametrize(
    "level",
    ["", "a\tb", "a\nb", "a\u202eb", "a\u200bb", "\u2028", "x" * 58, "é" * 29, "a+", "#", "a\u00a0b"],
)
def test_a_name_that_cannot_be_served_is_told_from_a_topic_that_is_not_subscribed(level: str) -> None:
    topic = f"site/depot7/{level}/josev/cs"
    assert DEPOT.of(topic) is None
    assert DEPOT.flaw(topic)
    assert station_flaw(f"depot7/{level}")


@pytest.mark.parametrize("level", ["..", ".", "%2e", "%", "v2g_certificate", "a.previous", "$a", "é" * 28, "a b", "'"])
def test_an_odd_name_is_served_and_makes_one_file_name_without_dots_and_slashes(level: str) -> None:
    assert DEPOT.of(f"site/depot7/{level}/josev/cs") == f"depot7/{level}"
    assert not {"/", ".", "\0"} & set(percent_encoded(f"depot7/{level}"))


def test_a_station_that_two_patterns_match_is_one_station() -> None:
    both = Stations("", ["depot7/+", "+/s1", "depot7/+"])
    assert both.filters == ("depot7/+/josev/cs", "+/s1/josev/cs")
    assert both.of("depot7/s1/josev/cs") == "depot7/s1"


@pytest.mark.parametrize("pattern", ["", "#", "a/#", "a//b", "/a", "a/", "a+", "$SYS/+", "\n", "x" * 65, "\ud800"])
def test_a_pattern_that_names_no_stations_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Stations("", [pattern])
    assert refused.value.reason == "stations_invalid"


@pytest.mark.parametrize("name", ["#", "a/+", "a//b", "$SYS", "x" * 65, "\ud800"])
def test_a_station_that_cannot_be_named_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        topics("", name)
    assert refused.value.reason == "station_invalid"


@pytest.mark.parametrize("topic", ["depot7/a/josev/cs", "depot7/a/cs/josev"])
def test_a_topic_of_a_station_is_no_topic_of_the_daemons(topic: str) -> None:
    assert availability("", topic) == renewal("", topic) == topic
    for of_ours in (availability, renewal):
        with pytest.raises(ConfigurationError):
            of_ours("", topic, site=True)


def test_draining_subscribes_to_nothing_and_knows_its_stations() -> None:
    draining = DEPOT.draining()
    assert (draining.filters, draining.of(requests_of("depot7/s1"))) == ((), "depot7/s1")
    assert DEPOT.filters


@given(st.text(max_size=30), st.lists(st.sampled_from(["+", "a", "a b", "é"]), min_size=1, max_size=3))
def test_a_topic_is_of_one_station_or_has_a_flaw_or_is_not_subscribed(text: str, pattern: list[str]) -> None:
    stations = Stations("p", ["/".join(pattern)])
    topic = f"p/{text}/josev/cs"
    station, flaw = stations.of(topic), stations.flaw(topic)
    levels = text.split("/")
    subscribed = len(levels) == len(pattern) and all(
        wanted in {"+", level} for wanted, level in zip(pattern, levels, strict=True)
    )
    assert (station is not None or flaw != "") is subscribed
    assert station is None or flaw == ""
    if station is not None:
        assert stations.request_topic(station) == topic
        assert topics("p", station) == (topic, stations.response_topic(station))


# One edge.


class Site(Service):
    """Notes statuses, rejections and what it passes over, each with its station."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []
        self.passed_over: list[str] = []
        self.refused: list[str] = []
        self.available = asyncio.Event()
        self.available.set()

    async def reject(self, request_id: str, error: StationKeyError, *, station: str = "") -> GenerateCsrResponse:
        await self._note(self.refused, f"{station} {error.reason}")
        return rejected(request_id)

    def pass_over(self, error: StationKeyError, *, station: str = "") -> None:
        self.passed_over.append(f"{station} {error.reason}".strip())

    async def note_status(
        self, status: CertificateInstallationStatus, *, station: str = "", retained: bool = False
    ) -> None:
        assert not retained
        await self._note(self.noted, f"{station} {status.id}")
        await self.available.wait()

    def of(self, station: str) -> list[str]:
        """The ids that a station asked with."""
        return [asked for asked, whose in zip(self.asked, self.stations, strict=True) if whose == station]


def status_payload(message_id: str) -> bytes:
    data = {"certificate_type": "v2g_certificate", "status": "installed"}
    named = {"id": message_id, "name": "certificate_installation_status", "type": "update", "data": data}
    return json.dumps(named).encode()


def ids(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


@asynccontextmanager
async def josev_of(mosquitto: Mosquitto, station: str) -> AsyncIterator[MqttConnection]:
    """The Josev of one station, subscribed to its answers."""
    async with await connect(at(mosquitto), client_id=f"josev-{uuid.uuid4().hex}", persistent=False) as connection:
        await connection.subscribe(DEPOT.response_topic(station))
        yield connection


async def test_each_station_is_answered_on_its_own_topic(mosquitto: Mosquitto) -> None:
    service, same = Site(), str(uuid.uuid4())
    async with (
        serving(at(mosquitto), service, stations=DEPOT),
        josev_of(mosquitto, "depot7/s1") as one,
        josev_of(mosquitto, "depot7/s2") as other,
    ):
        await one.publish(requests_of("depot7/s1"), payload(same))
        assert await answers(one, 1) == [same]
        await other.publish(requests_of("depot7/s2"), payload(same))
        assert await answers(other, 1) == [same]
        assert one.waiting == 0
    assert service.stations == ["depot7/s1", "depot7/s2"]


async def test_a_station_of_another_shard_is_acknowledged_and_not_answered(mosquitto: Mosquitto) -> None:
    service, asked = Site(), ids(2)
    only = DEPOT.of(requests_of("depot7/s2"))
    async with serving(at(mosquitto), service, stations=DEPOT, serves=lambda station: station == only) as edge:
        async with josev_of(mosquitto, "depot7/s2") as asking:
            await asking.publish(requests_of("depot7/s1"), payload(asked[0]))
            await asking.publish(requests_of("depot7/s2"), payload(asked[1]))
            assert await answers(asking, 1) == [asked[1]]
        assert service.asked == [asked[1]]
        await edge.end()
    async with serving(at(mosquitto), service, stations=DEPOT), josev_of(mosquitto, "depot7/s3") as asking:
        await asking.publish(requests_of("depot7/s3"), payload())
        await answers(asking, 1)
    assert "depot7/s1" not in service.stations  # it did not come again


async def test_a_hostile_name_is_counted_and_neither_answered_nor_unsubscribed(mosquitto: Mosquitto) -> None:
    service, asked = Site(), str(uuid.uuid4())
    hostile = ["x" * 58, "", "a\u202eb", "é" * 29]
    async with serving(at(mosquitto), service, stations=DEPOT), josev_of(mosquitto, "depot7/..") as asking:
        for name in hostile:
            await asking.publish(f"site/depot7/{name}/josev/cs", payload())
        await asking.publish(requests_of("depot7/.."), payload(asked))
        assert await answers(asking, 1) == [asked]
    assert service.passed_over == ["station_invalid"] * len(hostile)
    assert service.stations == ["depot7/.."]


async def test_filters_of_earlier_are_unsubscribed_from(mosquitto: Mosquitto) -> None:
    service, asked = Site(), str(uuid.uuid4())
    earlier = Stations("site", ["depot8/+"])
    async with serving(at(mosquitto), service, stations=earlier):
        pass
    running = serving(at(mosquitto), service, stations=DEPOT, stale=earlier.filters)
    async with running, josev_of(mosquitto, "depot7/s1") as asking:
        await asking.publish("site/depot8/s1/josev/cs", payload())
        await asking.publish(requests_of("depot7/s1"), payload(asked))
        assert await answers(asking, 1) == [asked]
    assert (service.asked, service.passed_over) == ([asked], [])


async def test_an_answer_of_earlier_goes_to_its_station(mosquitto: Mosquitto) -> None:
    service, earlier = Site(), str(uuid.uuid4())
    service.earlier = [("depot7/s1", rejected(earlier))]
    async with josev_of(mosquitto, "depot7/s1") as asking, serving(at(mosquitto), service, stations=DEPOT):
        assert await answers(asking, 1) == [earlier]


async def test_a_message_that_one_station_repeats_is_not_taken_for_that_of_another(mosquitto: Mosquitto) -> None:
    """The same payload on two topics, redelivered over a new connection: each is acknowledged for itself."""
    service, same = Site(), str(uuid.uuid4())
    service.gate.clear()
    async with serving(at(mosquitto), service, stations=DEPOT) as edge:
        async with josev_of(mosquitto, "depot7/s1") as asking:
            for station in ("depot7/s1", "depot7/s2"):
                await asking.publish(requests_of(station), payload(same))
            await service.until(lambda: len(service.asked) == 2)
        await asyncio.to_thread(mosquitto.restart)
        await edge.ready()
        async with josev_of(mosquitto, "depot7/s2") as asking:
            service.gate.set()
            assert await answers(asking, 1) == [same]
        await service.until(lambda: len(service.handed_over) == 2)
        await edge.end()
    assert len(service.asked) == 2
    async with serving(at(mosquitto), service, stations=DEPOT), josev_of(mosquitto, "depot7/s3") as asking:
        await asking.publish(requests_of("depot7/s3"), payload())
        await answers(asking, 1)
    assert len(service.asked) == 3


# One station's flood.


async def test_statuses_that_wait_for_a_key_store_leave_the_places_to_requests_and_stay_in_order(
    mosquitto: Mosquitto,
) -> None:
    service, told, asked = Site(), ids(12), str(uuid.uuid4())
    service.available.clear()
    async with serving(at(mosquitto), service, stations=DEPOT, queue=4), josev_of(mosquitto, "depot7/s2") as asking:
        for message_id in told:
            await asking.publish(requests_of("depot7/s1"), status_payload(message_id))
        await service.until(lambda: len(service.noted) == len(told))
        await asking.publish(requests_of("depot7/s2"), payload(asked))
        assert await answers(asking, 1) == [asked]
        service.available.set()
    assert service.noted == [f"depot7/s1 {message_id}" for message_id in told]


async def test_no_status_is_lost_if_the_room_is_full(mosquitto: Mosquitto) -> None:
    """Then nothing more is received until one is done: what the broker still has comes later, in order."""
    service, told = Site(), ids(40)
    service.available.clear()
    async with serving(at(mosquitto), service, stations=DEPOT, queue=2), josev_of(mosquitto, "depot7/s2") as asking:
        for message_id in told:
            await asking.publish(requests_of("depot7/s1"), status_payload(message_id))
        await service.until(lambda: len(service.noted) == 8)
        service.available.set()
        await service.until(lambda: len(service.noted) == len(told))
    assert service.noted == [f"depot7/s1 {message_id}" for message_id in told]


async def test_copies_of_one_station_take_few_places(mosquitto: Mosquitto) -> None:
    service, repeated, other = Site(), str(uuid.uuid4()), str(uuid.uuid4())
    service.gate.clear()
    async with serving(at(mosquitto), service, stations=DEPOT, queue=16), josev_of(mosquitto, "depot7/s2") as asking:
        for number in range(30):
            await asking.publish(requests_of("depot7/s1"), payload(repeated).ljust(300 + number))
        await asking.publish(requests_of("depot7/s2"), payload(other))
        await service.until(lambda: other in service.asked)
        service.gate.set()
        assert await answers(asking, 1) == [other]
    assert service.of("depot7/s1") == [repeated] * 2


async def test_rubbish_of_one_station_is_not_anothers(mosquitto: Mosquitto) -> None:
    service, asked = Site(), str(uuid.uuid4())
    wrong = json.dumps({"id": asked, "name": "generate_csr", "type": "request", "data": {}}).encode()
    async with serving(at(mosquitto), service, stations=DEPOT), josev_of(mosquitto, "depot7/s2") as asking:
        await asking.publish(requests_of("depot7/s1"), b"{")
        await asking.publish(requests_of("depot7/s2"), wrong)
        assert await answers(asking, 1) == [asked]
    assert [words.split()[0] for words in service.passed_over] == ["depot7/s1"]
    assert [words.split()[0] for words in service.refused] == ["depot7/s2"]
    assert not service.asked
