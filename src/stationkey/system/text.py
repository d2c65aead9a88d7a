"""Make untrusted text safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` on one line, with control, invisible and bidirectional characters escaped."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else f"\\u{ord(character):04x}" for character in text)
