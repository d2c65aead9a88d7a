"""The table of targets: which measured series each compares, and the limit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Final, NamedTuple

KINDS: Final = ("P-256", "P-521", "RSA-3072")
"""The key types that are measured."""

OURS: Final = "stationkey"
POOLED: Final = "stationkey, warm pool"
FLOOR: Final = "TPM alone"
LOOP: Final = "one loop (H)"
LOOP_AHEAD: Final = "one loop (H), key made ahead"
"""H, the composite floor: see `bench.composite`."""
REQ_TPM: Final = "openssl req, tpm2 provider"
GENPKEY_TPM: Final = "openssl genpkey + req, tpm2 provider"
TOOLS: Final = "tpm2-tools, no CSR"
REQ_SOFTWARE: Final = "openssl req, software key"
PROGRAMS: Final = (REQ_TPM, GENPKEY_TPM, TOOLS, REQ_SOFTWARE)
SIDES: Final = (FLOOR, LOOP, LOOP_AHEAD, OURS, POOLED, *PROGRAMS)
"""The sides of a group that is a kind of key."""
PROCESSOR: Final = {OURS: "stationkey, processor time", LOOP: "one loop (H), processor time"}
"""The series of a side's processor time for one request."""

LEDGER: Final = "ledger"
START: Final = "start"
MEMORY: Final = "memory"
COMMANDS: Final = "commands"
IMPORTS: Final = "python, imports only"
IDLE: Final = "after 100 requests"
GROWTH: Final = "growth after that"
KEYS_LIST: Final = "stationkey keys list"
SCHEMA: Final = "stationkey schema"
BOARD: Final = "idle minute"
WAKE_UPS: Final = "wake-ups a second"
IDLE_BYTES: Final = "bytes written"
DISK: Final = "disk"
REQUEST_PAGES: Final = "a request"
ENDING_PAGES: Final = "a request that ends a key"
REQUEST_SYNCS: Final = "syncs of a request"
LISTS: Final = "100,000 keys"
LIST_TIME: Final = "keys list, processor time"
LIST_MEMORY: Final = "keys list, memory"
JSON_TIME: Final = "keys list --json, processor time"
JSON_MEMORY: Final = "keys list --json, memory"
SLOW: Final = "a tenth of a core"
SLOW_REQUEST: Final = "request"
SLOW_START: Final = "start"
SITE: Final = "site"
SITE_SQLITE: Final = "SQLite, 1 daemon"
SITE_ONE: Final = "PostgreSQL, 1 daemon"
SITE_TWO: Final = "PostgreSQL, 2 daemons"
SITE_THREE: Final = "PostgreSQL, 3 daemons"
"""A site of 30 stations and one token: see `bench.site`."""
SIZES: Final = (1_000, 10_000, 100_000)
"""Keys in the ledger, where its growth is measured."""
SWEPT: Final = "100,000 keys, being swept"
"""All but the last thousand are forgotten meanwhile: the longest sweep."""


def sustained(kind: str) -> str:
    """Return the group of series with 16 requests in flight."""
    return f"sustained {kind}"


def keys(count: int) -> str:
    """Return the series of a daemon with so many keys in its ledger."""
    return f"{count:,} keys"


class Series(NamedTuple):
    """A series by its name: those of one group are measured side by side."""

    group: str
    side: str


class How(Enum):
    """How a row compares, and which way is better."""

    OVER = "times the other at most"
    RATE = "of the other's rate at least"
    FASTER = "times as fast as the other at least"
    VALUE = "at most"
    SHOWN = "no target"


@dataclass(frozen=True, slots=True)
class Row:
    """A target.

    Attributes:
        name: what ``--only`` takes.
        what: for the reader of the table.
        ours: the series of stationkey.
        other: what it is compared with; None where a bare value is promised.
        how: which ratio is formed, and which way is better.
        limit: the target.
        unit: of the series: ms, requests a second, MiB.
    """

    name: str
    what: str
    ours: Series
    other: Series | None
    how: How
    limit: float
    unit: str = "ms"

    @property
    def needs(self) -> tuple[Series, ...]:
        """Return the series that must be measured for it."""
        return (self.ours,) if self.other is None else (self.ours, self.other)

    def ratio(self, ours: float, other: float | None) -> float:
        """Return the ratio, or value, that is compared with the limit."""
        if other is None:
            return ours
        return other / ours if self.how is How.FASTER else ours / other

    def met(self, ratio: float) -> bool:
        """Return whether the target is met."""
        return ratio <= self.limit if self.how in {How.OVER, How.VALUE, How.SHOWN} else ratio >= self.limit


def _short(kind: str) -> str:
    return kind.replace("-", "").lower()


def _made(name: str, what: str, kind: str, ours: str, other: str, how: How, limit: float) -> Row:
    return Row(f"{name}-{_short(kind)}", f"{kind}: {what}", Series(kind, ours), Series(kind, other), how, limit)


def _request(kind: str, limit: float) -> Row:
    return _made("request", "request to response", kind, OURS, FLOOR, How.OVER, limit)


def _pool(kind: str, limit: float) -> Row:
    return _made("pool", "the same with a warm pool", kind, POOLED, FLOOR, How.OVER, limit)


def _over_loop(name: str, what: str, kind: str, limit: float) -> Row:
    ours, loop = (POOLED, LOOP_AHEAD) if name == "pool-loop" else (OURS, LOOP)
    return _made(name, what, kind, ours, loop, How.OVER, limit)


def _openssl(kind: str, ours: str, limit: float) -> Row:
    what = "request to response" if ours == OURS else "with a warm pool"
    return _made("openssl", f"{what}, beside `openssl req`", kind, ours, REQ_TPM, How.FASTER, limit)


def _sustained(kind: str, limit: float) -> Row:
    group = sustained(kind)
    what = f"{kind}: sustained, 16 in flight"
    name = f"sustained-{_short(kind)}"
    return Row(name, what, Series(group, OURS), Series(group, FLOOR), How.RATE, limit, "per s")


def _command(name: str, side: str) -> Row:
    return Row(name, f"`{side}`, whole command", Series(COMMANDS, side), Series(COMMANDS, IMPORTS), How.OVER, 3.0)


def _value(name: str, what: str, group: str, side: str, limit: float, unit: str) -> Row:
    return Row(name, what, Series(group, side), None, How.VALUE, limit, unit)


def _slow(name: str, what: str, side: str) -> Row:
    return Row(name, what, Series(SLOW, side), None, How.SHOWN, inf)


def _site(name: str, what: str, side: str) -> Row:
    return Row(name, what, Series(SITE, side), Series(SITE, SITE_SQLITE), How.SHOWN, inf, "per s")


ROWS: Final = (
    _slow("slow-request", "a tenth of a core: P-256, request to response", SLOW_REQUEST),
    _slow("slow-start", "a tenth of a core: exec to ready", SLOW_START),
    _over_loop("request-loop", "request to response, over the same in one loop", "P-256", 1.25),
    _over_loop("request-loop", "request to response, over the same in one loop", "P-521", 1.1),
    _over_loop("pool-loop", "the same, both with a key made ahead", "P-256", 1.4),
    _over_loop("pool-loop", "the same, both with a key made ahead", "P-521", 1.15),
    _made("processor", "processor time of a request", "P-256", PROCESSOR[OURS], PROCESSOR[LOOP], How.OVER, 1.5),
    _request("P-256", 1.5),
    _request("P-521", 1.2),
    _pool("P-256", 1.0),
    _pool("P-521", 0.6),
    _pool("RSA-3072", 0.04),
    _openssl("P-256", OURS, 3.0),
    _openssl("P-521", OURS, 2.0),
    _openssl("RSA-3072", POOLED, 20.0),
    _sustained("P-256", 0.75),
    _sustained("P-521", 0.9),
    Row(
        "ledger",
        "ten times the keys in the ledger",
        Series(LEDGER, keys(SIZES[1])),
        Series(LEDGER, keys(SIZES[0])),
        How.OVER,
        1.1,
    ),
    Row(
        "sweep",
        "a full sweep of 100,000 keys going on",
        Series(LEDGER, SWEPT),
        Series(LEDGER, keys(SIZES[2])),
        How.OVER,
        1.3,
    ),
    Row("start", "start: exec to ready", Series(START, OURS), Series(START, IMPORTS), How.OVER, 1.3),
    Row("memory-idle", "resident memory, idle after 100 requests", Series(MEMORY, IDLE), None, How.VALUE, 40.0, "MiB"),
    Row(
        "memory-growth",
        "resident memory, what 10,000 more add (quick: 1,000)",
        Series(MEMORY, GROWTH),
        None,
        How.VALUE,
        2.0,
        "MiB",
    ),
    _value("idle-wake-ups", "idle: wake-ups of the daemon", BOARD, WAKE_UPS, 2.0, "per s"),
    _value("idle-bytes", "idle: written to the disk in a minute", BOARD, IDLE_BYTES, 0.0, "bytes"),
    _value("disk-request", "written to the disk for a request", DISK, REQUEST_PAGES, 8.0, "x 4 KiB"),
    _value("disk-syncs", "waits for the disk (fsync, fdatasync)", DISK, REQUEST_SYNCS, 1.0, "per request"),
    Row("disk-ending", "the same, and a key ends", Series(DISK, ENDING_PAGES), None, How.SHOWN, inf, "x 4 KiB"),
    _value("list-time", "`stationkey keys list` with 100,000 keys, processor time", LISTS, LIST_TIME, 3.0, "s"),
    _value("list-memory", "the same, memory", LISTS, LIST_MEMORY, 80.0, "MiB"),
    _value("json-time", "`keys list --json` with 100,000 keys, processor time", LISTS, JSON_TIME, 3.0, "s"),
    _value("json-memory", "the same, memory", LISTS, JSON_MEMORY, 80.0, "MiB"),
    _site("site", "a site on PostgreSQL, one daemon: answers", SITE_ONE),
    _site("site-three", "the same, three daemons", SITE_THREE),
    _command("keys-list", KEYS_LIST),
    _command("schema", SCHEMA),
)
"""The targets, in the order of the table."""

EXTRA: Final = tuple(Series(kind, side) for kind in KINDS for side in SIDES)
"""Series that the whole run measures for the plot and the page, compared by a row or not."""
