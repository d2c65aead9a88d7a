"""What a site has on record of its tokens and devices, on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Event, Thread

import psycopg
import pytest
from postgresql import Database

from stationkey.errors import ConfigurationError, LedgerError
from stationkey.keystore.pkcs11.keyfile import encode
from stationkey.keystore.pkcs11.uri import object_uri, token_uri
from stationkey.keystore.registry import KeyStoreUri
from stationkey.ledger.postgresql import inventory as module
from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import Connection, connect
from stationkey.ledger.postgresql.inventory import SiteInventory

pytest_plugins = ["postgresql"]

TOKEN = {"token": "site; a", "manufacturer": "maker", "serial": "1", "model": "m"}
OTHER = {**TOKEN, "serial": "2"}
GIVEN_UP = "SK001"


class Site:
    """The database of a site."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.opened: list[SiteInventory] = []
        self.connection = connect(database.uri, database.password, name="test")
        schema.prepare(self.connection)

    def daemon(self, name: str) -> SiteInventory:
        """The record of a daemon that is alive and has admitted both tokens."""
        made = self.stranger(name)
        for token in (TOKEN, OTHER):
            made.admit(token_uri(token), fits=lambda _: False, reached=lambda _: True)
        return made

    def stranger(self, name: str) -> SiteInventory:
        """The record of a daemon that is alive and has opened no key store."""
        self.see(name, ago=0)
        made = SiteInventory(lambda: connect(self.database.uri, self.database.password, name=name), name)
        self.opened.append(made)
        return made

    def see(self, name: str, *, ago: float, lease: float = 3600) -> None:
        """Let a daemon have been seen so many seconds ago."""
        self.sql(
            "INSERT INTO daemon (instance, name, host, pid, version, schema, shards, lease, backend, seen)"
            " VALUES (%s, '', '', 0, '', 1, 1, %s, 0, clock_timestamp() - make_interval(secs => %s))"
            " ON CONFLICT (instance) DO UPDATE SET lease = EXCLUDED.lease, seen = EXCLUDED.seen RETURNING 1",
            *(name, lease, ago),
        )

    def end(self, name: str) -> None:
        """Let the lease of a daemon be over, and admit no longer that it is in use."""
        self.see(name, ago=3600, lease=0.001)
        self.sql("UPDATE keystore SET noted = noted - interval '1 hour' WHERE instance = %s RETURNING 1", name)

    def sql(self, statement: str, *arguments: object) -> list[tuple[object, ...]]:
        if self.connection.closed:
            self.connection = connect(self.database.uri, self.database.password, name="test")
        return self.connection.execute(statement.encode(), arguments).fetchall()

    def record(self, identifier: bytes) -> int:
        """Record a key of the token in the ledger; return its number."""
        return self.keep("pkcs11", encode(object_uri(TOKEN, identifier)))

    def keep(self, scheme: str, private: bytes) -> int:
        """Record a key in the ledger; return its number."""
        with self.connection.transaction():
            [(number,)] = self.connection.execute(
                "INSERT INTO key (key_id, scheme, key_type, state, created_at, public)"
                " VALUES (gen_random_uuid()::text, %s, '', 'pre-activation', 0, '') RETURNING number",
                (scheme,),
            ).fetchall()
            self.connection.execute("INSERT INTO secret VALUES (%s, %s)", (number, private))
        return int(number)

    def destroy(self, number: int) -> None:
        """Destroy a key in the ledger, a while ago."""
        self.sql("DELETE FROM secret WHERE key_number = %s RETURNING 1", number)
        self.later("2 minutes")

    def later(self, interval: str) -> None:
        """Let all rows be so much older."""
        older = f"ended = ended - '{interval}'::interval, look = look - '{interval}'::interval"
        self.sql(f"UPDATE token_key SET {older} RETURNING 1")

    def on_record(self) -> set[bytes]:
        return {bytes.fromhex(str(one)) for (one,) in self.sql("SELECT id FROM token_key")}


@pytest.fixture
def site(database: Database) -> Iterator[Site]:
    made = Site(database)
    yield made
    for inventory in made.opened:
        inventory.close()
    made.connection.close()


def ended(inventory: SiteInventory) -> list[bytes]:
    return inventory.ended(None, lambda: TOKEN).identifiers


def refusal(site: Site, identifier: bytes) -> str | None:
    with pytest.raises(psycopg.Error) as refused:
        site.record(identifier)
    return refused.value.sqlstate


# The keys.


def test_a_label_is_committed_before_it_is_given_and_most_cost_no_commit(site: Site) -> None:
    inventory, given = site.daemon("a"), set()
    for _ in range(4):
        given.add(inventory.new(TOKEN))
        assert given <= site.on_record()
    assert len(given) == len(site.on_record()) == 4
    inventory.new(TOKEN)
    assert len(site.on_record()) == 4 + 8
    assert site.sql("SELECT DISTINCT maker, token FROM token_key") == [("a", token_uri(TOKEN))]


def test_a_living_key_has_no_row_and_one_destroyed_in_the_ledger_has_one_again(site: Site) -> None:
    inventory = site.daemon("a")
    key = inventory.new(TOKEN)
    number = site.record(key)
    assert key not in site.on_record()
    assert not inventory.end(key)
    assert ended(inventory) == []

    site.destroy(number)
    assert site.sql("SELECT token FROM token_key WHERE ended IS NOT NULL") == [(token_uri(TOKEN),)]
    assert ended(inventory) == [key]
    assert inventory.end(key)
    inventory.drop(key)
    assert key not in site.on_record()


def test_keys_that_are_not_in_a_token_are_none_of_its_business(site: Site) -> None:
    for private in (b"\x30\x82wrapped \x00\xff", b"PKCS8 id=%00;type=private"):
        site.destroy(site.keep("tpm2", private))
    assert site.on_record() == set()


def test_a_key_in_the_making_of_a_living_daemon_is_not_ended(site: Site) -> None:
    one, other = site.daemon("a"), site.daemon("b")
    key = one.new(TOKEN)
    assert other.ended(None, lambda: pytest.fail("the token is opened")).identifiers == []
    site.record(key)


def test_what_a_dead_daemon_made_is_ended_and_can_never_be_recorded(site: Site) -> None:
    one, other = site.daemon("a"), site.daemon("b")
    recorded, lost = one.new(TOKEN), one.new(TOKEN)
    site.record(recorded)
    site.end("a")
    found = ended(other)
    assert lost in found
    assert recorded not in found
    assert refusal(site, lost) == GIVEN_UP
    assert refusal(site, b"never reserved") == GIVEN_UP


def test_a_daemon_that_ended_well_leaves_only_what_is_on_its_way(site: Site) -> None:
    one, other = site.daemon("a"), site.daemon("b")
    key = one.new(TOKEN)
    one.close()
    assert site.on_record() == {key}
    site.sql("DELETE FROM daemon WHERE instance = 'a' RETURNING 1")
    assert ended(other) == [key]


def test_after_an_outage_of_the_server_each_daemon_has_its_leases_to_be_seen_again(site: Site) -> None:
    one, other = site.daemon("a"), site.daemon("b")
    one.new(TOKEN)
    site.see("a", ago=24 * 3600, lease=3600)  # and the other's connection is only seconds old
    assert ended(other) == []


def test_a_key_that_its_own_daemon_did_not_record_in_time_is_ended(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = site.daemon("a")
    recorded, late = inventory.new(TOKEN), inventory.new(TOKEN)
    site.record(recorded)
    assert ended(inventory) == []
    monkeypatch.setattr(module, "_RECORDED_BY", 0.0)
    assert ended(inventory) == [late]
    assert refusal(site, late) == GIVEN_UP


def test_one_daemon_at_a_time_looks_for_a_key_and_only_in_its_own_token(site: Site) -> None:
    one, other = site.daemon("a"), site.daemon("b")
    site.destroy(site.record(one.new(TOKEN)))
    site.destroy(site.record(key := one.new(TOKEN)))
    assert key in ended(one)
    assert ended(other) == []
    third = one.new(TOKEN)
    assert other.end(third)
    assert ended(other) == [third]
    one.drop(third)
    site.later("10 minutes")
    assert other.ended(None, lambda: OTHER).identifiers == []
    assert len(ended(other)) == 2


def test_a_key_that_is_not_found_is_looked_for_again_for_days(site: Site) -> None:
    inventory = site.daemon("a")
    key = inventory.new(TOKEN)
    inventory.close()
    assert inventory.end(key)
    inventory.drop(key, found=False)
    looks = 0
    while key in site.on_record():
        if ended(inventory) == [key]:
            looks += 1
            inventory.drop_missing(key)
        site.later("1 hour")
    assert looks > 40


def test_a_look_that_a_dead_daemon_did_not_finish_is_taken_up_by_another(site: Site) -> None:
    """However old the key is; only a look that was finished is not repeated for as long as the key is old."""
    one, other = site.daemon("a"), site.daemon("b")
    key = one.new(TOKEN)
    one.close()
    assert one.end(key)
    for _ in range(3):
        site.later("8 hours")
        assert ended(one) == [key]
        assert ended(other) == []
        site.later("1 minute")
        assert ended(other) == [key]
        other.drop_missing(key)
        site.later("50 minutes")
        assert ended(one) == ended(other) == []


def test_a_sweep_says_that_there_is_more_to_look_for(site: Site) -> None:
    inventory = site.daemon("a")
    for _ in range(9):
        inventory.end(inventory.new(TOKEN))
    sweeps = [inventory.ended(None, lambda: TOKEN) for _ in range(3)]
    assert [(len(sweep.identifiers), sweep.more) for sweep in sweeps] == [(4, True), (4, True), (1, False)]


def test_a_key_that_nobody_has_looked_for_goes_before_many_that_were_not_found(site: Site) -> None:
    """However many daemons die: each leaves keys in doubt that are looked for again and again."""
    inventory = site.daemon("a")
    for _ in range(8):
        inventory.end(inventory.new(TOKEN))
    for key in [*ended(inventory), *ended(inventory)]:
        inventory.drop_missing(key)
    waiting = inventory.new(TOKEN)
    inventory.end(waiting)
    older = "ended = ended - interval '1 hour', look = look - interval '1 hour'"
    site.sql(f"UPDATE token_key SET {older} WHERE id = %s RETURNING 1", waiting.hex())
    site.later("2 minutes")
    assert waiting in ended(inventory)


def test_a_batch_that_was_given_up_meanwhile_is_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = site.daemon("a"), site.daemon("b")
    one.new(TOKEN)
    site.end("a")
    given_up = ended(other)
    monkeypatch.setattr(module, "_FRESH", 0.0)
    key = one.new(TOKEN)
    assert key not in given_up
    site.record(key)


def test_a_transaction_under_way_keeps_its_key(site: Site) -> None:
    """It holds the row, and is decided first: the sweep passes it by."""
    one, other = site.daemon("a"), site.daemon("b")
    key = one.new(TOKEN)
    one.close()
    site.end("a")
    with connect(site.database.uri, site.database.password, name="slow") as sql, sql.transaction():
        sql.execute("INSERT INTO secret VALUES (1, %s)", (encode(object_uri(TOKEN, key)),))
        assert ended(other) == []
    assert site.on_record() == set()


def test_a_key_on_record_for_another_token_is_not_in_this_one(site: Site) -> None:
    inventory = site.daemon("a")
    key = inventory.new(OTHER)
    assert inventory.is_in(key, OTHER)
    assert not inventory.is_in(key, TOKEN)
    assert inventory.is_in(b"unknown", TOKEN)


def test_a_lost_connection_is_opened_again(site: Site) -> None:
    inventory = site.daemon("a")
    for _ in range(5):
        inventory.new(TOKEN)
    site.connection.close()
    site.database.end_sessions()
    assert {inventory.new(TOKEN) for _ in range(20)} <= site.on_record()


def test_without_the_server_no_label_is_given_and_no_time_is_lost(own_postgresql: Database) -> None:
    site, attempts = Site(own_postgresql), 0
    site.connection.close()

    def counted() -> Connection:
        nonlocal attempts
        attempts += 1
        return connect(site.database.uri, site.database.password, name="a")

    inventory = SiteInventory(counted, "a")
    inventory.admit(token_uri(TOKEN), fits=lambda _: False, reached=lambda _: True)
    own_postgresql.server.kill()
    for _ in range(5):
        with pytest.raises(LedgerError) as refused:
            inventory.new(TOKEN)
        assert (refused.value.reason, refused.value.transient) == ("ledger_unreachable", True)
    assert attempts == 2
    inventory.close()


def test_an_outage_of_the_server_is_waited_for_within_the_time_of_a_request(own_postgresql: Database) -> None:
    site, came_back = Site(own_postgresql), Event()
    site.connection.close()

    def opened() -> Connection:
        if not came_back.is_set():
            came_back.set()
            own_postgresql.server.start()
            raise LedgerError("starting", reason="ledger_unreachable", transient=True)
        return connect(site.database.uri, site.database.password, name="a")

    came_back.set()
    inventory = SiteInventory(opened, "a")
    inventory.admit(token_uri(TOKEN), fits=lambda _: False, reached=lambda _: True)
    own_postgresql.server.kill()
    came_back.clear()
    assert inventory.new(TOKEN, within=30.0)
    inventory.close()


def test_a_token_that_was_exchanged_while_it_was_in_use_gets_no_key(site: Site) -> None:
    with pytest.raises(ConfigurationError) as refused:
        site.daemon("a").new({**TOKEN, "serial": "3"})
    assert refused.value.reason == "keystore_differs"
    assert site.on_record() == set()


# The devices.

TPM = KeyStoreUri.parse("tpm2:device:/dev/tpmrm0")
HSM = KeyStoreUri.parse("pkcs11:token=site%3b%20a?module-path=/hsm.so")


def admit(inventory: SiteInventory, identity: str, *uris: KeyStoreUri) -> str:
    """Admit the device of the first of a daemon's key stores; return why not."""
    try:
        inventory.admit(identity, fits=uris[0].fits, reached=lambda other: any(uri.fits(other) for uri in uris))
    except ConfigurationError as error:
        return error.reason
    return ""


def test_the_first_daemons_tpm_is_the_sites_and_another_of_the_same_model_is_refused(site: Site) -> None:
    assert admit(site.stranger("a"), "tpm2:01", TPM) == ""
    assert admit(site.stranger("b"), "tpm2:01", TPM) == ""  # a second daemon on that machine
    for _ in range(2):
        assert admit(site.stranger("c"), "tpm2:02", TPM) == "keystore_differs"
        assert admit(site.stranger("c"), "software:", KeyStoreUri.parse("software:")) == "keystore_differs"
        assert admit(site.stranger("c"), token_uri(TOKEN), HSM) == "keystore_differs"
    assert site.sql("SELECT DISTINCT identity FROM keystore") == [("tpm2:01",)]


def test_a_device_with_a_living_key_is_the_sites_when_all_its_daemons_are_dead(site: Site) -> None:
    assert admit(site.stranger("a"), "tpm2:01", TPM) == ""
    number = site.keep("tpm2", b"wrapped")
    site.end("a")
    assert admit(site.stranger("b"), "tpm2:02", TPM) == "keystore_differs"
    site.destroy(number)
    assert admit(site.stranger("b"), "tpm2:02", TPM) == ""
    assert admit(site.stranger("a"), "tpm2:01", TPM) == "keystore_differs"


def test_two_tokens_of_one_label_are_two_devices(site: Site) -> None:
    one = site.stranger("a")
    assert admit(one, token_uri(TOKEN), HSM) == ""
    assert admit(site.stranger("b"), token_uri(OTHER), HSM) == "keystore_differs"
    site.record(one.new(TOKEN))
    one.close()
    site.end("a")
    assert admit(site.stranger("b"), token_uri(OTHER), HSM) == "keystore_differs"


def test_a_site_moves_to_another_device_while_the_old_one_is_reached(site: Site) -> None:
    one, two = site.stranger("a"), site.stranger("b")
    assert admit(one, "tpm2:01", TPM) == ""
    assert admit(two, token_uri(TOKEN), HSM, TPM) == ""
    assert admit(two, "tpm2:01", TPM, HSM) == ""
    assert admit(site.stranger("c"), "tpm2:01", TPM) == "keystore_differs"  # it does not reach the new one


def test_of_two_devices_recorded_at_the_same_time_one_is_the_sites(site: Site) -> None:
    results: dict[str, str] = {}
    daemons = {f"tpm2:0{number}": site.stranger(f"daemon {number}") for number in range(4)}
    together = Barrier(len(daemons))

    def try_it(identity: str) -> None:
        together.wait()
        results[identity] = admit(daemons[identity], identity, TPM)

    threads = [Thread(target=try_it, args=(identity,)) for identity in daemons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results.values()) == ["", *["keystore_differs"] * 3]
    assert site.sql("SELECT DISTINCT identity FROM keystore") == [(next(k for k, v in results.items() if not v),)]
