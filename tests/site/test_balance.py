"""Daemons share the shards without a word between them: each sees who lives, how many shards each has, what is free."""

from __future__ import annotations

from random import Random

import pytest

from stationkey.site.balance import Move, balance


class Daemons:
    """Daemons that make their moves in any order, by what is so at that moment."""

    def __init__(self, shards: int, living: int) -> None:
        self.shards = shards
        self.held: dict[int, set[int]] = {daemon: set() for daemon in range(living)}

    def free(self) -> set[int]:
        return set(range(self.shards)).difference(*self.held.values())

    def move(self, me: int) -> Move:
        loads = {daemon: len(held) for daemon, held in self.held.items()}
        move = balance(self.shards, me=me, loads=loads, held=self.held[me], free=self.free())
        self.held[me] |= set(move.take)
        self.held[me] -= set(move.release)
        return move

    def settle(self, random: Random) -> int:
        """Make moves until there are none; return how many shards were taken or released."""
        moved, quiet = 0, set[int]()
        while quiet != set(self.held):
            me = random.choice(list(self.held))
            move = self.move(me)
            count = len(move.take) + len(move.release)
            moved += count
            quiet = set() if count else quiet | {me}
            assert moved <= 4 * self.shards, "no end of it"
        return moved

    def shares(self) -> list[int]:
        return sorted(len(held) for held in self.held.values())


@pytest.mark.parametrize(
    ("shards", "living", "shares"),
    [(8, 1, [8]), (8, 2, [4, 4]), (8, 3, [2, 3, 3]), (8, 5, [1, 1, 2, 2, 2]), (1, 2, [0, 1]), (3, 4, [0, 1, 1, 1])],
)
@pytest.mark.parametrize("seed", range(5))
def test_shares_differ_by_one_at_most(shards: int, living: int, shares: list[int], seed: int) -> None:
    daemons = Daemons(shards, living)

    daemons.settle(Random(seed))

    assert daemons.shares() == shares
    assert daemons.free() == set()


@pytest.mark.parametrize("seed", range(20))
def test_a_death_moves_only_the_shards_of_the_dead(seed: int) -> None:
    random = Random(seed)
    daemons = Daemons(8, 4)
    daemons.settle(random)
    freed = daemons.held.pop(random.randrange(4))

    moved = daemons.settle(random)

    assert daemons.free() == set()
    assert moved == len(freed)


@pytest.mark.parametrize("seed", range(20))
def test_a_new_daemon_gets_its_share_and_no_more_is_moved(seed: int) -> None:
    random = Random(seed)
    daemons = Daemons(8, 2)
    daemons.settle(random)
    daemons.held[2] = set()

    moved = daemons.settle(random)

    assert daemons.shares() == [2, 3, 3]
    assert moved == 4  # two released, two taken


def test_a_standby_takes_nothing_from_the_one_that_serves() -> None:
    assert balance(1, me=2, loads={1: 1, 2: 0}, held=set(), free=()) == Move()
    assert balance(1, me=1, loads={1: 1, 2: 0}, held={0}, free=()) == Move()


def test_a_daemon_that_cannot_serve_leaves_its_shards_to_those_that_can() -> None:
    loads = {1: 4, 2: 4}

    assert balance(8, me=1, loads=loads, held={0, 1, 2, 3}, free=(), unfit={1}) == Move(release=(0, 1, 2, 3))
    assert set(balance(8, me=2, loads=loads, held={4, 5, 6, 7}, free={0, 1}, unfit={1}).take) == {0, 1}


def test_where_none_can_serve_all_share() -> None:
    assert balance(8, me=1, loads={1: 4, 2: 4}, held={0, 1, 2, 3}, free=(), unfit={1, 2}) == Move()


def test_two_that_start_together_begin_at_different_shards() -> None:
    first = balance(8, me=1, loads={1: 0, 2: 0}, held=set(), free=range(8))
    second = balance(8, me=2, loads={1: 0, 2: 0}, held=set(), free=range(8))

    assert set(first.take).isdisjoint(second.take)
