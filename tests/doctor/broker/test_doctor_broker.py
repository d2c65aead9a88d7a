"""What the doctor says of a broker, as tables."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from judging import FAILURE, NOT_CHECKED, OK, WARNING, judge, worst

from stationkey.doctor.broker.probe import Rights, Visit
from stationkey.doctor.config.certificates import judge_dates
from stationkey.doctor.report import Level, ok
from stationkey.errors import BrokerError
from stationkey.mqtt.url import Broker

BROKER, TLS = Broker("b", 1883), Broker("b", 8883, tls=True)


NAMED = Visit(named=True, own=Rights(asks=False, answers=True), subscribed=True, josev=True, single=0.001, pair=0.002)


class TestBroker:
    @pytest.mark.parametrize(
        ("changes", "reach", "name", "level"),
        [
            ({}, None, "broker.own_rights", OK),
            ({"mqtt5": False}, None, "broker.version", WARNING),
            ({"mqtt5": False}, None, "broker.publish", NOT_CHECKED),
            ({"maximum_qos": 0}, None, "broker.publish", WARNING),
            ({"own": Rights(asks=False, answers=False)}, None, "broker.publish", FAILURE),
            ({"own": Rights(asks=True, answers=True)}, None, "broker.own_rights", FAILURE),
            ({"named": False}, None, "broker.anonymous", WARNING),
            ({"named": False}, "every machine", "broker.anonymous", FAILURE),
            ({"anonymous": Rights(asks=True)}, None, "broker.anonymous", FAILURE),
            ({"anonymous": Rights(listens=True)}, None, "broker.anonymous", FAILURE),
            ({"anonymous": Rights(asks=False)}, None, "broker.anonymous", OK),
            ({"anonymous": Rights(asks=False)}, "every machine", "broker.anonymous", WARNING),
            ({"anonymous_why": "it is gone"}, None, "broker.anonymous", NOT_CHECKED),
            ({"subscribed": False}, None, "broker.subscribe", FAILURE),
            ({"subscribed": None, "cut": "gone"}, None, "broker.subscribe", FAILURE),
            ({"josev": False}, None, "broker.josev", WARNING),
            ({"josev": None}, None, "broker.josev", NOT_CHECKED),
            ({"retained": ("josev/cs",)}, None, "broker.retained", WARNING),
            ({"pair": 0.041}, None, "broker.delay", WARNING),
            ({"single": 0.2, "pair": 0.201}, None, "broker.delay", OK),
        ],
    )
    def test_what_was_seen_at_the_broker(
        self, changes: dict[str, Any], reach: str | None, name: str, level: Level
    ) -> None:
        seen = dataclasses.replace(NAMED, **changes)
        given = (seen, reach) if name in {"broker.own_rights", "broker.anonymous"} else (seen,)
        assert worst(judge(name, *given)) is level

    def test_somebody_who_is_let_in_where_we_are_not_is_told(self) -> None:
        refused = Visit(refused=BrokerError("no", reason="broker_refuses"), named=True, anonymous=Rights(asks=True))
        assert judge("broker.login", BROKER, refused, False)[0].stops
        assert worst(judge("broker.anonymous", refused, None)) is FAILURE
        assert worst(judge("broker.anonymous", dataclasses.replace(refused, anonymous=None), None)) is NOT_CHECKED

    @pytest.mark.parametrize(
        ("ends", "level"),
        [(timedelta(days=90), OK), (timedelta(days=10), WARNING)],
    )
    def test_the_end_of_the_broker_s_certificate(self, ends: timedelta, level: Level) -> None:
        now = datetime.now(UTC)
        text = (now + ends).strftime("%b %d %H:%M:%S %Y GMT")
        assert worst(judge("broker.tls", TLS, "TLSv1.3", text, None, now)) is level

    @pytest.mark.parametrize(
        ("begins", "ends", "level"),
        [(-10, 90, OK), (-10, 10, WARNING), (-10, -1, FAILURE), (1, 90, FAILURE)],
    )
    def test_the_time_of_a_certificate(self, begins: int, ends: int, level: Level) -> None:
        now = datetime.now(UTC)
        dates = now + timedelta(days=begins), now + timedelta(days=ends)
        assert worst([*judge_dates("it", *dates, now), ok("")]) is level
