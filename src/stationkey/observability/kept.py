"""Texts that are made on request and cached for a moment, so that many requests cost little."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

FRESH: Final = 1.0
"""Seconds for which a text is cached."""


class Kept:
    """A text that is at most `FRESH` seconds old.

    Args:
        make: makes it; never called concurrently.
    """

    def __init__(self, make: Callable[[], Awaitable[bytes]]) -> None:
        self._make = make
        self._one_at_a_time = asyncio.Lock()
        self._made_at = -FRESH
        self._text = b""

    async def text(self) -> bytes:
        """Return the text, made now if the last one is too old."""
        async with self._one_at_a_time:
            if time.monotonic() - self._made_at >= FRESH:
                self._text = await self._make()
                self._made_at = time.monotonic()
        return self._text
