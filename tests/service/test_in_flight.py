"""Requests in flight: one at a time for each id, and how many copies may wait."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from parts import new_id, request
from stationkey.errors import RequestRefused
from stationkey.service.in_flight import InFlight


async def test_the_second_with_an_id_waits_for_the_first() -> None:
    flights, asked = InFlight(), request()
    order = []

    async def second() -> None:
        async with flights.turn(request(request_id=asked.id.upper())):
            order.append("second")

    async with flights.turn(asked):
        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        order.append("first")
    await waiting

    assert order == ["first", "second"]


async def test_another_content_is_refused_while_the_first_is_in_flight_and_no_longer() -> None:
    flights, asked = InFlight(), request()
    other = request(request_id=asked.id, common_name="another")

    async with flights.turn(asked):
        with pytest.raises(RequestRefused) as refused:
            async with flights.turn(other):
                pass
        assert refused.value.reason == "id_reused"
    async with flights.turn(other):
        pass


async def test_copies_beyond_the_bound_are_surplus_whatever_id_they_have() -> None:
    flights, asked = InFlight(), [request(), request()]

    async def copy(number: int) -> None:
        async with flights.turn(asked[number]):
            pass

    async with AsyncExitStack() as stack:
        assert not flights.is_surplus(asked[0], most=1)  # not in flight
        for one in asked:
            await stack.enter_async_context(flights.turn(one))
        assert not flights.is_surplus(asked[0], most=1)
        waiting = asyncio.create_task(copy(0))
        await asyncio.sleep(0)
        assert [flights.is_surplus(one, most=1) for one in asked] == [True, True]
        assert not flights.is_surplus(asked[0], most=2)
        assert not flights.is_surplus(request(request_id=new_id()), most=1)
        assert not flights.is_surplus(request(request_id=asked[0].id, common_name="another"), most=1)
    await waiting

    assert not flights.is_surplus(asked[0], most=0)
