"""The Josevs of many stations, for the demo, the tests and the bench."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

from asking import BOUND, Answer, Asking
from peers import Mosquitto

from stationkey.contract.messages import GenerateCsrRequest

_REQUESTS: Final = "/josev/cs"
_RESPONSES: Final = "/cs/josev"


class Asked(NamedTuple):
    """What a request is known by: ids of two stations may be the same."""

    station: str
    request_id: str


class Depot(Asking[Asked]):
    """Asks for many stations, which take turns where there is a load.

    Args:
        broker: whose clients the stations are.
        stations: their names.
        filters: topic filters of their answers, without the end.
    """

    def __init__(self, broker: Mosquitto, stations: Sequence[str], *, filters: Sequence[str] = ("depot7/+",)) -> None:
        super().__init__(broker, "depot", [each + _RESPONSES for each in filters])
        self._client.max_inflight_messages_set(0)
        self.stations = tuple(stations)
        self._turns = itertools.cycle(self.stations)

    def known_by(self, topic: str, request_id: str) -> Asked:
        """The station that the answer is for, and the id."""
        return Asked(topic.removesuffix(_RESPONSES), request_id)

    def repeat(self, asked: Asked) -> None:
        """Publish a request once more, as Josev would."""
        self.publish(asked.station, self.requests[asked])

    def ask_next(self) -> None:
        """Publish a request of the station whose turn it is."""
        self.publish(next(self._turns))

    def publish(self, station: str, request: GenerateCsrRequest | None = None) -> Asked:
        """Publish a request of a station; wait for nothing."""
        request = request or self.request()
        asked = Asked(station, request.id)
        self.send_request(asked, station + _REQUESTS, request)
        return asked

    def ask(self, station: str, request: GenerateCsrRequest | None = None, *, bound: float = BOUND) -> Answer:
        """Publish a request of a station, and wait for one more answer to it than there were."""
        request = request or self.request()
        return self.one_more(Asked(station, request.id), lambda: self.publish(station, request), bound=bound)

    def first_answer(self, stations: frozenset[str], since: float) -> float | None:
        """When the first answer to one of these stations came after a moment; None if none has yet."""
        with self._news:
            times = [
                each.at
                for asked, answers in self.answers.items()
                if asked.station in stations
                for each in answers
                if each.at > since
            ]
        return min(times, default=None)
