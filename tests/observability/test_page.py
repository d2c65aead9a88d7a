"""The status page as it is made: who is shown what, what its header fields allow, what it costs.

tests/browser shows it in a browser.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from showing import HOSTILE, fill, key, watching

from parts import E1, V2G, O, Station, new_id, station
from stationkey.errors import LedgerError, RequestRefused, Scope
from stationkey.keystore.worker import Outcome
from stationkey.ledger import Figures
from stationkey.ledger.lifecycle import CSR_ANSWERED, KeyEvent
from stationkey.ledger.overview import REJECTED
from stationkey.observability import page as module
from stationkey.observability.health import Health
from stationkey.observability.http import Reply
from stationkey.observability.page import HAPPENINGS, KEYS, StatusPage
from stationkey.observability.problems import problems
from stationkey.system.systemd import ServiceManager

NAME = "CS-DE-ABC-0042"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    async with station(tmp_path) as here:
        yield here


async def shown(here: Station, health: Health | None = None, *, names: bool = False) -> Reply:
    return await StatusPage(health or watching(here), names=names, clock=lambda: here.clocks.wall).once()


async def text_of(here: Station, health: Health | None = None, *, names: bool = False) -> str:
    return (await shown(here, health, names=names)).body.decode()


class TestNames:
    async def test_a_loopback_port_shows_nothing_that_a_request_named(self, here: Station) -> None:
        """But for the EVSE of a certificate that expires, which /metrics shows as well."""
        await fill(here, NAME)
        message_id = new_id()
        refused = RequestRefused(f"{NAME} is not allowed", reason="common_name_not_allowed")
        await here.service.reject(message_id, refused)
        here.ledger.rejections.write()
        ids = [one.key_id for one in here.ledger.keys.all()]
        ids += [request_id for one in here.ledger.keys.all() for request_id in one.request_ids]
        text = await text_of(here)
        hidden = [NAME, O, "DE*ABC*E3", "DE*ABC*E4", "board stolen", message_id[:8], *(one[:8] for one in ids)]
        assert [name for name in hidden if name in text] == []
        assert "common_name_not_allowed" in text
        assert E1 in text

    async def test_a_unix_socket_shows_who_asked_for_what(self, here: Station) -> None:
        await fill(here, NAME)
        text = await text_of(here, names=True)
        ids = [one.key_id[:10] for one in here.ledger.keys.all()]
        assert [name for name in (NAME, "DE*ABC*E3", "DE*ABC*E4", "board stolen", *ids) if name not in text] == []

    async def test_what_is_hostile_is_escaped(self, here: Station) -> None:
        await key(here, 1, HOSTILE[:64], V2G, E1)
        refused = RequestRefused(HOSTILE, reason="common_name_invalid")
        await here.service.reject(f"<b>{HOSTILE}", refused)
        here.ledger.rejections.write()
        text = await text_of(here, names=True)
        assert "<script" not in text
        assert "<img" not in text
        assert "<b>" not in text
        assert "&lt;script&gt;" in text
        assert "\u202e" not in text
        assert "\\u202e" in text


class TestPolicy:
    async def test_only_its_own_style_is_allowed(self, here: Station) -> None:
        reply = await shown(here)
        text = reply.body.decode()
        (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = dict(each.strip().split(" ", 1) for each in reply.fields["Content-Security-Policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "style-src": f"'sha256-{digest}'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert reply.fields["Referrer-Policy"] == "no-referrer"
        assert reply.content_type == "text/html; charset=utf-8"

    async def test_there_is_nothing_in_it_that_would_need_more(self, here: Station) -> None:
        await fill(here)
        text = await text_of(here, names=True)
        assert re.findall(r"<script|<iframe|<form|<link[^>]*stylesheet|\son\w+=|\sstyle=|javascript:|url\(", text) == []
        assert {*re.findall(r'href="([^"]*)"', text)} - {"/", "/live", "/metrics", "/health"} == {
            *re.findall(r'href="(data:image/svg[^"]*)"', text)
        }

    async def test_only_one_of_the_two_asks_again(self, here: Station) -> None:
        page = StatusPage(watching(here), names=False)
        assert [b"http-equiv" in (await ask()).body for ask in (page.once, page.live)] == [False, True]


class TestCost:
    async def test_a_flood_of_questions_makes_it_once(self, here: Station) -> None:
        page = StatusPage(watching(here), names=False)
        with mock.patch.object(here.service, "overview", wraps=here.service.overview) as looked:
            replies = await asyncio.gather(*(page.once() for _ in range(100)))
        assert looked.call_count == 1
        assert len({reply.body for reply in replies}) == 1

    async def test_what_is_shown_is_bounded(self, here: Station) -> None:
        for number in range(KEYS + 3):
            await key(here, 1, NAME, V2G, f"DE*ABC*E{number}", days=80)
            await here.service.reject(new_id(), RequestRefused("no", reason="common_name_invalid"))
        here.ledger.rejections.write()
        text = await text_of(here)
        assert text.count("<svg") == KEYS
        assert text.count('class="outcome') == HAPPENINGS
        assert "3 more keys" in text  # words: how many are not shown


class TestTrouble:
    async def test_a_ledger_that_cannot_be_read_leaves_the_rest(self, here: Station) -> None:
        await fill(here)
        failing = mock.AsyncMock(side_effect=LedgerError("damaged", reason="ledger_damaged"))
        with mock.patch.object(here.service, "overview", failing):
            text = await text_of(here)
        assert "<svg" not in text
        assert "mqtt://127.0.0.1:1883" in text

    async def test_a_ledger_that_does_not_answer_keeps_nobody_waiting(
        self, here: Station, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LEDGER_PATIENCE", 0.05)

        async def never(**_: int) -> None:
            await asyncio.Event().wait()

        with mock.patch.object(here.service, "overview", never):
            assert "mqtt://127.0.0.1:1883" in await text_of(here)

    async def test_before_there_is_a_service_it_is_shown(self, here: Station) -> None:
        health = Health(here.keystores, ServiceManager(), broker="mqtt://127.0.0.1:1883", patience=1.0)
        assert 'class="pill trouble"' in await text_of(here, health)
        await here.service.aclose()
        assert 'class="pill trouble"' in await text_of(here)

    async def test_each_trouble_is_told_with_the_serious_first(self, here: Station) -> None:
        """One fault at a time, each of which is named by a datum of its own."""
        await here.key()
        health, none = watching(here), Figures(keys={}, expiries=(), unknown=0, destroyed=0, size=0)

        def told(figures: Figures = none, *, of: Health = health) -> list[tuple[str, bool]]:
            return [(problem.words, problem.serious) for problem in problems(of, figures, ())]

        assert told() == []
        ((words, serious),) = told(of=watching(here, keystore="software:"))
        assert (words.partition(":")[0], serious) == ("software keys", False)
        ((words, serious),) = told(Figures(keys={}, expiries=(), unknown=7, destroyed=0, size=0))
        assert ("7" in words, serious) == (True, False)
        ((words, serious),) = told(of=watching(here, connected=False))
        assert ("mqtt://127.0.0.1:1883" in words, serious) == (True, True)
        counters = here.service.counters
        counters.unusable = 5
        counters.not_shown.add("disk_full")
        found = told(of=watching(here, connected=False))
        assert [serious for _, serious in found] == [True, False, False]
        assert "5" in found[1][0]
        assert "disk_full" in found[2][0]
        counters.unusable = 0
        here.service.renewal.clock_behind = True
        assert ("clock" in told()[-1][0], told()[-1][1]) == (True, False)
        gone: Any = mock.PropertyMock(return_value=(1.0, Outcome("tpm_unreachable", Scope.DEVICE)))
        with mock.patch.object(type(here.keystore), "last", gone):
            assert ("tpm_unreachable" in told()[0][0], told()[0][1]) == (True, True)


def test_every_event_has_words() -> None:
    assert module._OUTCOMES.keys() == {*KeyEvent, CSR_ANSWERED, REJECTED}  # noqa: SLF001 - the table that is judged
