"""The dashboard and the alerts, judged by a real Prometheus that scrapes a station: every query returns data."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from peers import Peer, free_port
from showing import fill, watching
from unit import ROOT

from parts import Station, new_id, station
from stationkey.config.settings import PoolTerms
from stationkey.errors import MessageError, RequestRefused
from stationkey.observability.http import Endpoint, Reply
from stationkey.observability.metrics import CONTENT_TYPE, Exposition
from stationkey.observability.status import ShardCondition, SiteCondition
from stationkey.system.listener import Address, Listener

BOUND = 60.0
"""Seconds after which a query that has returned nothing has failed."""
INTERVAL = "200ms"
RATE_INTERVAL = "2s"
"""What Grafana puts in for $__rate_interval: several scrapes."""
RULES = ROOT / "packaging/prometheus/alerts.yml"
DASHBOARD = json.loads((ROOT / "packaging/grafana/stationkey.json").read_text())


class Prometheus(Peer):
    """The server that scripts/setup unpacks from Debian's package; it scrapes one address."""

    program = str(Path(sys.executable).with_name("prometheus"))

    def __init__(self, directory: Path, scraped: Address) -> None:
        super().__init__(directory)
        self.port = free_port()
        settings = {
            "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": "stationkey", "static_configs": [{"targets": [str(scraped)]}]}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML

    def command(self) -> list[str]:
        return [
            f"--config.file={self.directory}/prometheus.yml",
            f"--storage.tsdb.path={self.directory}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def listening(self) -> bool:
        """Whether it answers queries; it listens before it does, and says 503 meanwhile."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=BOUND):
                return True
        except OSError:  # an HTTPError is one, too
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        """What its API says; it is not asked for long."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=BOUND) as response:
            return json.load(response)["data"]

    def values(self, expression: str) -> list[float]:
        found = [float(each["value"][1]) for each in self.ask("query", query=expression)["result"]]
        return [value for value in found if not math.isnan(value)]


def filled_in(expression: str, **variables: str) -> str:
    """The expression as Grafana sends it."""
    for name, value in variables.items():
        expression = expression.replace(f"${name}", value)
    return expression


EXPRESSIONS = [
    (panel["title"], filled_in(target["expr"], instance=".*", job=".*", __rate_interval=RATE_INTERVAL))
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]


async def live(here: Station) -> None:
    """Requests and statuses of every outcome, again and again."""
    while True:
        await here.csr()
        await here.told("installed")
        await here.service.reject(new_id(), RequestRefused("no", reason="common_name_invalid"))
        here.service.pass_over(MessageError("no", reason="not_json"))
        await asyncio.sleep(0.05)


@asynccontextmanager
async def scraped(here: Station) -> AsyncIterator[Address]:
    """The figures of a station, as the daemon shows them."""
    health = watching(here)
    health.site = lambda: SiteCondition(2, True, 1.0, "", (ShardCondition(0, 1, True, 0, 0),))
    exposition = Exposition(health)
    address = Address.parse(f"127.0.0.1:{free_port()}")

    async def metrics() -> Reply:
        return Reply(await exposition.text(), CONTENT_TYPE)

    with Listener(address) as listener:
        async with Endpoint(listener, {"/metrics": metrics}, for_machines=["/metrics"]):
            yield address


async def test_every_query_of_the_dashboard_returns_data_and_every_alert_is_evaluated(tmp_path: Path) -> None:
    async with station(tmp_path / "state") as here:
        next(iter(here.service.pools.values()))._terms = PoolTerms(ec=1, rsa=0)  # noqa: SLF001 - a pool that is never filled has figures, too
        await next(iter(here.service.pools.values()))._begin()  # noqa: SLF001 - same
        await fill(here)
        async with scraped(here) as address:
            with Prometheus(tmp_path / "prometheus", address) as prometheus:
                living = asyncio.create_task(live(here))
                without = EXPRESSIONS
                end = asyncio.get_running_loop().time() + BOUND
                while without and asyncio.get_running_loop().time() < end:
                    without = [each for each in without if not await asyncio.to_thread(prometheus.values, each[1])]
                groups = (await asyncio.to_thread(prometheus.ask, "rules"))["groups"]
                jobs = await asyncio.to_thread(
                    prometheus.ask, "label/job/values", **{"match[]": "stationkey_build_info"}
                )
                living.cancel()
                await asyncio.gather(living, return_exceptions=True)
    assert len(EXPRESSIONS) >= 30
    assert without == []
    assert jobs == ["stationkey"]  # the dashboard's variable
    assert [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "err"] == []


def test_variables_are_all_filled_in() -> None:
    assert [expression for _, expression in EXPRESSIONS if "$" in expression] == []
