"""The status page of a station in this process, served on a loopback port, in every state that a key can be in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from peers import free_port

from parts import E1, E2, STATION, V2G, V2G20, Station, key_id_in, new_id, request
from stationkey.errors import RequestRefused
from stationkey.keystore.stores import KeyStores
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.observability.health import Health
from stationkey.observability.http import Endpoint
from stationkey.observability.page import StatusPage
from stationkey.observability.status import DaemonGlance, ShardCondition, ShardGlance, SiteCondition, SiteGlance
from stationkey.system.listener import Address, Listener
from stationkey.system.systemd import ServiceManager

TPM = "tpm2:device:/dev/tpmrm0"
DAY = 86400.0
BIDI = "\u202emoc.elpmaxe\u202c\u2066evil"
HOSTILE = f'<script>document.title="owned"</script><img src=x onerror=alert(1)>"&\'{{{{7*7}}}}{BIDI}'
"""Of what the contract does not let in, too: the page does not count on it."""


OWN = SiteCondition(2, True, 0.5, "", (ShardCondition(0, 3, True, 1, 0),))
GLANCE = SiteGlance(
    shards=(
        ShardGlance(
            number=0,
            holder="host-a",
            held=True,
            seconds=61.0,
            epoch=3,
            stations=41,
            in_hand=1,
            waiting=0,
            undelivered=2,
        ),
        ShardGlance(
            number=1, holder="", held=False, seconds=5.0, epoch=7, stations=39, in_hand=0, waiting=0, undelivered=5
        ),
    ),
    daemons=(
        DaemonGlance(name="host-a", version="0.1.0", living=True, seconds=1.0, shards=1, trouble=""),
        DaemonGlance(name=HOSTILE, version="0.1.0", living=False, seconds=9.0, shards=0, trouble=""),
    ),
)
"""A site of two daemons, of which one is gone, with the shard that it had."""


class Edge:
    """A broker's connection, with nothing to do."""

    def __init__(self, *, connected: bool = True) -> None:
        self.connected, self.in_hand, self.waiting = connected, 0, 0


def watching(here: Station, *, connected: bool = True, keystore: str = TPM) -> Health:
    health = Health(
        KeyStores.only(keystore, here.keystore),
        ServiceManager(),
        broker="mqtt://127.0.0.1:1883",
        patience=30.0,
        clock=lambda: here.clocks.wall,
    )
    health.descriptions["default"] = "TPM 2.0 by Example, firmware 7.85"
    health.watch(here.service, Edge(connected=connected))
    (health.connected if connected else health.away)()
    return health


def in_site(health: Health) -> Health:
    """Let the daemon have a shard of the site that `GLANCE` shows."""

    async def glance() -> SiteGlance:
        return GLANCE

    health.site = lambda: OWN
    health.glance = glance
    return health


@asynccontextmanager
async def showing(here: Station, health: Health, *, names: bool = False) -> AsyncIterator[str]:
    """Serve the page; its URL. `names`: as over a UNIX socket, which a browser cannot open."""
    page = StatusPage(health, names=names, clock=lambda: here.clocks.wall)
    address = Address.parse(f"127.0.0.1:{free_port()}")
    with Listener(address) as listener:
        async with Endpoint(listener, {"/": page.once, "/live": page.live}):
            yield f"http://{address}/"


async def key(here: Station, days_ago: float, common_name: str, *what: Any, days: float | None = None) -> str:
    """Ask for a key so long ago; with `days`, its certificate is installed then and expires so many days from now."""
    wall = here.clocks.wall
    here.clocks.wall = wall - days_ago * DAY
    response = await here.service.answer(request(*what, common_name=common_name))
    key_id = key_id_in(str(response.data.csr))
    if days is not None:
        here.ledger.transitions.activate(
            key_id,
            chain="",
            not_after=int(wall + days * DAY),
            reason="the certificate is in Josev's directory",
            now=int((here.clocks.wall + 90) * 1000),
            grace_due=int(7 * DAY * 1000),
            useful_until=0,
            message_id=new_id(),
        )
    here.clocks.wall = wall
    return key_id


async def fill(here: Station, common_name: str = "CS-DE-ABC-0042") -> None:
    """A key in every state, and a request of every outcome."""
    await key(here, 91, common_name, V2G, E1, days=-1)
    await key(here, 80, common_name, V2G, E2, days=12)
    compromised = await key(here, 70, common_name, V2G20, E2)
    here.ledger.transitions.apply(compromised, KeyEvent.COMPROMISE_REPORTED, reason="board stolen", now=now(here))
    await key(here, 66, common_name, STATION, days=20)
    await key(here, 5, common_name, STATION, days=360)  # replaces the last one
    await key(here, 2, common_name, V2G20, E1, days=88)
    unknown = await key(here, 2, common_name, V2G, "DE*ABC*E3")
    here.ledger.transitions.activate(
        unknown, chain=None, not_after=None, reason="", now=now(here), grace_due=0, useful_until=0, message_id=None
    )
    failed = await key(here, 0.4, common_name, V2G, "DE*ABC*E4")
    here.ledger.transitions.apply(
        failed, KeyEvent.INSTALLATION_FAILED, reason="Josev could not install it", now=now(here), due=int(DAY * 1000)
    )
    await key(here, 0.01, common_name, V2G20, "DE*ABC*E4")
    refused = RequestRefused(f"the common name {common_name!r} is not on the list", reason="common_name_not_allowed")
    await here.service.reject(new_id(), refused)
    here.ledger.rejections.write()
    await here.service.renewal.look()


def now(here: Station) -> int:
    return int(here.clocks.wall * 1000)
