"""The status page of a site's daemon: its own part, and the whole site as the database shows it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from recording import answer
from showing import GLANCE, in_site, watching

from parts import E1, V2G, Station, request, station
from stationkey.errors import LedgerError
from stationkey.observability.health import Health
from stationkey.observability.page import StatusPage
from stationkey.observability.status import SiteGlance


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    async with station(tmp_path) as here:
        yield here


async def page_of(here: Station, health: Health, *, names: bool = False) -> str:
    page = StatusPage(health, names=names, clock=lambda: here.clocks.wall)
    return (await page.once()).body.decode()


def cells(text: str) -> list[str]:
    """What the cells of the page's tables say."""
    found = re.findall(r"<td[^>]*>(.*?)</td>", text, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]*>", "", each).split()) for each in found]


async def test_it_shows_every_shard_with_its_holder_and_its_backlog(here: Station) -> None:
    text = await page_of(here, in_site(watching(here)))
    shown = cells(text)
    for row, shard in zip((shown[:5], shown[5:10]), GLANCE.shards, strict=True):
        number, holder, epoch, stations, backlog = row
        assert (int(number), int(epoch), int(stations)) == (shard.number, shard.epoch, shard.stations)
        assert shard.holder in holder
        assert re.findall(r"\d+", backlog) == [str(shard.in_hand), str(shard.waiting), str(shard.undelivered)]
    assert "<script" not in text
    assert "<img" not in text


async def test_without_the_database_it_shows_the_daemons_own_part(here: Station) -> None:
    health = in_site(watching(here))

    async def glance() -> SiteGlance:
        raise LedgerError("away", reason="ledger_unreachable", transient=True)

    health.glance = glance
    text = await page_of(here, health)
    assert cells(text) == []
    assert "1 of 2 shards are here: 0" in " ".join(text.split())


@pytest.mark.parametrize("names", [True, False])
async def test_the_station_of_a_key_and_of_an_event_is_shown_where_names_are(here: Station, names: bool) -> None:
    answer(here.ledger, request(V2G, E1), station="depot/<s7>")
    text = await page_of(here, in_site(watching(here)), names=names)
    assert text.count("depot/&lt;s7&gt;") == (2 if names else 0)
    assert "<s7>" not in text


async def test_the_page_of_a_single_station_says_nothing_of_a_site(here: Station) -> None:
    assert 'id="site"' not in await page_of(here, watching(here))
