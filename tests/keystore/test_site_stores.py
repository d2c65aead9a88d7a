"""The key stores of a site's daemons: all of them in the same devices, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from asker import until
from peers import ResourceManager, Swtpm
from postgresql import Database
from softhsm import Token

from stationkey.config.file import read_table, settle
from stationkey.contract.profiles import Algorithm
from stationkey.errors import StationKeyError
from stationkey.keystore import KeyRef, KeyStore
from stationkey.keystore.stores import KeyStores, Store, checked_stores
from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import connect
from stationkey.ledger.postgresql.inventory import SiteInventory
from stationkey.service import strays as module
from stationkey.service.strays import Strays
from stationkey.x509.certificate import prove

pytest_plugins = ["postgresql"]

T = TypeVar("T")
P256 = Algorithm.ECDSA_SHA256


def sign(store: KeyStore, key: KeyRef) -> None:
    """Sign with a key, and verify."""
    with store.signer(key) as private_key:
        prove(private_key, store.public_key(key), b"is this the key?")


class Machine:
    """A daemon of a site on a machine of its own, as far as its key stores go."""

    def __init__(self, database: Database, folder: Path, name: str, uri: str) -> None:
        self.database, self.name = database, name
        (folder / name).mkdir()
        self.be_seen()
        self.inventory = SiteInventory(lambda: connect(database.uri, database.password, name=name), name)
        table: dict[str, object] = {"keystore": uri, "state_dir": str(folder / name)}
        configured = settle(read_table(table, source="here"), allow_software_keys=True)
        self.stores: KeyStores = checked_stores(configured, site=self.inventory)()

    def be_seen(self, *, lease: float = 86400.0) -> None:
        with connect(self.database.uri, self.database.password, name="test") as sql:
            sql.execute(
                "INSERT INTO daemon (instance, name, host, pid, version, schema, shards, lease, backend)"
                " VALUES (%s, '', '', 0, '', 1, 1, %s, 0)"
                " ON CONFLICT (instance) DO UPDATE SET seen = clock_timestamp(), lease = EXCLUDED.lease",
                (self.name, lease),
            )

    @property
    def store(self) -> Store:
        [store] = self.stores
        return store

    def do(self, job: Callable[[KeyStore], T]) -> T:
        return self.store.thread.submit(job, timeout=30.0).result(30.0)

    def refusal(self) -> str:
        """The reason why it can do nothing."""
        with pytest.raises(StationKeyError) as refused:
            self.do(lambda store: store.supports(P256))
        return refused.value.reason

    def close(self) -> None:
        self.stores.close()
        self.inventory.close()


@pytest.fixture
def machine(database: Database, tmp_path: Path) -> Iterator[Callable[[str, str], Machine]]:
    with connect(database.uri, database.password, name="test") as sql:
        schema.prepare(sql)
    with ExitStack() as stack:
        yield lambda name, uri: stack.enter_context(closing(Machine(database, tmp_path, name, uri)))


Start = Callable[[str, str], Machine]


def test_a_tpm_on_a_second_machine_is_refused_and_the_first_ones_serves_on(machine: Start, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "tpm-1") as one, Swtpm(tmp_path / "tpm-2") as two:
        first = machine("a", one.uri)
        key = first.do(lambda store: store.generate(P256))
        assert not first.store.shared  # nothing stays in a TPM
        second = machine("b", two.uri)
        assert [second.refusal() for _ in range(2)] == ["keystore_differs"] * 2
        first.do(partial(sign, key=key))


def test_several_daemons_of_one_machine_share_its_tpm(
    machine: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Swtpm(tmp_path / "tpm") as tpm, ResourceManager(tmp_path / "manager", tpm=tpm.tcti) as manager:
        for name, value in manager.environment.items():
            monkeypatch.setenv(name, value)
        uri = f"tpm2:{manager.tcti}"
        daemons = [machine(f"daemon-{number}", uri) for number in range(3)]
        keys = [daemon.do(lambda store: store.generate(P256)) for daemon in daemons]
        for daemon, key in zip(daemons, keys[1:] + keys[:1], strict=True):
            daemon.do(partial(sign, key=key))
        for daemon in daemons:
            daemon.close()


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Token]:
    made = Token.make("site", tmp_path)
    yield made
    made.remove()


def test_a_token_of_the_same_label_is_another_device(machine: Start, token: Token, tmp_path: Path) -> None:
    first = machine("a", token.uri)
    first.do(lambda store: store.generate(P256))
    first.close()
    bring_back = token.hide(tmp_path / "drawer")
    other = Token.make(token.label, tmp_path)
    second = machine("b", other.uri)
    assert second.refusal() == "keystore_differs"
    other.remove()
    bring_back()
    assert second.do(lambda store: store.supports(P256))


def test_a_store_that_cannot_be_recorded_yet_serves_as_soon_as_it_can(
    token: Token, own_postgresql: Database, tmp_path: Path
) -> None:
    with connect(own_postgresql.uri, own_postgresql.password, name="test") as sql:
        schema.prepare(sql)
    with closing(Machine(own_postgresql, tmp_path, "a", token.uri)) as daemon:
        own_postgresql.server.kill()
        assert daemon.refusal() == "ledger_unreachable"
        own_postgresql.server.start()

        def serves() -> bool:
            with suppress(StationKeyError):  # it is not tried for a second
                return daemon.do(lambda store: bool(store.supports(P256)))
            return False

        until(serves, "it serves")


async def test_a_shard_that_is_taken_over_has_the_token_swept_at_once_and_again_after_the_lease(
    machine: Start, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SWEEP", 3600.0)
    dead = machine("dead", token.uri)
    made = dead.do(lambda store: store.generate(P256))
    assert isinstance(made, KeyRef)
    dead.stores.close()
    heir = machine("heir", token.uri)
    strays = Strays(None, heir.store, lease=0.2)
    assert (await strays.sweep()).destroyed == 0
    running = asyncio.create_task(strays.run())
    dead.be_seen(lease=0.01)
    strays.soon()
    await asyncio.to_thread(until, lambda: not token.objects(), "the key is destroyed")
    running.cancel()
