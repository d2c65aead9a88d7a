"""Messages for tests, right ones that can be made wrong."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]

REQUEST_ID = "123e4567-e89b-12d3-a456-426614174000"

PAGE_REQUEST = b"""{"id": "123e4567-e89b-12d3-a456-426614174000", "name": "generate_csr", "type": "request",
 "data": {"certificate_type": "charging_station_certificate", "common_name": "9783161484100",
          "organization_name": "EcoG", "country_name": "DE",
          "algorithm": "ECDSA_SHA256", "evse_id": "DE*SEV*E123456789"}}"""


def wire(document: object) -> bytes:
    """JSON as Josev sends it. Half characters become escapes, which is how they come over the wire."""
    return json.dumps(document).encode()


NAMES = ("common_name", "organization_name")
