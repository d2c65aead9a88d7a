"""``stationkey requests`` and ``stationkey status``: what is shown of the record and of the daemon."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from reasons import command
from recording import answer

from parts import request
from stationkey.cli import main
from stationkey.cli._table import SHORT_ID, Column, lined_up
from stationkey.ledger import Ledger
from stationkey.ledger.messages import STATUS
from stationkey.system.state_dir import DATABASE_NAME

REJECTED = "123e4567-e89b-12d3-a456-426614174000"
IGNORED = "223e4567-e89b-12d3-a456-426614174000"
WORDS = "a hostile word \x1b[31m, and quite a long one, which no line of eighty columns has room for at all"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of a station with a key, a rejected request and a status that meant no key."""
    with closing(Ledger(tmp_path / DATABASE_NAME)) as ledger:
        answer(ledger)
        ledger.rejections.note(REJECTED, reason="country_name_invalid", message=WORDS, now=2)
        ledger.rejections.note(IGNORED, reason="status_fits_no_key", message="no key", now=3, name=STATUS)
    return tmp_path


def test_each_message_has_its_outcome_reason_and_words(state: Path) -> None:
    shown = command("requests", "--json", "--state-dir", str(state))
    found = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(one["name"], one["outcome"], one["reason"]) for one in found] == [
        ("generate_csr", "accepted", None),
        ("generate_csr", "rejected", "country_name_invalid"),
        ("certificate_installation_status", "ignored", "status_fits_no_key"),
    ]
    assert found[1]["message"] == WORDS
    assert found[0]["certificate_type"]


def test_one_message_is_shown_whole(state: Path) -> None:
    shown = command("requests", REJECTED[:8].upper(), "--state-dir", str(state))
    assert shown.exit_code == 0
    assert REJECTED in shown.stdout
    assert "\x1b" not in shown.stdout
    assert command("requests", "999", "--state-dir", str(state)).reason == "message_not_found"


def test_the_newest_are_shown(state: Path) -> None:
    shown = command("requests", "--limit", "1", "--json", "--state-dir", str(state))
    assert [json.loads(line)["outcome"] for line in shown.stdout.splitlines()] == ["ignored"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The state directory of a site with two stations."""
    (tmp_path / "stationkey.toml").write_text('[site]\nstations = "depot7/+"\n')
    with closing(Ledger(tmp_path / DATABASE_NAME)) as ledger:
        for station in ("depot7/s1", "depot7/s2"):
            answer(ledger, request(request_id=REJECTED), station=station)
            ledger.rejections.note(IGNORED, reason="r", message="m", now=2, station=station)
    return tmp_path


def of_site(site: Path, *arguments: str) -> str:
    shown = command(*arguments, "--config", str(site / "stationkey.toml"), "--state-dir", str(site), COLUMNS="250")
    assert shown.exit_code == 0
    return shown.stdout


def test_keys_are_listed_with_their_station_and_by_it(site: Path) -> None:
    keys = json.loads(of_site(site, "keys", "list", "--json"))
    assert [key["station"] for key in keys] == ["depot7/s1", "depot7/s2"]
    (key,) = json.loads(of_site(site, "keys", "list", "--json", "--station", "depot7/s2"))
    assert key == keys[1]
    heading, line = of_site(site, "keys", "list", "--station", "depot7/s2").splitlines()
    assert heading.split()[1] == "STATION"
    assert line.split()[1] == "depot7/s2"
    assert of_site(site, "keys", "list", "--json", "--station", "depot7/s") == "[]\n"
    assert "depot7/s2" in of_site(site, "keys", "show", key["key_id"])
    assert "CERTIFICATE REQUEST" in of_site(site, "keys", "export-csr", key["key_id"])


def test_requests_are_shown_with_their_station(site: Path) -> None:
    found = [json.loads(line) for line in of_site(site, "requests", "--json").splitlines()]
    assert sorted((one["id"], one["station"]) for one in found) == [
        (message, station) for message in (REJECTED, IGNORED) for station in ("depot7/s1", "depot7/s2")
    ]
    assert of_site(site, "requests").count("depot7/s1") == 2


def test_the_status_names_stations(site: Path) -> None:
    shown = command("status", "--json", "--config", str(site / "stationkey.toml"), "--state-dir", str(site))
    found = json.loads(shown.stdout)
    assert sorted(key["station"] for key in found["keys"]) == ["depot7/s1", "depot7/s2"]
    assert {one["station"] for one in found["happenings"]} == {"depot7/s1", "depot7/s2"}
    shown = command("status", "--config", str(site / "stationkey.toml"), "--state-dir", str(site), COLUMNS="200")
    assert shown.stdout.count("depot7/s1") == 3
    assert shown.stdout.count("STATION") == 2


def test_a_single_station_is_not_named(state: Path) -> None:
    for arguments in (("keys", "list"), ("keys", "list", "--json"), ("requests",), ("requests", "--json"), ("status",)):
        shown = command(*arguments, "--state-dir", str(state), COLUMNS="250").stdout.lower()
        assert "station " not in shown.replace("station key", "")
        assert '"station"' not in shown


@pytest.mark.parametrize("columns", [80, 60, 200])
@pytest.mark.parametrize("arguments", [("requests",), ("status",), ("keys", "list")])
def test_a_list_fits_its_terminal(state: Path, arguments: tuple[str, ...], columns: int) -> None:
    shown = command(*arguments, "--state-dir", str(state), COLUMNS=str(columns))
    assert shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= max(columns, len(str(state)) + 20)
    assert "\x1b" not in shown.stdout


def test_80_columns_have_room_for_why_a_request_was_rejected(state: Path) -> None:
    shown = command("requests", "--state-dir", str(state)).stdout.splitlines()
    (at,) = (number for number, line in enumerate(shown) if REJECTED[:SHORT_ID] in line)
    why = " ".join(line.strip() for line in shown[at + 1 :])
    assert why.startswith("country_name_invalid: a hostile word")
    assert "has room for at all" in why


def test_what_comes_later_stands_below_what_was_there() -> None:
    later = lined_up((Column("A"), Column("B")), [[("a", "b", "note")], [("long", "b")]], empty="none")
    assert "".join(later) == "A  B\na  b\n  note\nlong  b\n"
    assert "".join(lined_up((Column("A"),), [], empty="none")) == "none\n"


def test_a_wide_terminal_gets_more_columns(state: Path) -> None:
    narrow, wide = (command("keys", "list", "--state-dir", str(state), COLUMNS=size).stdout for size in ("60", "200"))
    assert len(narrow.split("\n")[0].split()) < len(wide.split("\n")[0].split())


def test_the_status_of_a_station_without_a_daemon_comes_from_its_ledger(state: Path) -> None:
    shown = command("status", "--json", "--state-dir", str(state))
    found = json.loads(shown.stdout)
    assert (shown.exit_code, found["daemon"], found["healthy"]) == (1, "not running", False)
    assert [key["state"] for key in found["keys"]] == ["pre-activation"]
    assert [one["event"] for one in found["happenings"]] == ["rejected", "CSR answered"]
    missing = json.loads(command("status", "--json", "--state-dir", str(state / "none")).stdout)
    assert (missing["keys"], missing["ledger"] == "ok") == ([], False)


@pytest.mark.parametrize("arguments", [["keys", "show"], ["attest"]])
def test_a_shell_completes_the_ids_of_keys(
    state: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (key,) = json.loads(command("keys", "list", "--json", "--state-dir", str(state)).stdout)
    given = [*arguments, "--state-dir", str(state)]
    completed = ShellComplete(main, {}, "stationkey", "_STATIONKEY_COMPLETE").get_completions(given, key["key_id"][:4])
    assert [item.value for item in completed] == [key["key_id"]]
    assert ShellComplete(main, {}, "stationkey", "_STATIONKEY_COMPLETE").get_completions(given, "none") == []
    file = tmp_path / "stationkey.toml"
    file.write_text(f'state_dir = "{state}"\n')
    monkeypatch.setattr("stationkey.config.file.SYSTEM_FILE", file)
    monkeypatch.delenv("STATIONKEY_CONFIG", raising=False)
    named = ShellComplete(main, {}, "stationkey", "_STATIONKEY_COMPLETE").get_completions(arguments, key["key_id"][:4])
    assert [item.value for item in named] == [key["key_id"]]
