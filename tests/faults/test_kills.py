"""``kill -9`` at random moments under load: what was said is on record, what is on record works, nothing is lost."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Final

from scene import Scene
from truth import events_brought, judge

KILLS: Final = max(300, int(os.environ.get("STATIONKEY_KILLS", "0")))
"""How many times the daemon is killed; the environment may ask for more."""
LOAD: Final = 8
"""How many requests are without an answer at any time: under load, but the broker is not flooded."""


def test_no_kill_at_a_random_moment_loses_or_doubles_anything(tmp_path: Path) -> None:
    """Every accepted answer has its key, every key its record, every id one CSR, every request its answer.

    A status that was sent meanwhile changes its key once.
    """
    seed = int(os.environ.get("STATIONKEY_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"STATIONKEY_SEED={seed} STATIONKEY_KILLS={KILLS}")  # noqa: T201 - shown where the test fails
    chance = random.Random(seed)
    statuses: dict[str, str] = {}
    installed: set[str] = set()
    with Scene(tmp_path, tpm=True) as scene:
        asker, daemon = scene.asker, scene.daemon
        daemon.start()  # from here on the broker holds a session for it
        daemon.kill()
        asker.keep_up(LOAD)
        for _ in range(KILLS):
            answered = sorted(asker.accepted.keys() - installed)
            for request_id in chance.sample(answered, k=min(1, len(answered))):
                request = asker.requests[request_id]
                asker.publish(request)  # a retry
                if chance.random() < 0.3:
                    assert request.evse_id is not None
                    statuses[asker.tell("installed", evse_id=request.evse_id)] = request_id
                    installed.add(request_id)
            if chance.random() < 0.25:
                daemon.launch()
                moment = chance.uniform(0.0, 0.4)  # while it starts
            else:
                daemon.start()
                moment = chance.uniform(0.0, 0.12)
            time.sleep(moment)  # the moment is what is drawn, not something waited for
            daemon.kill()
        asker.keep_up(0)
        daemon.start()
        asker.wait_for_all()
        asker.ask()  # the broker keeps the order: whatever it held is in hand by now
        daemon.terminate()

        assert asker.taken >= asker.requests.keys() | statuses.keys()
        assert asker.rejected == set()
        assert asker.accepted.keys() == asker.requests.keys()
        judge(scene.state_dir, scene.keystore, asker.accepted)
        assert events_brought(scene.state_dir, statuses) == dict.fromkeys(statuses, 1)
        answers = sum(map(len, asker.answers.values()))
    # For the table in docs/reliability.md.
    print(f"{KILLS} kills, {len(asker.requests)} requests, {answers} answers, {len(statuses)} statuses")  # noqa: T201
