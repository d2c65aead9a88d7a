"""The ledger of a site, on PostgreSQL, asked as the daemon would ask it. Nothing is changed."""

from __future__ import annotations

from contextlib import closing

from stationkey.config.settings import Settings
from stationkey.doctor.report import Finding, failure, listed, ok, refusal, unknown, warning
from stationkey.errors import ConfigurationError, LedgerError


def look_at_site(settings: Settings) -> Finding:
    """Connect, and judge the server, the tables and who holds the shards.

    Its keys are not read one by one: there may be hundreds of thousands.
    """
    try:
        from stationkey.ledger.postgresql import connection, schema  # noqa: PLC0415 - the extra [site] is for sites
    except ModuleNotFoundError:
        return failure("no_extra", "the ledger is on PostgreSQL, and psycopg is missing", "install stationkey[site]")
    try:
        with closing(connection.connect(settings.ledger, settings.ledger_password, name="doctor")) as connected:
            schema.check(connected)
            with connection.explained("read"):
                shards, unheld = schema.shards(connected)
            server = connected.info.server_version // 10000
    except ConfigurationError as error:  # a credential of systemd's, most likely
        return unknown(error.message, error.hint, error.reason)
    except LedgerError as error:
        return judge_refusal(error)
    return judge_site(server, shards, unheld)


def judge_refusal(error: LedgerError) -> Finding:
    """Judge why the ledger cannot be used: nothing is lost if the daemon makes or migrates it."""
    if error.reason in {"ledger_missing", "ledger_older"} and not error.transient:
        return warning(error.reason, error.message, error.hint, stops=True)
    return refusal(error)


def judge_site(server: int, shards: int, unheld: list[int]) -> Finding:
    """Judge a ledger that can be used.

    Args:
        server: version of PostgreSQL.
        shards: how many there are.
        unheld: numbers of those that no daemon holds.
    """
    if unheld:
        told = f"no daemon holds {len(unheld)} of {shards} shards ({listed(map(str, unheld))}): nobody answers there"
        return warning("unheld", told, "start a daemon; stationkey status --site shows who runs", stops=True)
    told = f"the ledger is on PostgreSQL {server}, durable, and daemons hold all {shards} shards"
    return ok(
        told if shards else f"the ledger is on PostgreSQL {server}, durable; no daemon has started yet", stops=True
    )
