"""The TCP sockets of this machine, as the kernel lists them."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ESTABLISHED: Final = "01"
_LISTENING: Final = "0A"


def _rows() -> Iterator[list[str]]:
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        yield from (line.split() for line in lines)


def connections_to(port: int) -> list[int]:
    """Return the inodes of this machine's sockets that are connected to `port` [proc(5), /proc/net/tcp]."""
    ends = f":{port:04X}"
    return [int(row[9]) for row in _rows() if row[2].endswith(ends) and row[3] == _ESTABLISHED and row[9] != "0"]


def listeners_on(port: int) -> list[str]:
    """Return the addresses that something on this machine listens on."""
    ends = f":{port:04X}"
    return [_address(row[1].partition(":")[0]) for row in _rows() if row[1].endswith(ends) and row[3] == _LISTENING]


def _address(digits: str) -> str:
    """Read an address as ``/proc/net/tcp`` has it: hexadecimal, each four octets in the order of the machine."""
    octets = b"".join(int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8))
    address = ipaddress.ip_address(octets)
    return str(getattr(address, "ipv4_mapped", None) or address)
