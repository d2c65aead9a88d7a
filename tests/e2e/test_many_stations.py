"""A site on one machine: one daemon with SQLite and twenty stations, seen from outside."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from asker import until
from depot import Asked, Depot
from outside import Station, generate_csr, run, software_station
from peers import Mosquitto

from stationkey.contract.messages import GenerateCsrData
from stationkey.contract.messages import generate_csr as csr_request
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.system.state_dir import DATABASE_NAME

STATIONS: Final = [f"depot7/s{number}" for number in range(20)]
FLOODING, *OTHERS = STATIONS
CONFIG: Final = '[site]\nstations = "depot7/+"\n'


class Site:
    """The daemon, its broker and its stations."""

    def __init__(self, folder: Path, broker: Mosquitto, daemon: Station, depot: Depot) -> None:
        self.folder, self.broker, self.daemon, self.depot = folder, broker, daemon, depot

    @property
    def active_dir(self) -> Path:
        return self.daemon.state_dir / "active"

    def keys(self) -> dict[str, Counter[str]]:
        """How many keys each station has in each state."""
        with closing(sqlite3.connect(self.daemon.state_dir / DATABASE_NAME)) as ledger:
            rows = ledger.execute("SELECT station, state, count(*) FROM key GROUP BY station, state").fetchall()
        found: dict[str, Counter[str]] = {}
        for station, state, count in rows:
            found.setdefault(station, Counter())[state] = count
        return found

    def ignored(self) -> dict[str, int]:
        """How many statuses and requests of each station changed nothing."""
        with closing(sqlite3.connect(self.daemon.state_dir / DATABASE_NAME)) as ledger:
            return dict(ledger.execute("SELECT station, count(*) FROM rejection GROUP BY station").fetchall())

    def publish(self, station: str, messages: Iterable[object]) -> None:
        """Publish over one connection of another client, as fast as the broker takes it."""
        with Depot(self.broker, [station]) as flooding:
            infos = [
                flooding._client.publish(  # noqa: SLF001 - the same client for other messages
                    f"{station}/josev/cs", each if isinstance(each, bytes) else json.dumps(each).encode(), qos=1
                )
                for each in messages
            ]
            for info in infos:
                info.wait_for_publish(60)

    def tell(self, station: str, verb: str, **data: object) -> str:
        """Tell what became of a certificate; return the message's id."""
        message = status(verb, **data)
        self.publish(station, [message])
        return str(message["id"])


def status(verb: str, **data: object) -> dict[str, Any]:
    told = {"certificate_type": "charging_station_certificate", "status": verb, **data}
    return {"id": str(uuid.uuid4()), "name": "certificate_installation_status", "type": "update", "data": told}


@contextmanager
def site(folder: Path, config: str = CONFIG) -> Iterator[Site]:
    (folder / "stationkey.toml").write_text(config)
    with (
        Mosquitto(folder / "mosquitto", "max_inflight_messages 0", "max_queued_messages 0") as broker,
        software_station(folder, broker, "--config", str(folder / "stationkey.toml")) as daemon,
        Depot(broker, STATIONS) as depot,
    ):
        yield Site(folder, broker, daemon, depot)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


def test_the_same_id_of_twenty_stations_is_twenty_requests_and_each_is_answered_on_its_own_topic(here: Site) -> None:
    same = str(uuid.uuid4())
    for station in STATIONS:
        here.depot.publish(station, here.depot.request(request_id=same))
    here.depot.wait_for_all()
    csrs = here.depot.accepted
    assert set(csrs) == {Asked(station, same) for station in STATIONS}
    assert len(set(csrs.values())) == len(STATIONS)

    here.daemon.kill()
    here.daemon.start()
    for asked, request in here.depot.requests.items():
        here.depot.ask(asked.station, request)
    assert here.depot.accepted == csrs
    assert here.keys() == {station: Counter({"pre-activation": 1}) for station in STATIONS}


def test_a_status_of_one_station_changes_no_key_of_another(here: Site) -> None:
    for station in STATIONS:
        here.depot.ask(station)
        here.tell(station, "installed")
    here.daemon.wait_for("key active", count=len(STATIONS))
    files = sorted(path.name for path in here.active_dir.glob("*.pem"))
    assert files == sorted(f"station-depot7%2Fs{number}.charging_station_certificate.pem" for number in range(20))

    for number, name in enumerate(files):
        if name.startswith("station-depot7%2Fs0."):
            continue
        verb = ("deleted", "failed_installation", "installed")[number % 3]
        here.tell(FLOODING, verb, private_key_path=str(here.active_dir / name))
    until(lambda: here.ignored() == {FLOODING: len(STATIONS) - 1}, "each is ignored")  # the log shows some of them
    here.tell(FLOODING, "deleted", private_key_path=str(here.active_dir / files[0]))
    here.daemon.wait_for("key destroyed", station=FLOODING)
    assert here.keys() == {station: Counter({"active": 1}) for station in OTHERS} | {
        FLOODING: Counter({"destroyed": 1})
    }
    assert sorted(path.name for path in here.active_dir.glob("*.pem")) == files[1:]


def flood() -> Iterator[object]:
    """What one station sends: valid requests, copies, statuses, rubbish and requests for RSA keys, in turn."""
    copy = generate_csr()
    for number in range(150):
        yield generate_csr()
        yield {**copy, "later": number}
        yield status("installed")
        yield status("deleted", private_key_path=f"/x/{number}.pem")
        yield b"{" + bytes(100)
        yield {**generate_csr(), "data": {}}
        if number % 30 == 0:
            yield generate_csr(algorithm="RSA_SHA256")


@pytest.mark.long
def test_a_flood_of_one_station_delays_no_other_beyond_its_deadline_and_their_statuses_apply(tmp_path: Path) -> None:
    with site(tmp_path, f"{CONFIG}[deadlines]\nec = 90\nrsa = 120\n") as here:
        _flooded(here)


def _flooded(here: Site) -> None:
    """A request that waits longer than its deadline would be rejected; it is wide, for a machine that is busy."""
    here.publish(FLOODING, flood())
    for station in OTHERS:
        here.depot.publish(station)
    rsa = csr_request(
        str(uuid.uuid4()),
        GenerateCsrData(
            certificate_type=CertificateType.CHARGING_STATION_CERTIFICATE,
            common_name="RSA",
            organization_name="EcoG",
            country_name="DE",
            algorithm=Algorithm.RSA_SHA256,
        ),
    )
    here.depot.publish(OTHERS[0], rsa)
    mine = list(here.depot.requests)
    here.depot.wait_for(lambda: all(here.depot.answers[asked] for asked in mine), "the others are answered", bound=120)
    assert set(here.depot.accepted) >= set(mine)
    for station in OTHERS[1:]:
        here.tell(station, "installed")
    here.daemon.wait_for_lines(
        lambda lines: all(any("key active" in line and f'"{name}"' in line for line in lines) for name in OTHERS[1:])
    )
    keys = here.keys()
    assert [keys[station]["active"] for station in OTHERS[1:]] == [1] * (len(OTHERS) - 1)
    assert here.daemon.stop() == 0
    [counts] = here.daemon.wait_for("stopped")
    assert counts["station_places_taken"] + counts["accepted"] >= 150
    assert "internal_error" not in counts


def test_hostile_names_are_counted_or_served_and_nobody_else_notices(here: Site) -> None:
    served = ["..", "%2e%2e", "v2g_certificate.previous", "a.pem", "$HOME", "x" * 57, "é" * 28]
    refused = ["", "x" * 58, "a\u202eb", "a\u200bb", "\u2028"]
    with Depot(here.broker, [f"depot7/{name}" for name in served]) as strangers:
        for name in refused:
            here.publish(f"depot7/{name}", [generate_csr()])
        for station in strangers.stations:
            strangers.publish(station)
        strangers.wait_for_all()
        assert {asked.station for asked in strangers.accepted} == set(strangers.stations)
        for station in strangers.stations:
            here.tell(station, "installed")
    here.daemon.wait_for("key active", count=len(served))
    assert len(list(here.active_dir.iterdir())) == len(served) + 1  # and the lock
    assert not list(here.folder.rglob("*..*.pem"))
    here.depot.ask(FLOODING)
    assert here.daemon.stop() == 0
    [counts] = here.daemon.wait_for("stopped")
    assert counts["station_invalid"] == len(refused)


@pytest.mark.parametrize("kills", [3])
def test_what_a_killed_daemon_had_in_hand_is_answered_after_its_start_and_once(here: Site, kills: int) -> None:
    for _ in range(kills):
        for station in STATIONS:
            here.depot.publish(station)
        here.daemon.kill()
        here.daemon.start()
    here.depot.wait_for_all()
    assert len(here.depot.accepted) == kills * len(STATIONS)  # each with one CSR
    assert {station: keys.total() for station, keys in here.keys().items()} == dict.fromkeys(STATIONS, kills)


def test_statuses_that_a_killed_daemon_had_in_hand_are_applied_after_its_start(here: Site) -> None:
    for station in STATIONS:
        here.depot.ask(station)
    for station in STATIONS:
        here.tell(station, "installed")
    here.daemon.kill()
    here.daemon.start()
    until(lambda: here.keys() == {station: Counter({"active": 1}) for station in STATIONS}, "all are applied")
    until(lambda: len(list(here.active_dir.glob("station-*.pem"))) == len(STATIONS), "each is shown, a moment later")


def test_a_station_can_be_tried_by_hand(here: Site) -> None:
    given = ("--common-name", "1", "--organization-name", "EcoG", "--country-name", "DE", "--broker", here.broker.url)
    asked = ("request", "charging_station_certificate", *given)
    done = run(*asked, "--station", "depot7/s1")
    assert (done.returncode, done.stdout.startswith("-----BEGIN CERTIFICATE REQUEST")) == (0, True)
    assert here.keys() == {"depot7/s1": Counter({"pre-activation": 1})}
    assert run(*asked, "--station", "depot8/s1", "--timeout", "0.5").returncode == 4
    assert run(*asked, "--station", "depot7/#").reason == "station_invalid"


def test_stations_that_are_no_longer_configured_are_unsubscribed_from(tmp_path: Path) -> None:
    with site(tmp_path, '[site]\nstations = ["depot7/+", "depot8/+"]\n') as here:
        here.depot.ask(FLOODING)
        assert here.daemon.stop() == 0
        (tmp_path / "stationkey.toml").write_text(CONFIG)
        here.daemon.start()
        here.publish("depot8/s1", [generate_csr()])
        here.depot.ask(FLOODING)
        assert here.daemon.stop() == 0
        [counts] = here.daemon.wait_for("stopped")
        assert "topic_foreign" not in counts


def test_a_flood_of_large_messages_of_one_station_costs_nobody_the_connection(here: Site) -> None:
    large = b'{"id": "' + str(uuid.uuid4()).encode() + b'", "filler": "' + bytes(60 * 1024) + b'"}'
    here.publish(FLOODING, [large] * 500)
    here.depot.ask(OTHERS[0])
    assert here.daemon.stop() == 0
    [counts] = here.daemon.wait_for("stopped")
    assert counts["accepted"] == 1
    assert len([line for line in here.daemon.lines if '"ready"' in line]) == 1
