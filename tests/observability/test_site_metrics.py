"""The figures of a daemon of a site: by shard, and never by station."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from showing import watching
from test_metrics import NAMES_OF_A_SITE, documented

from parts import station
from stationkey.config.site import SiteTerms
from stationkey.observability.metrics import Exposition
from stationkey.observability.status import ShardCondition, SiteCondition


async def exposed(folder: Path, site: SiteCondition | None) -> dict[str, Metric]:
    """The figures of a site, by name, of a daemon with that part in it."""
    async with station(folder / "state") as here:
        health = watching(here)
        if site is not None:
            health.site = lambda: site
        text = (await Exposition(health).text()).decode()
    names = documented(NAMES_OF_A_SITE)
    return {family.name: family for family in text_string_to_metric_families(text) if family.name in names}


def values(family: Metric) -> dict[str, float]:
    return {sample.labels.get("shard", ""): sample.value for sample in family.samples}


HALF = SiteCondition(4, True, 1.5, "", (ShardCondition(1, 7, True, 3, 5), ShardCondition(2, 2, False, 0, 0)))


async def test_the_document_lists_what_a_site_shows_with_type_and_labels(tmp_path: Path) -> None:
    found = await exposed(tmp_path, HALF)
    shown = {
        name: (family.type, {label for sample in family.samples for label in sample.labels})
        for name, family in found.items()
    }
    assert shown == documented(NAMES_OF_A_SITE)


async def test_a_daemon_shows_every_shard_of_the_site_and_more_of_its_own(tmp_path: Path) -> None:
    found = await exposed(tmp_path, HALF)
    assert values(found["stationkey_shard_held"]) == {"0": 0, "1": 1, "2": 1, "3": 0}
    assert values(found["stationkey_shard_epoch"]) == {"1": 7, "2": 2}
    assert values(found["stationkey_shard_connected"]) == {"1": 1, "2": 0}
    assert values(found["stationkey_shard_messages_in_hand"]) == {"1": 3, "2": 0}
    assert values(found["stationkey_shard_messages_waiting"]) == {"1": 5, "2": 0}
    assert values(found["stationkey_lease_age_seconds"]) == {"": 1.5}


async def test_a_daemon_that_never_had_a_lease_shows_that(tmp_path: Path) -> None:
    found = await exposed(tmp_path, SiteCondition(4, False, math.inf, "ledger_unreachable", ()))
    assert values(found["stationkey_lease_held"]) == {"": 0}
    assert values(found["stationkey_lease_age_seconds"]) == {"": math.inf}
    assert set(values(found["stationkey_shard_held"]).values()) == {0}


async def test_a_single_station_shows_nothing_of_a_site(tmp_path: Path) -> None:
    assert await exposed(tmp_path, None) == {}


async def test_the_largest_site_has_so_many_series_and_no_more(tmp_path: Path) -> None:
    most = next(meta.le for meta in SiteTerms.__annotations__["shards"].__metadata__ if hasattr(meta, "le"))
    everything = tuple(ShardCondition(number, 1, True, 0, 0) for number in range(most))
    found = await exposed(tmp_path, SiteCondition(most, True, 0.0, "", everything))
    assert sum(len(family.samples) for family in found.values()) == 5 * most + 2


@pytest.mark.parametrize("name", sorted(documented(NAMES_OF_A_SITE)))
def test_no_figure_has_a_station_for_a_label(name: str) -> None:
    assert documented(NAMES_OF_A_SITE)[name][1] <= {"shard"}
