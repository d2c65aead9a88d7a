"""The lease, for the event loop: one call at a time on the lease connection, which is renewed when it is lost.

The daemon must not trust its own clock for more than how long ago something was. So a lease is confirmed from when the
heartbeat was *sent*, by a clock that goes on while the process is stopped or the machine suspended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from stationkey.errors import LedgerError
from stationkey.site.connection import Backlog, LeaseConnection, Session, Taken, View
from stationkey.system.threads import Workers

T = TypeVar("T")

MAX_HUNG: Final = 4
"""Calls that may hang: name resolution cannot be ended."""


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The shards that this daemon has, by PostgreSQL's word.

    Args:
        open_: opens a connection; blocks. Its argument: whether to count among those who share the shards.
        seconds: time of a lease.
        detour: seconds more to connect, where one server after another is tried.
        on_news: called when the connection has something to say: a shard was released, or the connection has ended.
        clock: seconds; goes on while the process is stopped.

    Attributes:
        held: the shards of this daemon, with their epochs.
        trouble: why the last call failed, or an empty text.
    """

    def __init__(
        self,
        open_: Callable[[bool], LeaseConnection],
        *,
        seconds: float,
        detour: float = 0.0,
        on_news: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = _boot_time,
    ) -> None:
        self.held: dict[int, int] = {}
        self.trouble = ""
        self._open = open_
        self._seconds = seconds
        self._detour = detour
        self._on_news = on_news
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._one_at_a_time = asyncio.Lock()
        self._workers = Workers("lease", MAX_HUNG)
        self._connection: LeaseConnection | None = None
        self._watched: int | None = None
        self._present = True
        self._confirmed = -float("inf")
        self._lost: set[int] = set()
        self._calls: set[asyncio.Task[Any]] = set()

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""
        return self._seconds / 4

    @property
    def age(self) -> float:
        """Seconds since the lease was last confirmed; infinite before the first time."""
        return self._clock() - self._confirmed

    def confirmed(self) -> bool:
        """Return whether PostgreSQL cannot have given this daemon's shards to another, if it was not restarted."""
        return self._connection is not None and self.age < self._seconds

    async def beat(self, trouble: str = "", backlog: Mapping[int, Backlog] | None = None) -> View:
        """Send a heartbeat.

        Raises:
            LedgerError: PostgreSQL cannot be reached, or did not answer in time.
        """

        def beat(connection: LeaseConnection) -> View:
            view = connection.beat(trouble)
            connection.tell(backlog or {})
            return view

        sent = self._clock()
        view = await self._call(beat)
        self._confirmed = sent
        return view

    def take_lost(self) -> frozenset[int]:
        """Return the shards that another daemon has taken since the last call of this method."""
        lost, self._lost = frozenset(self._lost), set()
        return lost

    async def take(self, number: int) -> Taken | None:
        """Take a shard; None if another daemon has it.

        Raises:
            LedgerError: it was not taken.
        """
        taken = await self._call(lambda connection: connection.take(number))
        if taken is not None:
            self.held[number] = taken.epoch
        return taken

    async def adopt(self) -> tuple[list[Taken], list[Session]] | None:
        """Take all shards of a new cut; see `LeaseConnection.adopt`.

        Raises:
            LedgerError: nothing was taken.
        """
        adopted = await self._call(LeaseConnection.adopt)
        if adopted is not None:
            self.held |= {taken.number: taken.epoch for taken in adopted[0]}
        return adopted

    async def release(self, number: int) -> None:
        """Release a shard. If PostgreSQL cannot be reached, it does so itself.

        Raises:
            LedgerError: PostgreSQL was not told.
        """
        self.held.pop(number, None)
        await self._call(lambda connection: connection.release(number), connect=False)

    async def subscribed(self, number: int) -> None:
        """Record the subscriptions of a shard's MQTT session; see `LeaseConnection.subscribed`.

        Raises:
            LedgerError: it was not recorded.
        """
        await self._call(lambda connection: connection.subscribed(number))

    async def ended(self, client_id: str) -> None:
        """Record that an MQTT session no longer exists.

        Raises:
            LedgerError: it was not recorded.
        """
        await self._call(lambda connection: connection.ended(client_id))

    async def retire(self) -> None:
        """Count no more among those who share the shards.

        Raises:
            LedgerError: PostgreSQL was not told; it will be by the end of the connection.
        """
        self._present = False
        await self._call(LeaseConnection.retire, connect=False)

    async def leave(self) -> None:
        """Remove this daemon from the record.

        Raises:
            LedgerError: PostgreSQL was not told.
        """
        await self._call(LeaseConnection.leave, connect=False)

    def close(self) -> None:
        """End the connection; PostgreSQL releases what this daemon has. A hung call is abandoned."""
        self._drop()
        self._workers.close()

    # Calls.

    async def _call(self, act: Callable[[LeaseConnection], T], *, connect: bool = True) -> T:
        """Make a call, to its end even if the caller is cancelled: half a call would cost the connection."""
        call = self._loop.create_task(self._made(act, connect=connect), name="lease")
        self._calls.add(call)
        call.add_done_callback(self._ended)
        return await asyncio.shield(call)

    def _ended(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # retrieved, so that asyncio does not warn of a caller that was cancelled

    async def _made(self, act: Callable[[LeaseConnection], T], *, connect: bool) -> T:
        async with self._one_at_a_time:
            try:
                connection = await self._connected(anew=connect)
                result = await self._on(connection, partial(act, connection))
            except LedgerError as error:
                self.trouble = error.reason
                raise
            self.trouble = ""
            return result

    async def _on(self, connection: LeaseConnection, act: Callable[[], T]) -> T:
        """Make a call on the connection; drop the connection if it is lost."""
        self._unwatch()
        kept = False
        try:
            result = await self._in_time(act, hang_up=connection.hang_up)
            kept = True
        except LedgerError:
            kept = not connection.lost
            raise
        finally:
            if self._connection is connection:  # else closed meanwhile
                if kept:
                    self._watch(connection)
                else:
                    self._connection = None
                    self._dispose(connection)
        return result

    async def _connected(self, *, anew: bool) -> LeaseConnection:
        if self._connection is not None:
            return self._connection
        if not anew:
            raise LedgerError("PostgreSQL was not told: no connection", reason="ledger_unreachable", transient=True)
        held = dict(self.held)

        def open_() -> tuple[LeaseConnection, frozenset[int]]:
            connection = self._open(self._present)
            try:
                return connection, connection.resume(held)
            except BaseException:
                connection.close()
                raise

        connection, lost = await self._in_time(open_, more=self._detour, discard=lambda opened: opened[0].close())
        for number in lost:
            self.held.pop(number, None)
        self._lost |= lost
        self._connection = connection
        self._watch(connection)
        if lost:
            self._on_news()
        return connection

    async def _in_time(
        self,
        act: Callable[[], T],
        *,
        more: float = 0.0,
        hang_up: Callable[[], None] = lambda: None,
        discard: Callable[[T], None] = lambda _: None,
    ) -> T:
        """Return the result of a blocking call, or give it up while there is time for another connection.

        Args:
            act: the call.
            more: seconds that it may take longer.
            hang_up: ends it.
            discard: undoes its result, if it comes too late.
        """
        try:
            future = self._workers.submit(act)
        except (RuntimeError, MemoryError) as error:
            raise LedgerError(
                f"no thread for PostgreSQL: {error}", reason="ledger_unreachable", transient=True
            ) from None
        done = asyncio.wrap_future(future)
        try:
            async with asyncio.timeout(self._seconds / 2 + more):
                return await asyncio.shield(done)
        except TimeoutError:
            if done.done():  # at the last moment: a shard that was taken must not be forgotten
                return done.result()
            raise LedgerError(
                f"PostgreSQL did not answer within {self._seconds / 2 + more:g} s",
                reason="ledger_unreachable",
                hint="is the server stopped, or the network cut?",
                transient=True,
            ) from None
        finally:
            if not done.done():
                hang_up()
                done.add_done_callback(partial(_discard, discard))

    def _watch(self, connection: LeaseConnection) -> None:
        """Have the event loop tell when the connection has something to say between two calls."""
        self._watched = connection.fileno()
        self._loop.add_reader(self._watched, self._readable)

    def _unwatch(self) -> None:
        if self._watched is not None:  # a lost connection no longer knows its socket
            self._loop.remove_reader(self._watched)
        self._watched = None

    def _readable(self) -> None:
        self._unwatch()  # the next call reads it
        self._on_news()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._unwatch()
            self._dispose(connection)

    def _dispose(self, connection: LeaseConnection) -> None:
        """Close a connection on a thread, after a call that may still run."""
        connection.hang_up()
        try:
            self._workers.submit(connection.close)
        except (RuntimeError, MemoryError):
            connection.close()


def _discard(discard: Callable[[T], None], done: asyncio.Future[T]) -> None:
    if not done.cancelled() and done.exception() is None:
        discard(done.result())
