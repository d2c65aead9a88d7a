"""The renewal watch: which certificates are due, and repeated hints until they are renewed [A03.FR.02].

A hint is a log line, a count, and a run of the operator's command, if any. Health, metrics and the retained topic show
`RenewalWatch.due`, the certificates that are due now.

The clock may be wrong, and the station may have been off for a month. So the time between two hints is running time,
each hint is recorded in the ledger before it is given, and a clock before the start of the newest certificate is taken
as not set.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

from msgspec import Struct

from stationkey.config.settings import RenewalTerms
from stationkey.contract.profiles import CertificateType
from stationkey.contract.renewal import DueState
from stationkey.errors import StationKeyError
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.hints import Hint
from stationkey.service.custody import Custody
from stationkey.system.bounded_command import BoundedCommand
from stationkey.x509.renewal import Due, RenewalRule

log = logging.getLogger(__name__)

LOOK: Final = 60.0
"""Seconds between two looks."""
HINTS_AT_ONCE: Final = 8
"""Most hints in one look; the others are given in the next looks, the first to expire first."""
LONGEST: Final = 8
"""Longest time between two hints of a key, in multiples of the shortest; doubled each time."""
WATCHED: Final = 256
"""Certificates that are watched, the first to expire first: the default limit of active keys."""
WATCHED_OF_STATION: Final = 32
WATCHED_IN_SITE: Final = 4 * WATCHED
"""In a site, how many of them may be of one station, out of how many: one station whose certificates have all expired
must not hide others."""
_TOLD: Final = {
    Due.DUE: ("certificate_due", "certificate due for renewal"),
    Due.EXPIRED: ("certificate_expired", "certificate expired"),
}
_CLOCK_BEHIND: Final = ("clock_behind", "certificates not watched: the clock is before the newest certificate's start")
"""Reason and words of each log line."""


class DueCertificate(Struct, frozen=True):
    """The certificate of an active key that should be renewed.

    Attributes:
        key_id: of the key.
        certificate_type: of the certificate.
        evse_id: the EVSE, or an empty text.
        not_after: its end, Unix time in seconds.
        state: `Due.DUE` or `Due.EXPIRED`.
        station: the station of a site, or an empty text.
    """

    key_id: str
    certificate_type: str
    evse_id: str
    not_after: int
    state: Due
    station: str = ""

    @property
    def end(self) -> str:
        """Its end in the form of RFC 3339."""
        return datetime.fromtimestamp(self.not_after, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def told(self) -> tuple[CertificateType, str, str, DueState, str]:
        """Return its entry on the renewal topic."""
        state: DueState = "expired" if self.state is Due.EXPIRED else "due"
        return CertificateType(self.certificate_type), self.evse_id, self.end, state, self.station


Told = Callable[[tuple[DueCertificate, ...]], None]
"""Told which certificates are due, whenever that may have changed."""


def next_hint(last: Hint | None, certificate: DueCertificate, *, running: int, repeat: int) -> Hint | None:
    """Return the hint to give now, or None if the last one is too recent.

    Two hints of a key are at least `repeat` milliseconds of running time apart, doubled up to `LONGEST` times that. One
    exception: the first hint that a certificate has expired is given at once.
    """
    expired = certificate.state is Due.EXPIRED
    hint = partial(Hint, not_after=certificate.not_after, expired=expired, running=running)
    if last is None:
        return hint(count=1)
    if last.not_after == certificate.not_after and expired and not last.expired:
        return hint(count=1)
    same = last.not_after == certificate.not_after
    wait = repeat * min(LONGEST, 2 ** min(last.count - 1, LONGEST)) if same else repeat
    if running - last.running < wait:
        return None
    return hint(count=last.count + 1 if same else 1, expired=expired or (same and last.expired))


class RenewalWatch:
    """Watches the certificates of the active keys.

    Args:
        custody: the keys.
        terms: when a certificate is due, and how often a hint is given.

    Attributes:
        due: the certificates that were due at the last look, the first to expire first.
        clock_behind: whether the clock was before the newest certificate at the last look; `due` is then an older one.
    """

    def __init__(self, custody: Custody, terms: RenewalTerms) -> None:
        self.due: tuple[DueCertificate, ...] = ()
        self.clock_behind = False
        self._custody = custody
        self._terms = terms
        self._rule = RenewalRule(before=terms.before // 1000, life_divisor=terms.life_divisor)
        self._command = BoundedCommand(terms.command, timeout=terms.timeout) if terms.command else None

    def close(self) -> None:
        """Kill the operator's command if it runs."""
        if self._command is not None:
            self._command.close()

    async def run(self, told: Told = lambda _: None) -> None:
        """Look once a minute until cancelled.

        Args:
            told: told of the certificates that are due after each look, before the hints are given.
        """
        await self._check_command()
        while True:
            try:
                await self.look(told)
            except StationKeyError as error:
                log.error("certificates not watched: %s", error, extra={"reason": error.reason})
            await asyncio.sleep(LOOK)

    async def look(self, told: Told = lambda _: None) -> None:
        """Find the due certificates, and give the hints that are due.

        Raises:
            LedgerError: it cannot be read or written. A hint that cannot be recorded is not given.
        """
        now = self._custody.now() / 1000
        behind, due, hints = await self._custody.ledger(partial(_look, by=self._rule, now=now))
        if behind and not self.clock_behind:
            reason, words = _CLOCK_BEHIND
            log.warning("%s", words, extra={"reason": reason})
        self.clock_behind = behind
        if behind:
            return
        self.due = due
        told(due)
        running = self._custody.running.now()
        given = 0
        for certificate in due:
            hint = next_hint(hints.get(certificate.key_id), certificate, running=running, repeat=self._terms.repeat)
            if hint is None:
                continue
            if given == HINTS_AT_ONCE:
                break
            given += 1
            # Recorded first: a daemon that is repeatedly killed at this moment must not repeat the hint.
            await self._custody.ledger(partial(_write, key_id=certificate.key_id, hint=hint))
            self._log(certificate, hint)
            await self._run_command(certificate, hint)

    def _log(self, certificate: DueCertificate, hint: Hint) -> None:
        self._custody.counters.hints.add(certificate.certificate_type, str(certificate.state))
        reason, words = _TOLD[certificate.state]
        log.log(
            logging.ERROR if certificate.state is Due.EXPIRED else logging.WARNING,
            "%s",
            words,
            extra={
                "reason": reason,
                "key_id": certificate.key_id,
                "certificate_type": certificate.certificate_type,
                **({"evse_id": certificate.evse_id} if certificate.evse_id else {}),
                **({"station": certificate.station} if certificate.station else {}),
                "not_after": certificate.end,
                "hint": hint.count,
            },
        )

    async def _check_command(self) -> None:
        """Log at start, not only at the first hint, that the operator's command cannot be started."""
        if self._command is not None:
            try:
                await self._command.check()
            except StationKeyError as error:
                log.error("renewal command cannot run: %s", error, extra={"reason": error.reason})

    async def _run_command(self, certificate: DueCertificate, hint: Hint) -> None:
        """Run the operator's command and wait for its end; its outcome is logged and counted."""
        if self._command is None:
            return
        counts = self._custody.counters.renewal_commands
        about = {"key_id": certificate.key_id, "certificate_type": certificate.certificate_type}
        if certificate.station:
            about["station"] = certificate.station
        try:
            output = await self._command.run(_environment(certificate, hint))
        except StationKeyError as error:
            counts.add(error.reason)
            log.error("renewal command failed: %s", error, extra={**about, "reason": error.reason})
        else:
            counts.add("ok")
            log.info("renewal command ended", extra={**about, "output": output})


def _environment(certificate: DueCertificate, hint: Hint) -> dict[str, str]:
    """Return the environment variables of the operator's command, which describe the due certificate."""
    of_site = {"STATIONKEY_STATION": certificate.station} if certificate.station else {}
    return of_site | {
        "STATIONKEY_CERTIFICATE_TYPE": certificate.certificate_type,
        "STATIONKEY_EVSE_ID": certificate.evse_id,
        "STATIONKEY_KEY_ID": certificate.key_id,
        "STATIONKEY_NOT_AFTER": certificate.end,
        "STATIONKEY_STATE": str(certificate.state),
        "STATIONKEY_HINT": str(hint.count),
    }


def _look(ledger: Ledger, *, by: RenewalRule, now: float) -> tuple[bool, tuple[DueCertificate, ...], dict[str, Hint]]:
    """Return whether the clock is behind, which certificates are due, and the last hint of each key."""
    newest = ledger.keys.newest_installed()
    if newest is not None and _judge(newest, by, now) is Due.UNKNOWN:
        return True, (), {}
    due = []
    for key in _watched(ledger, until=int(now) + by.before):
        state = _judge(key, by, now)
        if state in _TOLD:
            owner = key.owner
            due.append(
                DueCertificate(
                    key.key_id, owner.certificate_type, owner.evse_id, key.not_after or 0, state, owner.station
                )
            )
    return False, tuple(due), ledger.hints.all() if due else {}


def _watched(ledger: Ledger, *, until: int) -> list[KeyRecord]:
    """Return the active keys to watch, the first to expire first; in a site not too many of one station."""
    keys = ledger.keys.expiring(until=until, limit=WATCHED)
    if not any(key.station for key in keys):
        return keys
    watched, of_station = [], Counter[str]()
    for key in ledger.keys.expiring(until=until, limit=WATCHED_IN_SITE):
        of_station[key.station] += 1
        if of_station[key.station] <= WATCHED_OF_STATION:
            watched.append(key)
    return watched[:WATCHED]


def _judge(key: KeyRecord, by: RenewalRule, now: float) -> Due:
    return by.judge_chain(key.chain, key.not_after or 0, now)


def _write(ledger: Ledger, *, key_id: str, hint: Hint) -> None:
    ledger.hints.write(key_id, hint)
