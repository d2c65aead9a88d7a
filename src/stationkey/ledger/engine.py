"""What the ledger needs of a database: SQLite's `Database` is one, a site's PostgreSQL another.

Every statement is written once, for SQLite 3.40 and PostgreSQL 15, with SQLite's placeholders: ``?``, or ``:name``.
What only one of them has, or does otherwise, is behind these protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Arguments = Sequence[Any] | Mapping[str, Any]
"""Of a statement, by position or by name. More names than the statement has are allowed."""


class Rows(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""

    def fetchone(self) -> Any:
        """Return the next row as a tuple, or None."""

    def fetchall(self) -> list[Any]:
        """Return the remaining rows as tuples."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the remaining rows."""


class Sql(Protocol):
    """Executes statements, and gives the parts of them that differ between engines."""

    @property
    def next_event(self) -> str:
        """An expression for the sequence number of the event that the transaction records next."""

    def execute(self, statement: str, arguments: Arguments = (), /) -> Rows:
        """Execute a statement."""

    def executemany(self, statement: str, arguments: Iterable[Arguments], /) -> object:
        """Execute a statement with each of several sets of arguments."""

    def mine(self, table: str, /) -> str:
        """Return a condition, ``" AND …"``, for the rows of the stations that this engine serves; empty for all rows.

        Args:
            table: name or alias of a table with a column ``station``.
        """

    def destroy_private(self, key_number: int, /) -> None:
        """Delete the private part of a key and the CSR of its answer, which then counts as delivered."""


class Engine(Protocol):
    """One connection to a database. May move between threads, but only one may use it at a time."""

    @property
    def trouble(self) -> str:
        """Reason of the last failure until the next successful write, or an empty text. Any thread may read it."""

    @property
    def directory(self) -> Path:
        """The state directory of this daemon."""

    @property
    def local(self) -> bool:
        """Whether this machine alone has the database: whoever changes it writes all of ``active/``."""

    def own_files(self) -> frozenset[tuple[int, int]]:
        """Return device and inode of the files that this process must not open another way."""

    def owns(self, station: str) -> bool:
        """Return whether the rows of a station are among those of `Sql.mine`."""

    def size(self) -> int:
        """Return the size of the database in bytes.

        Raises:
            LedgerError: the database cannot be read.
        """

    def reading(self) -> AbstractContextManager[Sql]:
        """Give the connection for queries, inside a transaction or outside.

        Raises:
            LedgerError: the database cannot be read.
        """

    def transaction(self, act: str = "written") -> AbstractContextManager[Sql]:
        """Give the connection for changes, and commit them, durably, with the deferred statements.

        Args:
            act: what failed, for the error's message.

        Raises:
            LedgerError: nothing was written.
        """

    def attempt(self, call: Callable[[], T]) -> T:
        """Make a call, and again if its connection was lost before it committed anything.

        Raises:
            LedgerError: by the call.
        """

    def defer(self, statement: str, *arguments: object) -> None:
        """Add a statement to the next transaction. Any thread may call this; it does not block.

        Only for changes that may be lost: a crash or a failed transaction loses them.
        """

    def wipe(self) -> bool:
        """Remove the traces of destroyed private parts that deleting rows may leave.

        Returns:
            Whether a key was destroyed since the last call.
        """

    def checkpoint(self) -> bool:
        """Remove the traces of wiped private parts from logs.

        Returns:
            Whether that is done. Another process may prevent it; try again later.
        """

    def shrink(self) -> bool:
        """Give some unused room back to the file system.

        Returns:
            Whether there is more.
        """

    def close(self) -> None:
        """Execute the deferred statements and close the connection.

        Raises:
            LedgerError: a deferred statement was not written. The connection is closed.
        """
