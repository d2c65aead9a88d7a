"""The message on the retained renewal topic: the certificates that are due for renewal.

Not part of the Josev API. It is off by default, is published on a topic of the operator's choice, and has no answer.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from stationkey.contract.messages import EvseId
from stationkey.contract.profiles import CertificateType
from stationkey.contract.stations import MAX_STATION

MAX_DUE: Final = 32
"""Most certificates in a message, the first to expire first; the others are counted."""
EXAMPLE_TOPIC: Final = "cs/stationkey/renewal"

DueState = Literal["due", "expired"]


class DueCertificateData(Struct, frozen=True, kw_only=True):
    """A certificate that is due for renewal."""

    station: Annotated[str, Meta(max_length=MAX_STATION, description="In a site: the station.")] | UnsetType = UNSET
    certificate_type: CertificateType
    evse_id: EvseId | UnsetType = UNSET
    not_after: Annotated[
        str, Meta(description="End of the certificate (RFC 3339, UTC).", extra_json_schema={"format": "date-time"})
    ]
    state: Annotated[DueState, Meta(description="'expired' after its end.")]


class RenewalData(Struct, frozen=True, kw_only=True):
    """``data`` of a ``renewal`` update."""

    due: Annotated[tuple[DueCertificateData, ...], Meta(max_length=MAX_DUE, description="The first to expire first.")]
    more: Annotated[int, Meta(ge=0, description="How many are due beside these.")]


class RenewalUpdate(Struct, frozen=True, kw_only=True):
    """Tells subscribers which certificates are due for renewal; retained by the broker."""

    name: Literal["renewal"]
    type: Literal["update"]
    data: RenewalData


def renewal_update(due: tuple[tuple[CertificateType, str, str, DueState, str], ...]) -> bytes:
    """Return the message as JSON.

    Args:
        due: certificate type, EVSE ID or an empty text, end, state and station or an empty text of each certificate,
            the first to expire first.
    """
    named = tuple(
        DueCertificateData(
            station=station or UNSET, certificate_type=kind, evse_id=evse_id or UNSET, not_after=end, state=state
        )
        for kind, evse_id, end, state, station in due[:MAX_DUE]
    )
    data = RenewalData(due=named, more=len(due) - len(named))
    return msgspec.json.encode(RenewalUpdate(name="renewal", type="update", data=data))
