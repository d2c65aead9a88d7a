"""Which key a status means: by its path, by the certificate, by order; and never by a guess."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from josevs import ACTIVE, DEACTIVATED, DESTROYED, PENDING, Josev

from parts import E1, E2, STATION, V2G, Station, Verb, key_id_in, new_id, pem
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.service import josev_files

pytest_plugins = ["josevs"]


# installed, by order.


async def test_installed_activates_the_newest_pending_key_and_keeps_the_others(here: Station) -> None:
    keys = [await here.key() for _ in range(3)]

    await here.told("installed")

    assert here.states(*keys) == [PENDING, PENDING, ACTIVE]
    assert here.counts["installed"] == 1


async def test_installed_deactivates_the_key_before(here: Station) -> None:
    old = await here.key()
    await here.told("installed")
    new = await here.key()

    await here.told("installed")

    assert here.states(old, new) == [DEACTIVATED, ACTIVE]
    assert here.events(old) == ["CSR answered", "installed", "confirmed", "replaced"]
    assert here.ledger.keys.history(old)[-1].reason == f"by {new}"


async def test_the_keys_of_each_evse_are_apart(here: Station) -> None:
    first, second, none = await here.key(V2G, E1), await here.key(V2G, E2), await here.key(V2G)

    await here.told("installed", V2G, E1)
    assert here.states(first, second, none) == [ACTIVE, PENDING, PENDING]
    await here.told("installed", V2G, E2)
    assert here.states(first, second, none) == [ACTIVE, ACTIVE, PENDING]
    await here.told("installed", V2G)
    assert here.states(first, second, none) == [ACTIVE, ACTIVE, ACTIVE]


@pytest.mark.parametrize("verb", ["installed", "deleted", "failed_installation"])
async def test_a_v2g_status_never_touches_a_charging_station_key(here: Station, verb: Verb) -> None:
    active = await here.key(STATION)
    await here.told("installed", STATION)
    pending = await here.key(STATION)
    before = here.dump()

    await here.told(verb, V2G)
    await here.told(verb, V2G, private_key_path=f"/keys/{pending}.pem")
    await here.told(verb, V2G, private_key_path=here.active_dir / f"{STATION}.pem")

    assert here.dump() == before
    assert here.states(active, pending) == [ACTIVE, PENDING]


async def test_a_status_without_an_evse_means_the_only_one_that_has_keys(here: Station) -> None:
    key = await here.key(V2G, E1)

    await here.told("installed")

    assert here.states(key) == [ACTIVE]


# What changes nothing.


@pytest.mark.parametrize("verb", ["installed", "deleted", "failed_installation"])
async def test_a_status_that_fits_no_key_is_logged_and_counted_and_changes_nothing(
    here: Station, caplog: pytest.LogCaptureFixture, verb: Verb
) -> None:
    await here.key(V2G, E1)
    before = here.dump()

    await here.told(verb, V2G, E2)

    assert here.dump() == before
    assert here.counts["status_fits_no_key"] == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"ignoring status '{verb}'" in record.getMessage()


@pytest.mark.parametrize("verb", ["installed", "deleted", "failed_installation"])
async def test_a_status_that_could_mean_several_evses_is_not_guessed(here: Station, verb: Verb) -> None:
    for evse_id in (E1, E2):
        await here.key(V2G, evse_id)
    if verb == "deleted":
        for evse_id in (E1, E2):
            await here.told("installed", V2G, evse_id)
    before = here.dump()

    await here.told(verb)

    assert here.dump() == before
    assert here.counts["status_fits_no_key"] == 1


@pytest.mark.parametrize("same_id", [True, False], ids=["the same id", "a new id"])
@pytest.mark.parametrize("verb", ["installed", "deleted", "failed_installation"])
async def test_a_repeated_status_changes_nothing(here: Station, verb: Verb, same_id: bool) -> None:
    for _ in range(3):
        await here.key()
    if verb == "deleted":
        await here.told("installed")
        await here.key()
        await here.told("installed")
    message_id = new_id()
    await here.told(verb, message_id=message_id)
    before = here.dump()

    for _ in range(3):
        await here.told(verb, message_id=message_id if same_id else new_id())

    assert here.dump() == before


async def test_a_repeat_of_the_same_id_changes_nothing_although_a_younger_key_is_pending(here: Station) -> None:
    message_id = new_id()
    await here.key()
    await here.told("installed", message_id=message_id)
    await here.key()
    before = here.dump()

    await here.told("installed", message_id=message_id)

    assert here.dump() == before


# By path.


@pytest.mark.parametrize("name", ["{}.pem", "{}", "{}.key"])
async def test_a_path_that_ends_in_the_name_of_a_key_means_that_key(here: Station, name: str) -> None:
    first, second = await here.key(), await here.key()

    await here.told("installed", private_key_path=f"/somewhere/{name.format(first)}")

    assert here.states(first, second) == [ACTIVE, PENDING]


async def test_the_file_under_active_means_the_keys_of_its_owner(here: Station) -> None:
    first, second, other = await here.key(V2G, E1), await here.key(V2G, E1), await here.key(V2G, E2)

    await here.told("installed", private_key_path=here.active_dir / "v2g_certificate.DE%2AABC%2AE1.pem")

    assert here.states(first, second, other) == [PENDING, ACTIVE, PENDING]


async def test_a_link_to_the_file_under_active_means_the_same(here: Station, tmp_path: Path) -> None:
    key, _ = await here.key(V2G, E1), await here.key(V2G, E2)
    await here.told("installed", V2G, E1)
    link = tmp_path / "secc.key"
    link.symlink_to(here.active_dir / "v2g_certificate.DE%2AABC%2AE1.pem")

    await here.told("deleted", private_key_path=link)

    assert here.states(key) == [DESTROYED]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/etc/ssl/private/other.pem", id="another file"),
        pytest.param("/elsewhere/v2g_certificate.pem", id="the right name elsewhere"),
        pytest.param("", id="empty"),
        pytest.param("0" * 20 + ".pem", id="a key that is not on record"),
        pytest.param("x" * 5000, id="too long for a path"),
        pytest.param("a\0b", id="with NUL"),
    ],
)
@pytest.mark.parametrize("verb", ["installed", "deleted", "failed_installation"])
async def test_a_path_that_names_no_key_of_ours_changes_nothing(here: Station, verb: Verb, path: str) -> None:
    await here.key()
    before = here.dump()

    await here.told(verb, private_key_path=path)

    assert here.dump() == before
    assert here.counts["status_fits_no_key"] == 1


@pytest.mark.parametrize("verb", ["installed", "deleted", "failed_installation"])
async def test_a_path_and_an_evse_that_contradict_each_other_change_nothing(here: Station, verb: Verb) -> None:
    key, _ = await here.key(V2G, E1), await here.key(V2G, E2)
    before = here.dump()

    await here.told(verb, V2G, E2, private_key_path=f"/keys/{key}.pem")

    assert here.dump() == before


async def test_a_key_that_was_retired_is_not_restored_by_josev(here: Station) -> None:
    old = await here.key()
    await here.told("installed")
    here.ledger.transitions.apply(old, KeyEvent.RETIRED, reason="", now=0)
    new = await here.key()
    await here.told("installed")
    before = here.dump()

    await here.told("installed", private_key_path=f"/keys/{old}.pem")

    assert here.dump() == before
    assert here.states(new) == [ACTIVE]
    assert here.counts["status_fits_no_key"] == 1


# By certificate.


@pytest.mark.parametrize("answered", range(3))
async def test_the_answer_to_any_of_three_csrs_activates_its_own_key(
    seeing: Station, josev: Josev, answered: int
) -> None:
    csrs = [await seeing.csr() for _ in range(3)]
    josev.install(csrs[answered])

    await seeing.told("installed")

    assert seeing.states(*map(key_id_in, csrs)) == [ACTIVE if n == answered else PENDING for n in range(3)]


async def test_the_answers_to_three_csrs_can_come_in_any_order(seeing: Station, josev: Josev) -> None:
    csrs = [await seeing.csr() for _ in range(3)]
    keys = [key_id_in(csr) for csr in csrs]

    for age, answered in enumerate((2, 0, 1)):
        josev.install(csrs[answered], name="secc.pem", age=timedelta(hours=9 - age))
        await seeing.told("installed")

        assert seeing.states(keys[answered]) == [ACTIVE]

    assert seeing.states(*keys) == [DEACTIVATED, ACTIVE, DEACTIVATED]


async def test_of_several_certificates_the_newest_is_meant_and_a_repeat_does_not_go_back_to_an_older(
    seeing: Station, josev: Josev
) -> None:
    """[A02.FR.15]."""
    first, second = await seeing.csr(), await seeing.csr()
    josev.install(first, age=timedelta(days=2))
    josev.install(second, age=timedelta(days=1))
    await seeing.told("installed")
    before = seeing.dump()

    await seeing.told("installed")

    assert seeing.states(key_id_in(first), key_id_in(second)) == [PENDING, ACTIVE]
    assert seeing.dump() == before


@pytest.mark.parametrize("backdated", [timedelta(0), timedelta(minutes=5), timedelta(days=300)], ids=str)
async def test_a_key_that_was_asked_for_after_the_active_one_was_installed_is_newer_whatever_its_times_say(
    seeing: Station, josev: Josev, backdated: timedelta
) -> None:
    """A CA may backdate."""
    first = await seeing.csr()
    josev.install(first, age=timedelta(days=1))
    await seeing.told("installed")
    second = await seeing.csr()
    josev.install(second, age=timedelta(days=1) + backdated)

    await seeing.told("installed")
    assert seeing.states(key_id_in(first), key_id_in(second)) == [DEACTIVATED, ACTIVE]

    await seeing.told("installed")
    assert seeing.states(key_id_in(first), key_id_in(second)) == [DEACTIVATED, ACTIVE]


async def test_a_backdated_certificate_does_not_bring_back_one_that_was_passed_over(
    seeing: Station, josev: Josev
) -> None:
    """The first one begins after the one in use, and before the one that this has replaced."""
    csrs = [await seeing.csr(), await seeing.csr()]
    josev.install(csrs[0], age=timedelta(days=2))
    josev.install(csrs[1], age=timedelta(days=1))
    await seeing.told("installed")
    csrs.append(await seeing.csr())
    josev.install(csrs[2], age=timedelta(days=3))
    for _ in range(3):
        await seeing.told("installed")

        assert seeing.states(*map(key_id_in, csrs)) == [PENDING, DEACTIVATED, ACTIVE]


@pytest.mark.parametrize("remedy", ["private_key_path", "the other file removed"])
async def test_a_certificate_that_may_be_older_is_told_with_its_file_and_times_and_what_to_do(
    seeing: Station, josev: Josev, caplog: pytest.LogCaptureFixture, remedy: str
) -> None:
    """Both keys were asked for before either was installed: which certificate is newer, only its times can say."""
    csrs = [await seeing.csr(), await seeing.csr()]
    keys = [key_id_in(csr) for csr in csrs]
    old = josev.install(csrs[0], age=timedelta(minutes=1))
    await seeing.told("installed")
    path = josev.install(csrs[1], age=timedelta(minutes=6))

    await seeing.told("installed")

    assert seeing.states(*keys) == [ACTIVE, PENDING]
    assert seeing.counts["certificate_older"] == 1
    for text in (str(path), "11:54:00Z", "11:59:00Z"):
        assert text in caplog.text

    if remedy == "private_key_path":
        await seeing.told("installed", private_key_path=f"/keys/{keys[1]}.pem")
    else:
        old.unlink()
        await seeing.told("installed")
    assert seeing.states(*keys) == [DEACTIVATED, ACTIVE]


async def test_the_certificate_says_which_evse_is_meant(seeing: Station, josev: Josev) -> None:
    csrs = [await seeing.csr(V2G, evse_id) for evse_id in (E1, E2)]
    josev.install(csrs[0])

    await seeing.told("installed")

    assert seeing.states(*map(key_id_in, csrs)) == [ACTIVE, PENDING]


@pytest.mark.parametrize("arrangement", ["leaf alone", "leaf last", "DER", "in a folder", "by a link"])
async def test_a_certificate_is_found_however_it_lies_there(
    seeing: Station, josev: Josev, tmp_path: Path, arrangement: str
) -> None:
    csr = await seeing.csr()
    certificate = josev.authority.sign(csr)
    match arrangement:
        case "leaf alone":
            josev.put("cert.pem", pem(certificate))
        case "leaf last":
            josev.put("chain.pem", pem(josev.authority.sub, certificate))
        case "DER":
            josev.put("cert.der", certificate.public_bytes(serialization.Encoding.DER))
        case "in a folder":
            josev.put("secc/cert.pem", pem(certificate))
        case _:
            (tmp_path / "elsewhere.pem").write_bytes(pem(certificate))
            (josev.path / "cert.pem").symlink_to(tmp_path / "elsewhere.pem")
    josev.put("aaa.key", b"-----BEGIN PRIVATE KEY-----\nno certificate\n")
    josev.put("zzz.pem", pem(josev.authority.root))

    await seeing.told("installed")

    assert seeing.states(key_id_in(csr)) == [ACTIVE]
    assert seeing.record(key_id_in(csr)).not_after == int(certificate.not_valid_after_utc.timestamp())


async def test_the_longest_chain_of_a_certificate_is_taken(seeing: Station, josev: Josev) -> None:
    csr = await seeing.csr()
    certificate = josev.authority.sign(csr)
    josev.put("a.pem", pem(certificate))
    josev.put("b.pem", pem(certificate, josev.authority.sub))
    josev.put("c.pem", pem(certificate))

    await seeing.told("installed")

    chain = seeing.record(key_id_in(csr)).chain
    assert chain is not None
    assert x509.load_pem_x509_certificates(chain.encode()) == [certificate, josev.authority.sub]


@pytest.mark.parametrize("by_path", [False, True], ids=["by order", "by path"])
async def test_a_certificate_for_another_key_activates_none(seeing: Station, josev: Josev, by_path: bool) -> None:
    old = await seeing.csr()
    josev.install(old)
    await seeing.told("installed")
    new = await seeing.key()
    (josev.path / f"{key_id_in(old)}.pem").unlink()
    josev.install(await seeing.csr(STATION))
    before = seeing.dump()

    await seeing.told("installed", private_key_path=f"/keys/{new}.pem" if by_path else None)

    assert seeing.dump() == before
    assert seeing.counts["certificate_of_another_key"] == 1


async def test_a_key_that_is_named_is_not_active_because_another_is(seeing: Station, josev: Josev) -> None:
    old = await seeing.csr()
    josev.install(old)
    await seeing.told("installed")
    new = await seeing.key()

    await seeing.told("installed", private_key_path=f"/keys/{new}.pem")

    assert seeing.states(key_id_in(old), new) == [ACTIVE, PENDING]
    assert seeing.counts["certificate_of_another_key"] == 1


@pytest.mark.parametrize("verb", ["installed", "deleted"])
@pytest.mark.parametrize("trouble", ["gone", "too many files"])
async def test_a_certificate_directory_that_cannot_be_read_changes_nothing(
    seeing: Station, josev: Josev, monkeypatch: pytest.MonkeyPatch, trouble: str, verb: Verb
) -> None:
    csr = await seeing.csr()
    file = josev.install(csr)
    await seeing.told("installed")
    await seeing.key()
    if trouble == "gone":
        file.unlink()
        josev.path.rmdir()
    else:
        monkeypatch.setattr(josev_files, "MAX_CERTIFICATE_FILES", 0)
    before = seeing.dump()

    await seeing.told(verb)

    assert seeing.dump() == before
    assert seeing.counts["certificate_dir_unreadable"] == 1


@pytest.mark.parametrize("verb", ["installed", "deleted"])
async def test_a_file_that_cannot_be_read_is_passed_over_unless_it_could_be_what_was_deleted(
    seeing: Station, josev: Josev, monkeypatch: pytest.MonkeyPatch, verb: Verb
) -> None:
    csr = await seeing.csr()
    josev.install(csr)
    if verb == "deleted":
        await seeing.told("installed")
        (josev.path / f"{key_id_in(csr)}.pem").unlink()
    secret = josev.put("a.key", b"Josev's own")
    really_open = os.open

    def closed_to_us(path: Path, *arguments: Any, **named: Any) -> int:
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *arguments, **named)

    monkeypatch.setattr(os, "open", closed_to_us)  # root, as which tests may run, may read everything

    await seeing.told(verb)

    assert seeing.states(key_id_in(csr)) == [ACTIVE]
