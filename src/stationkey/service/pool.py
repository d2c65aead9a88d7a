"""Keys made ahead, so that a request need not wait for the TPM to make one.

A chip searches tens of seconds for the primes of an RSA key. Of a key made ahead, a request needs only a signature.

A key made ahead is in the ledger, wrapped as every other, in pre-activation and with no owner, until a request takes it
or its time is over. What is kept here besides is which of them are ready. A key gets its owner in the transaction that
records the answer, and only if it had none: so none is handed out twice, whatever dies at whatever moment.

Making a key blocks the TPM. So one is made at a time, only after the TPM was idle for a while, and only if nobody
waits; a request that comes meanwhile waits for that one key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from stationkey.config.settings import PoolTerms
from stationkey.contract.profiles import Algorithm, KeyType, RsaModulus
from stationkey.errors import KeyStoreError, LedgerError, Scope, StationKeyError
from stationkey.keystore import KeyRef, KeyStore, check_key
from stationkey.keystore.worker import KeyStoreThread, Task, Turn, on_keystore
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.worker import LedgerThread
from stationkey.system.backoff import Backoff

log = logging.getLogger(__name__)

MAKING_DEADLINE: Final = 300.0
"""Seconds for an RSA key that nobody waits for: a slow chip with bad luck takes minutes. A TPM that hangs meanwhile is
noticed only then."""
LOOK_DEADLINE: Final = 30.0
"""Seconds for the key store to say what it can make, or to load a key."""
MARGIN: Final = 10 * 60 * 1000
"""Milliseconds before its end that a key is not handed out any more: it must outlast the request. Less, where keys last
for less than twice that."""
LOOK: Final = 60.0
"""Seconds between two looks at which keys are too old."""
RETRY_FIRST: Final = 1.0
RETRY_LAST: Final = 300.0
"""Seconds between tries while the key store or the disk is in trouble; doubled in between."""


class _OtherKind(KeyStoreError):
    """The key store made a key of another kind than it said: it is another TPM, to be asked anew what it can make."""

    scope = Scope.KEY


@dataclass(frozen=True, slots=True)
class Ahead:
    """A key made ahead.

    Attributes:
        key: the key.
        due: when its time is over, in milliseconds of running time.
    """

    key: KeyRef
    due: int


class KeyPool:
    """The keys made ahead that one ledger has, for requests to one key store.

    Args:
        keystore: the key store's thread.
        ledger: the ledger's.
        running: the running time now, in milliseconds.
        terms: how many, how idle, how old.
        patience: seconds that a request for an EC key may take; where a key takes longer to make, that is warned of.
        clock: Unix time in seconds.

    Attributes:
        seconds_to_make: for each kind, how long the last one took: so long a request waits at the most while one is
            made ahead.
    """

    def __init__(
        self,
        keystore: KeyStoreThread,
        ledger: LedgerThread,
        *,
        running: Callable[[], int],
        terms: PoolTerms,
        patience: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keystore = keystore
        self._ledger = ledger
        self._running = running
        self._terms = terms
        self._margin = min(MARGIN, terms.age // 2)
        self._patience = patience
        self._clock = clock
        self._kinds: dict[Algorithm, KeyType] = {}
        self._ready: dict[KeyType, deque[Ahead]] = {}
        self._changed = asyncio.Event()
        self.seconds_to_make: dict[KeyType, float] = {}

    def take(self, algorithm: Algorithm) -> Ahead | None:
        """A key for `algorithm`, which nobody else gets; None where none is ready."""
        kind = self._kinds.get(algorithm)
        if kind is None:
            return None
        self._drop_old(kind)
        self._changed.set()
        return self._ready[kind].popleft() if self._ready[kind] else None

    def add(self, ahead: Ahead) -> None:
        """Make a key ready: one just made, or one taken and not used. The one whose time is over first goes first."""
        insort(self._ready[ahead.key.key_type], ahead, key=_due)

    async def take_back(self, ahead: Ahead, error: Exception) -> bool:
        """Deal with a key made ahead that a request took and could not be answered with.

        Args:
            ahead: the key.
            error: why.

        Returns:
            Whether another key may do.

        Raises:
            LedgerError: a key that is of no use is still on record.
        """
        if not isinstance(error, StationKeyError):  # a fault of ours: another request must not come upon the same key
            await self.discard(ahead, StationKeyError("a fault of ours", reason="internal_error"))
        elif isinstance(error, LedgerError) and error.scope is Scope.KEY:  # an operator destroyed it
            return True
        elif error.scope is Scope.KEY:
            await self.discard(ahead, error)
            return True
        elif error.reason != "signature_invalid":  # then it was destroyed with its answer
            self.add(ahead)
        return False

    async def discard(self, ahead: Ahead, error: StationKeyError) -> None:
        """Destroy a key that the key store cannot use: of a TPM that was replaced or cleared.

        Raises:
            LedgerError: it is still on record.
        """
        log.warning("a key made ahead is destroyed: %s", error, extra={"key_id": ahead.key.key_id})
        try:
            await self._ledger(
                lambda ledger: ledger.transitions.apply(
                    ahead.key.key_id, KeyEvent.EXPIRED, reason=error.message, now=int(self._clock() * 1000)
                )
            )
        except StationKeyError as failure:
            if failure.scope is not Scope.KEY:  # else somebody has ended it already
                raise

    def ready(self) -> dict[KeyType, int]:
        """How many keys of each kind are ready."""
        return {kind: len(ready) for kind, ready in self._ready.items()}

    def wanted(self) -> dict[KeyType, int]:
        """How many keys of each kind there should be."""
        return {kind: self._size(kind) for kind in self._ready}

    # Making them.

    async def run(self) -> None:
        """Keep the pool full until cancelled. A TPM that is away or a full disk is logged, and tried again."""
        if not (self._terms.ec or self._terms.rsa):
            return
        begun, backoff = False, Backoff(RETRY_FIRST, RETRY_LAST)
        while True:
            try:
                if not begun:
                    await self._begin()
                    begun = True
                await self._fill()
                backoff.reset()
            except StationKeyError as error:
                log.warning("making keys ahead paused: %s", error, extra={"reason": error.reason})
                begun = begun and not isinstance(error, _OtherKind)
                await asyncio.sleep(backoff.next())
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._changed.wait()

    async def _begin(self) -> None:
        """Ask what the key store can make, and take up what earlier runs have made."""

        def look(store: KeyStore) -> dict[Algorithm, KeyType | None]:
            return {algorithm: store.supports(algorithm).key_type for algorithm in Algorithm}

        kinds = await on_keystore(self._keystore, look, timeout=LOOK_DEADLINE, task=Task.LOOK)
        wanted = {algorithm: kind for algorithm, kind in kinds.items() if kind is not None and self._size(kind)}
        made = await self._ledger(lambda ledger: ledger.keys.seconds_to_make())
        self.seconds_to_make = {kind: made[str(kind)] for kind in wanted.values() if str(kind) in made}
        ready: dict[KeyType, deque[Ahead]] = {kind: deque() for kind in wanted.values()}
        # Asked in turn with requests: there are few, each takes milliseconds, and a station may never be without load.
        for key, due in await self._ledger(lambda ledger: ledger.keys.made_ahead()):
            if key.key_type in ready and await self._usable(Ahead(key, due)):
                insort(ready[key.key_type], Ahead(key, due), key=_due)
        self._ready, self._kinds = ready, wanted
        for kind in ready:
            if kind not in self.seconds_to_make and not isinstance(kind, RsaModulus):
                await self._make(kind, idle=0.0)  # to know how long it takes; an RSA key would take too long for that
        for kind in ready:
            self._tell(kind)

    async def _usable(self, ahead: Ahead) -> bool:
        try:
            await on_keystore(
                self._keystore,
                partial(check_key, key=ahead.key, as_new=True),
                timeout=LOOK_DEADLINE,
                task=Task.LOAD,
            )
        except KeyStoreError as error:
            if error.scope is not Scope.KEY:
                raise
            await self.discard(ahead, error)
            return False
        return True

    async def _fill(self) -> None:
        """Make keys, one at a time, until there are enough of each kind."""
        made = 0
        while True:
            self._changed.clear()
            for kind in self._ready:
                self._drop_old(kind)
            missing = [kind for kind, ready in self._ready.items() if len(ready) < self._size(kind)]
            if not missing:
                if made:
                    log.info("pool full", extra={str(kind): ready for kind, ready in self.ready().items()})
                return
            left = self._terms.idle - self._keystore.idle
            if left > 0:
                await asyncio.sleep(left)
            else:
                fewest = min(missing, key=lambda kind: len(self._ready[kind]))
                first = fewest not in self.seconds_to_make
                if await self._make(fewest, idle=self._terms.idle):
                    made += 1
                    if first:
                        self._tell(fewest)

    async def _make(self, kind: KeyType, *, idle: float) -> bool:
        """Make a key, if the key store has been idle for so many seconds; False, and nothing made, where it was not."""
        algorithm = next(algorithm for algorithm, its_kind in self._kinds.items() if its_kind == kind)

        def make(store: KeyStore) -> tuple[KeyRef, float] | None:
            if self._keystore.idle < idle:
                return None
            begun = time.monotonic()
            return store.generate(algorithm), time.monotonic() - begun

        deadline = MAKING_DEADLINE if isinstance(kind, RsaModulus) else self._patience
        made = await on_keystore(self._keystore, make, timeout=deadline, turn=Turn.SPARE, task=Task.MAKE_AHEAD)
        if made is None:
            return False
        key, seconds = made
        if key.key_type != kind:
            raise _OtherKind(f"a {kind} key was to be made, and it is {key.key_type}", reason="key_type_wrong")
        due = self._running() + self._terms.age
        await self._ledger(
            lambda ledger: ledger.transitions.make_ahead(key, now=int(self._clock() * 1000), due=due, seconds=seconds)
        )
        self.add(Ahead(key, due))
        self.seconds_to_make[kind] = seconds
        log.debug("a key was made ahead", extra={"key_id": key.key_id, "key_type": str(kind)})
        return True

    def _tell(self, kind: KeyType) -> None:
        """Log how many keys of a kind there are, and how long one takes."""
        seconds = self.seconds_to_make.get(kind)
        log.info(
            "keys are made ahead",
            extra={
                "key_type": str(kind),
                "ready": len(self._ready[kind]),
                "wanted": self._size(kind),
                "seconds_to_make_one": "not known yet" if seconds is None else f"{seconds:.3g}",
            },
        )
        if seconds is not None and seconds > self._patience:
            log.warning(
                "making a %s key takes %.0f s; a request meanwhile is rejected after %.0f s",
                *(kind, seconds, self._patience),
            )

    def _size(self, kind: KeyType) -> int:
        return self._terms.rsa if isinstance(kind, RsaModulus) else self._terms.ec

    def _drop_old(self, kind: KeyType) -> None:
        """Do without those whose time is nearly over; the sweep ends them."""
        ready, end = self._ready[kind], self._running() + self._margin
        while ready and ready[0].due <= end:
            ready.popleft()


def _due(ahead: Ahead) -> int:
    return ahead.due
