"""How PostgreSQL would find the rows of a statement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from stationkey.ledger.engine import Arguments
from stationkey.ledger.postgresql.statements import PostgresqlSql, translated

TABLES = frozenset({"key", "secret", "answer", "event", "rejection"})
"""Those that grow."""


@contextmanager
def through_whole_tables() -> Iterator[list[str]]:
    """Note each statement that PostgreSQL could only execute by reading a whole table, or a whole index."""
    found: list[str] = []
    execute, executemany = PostgresqlSql.execute, PostgresqlSql.executemany

    def explain(sql: PostgresqlSql, statement: str, arguments: Arguments) -> None:
        connection = sql._connection  # noqa: SLF001 - what it is given to do is the point
        connection.execute("SET enable_seqscan = off")  # the tables are small here
        connection.execute("SET plan_cache_mode = force_custom_plan")
        cursor = connection.execute(b"EXPLAIN (FORMAT JSON) " + translated(statement), arguments)
        row = cursor.fetchone()
        assert row is not None
        found.extend(f"{statement}: {node}" for node in _unbounded(row[0][0]["Plan"]))

    def one(sql: PostgresqlSql, statement: str, arguments: Arguments = (), /) -> Any:
        explain(sql, statement, arguments)
        return execute(sql, statement, arguments)

    def many(sql: PostgresqlSql, statement: str, arguments: Iterable[Arguments], /) -> Any:
        sets = list(arguments)
        if sets:
            explain(sql, statement, sets[0])
        return executemany(sql, statement, sets)

    with mock.patch.object(PostgresqlSql, "execute", one), mock.patch.object(PostgresqlSql, "executemany", many):
        yield found


def _unbounded(plan: dict[str, Any], table: str = "", limited: bool = False) -> Iterator[str]:
    """Yield the nodes of a plan that read all of a table.

    PostgreSQL 17 needs no condition to read the last row of an index: a limit is above it.
    """
    table = plan.get("Relation Name", table)
    kind = plan["Node Type"]
    index = plan.get("Index Name", "")
    bounded = "Index Cond" in plan or (limited and "Filter" not in plan)
    whole = kind == "Seq Scan" or ("Index" in kind and not bounded)
    if whole and table in TABLES and index != "key_previous":  # that one is chosen only where it is nearly empty
        yield f"{kind} {table} {index}"
    for inner in plan.get("Plans", ()):
        yield from _unbounded(inner, table, kind == "Limit")
