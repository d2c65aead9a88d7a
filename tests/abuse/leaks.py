"""Looks for secrets, in every form that a program may show them in."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

PIECE = 24
"""Bytes of a secret that are looked for: a part of one that is shown is a leak, too."""


def pieces(secret: bytes) -> Iterator[bytes]:
    """The secret itself where it is short; else its last pieces, which in a wrapped key are its private part."""
    if len(secret) <= 2 * PIECE:
        yield secret
    else:
        for end in (0, PIECE, 2 * PIECE):
            yield secret[len(secret) - PIECE - end : len(secret) - end]


def forms(piece: bytes) -> Iterator[bytes]:
    """Raw, hexadecimal, base64 wherever in a longer text it stands, URL-encoded, and as Python and JSON show it."""
    yield piece
    for hexadecimal in (piece.hex(), piece.hex(" "), piece.hex(":"), ", ".join(map(str, piece))):
        yield hexadecimal.encode()
        yield hexadecimal.upper().encode()
    for before in range(3):
        text = base64.b64encode(b"\0" * before + piece)[(0, 2, 3)[before] :].rstrip(b"=")
        whole = text[: len(text) - (before + len(piece)) % 3]  # without the character that the next byte has a part of
        yield whole
        yield whole.translate(bytes.maketrans(b"+/", b"-_"))
    yield quote(piece, safe="").encode()
    yield repr(piece)[2:-1].encode()
    yield json.dumps(piece.decode("latin-1"))[1:-1].encode()


def found(secrets: dict[str, bytes], output: bytes) -> list[str]:
    """Which of the secrets are in `output`, whole or in part. Line ends and white space may stand in between."""
    dense = b"".join(output.split())
    return [
        name
        for name, secret in secrets.items()
        if any(form in output or b"".join(form.split()) in dense for piece in pieces(secret) for form in forms(piece))
    ]


def files_of(folder: Path, *, but: tuple[Path, ...]) -> Iterator[Path]:
    """Every file in a folder and below, but for those in `but` and below."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(path.is_relative_to(other) for other in but):
            yield path
