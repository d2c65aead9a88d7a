"""Metrics for Prometheus, made on request from plain counters.

Names follow Prometheus' conventions: base units, ``_total`` for counters. `docs/metrics.md` lists them all. Label
values come from this project's own tables, except EVSE IDs of the keys that expire first, which are bounded in number
and form. No label has the name of a person, an operator or a station.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from stationkey._version import __version__
from stationkey.contract.profiles import CertificateType
from stationkey.keystore.stores import KeyStores
from stationkey.ledger import Figures
from stationkey.ledger.lifecycle import KeyState
from stationkey.observability.health import Health, Serving
from stationkey.observability.kept import Kept
from stationkey.observability.status import Condition, ShardCondition, SiteCondition
from stationkey.system.counters import BUCKETS, Counts

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
UNANSWERABLE: Final = (
    "duplicate_name",
    "id_invalid",
    "id_missing",
    "nested_too_deep",
    "not_a_message",
    "not_a_number",
    "not_json",
    "not_utf8",
    "number_too_long",
    "payload_too_large",
    "topic_foreign",
)
"""Reasons why a message cannot be answered, exposed at 0 from the start; others appear with their first message."""
COMMAND_FAILURES: Final = ("command_failed", "command_hangs", "command_timeout", "command_unstartable")
"""Reasons why ``[renewal] command`` fails."""
_PREFIX: Final = "stationkey_"

L = TypeVar("L", bound=tuple[str, ...])
"""The values of labels."""


class _Process(ProcessCollector):
    """The process metrics of the library, also under ``ProcSubset=pid``.

    The library reads the boot time from ``/proc/stat``, which ``ProcSubset=pid`` of the unit hides, and then exposes
    nothing.
    """

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class Exposition(Collector):
    """The metrics in the text format of Prometheus.

    Args:
        health: knows the parts.

    Attributes:
        text: returns all metrics, at most a second old.
    """

    def __init__(self, health: Health) -> None:
        self._health = health
        self._now: tuple[Condition, Figures | None] = health.condition(), None
        self._registry = CollectorRegistry()
        self._registry.register(self)
        _Process(registry=self._registry)
        self.text = Kept(self._make).text

    async def _make(self) -> bytes:
        figures = await self._health.figures()
        self._now = self._health.condition(), figures
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; called by the registry."""
        condition, figures = self._now
        yield _info(
            "build", "Version of stationkey and of Python.", version=__version__, python=platform.python_version()
        )
        yield from _of_condition(condition)
        if condition.site is not None:
            yield from _of_site(condition.site)
        yield from _of_keystores(self._health.keystores)
        if self._health.edge is not None:
            edge = self._health.edge
            yield _gauge("messages_in_hand", "Messages in flight.", edge.in_hand)
            yield _gauge("messages_waiting", "Messages that wait to be processed.", edge.waiting)
        if self._health.service is not None:
            yield from _of_service(self._health.service)
        if figures is not None:
            yield from _of_ledger(figures)


def _of_keystores(keystores: KeyStores) -> Iterator[Metric]:
    threads = {store.name: store.thread for store in keystores}
    yield _gauges(
        "keystore_jobs_waiting",
        "Jobs that wait for a key store.",
        ("turn", "store"),
        {
            (turn.name.lower(), name): count
            for name, thread in threads.items()
            for turn, count in thread.waiting.items()
        },
    )
    yield _gauges(
        "keystore_jobs_in_hand",
        "Jobs that a key store is working on: one or none.",
        ("store",),
        {(name,): thread.busy for name, thread in threads.items()},
    )
    yield _gauges(
        "keystore_threads_abandoned",
        "Abandoned threads that still hang in a call.",
        ("store",),
        {(name,): thread.abandoned for name, thread in threads.items()},
    )
    yield _gauges(
        "keystore_last_job_timestamp_seconds",
        "When a key store did something last.",
        ("store",),
        {(name,): time.time() - last[0] for name, thread in threads.items() if (last := thread.last) is not None},
    )
    durations = HistogramMetricFamily(
        _PREFIX + "keystore_job_seconds",
        "Duration of a job, without its wait.",
        labels=("task", "store"),
    )
    for name, thread in threads.items():
        for task, (cumulative, total) in thread.durations().items():
            durations.add_metric((task, name), _buckets(cumulative), total)
    yield durations


def _of_condition(condition: Condition) -> Iterator[Metric]:
    yield _gauge("ready", "Whether it serves, apart from the broker.", condition.ready)
    yield _gauge("healthy", "Whether /health returns 200.", condition.healthy)
    yield _gauge("broker_connected", "Whether it is subscribed at the broker.", condition.connected)
    yield _counter("broker_connections", "Connections so far.", condition.connections)
    yield _gauge("broker_changed_timestamp_seconds", "When the connection last changed.", condition.changed)
    reachable = {(store.name,): store.reachable for store in condition.stores}
    yield _gauges("keystore_reachable", "Whether a key store answered the last time.", ("store",), reachable)
    stuck = {(store.name,): store.stuck for store in condition.stores}
    yield _gauges("keystore_stuck", "Whether a call to a key store hangs.", ("store",), stuck)
    due = {("due",): condition.due, ("expired",): condition.expired}
    yield _gauges("certificates_due", "Certificates of active keys that are due for renewal.", ("state",), due)
    yield _gauge("clock_behind", "Whether the clock is before the newest certificate.", condition.clock_behind)
    yield _gauge("ledger_writable", "Whether the ledger could be written the last time.", not condition.ledger)


def _of_site(site: SiteCondition) -> Iterator[Metric]:
    held = {shard.number: shard for shard in site.held}
    # Also of the shards that others have: the sum over all daemons says whether anybody has it.
    having = {(str(number),): number in held for number in range(site.shards)}
    yield _gauges("shard_held", "Whether this daemon has a shard of the site.", ("shard",), having)
    of_each: dict[str, tuple[str, Callable[[ShardCondition], float]]] = {
        "shard_epoch": ("How often a shard was taken.", lambda shard: shard.epoch),
        "shard_connected": ("Whether a shard is subscribed at the broker.", lambda shard: shard.connected),
        "shard_messages_in_hand": ("Messages in flight, of a shard.", lambda shard: shard.in_hand),
        "shard_messages_waiting": ("Messages that wait, of a shard.", lambda shard: shard.waiting),
    }
    for name, (words, value) in of_each.items():
        values = {(str(number),): value(shard) for number, shard in held.items()}
        yield _gauges(name, words, ("shard",), values)
    yield _gauge("lease_held", "Whether PostgreSQL has confirmed the lease within its time.", site.leased)
    yield _gauge("lease_age_seconds", "How long ago it confirmed the lease.", site.lease_age)


def _of_service(service: Serving) -> Iterator[Metric]:
    counters = service.counters
    types = [str(certificate_type) for certificate_type in CertificateType]
    yield _counters(
        "requests",
        "Requests for a CSR, by outcome.",
        ("certificate_type", "outcome", "reason"),
        counters.requests,
        [(certificate_type, outcome, "") for certificate_type in types for outcome in ("accepted", "repeated")],
    )
    rejected = sum(count for (_, outcome, _), count in counters.requests.items() if outcome == "rejected")
    # There are too many reasons to expose each at 0 from the start; the sum gives the first burst a rate.
    yield _counter("rejected_requests", "Rejected requests of all reasons.", rejected)
    yield _counters(
        "statuses",
        "Certificate statuses, by outcome.",
        ("status", "outcome", "reason"),
        counters.statuses,
        [(status, "applied", "") for status in ("installed", "failed_installation", "deleted")],
    )
    yield _counters(
        "unanswerable_messages",
        "Messages without a usable id, by reason.",
        ("reason",),
        counters.unanswerable,
        [(reason,) for reason in UNANSWERABLE],
    )
    yield _counters(
        "task_failures",
        "Errors that a task of the daemon did not handle.",
        ("task", "reason"),
        counters.task_failures,
        [("mqtt", "internal_error")],
    )
    answers = HistogramMetricFamily(
        _PREFIX + "answer_seconds", "Duration of a new CSR, from message to answer.", labels=("algorithm",)
    )
    for algorithm, durations in counters.answers.items():
        answers.add_metric((algorithm,), _buckets(durations.cumulative()), durations.sum)
    yield answers
    yield _counter(
        "certificate_differences", "Differences of installed certificates from their profiles.", counters.differences
    )
    yield _counter("restorations", "Keys that Josev went back to.", counters.restorations)
    yield _counters(
        "renewal_hints",
        "Hints that a certificate is due for renewal.",
        ("certificate_type", "state"),
        counters.hints,
        [(certificate_type, state) for certificate_type in types for state in ("due", "expired")],
    )
    yield _counters(
        "renewal_commands",
        "Runs of [renewal] command, by outcome.",
        ("outcome",),
        counters.renewal_commands,
        [(outcome,) for outcome in ("ok", *COMMAND_FAILURES)],
    )
    yield _gauge("unusable_keys", "Keys that the key store could not load at the start.", counters.unusable)
    yield _counter(
        "running_seconds", "Running time of the daemon with this ledger, all runs together.", service.running / 1000
    )
    pools = {store.name: pool for store, pool in service.pools.items()}
    ready = {(str(kind), name): count for name, pool in pools.items() for kind, count in pool.ready().items()}
    yield _gauges("pool_keys_ready", "Keys made ahead, ready.", ("key_type", "store"), ready)
    wanted = {(str(kind), name): count for name, pool in pools.items() for kind, count in pool.wanted().items()}
    yield _gauges("pool_keys_wanted", "Keys made ahead, configured.", ("key_type", "store"), wanted)


def _of_ledger(figures: Figures) -> Iterator[Metric]:
    living = [state for state in KeyState if state is not KeyState.DESTROYED]
    keys = {
        (str(state), str(certificate_type)): figures.keys.get((str(state), str(certificate_type)), 0)
        for state in living
        for certificate_type in CertificateType
    }
    yield _gauges("keys", "Keys with an owner that are not destroyed.", ("state", "certificate_type"), keys)
    yield _gauges(
        "certificate_expiry_timestamp_seconds",
        "When the certificate of an active key expires.",
        ("certificate_type", "evse_id"),
        {(kind, evse_id): expires for kind, evse_id, expires in figures.expiries},
    )
    yield _gauge("certificates_expiry_unknown", "Active keys whose expiry is not shown.", figures.unknown)
    yield _gauge(
        "unconfirmed_keys", "Active keys that are not confirmed, while the key before is kept.", figures.unconfirmed
    )
    yield _gauge("destroyed_keys", "Destroyed keys that are on record.", figures.destroyed)
    yield _gauge("ledger_size_bytes", "Size of the ledger, its write-ahead log included.", figures.size)


def _info(name: str, words: str, **labels: str) -> Metric:
    return _gauges(f"{name}_info", words, tuple(labels), {tuple(labels.values()): 1})


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, words, value=float(value))


def _gauges(name: str, words: str, labels: tuple[str, ...], values: Mapping[L, float]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, words, labels=labels)
    for each, value in values.items():
        family.add_metric(each, float(value))
    return family


def _counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, words, value=float(value))


def _counters(
    name: str, words: str, labels: tuple[str, ...], counts: Counts, always: list[tuple[str, ...]] | None = None
) -> Metric:
    """Return a counter; label values in `always` are exposed at 0 from the start, so that their first event counts."""
    family = CounterMetricFamily(_PREFIX + name, words, labels=labels)
    for each, value in {**dict.fromkeys(always or [], 0), **dict(counts.items())}.items():
        family.add_metric(each, float(value))
    return family


def _buckets(cumulative: list[int]) -> list[tuple[str, float]]:
    bounds = [*map(str, BUCKETS), "+Inf"]
    return [(bound, float(count)) for bound, count in zip(bounds, cumulative, strict=True)]
