"""What the stations of a site share, and what one of them cannot take from the others."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from parts import STATION, V2G, request
from stationkey.config.settings import PolicyTerms
from stationkey.contract.profiles import Algorithm
from stationkey.errors import KeyStoreError, RequestRefused
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.stores import KeyStores, Store
from stationkey.keystore.worker import KeyStoreThread
from stationkey.service.in_flight import InFlight
from stationkey.service.policy import FEW_PLACES, Policy
from stationkey.service.rate_limit import Allowances
from stationkey.service.shares import EC_TURNS, Shares, Turns

RSA = Algorithm.RSA_SHA256


def taken(shares: Shares, held: ExitStack, station: str) -> int:
    """How many places a station gets if it takes all it can."""
    count = 0
    while shares.has_room(station):
        held.enter_context(shares.place(station))
        count += 1
    return count


# Places.


def test_a_station_that_takes_all_it_can_leaves_half_and_two_leave_a_third() -> None:
    shares = Shares(60, few=1)
    with ExitStack() as held:
        assert [taken(shares, held, name) for name in "abc"] == [30, 15, 8]
    shares = Shares(60, few=1)
    with ExitStack() as held:
        for _ in range(20):
            held.enter_context(shares.place("a"))
            held.enter_context(shares.place("b"))
        assert [shares.has_room(name) for name in "abc"] == [False, False, True]


def test_a_few_places_are_each_stations_however_many_others_hold() -> None:
    shares = Shares(8, few=2)
    with ExitStack() as held:
        assert [taken(shares, held, str(number)) for number in range(10)][-3:] == [2, 2, 2]


def test_places_are_given_back_and_no_name_is_kept() -> None:
    shares = Shares(4, few=1)
    with ExitStack() as held:
        taken(shares, held, "a")
    assert not shares._held  # noqa: SLF001 - whether it grows
    with pytest.raises(ZeroDivisionError), shares.place("a"):
        raise ZeroDivisionError
    assert not shares._held  # noqa: SLF001 - same


def test_a_single_station_has_all_places() -> None:
    shares = Shares(2, few=1)
    with ExitStack() as held:
        for _ in range(5):
            assert shares.has_room("")
            held.enter_context(shares.place(""))


# Requests.


def test_a_station_gets_no_more_places_than_its_share_and_spends_nothing_on_the_others() -> None:
    policy = Policy(PolicyTerms(queue=16, burst=12, requests_per_minute=1e-3, off_profile="off", secc_id="off"))
    with ExitStack() as held:
        for _ in range(8):
            held.enter_context(policy.admitted(request(STATION), "a"))
        for _ in range(20):
            with pytest.raises(RequestRefused) as refused, policy.admitted(request(STATION), "a"):
                pass
            assert (refused.value.reason, refused.value.transient) == ("station_places_taken", True)
        for _ in range(FEW_PLACES):
            held.enter_context(policy.admitted(request(STATION), "b"))
    for _ in range(4):
        with policy.admitted(request(STATION), "a"):
            pass
    with pytest.raises(RequestRefused) as refused, policy.admitted(request(STATION), "a"):
        pass
    assert refused.value.reason == "rate_limited"


def test_each_station_has_its_own_allowances_and_its_own_places_for_rsa() -> None:
    policy = Policy(PolicyTerms(queue=8, burst=2, requests_per_minute=1e-3, off_profile="off", secc_id="off"))
    with ExitStack() as held:
        for station in ("", "a", "b"):
            for _ in range(2):
                held.enter_context(policy.admitted(request(STATION, algorithm=RSA), station))
                policy.admit_status(V2G, station)
            for _ in range(3):
                with (
                    pytest.raises(RequestRefused) as refused,
                    policy.admitted(request(STATION, algorithm=RSA), station),
                ):
                    pass
                assert refused.value.reason == "rsa_places_taken"
                with pytest.raises(RequestRefused):
                    policy.admit_status(V2G, station)


def test_names_from_the_wire_make_no_table_grow_and_idle_ones_are_forgotten_first() -> None:
    allowances = Allowances(per_minute=1e-3, burst=3, most=100)
    for _ in range(3):
        assert allowances.take("flooding", 0)
    for number in range(10_000):
        assert allowances.take(number, 0)
    assert len(allowances) <= 100
    assert not allowances.take("flooding", 0)

    growing = Allowances(per_minute=60, burst=3, most=100)
    for number in range(100):
        growing.take(number, 0)
    growing.take("later", 10**12)
    assert len(growing) == 1


async def test_copies_of_one_station_are_not_anothers() -> None:
    flights, asked = InFlight(), request()

    async def copy() -> None:
        async with flights.turn(asked, station="a"):
            pass

    async with flights.turn(asked, station="a"):
        waiting = asyncio.create_task(copy())
        await asyncio.sleep(0)
        assert flights.is_surplus(asked, most=1, station="a")
        assert not flights.is_surplus(asked, most=1, station="b")
        async with flights.turn(asked, station="b"):
            assert not flights.is_surplus(asked, most=1, station="b")
        other = request(request_id=asked.id, common_name="another")
        assert flights.is_contested(other, station="a")
        assert not flights.is_contested(other, station="b")
    await waiting


# Turns at a key store.


@pytest.fixture
def store() -> Store:
    [store] = KeyStores.only("software:", KeyStoreThread(SoftwareKeyStore))
    return store


async def test_a_station_has_few_turns_and_others_have_theirs(store: Store) -> None:
    turns, forever = Turns(), asyncio.get_running_loop().time() + 60
    order: list[str] = []
    gate = asyncio.Event()

    async def use(station: str, *, rsa: bool = False) -> None:
        async with turns.turn(station, store, rsa=rsa, until=forever):
            order.append(station + "R" * rsa)
            await gate.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(use("a"))
            group.create_task(use("a", rsa=True))
        group.create_task(use("b"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert sorted(order) == sorted(["a"] * EC_TURNS + ["aR", "b"])
        assert turns.wanted(store) == 21
        gate.set()
    assert turns.wanted(store) == 0
    assert not turns._turns  # noqa: SLF001 - whether it grows


async def test_a_turn_that_does_not_come_by_the_deadline_ends_as_the_key_store_would(store: Store) -> None:
    turns, now = Turns(), asyncio.get_running_loop().time()
    async with turns.turn("a", store, rsa=True, until=now + 60):
        with pytest.raises(KeyStoreError) as late:
            async with turns.turn("a", store, rsa=True, until=now):
                pass
    assert late.value.reason == "keystore_timeout"
    assert turns.wanted(store) == 0
