"""OCPP by another hand, both ways: ocpp-rpc as CSMS and as station, and @peculiar/x509 as authority and verifier."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from judges import Talker, node, stationkey
from outside import Josev, Station, generate_csr
from rig import Rig

from stationkey.contract.profiles import PROFILES, CertificateType
from stationkey.simulators.ocpp import CARRIAGES, OcppVersion

CHARGING_STATION, V2G, V2G20 = CertificateType
V16, V201, V21 = OcppVersion
SECC_ID = "DE-ABC-S-STATION42"
NAMES = ("--common-name", SECC_ID, "--organization-name", "EcoG", "--country-name", "DE")
CIRCLES = [
    pytest.param(V16, CHARGING_STATION, id="1.6"),
    pytest.param(V201, V2G, id="2.0.1"),
    pytest.param(V21, V2G20, id="2.1"),
]


class Place:
    """A daemon with software keys, and the folders that Josev and it share."""

    def __init__(self, rig: Rig, certificates: Path) -> None:
        self.folder = rig.folder
        self.certificates = certificates
        self.broker = rig.broker
        self.daemon = Station(rig.folder, *rig.options())

    def josev(self, csms: Talker, version: OcppVersion) -> Talker:
        """``stationkey josev``, which trusts the foreign authority."""
        listening = csms.wait_for("listening")
        anchors = self.folder / "anchors.pem"
        anchors.write_text(listening["root"])
        return stationkey(
            *("josev", "--csms", f"ws://127.0.0.1:{listening['port']}", "--identity", "CS001"),
            *("--ocpp", version.number, "--broker", self.broker.url, *NAMES),
            *("--state-dir", str(self.folder / "josev"), "--certificate-dir", str(self.certificates)),
            *("--trust-anchors", str(anchors)),
        )

    def active(self, certificate_type: CertificateType) -> str:
        """What is in use, once the daemon says so."""
        path = self.daemon.state_dir / "active" / f"{certificate_type}.pem"
        self.daemon.wait_for(file=str(path))
        return path.read_text()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    with Rig(tmp_path, tpm=False, config=f'[josev]\ncertificate_dir = "{certificates}"\n') as rig:
        place = Place(rig, certificates)
        with place.daemon:
            yield place


def foreign_csms(version: OcppVersion, certificate_type: CertificateType, *boots: str) -> Talker:
    kind = CARRIAGES[certificate_type, version].certificate_type or "ChargePointCertificate"
    return node("csms.mjs", version, kind, "P-521" if certificate_type is V2G20 else "P-256", *boots)


@pytest.mark.parametrize(("version", "certificate_type"), CIRCLES)
def test_a_foreign_csms_boots_triggers_certifies_and_sees_the_certificate_installed(
    place: Place, version: OcppVersion, certificate_type: CertificateType
) -> None:
    """Its strict mode holds every call and answer against its own copy of the schemas."""
    with foreign_csms(version, certificate_type, "Accepted") as csms, place.josev(csms, version):
        assert csms.wait_for("connected")["protocol"] == version
        assert csms.wait_for("triggered")["status"] == "Accepted"
        certified, answered = csms.wait_for("certified"), csms.wait_for("answered")
        active = place.active(certificate_type)
        assert '"event":"invalid"' not in csms.log
    assert answered["status"] == "Accepted"
    assert f"CN={SECC_ID}" in certified["subject"]
    usages = PROFILES[certificate_type].extended_key_usage
    assert certified["asked"] == [
        ["2.5.29.19", True],
        ["2.5.29.15", True],
        *([["2.5.29.37", PROFILES[certificate_type].extended_key_usage_critical]] if usages else []),
    ]
    assert answered["certificateChain"].split() == active[active.index("-----BEGIN CERTIFICATE-----") :].split()


def test_a_foreign_csms_that_takes_its_time_to_accept_is_waited_for(place: Place) -> None:
    """It closes at boot, answers with CALLERROR, Pending and Rejected, and accepts at last: then the circle is run."""
    boots = ("close", "CALLERROR", "Pending", "Rejected", "Accepted")
    with foreign_csms(V201, CHARGING_STATION, *boots) as csms, place.josev(csms, V201):
        assert csms.wait_for("answered")["status"] == "Accepted"
        assert [csms.wait_for("boot", count=number)["how"] for number in range(1, 6)] == list(boots)
        csms.wait_for("connected", count=3)
        place.active(CHARGING_STATION)


@pytest.mark.parametrize(("version", "certificate_type"), CIRCLES)
def test_a_foreign_station_is_triggered_and_verifies_the_chain_that_our_csms_signs(
    place: Place, version: OcppVersion, certificate_type: CertificateType
) -> None:
    """The CSR is the daemon's, and the certificate becomes active in it."""
    pki = place.folder / "pki"
    serving = stationkey(
        *("csms", "--listen", "127.0.0.1:0", "--organization", "EcoG", "--pki-dir", str(pki)),
        *("--trigger", certificate_type),
    )
    with Josev(place.broker) as josev, serving as csms:
        csms.wait_for_line("trust anchors in")
        url = csms.wait_for_line("listening on ").split()[-1].removesuffix("/STATION-ID")
        with node("station.mjs", url, version, str(pki / "trust-anchors.pem")) as station:
            assert station.wait_for("booted")["status"] == "Accepted"
            station.wait_for("triggered")
            algorithm = "ECDSA_SHA512" if certificate_type is V2G20 else "ECDSA_SHA256"
            wish = {"certificate_type": certificate_type, "algorithm": algorithm, "common_name": SECC_ID}
            station.say(json.dumps(josev.ask(generate_csr(**wish)).csr))
            assert station.wait_for("signing")["status"] == "Accepted"
            signed = station.wait_for("signed")
            assert signed["accepted"]
            csms.wait_for_line("answered: Accepted")
            assert '"event":"invalid"' not in station.log
        (place.certificates / "signed.pem").write_text(signed["certificateChain"])
        data = {"certificate_type": certificate_type, "status": "installed"}
        name = "certificate_installation_status"
        josev.publish({"id": str(uuid.uuid4()), "name": name, "type": "update", "data": data})
        active = x509.load_pem_x509_certificates(place.active(certificate_type).encode())
    assert active == x509.load_pem_x509_certificates(signed["certificateChain"].encode())
