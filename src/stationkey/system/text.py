"""Text of others, made fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` on one line: what would move a cursor, turn the writing round or hide itself becomes its number."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else f"\\u{ord(character):04x}" for character in text)
