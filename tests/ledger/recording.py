"""Keys and answers for the tests of the ledger, without the time that a key store takes."""

from __future__ import annotations

import random
from pathlib import Path

from parts import request
from stationkey.config.settings import Bounds
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.contract.profiles import SECP256R1
from stationkey.keystore import KeyRef
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyEvent, KeyState

CSR = "-----BEGIN CERTIFICATE REQUEST-----\n" + "x" * 600


REQUEST_ID = "123E4567-e89b-12d3-a456-426614174000"


RANDOM = random.Random(1)


INTO: dict[KeyState, tuple[KeyEvent, ...]] = {
    KeyState.PRE_ACTIVATION: (),
    KeyState.ACTIVE: (KeyEvent.INSTALLED,),
    KeyState.DEACTIVATED: (KeyEvent.INSTALLED, KeyEvent.RETIRED),
    KeyState.COMPROMISED: (KeyEvent.COMPROMISE_REPORTED,),
    KeyState.DESTROYED: (KeyEvent.EXPIRED,),
}
"""What brings a new key into each state."""


def a_key() -> KeyRef:
    """What a key store might give, without the time that it would take. As long as a TPM's."""
    return KeyRef(scheme="software", key_type=SECP256R1, public=RANDOM.randbytes(91), private=RANDOM.randbytes(230))


def answer(
    ledger: Ledger,
    asked: GenerateCsrRequest | None = None,
    *,
    key: KeyRef | None = None,
    running: int = 0,
    bounds: Bounds | None = None,
    taken: bool = False,
    station: str = "",
) -> str:
    """Record an answer, with a key made for it or with one `taken` from those made ahead; the name of its key."""
    key = key or a_key()
    ledger.answers.record(
        asked or request(),
        key,
        CSR,
        now=0,
        running=running,
        due=running + 1000,
        bounds=bounds or Bounds(),
        ahead=taken,
        station=station,
    )
    return key.key_id


def bring(ledger: Ledger, key_id: str, *events: KeyEvent) -> None:
    for event in events:
        ledger.transitions.apply(key_id, event, reason="", now=0)


def stock_of(ledger: Ledger) -> list[KeyRef]:
    """The keys made ahead."""
    return [key for key, _ in ledger.keys.made_ahead()]


def ahead(ledger: Ledger, key: KeyRef | None = None, *, due: int = 1000) -> KeyRef:
    """Put a key on record that has no owner yet."""
    key = key or a_key()
    ledger.transitions.make_ahead(key, now=5, due=due, seconds=0.5)
    return key


def on_record(ledger: Ledger) -> list[KeyRecord]:
    return ledger.keys.all()


def states(ledger: Ledger) -> list[KeyState]:
    return [key.state for key in on_record(ledger)]


def on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def a_marked_key(chance: random.Random) -> KeyRef:
    """One whose private part is 8 bytes over and over, so that no piece of it is overlooked. As long as a TPM's."""
    mark = chance.randbytes(8)
    return KeyRef(
        scheme="software",
        key_type=SECP256R1,
        public=chance.randbytes(91),
        private=mark * chance.choice([17, 29, 43, 150]),
    )


def traces(path: Path, keys: list[KeyRef]) -> int:
    """Of how many keys a piece is on the disk; one of 23 bytes is certain to be seen."""
    raw = on_disk(path)
    return sum(key.private[:16] in raw for key in keys)
