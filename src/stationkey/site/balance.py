"""Which shards a daemon takes and which it releases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

from msgspec import Struct


class Move(Struct, frozen=True):
    """What a daemon does next.

    Attributes:
        take: shards to take, in this order; another daemon may be faster.
        release: shards to release.
    """

    take: tuple[int, ...] = ()
    release: tuple[int, ...] = ()


def balance(
    shards: int,
    *,
    me: int,
    loads: Mapping[int, int],
    held: AbstractSet[int],
    free: Collection[int],
    unfit: AbstractSet[int] = frozenset(),
) -> Move:
    """Return the next move of a daemon, towards shares that differ by one at most.

    All daemons that see the same come to shares that add up, without a word between them: each share is
    ``shards / living``, rounded down, and the daemons with the most shards have what is left over, one each.

    Args:
        shards: number of shards.
        me: this daemon, as in `loads`.
        loads: number of shards of each living daemon.
        held: shards of this daemon; their number counts, not what `loads` says of it.
        free: shards that nobody has.
        unfit: daemons that cannot serve, in their own opinion; they get nothing, unless all are.
    """
    living = {**loads, me: len(held)}
    now = {daemon: load for daemon, load in living.items() if daemon not in unfit} or living
    if me not in now:
        return Move(release=tuple(sorted(held)))
    share, extra = divmod(shards, len(now))
    rank = sorted(now, key=lambda daemon: (-now[daemon], daemon)).index(me)
    share += rank < extra
    if len(held) > share:
        return Move(release=tuple(sorted(held)[share:]))
    # Begin at another place than the others, so that two that start together do not try the same ones.
    begin = rank * shards // len(now)
    wanted = sorted(set(free) - held, key=lambda number: (number - begin) % shards)
    return Move(take=tuple(wanted[: share - len(held)]))
