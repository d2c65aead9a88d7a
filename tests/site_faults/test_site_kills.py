"""Daemons of a site killed, cut off and stopped at random under load: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import pytest
from peers import Daemon
from siterig import SiteRig
from sitetruth import PATIENCE, settle

KILLS: Final = int(os.environ.get("STATIONKEY_SITE_KILLS", "0")) or 8
"""How many daemons are killed; the environment may ask for more."""
STATIONS: Final = 200
SHARDS: Final = 8
LOAD: Final = 16
"""How many requests are without an answer at any time."""


@dataclass
class Takeovers:
    """How long stations waited for another daemon, in seconds, by what befell the first."""

    lasted: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, seconds: float) -> None:
        self.lasted.setdefault(what, []).append(seconds)

    def tell(self, rig: SiteRig) -> None:
        """For the table in docs/reliability.md."""
        for what, lasted in self.lasted.items():
            figures = f"median {median(lasted):.2f} s, worst {max(lasted):.2f} s"
            print(f"{what}: {len(lasted)} takeovers, {figures}; lease {rig.lease:g} s")  # noqa: T201


@pytest.mark.long
def test_no_kill_cut_or_stop_of_a_daemon_loses_or_doubles_anything(tmp_path: Path) -> None:
    """Three daemons, eight shards, two hundred stations: daemons are killed and started again under load.

    Between the kills connections to the database are ended, the server is restarted, a daemon is cut off from it, and a
    daemon is stopped until another has its shards, and goes on. Every request is answered, and accepted in the end,
    with one CSR; every key has its record; and the token has the keys on record and no other.
    """
    seed = int(os.environ.get("STATIONKEY_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"STATIONKEY_SEED={seed} {KILLS} kills")  # noqa: T201 - shown where the test fails
    chance = random.Random(seed)
    takeovers = Takeovers()
    with SiteRig(tmp_path, shards=SHARDS, stations=STATIONS) as rig:
        rig.start()
        for number in range(KILLS):
            rig.depot.keep_up(LOAD)
            time.sleep(chance.uniform(0.0, 0.5))  # the moment is what is drawn, not something waited for
            disturb(rig, chance, number, takeovers)
            daemon = chance.choice(rig.daemons)
            stations = rig.stations_of(daemon)
            daemon.kill()
            killed = time.monotonic()
            if chance.random() < 0.5:
                wait_for_takeover(rig, stations, killed)
                note_takeovers(rig, stations, killed, takeovers, "killed")
            daemon.launch()
        keys = settle(rig)
        assert rig.depot.taken >= rig.depot.requests.keys()
        asked, answers = len(rig.depot.requests), sum(map(len, rig.depot.answers.values()))
        rejected = len(rig.depot.rejected)
        takeovers.tell(rig)
    print(f"{KILLS} kills, {asked} requests, {answers} answers, {rejected} rejected at first, {keys} keys")  # noqa: T201


def disturb(rig: SiteRig, chance: random.Random, number: int, takeovers: Takeovers) -> None:
    """Do something else than a kill, now and then."""
    match number % 8:
        case 1:
            rig.cut_backends(chance, share=chance.choice((0.3, 1.0)))
        case 3:
            rig.postgresql.restart()
        case 5:
            line = chance.choice(rig.lines)
            act = chance.choice((line.cut, line.silence))
            act()
            time.sleep(chance.uniform(0.0, 2 * rig.lease))  # how long the network is cut is drawn, too
            line.mend()
        case 7:
            stop_until_its_shards_moved(rig, chance.choice(rig.daemons), takeovers)


def stop_until_its_shards_moved(rig: SiteRig, daemon: Daemon, takeovers: Takeovers) -> None:
    """Stop a daemon, wait until others serve its stations, and let it go on."""
    stations = rig.stations_of(daemon)
    daemon.freeze()
    stopped = time.monotonic()
    wait_for_takeover(rig, stations, stopped)
    note_takeovers(rig, stations, stopped, takeovers, "stopped")
    daemon.thaw()


def wait_for_takeover(rig: SiteRig, stations: Mapping[int, frozenset[str]], since: float) -> None:
    """Wait until a station of each shard has an answer."""
    for names in stations.values():
        rig.depot.publish(min(names))
    for shard, names in stations.items():
        answered = partial(rig.depot.first_answer, names, since)
        rig.depot.wait_for(answered, f"a station of shard {shard} is answered", bound=PATIENCE)


def note_takeovers(
    rig: SiteRig, stations: Mapping[int, frozenset[str]], since: float, takeovers: Takeovers, what: str
) -> None:
    for names in stations.values():
        first = rig.depot.first_answer(names, since)
        assert first is not None
        takeovers.note(what, first - since)
