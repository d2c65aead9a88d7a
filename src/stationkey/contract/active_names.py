"""The names of the files under ``active/``: one for each certificate type and EVSE."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote, unquote

DIRECTORY_NAME: Final = "active"
_SUFFIX: Final = ".pem"

Owner = tuple[str, str]
"""Certificate type and EVSE ID, the latter empty where there is none: what there is one active key for."""


def file_name(owner: Owner) -> str:
    """``<certificate_type>[.<evse_id>].pem``.

    In the EVSE ID, all but letters, digits, ``_``, ``-`` and ``~`` is percent-encoded, so that it has neither dot nor
    slash and can be read back (`owner_of`).
    """
    certificate_type, evse_id = owner
    encoded = "." + quote(evse_id, safe="").replace(".", "%2E") if evse_id else ""
    return f"{certificate_type}{encoded}{_SUFFIX}"


def owner_of(name: str) -> Owner | None:
    """Whose file `name` is; None where it is no name that `file_name` gives."""
    if not name.endswith(_SUFFIX):
        return None
    certificate_type, _, encoded = name.removesuffix(_SUFFIX).partition(".")
    try:
        owner = (certificate_type, unquote(encoded, errors="strict"))
        return owner if file_name(owner) == name else None
    except UnicodeError:  # half characters, and bytes that are no UTF-8
        return None
