"""Several daemons with one token, killed or stopped between its changes and the ledger's: no key is lost or left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from asker import until
from peers import SharedToken
from postgresql import Database

from stationkey.keystore.pkcs11 import keyfile
from stationkey.keystore.pkcs11.uri import identifier_of
from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import connect

pytest_plugins = ["postgresql"]

PROGRAM: Final = Path(__file__).with_name("key_maker.py")
KILLS: Final = int(os.environ.get("STATIONKEY_KILLS", "0")) or 8
"""How many daemons are killed at random; the environment may ask for more."""


class Maker:
    """A process with the key store of a daemon."""

    def __init__(self, site: Site, instance: str) -> None:
        self.instance = instance
        state_dir = site.folder / instance
        state_dir.mkdir(exist_ok=True)
        database = (site.database.uri, str(site.database.server.password_file))
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, instance, *database, site.token.uri, str(state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **site.token.clients},
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def order(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def do(self, order: str) -> str:
        self.order(order)
        return self.answer()

    def stop_at(self, order: str) -> None:
        """Give an order in which it stops, and wait until it has."""
        self.order(order)
        stat = Path(f"/proc/{self.process.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it has stopped")

    def go_on(self) -> str:
        self.process.send_signal(signal.SIGCONT)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Site:
    """The ledger, the token, and what is in both."""

    def __init__(self, folder: Path, database: Database, token: SharedToken) -> None:
        self.folder, self.database, self.token = folder, database, token
        self.makers: list[Maker] = []
        with connect(database.uri, database.password, name="test") as connection:
            schema.prepare(connection)

    def maker(self, instance: str) -> Maker:
        """Start one, and wait until it has opened the token."""
        maker = Maker(self, instance)
        self.makers.append(maker)
        assert maker.answer() == "ready"
        return maker

    def sql(self, statement: str, *arguments: object) -> list[tuple[object, ...]]:
        with connect(self.database.uri, self.database.password, name="test") as sql:
            cursor = sql.execute(statement.encode(), arguments)
            return cursor.fetchall() if cursor.description else []

    def end_lease(self, maker: Maker) -> None:
        self.sql("UPDATE daemon SET lease = 0.001, seen = seen - interval '1 hour' WHERE instance = %s", maker.instance)

    def later(self) -> None:
        """Let two hours pass on record."""
        passed = " - interval '2 hours'"
        self.sql(f"UPDATE token_key SET ended = ended{passed}, look = look{passed}")

    def living(self) -> set[str]:
        """The CKA_IDs of the keys in the ledger."""
        rows = self.sql("SELECT private FROM secret")
        return {identifier_of(keyfile.uri_of(private)).hex() for (private,) in rows if isinstance(private, bytes)}

    def in_token(self) -> set[str]:
        """The CKA_IDs of the keys in the token."""
        told = self.token.run(
            *("pkcs11-tool", "--module", str(self.token.module), "--token-label", self.token.label),
            *("--login", "--pin", self.token.pin, "--list-objects"),
        )
        lines = [line.strip() for line in told.splitlines()]
        return {line.partition(":")[2].strip() for line in lines if line.startswith("ID:")}


@pytest.fixture
def site(tmp_path: Path, database: Database) -> Iterator[Site]:
    with SharedToken(tmp_path / "token") as token:
        made = Site(tmp_path, database, token)
        try:
            yield made
        finally:
            for maker in made.makers:
                maker.kill()


def test_a_kill_between_the_label_and_the_key_leaves_only_the_label(site: Site) -> None:
    one, other = site.maker("one"), site.maker("other")
    one.stop_at("make before")
    one.kill()
    site.end_lease(one)
    assert other.do("sweep") == "0"
    assert site.in_token() == set()
    for _ in range(13):
        site.later()
        assert site.sql("SELECT 1 FROM token_key WHERE ended IS NOT NULL")
        assert other.do("sweep") == "0"
    for _ in range(13):
        site.later()
    assert other.do("sweep") == "0"
    assert site.sql("SELECT 1 FROM token_key WHERE ended IS NOT NULL") == []


def test_a_key_made_and_not_recorded_is_destroyed_when_the_lease_of_its_daemon_is_over(site: Site) -> None:
    one, other = site.maker("one"), site.maker("other")
    one.do("make")
    one.do("record")
    one.stop_at("make after")
    one.kill()
    assert other.do("sweep") == "0"
    assert len(site.in_token()) == 2
    site.end_lease(one)
    assert other.do("sweep") == "1"
    assert site.in_token() == site.living()
    assert len(site.living()) == 1


def test_a_kill_between_the_ledgers_destruction_and_the_tokens_leaves_no_key(site: Site) -> None:
    one, other = site.maker("one"), site.maker("other")
    for _ in range(2):
        one.do("make")
        assert one.do("record") == "recorded"
    assert one.do("end") == "ended"
    one.kill()
    assert other.do("sweep") == "0"  # its daemon comes first, for a minute
    site.later()
    assert other.do("sweep") == "1"
    assert site.in_token() == site.living()
    assert len(site.living()) == 1


def test_a_key_of_the_ledger_is_not_destroyed_in_the_token_by_mistake(site: Site) -> None:
    one = site.maker("one")
    one.do("make")
    one.do("record")
    assert one.do("destroy") == "destroyed"
    assert site.in_token() == site.living()
    assert len(site.living()) == 1


@pytest.mark.parametrize("ended_by", ["kill", "refusal"])
def test_a_key_made_by_a_daemon_that_comes_back_after_its_lease_is_destroyed(site: Site, ended_by: str) -> None:
    """Stopped with the call of the token in hand, it makes the key after the others have looked for it."""
    one, other = site.maker("one"), site.maker("other")
    one.stop_at("make before")
    site.end_lease(one)
    assert other.do("sweep") == "0"
    one.go_on()
    assert len(site.in_token()) == 1
    if ended_by == "refusal":
        assert one.do("record") == "SK001"
    one.kill()
    assert other.do("sweep") == "0"  # it is looked for again later
    site.later()
    assert other.do("sweep") == "1"
    assert site.in_token() == set()


def test_a_key_in_the_making_of_a_living_daemon_is_not_destroyed(site: Site) -> None:
    one, other = site.maker("one"), site.maker("other")
    one.stop_at("make after")
    assert other.do("sweep") == "0"
    one.go_on()
    assert one.do("record") == "recorded"
    assert site.in_token() == site.living()
    assert len(site.living()) == 1


@pytest.mark.long
def test_no_kill_at_a_random_moment_loses_or_leaves_a_key_in_a_shared_token(site: Site) -> None:
    """Three daemons make, record and destroy keys, and sweep what the others left."""
    seed = int(os.environ.get("STATIONKEY_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"STATIONKEY_SEED={seed} {KILLS} kills")  # noqa: T201 - shown where the test fails
    chance = random.Random(seed)

    def start(number: int) -> Maker:
        maker = site.maker(f"daemon-{number}")
        maker.order(f"work {chance.getrandbits(32)}")
        return maker

    working = [start(number) for number in range(3)]
    for number in range(KILLS):
        time.sleep(chance.uniform(0.0, 0.3))  # the moment is what is drawn, not something waited for
        victim = chance.randrange(len(working))
        working[victim].kill()
        working[victim] = start(number + len(working))
    for maker in working:
        maker.kill()
    left = len(site.in_token() - site.living())

    sweeper = site.maker("sweeper")
    in_hand = "SELECT 1 FROM token_key WHERE maker <> 'sweeper' AND ended IS NULL"
    until(lambda: sweeper.do("sweep") and not site.sql(in_hand), "each lease is over")
    site.later()
    while sweeper.do("sweep") != "0":
        pass
    assert site.in_token() == site.living()
    print(f"{len(site.living())} keys, {left} strays at the end, {len(site.sql('SELECT 1 FROM key'))} recorded")  # noqa: T201
