"""A doctor for the tests: looks at a set-up, and gives what was found by its name."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import judging
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from peers import Swtpm, free_port

from parts import station
from stationkey.doctor.examination import examine
from stationkey.doctor.host.context import Options
from stationkey.doctor.report import Finding, Level, Report

DOCTOR = [sys.executable, "-m", "stationkey", "doctor"]
NOBODY = 65534
"""A user who owns nothing here."""


@dataclass(frozen=True)
class Findings:
    """A report, to be asked."""

    report: Report

    def __getitem__(self, name: str) -> list[Finding]:
        found = [finding for finding in self.report.findings if finding.id == name]
        assert found, f"nothing was said of {name}"
        return found

    def level(self, name: str) -> Level:
        """The worst level that something has."""
        return judging.worst(self[name])

    def reasons(self, name: str) -> set[str]:
        """The reasons of what is not as it should be."""
        return judging.reasons(self[name])

    def text(self, name: str) -> str:
        """All that is said of something, advice included: for values, files, options and commands in it."""
        return " ".join(f"{finding.message} {finding.advice}" for finding in self[name])

    @property
    def failures(self) -> set[str]:
        return {finding.id for finding in self.report.findings if finding.level is Level.FAILURE}


def look(folder: Path, **options: object) -> Findings:
    """Have everything looked at, in this process; what is not said leads nowhere."""
    settings: dict[str, object] = {
        "broker": f"mqtt://127.0.0.1:{free_port()}",
        "keystore": "software:",
        "state_dir": folder / "state",
    }
    report, left_behind = examine(Options(**{**settings, **options}))  # type: ignore[arg-type] # names and types are those of Options
    assert not left_behind
    return Findings(report)


def as_nobody(folder: Path, **options: object) -> Findings:
    """The same as a user who owns nothing here; where the tests are not run by root, as whoever runs them.

    The modules are loaded before the user is changed: nobody may read where they are, perhaps.
    """
    settings = {
        "broker": f"mqtt://127.0.0.1:{free_port()}",
        "keystore": "software:",
        "state_dir": str(folder / "state"),
    }
    settings |= {name: str(value) for name, value in options.items()}
    arguments = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    change = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})" if os.geteuid() == 0 else "pass"
    modules = "os, sys, asyncio, encodings.idna"  # the last is looked for by the first name that is looked up
    program = f"import {modules}; from stationkey.cli.doctor import doctor; {change}; doctor(sys.argv[1:])"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # nobody may write there
    return read(command_output([sys.executable, "-c", program, "--json", *arguments], environment=plain))


def command_output(command: list[str], environment: Mapping[str, str] = os.environ) -> str:
    """What a command prints. Whatever it finds, it says nothing on standard error, and ends by itself."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.stderr == "", done.stderr
    assert done.returncode in {0, 1}
    return done.stdout


def read(text: str) -> Findings:
    """A report, from its JSON."""
    return Findings(
        Report(tuple(Finding(**one | {"level": Level(one["level"])}) for one in json.loads(text)["findings"]))
    )


def write_config(folder: Path, text: str, *, mode: int = 0o600) -> Path:
    """A configuration file."""
    path = folder / "stationkey.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


class Pki:
    """A CA and what it signs, for the broker and its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca_file = folder / "ca.pem"
        self._write(self.ca_file, self._certificate("CA", self._key, is_ca=True))

    def issue(self, name: str, *, days: int = 365, host: str = "localhost") -> tuple[Path, Path]:
        """Certificate and key, in files; `days` until it ends, negative where it has ended."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, key_file = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        self._write(certificate, self._certificate(name, key, days=days, host=host))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        key_file.chmod(0o600)
        return certificate, key_file

    def _write(self, path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        path.chmod(0o644)

    def _certificate(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        *,
        days: int = 365,
        host: str = "localhost",
        is_ca: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        ca = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA")])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return (
            x509.CertificateBuilder(ca, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def tool(tpm: Swtpm, *words: str, fails: bool = False) -> str:
    """Run a program of tpm2-tools, and return what it prints."""
    done = subprocess.run(
        words, env={**os.environ, "TPM2TOOLS_TCTI": tpm.tcti}, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout


def used(folder: Path, *, keystore: str = "software:", installed: bool = True) -> Path:
    """A state directory with a key in it; active, where it is `installed`."""

    async def use() -> None:
        async with station(folder / "state", keystore=keystore) as one:
            await one.key()
            if installed:
                await one.told("installed")

    asyncio.run(use())
    return folder / "state"
