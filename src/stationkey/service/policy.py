r"""Admit or refuse requests by content, rate and number in flight. Pure: the clock is passed in.

A request that a rule refuses, or that finds no place, spends no allowance; repeats of answered requests do not get
here. So the allowance of a certificate type is spent on keys only, and no type takes from another. In a site, each
station has its own allowances and places. Names of stations come from the wire, so only so many allowances are
remembered: see `stationkey.service.rate_limit.Allowances`.

In patterns ``*`` is any text, also an empty one, and ``?`` one character. A backslash before one of these, or before a
backslash, means the character itself: EVSE IDs contain asterisks, so ``DE\*ABC\*E1`` is one EVSE, ``DE*ABC*E1`` may be
many.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Final

from stationkey.config.settings import PolicyTerms, Severity
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.contract.profiles import (
    ALGORITHMS,
    PROFILES,
    CertificateProfile,
    CertificateType,
    RsaModulus,
    is_secc_id,
)
from stationkey.errors import RequestRefused
from stationkey.service.rate_limit import Allowances
from stationkey.service.shares import Shares

RSA_SHARE: Final = 4
"""Divisor of the places that RSA requests of one certificate type may hold. A chip takes tens of seconds for an RSA
key: such requests must not hold every place while others, whose keys take milliseconds, wait at the broker."""
FEW_PLACES: Final = 4
"""Places that a station of a site may hold however many others do."""


class Policy:
    """Admits requests by the operator's rules.

    Args:
        terms: the rules.
        profiles: of each certificate type, the operator's overrides included.
        clock: nanoseconds of a monotonic clock.
    """

    def __init__(
        self,
        terms: PolicyTerms,
        profiles: Mapping[CertificateType, CertificateProfile] = PROFILES,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._terms = terms
        self._profiles = profiles
        self._clock = clock
        self._countries = frozenset(name.upper() for name in terms.country_names)
        self._common_names = _Patterns(terms.common_names)
        self._evse_ids = _Patterns(terms.evse_ids)
        self._rsa_places = max(1, terms.queue // RSA_SHARE)
        self._rsa_in_hand: Counter[tuple[str, CertificateType]] = Counter()
        self._shares = Shares(terms.queue, few=FEW_PLACES)
        self._requests = self._allowances()
        self._statuses = self._allowances()

    @property
    def queue(self) -> int:
        """Messages in hand at a time."""
        return self._terms.queue

    def _allowances(self) -> Allowances | None:
        terms = self._terms
        if not terms.requests_per_minute:
            return None
        return Allowances(per_minute=terms.requests_per_minute, burst=terms.burst)

    @contextmanager
    def admitted(self, request: GenerateCsrRequest, station: str = "") -> Iterator[list[str]]:
        """Hold a place and spend an allowance while a new request of a station is served.

        Yields:
            Warnings to log about the request.

        Raises:
            RequestRefused: not allowed, or not now. The same id may be sent again.
        """
        self._check_lists(request)
        remarks = list(self._check_profile(request))
        with self._station_place(station) if station else nullcontext(), self._place(request, station):
            self._spend(self._requests, station, request.data.certificate_type, "requests")
            yield remarks

    def admit_status(self, certificate_type: CertificateType, station: str = "") -> None:
        """Admit a status, which may take a signature and a read of the certificate directory.

        Statuses have their own allowance, as large as that of requests: neither blocks the other.

        Raises:
            RequestRefused: not now.
        """
        self._spend(self._statuses, station, certificate_type, "statuses")

    def _check_lists(self, request: GenerateCsrRequest) -> None:
        terms, data = self._terms, request.data
        if data.certificate_type not in terms.certificate_types:
            raise _refused(data.certificate_type, reason="policy_certificate_type", option="certificate_types")
        if request.algorithm not in terms.algorithms:
            raise _refused(request.algorithm, reason="policy_algorithm", option="algorithms")
        if terms.organization_names and data.organization_name not in terms.organization_names:
            raise _refused(data.organization_name, reason="policy_organization", option="organization_names")
        if self._countries and data.country_name.upper() not in self._countries:
            raise _refused(data.country_name, reason="policy_country", option="country_names")
        if not self._common_names.let_through(data.common_name):
            raise _refused(data.common_name, reason="policy_common_name", option="common_names")
        if not self._evse_ids.let_through(request.evse_id):
            raise _refused(request.evse_id, reason="policy_evse_id", option="evse_ids")

    def _check_profile(self, request: GenerateCsrRequest) -> Iterator[str]:
        profile = self._profiles[request.data.certificate_type]
        if profile.secc_id and not is_secc_id(request.data.common_name):
            yield from _weigh(
                self._terms.secc_id, "the common name is not a SECC ID", option="secc_id", reason="policy_secc_id"
            )
        if profile.preferred_algorithm not in {None, request.algorithm}:
            yield from _weigh(
                self._terms.off_profile,
                f"the profile of this certificate type wants {profile.preferred_algorithm}",
                option="off_profile",
                reason="policy_off_profile",
            )

    @contextmanager
    def _station_place(self, station: str) -> Iterator[None]:
        """Hold one of the places that the stations share.

        Raises:
            RequestRefused: the station holds its share.
        """
        if not self._shares.has_room(station):
            raise RequestRefused(
                "the station has as many requests in flight as it may while others have theirs",
                reason="station_places_taken",
                hint="retry later, or raise [policy] queue",
                transient=True,
            )
        with self._shares.place(station):
            yield

    @contextmanager
    def _place(self, request: GenerateCsrRequest, station: str) -> Iterator[None]:
        """Hold a place in the queue of the key store while the request is served.

        Raises:
            RequestRefused: no place is free.
        """
        if not is_rsa(request):
            yield
            return
        certificate_type = request.data.certificate_type
        owner = (station, certificate_type)
        if self._rsa_in_hand[owner] >= self._rsa_places:
            raise RequestRefused(
                f"{self._rsa_places} RSA requests for {certificate_type} are in flight already",
                reason="rsa_places_taken",
                hint="retry later; RSA requests get a quarter of [policy] queue",
                transient=True,
            )
        self._rsa_in_hand[owner] += 1
        try:
            yield
        finally:
            self._rsa_in_hand[owner] -= 1
            if not self._rsa_in_hand[owner]:
                del self._rsa_in_hand[owner]

    def _spend(self, allowances: Allowances | None, station: str, certificate_type: CertificateType, what: str) -> None:
        if allowances is None or allowances.take((station, certificate_type), self._clock()):
            return
        raise RequestRefused(
            f"{what} for {certificate_type} come more often than {self._terms.requests_per_minute:g} times a minute,"
            f" and the {self._terms.burst} that may come at once are used up",
            reason="rate_limited",
            hint="retry later, or raise [policy] requests_per_minute and burst",
            transient=True,
        )


def is_rsa(request: GenerateCsrRequest) -> bool:
    """Return whether a request is for an RSA key, which takes a TPM chip tens of seconds."""
    return isinstance(ALGORITHMS[request.algorithm].key_types[0], RsaModulus)


class _Patterns:
    """Patterns, one of which must match the whole text; without patterns, every text is accepted."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = [_compile(pattern) for pattern in patterns]

    def let_through(self, text: str | None) -> bool:
        if not self._patterns:
            return True
        return text is not None and any(pattern.fullmatch(text) for pattern in self._patterns)


_PIECE: Final = re.compile(r"\\([*?\\])|([*?])|(.)", re.DOTALL)


def _compile(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern.

    The text between two asterisks is matched at its first occurrence, without backtracking (``(?>…)``): that finds a
    match if one exists, and no text makes the search exponential.
    """
    parts = [""]
    for literal, wildcard, other in _PIECE.findall(pattern):
        if wildcard == "*":
            parts.append("")
        else:
            parts[-1] += "." if wildcard else re.escape(literal or other)
    first, *rest = parts
    if not rest:
        return re.compile(first, re.DOTALL)
    *between, last = rest
    return re.compile(first + "".join(f"(?>.*?{part})" for part in between if part) + f".*{last}", re.DOTALL)


def _weigh(severity: Severity, remark: str, *, option: str, reason: str) -> Iterator[str]:
    """Ignore a remark, yield it as a warning, or refuse the request for it."""
    if severity == "refuse":
        raise RequestRefused(remark, reason=reason, hint=f"see [policy] {option}")
    if severity == "warn":
        yield remark


def _refused(value: str | None, *, reason: str, option: str) -> RequestRefused:
    what = "a request without an EVSE ID" if value is None else json.dumps(value)
    return RequestRefused(
        f"{what} is not among the {option} that are served", reason=reason, hint=f"see [policy] {option}"
    )
