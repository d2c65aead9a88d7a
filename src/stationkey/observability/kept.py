"""What is made when it is asked for, and kept for a moment: no flood of questions makes more work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

FRESH: Final = 1.0
"""Seconds for which a text is kept."""


class Kept:
    """A text, as it was `FRESH` seconds ago at the most.

    Args:
        make: makes it; called by one asker at a time.
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
