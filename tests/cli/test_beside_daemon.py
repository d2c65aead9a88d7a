"""``stationkey status`` and ``requests`` beside a real daemon, and after it has stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import Daemon, Mosquitto, free_port
from reasons import Ended, command

ASK = ("request", "v2g_certificate", "--common-name", "DE-ABC-S-1", "--organization-name", "EcoG", "--country-name")


def test_what_the_daemon_answers_is_followed_found_by_its_id_and_there_after_it_stops(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    state, config = tmp_path / "state", tmp_path / "stationkey.toml"
    config.write_text(f'state_dir = "{state}"\n[metrics]\nlisten = "127.0.0.1:{free_port()}"\n')
    file = ("--config", str(config))

    def ask(country: str) -> Ended:
        return command(*ASK, country, "--broker", mosquitto.url)

    def status() -> tuple[int, dict[str, Any]]:
        shown = command("status", "--json", *file)
        return shown.exit_code, json.loads(shown.stdout)

    with ExitStack() as running:
        options = ("--broker", mosquitto.url, "--keystore=software:", "--allow-software-keys", *file)
        running.enter_context(Daemon(tmp_path / "daemon", *options))
        assert ask("DE").exit_code == 0
        following = [sys.executable, "-m", "stationkey", "requests", "--follow", "--json", *file]
        follow = running.enter_context(subprocess.Popen(following, stdout=subprocess.PIPE, text=True))
        running.callback(follow.kill)
        assert follow.stdout is not None
        first = json.loads(follow.stdout.readline())
        assert (first["outcome"], first["certificate_type"]) == ("accepted", "v2g_certificate")

        refused = ask("DEU")
        assert refused.exit_code == 3
        news = json.loads(follow.stdout.readline())
        assert (news["outcome"], news["reason"]) == ("rejected", "country_name_invalid")
        assert f"stationkey requests {news['id']}" in refused.stderr  # words: the command to type
        assert ask("DE").exit_code == 0
        second = json.loads(follow.stdout.readline())
        assert second["outcome"] == "accepted"
        follow.send_signal(signal.SIGINT)
        assert follow.wait() == 130

        exit_code, beside = status()
        assert (exit_code, beside["daemon"], beside["healthy"]) == (0, "running", True)
        assert beside["health"]["broker"]["connected"]
        assert beside["configuration"] == str(config)

    exit_code, after = status()
    assert (exit_code, after["daemon"], after["health"]) == (1, "not running", None)
    assert after["keys"] == beside["keys"]
    assert {key["key_id"] for key in after["keys"]} == {first["key_id"], second["key_id"]}
    assert after["happenings"] == beside["happenings"]
    (found,) = command("requests", news["id"], "--json", *file).stdout.splitlines()
    assert json.loads(found) == news
