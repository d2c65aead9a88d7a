"""The thread that owns the key store: one job at a time, and a call that never returns stops nobody else.

The rules are shown with jobs that wait for an event of the test; that they hold for a TPM, with a real one that is
frozen in mid-command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from typing import NoReturn

import pytest
from store_threads import DEADLINE, LONG, Clock, Stores, Stuck, name, nothing, returned, workers

from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore import KeyStore
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.worker import MAX_ABANDONED, KeyStoreThread, Outcome, Task

pytest_plugins = ["store_threads"]
pytestmark = pytest.mark.usefixtures("no_thread_stays")


def settled(thread: KeyStoreThread) -> None:
    """Wait until the last job is counted: whoever waits for its result is told before."""
    while thread.busy:
        threading.Event().wait(0.001)


def hang(thread: KeyStoreThread, job: Stuck, clock: Clock) -> Future[str]:
    """Have a job stuck past its deadline."""
    future = thread.submit(job, timeout=DEADLINE)
    assert job.begun.wait(LONG)
    clock.now += DEADLINE
    at_the_deadline = thread.hung
    clock.now += 1
    assert (at_the_deadline, thread.hung) == (False, True)
    return future


def test_jobs_run_one_after_the_other_on_one_thread_and_one_store(thread: KeyStoreThread, stores: Stores) -> None:
    order: list[int] = []
    running = threading.Lock()

    def job(number: int) -> Callable[[KeyStore], tuple[str, int]]:
        def run(store: KeyStore) -> tuple[str, int]:
            assert running.acquire(blocking=False), "two jobs at a time"
            order.append(number)
            running.release()
            return name(store), id(store)

        return run

    results = {future.result(LONG) for future in [thread.submit(job(number), timeout=LONG) for number in range(50)]}
    assert order == list(range(50))
    assert len(results) == 1
    assert stores.opened == ["keystore-1"]


def test_the_store_is_not_opened_before_the_first_job(thread: KeyStoreThread, stores: Stores) -> None:
    assert stores.opened == []
    thread.submit(nothing, timeout=LONG).result(LONG)
    assert stores.opened == ["keystore-1"]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(KeyStoreError("gone", reason="tpm_unreachable"), id="of-the-store"),
        pytest.param(ValueError("a fault of ours"), id="of-ours"),
        pytest.param(SystemExit(1), id="that-ends-a-program"),
    ],
)
def test_an_error_reaches_the_one_who_waits_and_the_thread_goes_on(
    thread: KeyStoreThread, stores: Stores, error: BaseException
) -> None:
    def fail(_: KeyStore) -> NoReturn:
        raise error

    with pytest.raises(type(error)) as caught:
        thread.submit(fail, timeout=LONG).result(LONG)
    assert caught.value is error
    assert thread.submit(name, timeout=LONG).result(LONG) == "keystore-1"
    assert stores.opened == ["keystore-1"]


def test_a_store_that_cannot_unload_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(SoftwareKeyStore):
        def unload(self) -> None:
            raise ZeroDivisionError

    with closing(KeyStoreThread(Faulty)) as thread:
        assert [thread.submit(name, timeout=LONG).result(LONG) for _ in range(2)] == ["keystore-1"] * 2
    assert len(caplog.records) == 2


def test_a_store_that_could_not_be_opened_is_tried_again_by_the_next_job() -> None:
    tries: list[int] = []

    def open_store() -> KeyStore:
        tries.append(1)
        if len(tries) == 1:
            raise KeyStoreError("not yet", reason="tpm_unreachable")
        return SoftwareKeyStore()

    with closing(KeyStoreThread(open_store)) as thread:
        with pytest.raises(KeyStoreError) as caught:
            thread.submit(nothing, timeout=LONG).result(LONG)
        assert caught.value.reason == "tpm_unreachable"
        assert thread.submit(name, timeout=LONG).result(LONG) == "keystore-1"


def test_a_job_whose_deadline_has_passed_is_not_begun(thread: KeyStoreThread) -> None:
    begun = threading.Event()
    with pytest.raises(KeyStoreError) as caught:
        thread.submit(lambda _: begun.set(), timeout=0).result(LONG)
    assert caught.value.reason == "keystore_timeout"
    assert not begun.is_set()
    assert thread.submit(name, timeout=LONG).result(LONG) == "keystore-1"


def test_a_job_that_nobody_waits_for_any_more_is_not_begun(thread: KeyStoreThread, stuck: Callable[[], Stuck]) -> None:
    first, begun = stuck(), threading.Event()
    running = thread.submit(first, timeout=LONG)
    assert first.begun.wait(LONG)
    given_up = thread.submit(lambda _: begun.set(), timeout=LONG)
    assert given_up.cancel()
    first.let_go.set()
    assert running.result(LONG) == "late"
    thread.submit(nothing, timeout=LONG).result(LONG)
    assert not begun.is_set()


def test_a_job_that_is_slow_within_its_deadline_keeps_its_thread(
    thread: KeyStoreThread, stuck: Callable[[], Stuck]
) -> None:
    slow = stuck()
    first = thread.submit(slow, timeout=LONG)
    assert slow.begun.wait(LONG)
    second = thread.submit(name, timeout=LONG)
    assert not thread.hung
    slow.let_go.set()
    assert first.result(LONG) == "late"
    assert second.result(LONG) == "keystore-1"


def test_the_job_after_one_that_hangs_gets_a_thread_and_a_store_of_its_own(
    thread: KeyStoreThread, stores: Stores, stuck: Callable[[], Stuck], clock: Clock
) -> None:
    hang(thread, stuck(), clock)
    assert thread.submit(name, timeout=LONG).result(LONG) == "keystore-2"
    assert not thread.hung
    assert stores.opened == ["keystore-1", "keystore-2"]
    assert stores.abandoned == ["keystore-1"]  # told while its call is still out


def test_a_store_whose_opening_hangs_is_never_used(clock: Clock, stuck: Callable[[], Stuck]) -> None:
    opening, used = stuck(), threading.Event()
    stores: list[KeyStore] = [SoftwareKeyStore(), SoftwareKeyStore()]

    def open_store() -> KeyStore:
        store = stores.pop()
        if stores:
            opening(store)
        return store

    with closing(KeyStoreThread(open_store, clock=clock)) as thread:
        late = thread.submit(lambda _: used.set(), timeout=DEADLINE)
        assert opening.begun.wait(LONG)
        clock.now += DEADLINE + 1
        assert thread.submit(name, timeout=DEADLINE).result(LONG) == "keystore-2"
        opening.let_go.set()
        with pytest.raises(KeyStoreError) as caught:
            late.result(LONG)
    assert caught.value.reason == "keystore_timeout"
    assert not used.is_set()


def test_the_jobs_that_waited_behind_one_that_hangs_are_taken_over(
    thread: KeyStoreThread, stuck: Callable[[], Stuck], clock: Clock
) -> None:
    job = stuck()
    thread.submit(job, timeout=DEADLINE)
    assert job.begun.wait(LONG)
    waiting = thread.submit(name, timeout=LONG)
    clock.now += DEADLINE + 1
    assert not waiting.running()
    assert thread.submit(name, timeout=LONG).result(LONG) == "keystore-2"
    assert waiting.result(LONG) == "keystore-2"


def test_a_thread_that_was_given_up_closes_its_store_as_soon_as_its_call_returns(
    thread: KeyStoreThread, stores: Stores, stuck: Callable[[], Stuck], clock: Clock
) -> None:
    """The connection to a TPM that serves one at a time is free again then."""
    job = stuck()
    late = hang(thread, job, clock)
    thread.submit(nothing, timeout=LONG).result(LONG)
    job.let_go.set()
    returned(thread)
    assert stores.closed == ["keystore-1"]
    assert late.result(LONG) == "late"
    assert thread.submit(name, timeout=LONG).result(LONG) == "keystore-2"


def test_a_thread_whose_call_returned_late_but_before_it_was_missed_goes_on(
    thread: KeyStoreThread, stores: Stores, stuck: Callable[[], Stuck], clock: Clock
) -> None:
    job = stuck()
    late = hang(thread, job, clock)
    job.let_go.set()
    late.result(LONG)
    assert thread.submit(name, timeout=LONG).result(LONG) in {"keystore-1", "keystore-2"}
    assert thread.submit(name, timeout=LONG).result(LONG) == stores.opened[-1]


def test_however_many_calls_hang_there_is_one_thread_more_at_most(
    thread: KeyStoreThread, stuck: Callable[[], Stuck], clock: Clock
) -> None:
    """Each holds a connection to the TPM, and a device that is hung hangs for all."""
    one, other = stuck(), stuck()
    hang(thread, one, clock)
    hang(thread, other, clock)
    waiting = [thread.submit(name, timeout=LONG) for _ in range(10)]
    assert len(workers()) == MAX_ABANDONED + 1 == 2
    other.let_go.set()
    assert {future.result(LONG) for future in waiting} == {"keystore-2"}


def test_no_more_jobs_wait_behind_one_that_hangs_than_there_may_be(
    thread: KeyStoreThread, stuck: Callable[[], Stuck], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationkey.keystore.worker.MAX_JOBS", 3)
    hangs = stuck()
    held = thread.submit(hangs, timeout=LONG)
    assert hangs.begun.wait(LONG)
    waiting = [thread.submit(lambda _: "done", timeout=LONG) for _ in range(3)]

    with pytest.raises(KeyStoreError) as refused:
        thread.submit(lambda _: "one too many", timeout=LONG).result(0)
    assert refused.value.reason == "keystore_timeout"

    hangs.let_go.set()
    assert [job.result(LONG) for job in waiting] == ["done"] * 3
    assert held.result(LONG) == "late"


def test_a_call_that_does_not_return_within_the_whole_time_of_its_job_is_stuck(
    thread: KeyStoreThread, clock: Clock, stuck: Callable[[], Stuck]
) -> None:
    job = stuck()
    future = thread.submit(job, timeout=DEADLINE)
    assert job.begun.wait(LONG)
    clock.now += DEADLINE
    within = thread.stuck
    clock.now += 1
    assert (within, thread.stuck) == (False, True)
    job.let_go.set()
    future.result(LONG)
    thread.submit(nothing, timeout=DEADLINE).result(LONG)
    assert not thread.stuck


def test_a_job_that_had_to_wait_is_overdue_when_its_time_is_over_and_not_stuck(
    thread: KeyStoreThread, clock: Clock, stuck: Callable[[], Stuck]
) -> None:
    """A queue of RSA requests before a slow chip: each is overdue as soon as it begins, and each of them ends."""
    first, second = stuck(), stuck()
    thread.submit(first, timeout=DEADLINE)
    assert first.begun.wait(LONG)
    thread.submit(second, timeout=DEADLINE)
    clock.now += DEADLINE - 1
    first.let_go.set()
    assert second.begun.wait(LONG)
    clock.now += 2
    assert (thread.hung, thread.stuck) == (True, False)
    clock.now += DEADLINE
    assert thread.stuck


def test_a_thread_that_was_given_up_is_stuck_until_its_call_returns(
    thread: KeyStoreThread, clock: Clock, stuck: Callable[[], Stuck]
) -> None:
    job = stuck()
    hang(thread, job, clock)
    assert thread.submit(name, timeout=DEADLINE).result(LONG) == "keystore-2"
    assert (thread.hung, thread.stuck, thread.abandoned) == (False, True, 1)
    job.let_go.set()
    returned(thread)
    assert (thread.stuck, thread.abandoned) == (False, 0)


def test_the_time_that_jobs_had_the_store_is_counted_by_their_task_without_their_wait(
    thread: KeyStoreThread, clock: Clock
) -> None:
    def work(_: KeyStore) -> None:
        clock.now += 2.0

    for task in (Task.PROOF, Task.PROOF, Task.LOAD):
        thread.submit(work, timeout=LONG, task=task)
    thread.submit(nothing, timeout=LONG).result(LONG)
    settled(thread)
    counted = {task: (cumulative[-1], total) for task, (cumulative, total) in thread.durations().items()}
    assert counted == {"proof": (2, 4.0), "load": (1, 2.0), "other": (1, 0.0)}


def test_how_the_last_job_ended_is_remembered(thread: KeyStoreThread, clock: Clock) -> None:
    def fail(_: KeyStore) -> NoReturn:
        raise KeyStoreError("gone", reason="tpm_unreachable", scope=Scope.DEVICE)

    assert thread.last is None
    failed = thread.submit(fail, timeout=DEADLINE)
    with pytest.raises(KeyStoreError):
        failed.result(LONG)
    settled(thread)
    clock.now += 3
    assert thread.last == (3.0, Outcome("tpm_unreachable", Scope.DEVICE))


def test_a_thread_whose_call_has_returned_takes_over_from_the_next_that_hangs(
    thread: KeyStoreThread, stores: Stores, stuck: Callable[[], Stuck], clock: Clock
) -> None:
    names = ["keystore-2", "keystore-1", "keystore-2"]
    for expected in names:
        job = stuck()
        hang(thread, job, clock)
        assert thread.submit(name, timeout=LONG).result(LONG) == expected
        job.let_go.set()
        returned(thread)
    assert stores.opened == ["keystore-1", *names]


def test_no_thread_is_started_after_the_beginning(
    thread: KeyStoreThread, stuck: Callable[[], Stuck], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TasksMax= of systemd, ulimit -u or no memory, none may be had then; or its start may never return."""

    def no_room(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    hang(thread, stuck(), clock)
    assert thread.submit(name, timeout=LONG).result(LONG) == "keystore-2"


def test_close_waits_for_the_jobs_in_the_queue_and_closes_the_store_in_its_own_thread(stores: Stores) -> None:
    thread = KeyStoreThread(stores)
    jobs = [thread.submit(name, timeout=LONG) for _ in range(20)]
    assert thread.close(LONG)
    assert all(job.done() for job in jobs)
    assert stores.opened == stores.closed == ["keystore-1"]


def test_close_of_a_thread_that_had_no_job_opens_nothing(stores: Stores) -> None:
    assert KeyStoreThread(stores).close(LONG)
    assert stores.opened == stores.closed == []


def test_a_job_that_hangs_for_ever_does_not_keep_close_from_returning(
    stores: Stores, stuck: Callable[[], Stuck], clock: Clock
) -> None:
    thread = KeyStoreThread(stores, clock=clock)
    hang(thread, stuck(), clock)
    assert not thread.close(0)
    assert all(worker.daemon for worker in workers())  # so the process can end as well
