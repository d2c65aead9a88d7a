"""Describe the machine by its properties: nothing that names it, its user or a path on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

_PACKAGES: Final = {
    "swtpm": "swtpm",
    "libtpms": "libtpms0",
    "tpm2-tss": "libtss2-esys-3.0.2-0*",
    "tpm2-openssl": "tpm2-openssl",
    "tpm2-tools": "tpm2-tools",
    "OpenSSL": "openssl",
    "Mosquitto": "mosquitto",
    "PostgreSQL": "postgresql-1[0-9]",
    "SoftHSM": "libsofthsm2",
}
"""Debian packages by the name in the table."""
_LIBRARIES: Final = ("stationkey", "tpm2-pytss", "cryptography", "paho-mqtt")


def describe(state: Path) -> dict[str, str]:
    """Return what a reader needs to compare numbers with those of another machine.

    Args:
        state: where the state directories are, for the file system's type.
    """
    processors = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    versions = {name: _debian(package) for name, package in _PACKAGES.items()}
    return {
        "processor": processors[0] if processors else platform.machine(),
        "cores": str(len(processors) or "unknown"),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "file system of the state directory": file_system(state),
        "load average before the run": f"{os.getloadavg()[0]:.2f}",
        "Python": platform.python_version(),
        **versions,
        **{library: metadata.version(library) for library in _LIBRARIES},
    }


def file_system(path: Path) -> str:
    """Return the type of the file system that `path` is on."""
    return _said("findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(path)) or "unknown"


def _debian(package: str) -> str:
    return _said("dpkg-query", "--show", "--showformat=${Version}", package) or "unknown"


def _said(*words: str) -> str:
    """Return what a program prints; an empty text if it is missing or fails."""
    if shutil.which(words[0]) is None:
        return ""
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
