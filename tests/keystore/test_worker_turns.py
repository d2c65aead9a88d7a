"""A frozen TPM behind the thread of a key store, and whose turn it is there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing

import pytest
from peers import Swtpm
from store_threads import DEADLINE, LONG, Clock, Order, Stuck, nothing, returned, workers

from stationkey.contract.profiles import Algorithm
from stationkey.errors import KeyStoreError
from stationkey.keystore import KeyRef, KeyStore
from stationkey.keystore.tpm2.store import Tpm2KeyStore
from stationkey.keystore.worker import FAIR_SHARE, KeyStoreThread, Turn

pytest_plugins = ["store_threads"]
pytestmark = pytest.mark.usefixtures("no_thread_stays")


# With a real TPM.


def make_and_sign(store: KeyStore) -> KeyRef:
    key = store.generate(Algorithm.ECDSA_SHA256)
    with store.signer(key):
        return key


class Asked:
    """A job that tells that it was begun, just before it asks the TPM for a key."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __call__(self, store: KeyStore) -> KeyRef:
        self.begun.set()
        return make_and_sign(store)


@pytest.fixture
def tpm_thread(swtpm: Swtpm, clock: Clock) -> Iterator[KeyStoreThread]:
    with closing(KeyStoreThread(lambda: Tpm2KeyStore(swtpm.tcti), clock=clock)) as thread:
        yield thread


def ask_in_vain(thread: KeyStoreThread, clock: Clock) -> Future[KeyRef]:
    """Ask a frozen TPM for a key, past the deadline."""
    job = Asked()
    future = thread.submit(job, timeout=DEADLINE)
    assert job.begun.wait(LONG)
    clock.now += DEADLINE + 1
    return future


def test_a_frozen_tpm_costs_the_requests_of_that_time_and_no_later_one(
    swtpm: Swtpm, tpm_thread: KeyStoreThread, clock: Clock
) -> None:
    """The commands sent to it are answered when it is thawed, and nobody waits for them any more."""
    key = tpm_thread.submit(make_and_sign, timeout=DEADLINE).result(LONG)
    tpm_thread.submit(nothing, timeout=DEADLINE).result(LONG)  # so that the key is unloaded
    swtpm.freeze()
    hung = [ask_in_vain(tpm_thread, clock), ask_in_vain(tpm_thread, clock)]
    queued = [tpm_thread.submit(make_and_sign, timeout=DEADLINE) for _ in range(3)]
    clock.now += DEADLINE
    assert {worker.name for worker in workers()} == {"keystore-1", "keystore-2"}
    assert not any(future.done() for future in [*hung, *queued])

    swtpm.thaw()
    assert tpm_thread.submit(make_and_sign, timeout=DEADLINE).result(LONG).key_id != key.key_id
    returned(tpm_thread)
    for future in queued:
        with pytest.raises(KeyStoreError) as caught:
            future.result(LONG)
        assert caught.value.reason == "keystore_timeout"
    assert tpm_thread.abandoned == 0


def test_a_tpm_that_loses_power_while_it_is_frozen_is_used_again_once_it_is_back(
    swtpm: Swtpm, tpm_thread: KeyStoreThread, clock: Clock
) -> None:
    tpm_thread.submit(make_and_sign, timeout=DEADLINE).result(LONG)
    tpm_thread.submit(nothing, timeout=DEADLINE).result(LONG)  # so that the key is unloaded
    swtpm.freeze()
    hung = ask_in_vain(tpm_thread, clock)
    swtpm.kill()
    with pytest.raises(KeyStoreError) as caught:
        hung.result(LONG)
    assert caught.value.reason == "tpm_unreachable"
    swtpm.start()
    tpm_thread.submit(make_and_sign, timeout=DEADLINE).result(LONG)


def test_a_frozen_tpm_does_not_keep_close_from_returning(
    swtpm: Swtpm, tpm_thread: KeyStoreThread, clock: Clock
) -> None:
    tpm_thread.submit(make_and_sign, timeout=DEADLINE).result(LONG)
    tpm_thread.submit(nothing, timeout=DEADLINE).result(LONG)  # so that the key is unloaded
    swtpm.freeze()
    hung = ask_in_vain(tpm_thread, clock)
    assert not tpm_thread.close(0)
    swtpm.thaw()
    hung.result(LONG)


def test_short_jobs_go_before_long_ones_and_both_before_what_nobody_waits_for(order: Order) -> None:
    for name, turn in [("spare", Turn.SPARE), ("long", Turn.LONG), ("short", Turn.SHORT), ("short 2", Turn.SHORT)]:
        order.submit(name, turn)
    assert order.run() == ["short", "short 2", "long", "spare"]


def test_jobs_of_one_turn_keep_their_order(order: Order) -> None:
    for number in range(5):
        order.submit(f"long {number}", Turn.LONG)
        order.submit(f"spare {number}", Turn.SPARE)
    assert order.run() == [f"long {number}" for number in range(5)] + [f"spare {number}" for number in range(5)]


def test_a_flood_of_short_jobs_lets_a_long_one_through_now_and_then(order: Order) -> None:
    """Between two long ones are `FAIR_SHARE` short ones: none of those waits for more than one."""
    for number in range(2):
        order.submit(f"long {number}", Turn.LONG)
    for _ in range(3 * FAIR_SHARE):
        order.submit("short", Turn.SHORT)
    done = order.run()
    # The one that is stuck was short, too.
    assert [index for index, name in enumerate(done) if name != "short"] == [FAIR_SHARE - 1, 2 * FAIR_SHARE]


def test_a_flood_keeps_out_for_good_what_nobody_waits_for(order: Order) -> None:
    order.submit("spare", Turn.SPARE)
    for _ in range(3 * FAIR_SHARE):
        order.submit("short", Turn.SHORT)
    assert order.run()[-1] == "spare"


def test_a_long_job_that_nobody_waits_for_any_more_takes_no_turn(order: Order) -> None:
    given_up = order.submit("given up", Turn.LONG)
    order.submit("short", Turn.SHORT)
    assert given_up.cancel()
    assert order.run() == ["short"]


def test_the_store_is_idle_since_the_last_job_that_somebody_waited_for(
    thread: KeyStoreThread, clock: Clock, stuck: Callable[[], Stuck]
) -> None:
    clock.now = 10.0
    assert thread.idle == 10.0
    running = stuck()
    future = thread.submit(running, timeout=LONG)
    clock.now = 20.0
    assert thread.idle == 0.0
    running.let_go.set()
    future.result(LONG)
    thread.submit(nothing, timeout=LONG, turn=Turn.SPARE).result(LONG)
    clock.now = 25.0
    assert thread.idle == 5.0
    given_up = thread.submit(nothing, timeout=0.0)
    with pytest.raises(KeyStoreError):
        given_up.result(LONG)
    assert thread.idle == 0.0
