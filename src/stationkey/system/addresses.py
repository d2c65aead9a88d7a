"""Which hosts are this machine."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine by an address or a name that no other can have.

    The name is ``localhost`` alone, in either case [RFC 6761 6.3]; another name may resolve to this machine today and
    to another one tomorrow. An address is one of 127.0.0.0/8, ::1, or the former written as IPv6 [RFC 4291 2.5.5.2].

    Args:
        host: an address without brackets or port, or a name.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
