"""Record docs/terminal.svg: a terminal session of a real run, with a real Mosquitto and a simulated TPM.

Use: .venv/bin/python scripts/record.py, after `make setup`; run it again after a change of what the commands print.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from peers import Mosquitto, Peer, Swtpm
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PAGE: Final = Path(__file__).parent.parent / "docs/terminal.svg"
WIDTH: Final = 82
NAMES: Final = '--common-name DE-ABC-S-STATION42 \\\n    --organization-name "Operator GmbH" --country-name DE'
INSTALL: Final = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout ca.key -out ca.pem -subj "/CN=Trial CA"
openssl x509 -req -in station.csr -CA ca.pem -CAkey ca.key -copy_extensions copy -days 60 -out station.pem
cp station.pem ca.pem certificates/
mosquitto_pub -p "$PORT" -t josev/cs -q 1 -m '{"id": "7d0e1c9a-5b0c-4d53-8f0a-1f2e3d4c5b6a",
  "name": "certificate_installation_status", "type": "update",
  "data": {"certificate_type": "v2g_certificate", "status": "installed"}}'
"""
"""What CSMS and Josev do between the two halves of the session."""


class Serve(Peer):
    """``stationkey serve``, with a log for people."""

    program = sys.executable

    def command(self) -> list[str]:
        """Return the command line."""
        return ["-m", "stationkey", "serve", "--config", str(self.directory / "stationkey.toml")]

    def listening(self) -> bool:
        """Whether it serves."""
        return " ready" in self.log


def shell(command: str, directory: Path) -> str:
    """Run a command line, and return what a terminal would show."""
    ran = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ran.stdout


def record(console: Console, directory: Path) -> None:
    """Run the session, and print it."""

    def typed(command: str, *, lines: int | None = None) -> None:
        console.print(Text(f"$ {command}", style="bold"))
        show(shell(command, directory), lines)

    def show(output: str, lines: int | None = None) -> None:
        if output:
            console.print(Text.from_ansi("\n".join(output.splitlines()[:lines])), overflow="fold")
        console.print()

    with Mosquitto(directory / "mosquitto") as broker, Swtpm(directory / "swtpm") as tpm:
        (directory / "certificates").mkdir()
        (directory / "stationkey.toml").write_text(
            f'broker = "{broker.url}"\nkeystore = "{tpm.uri}"\nstate_dir = "{directory}/state"\n'
            f'[josev]\ncertificate_dir = "{directory}/certificates"\n'
        )
        os.environ |= {"STATIONKEY_CONFIG": str(directory / "stationkey.toml"), "STATIONKEY_BROKER": broker.url}
        os.environ |= {"PORT": str(broker.port), "COLUMNS": str(WIDTH), "STATIONKEY_STATE_DIR": f"{directory}/state"}
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with Serve(directory) as daemon:
            typed(f"stationkey request v2g_certificate {NAMES} > station.csr")
            typed("openssl req -in station.csr -noout -verify -subject")
            typed("stationkey keys list")
            console.print(Text("# CSMS and CA sign it; Josev installs the certificate and reports it", style="dim"))
            shell(INSTALL, directory)
            end = time.monotonic() + 10
            while "key active" not in daemon.log and time.monotonic() < end:
                time.sleep(0.05)
            show("\n".join(line[25:] for line in daemon.log.splitlines() if "key active" in line))
            typed("stationkey keys list")
            typed("stationkey status")
            typed("stationkey doctor", lines=7)


if __name__ == "__main__":
    recording = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as place:
        record(recording, Path(place))
    drawn = recording.export_svg(title="stationkey", theme=MONOKAI)
    PAGE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))  # fonts from elsewhere
