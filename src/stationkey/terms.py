"""How long keys and records last, and how many there may be. Values only; `stationkey.config` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

DAY: Final = 86_400_000
"""Milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many.

    Attributes:
        pending_limit: pending keys for one certificate type and EVSE. A CSMS may answer the first CSR after later ones
            were sent (OCTT TC_A_23), so it is more than one; eight are more than any retry scheme sends in a row.
        pending_total: pending keys in all. EVSE IDs come over MQTT, and there are many of them. Keys made
            ahead are none.
        history_limit: destroyed keys that stay on record: years of renewals, in a MiB or two.
    """

    pending_limit: int = 8
    pending_total: int = 256
    history_limit: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTerms:
    """Keys made ahead.

    Attributes:
        ec: how many of each elliptic curve; 0 for none.
        rsa: how many of the RSA size that the TPM makes; 0 for none.
        idle: seconds that nobody must have wanted anything of the key store, before it is made to work ahead.
        age: how long an unused one is kept, in milliseconds of running time.
    """

    ec: int = 0
    rsa: int = 0
    idle: float = 30.0
    age: int = 30 * DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How long, in milliseconds of running time: a station's clock may be years off until it has been set.

    Attributes:
        pending: of a key whose certificate does not come. A CSMS that lets a person sign takes days.
        failed: of a key after its certificate failed to install: time for another try.
        grace: of a key after it was replaced or retired: TLS sessions may still use it.
        answers: how long an id is remembered, or longer while its key is pending; nobody retries for so long.
        bounds: see `Bounds`.
    """

    pending: int = 30 * DAY
    failed: int = 1 * DAY
    grace: int = 7 * DAY
    answers: int = 90 * DAY
    bounds: Bounds = field(default_factory=Bounds)
