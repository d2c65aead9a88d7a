"""The doctor on the ledger of a site."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from depots import take
from doctors import Findings, look
from postgresql import Database

from stationkey.doctor.report import Level
from stationkey.doctor.state.site import judge_refusal, judge_site
from stationkey.errors import LedgerError
from stationkey.ledger.postgresql.connection import connect
from stationkey.site.locks import LockClass

pytest_plugins = ["depots"]


def examined(database: Database, folder: Path, *, password: bool = True) -> Findings:
    config = folder / "stationkey.toml"
    named = f'ledger_password_file = "{database.server.password_file}"\n' if password else ""
    config.write_text(f'ledger = "{database.uri}"\n{named}[site]\nstations = "+"\nshards = 2\n')
    return look(folder, config_file=config)


def test_a_site_with_all_its_holders_is_well(depot: Database, tmp_path: Path) -> None:
    with closing(connect(depot.uri, depot.password, name="holder")) as holder:
        for number in range(2):
            take(depot, number, 2)
            holder.execute("SELECT pg_advisory_lock(%s, %s)", (int(LockClass.SHARD), number))
        found = examined(depot, tmp_path)

    assert found.level("state.ledger") is Level.OK
    assert found.level("state.keys") is Level.NOT_CHECKED


def test_a_shard_without_a_holder_is_told(depot: Database, tmp_path: Path) -> None:
    take(depot, 1, 2)

    assert examined(depot, tmp_path).reasons("state.ledger") == {"unheld"}


def test_a_database_without_tables_is_made_by_the_daemon(database: Database, tmp_path: Path) -> None:
    found = examined(database, tmp_path)

    assert (found.level("state.ledger"), found.reasons("state.ledger")) == (Level.WARNING, {"ledger_missing"})


def test_a_server_that_refuses_is_a_failure(depot: Database, tmp_path: Path) -> None:
    found = examined(depot, tmp_path, password=False)

    assert (found.level("state.ledger"), found.reasons("state.ledger")) == (Level.FAILURE, {"ledger_login_refused"})


@pytest.mark.parametrize(
    ("reason", "level"),
    [("ledger_older", Level.WARNING), ("ledger_newer", Level.FAILURE), ("ledger_not_durable", Level.FAILURE)],
)
def test_what_the_daemon_makes_good_is_a_warning(reason: str, level: Level) -> None:
    assert judge_refusal(LedgerError("no", reason=reason, hint="do it")).level is level


def test_the_shards_are_judged_by_who_holds_them() -> None:
    assert judge_site(15, 0, []).level is judge_site(15, 3, []).level is Level.OK
    assert judge_site(15, 3, [2]).level is Level.WARNING
