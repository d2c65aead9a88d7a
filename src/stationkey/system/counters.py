"""Counters as plain numbers, which cost next to nothing.

`stationkey.observability.metrics` exposes them to Prometheus. Labels are this project's own words, and bounded in
number.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds in seconds: from a signature in a fast TPM to an RSA key in a slow one."""

MAX_SERIES: Final = 256
"""Most combinations of labels; further ones are counted as `OTHER`. There are dozens."""
OTHER: Final = "other"
UNKNOWN: Final = "unknown"
"""The certificate type of a message without a known one."""


class Counts:
    """A counter by a fixed number of labels. Not thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, *labels: str) -> None:
        """Add one for these labels."""
        if labels not in self._counts and len(self._counts) >= MAX_SERIES:
            labels = (OTHER,) * len(labels)
        self._counts[labels] += 1

    def items(self) -> list[tuple[tuple[str, ...], int]]:
        """Return each combination of labels with its count."""
        return list(self._counts.items())


class Durations:
    """A histogram of durations, in `BUCKETS`. Not thread-safe."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Add a duration."""
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    @property
    def sum(self) -> float:
        """Sum of the durations in seconds."""
        return self._sum

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self._counts)

    def cumulative(self) -> list[int]:
        """Return for each of `BUCKETS` how many took no longer, then the number of all."""
        total, counts = 0, []
        for count in self._counts:
            total += count
            counts.append(total)
        return counts


class Counters:
    """The counters of this run, for log, health and metrics.

    Attributes:
        requests: by certificate type, outcome (``accepted``, ``repeated``, ``rejected``) and reason of the rejection.
        statuses: by status, outcome (``applied``, ``repeated``, ``refused``) and reason of the refusal.
        unanswerable: messages that carry no usable id, by reason.
        answers: how long a new CSR took, by algorithm.
        differences: differences of installed certificates from their profiles.
        restorations: keys that Josev went back to.
        unusable: keys that no key store could load at the start.
        unconfigured: those of them whose key store the configuration does not name.
        left_behind: destroyed keys that such a key store still had at the start.
        not_shown: failures to write the files under ``active/``, by reason.
        hints: hints that a certificate is due for renewal, by certificate type and ``due`` or ``expired``.
        task_failures: errors that a task of the daemon did not handle, by task and reason.
        renewal_commands: runs of ``[renewal] command``, by ``ok`` or the reason of the failure.
    """

    def __init__(self) -> None:
        self.requests = Counts()
        self.statuses = Counts()
        self.unanswerable = Counts()
        self.answers: dict[str, Durations] = {}
        self.differences = 0
        self.restorations = 0
        self.unusable = 0
        self.unconfigured = 0
        self.left_behind = 0
        self.not_shown = Counts()
        self.hints = Counts()
        self.renewal_commands = Counts()
        self.task_failures = Counts()

    def answered(self, algorithm: str, seconds: float) -> None:
        """Add the duration of a new CSR; `algorithm` is one of `stationkey.contract.profiles.Algorithm`."""
        self.answers.setdefault(algorithm, Durations()).add(seconds)

    def outcomes(self) -> Counter[str]:
        """Sum up by one word: ``accepted``, ``repeated``, the applied status, or the reason of a refusal or failure.

        Repeated statuses are left out.
        """
        outcomes: Counter[str] = Counter(certificate_differs=self.differences, key_unusable=self.unusable)
        for (_, outcome, reason), count in self.requests.items():
            outcomes[reason or outcome] += count
        for (status, outcome, reason), count in self.statuses.items():
            outcomes[reason or status] += count * (outcome != "repeated")
        for (reason,), count in (*self.unanswerable.items(), *self.not_shown.items()):
            outcomes[reason] += count
        for (_, reason), count in self.task_failures.items():
            outcomes[reason] += count
        return +outcomes
