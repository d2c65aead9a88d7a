"""Two key stores of a station: each serves its own certificate types, and a key stays in the store that made it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from msgspec.structs import replace
from showing import Edge

from parts import E1, E2, STATION, V2G, V2G20, Station, request, station
from stationkey.config.settings import Bounds, PoolTerms, Terms
from stationkey.contract.profiles import Algorithm
from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore import KeyRef, KeyStoreUri
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.stores import KeyStores, Store
from stationkey.keystore.worker import KeyStoreThread, Turn
from stationkey.ledger.lifecycle import KeyState
from stationkey.observability.health import Health
from stationkey.observability.problems import problems
from stationkey.system.systemd import ServiceManager
from stationkey.x509.csr import PrivateKey, PublicKey

BOUND = 30.0
AWAY = KeyStoreError("gone", reason="tpm_unreachable", transient=True, scope=Scope.DEVICE)


class Chip(SoftwareKeyStore):
    """A store of another kind, which can be frozen or away."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.asked = threading.Event()
        self.fault: KeyStoreError | None = None

    def _work(self) -> None:
        self.asked.set()
        assert self.go_on.wait(BOUND)
        if self.fault is not None:
            raise self.fault

    def generate(self, algorithm: Algorithm) -> KeyRef:
        self._work()
        return replace(super().generate(algorithm), scheme="tpm2")

    @contextmanager
    def signer(self, key: KeyRef) -> Iterator[PrivateKey]:
        self._work()
        with super().signer(replace(key, scheme="software")) as private_key:
            yield private_key

    def public_key(self, key: KeyRef) -> PublicKey:
        return super().public_key(replace(key, scheme="software"))


@pytest.fixture
def chip() -> Iterator[Chip]:
    chip = Chip()
    yield chip
    chip.go_on.set()


def of_two(chip: Chip) -> KeyStores:
    """The chip makes all keys but those of V2G20."""
    return KeyStores(
        [
            Store("default", KeyStoreUri.parse("tpm2:chip"), frozenset({STATION, V2G}), KeyStoreThread(lambda: chip)),
            Store("se", KeyStoreUri.parse("software:"), frozenset({V2G20}), KeyStoreThread(SoftwareKeyStore)),
        ]
    )


@pytest.fixture
async def here(tmp_path: Path, chip: Chip) -> AsyncIterator[Station]:
    async with station(tmp_path / "state", keystore=of_two(chip)) as here:
        yield here
        chip.go_on.set()


async def test_each_type_gets_its_keys_from_its_own_store(here: Station) -> None:
    keys = {kind: await here.key(kind) for kind in (STATION, V2G, V2G20)}
    made = {kind: here.record(key).scheme for kind, key in keys.items()}
    assert made == {STATION: "tpm2", V2G: "tpm2", V2G20: "software"}


async def test_a_store_that_is_away_rejects_only_its_own_types_and_no_other_makes_their_keys(
    here: Station, chip: Chip
) -> None:
    chip.fault = AWAY
    answers = {kind: await here.service.answer(request(kind)) for kind in (STATION, V2G, V2G20)}
    assert {kind: answer.data.status for kind, answer in answers.items()} == {
        STATION: "rejected",
        V2G: "rejected",
        V2G20: "accepted",
    }
    assert here.counts == {"tpm_unreachable": 2, "accepted": 1}
    assert len(here.ledger.keys.all()) == 1


async def test_a_frozen_store_holds_up_no_request_status_or_expiry_of_the_other(here: Station, chip: Chip) -> None:
    held, gone = await here.key(V2G), await here.key(V2G20)
    chip.asked.clear()
    chip.go_on.clear()
    waiting = [asyncio.create_task(here.told("installed", V2G, private_key_path=f"/keys/{held}.pem")) for _ in range(2)]
    assert await asyncio.to_thread(chip.asked.wait, BOUND)
    asked = asyncio.create_task(here.service.answer(request(V2G)))

    key = await here.key(V2G20)
    await here.told("deleted", V2G20, private_key_path=f"/keys/{gone}.pem")
    await here.told("installed", V2G20, private_key_path=f"/keys/{key}.pem")

    assert here.states(held, gone, key) == [KeyState.PRE_ACTIVATION, KeyState.DESTROYED, KeyState.ACTIVE]
    assert not any(task.done() for task in (*waiting, asked))
    chip.go_on.set()
    await asyncio.gather(*waiting, asked)
    assert here.states(held) == [KeyState.ACTIVE]


async def test_a_frozen_store_takes_only_its_share_of_the_places_in_the_queue(here: Station, chip: Chip) -> None:
    frozen = next(iter(here.keystores)).thread
    chip.asked.clear()
    with mock.patch.object(KeyStoreThread, "hung", new_callable=mock.PropertyMock, side_effect=[True, True, False]):
        with mock.patch.object(type(frozen), "waiting", {Turn.SHORT: 31}):
            assert (await here.service.answer(request(V2G))).data.status == "accepted"
        chip.asked.clear()
        with mock.patch.object(type(frozen), "waiting", {Turn.SHORT: 32}):
            assert (await here.service.answer(request(V2G))).data.status == "rejected"
            assert not chip.asked.is_set()
            assert (await here.service.answer(request(V2G))).data.status == "accepted"  # busy, but not frozen
    assert here.counts == {"accepted": 2, "keystore_timeout": 1}


async def test_what_is_due_in_a_frozen_store_is_ended_after_what_is_due_in_the_other(here: Station, chip: Chip) -> None:
    held, other = await here.key(V2G), await here.key(V2G20)
    chip.asked.clear()
    chip.go_on.clear()
    installing = asyncio.create_task(here.told("installed", V2G))
    assert await asyncio.to_thread(chip.asked.wait, BOUND)
    sweeping = asyncio.create_task(here.pass_by(40 * 86_400_000))
    while here.states(other) != [KeyState.DESTROYED]:  # noqa: ASYNC110 - no event tells of it
        await asyncio.sleep(0.001)
    assert (here.states(held), sweeping.done()) == ([KeyState.PRE_ACTIVATION], False)
    chip.go_on.set()
    await asyncio.gather(installing, sweeping)
    assert here.states(held) == [KeyState.ACTIVE]


async def test_a_key_whose_store_is_no_longer_named_is_told_and_changed_by_no_guess(
    tmp_path: Path, chip: Chip, caplog: pytest.LogCaptureFixture
) -> None:
    async with station(tmp_path / "state", keystore=of_two(chip)) as before:
        keys = [await before.key(V2G), await before.key(V2G)]
    async with station(tmp_path / "state", keystore="software:") as here:
        with caplog.at_level(logging.WARNING):
            await here.service.expiry.tell_unusable()
        told = [vars(record) for record in caplog.records if vars(record).get("reason") == "keystore_unconfigured"]
        assert {one["key_id"] for one in told} == set(keys)
        health = Health(here.keystores, ServiceManager(), broker="", patience=BOUND)
        health.watch(here.service, Edge())
        assert [one.words[-1] for one in problems(health, None, ()) if "does not name" in one.words] == ["2"]

        await here.told("installed", V2G, private_key_path=f"/keys/{keys[0]}.pem")
        assert here.states(*keys) == [KeyState.PRE_ACTIVATION] * 2
        assert here.counts["keystore_unconfigured"] == 1
        await here.told("deleted", V2G, private_key_path=f"/keys/{keys[1]}.pem")
        assert here.states(*keys) == [KeyState.PRE_ACTIVATION, KeyState.DESTROYED]
        new = await here.key(V2G)
        assert here.record(new).scheme == "software"

    async with station(tmp_path / "state", keystore=of_two(chip)) as again:
        await again.told("installed", V2G, private_key_path=f"/keys/{keys[0]}.pem")
        assert again.states(keys[0]) == [KeyState.ACTIVE]


async def test_the_limits_hold_for_each_store(tmp_path: Path, chip: Chip) -> None:
    bounds = Bounds(pending_total=2, pending_in={"se": 1}, active_limit=1)
    async with station(tmp_path / "state", keystore=of_two(chip), terms=Terms(bounds=bounds)) as here:
        in_se = [await here.key(V2G20, evse_id) for evse_id in (E1, E2)]
        in_chip = [await here.key(kind, evse_id) for kind, evse_id in ((V2G, E1), (V2G, E2), (STATION, None))]
        gone, pending = KeyState.DESTROYED, KeyState.PRE_ACTIVATION
        assert here.states(*in_se, *in_chip) == [gone, pending, gone, pending, pending]

        for kind, key in ((V2G20, in_se[1]), (V2G, in_chip[1]), (STATION, in_chip[2])):
            await here.told("installed", kind, private_key_path=f"/keys/{key}.pem")
        assert here.states(in_se[1], *in_chip[1:]) == [KeyState.ACTIVE, KeyState.ACTIVE, pending]
        assert here.counts["too_many_active"] == 1


async def test_a_key_made_ahead_is_used_only_for_types_of_its_own_store(tmp_path: Path, chip: Chip) -> None:
    async with station(tmp_path / "state", keystore=of_two(chip)) as here:
        made = chip.generate(Algorithm.ECDSA_SHA512)
        here.ledger.transitions.make_ahead(made, now=0, due=10**12, seconds=0.1)
        for pool in here.service.pools.values():
            pool._terms = PoolTerms(ec=1, rsa=0)  # noqa: SLF001 - as configured
            await pool._begin()  # noqa: SLF001 - what its task does first
        assert {store.name: sum(pool.ready().values()) for store, pool in here.service.pools.items()} == {
            "default": 2,
            "se": 1,
        }
        assert here.record(await here.key(V2G20)).scheme == "software"
