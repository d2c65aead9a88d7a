"""``kill -9`` at random moments under load: what was said is on record, what is on record works, nothing is lost."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pytest
from scene import CONFIG, Scene
from softhsm import Token
from truth import events_brought, judge, keys_with_an_owner, sweep

KILLS: Final = max(300, int(os.environ.get("STATIONKEY_KILLS", "0")))
"""How many times the daemon is killed; the environment may ask for more."""
LOAD: Final = 8
"""How many requests are without an answer at any time: under load, but the broker is not flooded."""
POOLED_KILLS: Final = max(60, int(os.environ.get("STATIONKEY_KILLS", "0")) // 5)
"""The same of a daemon that makes keys ahead."""
TOKEN_KILLS: Final = int(os.environ.get("STATIONKEY_KILLS", "0")) or 12
"""The same of a daemon with its keys in a PKCS#11 token."""
PATIENT: Final = CONFIG.replace("ec = 2.0", "ec = 20.0")
"""With a deadline that requests meet on a busy machine, too."""
POOL: Final = "[pool]\nec = 6\nrsa = 0\nidle_seconds = 0.0\n"


@pytest.mark.long
def test_no_kill_at_a_random_moment_loses_or_doubles_anything(tmp_path: Path) -> None:
    """Every accepted answer has its key, every key its record, every id one CSR, every request its answer.

    A status that was sent meanwhile changes its key once.
    """
    kill_at_random(tmp_path, kills=KILLS)


@pytest.mark.long
def test_no_kill_at_a_random_moment_loses_or_doubles_a_key_made_ahead(tmp_path: Path) -> None:
    """The same, and no key made ahead has two owners; some of those that were answered had been made ahead."""
    state_dir = kill_at_random(tmp_path, kills=POOLED_KILLS, config=PATIENT + POOL, ahead=True)
    assert keys_with_an_owner(state_dir)


@pytest.mark.long
def test_no_kill_at_a_random_moment_loses_or_leaves_a_key_in_a_token(tmp_path: Path) -> None:
    """The same, and the token has the keys on record and no other of ours. It goes on while the daemon is away.

    No RSA key is made ahead: it would hold up all others, as SoftHSM is not quicker than this processor.
    """
    token = Token.make("kills", tmp_path)
    config = PATIENT + "[pool]\nrsa = 0\n"
    with token.apart() as keystore:
        state_dir = kill_at_random(
            tmp_path / "station", kills=TOKEN_KILLS, moments=0.5, config=config, keystore=keystore
        )
        keys = sweep(state_dir, keystore)  # as the next start would
    assert keys > 0
    assert Counter(kind for kind, _ in token.objects()) == {"Private": keys, "Public": keys}
    token.remove()


def kill_at_random(
    folder: Path, *, kills: int, moments: float = 0.12, config: str = PATIENT, ahead: bool = False, keystore: str = ""
) -> Path:
    """Kill a daemon under load again and again, then hold what it left against what it said; its state directory.

    Each kill comes within `moments` seconds after the start. With keys made `ahead` the load begins a while after the
    daemon, so that they are there to be asked for.
    """
    seed = int(os.environ.get("STATIONKEY_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"STATIONKEY_SEED={seed} {kills} kills")  # noqa: T201 - shown where the test fails
    chance = random.Random(seed)
    statuses: dict[str, str] = {}
    installed: set[str] = set()
    folder.mkdir(exist_ok=True)
    with Scene(folder, tpm=not keystore, keystore=keystore) as scene:
        scene.config.write_text(config)
        asker, daemon = scene.asker, scene.daemon
        daemon.start()  # from here on the broker holds a session for it
        daemon.kill()
        for _ in range(kills):
            asker.keep_up(0 if ahead else LOAD)
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
                moment = chance.uniform(0.0, moments)
            time.sleep(moment)  # the moment is what is drawn, not something waited for
            if ahead:
                asker.keep_up(LOAD)
                time.sleep(chance.uniform(0.0, 0.12))
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
        taken = len(keys_with_an_owner(scene.state_dir))
    # For the table in docs/reliability.md.
    print(f"{kills} kills, {len(asker.requests)} requests, {answers} answers, {len(statuses)} statuses")  # noqa: T201
    print(f"{taken} requests were served with keys made ahead")  # noqa: T201
    return scene.state_dir
