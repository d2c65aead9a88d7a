"""The daemon's CSRs before authorities that nobody here wrote: parsed, verified, signed, and taken back to active.

The keys are a TPM's. What an authority leaves out or changes is a known difference, and the daemon names it.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from authority import Authority, pem
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from judges import VENV
from outside import BOUND, Josev, Station, generate_csr
from rig import Rig

from stationkey.contract.active_names import Owner, file_name
from stationkey.contract.profiles import Algorithm, CertificateType

CHARGING_STATION, V2G, V2G20 = CertificateType
KINDS: Final = [
    pytest.param(CHARGING_STATION, Algorithm.ECDSA_SHA256, id="station, P-256"),
    pytest.param(CHARGING_STATION, Algorithm.RSA_SHA256, id="station, RSA"),
    pytest.param(V2G, Algorithm.ECDSA_SHA256, id="-2, P-256"),
    pytest.param(V2G20, Algorithm.ECDSA_SHA512, id="-20, P-521"),
]
PASSWORD: Final = "secret"


class Refused(Exception):
    """An authority does not sign this."""


def run(*command: str) -> str:
    """What a program prints; it is refused where the program fails."""
    if shutil.which(command[0]) is None:
        pytest.fail(f"{command[0]} is not installed; scripts/setup installs it")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND)
    if done.returncode != 0:
        raise Refused(done.stderr + done.stdout)
    return done.stdout


@dataclass(frozen=True)
class Desk:
    """The files of one authority's key and certificate, for every program in the form that it wants."""

    folder: Path
    sub_cas: str

    @classmethod
    def make(cls, folder: Path) -> Desk:
        authority = Authority(ec.SECP256R1())
        key, certificate = authority.issuer.key, authority.issuer.path[0]
        plain = serialization.NoEncryption()
        openssl = serialization.PrivateFormat.TraditionalOpenSSL
        (folder / "ca.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, openssl, plain))
        (folder / "ca.pem").write_text(pem([certificate]))
        locked = serialization.BestAvailableEncryption(PASSWORD.encode())
        p12 = pkcs12.serialize_key_and_certificates(b"ca", key, certificate, None, locked)
        (folder / "ca.p12").write_bytes(p12)
        (folder / "template").write_text("expiration_days = 60\nhonor_crq_extensions\n")
        usages = ["digital signature", "key agreement", "client auth", "server auth"]
        (folder / "cfssl.json").write_text(json.dumps({"signing": {"default": {"expiry": "1440h", "usages": usages}}}))
        nss = folder / "nss"
        nss.mkdir()
        run("certutil", "-N", "-d", f"sql:{nss}", "--empty-password")
        run("pk12util", "-i", str(folder / "ca.p12"), "-d", f"sql:{nss}", "-W", PASSWORD)
        return cls(folder, authority.sub_cas)

    def path(self, name: str) -> str:
        return str(self.folder / name)


def gnutls(desk: Desk, csr: str) -> str:
    assert "Self signature: verified" in run("certtool", "--crq-info", "--infile", csr)
    return run(
        *("certtool", "--generate-certificate", "--load-request", csr, "--template", desk.path("template")),
        *("--load-ca-certificate", desk.path("ca.pem"), "--load-ca-privkey", desk.path("ca.key")),
    )


def nss(desk: Desk, csr: str) -> str:
    serial = str(uuid.uuid4().int % 2**31)
    return run("certutil", "-C", "-c", "ca", "-i", csr, "-a", "-d", f"sql:{desk.path('nss')}", "-v", "2", "-m", serial)


def cfssl(desk: Desk, csr: str) -> str:
    authority = ("-ca", desk.path("ca.pem"), "-ca-key", desk.path("ca.key"), "-config", desk.path("cfssl.json"))
    return str(json.loads(run("cfssl", "sign", *authority, csr))["cert"])


def keytool(desk: Desk, csr: str) -> str:
    fast = ("-J-XX:TieredStopAtLevel=1", "-J-Xshare:auto")
    store = ("-alias", "ca", "-keystore", desk.path("ca.p12"), "-storepass", PASSWORD)
    options = ("-validity", "60", "-ext", "honored=all")
    printed = run("keytool", *fast, "-gencert", "-infile", csr, "-rfc", *store, *options)
    return pem(x509.load_pem_x509_certificates(printed.encode())[:1])  # it prints its own certificate, too


Sign = Callable[[Desk, str], str]
AUTHORITIES: Final[list[Sign]] = [gnutls, nss, cfssl, keytool]

Difference = tuple[str, str]
"""The label of a difference in the daemon's log, and what it is about."""


def cfssl_loses_dc() -> bool:
    """Before 1.6 (Debian 12 has 1.2) it builds the subject anew, from the attributes that it knows."""
    return "Version: 1.2." in run("cfssl", "version")


def known_differences(sign: Sign, certificate_type: CertificateType) -> set[Difference]:
    """What an authority makes otherwise than it was asked to, by its name.

    keytool writes the issuer's name as PrintableString, where the Sub-CA has UTF8String: by value they are equal.
    """
    if certificate_type is CHARGING_STATION:
        return set()
    if sign is gnutls:
        return {("usage", "keyAgreement")}  # honor_crq_extensions takes over all but keyUsage
    return {("DC", "CPO" if certificate_type is V2G else "CSO")} if sign is cfssl and cfssl_loses_dc() else set()


class Circle:
    """A station with a TPM, and somebody in Josev's place."""

    def __init__(self, rig: Rig, josev: Josev, station: Station, certificates: Path) -> None:
        self.josev, self.station, self.certificates = josev, station, certificates
        self.active_dir = rig.state_dir / "active"

    def ask(self, certificate_type: CertificateType, algorithm: Algorithm, evse_id: str) -> str:
        wish = {"certificate_type": certificate_type, "algorithm": algorithm, "evse_id": evse_id}
        name = "Ladestation Köln" if certificate_type is CHARGING_STATION else "DE-ABC-S-STATION42"
        asked = generate_csr(**wish, common_name=name, organization_name="Über Strom GmbH")
        return self.josev.ask(asked).csr

    def install(self, chain: str, certificate_type: CertificateType, evse_id: str) -> set[str]:
        """Have a chain become active; the differences that the daemon names."""
        (self.certificates / f"{evse_id.replace('*', '_')}.pem").write_text(chain)
        data = {"certificate_type": certificate_type, "evse_id": evse_id, "status": "installed"}
        told = str(uuid.uuid4())
        name = "certificate_installation_status"
        self.josev.publish({"id": told, "name": name, "type": "update", "data": data})
        path = self.active_dir / file_name(Owner("", certificate_type, evse_id))
        self.station.wait_for(file=str(path))
        wanted = x509.load_pem_x509_certificates(chain.encode())
        assert x509.load_pem_x509_certificates(path.read_bytes()) == wanted
        events = self.station.wait_for("differs from its profile", count=0)
        return {event["event"].partition("profile: ")[2] for event in events if event["message_id"] == told}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk.make(tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Circle]:
    folder = tmp_path_factory.mktemp("circle")
    certificates = folder / "certificates"
    certificates.mkdir()
    with Rig(folder, tpm=True, config=f'[josev]\ncertificate_dir = "{certificates}"\n') as rig:
        station = Station(folder, *rig.options())
        with station, Josev(rig.broker) as josev:
            yield Circle(rig, josev, station, certificates)


@pytest.mark.parametrize("sign", AUTHORITIES)
@pytest.mark.parametrize(("certificate_type", "algorithm"), KINDS)
def test_a_foreign_authority_verifies_and_signs_and_the_certificate_becomes_active(
    circle: Circle, desk: Desk, tmp_path: Path, certificate_type: CertificateType, algorithm: Algorithm, sign: Sign
) -> None:
    evse_id = f"DE*ABC*E{AUTHORITIES.index(sign)}{algorithm.replace('_', '')}"
    csr = tmp_path / "csr.pem"
    csr.write_text(circle.ask(certificate_type, algorithm, evse_id))

    leaf = sign(desk, str(csr))
    found = circle.install(leaf + desk.sub_cas, certificate_type, evse_id)

    expected = known_differences(sign, certificate_type)
    assert len(found) == len(expected), found
    for label, about in expected:
        assert any(words.startswith(f"{label}:") and about in words for words in found), found


@pytest.mark.parametrize("sign", AUTHORITIES)
def test_a_foreign_authority_refuses_a_csr_whose_signature_is_another(
    circle: Circle, desk: Desk, tmp_path: Path, sign: Sign
) -> None:
    """It does judge: the test above would not see it otherwise."""
    lines = circle.ask(V2G, Algorithm.ECDSA_SHA256, f"DE*ABC*E9{AUTHORITIES.index(sign)}").splitlines()
    der = bytearray(base64.b64decode("".join(lines[1:-1])))
    der[-1] ^= 1
    csr = tmp_path / "csr.pem"
    csr.write_text("\n".join([lines[0], base64.encodebytes(der).decode().strip(), lines[-1], ""]))

    with pytest.raises((Refused, AssertionError)):
        sign(desk, str(csr))


KNOWN_FINDINGS: Final = {
    # NSS adds neither identifier unless told so; DC is an ISO 15118 word there, and no part of a domain [V2G2-925].
    "pkix.authority_key_identifier_extension_absent",
    "pkix.certificate_skid_end_entity_missing",
    "pkix.name_domain_components_invalid_domain_name",
}


@pytest.mark.parametrize(("certificate_type", "algorithm"), KINDS)
def test_pkilint_finds_nothing_against_what_our_csr_asks_for(
    circle: Circle, desk: Desk, tmp_path: Path, certificate_type: CertificateType, algorithm: Algorithm
) -> None:
    """By RFC 5280 and what it cites, of the certificate in which NSS takes over all of the CSR's extensions."""
    csr, leaf = tmp_path / "csr.pem", tmp_path / "leaf.pem"
    csr.write_text(circle.ask(certificate_type, algorithm, f"DE*ABC*E8{algorithm.replace('_', '')}"))
    leaf.write_text(nss(desk, str(csr)))

    command = [str(VENV / "lint_pkix_cert"), "lint", "-s", "NOTICE", "-f", "JSON", str(leaf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND)
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    found = {finding["code"] for result in results for finding in result["finding_descriptions"]}

    dc = set() if certificate_type is CHARGING_STATION else {"pkix.name_domain_components_invalid_domain_name"}
    assert found == KNOWN_FINDINGS - {"pkix.name_domain_components_invalid_domain_name"} | dc
