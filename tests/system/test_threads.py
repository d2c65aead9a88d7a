"""Threads for calls that may hang: in order, bounded, and none started by the caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from stationkey.system.threads import Worker, Workers

LONG = 30.0
"""Seconds that nothing here takes, unless it never happens."""


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Hanging:
    """A call that is begun and does not return until it is let go."""

    def __init__(self, let_go: threading.Event) -> None:
        self.begun = threading.Event()
        self._let_go = let_go

    def __call__(self) -> str:
        self.begun.set()
        assert self._let_go.wait(LONG)
        return threading.current_thread().name


@pytest.fixture
def let_go() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(clock: Clock, let_go: threading.Event) -> Iterator[Worker]:
    with closing(Worker("worker", clock=clock)) as worker:
        yield worker
        let_go.set()


def test_calls_run_in_order_on_the_one_thread(worker: Worker) -> None:
    order: list[int] = []
    for number in range(10):
        worker.put(lambda number=number: order.append(number))  # type: ignore[misc] # the default binds it
    assert worker.submit(lambda: threading.current_thread().name).result(LONG) == "worker"
    assert order == list(range(10))


def test_an_error_reaches_the_one_who_waits_and_the_thread_goes_on(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result(LONG)
    worker.put(threading.Lock().release)  # which nobody holds
    assert worker.submit(lambda: "on").result(LONG) == "on"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError]


def test_it_knows_since_when_the_call_in_hand_runs(worker: Worker, clock: Clock, let_go: threading.Event) -> None:
    assert (worker.idle, worker.running_for) == (True, 0.0)
    hanging = Hanging(let_go)
    future = worker.submit(hanging)
    assert hanging.begun.wait(LONG)
    clock.now += 3.0
    assert (worker.idle, worker.running_for) == (False, 3.0)
    let_go.set()
    future.result(LONG)
    assert worker.close(LONG)
    assert (worker.idle, worker.running_for) == (True, 0.0)


def test_a_call_that_hangs_does_not_keep_close_from_returning(worker: Worker, let_go: threading.Event) -> None:
    hanging = Hanging(let_go)
    worker.submit(hanging)
    assert hanging.begun.wait(LONG)
    assert not worker.close(0.01)


def test_a_call_that_nobody_waits_for_any_more_is_made(worker: Worker, let_go: threading.Event) -> None:
    worker.submit(Hanging(let_go))
    waiting = worker.submit(lambda: "made")
    assert not waiting.cancel()
    let_go.set()
    assert waiting.result(LONG) == "made"


def test_each_call_that_hangs_costs_one_of_a_bounded_number(let_go: threading.Event) -> None:
    workers = Workers("team", 3)
    futures = []
    for _ in range(3):
        hanging = Hanging(let_go)
        futures.append(workers.submit(hanging))
        assert hanging.begun.wait(LONG)
    with pytest.raises(RuntimeError):
        workers.submit(lambda: None)
    let_go.set()
    assert [future.result(LONG) for future in futures] == ["team-1", "team-2", "team-3"]
    workers.close()


def test_the_caller_starts_no_thread(monkeypatch: pytest.MonkeyPatch, let_go: threading.Event) -> None:
    """It may be the event loop, and a start may never return."""
    workers, start, starters = Workers("team", 2), threading.Thread.start, []

    def noted(thread: threading.Thread) -> None:
        starters.append(threading.current_thread().name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    hanging = Hanging(let_go)
    workers.submit(hanging)
    assert hanging.begun.wait(LONG)
    assert workers.submit(lambda: threading.current_thread().name).result(LONG) == "team-2"
    assert starters == ["team-1"]
    let_go.set()
    workers.close()


def test_where_there_is_no_room_for_another_the_first_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with TasksMax= of systemd, or ulimit -u."""

    def no_room(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers("team", 2)
    monkeypatch.setattr(threading.Thread, "start", no_room)
    assert workers.submit(lambda: threading.current_thread().name).result(LONG) == "team-1"
    assert len(caplog.records) == 1
    workers.close()
