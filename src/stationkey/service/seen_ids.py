"""Which ids may have been answered: a filter that recognises a new id without asking the ledger.

Nearly every request has a new id, and a query of the ledger takes longer than everything else before the key. This is a
Bloom filter: never wrong about an id that was added, and rarely about another (one in 40,000 with 10,000 ids, one in 60
with 100,000). If it says "perhaps", the ledger is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_BITS: Final = 20
_MASK: Final = (1 << _BITS) - 1


class SeenIds:
    """A set of case-insensitive ids, each of a station, in 128 KiB, whatever their number."""

    def __init__(self) -> None:
        self._table = bytearray(1 << (_BITS - 3))

    def add(self, request_id: str, station: str = "") -> None:
        """Add an id, permanently."""
        for place in _places(station, request_id):
            self._table[place >> 3] |= 1 << (place & 7)

    def update(self, ids: Iterable[tuple[str, str]]) -> None:
        """Add several ids, each after its station."""
        for station, request_id in ids:
            self.add(request_id, station)

    def may_have(self, request_id: str, station: str = "") -> bool:
        """Return whether an id may have been added; False is certain."""
        return all(self._table[place >> 3] >> (place & 7) & 1 for place in _places(station, request_id))


def _places(station: str, request_id: str) -> tuple[int, int, int]:
    # Python's hash of a text has another key in each process, so an attacker cannot cause collisions. An id has 36
    # characters, so it begins at the same place from the end.
    value = hash(station + request_id.lower())
    return value & _MASK, value >> _BITS & _MASK, value >> 2 * _BITS & _MASK
