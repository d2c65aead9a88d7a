"""Statuses of a failed installation and of a deletion, matched to keys."""

from __future__ import annotations

from datetime import timedelta

import pytest
from josevs import ACTIVE, DEACTIVATED, DESTROYED, PENDING, Josev

from parts import Station, key_id_in
from stationkey.config.settings import DAY
from stationkey.ledger.lifecycle import KeyEvent

pytest_plugins = ["josevs"]


# failed_installation.


async def test_a_failure_ends_the_newest_pending_key_soon_and_only_once(here: Station) -> None:
    older, newest = await here.key(), await here.key()
    long = here.record(newest).due
    assert long is not None

    await here.told("failed_installation")
    soon = here.record(newest).due
    await here.pass_by(1000)
    await here.told("failed_installation")

    assert soon is not None
    assert soon < long
    assert here.record(newest).due == soon
    assert here.record(newest).failed
    assert here.events(newest) == ["CSR answered", "installation failed"]
    assert here.record(older).due == long
    assert here.states(older, newest) == [PENDING, PENDING]


async def test_a_key_whose_installation_failed_can_still_be_installed(here: Station) -> None:
    key = await here.key()
    await here.told("failed_installation")

    await here.told("installed")

    assert here.states(key) == [ACTIVE]
    assert here.record(key).due is None


async def test_a_failure_does_not_lengthen_a_life_that_is_nearly_over(here: Station) -> None:
    key = await here.key()
    due = here.record(key).due
    assert due is not None
    await here.pass_by(due - 1000)

    await here.told("failed_installation")

    assert here.record(key).due == due


# deleted.


async def test_deleted_destroys_the_active_key(here: Station) -> None:
    key = await here.key()
    await here.told("installed")

    await here.told("deleted")

    assert here.states(key) == [DESTROYED]
    assert not (here.active_dir / "v2g_certificate.pem").exists()


async def test_deleted_after_a_renewal_destroys_the_old_key_and_never_the_new(here: Station) -> None:
    old = await here.key()
    await here.told("installed")
    new = await here.key()
    await here.told("installed")

    for _ in range(3):
        await here.told("deleted")

    assert here.states(old, new) == [DESTROYED, ACTIVE]


@pytest.mark.parametrize("end", ["expired", "compromised", "retired and expired", "destroyed"])
async def test_deleted_never_means_the_new_key_even_if_the_old_one_is_gone_already(here: Station, end: str) -> None:
    old = await here.key()
    await here.told("installed")
    if end == "retired and expired":
        here.ledger.transitions.apply(old, KeyEvent.RETIRED, reason="", now=0)
        await here.pass_by(0)
    new = await here.key()
    await here.told("installed")
    if end == "compromised":
        here.ledger.transitions.apply(old, KeyEvent.COMPROMISE_REPORTED, reason="", now=0)
    elif end == "destroyed":
        here.ledger.transitions.apply(old, KeyEvent.DESTRUCTION_ORDERED, reason="", now=0)
    else:
        here.ledger.transitions.confirm(new, reason="", now=0)
        await here.pass_by(0)
        await here.pass_by(8 * DAY)
        assert here.states(old) == [DESTROYED]

    await here.told("deleted")

    assert here.states(new) == [ACTIVE]
    assert here.counts["status_fits_no_key"] == 1


async def test_a_certificate_after_one_that_was_deleted_can_be_deleted_too(here: Station) -> None:
    keys = []
    for _ in range(2):
        keys.append(await here.key())
        await here.told("installed")
        await here.told("deleted")

    assert here.states(*keys) == [DESTROYED, DESTROYED]


async def test_deleted_never_means_a_pending_key_unless_it_is_named(here: Station) -> None:
    key = await here.key()

    await here.told("deleted")
    assert here.states(key) == [PENDING]
    await here.told("deleted", private_key_path=f"/keys/{key}.pem")
    assert here.states(key) == [DESTROYED]


async def test_deleted_means_the_key_whose_certificate_is_there_no_more(seeing: Station, josev: Josev) -> None:
    old, new = await seeing.csr(), await seeing.csr()
    file = josev.install(old, age=timedelta(days=2))
    await seeing.told("installed")
    josev.install(new)
    await seeing.told("installed")

    await seeing.told("deleted")
    assert seeing.states(key_id_in(old), key_id_in(new)) == [DEACTIVATED, ACTIVE]  # both are still there
    file.unlink()
    await seeing.told("deleted")
    assert seeing.states(key_id_in(old), key_id_in(new)) == [DESTROYED, ACTIVE]
    await seeing.told("deleted")
    assert seeing.states(key_id_in(new)) == [ACTIVE]
    for file in josev.path.iterdir():
        file.unlink()
    await seeing.told("deleted")
    assert seeing.states(key_id_in(new)) == [DESTROYED]
