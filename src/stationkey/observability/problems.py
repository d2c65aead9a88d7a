"""Problems that the daemon knows without a check: the part of ``stationkey doctor`` that costs nothing."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from stationkey.ledger import Figures
from stationkey.ledger.overview import KeyGlance
from stationkey.observability.health import Health

_DOCTOR: Final = "run stationkey doctor on the station; the log has the reason"
_RENEW: Final = "have Josev renew them; stationkey request requests a CSR by hand"


class Problem(Struct, frozen=True):
    """A problem that needs the operator's attention.

    Attributes:
        words: the problem.
        advice: what to do.
        serious: whether requests fail now; else it is a notice.
    """

    words: str
    advice: str
    serious: bool = False


def problems(health: Health, figures: Figures | None, keys: tuple[KeyGlance, ...]) -> list[Problem]:
    """Return the problems, the serious ones first.

    Args:
        health: knows the parts.
        figures: of the ledger, if it can be read.
        keys: the keys that are not destroyed.
    """
    condition, service = health.condition(), health.service
    abandoned = sum(store.thread.abandoned for store in health.keystores)
    unconfigured = 0 if service is None else service.counters.unconfigured
    left_behind = 0 if service is None else service.counters.left_behind
    unusable = 0 if service is None else service.counters.unusable - unconfigured
    not_shown = [] if service is None else service.counters.not_shown.items()
    unknown = 0 if figures is None else figures.unknown
    failed = sum(key.failed for key in keys)
    rows: list[tuple[object, Problem]] = [
        (condition.stopping, Problem("stopping: finishing requests in flight", "", serious=True)),
        (not condition.connected, Problem(f"no connection to the broker {condition.broker}", _DOCTOR, serious=True)),
        *(
            (store.last is None, Problem(f"{condition.called(store)} has not answered yet", "", serious=True))
            for store in condition.stores
        ),
        *((True, Problem(trouble, _DOCTOR, serious=True)) for trouble in condition.troubles),
        (
            not all(store.uri.scheme.protected for store in health.keystores),
            Problem(
                "software keys: anyone who can read the state directory can copy them",
                "use a TPM on a station in service",
            ),
        ),
        (abandoned, Problem(f"hung calls to the key store: {abandoned}", _DOCTOR)),
        (
            unusable,
            Problem(
                f"unusable keys: {unusable}",
                "is it another TPM, or was it cleared? docs/operations.md says what to do",
            ),
        ),
        (
            unconfigured,
            Problem(
                f"keys in a key store that the configuration does not name: {unconfigured}",
                "name it in [keystores], and in [keystore_for] existing_keys; the log says which",
            ),
        ),
        (
            left_behind,
            Problem(
                f"destroyed keys still in a key store that the configuration does not name: {left_behind}",
                "name it in [keystore_for] existing_keys until they are gone; docs/pkcs11.md has more",
            ),
        ),
        *(
            (count, Problem(f"active/ could not be written {count} times ({reason})", _DOCTOR))
            for (reason,), count in not_shown
        ),
        (condition.expired, Problem(f"expired certificates of active keys: {condition.expired}", _RENEW)),
        (condition.due, Problem(f"certificates due for renewal: {condition.due}", _RENEW)),
        (
            condition.clock_behind,
            Problem("the clock is before the newest certificate: renewal is not watched", "set the clock"),
        ),
        (
            unknown,
            Problem(
                f"active keys whose expiry is not shown: {unknown}",
                "set [josev] certificate_dir, so that their certificates can be read",
            ),
        ),
        (failed, Problem(f"keys whose certificate could not be installed: {failed}", "the log of Josev says why")),
    ]
    return sorted((problem for there, problem in rows if there), key=lambda problem: not problem.serious)
