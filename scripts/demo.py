"""``make demo``: the real daemon between a broker, a TPM simulator and a PKCS#11 token, asked for every kind of CSR.

Then the whole circle, from a CSMS's trigger to a TLS session with the key in its device; and all of it is gone again.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from peers import Daemon, Mosquitto, ResourceManager, Swtpm
from rich.console import Console

from stationkey import ALGORITHMS, PROFILES, Algorithm, Broker, CertificateType, inspect_csr
from stationkey.simulators.csms.events import EventKind
from stationkey.simulators.csms.server import Csms
from stationkey.simulators.josev import Station
from stationkey.simulators.ocpp import OcppVersion
from stationkey.simulators.station_settings import StationSettings

STATIONKEY = [sys.executable, "-m", "stationkey"]
SECC_ID = "DE-ABC-S-STATION42"
SERIAL_NUMBER = "9783161484100"
ORGANIZATION = "Über Strom GmbH"
PLACES = {CertificateType.V2G20_CERTIFICATE: "PKCS#11 token"}
"""Where the keys of a certificate type are; those of the others are in the TPM."""
CONFIG = """\
keystore = "{tpm}"
[keystores]
token = "{token}"
[keystore_for]
v2g20_certificate = "token"
[josev]
certificate_dir = "{folder}/certificates"
"""


def soft_token(folder: Path) -> str:
    """Initialise a token of SoftHSM, in the place of a secure element; return the key store in it."""
    (folder / "tokens").mkdir(parents=True)
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\n")
    os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    pin = secrets.token_hex(4)
    (folder / "pin").write_text(pin)
    (folder / "pin").chmod(0o600)
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "demo", "--so-pin", secrets.token_hex(4), "--pin", pin],
        capture_output=True,
        check=True,
    )
    return f"pkcs11:token=demo?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:{folder}/pin"


def ask(broker: Mosquitto, certificate_type: str, *options: str) -> subprocess.CompletedProcess[str]:
    """``stationkey request``."""
    return subprocess.run(
        [*STATIONKEY, "request", certificate_type, "--broker", broker.url, *options],
        capture_output=True,
        text=True,
        check=False,
    )


def openssl_verifies(csr: str) -> bool:
    """Ask the second judge."""
    judged = subprocess.run(
        ["openssl", "req", "-verify", "-noout"], input=csr, capture_output=True, text=True, check=False
    )
    return judged.returncode == 0 and "verify OK" in judged.stderr + judged.stdout


def show_accepted(console: Console, broker: Mosquitto) -> bool:
    """Ask for every certificate type with every algorithm that the contract allows it."""
    console.print("One certificate signing request of each kind, every key created in its device:\n")
    everything_right = True
    for profile in PROFILES.values():
        certificate_type = profile.certificate_type
        common_name = SECC_ID if profile.secc_id else SERIAL_NUMBER
        console.print(f"[bold]{certificate_type}[/], by the {PLACES.get(certificate_type, 'TPM')}")
        shown = None
        for algorithm in [profile.required_algorithm] if profile.required_algorithm else list(ALGORITHMS):
            started = time.perf_counter()
            answer = ask(
                broker,
                certificate_type,
                *("--common-name", common_name, "--organization-name", ORGANIZATION, "--country-name", "DE"),
                *("--algorithm", algorithm),
            )
            took = time.perf_counter() - started
            if answer.returncode != 0:
                console.print(f"[red]{certificate_type} {algorithm}: {answer.stderr.strip()}")
                everything_right = False
                continue
            csr = inspect_csr(answer.stdout)
            verified = openssl_verifies(answer.stdout)
            everything_right &= verified
            if shown is None:
                shown = csr.subject
                for line in (csr.subject, *csr.extensions):
                    console.print(f"  {line}", markup=False)
            proof = "[green]verified by openssl[/]" if verified else "[red]NOT VERIFIED[/]"
            console.print(f"  {csr.key:<10} {csr.signature:<24} {proof} {took * 1000:6.0f} ms")
    console.print("\n[dim]time: the whole command, starting Python included[/]\n")
    return everything_right


def show_rejected(console: Console, broker: Mosquitto, daemon: Daemon) -> bool:
    """Ask for something that no certificate can have, and find out why it was refused."""
    answer = ask(
        broker,
        CertificateType.V2G20_CERTIFICATE,
        *("--common-name", SECC_ID, "--organization-name", ORGANIZATION, "--country-name", "GER"),
        *("--algorithm", Algorithm.ECDSA_SHA512),
    )
    reasons = [event for line in daemon.log.splitlines() if (event := json.loads(line)).get("reason")]
    console.print("A request with the country GER is refused, and the log of the daemon says why:")
    for event in reasons:
        console.print(f"  exit status {answer.returncode}; {event['event']}", markup=False)
    console.print()
    return answer.returncode == 3 and len(reasons) == 1  # noqa: PLR2004 - the exit status of a rejected request


async def show_circle(console: Console, broker: Mosquitto, folder: Path) -> bool:
    """Trigger, CSR, signature, installation: for each certificate type, over OCPP 2.1."""
    console.print("The whole circle, a CSMS on one side and the charging station on the other, OCPP 2.1 in between:\n")
    async with Csms(organization=ORGANIZATION) as csms:
        anchors = folder / "anchors.pem"
        anchors.write_text(csms.trust_anchors_pem())
        everything_right = True
        for certificate_type in CertificateType:
            console.print(f"[bold]{certificate_type}")
            settings = StationSettings(
                csms=csms.url,
                identity=f"CS-{certificate_type}",
                versions=(OcppVersion.V21,),
                broker=Broker.parse(broker.url),
                common_name=SECC_ID if PROFILES[certificate_type].secc_id else SERIAL_NUMBER,
                organization_name=ORGANIZATION,
                country_name="DE",
                state_dir=folder / f"josev-{certificate_type}",
                certificate_dir=folder / "certificates",
                trust_anchors=anchors,
            )
            station = Station(settings, lambda words, _: console.print(f"  {words}", markup=False))
            playing = asyncio.create_task(station.run())
            try:
                await csms.connected(settings.identity)
                await csms.trigger(settings.identity, certificate_type)
                everything_right &= (await csms.next(EventKind.CERTIFICATE_ANSWERED)).accepted
                await station.settled()
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
    console.print()
    return everything_right


def until_active(state_dir: Path) -> bool:
    """Whether the daemon has made a key of each type active: a status is answered by nobody, so one has to look."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        files = list((state_dir / "active").glob("*.pem"))
        if len(files) == len(CertificateType):
            return True
        time.sleep(0.05)
    return False


def show_handshakes(console: Console, config: Path, state_dir: Path) -> bool:
    """A TLS session with each active key, signed for in its device."""
    console.print("A TLS handshake on loopback with each active key, which does not leave its device:")
    everything_right = True
    for certificate_type in CertificateType:
        where = ("--config", str(config), "--state-dir", str(state_dir))
        checked = run("tls-config", "--check", certificate_type, *where)
        everything_right &= checked.returncode == 0
        for line in (checked.stdout if checked.returncode == 0 else checked.stderr).splitlines():
            console.print(f"  {line}", markup=False)
    console.print("\nThe keys at the end:")
    listed = subprocess.run(
        [*STATIONKEY, "keys", "list", "--state-dir", str(state_dir)], capture_output=True, text=True, check=True
    )
    console.print(listed.stdout, markup=False)
    return everything_right


def show_evidence(console: Console, keystore: str, state_dir: Path, folder: Path) -> bool:
    """The TPM states that an active key was born in it, and the verdict on that."""
    listed = json.loads(run("keys", "list", "--json", "--state-dir", str(state_dir)).stdout)
    key = next(key["key_id"] for key in listed if key["state"] == "active")
    station = ("--keystore", keystore, "--state-dir", str(state_dir))
    ak, evidence, nonce = str(folder / "ak.json"), str(folder / "evidence.json"), secrets.token_hex(16)
    console.print(f"Evidence that {key} was born in this TPM, and the verdict of a judge that needs none:")
    done = [
        run("attest", "--ak", "--json", "--out", ak, *station),
        run("attest", key, "--nonce", nonce, "--out", evidence, *station),
        run("verify-attestation", evidence, "--ak", ak, "--nonce", nonce),
    ]
    for line in done[-1].stdout.splitlines():
        console.print(f"  {line}", markup=False)
    for failed in (each for each in done if each.returncode):
        console.print(failed.stderr, markup=False)
    console.print()
    return not any(each.returncode for each in done)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A ``stationkey`` command."""
    return subprocess.run([*STATIONKEY, *arguments], capture_output=True, text=True, check=False)


def play(console: Console, folder: Path) -> bool:
    """Run the demo; whether everything was as it should be."""
    config, state_dir = folder / "stationkey.toml", folder / "state"
    with (
        Mosquitto(folder / "broker") as broker,
        Swtpm(folder / "tpm") as tpm,
        ResourceManager(folder / "manager", tpm=tpm.tcti) as manager,
    ):
        os.environ.update(manager.environment)
        keystore = f"tpm2:{manager.tcti}"
        config.write_text(CONFIG.format(tpm=keystore, token=soft_token(folder / "token"), folder=folder))
        daemon = Daemon(
            folder / "daemon",
            *("--broker", broker.url, "--state-dir", str(state_dir), "--config", str(config)),
        )
        with daemon:
            console.print(
                f"Mosquitto at {broker.url}, a TPM 2.0 (swtpm) behind a resource manager as in a station,"
                " a PKCS#11 token (SoftHSM) in the place of a secure element, and stationkey serve between them."
            )
            console.print("Asking with stationkey request, as Josev would:\n")
            right = show_accepted(console, broker) and show_rejected(console, broker, daemon)
            right = asyncio.run(show_circle(console, broker, folder)) and right
            right = until_active(state_dir) and right
            right = show_handshakes(console, config, state_dir) and right
            right = show_evidence(console, keystore, state_dir, folder) and right
            daemon.terminate()
    return right


def perform(play: Callable[[Console, Path], bool]) -> int:
    """Play a demo in a folder of its own; its exit status: 0 if everything was as it should be."""
    console = Console(width=None if sys.stdout.isatty() else 80, highlight=False)
    try:
        with tempfile.TemporaryDirectory(prefix="stationkey-demo-") as name:
            right = play(console, Path(name))
    except KeyboardInterrupt:
        return 130
    console.print("Everything that was started is stopped, and its files are gone.")
    if not right:
        console.print("[red]Something above is not as it should be.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(perform(play))
