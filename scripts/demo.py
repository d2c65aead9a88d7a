"""``make demo``: a broker, a TPM simulator and the real daemon; one CSR of each kind; then all of it is gone again."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import Daemon, Mosquitto, Swtpm
from rich.console import Console
from rich.table import Table

from stationkey import ALGORITHMS, PROFILES, Algorithm, CertificateType, inspect_csr

STATIONKEY = [sys.executable, "-m", "stationkey"]
SECC_ID = "DE-ABC-S-STATION42"
SERIAL_NUMBER = "9783161484100"


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


def _brief(extension: str) -> str:
    name, _, value = extension.removesuffix(" (critical)").partition(" ")
    return f"{name}{'!' if extension.endswith('(critical)') else ''} {value}"


def show_accepted(console: Console, broker: Mosquitto) -> bool:
    """Ask for every certificate type with every algorithm that the contract allows it."""
    table = Table(title="One certificate signing request of each kind, every key born in the TPM", title_justify="left")
    for heading in ("certificate type", "subject", "key, signature", "extensions (! critical)", "proof", "time"):
        wrap = heading == "subject"
        table.add_column(heading, no_wrap=not wrap, overflow="fold", justify="right" if heading == "time" else "left")
    everything_right = True
    for profile in PROFILES.values():
        certificate_type = profile.certificate_type
        common_name = SECC_ID if profile.secc_id else SERIAL_NUMBER
        table.add_section()
        for algorithm in [profile.required_algorithm] if profile.required_algorithm else list(ALGORITHMS):
            started = time.perf_counter()
            answer = ask(
                broker,
                certificate_type,
                *("--common-name", common_name, "--organization-name", "Über Strom GmbH", "--country-name", "DE"),
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
            table.add_row(
                certificate_type,
                csr.subject,
                f"{csr.key}\n{csr.signature}",
                "\n".join(map(_brief, csr.extensions)),
                "[green]signature\nverified by openssl" if verified else "[red]NOT VERIFIED",
                f"{took * 1000:.0f} ms",
            )
    console.print(table)
    console.print("[dim]time: the whole command, starting Python included[/]\n")
    return everything_right


def show_rejected(console: Console, broker: Mosquitto, daemon: Daemon) -> bool:
    """Ask for something that no certificate can have, and find out why it was refused."""
    answer = ask(
        broker,
        CertificateType.V2G20_CERTIFICATE,
        *("--common-name", SECC_ID, "--organization-name", "Über Strom GmbH", "--country-name", "GER"),
        *("--algorithm", Algorithm.ECDSA_SHA512),
    )
    reasons = [event for line in daemon.log.splitlines() if (event := json.loads(line)).get("reason")]
    console.print("A request with the country GER is refused, and the log of the daemon says why:")
    for event in reasons:
        console.print(f"  exit status {answer.returncode}; {event['event']}", markup=False)
    console.print()
    return answer.returncode == 3 and len(reasons) == 1  # noqa: PLR2004 - the exit status of a rejected request


def main() -> int:
    """Run the demo; 0 if everything was as it should be."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    with (
        tempfile.TemporaryDirectory(prefix="stationkey-demo-") as folder,
        Mosquitto(Path(folder) / "broker") as broker,
        Swtpm(Path(folder) / "tpm") as tpm,
        Daemon(
            Path(folder) / "daemon",
            *("--broker", broker.url, "--keystore", tpm.uri, "--state-dir", f"{folder}/state"),
        ) as daemon,
    ):
        console.print(f"Mosquitto at {broker.url}, a TPM 2.0 (swtpm) at {tpm.tcti}, and stationkey serve between them.")
        console.print("Asking with stationkey request, as Josev would:\n")
        right = show_accepted(console, broker) and show_rejected(console, broker, daemon)
        daemon.terminate()
    console.print("Everything that was started is stopped, and its files are gone.")
    if not right:
        console.print("[red]Something above is not as it should be.")
    return 0 if right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
