"""Keys made ahead, so that a request does not wait for the TPM to make one.

A chip takes tens of seconds for an RSA key. With a key made ahead, a request needs only a signature.

A key made ahead is in the ledger, wrapped as every other, in pre-activation and with no owner, until a request takes it
or it expires. This module only remembers which keys are ready. A key gets its owner in the transaction that records the
answer, and only if it had none: so no crash gives a key to two requests.

Making a key blocks the TPM. So one is made at a time, only after the TPM was idle for a while, and only if no request
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
from functools import partial
from typing import Final

from msgspec import Struct

from stationkey.config.settings import PoolTerms
from stationkey.contract.profiles import Algorithm, KeyType, RsaModulus
from stationkey.errors import KeyStoreError, LedgerError, Scope, StationKeyError
from stationkey.keystore import KeyRef, KeyStore, check_key
from stationkey.keystore.stores import Store
from stationkey.keystore.worker import Task, Turn, on_keystore
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.worker import LedgerThread
from stationkey.system.backoff import Backoff

log = logging.getLogger(__name__)

MAKING_DEADLINE: Final = 300.0
"""Seconds allowed for an RSA key made ahead: a slow chip may take minutes. A hung TPM is noticed only then."""
LOOK_DEADLINE: Final = 30.0
"""Seconds allowed for the key store to report its key types, or to load a key."""
MARGIN: Final = 10 * 60 * 1000
"""Milliseconds before its end when a key is no longer given to a request, because it must outlast the request. Less, if
keys last for less than twice that."""
LOOK: Final = 60.0
"""Seconds between two checks for keys that are too old."""
RETRY_FIRST: Final = 1.0
RETRY_LAST: Final = 300.0
"""Seconds between retries while the key store or the disk fails; doubled each time."""


class _OtherKind(KeyStoreError):
    """The key store made another key type than announced: it is another TPM, and must be asked again."""

    scope = Scope.KEY


class Ahead(Struct, frozen=True):
    """A key made ahead.

    Attributes:
        key: the key.
        due: when it expires, in milliseconds of running time.
    """

    key: KeyRef
    due: int


class KeyPool:
    """The keys made ahead that one ledger has of one key store, for requests to it.

    Args:
        store: the key store.
        ledger: the ledger's.
        running: the running time now, in milliseconds.
        terms: number, idle time and age.
        patience: deadline of a request for an EC key, in seconds; a warning is logged if a key takes longer to make.
        clock: Unix time in seconds.

    Attributes:
        seconds_to_make: how long the last key of each type took: the longest time that a request waits for one.
    """

    def __init__(
        self,
        store: Store,
        ledger: LedgerThread,
        *,
        running: Callable[[], int],
        terms: PoolTerms,
        patience: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._thread = store.thread
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
        """Take a ready key for `algorithm` out of the pool; None if there is none."""
        kind = self._kinds.get(algorithm)
        if kind is None:
            return None
        self._drop_old(kind)
        self._changed.set()
        return self._ready[kind].popleft() if self._ready[kind] else None

    def add(self, ahead: Ahead) -> None:
        """Make a key ready, new or returned unused. The key that expires first is taken first."""
        insort(self._ready[ahead.key.key_type], ahead, key=_due)

    async def take_back(self, ahead: Ahead, error: Exception) -> bool:
        """Return or discard a key made ahead whose request failed.

        Args:
            ahead: the key.
            error: why.

        Returns:
            Whether another key may work.

        Raises:
            LedgerError: a useless key is still on record.
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
        """Destroy a key that the key store cannot use, because the TPM was replaced or cleared.

        Raises:
            LedgerError: it is still on record.
        """
        log.warning("destroying a key made ahead: %s", error, extra={"key_id": ahead.key.key_id})
        try:
            await self._ledger(
                lambda ledger: ledger.transitions.apply(
                    ahead.key.key_id, KeyEvent.EXPIRED, reason=error.message, now=int(self._clock() * 1000)
                )
            )
        except StationKeyError as failure:
            if failure.scope is not Scope.KEY:  # else an operator has ended it already
                raise

    def ready(self) -> dict[KeyType, int]:
        """Number of ready keys of each type."""
        return {kind: len(ready) for kind, ready in self._ready.items()}

    def wanted(self) -> dict[KeyType, int]:
        """Configured number of keys of each type."""
        return {kind: self._size(kind) for kind in self._ready}

    # Making them.

    async def run(self) -> None:
        """Keep the pool full until cancelled. An absent TPM or a full disk is logged and retried."""
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
                log.warning("making keys ahead paused: %s", error, extra={"reason": error.reason, **self._store.about})
                begun = begun and not isinstance(error, _OtherKind)
                await asyncio.sleep(backoff.next())
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._changed.wait()

    async def _begin(self) -> None:
        """Ask the key store for its key types, and load the keys made ahead in earlier runs."""

        def look(store: KeyStore) -> dict[Algorithm, KeyType | None]:
            return {algorithm: store.supports(algorithm).key_type for algorithm in self._store.algorithms}

        kinds = await on_keystore(self._thread, look, timeout=LOOK_DEADLINE, task=Task.LOOK)
        wanted = {algorithm: kind for algorithm, kind in kinds.items() if kind is not None and self._size(kind)}
        made = await self._ledger(lambda ledger: ledger.keys.seconds_to_make(self._store.uri.scheme.name))
        self.seconds_to_make = {kind: made[str(kind)] for kind in wanted.values() if str(kind) in made}
        ready: dict[KeyType, deque[Ahead]] = {kind: deque() for kind in wanted.values()}
        # In turn with requests: there are few such keys, each takes milliseconds, and a station may never be idle.
        for key, due in await self._ledger(lambda ledger: ledger.keys.made_ahead()):
            if key.key_type in ready and self._store.uri.holds(key) and await self._usable(Ahead(key, due)):
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
                self._thread,
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
        """Make keys, one at a time, until there are enough of each type."""
        made = 0
        while True:
            self._changed.clear()
            for kind in self._ready:
                self._drop_old(kind)
            missing = [kind for kind, ready in self._ready.items() if len(ready) < self._size(kind)]
            if not missing:
                if made:
                    log.info(
                        "pool full", extra={**{str(k): ready for k, ready in self.ready().items()}, **self._store.about}
                    )
                return
            left = self._terms.idle - self._thread.idle
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
        """Make a key if the key store was idle for `idle` seconds; return False if not."""
        algorithm = next(algorithm for algorithm, its_kind in self._kinds.items() if its_kind == kind)

        def make(store: KeyStore) -> tuple[KeyRef, float] | None:
            if self._thread.idle < idle:
                return None
            begun = time.monotonic()
            return store.generate(algorithm), time.monotonic() - begun

        deadline = MAKING_DEADLINE if isinstance(kind, RsaModulus) else self._patience
        made = await on_keystore(self._thread, make, timeout=deadline, turn=Turn.SPARE, task=Task.MAKE_AHEAD)
        if made is None:
            return False
        key, seconds = made
        if key.key_type != kind:
            raise _OtherKind(f"expected a {kind} key, got {key.key_type}", reason="key_type_wrong")
        due = self._running() + self._terms.age
        await self._ledger(
            lambda ledger: ledger.transitions.make_ahead(key, now=int(self._clock() * 1000), due=due, seconds=seconds)
        )
        self.add(Ahead(key, due))
        self.seconds_to_make[kind] = seconds
        log.debug("key made ahead", extra={"key_id": key.key_id, "key_type": str(kind)})
        return True

    def _tell(self, kind: KeyType) -> None:
        """Log how many keys of a type are ready, and how long one takes."""
        seconds = self.seconds_to_make.get(kind)
        log.info(
            "keys are made ahead",
            extra={
                "key_type": str(kind),
                "ready": len(self._ready[kind]),
                "wanted": self._size(kind),
                "seconds_to_make_one": "not known yet" if seconds is None else f"{seconds:.3g}",
                **self._store.about,
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
        """Drop the keys that expire soon; `Expiry` ends them."""
        ready, end = self._ready[kind], self._running() + self._margin
        while ready and ready[0].due <= end:
            ready.popleft()


def _due(ahead: Ahead) -> int:
    return ahead.due
