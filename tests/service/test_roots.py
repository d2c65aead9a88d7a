"""Several V2G roots: a key and chain for each side by side, and each with a key to go back to."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from parts import NOW, Authority, Station, key_id_in, pem, station
from stationkey.config.settings import DAY, Bounds, Terms
from stationkey.ledger.lifecycle import KeyState
from stationkey.x509.certificate import read_chain
from stationkey.x509.path import root_of

PENDING, ACTIVE, DEACTIVATED, DESTROYED = (
    KeyState.PRE_ACTIVATION,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.DESTROYED,
)
ONE, OTHER, THIRD = Authority("one "), Authority("other "), Authority("third ")
TWO_ROOTS = Terms(bounds=Bounds(root_limit=2))


@pytest.fixture
def certificate_dir(tmp_path: Path) -> Path:
    path = tmp_path / "certificates"
    path.mkdir()
    return path


@pytest.fixture
async def here(tmp_path: Path, certificate_dir: Path) -> AsyncIterator[Station]:
    async with station(tmp_path / "state", certificate_dir=certificate_dir, terms=TWO_ROOTS) as made:
        yield made


async def install(
    here: Station, certificate_dir: Path, authority: Authority, *, age: float = 1, csr: str | None = None
) -> str:
    """Have an authority sign a CSR, install the certificate and say so; the name of the key."""
    csr = csr or await here.csr()
    certificate = authority.sign(csr, begins=NOW - timedelta(days=age))
    (certificate_dir / f"{key_id_in(csr)}.crt").write_bytes(pem(certificate, authority.sub))
    await here.told("installed")
    return key_id_in(csr)


async def test_a_key_of_each_root_is_active_and_each_has_one_to_go_back_to(
    here: Station, certificate_dir: Path
) -> None:
    old = [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)]
    new = [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)]

    assert here.states(*old, *new) == [DEACTIVATED, DEACTIVATED, ACTIVE, ACTIVE]
    roots = [here.record(key).root for key in new]
    assert len(set(roots)) == 2
    assert here.shown() == {
        f"v2g_certificate.root-{root}{part}.pem": key
        for part, keys in (("", new), (".previous", old))
        for root, key in zip(roots, keys, strict=True)
    }


async def test_the_newest_certificate_of_each_root_is_used(here: Station, certificate_dir: Path) -> None:
    """By A02.FR.15: one that is older than that of another root is the newest of its own."""
    csrs = [await here.csr() for _ in range(2)]
    newer = await install(here, certificate_dir, ONE, age=1, csr=csrs[1])
    older = await install(here, certificate_dir, OTHER, age=9, csr=csrs[0])

    assert here.states(newer, older) == [ACTIVE, ACTIVE]


async def test_an_older_certificate_of_the_same_root_is_not_used(here: Station, certificate_dir: Path) -> None:
    csrs = [await here.csr() for _ in range(2)]
    newer = await install(here, certificate_dir, ONE, age=1, csr=csrs[1])
    older = await install(here, certificate_dir, ONE, age=9, csr=csrs[0])

    assert here.states(newer, older) == [ACTIVE, PENDING]
    assert here.counts["certificate_older"] == 1


async def test_going_back_and_deleting_are_for_one_root(here: Station, certificate_dir: Path) -> None:
    old = [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)]
    new = [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)]
    (certificate_dir / f"{new[0]}.crt").unlink()

    await here.told("installed")

    assert here.states(*old, *new) == [ACTIVE, DEACTIVATED, DEACTIVATED, ACTIVE]
    root = here.record(new[1]).root
    await here.told("installed", private_key_path=here.active_dir / f"v2g_certificate.root-{root}.previous.pem")
    assert here.states(*old, *new) == [ACTIVE, ACTIVE, DEACTIVATED, DEACTIVATED]
    await here.told("deleted", private_key_path=here.active_dir / f"v2g_certificate.root-{root}.pem")
    assert here.states(*old, *new) == [ACTIVE, DESTROYED, DEACTIVATED, DEACTIVATED]


async def test_the_key_before_is_kept_for_each_root(here: Station, certificate_dir: Path) -> None:
    old = [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)]
    new = [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)]
    here.ledger.transitions.confirm(new[0], reason="", now=0)

    await here.pass_by(0)
    await here.pass_by(30 * DAY)

    assert here.states(*old, *new) == [DESTROYED, DEACTIVATED, ACTIVE, ACTIVE]


async def test_a_certificate_of_one_more_root_changes_nothing(here: Station, certificate_dir: Path) -> None:
    keys = [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)]
    third = await install(here, certificate_dir, THIRD)

    assert here.states(*keys, third) == [ACTIVE, ACTIVE, PENDING]
    assert here.counts["too_many_roots"] == 1
    renewed = await install(here, certificate_dir, ONE)
    assert here.states(renewed) == [ACTIVE]


@pytest.mark.parametrize("before", [1, 2])
async def test_the_next_renewal_takes_up_a_change_of_the_option(
    tmp_path: Path, certificate_dir: Path, before: int
) -> None:
    keys = []
    async with station(
        tmp_path / "state", certificate_dir=certificate_dir, terms=Terms(bounds=Bounds(root_limit=before))
    ) as here:
        keys += [await install(here, certificate_dir, authority) for authority in (ONE, OTHER)][-before:]
        assert here.states(*keys) == [ACTIVE] * before
    async with station(
        tmp_path / "state", certificate_dir=certificate_dir, terms=Terms(bounds=Bounds(root_limit=3 - before))
    ) as here:
        new = await install(here, certificate_dir, OTHER)

        assert here.states(*keys, new) == [DEACTIVATED] * before + [ACTIVE]
        assert len(list(here.active_dir.glob("*.previous.pem"))) == 1


async def test_roots_are_told_apart_with_the_root_in_the_chain_or_without_it(here: Station) -> None:
    csr = await here.csr()
    names = set()
    for authority in (ONE, OTHER):
        leaf = authority.sign(csr)
        chains = [read_chain(pem(leaf, authority.sub)), read_chain(pem(leaf, authority.sub, authority.root))]
        (name,) = {root_of(chain) for chain in chains if chain is not None}
        names.add(name)

    assert len(names) == 2
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)
