"""`stationkey josev` between a real daemon, a real broker and the CSMS that the `ocpp` library's schemas judge."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from peers import Daemon, Mosquitto

from secured import Authority, SecuredMosquitto
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.ledger import KeyRecord, Ledger
from stationkey.mqtt.url import Broker
from stationkey.simulators.csms.events import EventKind
from stationkey.simulators.csms.server import Csms, SecurityProfile
from stationkey.simulators.josev import SigningRefused, Station, waits
from stationkey.simulators.ocpp import NotCarried, OcppVersion
from stationkey.simulators.pending import Pending, PendingFile
from stationkey.simulators.pki import Misbehaviour
from stationkey.simulators.station_settings import StationSettings
from stationkey.x509.certificate import read_chain

ORGANIZATION = "Über Strom GmbH"
IDENTITY = "CS001"
SECC_ID = "DE-ABC-S-STATION42"
CHARGING_STATION = CertificateType.CHARGING_STATION_CERTIFICATE
V2G = CertificateType.V2G_CERTIFICATE
V2G20 = CertificateType.V2G20_CERTIFICATE
CARRIED = [
    pytest.param(version, kind, id=f"{version}-{kind}")
    for version, kinds in {
        OcppVersion.V16: (CHARGING_STATION, V2G),
        OcppVersion.V201: (CHARGING_STATION, V2G),
        OcppVersion.V21: (CHARGING_STATION, V2G, V2G20),
    }.items()
    for kind in kinds
]


class Trial:
    """A daemon, and what it takes to play Josev beside it."""

    def __init__(self, folder: Path, broker: Mosquitto) -> None:
        self.folder = folder
        self.broker = broker
        self.certificates = folder / "certificates"
        self.certificates.mkdir()
        (folder / "stationkey.toml").write_text(f'[josev]\ncertificate_dir = "{self.certificates}"\n')
        self.daemon = Daemon(
            folder / "daemon",
            *(
                "--broker",
                broker.url,
                "--state-dir",
                str(folder / "state"),
                "--config",
                str(folder / "stationkey.toml"),
            ),
            *("--keystore", "software:", "--allow-software-keys"),
        )
        self.told: list[str] = []

    def settings(self, csms: Csms, version: OcppVersion = OcppVersion.V21) -> StationSettings:
        anchors = self.folder / "anchors.pem"
        anchors.write_text(csms.trust_anchors_pem())
        return StationSettings(
            csms=csms.url,
            identity=IDENTITY,
            versions=(version,),
            broker=Broker.parse(self.broker.url),
            common_name=SECC_ID,
            organization_name=ORGANIZATION,
            country_name="DE",
            state_dir=self.folder / "josev",
            certificate_dir=self.certificates,
            trust_anchors=anchors,
        )

    @contextlib.asynccontextmanager
    async def josev(self, settings: StationSettings) -> AsyncIterator[Station]:
        station = Station(settings, lambda words, _: self.told.append(words))
        running = asyncio.create_task(station.run())
        try:
            yield station
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def on_record(self) -> list[KeyRecord]:
        ledger = Ledger(self.folder / "state" / "ledger.sqlite3", read_only=True)
        try:
            return ledger.keys.all()
        finally:
            ledger.close()

    async def key_is(self, state: str, *, failed: bool = False, number: int = -1) -> KeyRecord:
        """The key, once the daemon has it in `state`: the status travels by MQTT, and nobody answers it."""
        async with asyncio.timeout(30):
            while True:
                keys = self.on_record()
                if keys and keys[number].state == state and keys[number].failed == failed:
                    return keys[number]
                await asyncio.sleep(0.02)


@pytest.fixture
def trial(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Trial]:
    trial = Trial(tmp_path, mosquitto)
    with trial.daemon:
        yield trial


@pytest.mark.parametrize(("version", "certificate_type"), CARRIED)
async def test_a_trigger_ends_in_an_installed_certificate(
    trial: Trial, version: OcppVersion, certificate_type: CertificateType
) -> None:
    async with Csms(organization=ORGANIZATION) as csms, trial.josev(trial.settings(csms, version)) as station:
        assert await csms.connected(IDENTITY) is version
        assert await csms.trigger(IDENTITY, certificate_type) == "Accepted"
        assert (await csms.next(EventKind.CERTIFICATE_ANSWERED)).accepted
        await station.settled()
        key = await trial.key_is("active")
        sent = await csms.next(EventKind.CERTIFICATE_SENT)
    assert key.chain is not None
    assert key.chain.split() == sent.chain_pem.split()
    assert key.certificate_type == certificate_type
    installed = read_chain((trial.certificates / f"{certificate_type}.pem").read_bytes())
    assert installed is not None
    assert installed.public == key.public


async def test_a_station_of_a_site_has_topics_and_directory_of_its_own(tmp_path: Path, mosquitto: Mosquitto) -> None:
    trial = Trial(tmp_path, mosquitto)
    config = f'[site]\nstations = "depot7/+"\n[josev]\ncertificate_dir = "{trial.certificates}/{{station}}"\n'
    (tmp_path / "stationkey.toml").write_text(config)
    own = trial.certificates / "depot7%2Fs1"
    with trial.daemon:
        async with Csms(organization=ORGANIZATION) as csms:
            settings = replace(trial.settings(csms), station="depot7/s1", certificate_dir=own)
            async with trial.josev(settings) as station:
                await csms.connected(IDENTITY)
                await station.renew(V2G)
                await station.settled()
                key = await trial.key_is("active")
    assert key.station == "depot7/s1"
    assert key.chain is not None  # read in its own directory
    assert [path.name for path in own.iterdir()] == ["v2g_certificate.pem"]


@pytest.mark.parametrize("version", [OcppVersion.V16, OcppVersion.V201])
async def test_v2g20_is_refused_in_words_where_the_version_cannot_carry_it(trial: Trial, version: OcppVersion) -> None:
    async with Csms(organization=ORGANIZATION) as csms, trial.josev(trial.settings(csms, version)) as station:
        await csms.connected(IDENTITY)
        with pytest.raises(NotCarried) as refusal:
            await station.renew(V2G20)
        assert refusal.value.reason == "ocpp_not_carried"
    assert trial.on_record() == []  # nobody was even asked


@pytest.mark.parametrize(
    ("misbehaviour", "words"),
    [
        pytest.param(Misbehaviour.WRONG_KEY, "no key that a CSR is pending for", id="wrong key"),
        pytest.param(Misbehaviour.EXPIRED, "", id="expired"),
        pytest.param(Misbehaviour.WRONG_DC, "DC: the certificate has", id="wrong DC"),
        pytest.param(Misbehaviour.ROOT_IN_CHAIN, "root in it", id="root in the chain"),
        pytest.param(Misbehaviour.UNKNOWN_REQUEST_ID, "request id", id="unknown request id"),
    ],
)
async def test_a_bad_certificate_is_refused_with_event_and_status(
    trial: Trial, misbehaviour: Misbehaviour, words: str
) -> None:
    """A02.FR.06, A02.FR.07, A02.FR.25: Rejected to the CSMS, a security event, failed_installation to the station."""
    async with Csms(organization=ORGANIZATION, misbehaviour=misbehaviour) as csms:
        settings = replace(trial.settings(csms), repeat_times=0, wait_minimum=0.2)
        async with trial.josev(settings) as station:
            await csms.connected(IDENTITY)
            await csms.trigger(IDENTITY, V2G)
            answered = await csms.next(EventKind.CERTIFICATE_ANSWERED)
            event = await csms.next(EventKind.SECURITY_EVENT)
            await station.settled()
            await trial.key_is("pre-activation", failed=True)
    assert not answered.accepted
    assert event.type == "InvalidChargingStationCertificate"
    assert words in event.words
    assert list(trial.certificates.iterdir()) == []


async def test_a_certificate_that_comes_again_is_accepted_and_changes_nothing(trial: Trial) -> None:
    """The CSMS did not see the answer to the first CertificateSigned."""
    async with Csms(organization=ORGANIZATION) as csms, trial.josev(trial.settings(csms)) as station:
        await csms.connected(IDENTITY)
        await csms.trigger(IDENTITY, V2G)
        sent = await csms.next(EventKind.CERTIFICATE_SENT)
        await csms.next(EventKind.CERTIFICATE_ANSWERED)
        await station.settled()
        key = await trial.key_is("active")
        before = {path: path.stat().st_mtime_ns for path in trial.certificates.iterdir()}

        accepted = await station._signed(station._csms, V2G, sent.chain_pem, None)  # type: ignore[arg-type]  # noqa: SLF001 - connected

        assert accepted == (True, "")
        assert {path: path.stat().st_mtime_ns for path in trial.certificates.iterdir()} == before
        assert await trial.key_is("active") == key


async def test_a_chain_that_is_too_long_is_refused_with_event_and_status(trial: Trial) -> None:
    """A02.FR.16; the schema refuses it before anybody reads it."""
    async with Csms(organization=ORGANIZATION, misbehaviour=Misbehaviour.CHAIN_TOO_LONG) as csms:
        settings = replace(trial.settings(csms), repeat_times=0, wait_minimum=0.2)
        async with trial.josev(settings) as station:
            await csms.connected(IDENTITY)
            await csms.trigger(IDENTITY, V2G)
            assert not (await csms.next(EventKind.CERTIFICATE_ANSWERED)).accepted
            assert (await csms.next(EventKind.SECURITY_EVENT)).type == "InvalidChargingStationCertificate"
            await station.settled()
            await trial.key_is("pre-activation", failed=True)
    assert list(trial.certificates.iterdir()) == []


async def test_the_same_csr_is_sent_again_while_no_certificate_comes(trial: Trial) -> None:
    """A02.FR.17-19: the same CSR, CertSigningRepeatTimes at the most; and one key only."""
    async with Csms(organization=ORGANIZATION, misbehaviour=Misbehaviour.NEVER) as csms:
        settings = replace(trial.settings(csms), repeat_times=2, wait_minimum=0.05)
        async with trial.josev(settings) as station:
            await csms.connected(IDENTITY)
            await csms.trigger(IDENTITY, V2G)
            csrs = [(await csms.next(EventKind.CSR_ACCEPTED)).csr for _ in range(3)]
            await station.settled()
            assert len([event for event in csms.events if event.kind is EventKind.CSR_ACCEPTED]) == 3
    assert len(set(csrs)) == 1
    assert len(trial.on_record()) == 1


async def test_the_answer_to_the_first_of_three_csrs_activates_the_first_key(trial: Trial) -> None:
    """OCTT TC_A_23."""
    async with Csms(organization=ORGANIZATION, misbehaviour=Misbehaviour.ANSWER_FIRST_OF_THREE) as csms:
        settings = replace(trial.settings(csms), repeat_times=0, wait_minimum=0.05)
        async with trial.josev(settings) as station:
            await csms.connected(IDENTITY)
            for _ in range(3):
                assert await csms.trigger(IDENTITY, V2G) == "Accepted"
                await csms.next(EventKind.CSR_ACCEPTED)
                await station.settled()
            assert (await csms.next(EventKind.CERTIFICATE_ANSWERED)).accepted
            await station.settled()
            await trial.key_is("active", number=0)
    assert [str(key.state) for key in trial.on_record()] == ["active", "pre-activation", "pre-activation"]


@pytest.mark.parametrize("misbehaviour", [Misbehaviour.REJECT])
async def test_a_rejected_csr_is_not_sent_again(trial: Trial, misbehaviour: Misbehaviour) -> None:
    """A02.FR.20; and the charging station is told that its key will not be used."""
    async with Csms(organization=ORGANIZATION, misbehaviour=misbehaviour) as csms:
        settings = replace(trial.settings(csms), repeat_times=5, wait_minimum=0.01)
        async with trial.josev(settings) as station:
            await csms.connected(IDENTITY)
            with pytest.raises(SigningRefused):
                await station.renew(V2G)
            await trial.key_is("pre-activation", failed=True)
            assert len([event for event in csms.events if event.kind is EventKind.CSR_REJECTED]) == 1


async def test_a_csms_that_knows_another_organisation_refuses_in_words(trial: Trial) -> None:
    """A00.FR.509, A02.FR.13."""
    async with Csms(organization="Somebody Else") as csms, trial.josev(trial.settings(csms)) as station:
        await csms.connected(IDENTITY)
        with pytest.raises(SigningRefused) as refusal:
            await station.renew(CHARGING_STATION)
        assert "Somebody Else" in (await csms.next(EventKind.CSR_REJECTED)).words
        assert "Somebody Else" in refusal.value.message  # words: the CSMS's own


async def test_one_trigger_at_a_time(trial: Trial) -> None:
    csms = Csms(organization=ORGANIZATION, misbehaviour=Misbehaviour.NEVER)
    async with csms, trial.josev(trial.settings(csms)):
        await csms.connected(IDENTITY)
        assert await csms.trigger(IDENTITY, V2G) == "Accepted"
        await csms.next(EventKind.CSR_ACCEPTED)
        assert await csms.trigger(IDENTITY, CHARGING_STATION) == "Rejected"


async def test_a_restart_goes_on_with_the_same_csr(trial: Trial) -> None:
    async with Csms(organization=ORGANIZATION, misbehaviour=Misbehaviour.NEVER) as csms:
        settings = trial.settings(csms)
        async with trial.josev(settings):
            await csms.connected(IDENTITY)
            await csms.trigger(IDENTITY, V2G)
            first = (await csms.next(EventKind.CSR_ACCEPTED)).csr
        csms.misbehaviour = None
        async with trial.josev(settings) as station:
            assert (await csms.next(EventKind.CERTIFICATE_ANSWERED)).accepted
            await station.settled()
            await trial.key_is("active")
            assert (await csms.next(EventKind.CSR_ACCEPTED)).csr == first
    assert len(trial.on_record()) == 1


async def test_a_renewal_replaces_the_key(trial: Trial) -> None:
    async with Csms(organization=ORGANIZATION) as csms, trial.josev(trial.settings(csms)) as station:
        for _ in range(2):
            await station.renew(V2G)
            await station.settled()
            await trial.key_is("active")
    assert [str(key.state) for key in trial.on_record()] == ["deactivated", "active"]


async def test_a_station_that_rejects_ends_the_renewal(trial: Trial) -> None:
    async with Csms(organization=ORGANIZATION) as csms:
        settings = replace(trial.settings(csms), country_name="GER")
        async with trial.josev(settings) as station:
            with pytest.raises(SigningRefused) as refusal:
                await station.renew(V2G)
            assert refusal.value.reason == "csr_rejected"


async def test_a_password_is_asked_for_and_given(trial: Trial) -> None:
    """Security profile 1."""
    csms = Csms(
        organization=ORGANIZATION, security_profile=SecurityProfile.BASIC, passwords={IDENTITY: "secret-phrase-16"}
    )
    async with csms, trial.josev(replace(trial.settings(csms), password="secret-phrase-16")) as station:
        await station.renew(CHARGING_STATION, Algorithm.RSA_SHA256)
        await station.settled()
        assert (await trial.key_is("active")).key_type == "RSA-3072"


async def test_the_command_renews_and_ends(trial: Trial) -> None:
    async with Csms(organization=ORGANIZATION) as csms:
        settings = trial.settings(csms)
        command = [
            *(sys.executable, "-m", "stationkey", "josev", "--csms", csms.url, "--identity", IDENTITY),
            *("--broker", trial.broker.url, "--common-name", SECC_ID, "--organization-name", ORGANIZATION),
            *("--country-name", "DE", "--state-dir", str(settings.state_dir)),
            *("--certificate-dir", str(settings.certificate_dir), "--trust-anchors", str(settings.trust_anchors)),
            *("--renew", V2G, "--renew", V2G20, "--once"),
        ]
        ended = await asyncio.to_thread(_run, command)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("verified and installed") == 2
    await trial.key_is("active", number=0)
    await trial.key_is("active", number=1)


async def test_the_command_reaches_a_broker_behind_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    josev = authority.identity("josev")
    with SecuredMosquitto(tmp_path / "mosquitto", authority.broker(), authority) as broker:
        trial = Trial(tmp_path, broker)
        with trial.daemon:
            async with Csms(organization=ORGANIZATION) as csms:
                settings = trial.settings(csms)
                command = [
                    *(sys.executable, "-m", "stationkey", "josev", "--csms", csms.url, "--identity", IDENTITY),
                    *("--broker", broker.tls_url, "--mqtt-ca-file", str(authority.file)),
                    *("--mqtt-certificate-file", str(josev.certificate), "--mqtt-key-file", str(josev.key)),
                    *("--common-name", SECC_ID, "--organization-name", ORGANIZATION, "--country-name", "DE"),
                    *("--state-dir", str(settings.state_dir), "--certificate-dir", str(settings.certificate_dir)),
                    *("--trust-anchors", str(settings.trust_anchors), "--renew", V2G, "--once"),
                ]
                ended = await asyncio.to_thread(_run, command)
            assert ended.returncode == 0, ended.stderr
            assert "u'josev'" in broker.log
            await trial.key_is("active")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_each_wait_is_twice_as_long_as_the_one_before() -> None:
    """A02.FR.18."""
    assert waits(30.0, 3) == [30.0, 60.0, 120.0, 240.0]
    assert waits(30.0, 0) == [30.0]


def test_what_is_pending_survives_as_json(tmp_path: Path) -> None:
    file = PendingFile(tmp_path / "pending.json")
    for number in range(12):
        file.add(Pending(certificate_type=V2G, evse_id=None, csr=f"csr {number}", request_id=number))
    again = PendingFile(tmp_path / "pending.json")
    assert [pending.csr for pending in again.pending] == [f"csr {number}" for number in range(4, 12)]
    assert json.loads((tmp_path / "pending.json").read_text())["pending"][0]["request_id"] == 4
