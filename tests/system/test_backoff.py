"""The delays between tries: they grow, and not beyond their limit."""

from __future__ import annotations

import pytest

from stationkey.system.backoff import Backoff


def test_each_delay_is_longer_up_to_the_limit() -> None:
    backoff = Backoff(1.0, 10.0)
    assert [backoff.next() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.next() == 1
    assert backoff.delay == 2


def test_a_delay_can_be_lowered_and_is_not_raised_by_it() -> None:
    backoff = Backoff(1.0, 10.0)
    backoff.lower(5.0)
    assert backoff.next() == 1
    for _ in range(3):
        backoff.next()
    backoff.lower(1.5)
    assert backoff.next() == 1.5


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_jitter_shortens_by_a_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr("stationkey.system.backoff.random.uniform", lambda low, high: low + share * (high - low))
    backoff = Backoff(1.0, 4.0, jitter=0.5)
    assert [backoff.next() for _ in range(4)] == [delay * (0.5 + share / 2) for delay in (1, 2, 4, 4)]
