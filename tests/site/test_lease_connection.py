"""PostgreSQL says who has which shard: by locks that end with a connection, and by epochs that only go up."""

from __future__ import annotations

import pytest
from asker import until
from leases import LEASE, Daemons, daemons, database, own_postgresql, restarting, session_postgresql

from stationkey.errors import LedgerError
from stationkey.site.connection import Session, Taken, shard_connection
from stationkey.site.lease import Lease

__all__ = ["daemons", "database", "own_postgresql", "restarting", "session_postgresql"]


def test_a_daemon_sees_itself_and_free_shards(daemons: Daemons) -> None:
    daemon = daemons.open()

    view = daemon.beat("")

    assert (view.loads, view.held, view.free) == ({daemon.me: 0}, frozenset(), frozenset(range(4)))
    assert not view.others
    assert not view.old


def test_a_shard_is_taken_by_one(daemons: Daemons) -> None:
    one, other = daemons.open(), daemons.open()

    assert one.take(2) == Taken(2, epoch=1, stale=())
    assert other.take(2) is None
    assert other.beat("").loads == {one.me: 1, other.me: 0}
    assert other.beat("").free == {0, 1, 3}


def test_a_released_shard_gets_the_next_epoch(daemons: Daemons) -> None:
    one, other = daemons.open(), daemons.open()
    one.take(2)

    one.release(2)

    assert other.take(2) == Taken(2, epoch=2, stale=())


def test_a_dead_daemon_is_not_among_the_living(daemons: Daemons) -> None:
    one, other = daemons.open(), daemons.open()
    one.take(2)

    one.hang_up()

    while (view := other.beat("")).free != set(range(4)):
        pass
    assert view.loads == {other.me: 0}


def test_a_daemon_that_ends_is_no_longer_counted_while_it_drains(daemons: Daemons) -> None:
    one, other = daemons.open(), daemons.open()
    one.take(2)

    one.retire()

    view = other.beat("")
    assert view.loads == {other.me: 0}
    assert view.free == {0, 1, 3}


def test_shards_are_kept_over_a_new_connection(daemons: Daemons) -> None:
    """The old connection may be half open: its locks are ended with it."""
    cut = daemons.cut()
    one = daemons.open(cut, instance="a" * 16)
    one.take(2)

    again = daemons.open(cut, instance="a" * 16)

    assert again.resume({2: 1}) == frozenset()
    assert again.beat("").held == {2}
    assert daemons.epochs()[2] == 1


def test_shards_that_another_has_had_meanwhile_are_lost(daemons: Daemons) -> None:
    one, other = daemons.open(instance="a" * 16), daemons.open()
    one.take(1)
    one.take(2)
    one.close()
    while (taken := other.take(2)) is None:
        pass
    other.release(2)

    again = daemons.open(instance="a" * 16)

    assert taken.epoch == 2
    assert again.resume({1: 1, 2: 1}) == {2}
    assert again.beat("").held == {1}


def test_a_silent_daemon_loses_its_lease_by_the_server(daemons: Daemons) -> None:
    one, other = daemons.open(), daemons.open()
    one.take(2)

    while 2 not in other.beat("").free:
        pass

    assert other.take(2) == Taken(2, epoch=2, stale=())
    with pytest.raises(LedgerError) as refused:
        one.beat("")
    assert refused.value.reason == "ledger_unreachable"
    assert one.lost


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_transaction_that_the_last_holder_was_stopped_in_is_ended(daemons: Daemons, *, pipeline: bool) -> None:
    one = daemons.open()
    with daemons.holding(2, name=shard_connection(2, "a" * 16), pipeline=pipeline):
        with daemons.holding(1, name=shard_connection(1, "a" * 16), pipeline=pipeline):
            assert one.take(2) == Taken(2, epoch=1, stale=())  # else it would raise: the row would be locked
        assert one.take(1) == Taken(1, epoch=1, stale=())


def test_transactions_that_daemons_of_an_old_cut_were_stopped_in_are_ended(daemons: Daemons) -> None:
    before = daemons.open(daemons.cut(8))
    before.take(7)
    before.close()
    after = daemons.open(daemons.cut(4))
    with daemons.holding(7, name=shard_connection(7, "a" * 16), pipeline=True):
        while (adopted := after.adopt()) is None:  # until the server has noticed that the first has ended
            pass
        assert [taken.number for taken in adopted[0]] == [0, 1, 2, 3]


def test_a_transaction_of_another_program_delays_a_take_and_loses_nothing(daemons: Daemons) -> None:
    one = daemons.open()
    with daemons.holding(2):
        with pytest.raises(LedgerError) as refused:
            one.take(2)

        assert (refused.value.reason, refused.value.transient) == ("ledger_busy", True)
        assert not one.lost
        assert one.beat("").free == set(range(4))

    assert one.take(2) == Taken(2, epoch=1, stale=())


def test_topic_filters_of_an_earlier_holder_are_known_to_the_next(daemons: Daemons) -> None:
    before = daemons.open(daemons.cut(filters=("a/+", "b/+")))
    before.take(2)
    before.subscribed(2)
    before.release(2)

    after = daemons.open(daemons.cut(filters=("b/+", "c/+")))

    assert after.take(2) == Taken(2, epoch=2, stale=("a/+",))
    assert daemons.sessions() == {"stationkey-x-4-2": '["b/+", "c/+", "a/+"]'}
    after.subscribed(2)
    assert daemons.sessions() == {"stationkey-x-4-2": '["b/+", "c/+"]'}


def test_after_a_start_of_the_server_shards_wait_for_their_holders(restarting: Daemons) -> None:
    cut = restarting.cut(lease=60)
    one = restarting.open(cut, instance="a" * 16, name="one")
    one.take(1)
    one.take(2)
    one.release(1)
    restarting.database.server.terminate()
    restarting.database.server.start()

    other = restarting.open(cut)

    assert other.beat("").free == {0, 1, 3}
    again = restarting.open(cut, instance="a" * 16, name="one")
    assert again.resume({2: 1}) == frozenset()


def test_after_a_start_of_the_server_no_shard_waits_for_a_daemon_that_was_started_again(restarting: Daemons) -> None:
    cut = restarting.cut(lease=60)
    restarting.open(cut, name="one").take(2)
    restarting.database.server.terminate()
    restarting.database.server.start()

    successor = restarting.open(cut, name="one")

    assert successor.beat("").free == {0, 1, 2, 3}


def test_a_server_whose_clock_is_set_back_keeps_no_shard_for_a_dead_daemon(daemons: Daemons) -> None:
    """It has not been started since: by its clock, it was started in the future."""
    dead = daemons.open()
    dead.take(2)
    daemons.database.admin(
        "CREATE FUNCTION stationkey.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS"
        " $$ SELECT pg_catalog.clock_timestamp() - interval '30 days' $$"
    )
    dead.close()
    other = daemons.open(set_back=True)

    until(lambda: 2 in other.beat("").free, "it is free")


class TestAnotherNumberOfShards:
    def test_leaves_no_shards_behind_where_it_is_refused(self, daemons: Daemons) -> None:
        serving = daemons.open(daemons.cut(2))
        serving.take(0)

        refused = daemons.open(daemons.cut(4))

        assert refused.beat("").others
        assert daemons.epochs().keys() == {0, 1}

    def test_is_not_served_while_holders_of_the_old_one_are_expected_back(self, restarting: Daemons) -> None:
        """PostgreSQL has been restarted, and so nobody has a lock."""
        old, new = restarting.cut(2, lease=60), restarting.cut(4, lease=60)
        restarting.open(old, instance="a" * 16).take(0)
        restarting.database.server.terminate()
        restarting.database.server.start()

        assert restarting.open(new).beat("").others

    def test_is_not_served_while_a_daemon_has_a_shard_of_the_old_one(self, daemons: Daemons) -> None:
        old = daemons.open(daemons.cut(4))
        old.take(2)

        new = daemons.open(daemons.cut(2))

        view = new.beat("")
        assert view.others
        assert view.old
        assert new.adopt() is None
        assert new.take(0) is None
        assert daemons.epochs()[0] == 0

    def test_is_adopted_when_none_has(self, daemons: Daemons) -> None:
        old = daemons.open(daemons.cut(4))
        for number in range(4):
            old.take(number)
            old.subscribed(number)
            old.release(number)
        new = daemons.open(daemons.cut(2))

        adopted = new.adopt()

        assert adopted is not None
        taken, sessions = adopted
        assert [(one.number, one.epoch) for one in taken] == [(0, 3), (1, 3)]
        assert sessions == [Session(f"stationkey-x-4-{number}", number, 4, ("+/josev/cs",)) for number in range(4)]
        assert daemons.epochs() == {0: 3, 1: 3, 2: 2, 3: 2}
        assert old.take(3) is None, "the old cut is over"

    def test_is_served_by_all_once_the_old_sessions_have_ended(self, daemons: Daemons) -> None:
        old = daemons.open(daemons.cut(1))
        old.take(0)
        old.close()
        one, other = daemons.open(daemons.cut(2)), daemons.open(daemons.cut(2))
        while one.adopt() is None:
            pass
        one.release(1)
        assert other.take(1) is None

        one.ended("stationkey-x-1-0")

        assert other.take(1) == Taken(1, epoch=3, stale=())

    def test_is_adopted_anew_if_the_daemon_that_did_so_dies(self, daemons: Daemons) -> None:
        old = daemons.open(daemons.cut(1))
        old.take(0)
        old.close()
        one, other = daemons.open(daemons.cut(2)), daemons.open(daemons.cut(2))
        while one.adopt() is None:
            pass
        assert other.adopt() is None

        one.close()

        while (adopted := other.adopt()) is None:
            pass
        assert adopted[1] == [Session("stationkey-x-1-0", 0, 1, ("+/josev/cs",))]


def test_the_lease_is_the_one_of_these_tests(daemons: Daemons) -> None:
    daemon = daemons.open()
    ((lease,),) = daemons.database.admin("SELECT lease FROM stationkey.daemon")

    daemon.leave()

    assert lease == LEASE
    assert daemons.database.admin("SELECT instance FROM stationkey.daemon") == []


class _Late:
    """A deadline that is over just when the call has ended."""

    def __init__(self, _: float) -> None:
        pass

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        raise TimeoutError


async def test_a_shard_that_is_taken_at_the_last_moment_is_not_forgotten(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(lambda present: daemons.open(present=present), seconds=2.0)
    await lease.beat()
    monkeypatch.setattr("stationkey.site.lease.asyncio.timeout", _Late)
    taken = await lease.take(0)
    monkeypatch.undo()
    assert taken is not None
    assert lease.held == {0: taken.epoch}
    assert (await lease.beat()).held == {0}
    lease.close()
