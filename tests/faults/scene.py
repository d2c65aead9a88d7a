"""A daemon between its peers, and Josev's place taken by an asker."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from asker import Asker
from peers import Mosquitto
from rig import Rig

from stationkey.contract.messages import GenerateCsrRequest

CONFIG: Final = """\
[policy]
requests_per_minute = 0
[deadlines]
ec = 2.0
rsa = 20.0
[lifecycle]
pending_limit = 100
pending_total = 10000
"""
"""Bounds so wide that no key of a test has to make room for another, a deadline that a test can wait for, and no limit
on how often a test may ask."""


class Scene(Rig):
    """A rig with an asker."""

    def __init__(self, folder: Path, *, tpm: bool, keystore: str = "", broker: Mosquitto | None = None) -> None:
        super().__init__(folder, tpm=tpm, keystore=keystore, config=CONFIG, broker=broker)
        self.asker = Asker(self.broker)

    def peers(self) -> list[contextlib.AbstractContextManager[Any]]:
        return [*super().peers(), self.asker]

    def frozen_in_hand(self) -> GenerateCsrRequest:
        """A request that is in hand while the TPM is frozen; it has all the time that it wants."""
        self.config.write_text("")
        self.daemon.start()
        served, request = self.asker.request(), self.asker.request()
        self.asker.ask(served)
        self.tpm.freeze()
        self.asker.publish(request)
        self.asker.ask(served)  # needs no key and comes after the other, so that one is in hand
        return request
