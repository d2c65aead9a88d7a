"""What happens to a station, and all that the ledger tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recording import answer, bring

from parts import E1, V2G, request
from stationkey.ledger import Ledger
from stationkey.ledger.hints import Hint
from stationkey.ledger.lifecycle import KeyEvent

OWNER = (V2G, E1)
IDS = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(6)]
MESSAGE = "10000000-0000-4000-8000-000000000000"
HINT = Hint(not_after=1, expired=False, count=1, running=1)


@dataclass
class Scene:
    """A ledger in which two stations have had the same happen to them, with the same ids; the keys of one."""

    ledger: Ledger
    gone: str
    before: str
    active: str
    pending: str


def happen(ledger: Ledger, station: str) -> Scene:
    """Let a station's keys get into each state."""
    gone, before, active, pending = (
        answer(ledger, request(*OWNER, request_id=request_id), station=station, running=number)
        for number, request_id in enumerate(IDS[:4])
    )
    for key_id in (before, active):
        ledger.transitions.activate(
            key_id,
            chain=f"chain of {station}",
            not_after=100,
            reason="",
            now=0,
            grace_due=5000,
            useful_until=9000,
            message_id=MESSAGE,
        )
    bring(ledger, gone, KeyEvent.DESTRUCTION_ORDERED)
    ledger.rejections.note(IDS[5], reason="r", message=f"of {station}", now=0, station=station)
    ledger.rejections.write()
    ledger.hints.write(active, HINT)
    return Scene(ledger, gone, before, active, pending)


def told(ledger: Ledger, station: str) -> list[Any]:
    """All that the ledger tells of a station."""
    keys = list(ledger.keys.stream(station=station))
    return [
        keys,
        [ledger.keys.history(key.key_id) for key in keys],
        [ledger.keys.ref(key.key_id) for key in keys],
        [ledger.answers.find(request_id, station=station) for request_id in IDS],
        [one for one in ledger.answers.ids() if one[0] == station],
        [one for one in ledger.answers.undelivered() if one.station == station],
        {key_id: hint for key_id, hint in ledger.hints.all().items() if key_id in {key.key_id for key in keys}},
        ledger.keys.active_files(station),
    ]
