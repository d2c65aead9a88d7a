"""The ledger that a command reads or changes beside the daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from stationkey.config.settings import Settings
from stationkey.ledger import Ledger
from stationkey.system.state_dir import DATABASE_NAME, visit


@contextmanager
def opened_ledger(settings: Settings, *, write: bool = False) -> Iterator[Ledger]:
    """Open the ledger of a site on PostgreSQL, or that of a state directory; root acts as its owner meanwhile."""
    with ExitStack() as stack:
        if settings.ledger:
            yield stack.enter_context(closing(_of_site(settings)))
            return
        directory = settings.state_dir
        if os.path.exists(directory):  # noqa: PTH110 - Path.exists raises if the parent directory is closed to this user
            directory = stack.enter_context(visit(directory))
        yield stack.enter_context(closing(Ledger(directory / DATABASE_NAME, read_only=not write, make=False)))


def _of_site(settings: Settings) -> Ledger:
    from stationkey.ledger.postgresql.engine import PostgresqlDatabase  # noqa: PLC0415 - the extra [site] is for sites

    uri, password = settings.ledger, settings.ledger_password
    return Ledger.on(PostgresqlDatabase(uri, password, directory=settings.state_dir, name="command"))
