"""Options of a site: many stations, and their ledger on PostgreSQL."""
# The annotations are read at run time, so they are not postponed here.

from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, Final

from msgspec import UNSET, Meta, Struct

from stationkey.config.options import FORM, Form, Option
from stationkey.config.secrets import SecretReference
from stationkey.contract.stations import MAX_STATION, pattern_flaw

_SCHEMES: Final = ("postgresql://", "postgres://")
_PARAMETERS: Final = frozenset(
    {"host", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "channel_binding", "target_session_attrs"}
)
"""Parameters of libpq that an operator may set. The others are ours, such as timeouts, or contain a secret."""


def _overlap(one: str, other: str) -> bool:
    """Return whether a station can match two patterns: a broker may then deliver its messages twice."""
    pairs = list(zip(one.split("/"), other.split("/"), strict=False))
    same_depth = one.count("/") == other.count("/")
    return same_depth and all("+" in pair or pair[0] == pair[1] for pair in pairs)


def _stations(written: str | tuple[str, ...]) -> Any:
    patterns = (written,) if isinstance(written, str) else written
    if patterns == ("",):
        return UNSET
    for pattern in patterns:
        if wrong := pattern_flaw(pattern):
            raise ValueError(f"the pattern {pattern[:80]!r} {wrong}")
    for one, other in combinations(patterns, 2):
        if _overlap(one, other):
            raise ValueError(f"a station can match both {one} and {other}")
    return patterns or UNSET


def _ledger(uri: str) -> Any:
    for wrong in _uri_errors(uri) if uri else ():
        raise ValueError(wrong)
    return uri or UNSET


def _uri_errors(uri: str) -> Iterator[str]:
    """Yield what is wrong with the URI of a ledger. Nothing of it is shown: it may contain a password."""
    from urllib.parse import parse_qsl, unquote, urlsplit  # noqa: PLC0415 - a single station has no such URI

    if not uri.startswith(_SCHEMES):
        yield "not a URI of PostgreSQL, postgresql://USER@HOST:PORT/DATABASE"
        return
    try:
        rest = urlsplit(uri)
    except ValueError:  # its text may show the password
        yield "not a valid URI"
        return
    user, at, _ = rest.netloc.rpartition("@")
    given = dict(parse_qsl(rest.query, keep_blank_values=True))
    if ":" in user or {"password", "sslpassword"} & given.keys():
        yield "has a password in it, which logs and lists of processes would show; put it in ledger_password_file"
    if not at or not user:
        yield "has no user, as in postgresql://USER@HOST:PORT/DATABASE"
    if not unquote(rest.path).strip("/") or rest.fragment:
        yield "has no database, as in postgresql://USER@HOST:PORT/DATABASE"
    if given.keys() - _PARAMETERS:
        yield f"has another parameter than {', '.join(sorted(_PARAMETERS))}"


def contradictions(stations: object, ledger: object, shards: int) -> Iterator[tuple[str, str]]:
    """Yield contradictions between `[site]` and the ledger: the place of an option, and a message."""
    if ledger and not stations:
        # Without [site] there are no leases, so two daemons on one database would both answer.
        yield "ledger", "ledger: a ledger on PostgreSQL is for a site: set stations in [site]"
    if stations and not ledger and shards > 1:
        yield "site.shards", "site.shards: more than one shard needs a ledger on PostgreSQL: set ledger"


_Pattern = Annotated[str, Meta(max_length=4 * MAX_STATION)]
_Patterns = Annotated[
    _Pattern | Annotated[tuple[_Pattern, ...], Meta(max_length=64)],
    Meta(extra={FORM: "a text, or a list of 64 texts at most"}),
]

LedgerUri = Annotated[
    str,
    Option(
        "Ledger on PostgreSQL: postgresql://USER@HOST:PORT/DATABASE; empty for SQLite in the state directory.",
        Form(Annotated[str, Meta(max_length=4096)], _ledger),
        metavar="URI",
        example='"postgresql://stationkey@db.local/stationkey"',
    ),
]
LedgerPassword = Annotated[
    SecretReference | None,
    Option(
        "File of the password for that ledger: a path, or credential:NAME.",
        Form(Annotated[str, Meta(max_length=4096)], lambda source: SecretReference(source) if source else UNSET),
        "ledger_password_file",
        example='"credential:ledger-password"',
    ),
]


class SiteTerms(Struct, frozen=True, kw_only=True):
    """``[site]``: many stations, and their cut into shards. Without `stations` there is one station, and no site."""

    stations: Annotated[
        tuple[str, ...],
        Option(
            "Stations of the site, by their part of the topic; + is any level. A text, or a list.",
            Form(_Patterns, _stations),
            example='"depot7/+"',
        ),
    ] = ()
    shards: Annotated[
        int, Meta(ge=1, le=256), Option("Parts that the stations are divided into; each is served by one daemon.")
    ] = 1
    lease_seconds: Annotated[
        float,
        Option(
            "Seconds after which a daemon that is no longer heard of loses its shards.",
            Form(Annotated[float, Meta(ge=2, le=300)], lambda seconds: seconds),
        ),
    ] = 10.0
    active_keys: Annotated[
        int,
        Meta(ge=0, le=10_000_000),
        Option("Most active keys of all stations together, in a key store; 0 for no limit."),
    ] = 0

    def contradiction(self) -> str:
        """Return the contradiction between valid options; empty if there is none."""
        return "there are shards and no stations" if self.shards > 1 and not self.stations else ""
