"""PEM [RFC 7468]: labelled base64."""

from __future__ import annotations

import base64
import textwrap


def to_pem(label: str, der: bytes) -> bytes:
    """Encode `der` under a label such as ``PUBLIC KEY``, in lines of 64 characters."""
    lines = textwrap.wrap(base64.b64encode(der).decode("ascii"), 64)
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode("ascii")


def blocks(content: bytes, label: str) -> list[bytes]:
    """Return each block of this label with its begin and end lines; other text may be in between [RFC 7468 2]."""
    begin, end = f"-----BEGIN {label}-----".encode("ascii"), f"-----END {label}-----".encode("ascii")
    found, at = [], 0
    while (opened := content.find(begin, at)) >= 0 and (closed := content.find(end, opened)) >= 0:
        at = closed + len(end)
        found.append(content[opened:at])
    return found


def from_pem(block: bytes) -> bytes:
    """Decode one block of `blocks`.

    Raises:
        ValueError: the body is not base64.
    """
    inside = block.split(b"-----", 2)[2].rsplit(b"-----", 2)[0]
    return base64.b64decode(b"".join(inside.split()), validate=True)
