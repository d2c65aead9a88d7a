"""Renewal as the errata of 2025-01 want it, played by `stationkey josev` and `stationkey csms` with the real daemon.

The connection is TLS with a client certificate (security profile 3), and the key is the one under ``active/``.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace
from peers import Mosquitto
from test_josev import CARRIED, CHARGING_STATION, IDENTITY, ORGANIZATION, V2G, Trial

from stationkey.contract.profiles import SECP256R1, CertificateType
from stationkey.errors import ConfigurationError
from stationkey.simulators import josev
from stationkey.simulators.client_certificate import ClientCertificate, Outcome
from stationkey.simulators.csms.events import EventKind
from stationkey.simulators.csms.server import Csms, SecurityProfile
from stationkey.simulators.josev import Station
from stationkey.simulators.ocpp import DISCARDED_CERTIFICATE_EVENT, OcppVersion
from stationkey.simulators.pki import Hierarchy, Misbehaviour, certificate_hash

ATTEMPTS = 3
BOUND = 30.0


@pytest.fixture
def trial(tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    monkeypatch.setattr(josev, "RECONNECT_FIRST", 0.01)
    trial = Trial(tmp_path, mosquitto)
    with trial.daemon:
        yield trial


@pytest.fixture
def hierarchy() -> Hierarchy:
    return Hierarchy.make(SECP256R1, organization=ORGANIZATION, now=datetime.now(UTC))


class Renewing:
    """A station with a client certificate, and a CSMS that lets it in by that."""

    def __init__(self, trial: Trial, csms: Csms, station: Station) -> None:
        self.trial, self.csms, self.station = trial, csms, station

    async def renew(self) -> None:
        """Renew the client certificate; returns when it is installed, before it is used."""
        await self.station.renew(CHARGING_STATION)

    async def connections(self, first: int, count: int) -> list[int | None]:
        """By which certificate each connection came, by the number of its key; None for one that was refused."""
        kinds = {EventKind.CONNECTED, EventKind.CONNECTION_REFUSED}
        async with asyncio.timeout(BOUND):
            while len(found := [event for event in self.csms.events if event.kind in kinds][first:]) < count:
                await self.csms._happened.wait()  # noqa: SLF001 - what its own waiting methods wait for
        keys = [key.public for key in self.trial.on_record()]
        return [None if event.certificate is None else keys.index(spki(event.certificate)) for event in found[:count]]


def spki(certificate: object) -> bytes:
    from cryptography import x509  # noqa: PLC0415 - for a type
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415 - for this

    assert isinstance(certificate, x509.Certificate)
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@asynccontextmanager
async def renewing(trial: Trial, hierarchy: Hierarchy, misbehaviour: Misbehaviour | None) -> AsyncIterator[Renewing]:
    """A station whose first client certificate came without one, and that is connected by it now."""
    async with Csms(organization=ORGANIZATION, hierarchy=hierarchy) as csms, trial.josev(trial.settings(csms)) as first:
        await first.renew(CHARGING_STATION)
        await first.settled()
        await trial.key_is("active")
    async with Csms(
        organization=ORGANIZATION,
        hierarchy=hierarchy,
        security_profile=SecurityProfile.MUTUAL_TLS,
        misbehaviour=misbehaviour,
    ) as csms:
        root = trial.folder / "csms-root.pem"
        root.write_text(csms.trust_anchors_pem(CHARGING_STATION))
        file = trial.folder / "state/active/charging_station_certificate.pem"
        client = ClientCertificate(file, partial(ssl.create_default_context, cafile=str(root)), attempts=ATTEMPTS)
        async with trial.josev(replace(trial.settings(csms), client=client)) as station:
            await csms.connected(IDENTITY)
            yield Renewing(trial, csms, station)


async def test_a_renewed_certificate_that_connects_confirms_its_key(trial: Trial, hierarchy: Hierarchy) -> None:
    """A02.FR.08, A02.FR.10: the one before is discarded after the new one has connected, and not before."""
    async with renewing(trial, hierarchy, None) as it:
        await it.renew()
        assert await it.connections(0, 2) == [0, 1]
        await trial.key_is("destroyed", number=0)
        await trial.key_is("active", number=1)
        async with asyncio.timeout(BOUND):
            while list(trial.folder.glob("state/active/*.previous.pem")):  # noqa: ASYNC110 - another process removes it
                await asyncio.sleep(0.02)


async def test_one_that_the_csms_accepts_late_is_tried_again(trial: Trial, hierarchy: Hierarchy) -> None:
    async with renewing(trial, hierarchy, Misbehaviour.ACCEPT_RENEWED_LATE) as it:
        await it.renew()
        assert await it.connections(0, 4) == [0, None, None, 1]
        await trial.key_is("destroyed", number=0)
        assert not [event for event in it.csms.events if event.kind is EventKind.SECURITY_EVENT]


async def test_one_that_the_csms_refuses_is_discarded_and_the_key_before_is_restored(
    trial: Trial, hierarchy: Hierarchy
) -> None:
    """A02.FR.28, A02.FR.29, and the second ``installed`` by which the daemon knows."""
    async with renewing(trial, hierarchy, Misbehaviour.REFUSE_RENEWED) as it:
        before = trial.certificates.joinpath("charging_station_certificate.pem").read_bytes()
        await it.renew()
        assert await it.connections(0, ATTEMPTS + 2) == [0, *[None] * ATTEMPTS, 0]
        event = await it.csms.next(EventKind.SECURITY_EVENT)
        assert event.type == DISCARDED_CERTIFICATE_EVENT
        await trial.key_is("active", number=0)
        await trial.key_is("deactivated", number=1)
        assert trial.certificates.joinpath("charging_station_certificate.pem").read_bytes() == before
        # And once more: the station that went back can renew again, and the CSMS takes that one.
        it.csms.misbehaviour = None
        await it.station.settled()
        await it.renew()
        assert (await it.connections(ATTEMPTS + 2, 1)) == [2]
        await trial.key_is("active", number=2)


async def test_old_and_new_are_tried_in_turn_while_neither_is_let_in(
    trial: Trial, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A02.FR.28. Neither is discarded by that; the first that connects decides."""
    async with renewing(trial, hierarchy, None) as it:
        tried: list[bytes] = []

        def stranger(websocket: object, *_: object) -> str | None:
            tried.append(spki(certificate_of(websocket)))
            return None if len(tried) > ATTEMPTS + 3 else "nobody is let in"

        monkeypatch.setattr(it.csms, "_stranger", stranger)
        await it.renew()
        await it.connections(0, ATTEMPTS + 5)
        keys = [key.public for key in trial.on_record()]
        assert [keys.index(public) for public in tried] == [1] * ATTEMPTS + [0, 1, 0, 1]
        await trial.key_is("destroyed", number=0)
        await trial.key_is("active", number=1)


def certificate_of(websocket: object) -> object:
    from stationkey.simulators.csms import server  # noqa: PLC0415 - its own way to see the peer

    return server._peer_certificate(websocket)  # type: ignore[arg-type]  # noqa: SLF001 - same


@pytest.mark.parametrize(("version", "certificate_type"), CARRIED)
async def test_a_certificate_that_is_due_is_renewed_under_its_root(
    trial: Trial, version: OcppVersion, certificate_type: CertificateType
) -> None:
    """A03.FR.02; A03.FR.23 where the version carries it. The certificate lives 60 days, of which 50 are over."""
    now = datetime.now(UTC)
    back = timedelta(days=50)
    async with Csms(organization=ORGANIZATION, clock=lambda: now - back) as csms:
        settings = trial.settings(csms, version)
        async with trial.josev(settings) as station:
            await station.renew(certificate_type)
            await station.settled()
            await trial.key_is("active")
        first = await csms.next(EventKind.CSR_ACCEPTED)
        back = timedelta()
        async with trial.josev(replace(settings, renew_before=30.0)) as station:
            second = await csms.next(EventKind.CSR_ACCEPTED, timeout=BOUND)
            await trial.key_is("active", number=1)
            await station.settled()
    assert second.csr != first.csr
    root = csms.hierarchy(certificate_type).issuers(certificate_type)[-1].certificate
    assert second.hash_root_certificate == (certificate_hash(root) if version is OcppVersion.V21 else None)
    assert first.hash_root_certificate is None


async def test_one_that_is_not_due_is_left_alone_and_one_that_is_due_is_asked_for_once(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(josev, "WATCH", 0.01)
    looks = Looks()
    monkeypatch.setattr(Station, "_is_due", looks.noting(Station._is_due))  # noqa: SLF001 - to see that it looks
    now = datetime.now(UTC)
    back = timedelta(days=0)
    async with Csms(organization=ORGANIZATION, clock=lambda: now - back) as csms:
        settings = replace(trial.settings(csms), renew_before=30.0)
        async with trial.josev(settings) as station:
            await station.renew(CHARGING_STATION)
            back = timedelta(days=50)
            await station.renew(V2G)  # due as soon as it is there, and so is each that follows
            for _ in range(3):
                accepted = await csms.next(EventKind.CSR_ACCEPTED)
            assert accepted.certificate_type is V2G
            await station.settled()
            await trial.key_is("active", number=2)
            enough = looks.value + 10 * len(CertificateType)
            async with asyncio.timeout(BOUND):
                while looks.value < enough:
                    await looks.happened.wait()
                    looks.happened.clear()
    asked = [event.certificate_type for event in csms.events if event.kind is EventKind.CSR_ACCEPTED]
    assert asked == [CHARGING_STATION, V2G, V2G]


class Looks:
    """How often the station has looked whether a certificate is due."""

    def __init__(self) -> None:
        self.value = 0
        self.happened = asyncio.Event()

    def noting(self, look: Callable[[Station, CertificateType], bool]) -> Callable[[Station, CertificateType], bool]:
        def noted(station: Station, certificate_type: CertificateType) -> bool:
            self.value += 1
            self.happened.set()
            return look(station, certificate_type)

        return noted


class TestClientCertificate:
    """What is tried next, without a network."""

    def test_a_file_that_cannot_be_used_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "a.pem"
        for content in (None, "", "nonsense"):
            if content is not None:
                file.write_text(content)
            with pytest.raises(ConfigurationError) as refused:
                ClientCertificate(file, lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), attempts=1)
            assert refused.value.reason == "tls_invalid"

    def test_after_a_restart_the_file_before_is_the_one_in_use(self, tmp_path: Path, hierarchy: Hierarchy) -> None:
        file, before = tmp_path / "a.pem", tmp_path / "a.previous.pem"
        for path in (file, before):
            path.write_bytes(key_and_chain(hierarchy))
        client = ClientCertificate(file, lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), attempts=1)
        assert client.refresh()
        renewed = client.next()
        client.refused()
        assert client.next() is not renewed
        assert client.connected() is Outcome.DISCARDED
        assert not client.refresh()  # though the file still has it
        assert client.connected() is Outcome.NOTHING


def key_and_chain(hierarchy: Hierarchy) -> bytes:
    from stationkey.simulators.pki import key_to_pem, to_pem  # noqa: PLC0415 - for this

    chain, key = hierarchy.issue_server(["localhost"], now=datetime.now(UTC))
    return key_to_pem(key) + to_pem(chain).encode()
