"""The status page in a real browser, Debian's chromium: what it shows, to whom, and that nothing hostile runs in it.

Each picture that a person should look at is in build/screenshots.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from outside import BOUND, Josev, generate_csr
from outside import Station as DaemonStation
from peers import Mosquitto, Swtpm, free_port
from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright
from showing import HOSTILE, fill, in_site, key, showing, watching

from parts import E1, V2G, Station, station

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "build/screenshots"
AXE = (ROOT / ".venv/browser/node_modules/axe-core/axe.min.js").read_text()
WIDE, PHONE = {"width": 1100, "height": 800}, {"width": 360, "height": 740}


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="browser")
async def _browser() -> AsyncIterator[Browser]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    async with async_playwright() as playwright:
        # No sandbox: the tests may run as root in a bare chroot, and show only pages of ours.
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    async with station(tmp_path / "state") as here:
        await next(iter(here.service.pools.values()))._begin()  # noqa: SLF001 - the key store is asked for the first time, as at a start
        yield here


@asynccontextmanager
async def opened(browser: Browser, url: str, picture: str, **how: Any) -> AsyncIterator[Page]:
    """The page as it is shown, and a picture of it; nothing may be complained of, or fetched from elsewhere."""
    context = await browser.new_context(**{"viewport": WIDE, **how})
    page = await context.new_page()
    complaints: list[str] = []
    asked: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        complaints.append(message.text)

    def note(request: Request) -> None:
        asked.append(request.url)

    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", note)
    await page.goto(url)
    await page.screenshot(path=PICTURES / f"{picture}.png", full_page=True)
    yield page
    await context.close()
    assert complaints == []
    assert [each for each in asked if not each.startswith((url, "data:"))] == []


async def until(browser: Browser, url: str, selector: str) -> None:
    """Ask until it is there: what is shown may be a second old, and nobody tells when it is made anew."""
    context = await browser.new_context()
    page = await context.new_page()
    async with asyncio.timeout(BOUND):
        await page.goto(url)
        while not await page.locator(selector).count():
            await asyncio.sleep(0.05)
            await page.reload()
    await context.close()


async def faults_of(page: Page) -> list[str]:
    """What axe says is wrong for who cannot see, or cannot see well."""
    await page.evaluate(AXE)
    result = await page.evaluate("() => axe.run()")
    assert result["passes"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in result["violations"]]


async def width_of(page: Page) -> int:
    return int(await page.evaluate("() => document.documentElement.scrollWidth"))


async def test_a_station_without_a_key_says_so(browser: Browser, here: Station) -> None:
    async with showing(here, watching(here)) as url, opened(browser, url, "empty") as page:
        assert await page.locator("header .pill.ok").count() == 1
        assert await page.locator("#problems, .keys li, table").count() == 0
        assert await page.locator("main > section > .none").count() == 3
        assert await faults_of(page) == []


LOOKS = [
    pytest.param({}, False, id="light"),
    pytest.param({"color_scheme": "dark"}, True, id="dark"),
    pytest.param({"viewport": PHONE, "is_mobile": True}, True, id="phone"),
    pytest.param({"viewport": PHONE, "is_mobile": True, "color_scheme": "dark"}, False, id="phone-dark"),
]


@pytest.mark.parametrize("look", [pytest.param({}, id="wide"), pytest.param({"viewport": PHONE}, id="phone")])
async def test_a_site_is_shown_and_can_be_read(
    browser: Browser, here: Station, look: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    health = in_site(watching(here))
    async with (
        showing(here, health) as url,
        opened(browser, url, f"site-{request.node.callspec.id}", **look) as page,
    ):
        assert await page.locator("section[aria-labelledby=site] table").count() == 2
        assert await page.locator("section[aria-labelledby=site] .dot.bad").count() == 2
        assert await width_of(page) <= (look.get("viewport") or WIDE)["width"]
        assert await faults_of(page) == []


@pytest.mark.parametrize(("look", "names"), LOOKS)
async def test_every_state_is_shown_and_can_be_read(
    browser: Browser, here: Station, look: dict[str, Any], names: bool, request: pytest.FixtureRequest
) -> None:
    await fill(here)
    picture = f"states-{request.node.callspec.id}"
    async with showing(here, watching(here), names=names) as url, opened(browser, url, picture, **look) as page:
        assert await page.locator("header .pill.notice").count() == 1
        assert await page.locator(".problems li").count() == 4  # expired, soon, expiry not known, not installed
        bars = [await bar.get_attribute("aria-label") for bar in await page.locator(".keys svg").all()]
        assert [int((label or "").split()[0]) for label in bars] == [0, 13, 98, 99]
        assert await page.locator(".keys .tag").all_inner_texts() == ["deactivated", "compromised"]
        assert await page.get_by_role("table").count() == 2
        assert await page.get_by_role("columnheader").count() == (10 if names else 8)
        assert await page.locator("#pending ~ table .tag.bad").count() == 1
        assert await page.locator(".log code", has_text="common_name_not_allowed").count() == 1
        assert await width_of(page) <= (look.get("viewport") or WIDE)["width"]
        assert await faults_of(page) == []


async def test_the_colours_follow_the_system(browser: Browser, here: Station) -> None:
    grounds = []
    async with showing(here, watching(here)) as url:
        for scheme in ("light", "dark"):
            async with opened(browser, url, f"empty-{scheme}", color_scheme=scheme) as page:
                colour = await page.evaluate("() => getComputedStyle(document.body).backgroundColor")
                grounds.append(max(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))))
    light, dark = grounds
    assert light > 200
    assert dark < 60


@pytest.mark.parametrize("names", [False, True])
async def test_nothing_hostile_runs_or_forges_anything(browser: Browser, here: Station, names: bool) -> None:
    await key(here, 1, HOSTILE[:64], V2G, E1, days=80)
    await key(here, 1, HOSTILE[-64:], V2G, E1)
    await fill(here, "a\n\r\x00\u202eb")
    picture = f"hostile-{'names' if names else 'none'}"
    async with showing(here, watching(here), names=names) as url, opened(browser, url, picture) as page:
        assert await page.evaluate("() => document.querySelectorAll('script, img, [onerror]').length") == 0
        assert "owned" not in await page.title()
        text = await page.locator("body").inner_text()
        assert ("<script>" in text) is names
        assert ("{{7*7}}" in text) is names
        assert [character for character in text if not character.isprintable() and character not in "\n\t"] == []
        assert await width_of(page) <= WIDE["width"]
        assert await faults_of(page) == []


async def test_no_script_runs_whoever_puts_it_there(browser: Browser, here: Station) -> None:
    """The policy itself, tried: what a fault in the escaping would let in."""
    context = await browser.new_context()
    page = await context.new_page()
    async with showing(here, watching(here)) as url:
        await page.goto(url)
        await page.evaluate(
            "() => {const s = document.createElement('script'); s.text = 'window.owned = 1';"
            " document.body.append(s); document.body.setAttribute('onclick', 'window.owned = 2');"
            " document.body.setAttribute('style', 'margin-top: 77px')}"
        )
        await page.locator("h1").click()
        assert await page.evaluate("() => window.owned") is None
        assert await page.evaluate("() => getComputedStyle(document.body).marginTop") != "77px"
    await context.close()


async def test_it_is_asked_again_by_itself_only_where_that_is_wanted(browser: Browser, here: Station) -> None:
    async with showing(here, watching(here)) as url, opened(browser, url, "still") as page:
        assert await page.locator("meta[http-equiv]").count() == 0
        await page.get_by_role("link", name="keep refreshing").click()
        assert await page.locator("meta[http-equiv=refresh]").get_attribute("content") == "10"
        await page.get_by_role("link", name="stop refreshing").click()
        assert await page.locator("meta[http-equiv]").count() == 0


async def test_a_real_daemon_shows_a_tpm_that_is_gone(
    browser: Browser, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    (tmp_path / "stationkey.toml").write_text(f'[metrics]\nlisten = "{listen}"\n')
    options = ("--broker", mosquitto.url, "--keystore", swtpm.uri, "--config", str(tmp_path / "stationkey.toml"))
    with DaemonStation(tmp_path, *options), Josev(mosquitto) as josev:
        assert josev.ask(generate_csr()).csr
        async with opened(browser, f"http://{listen}/", "daemon") as page:
            assert await page.locator("header .pill.ok").count() == 1
            assert await page.get_by_text("no key has", exact=False).count() == 1
            assert await page.locator("#pending ~ table tbody tr").count() == 1
        swtpm.kill()
        assert josev.ask(generate_csr()).data["status"] == "rejected"
        await until(browser, f"http://{listen}/", ".log .outcome.bad")
        async with opened(browser, f"http://{listen}/", "tpm-gone") as page:
            assert await page.locator("header .pill.trouble").count() == 1
            assert await page.locator(".problems .bad").count() >= 1
            assert await page.locator("#keystore ~ .dot.bad").count() == 1
            assert await page.locator(".log .outcome.bad").count() == 1
            assert await faults_of(page) == []
