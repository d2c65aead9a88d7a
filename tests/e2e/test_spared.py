"""What the daemon loads of OpenSSL: nothing, where it speaks no TLS."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from outside import Station
from peers import Mosquitto

import stationkey
from secured import Authority, SecuredMosquitto

TOLD = """
import atexit, sys
atexit.register(lambda: print("loaded", *sorted({"ssl", "_ssl", "_hashlib"} & sys.modules.keys()), file=sys.stderr))
from stationkey.__main__ import run
run()
"""
"""``stationkey``, with a last word on what it has loaded."""
SOFTWARE = ("--keystore", "software:", "--allow-software-keys")


def loaded(tmp_path: Path, *options: str) -> list[str]:
    """What a daemon that was connected has loaded."""
    station = Station(tmp_path / "station", *SOFTWARE, *options)
    station.run_by(sys.executable, "-c", TOLD)
    with station:
        assert station.stop() == 0
        [line] = [line for line in station.lines if line.startswith("loaded")]
        return line.split()[1:]


def test_without_tls_a_station_loads_no_openssl(tmp_path: Path, mosquitto: Mosquitto) -> None:
    assert loaded(tmp_path, "--broker", mosquitto.url) == []


def test_with_tls_it_loads_what_that_needs(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    config = tmp_path / "stationkey.toml"
    config.write_text(f'[mqtt]\nca_file = "{authority.file}"\n')
    with SecuredMosquitto(tmp_path / "broker", authority.broker()) as broker:
        assert "ssl" in loaded(tmp_path, "--broker", broker.tls_url, "--config", str(config))


@pytest.mark.parametrize("before", ["asyncio", "hashlib", "ssl"])
def test_what_is_imported_already_stays_as_it_is(before: str) -> None:
    """A program that has its own use of OpenSSL loses none of it."""
    program = (
        f"import {before}\nfrom stationkey.system.spared import spare\nspare()\n"
        "import asyncio.base_events, hashlib, ssl\n"
        "print(asyncio.base_events.ssl is ssl, hasattr(hashlib, 'scrypt'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_nothing_here_uses_what_hashlib_has_from_openssl_alone() -> None:
    sources = "\n".join(path.read_text() for path in Path(stationkey.__file__).parent.rglob("*.py"))
    used = set(re.findall(r"\bhashlib\.(\w+)", sources)) | set(re.findall(r"from hashlib import (\w+)", sources))
    program = (
        "from stationkey.system.spared import spare\nspare()\n"
        f"import hashlib\nprint([name for name in {sorted(used)!r} if not hasattr(hashlib, name)])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "sha256" in used
    assert (done.stdout, done.stderr) == ("[]\n", "")
