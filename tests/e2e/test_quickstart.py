"""The commands of docs/quickstart.md, run as written, with swtpm for the chip and another port and directories."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Final

from outside import BOUND, STATIONKEY, Station
from peers import Mosquitto, Swtpm

PAGE: Final = (Path(__file__).parents[2] / "docs/quickstart.md").read_text()
CERTIFICATES: Final = "/var/lib/josev/certificates"
CONFIGURATION: Final = "/etc/stationkey/stationkey.toml"


def step(heading: str) -> str:
    """Return the shell blocks below a heading."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return "".join(re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


def test_its_commands_lead_to_an_active_certificate(mosquitto: Mosquitto, swtpm: Swtpm, tmp_path: Path) -> None:
    written = re.search(r"<<'END'\n(.*?)^END$", step("3. Configure"), re.MULTILINE | re.DOTALL)
    assert written
    certificates, file = tmp_path / "certificates", tmp_path / "stationkey.toml"
    certificates.mkdir()
    replaced = {
        CERTIFICATES: str(certificates),
        CONFIGURATION: str(file),
        "mqtt://127.0.0.1:1883": mosquitto.url,
        "tpm2:device:/dev/tpmrm0": swtpm.uri,
        "mosquitto_pub ": f"mosquitto_pub -p {mosquitto.port} ",
    }

    def here(text: str) -> str:
        for shown, used in replaced.items():
            text = text.replace(shown, used)
        return text

    file.write_text(here(written[1]))
    environment = {
        **os.environ,
        "PATH": f"{Path(STATIONKEY[0]).parent}:{os.environ['PATH']}",
        "STATIONKEY_STATE_DIR": str(tmp_path / "state"),
        "STATIONKEY_CONFIG": str(file),
    }

    def shell(script: str) -> str:
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", here(script)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=BOUND,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    with Station(tmp_path, "--config", str(file)) as station:
        shell(step("4. Request a CSR"))
        shell(step("5. Sign and install the certificate"))
        station.wait_for("key active")
        checks = step("6. Check").splitlines(keepends=True)
        assert "active" in shell(checks[0])
        reported = json.loads(shell(f"{checks[1].strip()} --json"))
        found = {finding["id"]: finding["level"] for finding in reported["findings"]}
        assert (found["tpm.reachable"], found["broker.login"]) == ("ok", "ok")
        again = json.loads(shell("".join(checks[2:])))
        assert again["data"]["status"] == "accepted"
