"""The ledger's database, version by version. A version that was released is never changed; a new one is added."""

from __future__ import annotations

from typing import Final

_VERSION_1: Final = """
CREATE TABLE key (
    key_id            TEXT PRIMARY KEY,
    scheme            TEXT NOT NULL,
    key_type          TEXT NOT NULL,
    certificate_type  TEXT NOT NULL,
    evse_id           TEXT NOT NULL DEFAULT '',
    algorithm         TEXT NOT NULL,
    common_name       TEXT NOT NULL,
    organization_name TEXT NOT NULL,
    country_name      TEXT NOT NULL,
    state             TEXT NOT NULL,
    created_at        INTEGER NOT NULL,
    public            BLOB NOT NULL,
    private           BLOB
) STRICT;
CREATE INDEX key_by_owner ON key (certificate_type, evse_id, state, created_at);
CREATE TABLE answer (
    canonical_id TEXT PRIMARY KEY,
    request_id   TEXT NOT NULL,
    digest       BLOB NOT NULL,
    key_id       TEXT NOT NULL REFERENCES key (key_id),
    csr          TEXT NOT NULL,
    answered_at  INTEGER NOT NULL,
    delivered    INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX answer_undelivered ON answer (answered_at) WHERE delivered = 0;
CREATE TABLE rejection (
    seq        INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL,
    reason     TEXT NOT NULL,
    message    TEXT NOT NULL,
    at         INTEGER NOT NULL
) STRICT;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""

_VERSION_2: Final = """
ALTER TABLE key ADD COLUMN due INTEGER;
ALTER TABLE key ADD COLUMN failed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE key ADD COLUMN chain TEXT;
ALTER TABLE key ADD COLUMN not_after INTEGER;
ALTER TABLE answer ADD COLUMN running INTEGER NOT NULL DEFAULT 0;
CREATE INDEX key_by_state ON key (state);
CREATE INDEX key_due ON key (due) WHERE due IS NOT NULL;
CREATE INDEX answer_by_key ON answer (key_id);
CREATE TABLE event (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    key_id     TEXT NOT NULL REFERENCES key (key_id),
    at         INTEGER NOT NULL,
    event      TEXT NOT NULL,
    state      TEXT NOT NULL,
    reason     TEXT NOT NULL,
    message_id TEXT
) STRICT;
CREATE INDEX event_by_key ON event (key_id, seq);
CREATE INDEX event_by_message ON event (message_id) WHERE message_id IS NOT NULL;
INSERT INTO event (key_id, at, event, state, reason)
    SELECT key_id, created_at, 'CSR answered', state, '' FROM key ORDER BY created_at, key_id;
"""

MIGRATIONS: Final = (_VERSION_1, _VERSION_2)
"""What makes a database of version n one of version n + 1; the first makes an empty one."""
SCHEMA_VERSION: Final = len(MIGRATIONS)
"""``user_version`` of the database that this code reads and writes."""
