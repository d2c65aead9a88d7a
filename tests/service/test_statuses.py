"""What a status does to a key: proof and activation. On real ledgers, with software keys and with a TPM's."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import ssl
import stat
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from keys_told import ACTIVE, AUTHORITY, DESTROYED, PENDING, reference, said, until
from outside import BOUND
from peers import Swtpm

from parts import E1, E2, NOW, STATION, V2G, Station, key_id_in, pem, request, software_key, sqlite_of, station
from stationkey.config.settings import DAY, Bounds, PolicyTerms, Terms, TpmTerms
from stationkey.errors import KeyStoreError
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.service import statuses
from stationkey.service.policy import Policy
from stationkey.system.state_dir import StateDirectory
from stationkey.x509.certificate import prove

pytest_plugins = ["josevs", "keys_told"]

# Before active.


async def test_a_key_becomes_active_with_its_certificate_and_its_chain(
    either_store: Station, certificate_dir: Path
) -> None:
    csr = await either_store.csr()
    key = key_id_in(csr)
    content = pem(AUTHORITY.sign(csr), AUTHORITY.sub)
    (certificate_dir / "secc.pem").write_bytes(content)

    await either_store.told("installed")

    assert either_store.states(key) == [ACTIVE]
    assert (either_store.active_dir / "v2g_certificate.pem").read_bytes() == reference(
        either_store, key
    ).pem() + content
    assert either_store.counts["certificate_differs"] == 0


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
    either_store: Station,
    certificate_dir: Path,
    caplog: pytest.LogCaptureFixture,
    certificates: Callable[[str], bytes],
    named: str,
) -> None:
    csr = await either_store.csr()
    (certificate_dir / "secc.pem").write_bytes(certificates(csr))

    await either_store.told("installed")

    assert either_store.states(key_id_in(csr)) == [ACTIVE]
    (text,) = said(caplog)
    assert text.startswith(f"the certificate differs from its profile: {named}")
    assert either_store.counts["certificate_differs"] == 1


async def test_a_certificate_for_another_key_activates_nothing(
    either_store: Station, certificate_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    csr = await either_store.csr()
    stolen = AUTHORITY.sign(csr, public_key=software_key().public_key())
    (certificate_dir / "secc.pem").write_bytes(pem(stolen, AUTHORITY.sub))
    before = either_store.dump()

    await either_store.told("installed")

    assert either_store.dump() == before
    assert list(either_store.active_dir.glob("*.pem")) == []
    assert either_store.counts["certificate_of_another_key"] == 1
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
    with closing(sqlite3.connect(sqlite_of(here.ledger).path)) as connection, connection:
        connection.execute("UPDATE secret SET private = x'00'")

    await here.told("installed")

    assert here.states(key) == [PENDING]
    assert here.counts["key_damaged"] == 1


# A TPM that is away.


async def test_a_status_waits_for_a_tpm_that_is_away_and_is_done_when_it_is_back(
    tmp_path: Path, swtpm: Swtpm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses, "RETRY_FIRST", 0.05)
    async with station(tmp_path / "state", keystore=swtpm.uri) as here:
        key = await here.key()
        swtpm.kill()

        told = asyncio.create_task(here.told("installed"))
        await until(lambda: any("trying again" in text for text in said(caplog)))
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
        await until(lambda: any("trying again" in text for text in said(caplog)))
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
        await until(lambda: any("trying again" in text for text in said(caplog)))

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
        await until(lambda: any("trying again" in text for text in said(caplog)))

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
