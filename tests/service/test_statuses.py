"""What becomes of a key: proof, activation, time, destruction. On real ledgers, with software keys and with a TPM's."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import ssl
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from outside import BOUND
from peers import Swtpm

from parts import (
    E1,
    E2,
    NOW,
    STATION,
    V2G,
    Authority,
    Clocks,
    Station,
    dump,
    key_id_in,
    new_id,
    pem,
    request,
    software_key,
    station,
    status,
)
from stationkey.config.settings import DAY, Bounds, PolicyTerms, Terms, TpmTerms
from stationkey.contract.profiles import SECP256R1, Algorithm
from stationkey.errors import KeyStoreError
from stationkey.keystore import KeyRef
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.ledger.keys import Keys
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.ledger.retention import Retention
from stationkey.service import statuses
from stationkey.service.policy import Policy
from stationkey.service.running_time import RunningTime
from stationkey.system.state_dir import StateDirectory
from stationkey.x509.certificate import prove

PENDING, ACTIVE, DEACTIVATED, COMPROMISED, DESTROYED = (
    KeyState.PRE_ACTIVATION,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.COMPROMISED,
    KeyState.DESTROYED,
)
YEAR = 365 * DAY
AUTHORITY = Authority()


@pytest.fixture
def certificate_dir(tmp_path: Path) -> Path:
    path = tmp_path / "certificates"
    path.mkdir()
    return path


@pytest.fixture(params=["software", "tpm2"])
async def seeing(
    request: pytest.FixtureRequest, tmp_path: Path, certificate_dir: Path, session_swtpm: Swtpm
) -> AsyncIterator[Station]:
    """A station that can see Josev's certificates, once with each key store."""
    uri = session_swtpm.uri if request.param == "tpm2" else "software:"
    async with station(tmp_path / "state", keystore=uri, certificate_dir=certificate_dir) as made:
        yield made


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Station]:
    """A station with software keys that cannot see the certificates."""
    async with station(tmp_path / "state") as made:
        yield made


def reference(here: Station, key_id: str) -> KeyRef:
    found = here.ledger.keys.ref(key_id)
    assert found is not None
    return found


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


# Before active.


async def test_a_key_becomes_active_with_its_certificate_and_its_chain(seeing: Station, certificate_dir: Path) -> None:
    csr = await seeing.csr()
    key = key_id_in(csr)
    content = pem(AUTHORITY.sign(csr), AUTHORITY.sub)
    (certificate_dir / "secc.pem").write_bytes(content)

    await seeing.told("installed")

    assert seeing.states(key) == [ACTIVE]
    assert (seeing.active_dir / "v2g_certificate.pem").read_bytes() == reference(seeing, key).pem() + content
    assert seeing.counts["certificate_differs"] == 0


SUB = AUTHORITY.sub
DIFFERENT: list[tuple[str, Callable[[str], bytes], str]] = [
    ("CN", lambda csr: pem(AUTHORITY.sign(csr, subject=_renamed(csr, NameOID.COMMON_NAME)), SUB), "CN: "),
    ("O", lambda csr: pem(AUTHORITY.sign(csr, subject=_renamed(csr, NameOID.ORGANIZATION_NAME)), SUB), "O: "),
    (
        "DC",
        lambda csr: pem(AUTHORITY.sign(csr, subject=_renamed(csr, NameOID.DOMAIN_COMPONENT)), AUTHORITY.sub),
        "DC: ",
    ),
    ("usage", lambda csr: pem(AUTHORITY.sign(csr, without=[x509.KeyUsage]), SUB), "usage: "),
    ("validity", lambda csr: pem(AUTHORITY.sign(csr, ends=NOW - timedelta(hours=1)), SUB), "validity: "),
    ("chain order", lambda csr: pem(AUTHORITY.root, AUTHORITY.sub, AUTHORITY.sign(csr)), "chain order: "),
]


def _renamed(csr: str, oid: x509.ObjectIdentifier) -> x509.Name:
    subject = x509.load_pem_x509_csr(csr.encode()).subject
    return x509.Name([x509.NameAttribute(oid, "other") if attribute.oid == oid else attribute for attribute in subject])


@pytest.mark.parametrize(("certificates", "named"), [pytest.param(*case[1:], id=case[0]) for case in DIFFERENT])
async def test_what_differs_is_logged_by_name_and_counted_and_stops_nothing(
    seeing: Station,
    certificate_dir: Path,
    caplog: pytest.LogCaptureFixture,
    certificates: Callable[[str], bytes],
    named: str,
) -> None:
    csr = await seeing.csr()
    (certificate_dir / "secc.pem").write_bytes(certificates(csr))

    await seeing.told("installed")

    assert seeing.states(key_id_in(csr)) == [ACTIVE]
    (text,) = said(caplog)
    assert text.startswith(f"the certificate differs from its profile: {named}")
    assert seeing.counts["certificate_differs"] == 1


async def test_a_certificate_for_another_key_activates_nothing(
    seeing: Station, certificate_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    csr = await seeing.csr()
    stolen = AUTHORITY.sign(csr, public_key=software_key().public_key())
    (certificate_dir / "secc.pem").write_bytes(pem(stolen, AUTHORITY.sub))
    before = seeing.dump()

    await seeing.told("installed")

    assert seeing.dump() == before
    assert list(seeing.active_dir.glob("*.pem")) == []
    assert seeing.counts["certificate_of_another_key"] == 1
    assert any("ignoring status 'installed'" in text for text in said(caplog, logging.ERROR))


async def test_a_key_of_another_tpm_is_not_activated(tmp_path: Path, swtpm: Swtpm) -> None:
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        key = await here.key()
    swtpm.kill()
    swtpm.new_chip()
    swtpm.start()

    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        before = here.dump()
        await here.told("installed")

        assert here.dump() == before
        assert here.states(key) == [PENDING]
        assert here.counts["key_of_another_tpm"] == 1
        assert list(here.active_dir.glob("*.pem")) == []


async def test_a_key_whose_private_part_is_damaged_is_not_activated(here: Station) -> None:
    key = await here.key()
    with closing(sqlite3.connect(here.ledger.database.path)) as connection, connection:
        connection.execute("UPDATE secret SET private = x'00'")

    await here.told("installed")

    assert here.states(key) == [PENDING]
    assert here.counts["key_damaged"] == 1


# A TPM that is away.


async def _until(said: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not said():  # noqa: ASYNC110 - neither a log nor a database has an event to wait for
            await asyncio.sleep(0.01)


async def test_a_status_waits_for_a_tpm_that_is_away_and_is_done_when_it_is_back(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.05)
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        key = await here.key()
        swtpm.kill()

        told = asyncio.create_task(here.told("installed"))
        await _until(lambda: any("trying again" in text for text in said(caplog)))
        assert not told.done()
        assert here.states(key) == [PENDING]
        swtpm.start()
        await told

        assert here.states(key) == [ACTIVE]


async def test_no_status_overtakes_one_that_waits(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ``deleted`` would find no active key, and the key would become active after its certificate was deleted."""
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.05)
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        key = await here.key()
        swtpm.kill()

        installed = asyncio.create_task(here.told("installed"))
        await _until(lambda: any("trying again" in text for text in said(caplog)))
        deleted = asyncio.create_task(here.told("deleted"))
        swtpm.start()
        await asyncio.gather(installed, deleted)

        assert here.events(key) == ["CSR answered", "installed", "deleted"]


async def test_a_status_that_meets_a_passing_trouble_is_done_when_it_is_over(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.01)
    troubles = [KeyStoreError("a passing trouble", reason="tpm_lockout", transient=True)]

    def prove_at_last(*arguments: Any) -> None:
        if troubles:
            raise troubles.pop()
        prove(*arguments)

    monkeypatch.setattr(statuses, "prove", prove_at_last)
    key = await here.key()

    await here.told("installed")

    assert here.states(key) == [ACTIVE]


async def test_only_so_many_statuses_wait(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.05)
    monkeypatch.setattr(statuses, "MAX_WAITING", 1)
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        key = await here.key()
        swtpm.kill()
        waiting = asyncio.create_task(here.told("installed"))
        await _until(lambda: any("trying again" in text for text in said(caplog)))

        await here.told("installed")

        assert here.counts["tpm_unreachable"] == 1
        assert here.states(key) == [PENDING]
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting


async def test_statuses_of_which_each_takes_long_give_their_places_back(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is away, and so no trouble is told: only those who wait can notice."""
    monkeypatch.setattr(statuses, "MAX_WAITING", 2)
    monkeypatch.setattr(statuses, "PATIENCE", 0.01)
    first, second = await here.key(V2G), await here.key(STATION)
    gate = threading.Event()
    here.keystore.submit(lambda _: gate.wait(BOUND), timeout=BOUND)
    waiting = [asyncio.create_task(here.told("installed", kind)) for kind in (V2G, STATION)]
    await asyncio.sleep(0)  # so that they come first

    await asyncio.gather(*(here.told("deleted") for _ in range(8)))
    monkeypatch.setattr(statuses, "PATIENCE", BOUND)
    await here.told("deleted")  # at once

    assert here.counts["statuses_crowded"] == 9
    assert not any(task.done() for task in waiting)
    gate.set()
    await asyncio.gather(*waiting)
    assert here.states(first, second) == [ACTIVE, ACTIVE]
    await asyncio.gather(*(here.told("deleted", kind) for kind in (V2G, STATION)))
    assert here.states(first, second) == [DESTROYED, DESTROYED]


async def test_while_a_status_waits_time_goes_on_for_other_keys(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.05)
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        old, new = await here.key(STATION), await here.key(V2G)
        await here.told("failed_installation", STATION)
        swtpm.kill()
        waiting = asyncio.create_task(here.told("installed", V2G))
        await _until(lambda: any("trying again" in text for text in said(caplog)))

        await here.pass_by(2 * DAY)

        assert here.states(old, new) == [DESTROYED, PENDING]
        swtpm.start()
        await waiting
        assert here.states(new) == [ACTIVE]


# Which keys the present TPM cannot load.


async def test_every_key_that_the_present_tpm_cannot_use_is_told(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture
) -> None:
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        old = [await here.key() for _ in range(2)]
        await here.told("installed")
    swtpm.kill()
    swtpm.new_chip()
    swtpm.start()

    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        await here.key(STATION)
        await here.service.expiry.tell_unusable()

        told = [record for record in caplog.records if "this key cannot be used" in record.getMessage()]
        assert [record.key_id for record in told] == old  # type: ignore[attr-defined] # logging's extra
        assert here.counts["key_unusable"] == 2


async def test_a_tpm_that_is_away_at_the_start_is_waited_for_before_a_key_is_called_unusable(
    tmp_path: Path, swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.05)
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        await here.key()
        swtpm.kill()
        telling = asyncio.create_task(here.service.expiry.tell_unusable())
        await here.service.answer(request())  # comes after the first try in the key store's queue
        assert not telling.done()
        swtpm.start()
        await telling

        assert here.counts["key_unusable"] == 0


# active/.


async def test_a_retired_or_compromised_key_has_no_file(here: Station) -> None:
    for event in (KeyEvent.RETIRED, KeyEvent.COMPROMISE_REPORTED):
        key = await here.key()
        await here.told("installed")
        assert (here.active_dir / "v2g_certificate.pem").exists()
        here.ledger.transitions.apply(key, event, reason="", now=0)

        await here.service.custody.show_active()

        assert not (here.active_dir / "v2g_certificate.pem").exists()


async def test_each_owner_has_a_file_of_its_own_for_us_alone(here: Station) -> None:
    for owner in ((V2G, E1), (V2G, E2), (V2G, None), (STATION, None)):
        await here.key(*owner)
        await here.told("installed", *owner)

    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in here.active_dir.glob("*.pem")}
    assert files == dict.fromkeys(
        (
            "v2g_certificate.DE%2AABC%2AE1.pem",
            "v2g_certificate.DE%2AABC%2AE2.pem",
            "v2g_certificate.pem",
            "charging_station_certificate.pem",
        ),
        0o600,
    )


async def test_the_file_of_a_software_key_serves_tls(tmp_path: Path, certificate_dir: Path) -> None:
    async with station(tmp_path / "state", certificate_dir=certificate_dir) as here:
        csr = await here.csr()
        (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr), AUTHORITY.sub))
        await here.told("installed")

        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(here.active_dir / "v2g_certificate.pem")


async def test_a_start_makes_up_for_what_a_loss_of_power_left_undone(tmp_path: Path) -> None:
    async with station(tmp_path / "state") as here:
        key = await here.key()
        await here.told("installed")
        content = (here.active_dir / "v2g_certificate.pem").read_bytes()
    (tmp_path / "state" / "active" / "v2g_certificate.pem").unlink()
    (tmp_path / "state" / "active" / "v2g_certificate.pem.new").write_bytes(content[:50])

    async with station(tmp_path / "state") as here:
        assert {path.name for path in here.active_dir.iterdir()} == {".lock", "v2g_certificate.pem"}
        assert (here.active_dir / "v2g_certificate.pem").read_bytes() == content
        assert here.states(key) == [ACTIVE]


# Time.


async def test_a_pending_key_ends_when_no_certificate_comes(here: Station) -> None:
    key = await here.key()

    await here.pass_by(30 * DAY - 1000)
    assert here.states(key) == [PENDING]
    await here.pass_by(1000)
    assert here.states(key) == [DESTROYED]
    assert here.events(key) == ["CSR answered", "expired"]


async def test_a_key_whose_installation_failed_ends_after_a_day(here: Station) -> None:
    key = await here.key()
    await here.told("failed_installation")

    await here.pass_by(DAY - 1000)
    assert here.states(key) == [PENDING]
    await here.pass_by(1000)
    assert here.states(key) == [DESTROYED]


async def test_a_replaced_key_ends_a_grace_period_after_the_new_one_was_confirmed(here: Station) -> None:
    old = await here.key()
    await here.told("installed")
    new = await here.key()
    await here.told("installed")
    await here.pass_by(30 * DAY)
    here.ledger.transitions.confirm(new, reason="", now=0)
    await here.pass_by(0)

    await here.pass_by(7 * DAY - 1000)
    assert here.states(old, new) == [DEACTIVATED, ACTIVE]
    await here.pass_by(1000)
    assert here.states(old, new) == [DESTROYED, ACTIVE]


async def test_a_key_that_was_retired_by_hand_gets_its_grace_period(here: Station) -> None:
    key = await here.key()
    await here.told("installed")
    here.ledger.transitions.apply(key, KeyEvent.RETIRED, reason="", now=0)

    await here.pass_by(0)
    await here.pass_by(7 * DAY - 1000)
    assert here.states(key) == [DEACTIVATED]
    await here.pass_by(1000)
    assert here.states(key) == [DESTROYED]


async def test_active_and_compromised_keys_do_not_end_by_time(here: Station) -> None:
    evidence = await here.key()
    here.ledger.transitions.apply(evidence, KeyEvent.COMPROMISE_REPORTED, reason="", now=0)
    active = await here.key()
    await here.told("installed")

    await here.pass_by(10 * YEAR)

    assert here.states(evidence, active) == [COMPROMISED, ACTIVE]


@pytest.mark.parametrize(
    "jump", [pytest.param(-3600.0, id="an hour back"), pytest.param(10 * YEAR / 1000, id="ten years on")]
)
async def test_no_key_ends_by_a_jump_of_the_clock(tmp_path: Path, jump: float) -> None:
    """Neither while the clock is wrong nor when it has been set right again, nor over a restart in between."""
    clocks = Clocks()
    async with station(tmp_path / "state", clocks=clocks) as here:
        replaced = await here.key()
        await here.told("installed")
        failed, pending = await here.key(STATION), await here.key(V2G, E1)
        await here.told("failed_installation", STATION)
        active = await here.key()
        await here.told("installed")
        keys = (replaced, failed, pending, active)
        before = here.states(*keys)
        due = [here.record(key).due for key in keys]
        for change in (jump, -jump):
            clocks.wall += change
            await here.pass_by(0)
            assert here.states(*keys) == before
    clocks.wall += jump
    async with station(tmp_path / "state", clocks=clocks) as here:
        await here.pass_by(0)

        assert here.states(*keys) == before
        assert [here.record(key).due for key in keys] == due


async def test_running_time_goes_on_over_a_restart_and_a_station_that_is_off_does_not_age_its_keys(
    tmp_path: Path,
) -> None:
    clocks = Clocks()
    async with station(tmp_path / "state", clocks=clocks) as here:
        key = await here.key()
        await here.pass_by(20 * DAY)
    clocks.pass_by(100 * DAY)
    async with station(tmp_path / "state", clocks=clocks) as here:
        await here.pass_by(10 * DAY - 1000)
        assert here.states(key) == [PENDING]
        await here.pass_by(1000)
        assert here.states(key) == [DESTROYED]


async def test_running_time_never_goes_back(here: Station) -> None:
    await here.pass_by(5 * DAY)

    here.ledger.retention.write_running(DAY)

    assert here.ledger.retention.running == 5 * DAY


def test_running_time_is_counted_from_where_it_was() -> None:
    clock = iter((100.0, 100.25))

    assert RunningTime(7000, lambda: next(clock)).now() == 7250


async def test_an_expiry_that_an_operator_was_faster_than_stops_nothing(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends one key between the daemon's look at what is due and its turn: the others still expire."""
    keys = [await here.key(V2G, evse_id) for evse_id in (E1, E2, None)]
    due = Retention.due

    def then_the_operator(retention: Retention, running: int) -> list[str]:
        found = due(retention, running)
        if keys[1] in found:
            here.ledger.transitions.apply(keys[1], KeyEvent.COMPROMISE_REPORTED, reason="", now=0)
        return found

    monkeypatch.setattr(Retention, "due", then_the_operator)

    await here.pass_by(30 * DAY)

    assert here.states(*keys) == [DESTROYED, COMPROMISED, DESTROYED]


async def test_an_expiry_that_an_operator_was_faster_than_at_the_last_moment_stops_nothing(
    here: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [await here.key(V2G, evse_id) for evse_id in (E1, E2)]
    ref = Keys.ref

    def then_the_operator(own: Keys, key_id: str) -> KeyRef | None:
        if key_id == keys[0]:
            here.ledger.transitions.apply(keys[0], KeyEvent.COMPROMISE_REPORTED, reason="", now=0)
        return ref(own, key_id)

    monkeypatch.setattr(Keys, "ref", then_the_operator)

    await here.pass_by(30 * DAY)

    assert here.states(*keys) == [COMPROMISED, DESTROYED]


async def test_the_sweep_goes_on_by_itself(tmp_path: Path) -> None:
    async with station(tmp_path / "state", terms=Terms(pending=0)) as here:
        key = await here.key()
        sweeping = asyncio.create_task(here.service.expiry.run())
        await _until(lambda: here.counts["accepted"] == 1 and _is_destroyed(tmp_path / "state", key))
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping


def _is_destroyed(state_dir: Path, key_id: str) -> bool:
    return any(f"'{key_id}'" in line and "'destroyed'" in line for line in dump(state_dir / "ledger.sqlite3"))


# Retries and bounds.


async def test_a_retry_of_an_id_whose_key_is_gone_is_rejected(here: Station) -> None:
    asked = request()
    response = await here.service.answer(asked)
    assert isinstance(response.data.csr, str)
    here.ledger.transitions.apply(key_id_in(response.data.csr), KeyEvent.DESTRUCTION_ORDERED, reason="", now=0)

    again = await here.service.answer(asked)

    assert again.data.status == "rejected"
    assert here.counts["key_destroyed"] == 1


async def test_a_retry_gets_the_same_csr_for_as_long_as_its_key_is_pending(here: Station) -> None:
    asked = request()
    first = await here.service.answer(asked)
    await here.pass_by(30 * DAY - 1000)

    assert await here.service.answer(asked) == first


async def test_the_oldest_pending_key_makes_room(here: Station, caplog: pytest.LogCaptureFixture) -> None:
    keys = [await here.key() for _ in range(10)]
    other = await here.key(V2G, E1)

    assert here.states(*keys) == [DESTROYED] * 2 + [PENDING] * 8
    assert here.states(other) == [PENDING]
    assert len([text for text in said(caplog) if "too many pending keys" in text]) == 2


async def test_an_active_key_is_none_of_the_pending_ones(tmp_path: Path) -> None:
    bounds = Bounds(pending_limit=1, pending_total=1)
    async with station(tmp_path / "state", terms=Terms(bounds=bounds)) as here:
        active = await here.key()
        await here.told("installed")
        pending = await here.key()

        assert here.states(active, pending) == [ACTIVE, PENDING]


# Destruction.


def bytes_on_disk(state_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in state_dir.rglob("*") if path.is_file())


async def _deleted(here: Station, key: str) -> None:
    await here.told("deleted", private_key_path=f"/keys/{key}.pem")


async def _expired(here: Station, key: str) -> None:
    here.ledger.transitions.apply(key, KeyEvent.RETIRED, reason="", now=0)
    await here.pass_by(0)
    await here.pass_by(8 * DAY)


async def _ordered(here: Station, key: str) -> None:
    here.ledger.transitions.apply(key, KeyEvent.DESTRUCTION_ORDERED, reason="", now=0)
    await here.service.custody.show_active()


@pytest.mark.parametrize("end", [_deleted, _expired, _ordered])
async def test_a_destroyed_key_is_in_no_file_of_the_state_directory(
    seeing: Station, certificate_dir: Path, end: Callable[[Station, str], object]
) -> None:
    csr = await seeing.csr()
    key = key_id_in(csr)
    (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
    await seeing.told("installed")
    kept = [await seeing.key(STATION), await seeing.key(V2G, E1)]
    private = reference(seeing, key).private
    # Of PEM a line from the middle: the first ones say of what kind it is, and are the same for many.
    gone = [
        private,
        *(lines[len(lines) // 2] for lines in (reference(seeing, key).pem().split(), csr.encode().split())),
    ]
    before = bytes_on_disk(seeing.state_dir)
    assert all(secret in before for secret in gone)

    ended = end(seeing, key)
    assert asyncio.iscoroutine(ended)
    await ended

    after = bytes_on_disk(seeing.state_dir)
    assert seeing.states(key) == [DESTROYED]
    assert not any(secret in after for secret in gone)
    assert all(reference(seeing, other).private in after for other in kept)


async def test_the_sweep_writes_the_private_parts_anew_after_each_destruction(here: Station) -> None:
    """What SQLite may have left of a row that it once moved is nothing that a test can wait for."""
    for end in (_deleted, _ordered):
        key = await here.key()
        await end(here, key)
        await here.pass_by(0)

        assert here.states(key) == [DESTROYED]
        assert not here.ledger.retention.wipe(), "there was something left to do"


async def test_a_key_that_made_room_is_in_no_file_after_a_sweep(here: Station) -> None:
    first = await here.key()
    gone = reference(here, first).private
    for _ in range(8):
        await here.key()

    await here.pass_by(0)

    assert here.states(first) == [DESTROYED]
    assert gone not in bytes_on_disk(here.state_dir)


async def test_a_key_made_ahead_ends_in_the_sweep_after_its_time_and_leaves_no_trace(here: Station) -> None:
    store = SoftwareKeyStore()
    old, young = store.generate(Algorithm.ECDSA_SHA256), store.generate(Algorithm.ECDSA_SHA256)
    here.ledger.transitions.make_ahead(old, now=0, due=DAY, seconds=0)
    here.ledger.transitions.make_ahead(young, now=0, due=3 * DAY, seconds=0)
    await here.pass_by(0)
    assert [key for key, _ in here.ledger.keys.made_ahead()] == [old, young]

    await here.pass_by(2 * DAY)

    assert here.ledger.keys.made_ahead() == [(young, 3 * DAY)]
    assert [key.key_id for key in here.ledger.keys.usable()] == [young.key_id]
    assert old.private not in bytes_on_disk(here.state_dir)
    assert old.key_id.encode() not in bytes_on_disk(here.state_dir)


async def test_a_sweep_makes_the_file_small_again_after_a_flood(tmp_path: Path) -> None:
    async with station(tmp_path / "state", terms=Terms(bounds=Bounds(history_limit=0))) as here:
        for number in range(300):
            here.ledger.transitions.make_ahead(
                KeyRef(scheme="software", key_type=SECP256R1, public=number.to_bytes(2), private=bytes(2000)),
                now=0,
                due=1,
                seconds=0,
            )
        here.ledger.database.checkpoint()
        large = here.ledger.database.path.stat().st_size
        for _ in range(3):
            await here.pass_by(1000)

        assert here.ledger.keys.all() == []
        assert here.ledger.database.path.stat().st_size < large * 3 // 4


async def test_a_key_of_a_tpm_that_is_gone_can_still_be_destroyed(tmp_path: Path, swtpm: Swtpm) -> None:
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        key = await here.key()
        swtpm.kill()

        await here.told("deleted", private_key_path=f"/keys/{key}.pem")

        assert here.states(key) == [DESTROYED]


async def test_a_message_is_noted_with_what_it_brought(here: Station) -> None:
    key, message_id = await here.key(), new_id()

    await here.service.note_status(status("installed", message_id=message_id))

    event = here.ledger.keys.history(key)[-1]
    assert (event.event, event.state, event.message_id) == ("installed", "active", message_id)
    assert event.at == int(here.clocks.wall * 1000)


# The document.

OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def _first_cells(heading: str) -> list[str]:
    section = OPERATIONS.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line.split("|")[1].strip(" `") for line in section.splitlines() if line.startswith("| `")]


async def test_the_document_lists_every_file_that_there_is(
    tmp_path: Path, certificate_dir: Path, swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = StateDirectory(tmp_path / "state")
    seen: set[str] = set()

    def looking(act: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any, **named: Any) -> Any:
            seen.update(str(file.relative_to(directory.path)) for file in directory.path.rglob("*") if file.is_file())
            return act(*arguments, **named)

        return look

    monkeypatch.setattr(Path, "replace", looking(Path.replace))
    monkeypatch.setattr(os, "link", looking(os.link))
    tpm = TpmTerms(key_auth="generated", session="hmac")
    async with station(directory.path, keystore=swtpm.uri, tpm=tpm, certificate_dir=certificate_dir) as here:
        for _ in range(3):
            csr = await here.csr()
            (certificate_dir / "secc.pem").write_bytes(pem(AUTHORITY.sign(csr)))
            await here.told("installed")
    directory.close()

    listed = _first_cells("Every file in the state directory")
    variable = {
        r"tpm/.*\.new": "tpm/*.new",
        "loaded-[0-9]+": "loaded-N",
        "auth-[0-9a-f]{16}": "auth-ID",
        "srk-81000001": "srk-HANDLE",
    }
    for pattern, name in variable.items():
        seen = {re.sub(pattern, name, each) for each in seen}
    assert seen == {name.replace("<certificate_type>[.<evse_id>][.root-<root>]", V2G) for name in listed}


@pytest.mark.parametrize("line", _first_cells("What to look for in the log"))
def test_the_document_quotes_the_log_as_it_is(line: str) -> None:
    source = Path(statuses.__file__).parents[1]

    assert any(line in file.read_text() for file in source.rglob("*.py"))


async def test_no_more_keys_become_active_than_there_may_be_and_a_renewal_always_does(tmp_path: Path) -> None:
    async with station(tmp_path, terms=Terms(bounds=Bounds(active_limit=2))) as here:
        for evse_id in (E1, E2):
            await here.key(V2G, evse_id)
            await here.told("installed", V2G, evse_id)
        third = await here.key(V2G, "DE*ABC*E3")
        await here.told("installed", V2G, "DE*ABC*E3")
        renewed = await here.key(V2G, E1)
        await here.told("installed", V2G, E1)

        assert here.states(third, renewed) == [KeyState.PRE_ACTIVATION, KeyState.ACTIVE]
        assert here.service.counters.outcomes()["too_many_active"] == 1


async def test_a_flood_of_statuses_is_looked_at_as_often_as_is_allowed(tmp_path: Path) -> None:
    async with station(tmp_path) as here:
        mine = await here.key(V2G, E1)
        here.service._policy = Policy(PolicyTerms(requests_per_minute=1, burst=3))  # noqa: SLF001 - a small allowance
        for _ in range(10):
            await here.told("deleted", V2G, E2)
        await here.told("installed", STATION)
        assert here.service.counters.outcomes() == {"accepted": 1, "status_fits_no_key": 4, "rate_limited": 7}
        assert here.states(mine) == [KeyState.PRE_ACTIVATION]
