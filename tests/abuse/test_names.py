"""Hostile names: as the name of a file, on a terminal, in a log; from MQTT, or in a ledger that was tampered with."""

from __future__ import annotations

import json
import os
import sqlite3
import string
import subprocess
import sys
import unicodedata
import uuid
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outside import Josev, Station, generate_csr, run, software_station
from peers import Mosquitto
from station import Elsewhere, a_ledger

from parts import STATION, V2G
from stationkey.contract.active_names import DIRECTORY_NAME, ActiveName, Owner, file_name, read_name
from stationkey.contract.profiles import EVSE_ID_PATTERN, CertificateType
from stationkey.system.state_dir import DATABASE_NAME

NAME_MAX = 255
"""Bytes of a file name [limits.h], on every file system that a station has."""

evse_ids = st.from_regex(EVSE_ID_PATTERN.removesuffix("$") + r"\Z")
stations = st.just("") | st.text(min_size=1, max_size=64).filter(lambda name: len(name.encode()) <= 64)
owners = st.builds(Owner, stations, st.sampled_from([str(name) for name in CertificateType]), st.just("") | evse_ids)

HOSTILE_EVSE_IDS = {
    "the folder above": "..",
    "a way out": "../../../../etc/cron.d/x",
    "a way out behind what is right": "DE*ABC*E1/../../../x",
    "an absolute path": "/etc/cron.d/x",
    "NUL": "DE*ABC*E1\0.pem",
    "an encoded slash": "DE*ABC*E%2f..%2f",
    "a slash of full width": "DE*ABC*E\uff0f1",
    "very long": "DE*ABC*E" + "1" * 5000,
    "one too long": "DE*ABC*E" + "1" * 31,
    "letters of another script": "D\u0415*ABC*E1",
    "a combining mark": "DE*ABC*E1\u0301",
    "a line feed at the end": "DE*ABC*E1\n",
    "a name of Windows": "CON",
    "the lock": ".lock",
    "an unfinished file": "DE*ABC*E1.pem.new",
    "a hidden file": ".DE*ABC*E1",
    "an option": "--DE*ABC*E1",
    "the backslash": "DE*ABC*E\\..\\x",
    "nothing": "",
}


# As the name of a file.


@given(owners)
def test_a_file_of_any_evse_is_one_short_plain_name(owner: Owner) -> None:
    name = file_name(owner)

    assert len(name + ".new") <= NAME_MAX
    assert set(name) <= set(string.ascii_letters + string.digits + "_.%-~")
    # So it is neither hidden, nor an option, nor the lock.
    assert name.startswith(("station-", "station_") if owner.station else owner.certificate_type)
    assert name.endswith(".pem")  # so it is never another's unfinished file
    if not owner.station:
        assert unquote(name) == f"{owner.certificate_type}{'.' if owner.evse_id else ''}{owner.evse_id}.pem"


@given(owners, owners)
def test_two_evses_have_two_files_also_where_only_the_case_of_a_letter_differs(one: Owner, other: Owner) -> None:
    """On a file system that tells them apart, which is what a state directory must be on."""
    assert (file_name(one) == file_name(other)) == (one == other)
    assert file_name(one) != file_name(one._replace(evse_id=one.evse_id.swapcase())) or not one.evse_id


def test_the_longest_name_has_room_for_the_longest_station() -> None:
    for station in ("s" * 64, "/" * 64, "\u00fc" * 32):
        owner = Owner(station, str(STATION), LONGEST)
        name = file_name(owner, root="0" * 16, previous=True)
        assert len(name + ".new") <= NAME_MAX
        assert read_name(name) == ActiveName(owner, root="0" * 16, previous=True)


def status(verb: str, evse_id: str) -> dict[str, object]:
    return {
        "id": str(uuid.uuid4()),
        "name": "certificate_installation_status",
        "type": "update",
        "data": {"certificate_type": str(V2G), "status": verb, "evse_id": evse_id},
    }


LONGEST = "DE*ABC*E" + "*" * 30
"""The EVSE ID with the longest file name: each asterisk is three characters there."""


class WatchedStation(Station):
    """A station that tells what it writes to."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        super().__init__(folder, *arguments, PYTHONDONTWRITEBYTECODE="1")
        self.notes = folder / "notes"
        self.run_by(sys.executable, str(Path(__file__).parent / "watched_daemon.py"), str(self.notes))

    @property
    def changed(self) -> list[str]:
        return [os.fsdecode(path) for path in self.notes.read_bytes().split(b"\0") if path]


def test_no_name_that_comes_over_mqtt_has_anything_written_outside_the_state_directory(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    """With the paths that the daemon wrote to by its own account, and a look at the folder that it was started in."""
    elsewhere = Elsewhere(tmp_path / "elsewhere")
    options = ("--broker", mosquitto.url, "--keystore", "software:", "--allow-software-keys")
    with WatchedStation(tmp_path, *options) as station, Josev(mosquitto) as josev:
        before = {path.name for path in tmp_path.iterdir()}
        for evse_id in HOSTILE_EVSE_IDS.values():
            request = generate_csr(certificate_type=str(V2G), evse_id=evse_id)
            assert josev.ask(request).data == {"status": "rejected"}
            (event,) = station.wait_for("rejected", request_id=request["id"])
            assert event["reason"] == "evse_id_invalid"
            josev.publish(status("installed", evse_id))
        for evse_id in (LONGEST, "de*abc*e1", "DE*ABC*E1", "DEABCECON"):
            josev.ask(generate_csr(certificate_type=str(V2G), evse_id=evse_id))
            josev.publish(status("installed", evse_id))
        station.wait_for("written", count=4)
        station.stop()
        active = station.state_dir / DIRECTORY_NAME
        written = {path.name for path in active.iterdir()}

        assert written == {".lock"} | {
            file_name(Owner("", str(V2G), evse_id)) for evse_id in (LONGEST, "de*abc*e1", "DE*ABC*E1", "DEABCECON")
        }
        outside = [path for path in station.changed if not Path(path).is_relative_to(station.state_dir)]
        assert [path for path in outside if "/.coverage" not in path] == []  # where what is run is measured
        assert len(station.changed) > 10
    assert {path.name for path in tmp_path.iterdir()} == before
    assert elsewhere.untouched


# On a terminal and in a log.

HOSTILE_NAMES = {
    "an escape sequence that clears the screen": "\x1b[2J\x1b[H",
    "one that sets the title": "\x1b]0;title\x07",
    "the eight-bit form": "\x9b31m",
    "a carriage return": "good\rbad",
    "a line that looks like a log's": "x\n2026-01-01T00:00:00.000Z INFO    accepted request_id=1",
    "a line of JSON": 'x"}\n{"event": "accepted"}',
    "writing from right to left": "\u202egpj.exe",
    "an isolate": "\u2066x\u2069",
    "a line separator": "x\u2028y",
    "a byte order mark": "\ufeffx",
    "a backspace": "abc\b\b\bxyz",
    "half a character": "\ud800",
    "NUL": "a\0b",
}


def is_plain(line: str) -> bool:
    """Whether a terminal shows a line as it is: nothing that moves, hides or turns round."""
    return all(unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for character in line)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_name_that_comes_over_mqtt_forges_a_line_of_the_log_or_moves_the_terminal(
    tmp_path: Path, mosquitto: Mosquitto, log_format: str
) -> None:
    options = ("--broker", mosquitto.url, "--keystore", "software:", "--allow-software-keys")
    with Station(tmp_path, *options, log_format=log_format) as station, Josev(mosquitto) as josev:
        for field in ("common_name", "organization_name", "country_name", "evse_id", "certificate_type", "algorithm"):
            for name in HOSTILE_NAMES.values():
                assert josev.ask(generate_csr(**{field: name})).data == {"status": "rejected"}
        for name in HOSTILE_NAMES.values():
            josev.publish({"id": name, "name": "generate_csr", "type": "request", "data": {}})
            josev.publish({**status("installed", "DE*ABC*E1"), "name": "generate_csr", name: name})
            josev.publish(status("installed", name))
        station.wait_for_lines(lambda seen: len(seen) > 6 * len(HOSTILE_NAMES))
        station.stop()
        lines = station.lines

    assert [line for line in lines if not is_plain(line)] == []
    if log_format == "json":
        assert all(set(json.loads(line)) >= {"time", "level", "event"} for line in lines)
    else:
        assert all(line[4] == "-" and line[23] == "Z" for line in lines)  # each begins with its time
    assert not any("request_id=1" in line and "INFO" in line[:40] for line in lines)
    with closing(sqlite3.connect(station.state_dir / DATABASE_NAME)) as ledger:
        messages = [row[0] for row in ledger.execute("SELECT message FROM rejection")]
    assert len(messages) == 6 * len(HOSTILE_NAMES)
    assert [message for message in messages if not (is_plain(message) and message.isascii())] == []


def test_no_name_in_a_tampered_ledger_moves_the_terminal_of_whoever_lists_the_keys(tmp_path: Path) -> None:
    """Whoever took over the daemon's user can write what he likes there; root's terminal is not his."""
    name = "|".join(HOSTILE_NAMES.values()).replace("\ud800", "\ufffd")  # SQLite takes no half of a character
    key_id = a_ledger(tmp_path / "state")
    with closing(sqlite3.connect(tmp_path / "state" / DATABASE_NAME)) as ledger, ledger:
        ledger.execute(
            "UPDATE key SET common_name = ?1, organization_name = ?1, country_name = ?1, evse_id = ?1, algorithm = ?1,"
            " certificate_type = ?1, scheme = ?1, key_type = ?1, key_id = key_id || ?1",
            (name,),
        )
        ledger.execute("UPDATE event SET event = ?1, state = ?1, reason = ?1, message_id = ?1", (name,))
        ledger.execute("UPDATE answer SET request_id = ?1", (name,))
    commands = [
        ["list"],
        ["list", "--json"],
        ["show", key_id],
        ["show", key_id, "--json"],
        ["history", key_id],
        ["history", key_id, "--json"],
        ["destroy", key_id],
        ["retire", key_id],
        ["show", name.replace("\0", "")],
    ]
    for command in commands:
        ended = run("keys", *command, "--state-dir", str(tmp_path / "state"))
        assert "Traceback" not in ended.stderr
        assert [line for line in (ended.stdout + ended.stderr).split("\n") if not is_plain(line)] == []


def test_a_name_that_is_right_is_the_same_in_the_csr_and_shown_with_what_is_invisible_as_its_number(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    """Joiners belong to the spelling of words, and are in the CSR byte for byte."""
    name = "\U0001f468\u200d\U0001f469 Żółć"
    with software_station(tmp_path, mosquitto) as station, Josev(mosquitto) as josev:
        csr = josev.ask(generate_csr(common_name=name)).csr
        station.stop()
    shown = subprocess.run(
        ["openssl", "req", "-noout", "-subject", "-nameopt", "utf8,-esc_msb,sname,sep_comma_plus"],
        input=csr,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    listed = run("keys", "list", "--state-dir", str(station.state_dir), COLUMNS="200").stdout

    assert f"CN={name}" in shown.replace(" = ", "=")
    assert "\U0001f468\\u200d\U0001f469 Żółć" in listed
