"""``make screenshot``: take docs/status-page.png of a real daemon after the whole circle of the demo.

The daemon has a broker, a TPM simulator behind a resource manager, and a CSMS; Debian's chromium shows its page.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from demo import ORGANIZATION, SECC_ID, ask, show_circle, show_rejected, until_active
from peers import Daemon, Mosquitto, ResourceManager, Swtpm, free_port
from playwright.async_api import async_playwright
from rich.console import Console

from stationkey import CertificateType

PICTURE = Path(__file__).parents[1] / "docs/status-page.png"
WIDTH, HEIGHT = 960, 1150
FRESH_AFTER_MS = 1100
"""The page is at most a second old."""


async def shoot(url: str) -> None:
    """Take the picture."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        page = await browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        await page.goto(url)
        await page.wait_for_timeout(FRESH_AFTER_MS)
        await page.reload()
        await page.screenshot(path=PICTURE)
        await browser.close()


def main() -> int:
    """Run the circle and take the picture; 0 if everything was as it should be."""
    quiet = Console(file=io.StringIO())
    with tempfile.TemporaryDirectory(prefix="stationkey-screenshot-") as name:
        folder, listen = Path(name), f"127.0.0.1:{free_port()}"
        (folder / "stationkey.toml").write_text(
            f'[josev]\ncertificate_dir = "{folder}/certificates"\n[metrics]\nlisten = "{listen}"\n'
        )
        with (
            Mosquitto(folder / "broker") as broker,
            Swtpm(folder / "tpm") as tpm,
            ResourceManager(folder / "manager", tpm=tpm.tcti) as manager,
        ):
            os.environ.update(manager.environment)
            daemon = Daemon(
                folder / "daemon",
                *("--broker", broker.url, "--keystore", f"tpm2:{manager.tcti}"),
                *("--state-dir", str(folder / "state"), "--config", str(folder / "stationkey.toml")),
            )
            with daemon:
                right = asyncio.run(show_circle(quiet, broker, folder)) and until_active(folder / "state")
                right = show_rejected(quiet, broker, daemon) and right
                names = ("--common-name", SECC_ID, "--organization-name", ORGANIZATION, "--country-name", "DE")
                waiting = ask(broker, CertificateType.V2G_CERTIFICATE, *names, "--evse-id", "DE*ABC*E2")
                asyncio.run(shoot(f"http://{listen}/"))
                daemon.terminate()
    return 0 if right and waiting.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
