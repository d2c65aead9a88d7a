"""``stationkey serve``, in which each task fails the first time, by the error that the first argument names.

The second time each works, and says so in the log.
"""

from __future__ import annotations

import builtins
import logging
import sys
from typing import Any, Final

from stationkey import cli
from stationkey.mqtt import gateway
from stationkey.mqtt.connection import MqttConnection
from stationkey.mqtt.gateway import MqttEdge
from stationkey.mqtt.retained import RetainedTopic
from stationkey.observability.health import Health
from stationkey.service.expiry import Expiry
from stationkey.service.pool import KeyPool
from stationkey.service.rejections import Rejections
from stationkey.service.renewal import RenewalWatch
from stationkey.service.requests import StationKeyService

FAULTS: Final[dict[str, tuple[Any, str]]] = {
    "sweep": (Expiry, "sweep"),
    "tell-unusable": (Expiry, "tell_unusable"),
    "learn-ids": (StationKeyService, "learn_ids"),
    "make-ahead": (KeyPool, "_fill"),
    "renewal-watch": (RenewalWatch, "look"),
    "record-rejections": (Rejections, "_write"),
    "watchdog": (Health, "_probe"),
    "status": (Health, "figures"),
    "mqtt": (MqttEdge, "_receive"),
    "deliver-recorded": (StationKeyService, "undelivered"),
    "retained": (RetainedTopic, "keep"),
    "answer": (gateway, "decode"),
    "keepalive": (MqttConnection, "_look_for_life"),
}
"""By task, what fails in it."""


def failing(task: str, owner: Any, name: str, error: type[Exception]) -> None:
    """Let a function fail once."""
    original = getattr(owner, name)
    calls = 0

    def call(*arguments: Any, **others: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise error(f"injected into {task}")
        if calls == 2:
            logging.getLogger(__name__).info("works again", extra={"task": task})
        return original(*arguments, **others)

    setattr(owner, name, call)


if __name__ == "__main__":
    raised = getattr(builtins, sys.argv.pop(1))
    for task, (owner, name) in FAULTS.items():
        failing(task, owner, name, raised)
    cli.main(prog_name="stationkey")
