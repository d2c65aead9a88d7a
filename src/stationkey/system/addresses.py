"""Recognise the hosts that are this machine."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Return whether a host is always this machine.

    The only such name is ``localhost``, in either case [RFC 6761 6.3]; another name may resolve to another machine
    tomorrow. Addresses are 127.0.0.0/8, ::1, and the former as IPv6 [RFC 4291 2.5.5.2].

    Args:
        host: an address without brackets or port, or a name.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
