"""Going back to the key before: what Josev says, what stands under ``active/``, and a thousand days of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from parts import E1, E2, NOW, V2G, Authority, Clocks, Station, key_id_in, new_id, pem, station
from stationkey.config.settings import DAY
from stationkey.ledger.lifecycle import KeyState

PENDING, ACTIVE, DEACTIVATED, DESTROYED = (
    KeyState.PRE_ACTIVATION,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.DESTROYED,
)
LIFE = 90
"""Days that a certificate is valid."""
GRACE = 7
AUTHORITY = Authority()


class Josev:
    """Installs certificates into a directory."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path

    def install(self, csr: str) -> Path:
        certificate = AUTHORITY.sign(csr, begins=NOW, ends=NOW + timedelta(days=LIFE))
        path = self.path / f"{key_id_in(csr)}.crt"
        path.write_bytes(pem(certificate, AUTHORITY.sub))
        return path


@pytest.fixture
def josev(tmp_path: Path) -> Josev:
    return Josev(tmp_path / "certificates")


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    """A station that cannot see Josev's certificates."""
    async with station(tmp_path / "state") as made:
        yield made


@pytest.fixture
async def seeing(tmp_path: Path, josev: Josev) -> AsyncIterator[Station]:
    """A station that can."""
    async with station(tmp_path / "state", certificate_dir=josev.path) as made:
        yield made


async def renewed(here: Station, evse_id: str | None = None) -> tuple[str, str]:
    """Install two keys, one after the other, by order alone."""
    keys = []
    for _ in range(2):
        keys.append(await here.key(V2G, evse_id))
        await here.told("installed", V2G, evse_id)
    return keys[0], keys[1]


async def test_the_key_before_stays_usable_with_its_chain_under_a_name_of_its_own(
    seeing: Station, josev: Josev
) -> None:
    first = await seeing.csr()
    josev.install(first)
    await seeing.told("installed")
    before = (seeing.active_dir / "v2g_certificate.pem").read_bytes()
    second = await seeing.csr()
    josev.install(second)
    await seeing.told("installed")

    assert (seeing.active_dir / "v2g_certificate.previous.pem").read_bytes() == before
    assert seeing.shown() == {
        "v2g_certificate.pem": key_id_in(second),
        "v2g_certificate.previous.pem": key_id_in(first),
    }


@pytest.mark.parametrize("path", ["active/v2g_certificate.previous.pem", "/keys/{}.pem"])
async def test_josev_goes_back_by_the_path_of_the_key(here: Station, path: str) -> None:
    old, new = await renewed(here)

    await here.told("installed", private_key_path=here.state_dir / path.format(old))

    assert here.states(old, new) == [ACTIVE, DEACTIVATED]
    assert here.shown() == {"v2g_certificate.pem": old, "v2g_certificate.previous.pem": new}
    assert here.events(old)[-1] == "restored"
    assert here.events(new)[-1] == "replaced"
    assert here.service.counters.restorations == 1
    assert here.counts["installed"] == 3


async def test_josev_tries_both_in_turn(here: Station) -> None:
    """By A02.FR.28 of the errata."""
    old, new = await renewed(here)
    for number in range(1, 5):
        await here.told("installed", private_key_path=here.active_dir / "v2g_certificate.previous.pem")
        assert here.states(*((old, new) if number % 2 else (new, old))) == [ACTIVE, DEACTIVATED]

    await here.pass_by(30 * DAY)

    assert here.states(old, new) == [DEACTIVATED, ACTIVE]


async def test_a_message_that_comes_again_goes_back_once(here: Station) -> None:
    old, new = await renewed(here)
    message_id = new_id()
    for _ in range(2):
        await here.told(
            "installed", private_key_path=here.active_dir / "v2g_certificate.previous.pem", message_id=message_id
        )

    assert here.states(old, new) == [ACTIVE, DEACTIVATED]


async def test_josev_goes_back_by_the_certificate_that_is_left(seeing: Station, josev: Josev) -> None:
    """By A02.FR.29 of the errata it discards the renewed certificate."""
    old, new = await seeing.csr(), await seeing.csr()
    for csr in (old, new):
        path = josev.install(csr)
        await seeing.told("installed")
    keys = key_id_in(old), key_id_in(new)
    await seeing.told("installed")  # both certificates are there: a repeat
    assert seeing.states(*keys) == [DEACTIVATED, ACTIVE]
    path.unlink()

    await seeing.told("installed")

    assert seeing.states(*keys) == [ACTIVE, DEACTIVATED]
    await seeing.told("deleted")
    assert seeing.states(*keys) == [ACTIVE, DESTROYED]


async def test_josev_goes_back_after_it_deleted_the_renewed_certificate(seeing: Station, josev: Josev) -> None:
    old, new = await seeing.csr(), await seeing.csr()
    for csr in (old, new):
        path = josev.install(csr)
        await seeing.told("installed")
    path.unlink()
    await seeing.told("deleted")
    assert seeing.states(key_id_in(old), key_id_in(new)) == [DEACTIVATED, DESTROYED]
    assert seeing.shown() == {"v2g_certificate.previous.pem": key_id_in(old)}

    await seeing.told("installed")

    assert seeing.shown() == {"v2g_certificate.pem": key_id_in(old)}


async def test_of_two_replaced_keys_none_is_guessed(seeing: Station, josev: Josev) -> None:
    csrs = [await seeing.csr() for _ in range(3)]
    for csr in csrs:
        path = josev.install(csr)
        await seeing.told("installed")
    path.unlink()
    before = seeing.dump()

    await seeing.told("installed")

    assert seeing.dump() == before
    assert seeing.counts["status_fits_no_key"] == 1


async def test_while_a_certificate_may_be_hidden_nothing_goes_back(seeing: Station, josev: Josev) -> None:
    csrs = [await seeing.csr() for _ in range(2)]
    for csr in csrs:
        path = josev.install(csr)
        await seeing.told("installed")
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA")
    before = seeing.dump()

    await seeing.told("installed")

    assert seeing.dump() == before


async def test_one_evse_goes_back_and_the_others_do_not(here: Station) -> None:
    first, second = await renewed(here, E1), await renewed(here, E2)

    await here.told(
        "installed", V2G, E2, private_key_path=here.active_dir / "v2g_certificate.DE%2AABC%2AE2.previous.pem"
    )

    assert here.states(*first, *second) == [DEACTIVATED, ACTIVE, ACTIVE, DEACTIVATED]


@pytest.mark.parametrize("verb", ["installed", "deleted"])
async def test_where_there_is_no_key_before_its_file_names_none(here: Station, verb: str) -> None:
    key = await here.key()
    await here.told("installed")
    before = here.dump()

    path = here.active_dir / "v2g_certificate.previous.pem"
    await here.told("installed" if verb == "installed" else "deleted", private_key_path=path)

    assert here.dump() == before
    assert here.states(key) == [ACTIVE]
    assert here.counts["status_fits_no_key"] == 1


async def test_a_key_that_signs_no_more_is_not_restored(here: Station) -> None:
    old, new = await renewed(here)
    with here.ledger.database.transaction() as sql:
        sql.execute("UPDATE secret SET private = x'00' WHERE key_number = 1")

    await here.told("installed", private_key_path=f"/keys/{old}.pem")

    assert here.states(old, new) == [DEACTIVATED, ACTIVE]
    assert here.counts["key_damaged"] == 1


async def test_josev_deletes_the_key_before_by_its_file(here: Station) -> None:
    """By A02.FR.10 of the errata."""
    old, new = await renewed(here)

    await here.told("deleted", private_key_path=here.active_dir / "v2g_certificate.previous.pem")

    assert here.states(old, new) == [DESTROYED, ACTIVE]
    assert here.record(new).confirmed
    assert here.shown() == {"v2g_certificate.pem": new}


# Time.


async def test_a_certificate_that_never_connects_costs_no_key_that_does(seeing: Station, josev: Josev) -> None:
    csrs = [await seeing.csr() for _ in range(2)]
    for csr in csrs:
        josev.install(csr)
        await seeing.told("installed")
    old, new = map(key_id_in, csrs)

    await seeing.pass_by((LIFE - 1) * DAY)
    assert seeing.states(old, new) == [DEACTIVATED, ACTIVE]
    await seeing.pass_by(DAY)
    assert seeing.states(old, new) == [DESTROYED, ACTIVE]  # its certificate has expired


@pytest.mark.parametrize("years", [-50, 50])
async def test_a_clock_that_is_wrong_ends_no_key(seeing: Station, josev: Josev, years: int) -> None:
    csrs = [await seeing.csr() for _ in range(2)]
    for csr in csrs:
        josev.install(csr)
        await seeing.told("installed")
        seeing.clocks.wall += years * 365 * 86_400

    await seeing.pass_by((LIFE - 1) * DAY)

    assert seeing.states(*map(key_id_in, csrs)) == [DEACTIVATED, ACTIVE]


async def test_a_station_that_was_off_for_a_month_has_both_keys(tmp_path: Path) -> None:
    clocks = Clocks()
    async with station(tmp_path / "state", clocks=clocks) as here:
        keys = await renewed(here)
        await here.pass_by(GRACE * DAY)
    clocks.wall += 31 * 86_400
    clocks.machine = 0.0
    async with station(tmp_path / "state", clocks=clocks) as here:
        await here.pass_by(DAY)

        assert here.states(*keys) == [DEACTIVATED, ACTIVE]
        assert len(here.shown()) == 2


RENEWAL = 60
"""Days between two renewals."""


class Years:
    """Lets days pass, on each of which something may happen: a refused certificate, a way back, a wrong clock.

    It knows what the station does not: which certificates the CSMS accepts.
    """

    def __init__(self, seed: int, josev: Josev) -> None:
        self.chance = random.Random(seed)
        self.josev = josev
        self.day = 0
        self.happened: Counter[str] = Counter()
        self._connects, self._expires = "", 0
        self._replaced_on: dict[str, int] = {}

    async def spend_a_day(self, here: Station) -> None:
        self.day += 1
        await here.pass_by(DAY)
        if self.day % 20 == 0:
            here.clocks.wall += self.chance.choice([-1, 1]) * 365 * 86_400
        if self.day % RENEWAL == 1:
            await self._renew(here)
        self._judge(here)

    async def _renew(self, here: Station) -> None:
        csr = await here.csr()
        self.josev.install(csr)
        await here.told("installed")
        before, new = self._connects, key_id_in(csr)
        if not before or self.chance.random() < 0.6:
            self._connects, self._expires = new, self.day + LIFE
            told = self.chance.choice(["deleted", "confirmed", "nothing told"]) if before else "first"
            if told == "deleted":
                await here.told("deleted", private_key_path=f"/keys/{before}.pem")
            elif told == "confirmed":
                here.ledger.transitions.confirm(new, reason="", now=0)
        elif self.chance.random() < 0.7:
            told = "went back"
            await here.told("installed", private_key_path=f"/keys/{before}.pem")
        else:
            told = "refused"
        self.happened[told] += 1

    def _judge(self, here: Station) -> None:
        if self.day < self._expires:
            assert self._connects in here.shown().values(), f"the key that connects is lost on day {self.day}"
        living = here.ledger.keys.usable()
        assert [key.state for key in living].count(ACTIVE) == 1
        assert [key.previous for key in living].count(True) <= 1
        for key in living:
            if key.state is ACTIVE:
                self._replaced_on.pop(key.key_id, None)
                continue
            since = self._replaced_on.setdefault(key.key_id, self.day)
            assert self.day - since <= (LIFE if key.previous else GRACE + 1), f"{key.key_id} is kept since day {since}"


@pytest.mark.parametrize("seed", [0, 2])
async def test_a_thousand_days_of_renewals_lose_no_key_that_is_needed_and_keep_none_beyond_its_bounds(
    tmp_path: Path, josev: Josev, seed: int
) -> None:
    """With restarts, and months in which the station is off."""
    clocks, years = Clocks(), Years(seed, josev)
    while years.day < 1000:
        async with station(tmp_path / "state", clocks=clocks, certificate_dir=josev.path) as here:
            with here.ledger.database.reading() as sql:
                sql.execute("PRAGMA synchronous=OFF")  # no power is lost
            for _ in range(years.chance.randint(20, 120)):
                await years.spend_a_day(here)
        clocks.wall += years.chance.choice([0, 31 * 86_400])
        clocks.machine = 0.0
    assert set(years.happened) == {"first", "deleted", "confirmed", "nothing told", "went back", "refused"}
