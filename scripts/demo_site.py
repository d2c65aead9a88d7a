"""``make demo-site``: three daemons serve twenty stations, one of them is killed, and the others go on.

PostgreSQL keeps the ledger, a PKCS#11 token that all daemons reach keeps the keys; and all of it is gone again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from demo import STATIONKEY, openssl_verifies, perform
from depot import Depot
from peers import Daemon, Mosquitto, Postgresql, SharedToken
from rich.console import Console
from rich.table import Table

from stationkey.ledger.postgresql.slots import shard_of

DAEMONS: Final = ("A", "B", "C")
VICTIM: Final = "B"
STATIONS: Final = tuple(f"depot7/s{number:02}" for number in range(1, 21))
SHARDS: Final = 6
LEASE: Final = 2
ROUNDS: Final = 4
"""Requests of each station while a daemon is killed."""
BOUND: Final = 30.0
"""Seconds after which what is waited for has failed."""
CONFIG: Final = """\
ledger = "{ledger}"
ledger_password_file = "{password}"
[site]
stations = "depot7/+"
shards = {shards}
lease_seconds = {lease}
"""


class Site:
    """The daemons, and what the command says of them.

    Args:
        folder: where they keep their files.
        broker: the broker.
        postgresql: the database.
        token: the token.
    """

    def __init__(self, folder: Path, broker: Mosquitto, postgresql: Postgresql, token: SharedToken) -> None:
        self.daemons: dict[str, Daemon] = {}
        self._names: dict[str, str] = {}
        self._config = folder / "stationkey.toml"
        self._config.write_text(
            CONFIG.format(ledger=postgresql.uri, password=postgresql.password_file, shards=SHARDS, lease=LEASE)
        )
        for name in DAEMONS:
            state_dir = folder / name
            daemon = Daemon(
                folder / f"log-{name}",
                *("--site", "--broker", broker.url, "--keystore", token.uri),
                *("--state-dir", str(state_dir), "--config", str(self._config)),
            )
            daemon.environment = token.clients
            self.daemons[name] = daemon
            self._names[str(state_dir)] = name

    def status(self) -> dict[str, Any]:
        """``stationkey status --site --json``."""
        done = subprocess.run(
            [*STATIONKEY, "status", "--site", "--json", "--config", str(self._config)],
            capture_output=True,
            text=True,
            check=False,
        )
        if not done.stdout:
            raise RuntimeError(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def holders(self, status: dict[str, Any]) -> dict[int, str]:
        """The letter of the daemon that holds each shard; empty where none does."""
        return {shard["number"]: self.letter(shard["holder"]) for shard in status["shards"]}

    def letter(self, holder: str | None) -> str:
        """The letter of a daemon, by the name that the site knows it by."""
        return next((name for path, name in self._names.items() if holder and holder.endswith(path)), "")

    def until_held(self, by: int) -> dict[str, Any]:
        """Wait until every shard is held, by so many daemons."""
        end = time.monotonic() + BOUND
        while True:
            status = self.status()
            holders = self.holders(status)
            if len(holders) == SHARDS and all(holders.values()) and len(set(holders.values())) == by:
                return status
            if time.monotonic() > end:
                raise RuntimeError(f"the shards are not held: {holders}")
            time.sleep(0.1)  # the command is the only one to tell


def show(console: Console, site: Site, status: dict[str, Any]) -> None:
    """A row for each shard."""
    table = Table(box=None, pad_edge=False)
    for heading in ("shard", "daemon", "epoch", "stations", "undelivered"):
        table.add_column(heading, justify="left" if heading == "daemon" else "right")
    for shard in status["shards"]:
        cells = (shard["number"], site.letter(shard["holder"]) or "-", shard["epoch"], shard["stations"])
        table.add_row(*map(str, cells), str(shard["undelivered"]))
    console.print(table)
    console.print()


def kill_in_the_middle(console: Console, site: Site, depot: Depot, before: dict[int, str]) -> bool:
    """Ask, kill the daemon while it answers, and show who took over, and when."""
    lost = sorted(shard for shard, holder in before.items() if holder == VICTIM)
    orphans = frozenset(station for station in STATIONS if shard_of(station, SHARDS) in lost)
    asked = [depot.publish(station) for _ in range(ROUNDS) for station in STATIONS]
    depot.wait_for(lambda: len(depot.open) <= len(asked) * 3 // 4, "a quarter is answered", bound=BOUND)
    site.daemons[VICTIM].kill()
    killed = time.monotonic()
    left = len(depot.open)
    console.print(f"kill -9 of {VICTIM}, with {left} of {len(asked)} requests unanswered:")
    depot.wait_for_all(bound=BOUND)
    took = time.monotonic() - killed
    after = site.holders(site.until_held(len(DAEMONS) - 1))
    for shard in lost:
        console.print(f"  shard {shard}: taken over by {after[shard]}")
    first = depot.first_answer(orphans, killed)
    if first is not None:
        console.print(f"  first answer to one of their stations after {first - killed:.1f} s")
    console.print(f"  all {len(asked)} answered {took:.1f} s after the kill\n")
    return all(after[shard] not in {"", VICTIM} for shard in lost)


def keys_in(token: SharedToken) -> int:
    """How many private keys the token has, as another program sees it."""
    import pkcs11  # noqa: PLC0415 - it reads the environment that is set by then

    opened = pkcs11.lib(str(token.client_module())).get_token(token_label=token.label)
    while True:
        try:
            with opened.open(user_pin=token.pin) as session:
                return sum(1 for _ in session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY}))
        except pkcs11.exceptions.ObjectHandleInvalid:
            continue  # a daemon destroyed it meanwhile


def judge(console: Console, depot: Depot, token: SharedToken) -> bool:
    """Whether each request was accepted with one CSR that verifies, and the token has a key for each and no other."""
    accepted = depot.accepted  # fails if there were two
    verified = sum(map(openssl_verifies, accepted.values()))
    console.print(
        f"{len(depot.requests)} requests, {len(accepted)} accepted, each with one CSR, {verified} verified by openssl."
    )
    keys = keys_in(token)
    end = time.monotonic() + BOUND
    if left := keys - len(accepted):
        console.print(
            f"{left} keys that {VICTIM} was making when it died are still in the token: swept after 3 leases."
        )
    while keys > len(accepted) and time.monotonic() < end:
        time.sleep(0.2)  # nobody else tells what is in a token
        keys = keys_in(token)
    console.print(f"{keys} keys are in the token.\n")
    return len(depot.requests) == len(accepted) == verified == len(set(accepted.values())) == keys


def play(console: Console, folder: Path) -> bool:
    """Run the site; whether everything was as it should be."""
    with ExitStack() as running:
        postgresql = running.enter_context(Postgresql(folder / "postgresql"))
        broker = running.enter_context(Mosquitto(folder / "broker"))
        token = running.enter_context(SharedToken(folder / "token"))
        os.environ.update(token.clients)
        site = Site(folder, broker, postgresql, token)
        for daemon in site.daemons.values():
            running.callback(daemon.kill)
            daemon.launch()
        depot = running.enter_context(Depot(broker, STATIONS))
        console.print(
            f"PostgreSQL at port {postgresql.port}, Mosquitto at {broker.port}, a PKCS#11 token (SoftHSM) that all"
            f" reach, and the daemons {', '.join(DAEMONS)}. {len(STATIONS)} stations are cut into {SHARDS} shards.\n"
        )
        status = site.until_held(len(DAEMONS))
        show(console, site, status)
        started = time.monotonic()
        for station in STATIONS:
            depot.publish(station)
        depot.wait_for_all(bound=BOUND, again=2.0)  # a new shard may just be subscribing
        console.print(f"Each station asked once: {len(STATIONS)} answers in {time.monotonic() - started:.1f} s.\n")
        right = kill_in_the_middle(console, site, depot, site.holders(status))
        site.daemons[VICTIM].launch()
        console.print(f"{VICTIM} is started again, and takes its share:\n")
        show(console, site, site.until_held(len(DAEMONS)))
        return judge(console, depot, token) and right


if __name__ == "__main__":
    sys.exit(perform(play))
