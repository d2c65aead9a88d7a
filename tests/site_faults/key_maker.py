"""The key store of a daemon of a site, by itself: ``key_maker.py INSTANCE LEDGER PASSWORD_FILE KEYSTORE STATE_DIR``.

Each line of its input is an order, and is answered by a line:

- ``make``, ``make before`` or ``make after``: make a key; stop (SIGSTOP) before or after the token makes it.
- ``record``: record the key made last in the ledger. The answer is the SQLSTATE if that is refused.
- ``end``: destroy it in the ledger only.
- ``destroy``: destroy it in the token.
- ``sweep``: destroy what other daemons left; the answer is how many keys.
- ``work SEED``: do all of this by chance until killed, seen by the others.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from stationkey.config.secrets import SecretReference
from stationkey.contract.profiles import Algorithm
from stationkey.errors import StationKeyError
from stationkey.keystore import KeyRef, Sweeping, keystore_opener
from stationkey.keystore.pkcs11 import keys
from stationkey.ledger.postgresql.connection import connect
from stationkey.ledger.postgresql.inventory import SiteInventory

LEASE = 0.2
"""Seconds, of one that works until it is killed; another one's does not end."""


class KeyMaker:
    """The key store, and a connection to the ledger."""

    def __init__(self, instance: str, ledger: str, password: str, keystore: str, state_dir: str) -> None:
        def opened(name: str) -> Any:
            return connect(ledger, SecretReference(password), name=name)

        self.instance = instance
        self.ledger = opened("ledger")
        self.be_seen(86400.0)
        inventory = SiteInventory(lambda: opened("inventory"), instance)
        self.store = keystore_opener(keystore, state_dir=Path(state_dir), inventory=inventory)()
        inventory.admit(self.store.identity, fits=lambda _: True, reached=lambda _: True)
        self.key: KeyRef | None = None
        self.recorded: list[tuple[int, KeyRef]] = []

    def be_seen(self, lease: float) -> None:
        self.ledger.execute(
            "INSERT INTO daemon (instance, name, host, pid, version, schema, shards, lease, backend)"
            " VALUES (%s, '', '', 0, '', 1, 1, %s, 0)"
            " ON CONFLICT (instance) DO UPDATE SET seen = clock_timestamp(), lease = EXCLUDED.lease",
            (self.instance, lease),
        )

    def make(self, moment: str = "") -> str:
        generate = keys.generate

        def stopping(*arguments: Any, **options: Any) -> bytes:
            if moment == "before":
                os.kill(os.getpid(), signal.SIGSTOP)
            made = generate(*arguments, **options)
            if moment == "after":
                os.kill(os.getpid(), signal.SIGSTOP)
            return made

        keys.generate = stopping
        try:
            self.key = self.store.generate(Algorithm.ECDSA_SHA256)
        finally:
            keys.generate = generate
        return self.key.key_id

    def record(self) -> str:
        assert self.key is not None
        try:
            with self.ledger.transaction():
                row = self.ledger.execute(
                    "INSERT INTO key (key_id, scheme, key_type, state, created_at, public)"
                    " VALUES (%s, 'pkcs11', %s, 'pre-activation', 0, %s) RETURNING number",
                    (self.key.key_id, str(self.key.key_type), self.key.public),
                ).fetchone()
                assert row is not None
                self.ledger.execute("INSERT INTO secret VALUES (%s, %s)", (row[0], self.key.private))
        except psycopg.Error as error:
            return error.sqlstate or type(error).__name__
        self.recorded.append((row[0], self.key))
        return "recorded"

    def end(self) -> str:
        number, _ = self.recorded[-1]
        self.ledger.execute("DELETE FROM secret WHERE key_number = %s", (number,))
        return "ended"

    def destroy(self) -> str:
        _, key = self.recorded.pop()
        self.store.destroy(key)
        return "destroyed"

    def sweep(self) -> str:
        assert isinstance(self.store, Sweeping)
        destroyed, more = 0, True
        while more:
            swept = self.store.sweep(None)
            destroyed, more = destroyed + swept.destroyed, swept.more
        return str(destroyed)

    def work(self, seed: str) -> str:
        chance = random.Random(int(seed))
        while True:
            self.be_seen(LEASE)
            try:
                self.make()
                if chance.random() < 0.8:
                    self.record()
                if self.recorded and chance.random() < 0.5:
                    self.end()
                    self.destroy()
                if chance.random() < 0.3:
                    self.sweep()
            except StationKeyError as error:
                sys.stderr.write(f"{error}\n")  # its lease was over, in a moment without the processor


def say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def main() -> None:
    maker = KeyMaker(*sys.argv[1:])
    say("ready")
    for line in sys.stdin:
        order, *arguments = line.split()
        act: Callable[..., str] = getattr(maker, order)
        say(act(*arguments))


if __name__ == "__main__":
    main()
