"""Commands on the ledger of a site, beside its daemons or without them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from depots import open_engine, take
from postgresql import Database
from reasons import Ended, command
from recording import CSR, answer, bring

from parts import V2G, request
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent

pytest_plugins = ["depots"]

Run = Callable[..., Ended]


@pytest.fixture
def config(depot: Database, tmp_path: Path) -> Path:
    file = tmp_path / "stationkey.toml"
    file.write_text(
        f'ledger = "{depot.uri}"\nledger_password_file = "{depot.server.password_file}"\n'
        f'state_dir = "{tmp_path / "state"}"\n[site]\nstations = "depot/+"\n'
    )
    return file


@pytest.fixture
def ledger(depot: Database, tmp_path: Path) -> Iterator[Ledger]:
    """That of the daemon which holds the only shard."""
    with closing(Ledger.on(open_engine(depot, tmp_path, shard=take(depot)))) as opened:
        yield opened


@pytest.fixture
def run(config: Path) -> Run:
    return lambda *arguments: command(*arguments, "--config", str(config))


def state(ledger: Ledger, key_id: str) -> str:
    return ledger.keys.named(key_id).state


def test_keys_are_listed_and_shown_with_their_station(ledger: Ledger, run: Run) -> None:
    asked = request(V2G)
    one, other = answer(ledger, asked, station="depot/s1"), answer(ledger, asked, station="depot/s2")

    listed = json.loads(run("keys", "list", "--json").stdout)
    assert [(key["key_id"], key["station"]) for key in listed] == [(one, "depot/s1"), (other, "depot/s2")]
    only = json.loads(run("keys", "list", "--station", "depot/s2", "--json").stdout)
    assert [key["key_id"] for key in only] == [other]
    assert json.loads(run("keys", "show", one[:8], "--json").stdout)["request_ids"] == [asked.id]
    assert run("keys", "export-csr", other).stdout == CSR
    assert run("keys", "export-public", other).exit_code == 0
    assert [event["event"] for event in json.loads(run("keys", "history", one, "--json").stdout)] == ["CSR answered"]


def test_requests_of_all_stations_are_shown(ledger: Ledger, run: Run) -> None:
    answer(ledger, request(V2G), station="depot/s1")
    ledger.rejections.note("refused", reason="rate_limited", message="too many", now=9, station="depot/s2")
    ledger.rejections.write()

    rows = [json.loads(line) for line in run("requests", "--json").stdout.splitlines()]

    assert [row["station"] for row in rows] == ["depot/s1", "depot/s2"]


def test_an_operators_orders_are_seen_by_the_daemon(ledger: Ledger, run: Run) -> None:
    first, second, third = (answer(ledger, request(V2G), station="depot/s1") for _ in range(3))
    bring(ledger, first, KeyEvent.INSTALLED)

    assert run("keys", "retire", first).exit_code == 0
    assert state(ledger, first) == "deactivated"
    assert run("keys", "restore", first).exit_code == 0
    assert state(ledger, first) == "active"
    assert run("keys", "confirm", first).exit_code == 0
    assert ledger.keys.named(first).confirmed
    assert run("keys", "mark-compromised", first, "--yes").exit_code == 0
    assert state(ledger, first) == "compromised"
    assert run("keys", "destroy", second, "--yes").exit_code == 0
    assert state(ledger, second) == "destroyed"
    assert ledger.keys.ref(second) is None
    assert ledger.keys.ref(third) is not None


def test_an_order_writes_nothing_on_this_machine(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    key_id = answer(ledger, request(V2G), station="depot/s1")
    bring(ledger, key_id, KeyEvent.INSTALLED)

    assert run("keys", "retire", key_id).exit_code == 0
    assert not (tmp_path / "state").exists()


def test_the_status_has_the_keys_of_the_site(ledger: Ledger, run: Run) -> None:
    key_id = answer(ledger, request(V2G), station="depot/s1")

    found = json.loads(run("status", "--json").stdout)

    assert found["ledger"] == "ok"
    assert [key["key_id"] for key in found["keys"]] == [key_id]


def test_a_ledger_that_no_daemon_has_made_is_missing(database: Database, config: Path, run: Run) -> None:
    config.write_text(config.read_text().replace(config.read_text().split('"')[1], database.uri))

    assert run("keys", "list").reason == "ledger_missing"


def test_a_password_that_is_refused_is_told(depot: Database, config: Path, run: Run) -> None:
    config.write_text(config.read_text().replace("ledger_password_file", "#ledger_password_file"))

    assert run("keys", "list").reason == "ledger_login_refused"
    assert depot.backends() == []
