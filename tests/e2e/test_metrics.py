"""Figures and health of the real daemon, asked for as Prometheus and others would; the dashboard and the alerts.

Judged by prometheus_client's own parser. No test knows a name that docs/metrics.md does not list.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # comes without types
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from outside import BOUND, Event, Josev, Station, generate_csr, run
from peers import Mosquitto, Swtpm, free_port
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
NAMES, _, NAMES_OF_A_SITE = (ROOT / "docs/metrics.md").read_text().partition("### A site\n")
SOFTWARE = ("--keystore", "software:", "--allow-software-keys")

Key = tuple[str, frozenset[tuple[str, str]]]


class _Connection(http.client.HTTPConnection):
    """Over a loopback port, or over a socket in the file system."""

    def __init__(self, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        self._path = listen.removeprefix("unix:") if listen.startswith("unix:") else None
        super().__init__("localhost" if self._path else host, None if self._path else int(port), timeout=BOUND)

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(BOUND)
        self.sock.connect(self._path)


def get(listen: str, path: str) -> tuple[int, str]:
    connection = _Connection(listen)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def families(listen: str) -> list[Metric]:
    status, text = get(listen, "/metrics")
    assert status == 200
    return list(text_string_to_metric_families(text))


def scrape(listen: str) -> dict[Key, float]:
    """Each sample's value, by its name and labels."""
    samples = [sample for family in families(listen) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "a series is there twice"
    return found


def sample(found: dict[Key, float], name: str, **labels: str) -> float:
    return found[f"stationkey_{name}", frozenset(labels.items())]


def until(listen: str, right: Callable[[dict[Key, float]], bool]) -> dict[Key, float]:
    """Scrape until it is as it should be: what is shown may be a second old, and nobody tells when it is made anew."""
    end = time.monotonic() + BOUND
    while not right(found := scrape(listen)):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def report_of(listen: str, right: Callable[[dict[str, Any]], bool]) -> tuple[int, dict[str, Any]]:
    """Ask for the health until it is as it should be."""
    end = time.monotonic() + BOUND
    while True:
        status, text = get(listen, "/health")
        report: dict[str, Any] = json.loads(text)
        if right(report):
            return status, report
        assert time.monotonic() < end, report
        time.sleep(0.05)


def shown(folder: Path, listen: str, more: str = "") -> tuple[str, str]:
    """The options of a daemon that listens there."""
    file = folder / "stationkey.toml"
    file.write_text(f'{more}\n[metrics]\nlisten = "{listen}"\n')
    return "--config", str(file)


def update(verb: str, request: Event) -> Event:
    data = {key: request["data"][key] for key in ("certificate_type", "evse_id") if key in request["data"]}
    data["status"] = verb
    return {"id": str(uuid.uuid4()), "name": "certificate_installation_status", "type": "update", "data": data}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as mosquitto:
        yield mosquitto


@pytest.fixture(scope="module")
def listen() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def station(
    tmp_path_factory: pytest.TempPathFactory, broker: Mosquitto, session_swtpm: Swtpm, listen: str
) -> Iterator[Station]:
    """One daemon, on a real TPM, for all the tests that leave it working."""
    folder = tmp_path_factory.mktemp("station")
    options = ("--broker", broker.url, "--keystore", session_swtpm.uri)
    with Station(folder, *options, *shown(folder, listen)) as running:
        yield running


@pytest.fixture(scope="module")
def josev(station: Station, broker: Mosquitto) -> Iterator[Josev]:
    assert station.process is not None
    with Josev(broker) as subscribed:
        yield subscribed


def counters(found: dict[Key, float]) -> dict[Key, float]:
    """What counts events; not what goes by time."""
    by_time = {"stationkey_running_seconds_total", "process_cpu_seconds_total"}
    return {
        key: value
        for key, value in found.items()
        if key[0].endswith(("_total", "_count")) and key[0] not in by_time and ("task", "probe") not in key[1]
    }


def test_what_happens_moves_its_own_counters_and_no_others(josev: Josev, station: Station, listen: str) -> None:
    before = counters(scrape(listen))
    first = generate_csr(certificate_type="v2g_certificate", evse_id="DE*ABC*E1")
    josev.ask(first)
    for _ in range(2):
        josev.ask(first)  # repeated
    for _ in range(3):
        josev.ask(generate_csr(country_name="GER"))
    for _ in range(4):
        josev.ask(generate_csr(first["id"], **first["data"] | {"common_name": "another"}))
    for _ in range(5):
        josev.ask(generate_csr(certificate_type="v2g20_certificate", algorithm="ECDSA_SHA512"))
    josev.publish(*["[1, 2]"] * 6)
    installed = update("installed", first)
    josev.publish(installed, installed, update("deleted", first))
    josev.publish(*(update("deleted", first) for _ in range(2)))
    station.wait_for(reason="status_fits_no_key", count=2)

    def total(name: str, count: int, **labels: str) -> tuple[Key, float]:
        return (f"stationkey_{name}", frozenset(labels.items())), count

    expected = dict(
        [
            total("requests_total", 1, certificate_type="v2g_certificate", outcome="accepted", reason=""),
            total("requests_total", 5, certificate_type="v2g20_certificate", outcome="accepted", reason=""),
            total("requests_total", 2, certificate_type="v2g_certificate", outcome="repeated", reason=""),
            total("requests_total", 4, certificate_type="v2g_certificate", outcome="rejected", reason="id_reused"),
            total("requests_total", 3, certificate_type="unknown", outcome="rejected", reason="country_name_invalid"),
            total("rejected_requests_total", 7),
            total("unanswerable_messages_total", 6, reason="not_a_message"),
            total("statuses_total", 1, status="installed", outcome="applied", reason=""),
            total("statuses_total", 1, status="installed", outcome="repeated", reason=""),
            total("statuses_total", 1, status="deleted", outcome="applied", reason=""),
            total("statuses_total", 2, status="deleted", outcome="refused", reason="status_fits_no_key"),
            total("answer_seconds_count", 1, algorithm="ECDSA_SHA256"),
            total("answer_seconds_count", 5, algorithm="ECDSA_SHA512"),
            total("keystore_job_seconds_count", 6, task="new_ec_key", store="default"),
            total("keystore_job_seconds_count", 1, task="proof", store="default"),
            total("keystore_job_seconds_count", 1, task="destroy", store="default"),
        ]
    )

    def moved(found: dict[Key, float]) -> dict[Key, float]:
        changes = {key: value - before.get(key, 0) for key, value in counters(found).items()}
        return {key: change for key, change in changes.items() if change}

    assert moved(until(listen, lambda found: moved(found) == expected)) == expected


def test_keys_are_counted_by_state_and_type(josev: Josev, listen: str) -> None:
    labels = {"certificate_type": "charging_station_certificate"}
    before = scrape(listen)
    request = generate_csr()
    for _ in range(2):
        josev.ask(generate_csr())
    josev.ask(request)
    josev.publish(update("installed", request))
    found = until(listen, lambda found: sample(found, "keys", state="active", **labels) == 1)
    pending = sample(found, "keys", state="pre-activation", **labels)
    assert pending == sample(before, "keys", state="pre-activation", **labels) + 2
    assert sample(found, "certificates_expiry_unknown") == 1


def test_no_name_of_anybody_is_in_the_figures_or_the_health(josev: Josev, listen: str) -> None:
    """An EVSE is named where a certificate of its expires, see test_health.py, and nowhere else."""
    request = generate_csr(common_name="Erika Mustermann", organization_name="Über Strom GmbH", evse_id="DE*ABC*E7")
    csr = x509.load_pem_x509_csr((josev.ask(request).csr or "").encode())
    applied = {"name": "statuses_total", "status": "installed", "outcome": "applied", "reason": ""}
    before = sample(scrape(listen), **applied)
    josev.publish(update("installed", request))
    until(listen, lambda found: sample(found, **applied) > before)
    josev.ask(generate_csr(country_name="Absurdistan"))
    text = get(listen, "/metrics")[1] + get(listen, "/health")[1]
    key_id = hashlib.sha256(csr.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    names = (
        "Erika",
        "Mustermann",
        "Strom",
        "PRIVATE",
        "ABC",
        "Absurdistan",
        request["id"],
        key_id[:12],
        "REQUEST-----",
    )
    assert not [name for name in names if name in text]


def test_the_names_are_as_prometheus_wants_them(josev: Josev, listen: str) -> None:
    assert josev is not None
    found = families(listen)
    for family in found:
        assert re.fullmatch(r"(stationkey|process)(_[a-z]+)+", family.name), family.name
        assert re.fullmatch(r"[A-Z].*\.", family.documentation), family.name
        assert not re.search(r"(milli|micro|minute|hour|percent|count|bucket|_ms)", family.name), family.name
        assert family.name.startswith("process_") or family.type in {"counter", "gauge", "histogram"}
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        if "timestamp" in family.name:
            assert family.name.endswith("_timestamp_seconds")
        for each in family.samples:
            if family.type == "counter":
                assert each.name == f"{family.name}_total"
            # What Prometheus itself labels with.
            assert not {"job", "instance", "quantile"} & each.labels.keys()
            assert all(re.fullmatch(r"[a-z_]+", label) for label in each.labels)
    assert len({family.name for family in found}) == len(found)


def documented(names: str = NAMES) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each name in the document's table."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (gauge|counter|histogram) \|([^|]*)\|", names, re.MULTILINE)
    return {f"stationkey_{name}": (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_document_lists_what_is_shown_with_type_and_labels(josev: Josev, listen: str) -> None:
    josev.ask(generate_csr())
    josev.publish("[]")
    until(listen, lambda found: any(name == "stationkey_unanswerable_messages_total" for name, _ in found))
    given = documented()
    found: dict[str, tuple[str, set[str]]] = {}
    for family in families(listen):
        if family.name.startswith("stationkey_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for each in family.samples for label in each.labels if label != "le"}
            # Nothing expires here, and so the labels of that are not seen; see test_health.py.
            found[name] = family.type, labels or given.get(name, ("", set()))[1]
    assert found == given


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names."""
    return set(re.findall(r"\b(?:stationkey|process)_\w+", expression))


def exposed(listen: str) -> set[str]:
    found = {each.name for family in families(listen) for each in family.samples}
    later = {name for name in documented() if name.endswith(("_total", "_timestamp_seconds"))}
    return found | later | documented(NAMES_OF_A_SITE).keys()  # see tests/observability/test_site_metrics.py


def test_every_alert_is_about_figures_that_there_are(station: Station, listen: str) -> None:
    assert station.process is not None
    rules = yaml.safe_load((ROOT / "packaging/prometheus/alerts.yml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) >= 10
    for alert in alerts:
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert set(alert["annotations"]) == {"summary", "description"}
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert names_in(alert["expr"]) <= exposed(listen), alert["alert"]
        assert names_in(alert["expr"]) or alert["alert"] == "StationkeyDown"


def test_every_alert_is_told_what_to_do_about() -> None:
    rules = yaml.safe_load((ROOT / "packaging/prometheus/alerts.yml").read_text())
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    operations = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"`(Stationkey\w+)`", operations)) == names


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((ROOT / "packaging/grafana/stationkey.json").read_text())
    found: list[dict[str, Any]] = dashboard["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def test_every_panel_is_about_figures_that_there_are_and_none_is_left_out(josev: Josev, listen: str) -> None:
    josev.ask(generate_csr())  # how long answers take is shown from the first one on
    until(
        listen, lambda found: ("stationkey_answer_seconds_count", frozenset({("algorithm", "ECDSA_SHA256")})) in found
    )
    used = {name for panel in panels() for target in panel["targets"] for name in names_in(target["expr"])}
    assert used <= exposed(listen)
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    of_no_panel = {
        "stationkey_ready",  # part of stationkey_healthy
        "stationkey_running_seconds_total",
        "stationkey_broker_changed_timestamp_seconds",
        "stationkey_keystore_last_job_timestamp_seconds",
    }
    assert (documented() | documented(NAMES_OF_A_SITE)).keys() - bases == of_no_panel


def test_the_dashboard_takes_its_data_source_and_its_stations_from_variables() -> None:
    dashboard = json.loads((ROOT / "packaging/grafana/stationkey.json").read_text())
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "job", "instance"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels():
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert target["expr"].count('instance=~"$instance"') == len(re.findall(r"\w\{", target["expr"]))
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


def test_what_waits_for_a_slow_tpm_is_shown(tmp_path: Path, broker: Mosquitto, swtpm: Swtpm) -> None:
    path = f"unix:{tmp_path}/metrics.sock"
    options = ("--broker", broker.url, "--keystore", swtpm.uri, "--topic-prefix", "slow", *shown(tmp_path, path))
    requests = [generate_csr(), generate_csr(), generate_csr(), generate_csr(algorithm="RSA_SHA256")]
    with Station(tmp_path, *options) as station, Josev(broker, "slow/") as josev:
        swtpm.freeze()
        josev.publish(*requests)

        def busy(found: dict[Key, float]) -> list[float]:
            waiting = [
                sample(found, "keystore_jobs_waiting", turn=turn, store="default")
                for turn in ("short", "long", "spare")
            ]
            return [
                sample(found, "messages_in_hand"),
                sample(found, "keystore_jobs_in_hand", store="default"),
                *waiting,
            ]

        found = until(path, lambda found: busy(found) == [4, 1, 2, 1, 0])
        assert sample(found, "keystore_stuck", store="default") == 0
        swtpm.thaw()
        for request in requests:
            assert josev.wait_for(request["id"])[0].csr
        until(path, lambda found: busy(found) == [0, 0, 0, 0, 0])
        assert station.stop() == 0


# Where it listens.


def listening(pid: int) -> set[str]:
    """The sockets that a process listens at or is bound to: ports, and paths [proc(5)]."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        target = ""
        with suppress(FileNotFoundError):  # closed since the folder was read
            target = str(file.readlink())
        if target.startswith("socket:["):
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(f"{name}:{int(fields[1].rpartition(':')[2], 16)}")
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] in inodes and len(fields) > 7:
            found.add(fields[7])
    return found


NOTED = """
import atexit, sys
atexit.register(lambda: print("loaded", "prometheus_client" in sys.modules,
                              "stationkey.observability.http" in sys.modules,
                              *(name in sys.modules for name in ("jinja2", "stationkey.observability.page")),
                              file=sys.stderr))
from stationkey.cli import main
main()
"""
"""``stationkey``, with a last word on what it has loaded."""


@pytest.mark.parametrize("on", [False, True], ids=["off by default", "on"])
def test_where_nobody_wants_figures_nothing_listens_and_nothing_is_loaded(
    tmp_path: Path, broker: Mosquitto, on: bool
) -> None:
    port = free_port()
    config = shown(tmp_path, f"127.0.0.1:{port}") if on else ()
    station = Station(tmp_path, "--broker", broker.url, *SOFTWARE, *config)
    station.run_by(sys.executable, "-c", NOTED)
    with station:
        assert station.process is not None
        assert listening(station.process.pid) == ({f"tcp:{port}"} if on else set())
        assert station.stop() == 0
        assert f"loaded {on} {on} False False" in station.lines


def test_the_page_shows_names_over_a_socket_and_not_on_a_port(tmp_path: Path, broker: Mosquitto) -> None:
    """And its template engine is loaded only then."""
    port, path = free_port(), tmp_path / "metrics.sock"
    request = generate_csr(common_name="Erika Mustermann")
    shows = {}
    for listen in (f"127.0.0.1:{port}", f"unix:{path}"):
        prefix = "socket" if listen.startswith("unix:") else "port"
        options = ("--broker", broker.url, "--topic-prefix", prefix, *SOFTWARE, *shown(tmp_path, listen))
        station = Station(tmp_path, *options)
        station.run_by(sys.executable, "-c", NOTED)
        with station, Josev(broker, f"{prefix}/") as josev:
            josev.ask(request)
            status, text = get(listen, "/")
            assert (status, "secp256r1" in text) == (200, True)
            shows[prefix] = {name for name in ("Mustermann", request["id"][:13]) if name in text}
            assert station.stop() == 0
            assert "loaded True True True True" in station.lines
    assert shows == {"port": set(), "socket": {"Mustermann", request["id"][:13]}}


def test_a_socket_in_the_file_system_does_as_well_and_is_gone_afterwards(tmp_path: Path, broker: Mosquitto) -> None:
    path = tmp_path / "metrics.sock"
    with Station(tmp_path, "--broker", broker.url, *SOFTWARE, *shown(tmp_path, f"unix:{path}")) as station:
        assert station.process is not None
        assert listening(station.process.pid) == {str(path)}
        found = path.lstat()
        assert (stat.S_IMODE(found.st_mode), stat.S_ISSOCK(found.st_mode)) == (0o660, True)
        assert sample(scrape(f"unix:{path}"), "broker_connected") == 1
        assert run("health", f"unix:{path}").returncode == 0
        station.kill()
        assert path.exists()
        station.start()  # in its place
        assert sample(scrape(f"unix:{path}"), "broker_connected") == 1
        assert station.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        pytest.param("0.0.0.0:{port}", "metrics_not_loopback", id="for everybody"),
        pytest.param("[::]:{port}", "metrics_not_loopback", id="for everybody, IPv6"),
        pytest.param("127.0.0.1", "metrics_listen_invalid", id="no port"),
        pytest.param("127.0.0.1:{taken}", "metrics_cannot_listen", id="in use"),
        pytest.param("unix:{folder}/link", "metrics_cannot_listen", id="a link"),
    ],
)
def test_a_place_that_is_not_fit_keeps_the_daemon_from_starting_in_words(
    tmp_path: Path, broker: Mosquitto, where: str, reason: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    place = where.format(port=free_port(), taken=broker.port, folder=tmp_path)
    refused = run(
        *("serve", "--state-dir", str(tmp_path / "state"), "--broker", broker.url, *SOFTWARE), *shown(tmp_path, place)
    )
    assert refused.returncode == 1
    assert refused.reason == reason
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "elsewhere").exists()


# What it is worth under attack.


def test_two_hundred_half_open_connections_keep_neither_requests_nor_scrapes_out(
    josev: Josev, station: Station, listen: str
) -> None:
    host, _, port = listen.rpartition(":")
    with ExitStack() as stack:
        for _ in range(200):
            held = stack.enter_context(socket.create_connection((host, int(port)), BOUND))
            held.sendall(b"GET /metrics HTTP/1.1\r\nHost: loc")
        assert josev.ask(generate_csr()).csr
        found = scrape(listen)
        assert sample(found, "ready") == 1
        assert station.process is not None
        assert len(list(Path(f"/proc/{station.process.pid}/fd").iterdir())) < 60


def test_a_thousand_scrapes_leave_it_no_larger(josev: Josev, station: Station, listen: str) -> None:
    def resident() -> int:
        assert station.process is not None
        status = Path(f"/proc/{station.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s*(\d+) kB", status)[0])

    sizes = []
    for _ in range(6):
        for _ in range(200):
            assert get(listen, "/metrics")[0] == 200
        sizes.append(resident())
    # A leak grows each time; a cache, or what the last requests and the sweep leave, once.
    assert min(after - before for before, after in pairwise(sizes)) < 200
    assert josev.ask(generate_csr()).csr


# Health.


def test_it_is_well_while_broker_and_tpm_are_there(station: Station, listen: str) -> None:
    assert station.process is not None
    status, report = report_of(listen, lambda report: bool(report["keystore"]["reachable"]))
    assert status == 200
    assert report["status"] == "ok"
    assert report["broker"]["connected"]
    assert report["ledger"] == {"writable": True, "trouble": None}
    asked = run("health", listen)
    assert (asked.returncode, json.loads(asked.stdout)["status"]) == (0, "ok")


def test_it_is_not_well_without_a_broker_or_a_tpm_and_well_again_with_both(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    config = shown(tmp_path, listen, "[deadlines]\nec = 0.5\n")
    options = ("--broker", mosquitto.url, "--keystore", swtpm.uri)
    with Station(tmp_path, *options, *config) as station, Josev(mosquitto) as josev:
        swtpm.kill()
        josev.ask(generate_csr())
        status, report = report_of(listen, lambda report: report["keystore"]["last_result"] == "tpm_unreachable")
        assert (status, report["status"], report["keystore"]["reachable"]) == (503, "trouble", False)
        swtpm.start()
        assert josev.ask(generate_csr()).csr
        assert report_of(listen, lambda report: report["status"] == "ok")[0] == 200
        swtpm.freeze()
        josev.ask(generate_csr())
        status, report = report_of(listen, lambda report: bool(report["keystore"]["stuck"]))
        assert (status, report["keystore"]["reachable"]) == (503, False)
        found = until(listen, lambda found: sample(found, "keystore_stuck", store="default") == 1)
        assert (sample(found, "keystore_reachable", store="default"), sample(found, "healthy")) == (0, 0)
        swtpm.thaw()
        report_of(listen, lambda report: report["status"] == "ok")
        mosquitto.kill()
        status, report = report_of(listen, lambda report: not report["broker"]["connected"])
        assert (status, report["ready"], report["broker"]["connections"]) == (503, True, 1)
        asked = run("health", *config)
        assert (asked.returncode, json.loads(asked.stdout)["status"]) == (1, "trouble")
        mosquitto.start()
        status, report = report_of(listen, lambda report: report["status"] == "ok")
        assert (status, report["broker"]["connections"]) == (200, 2)
        assert station.stop() == 0
        asked = run("health", listen)
        assert asked.returncode == 1
        assert asked.reason == "health_unreachable"
        assert listen in asked.stderr


def test_health_is_not_asked_for_where_nothing_says_where(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").touch()
    for arguments in ((), ("--config", str(tmp_path / "empty.toml"))):
        asked = run("health", *arguments)
        assert asked.returncode == 1
        assert asked.reason == "health_unasked"


def test_while_a_tpm_keeps_the_start_waiting_it_says_that_it_is_not_ready(
    tmp_path: Path, broker: Mosquitto, swtpm: Swtpm
) -> None:
    path = tmp_path / "metrics.sock"
    swtpm.freeze()
    options = ("--broker", broker.url, "--keystore", swtpm.uri, *shown(tmp_path, f"unix:{path}"))
    with Station(tmp_path, *options).launch() as station:
        station.wait_for("serving page, metrics and health at")
        status, report = report_of(f"unix:{path}", lambda report: not report["ready"])
        assert (status, report["status"]) == (503, "trouble")
        assert sample(scrape(f"unix:{path}"), "ready") == 0
        swtpm.thaw()
        station.wait_for("ready")
        assert report_of(f"unix:{path}", lambda report: report["status"] == "ok")[0] == 200
