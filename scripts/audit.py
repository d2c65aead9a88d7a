"""``make audit``: is anything known against what is pinned? By pip-audit, file by file, and nothing is resolved anew.

pip-audit calls it "no known vulnerabilities" where it could ask about nothing. Here what could not be asked about is no
clean result. Exit status 0: each package was asked about, and nothing is known; 1: something is known; 2: it cannot be
said.

Use: audit.py [REQUIREMENTS ...] [-- OPTION OF PIP-AUDIT ...], for example -- --vulnerability-service osv
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FILES = ("runtime.txt", "peers.txt", "build.txt", "dev.txt", "docs.txt", "iso15118.txt")
"""What a station and its trials run, what that is built with, and what checks and documents need."""

EXIT_KNOWN = 1
EXIT_NOT_SAID = 2


_MARKER = re.compile(r" ; .+(?= \\$)", re.MULTILINE)
"""What a package is needed for, such as a version of Python, on its line of a requirements file."""


@dataclass
class Verdict:
    """What is known of the packages of a file.

    Attributes:
        clean: how many were asked about, and nothing is known.
        known: what is known against the others.
        not_said: which could not be asked about, and why.
    """

    clean: int = 0
    known: list[str] = field(default_factory=list)
    not_said: list[str] = field(default_factory=list)


def judge(report: dict[str, Any]) -> Verdict:
    """The verdict of a report of pip-audit, in JSON."""
    verdict = Verdict()
    for package in report.get("dependencies", []):
        if "skip_reason" in package:
            verdict.not_said.append(str(package["skip_reason"]))
        elif not package["vulns"]:
            verdict.clean += 1
        for found in package.get("vulns", []):
            better = f"; fixed in {', '.join(found['fix_versions'])}" if found["fix_versions"] else ""
            verdict.known.append(f"{package['name']} {package['version']}: {found['id']}{better}")
    if not (verdict.clean or verdict.known or verdict.not_said):
        verdict.not_said.append("the report has no packages in it")
    return verdict


def audit(requirements: Path, options: Iterable[str]) -> Verdict:
    """Ask about each package of a file, also about what another version of Python needs and this one does not."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as unconditional:
        unconditional.write(_MARKER.sub("", requirements.read_text()))
        unconditional.flush()
        return _ask(unconditional.name, options)


def _ask(requirements: str, options: Iterable[str]) -> Verdict:
    how = ("--requirement", requirements, "--require-hashes", "--disable-pip", "--format", "json")
    program = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--desc", "off"]
    said = subprocess.run([*program, *how, *options], capture_output=True, text=True, check=False)
    try:
        report = json.loads(said.stdout)
    except ValueError:
        last = (said.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Verdict(not_said=[f"pip-audit failed: {last}"])
    return judge(report)


def main(arguments: list[str]) -> int:
    """Print what is known; the exit status."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    files = [Path(name) for name in arguments[:at]] or [ROOT / "requirements" / name for name in FILES]
    verdicts = {file: audit(file, arguments[at + 1 :]) for file in files}
    for file, verdict in verdicts.items():
        print(f"{file.name}: nothing known against {verdict.clean} packages")
        for line in verdict.known:
            print(f"  KNOWN      {line}")
        for line in verdict.not_said:
            print(f"  NOT ASKED  {line}")
    known = sum(len(verdict.known) for verdict in verdicts.values())
    not_said = sum(len(verdict.not_said) for verdict in verdicts.values())
    if not_said:
        print(
            f"audit: {not_said} packages or files could not be asked about. This is no clean result.", file=sys.stderr
        )
    if known:
        print(f"audit: {known} vulnerabilities are known.", file=sys.stderr)
    return EXIT_KNOWN if known else EXIT_NOT_SAID if not_said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
