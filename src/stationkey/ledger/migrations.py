"""The schema of the database, version by version. A released version never changes; add a new one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from stationkey.contract.profiles import CertificateType

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

_VERSION_3: Final = """
DROP INDEX key_by_owner;
DROP INDEX key_by_state;
DROP INDEX key_due;
DROP INDEX answer_undelivered;
DROP INDEX answer_by_key;
DROP INDEX event_by_key;
DROP INDEX event_by_message;
ALTER TABLE key RENAME TO key_2;
ALTER TABLE answer RENAME TO answer_2;
ALTER TABLE event RENAME TO event_2;
CREATE TABLE key (
    number            INTEGER PRIMARY KEY,
    key_id            TEXT NOT NULL UNIQUE,
    scheme            TEXT NOT NULL,
    key_type          TEXT NOT NULL,
    certificate_type  TEXT NOT NULL DEFAULT '',
    evse_id           TEXT NOT NULL DEFAULT '',
    algorithm         TEXT NOT NULL DEFAULT '',
    common_name       TEXT NOT NULL DEFAULT '',
    organization_name TEXT NOT NULL DEFAULT '',
    country_name      TEXT NOT NULL DEFAULT '',
    state             TEXT NOT NULL,
    created_at        INTEGER NOT NULL,
    public            BLOB NOT NULL,
    due               INTEGER,
    failed            INTEGER NOT NULL DEFAULT 0,
    chain             TEXT,
    not_after         INTEGER,
    asked             INTEGER,
    installed         INTEGER,
    deleted           INTEGER,
    ended             INTEGER
) STRICT;
CREATE TABLE secret (
    key_number INTEGER PRIMARY KEY,
    private    BLOB NOT NULL
) STRICT;
CREATE TABLE answer (
    key_number   INTEGER PRIMARY KEY REFERENCES key (number),
    canonical_id TEXT NOT NULL UNIQUE,
    request_id   TEXT NOT NULL,
    digest       BLOB NOT NULL,
    csr          TEXT NOT NULL,
    answered_at  INTEGER NOT NULL,
    running      INTEGER NOT NULL,
    delivered    INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE event (
    seq        INTEGER PRIMARY KEY,
    key_number INTEGER NOT NULL REFERENCES key (number),
    at         INTEGER NOT NULL,
    event      TEXT NOT NULL,
    state      TEXT NOT NULL,
    reason     TEXT NOT NULL,
    message_id TEXT
) STRICT;
INSERT INTO key (key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name, organization_name,
        country_name, state, created_at, public, due, failed, chain, not_after, asked, installed, deleted, ended)
    SELECT key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name, organization_name,
        country_name, key_2.state, created_at, public, due, failed, chain, not_after, min(seq),
        max(seq) FILTER (WHERE event = 'installed'), max(seq) FILTER (WHERE event = 'deleted'),
        CASE key_2.state WHEN 'destroyed' THEN
            row_number() OVER (PARTITION BY key_2.state = 'destroyed' ORDER BY max(seq)) END
    FROM key_2 LEFT JOIN event_2 USING (key_id) GROUP BY key_id ORDER BY min(seq);
INSERT INTO secret SELECT number, private FROM key JOIN key_2 USING (key_id) WHERE private IS NOT NULL;
INSERT INTO answer SELECT number, canonical_id, request_id, digest, csr, answered_at, running, delivered
    FROM answer_2 JOIN key USING (key_id);
INSERT INTO event SELECT seq, number, at, event, event_2.state, reason, message_id
    FROM event_2 JOIN key USING (key_id) ORDER BY seq;
DROP TABLE event_2;
DROP TABLE answer_2;
DROP TABLE key_2;
CREATE INDEX key_living ON key (state, certificate_type, evse_id, asked, due) WHERE state != 'destroyed';
CREATE INDEX key_installed ON key (certificate_type, evse_id, deleted) WHERE installed IS NOT NULL;
CREATE INDEX key_ended ON key (ended) WHERE ended IS NOT NULL;
CREATE INDEX answer_by_age ON answer (delivered, running);
CREATE INDEX event_by_key ON event (key_number);
CREATE INDEX event_by_message ON event (message_id) WHERE message_id IS NOT NULL AND event != 'CSR answered';
"""
"""Every answer pays for each index, so there are few, and most contain living keys only.

Other tables refer to a key by `number`, in order of creation, so that new rows are neighbours. `asked`, `installed` and
`deleted` are sequence numbers of the key's events; `ended` counts destroyed keys without gaps, because only the oldest
are deleted. `secret` has no foreign key, so that SQLite empties it page by page for `Retention.wipe`.
"""

_VERSION_4: Final = """
ALTER TABLE key ADD COLUMN root TEXT NOT NULL DEFAULT '';
ALTER TABLE key ADD COLUMN previous INTEGER NOT NULL DEFAULT 0;
ALTER TABLE key ADD COLUMN confirmed INTEGER;
ALTER TABLE key ADD COLUMN useful_until INTEGER;
UPDATE key SET useful_until = 31536000000
    + coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'running'), 0)
    WHERE state IN ('active', 'deactivated');
UPDATE key SET previous = 1, confirmed = installed WHERE number IN (
    SELECT number FROM (
        SELECT number, row_number() OVER (PARTITION BY certificate_type, evse_id ORDER BY max(seq) DESC) AS place
        FROM key JOIN event ON key_number = number
        WHERE key.state = 'deactivated' AND event = 'replaced' GROUP BY number
    ) WHERE place = 1
);
CREATE UNIQUE INDEX key_previous ON key (certificate_type, evse_id, root) WHERE previous = 1;
"""
"""`previous` marks the key that an owner can go back to. `confirmed` is a sequence number of an event. `useful_until`
is the running time in milliseconds at which the certificate has certainly expired; a year for those of older versions.
"""

_VERSION_5: Final = "ALTER TABLE rejection ADD COLUMN name TEXT NOT NULL DEFAULT 'generate_csr';\n"
"""`name` is that of the message: a status that changed nothing is on record too."""

_VERSION_6: Final = """
ALTER TABLE key ADD COLUMN station TEXT NOT NULL DEFAULT '';
ALTER TABLE key ADD COLUMN hint TEXT;
ALTER TABLE rejection ADD COLUMN station TEXT NOT NULL DEFAULT '';
UPDATE key SET hint = (SELECT value FROM meta WHERE name = 'renewal hint ' || key_id) WHERE state = 'active';
DELETE FROM meta WHERE name > 'renewal hint ' AND name < 'renewal hint ~';
DROP INDEX answer_by_age;
ALTER TABLE answer RENAME TO answer_5;
CREATE TABLE answer (
    key_number   INTEGER PRIMARY KEY REFERENCES key (number),
    station      TEXT NOT NULL,
    canonical_id TEXT NOT NULL,
    request_id   TEXT NOT NULL,
    digest       BLOB NOT NULL,
    csr          TEXT NOT NULL,
    answered_at  INTEGER NOT NULL,
    running      INTEGER NOT NULL,
    delivered    INTEGER NOT NULL DEFAULT 0,
    UNIQUE (station, canonical_id)
) STRICT;
INSERT INTO answer SELECT key_number, '', canonical_id, request_id, digest, csr, answered_at, running, delivered
    FROM answer_5 ORDER BY key_number;
DROP TABLE answer_5;
DROP INDEX key_living;
DROP INDEX key_installed;
DROP INDEX key_ended;
DROP INDEX key_previous;
CREATE INDEX key_living ON key (state, station, certificate_type, evse_id, asked, due)
    WHERE state != 'destroyed';
CREATE INDEX key_installed ON key (station, certificate_type, evse_id, deleted) WHERE installed IS NOT NULL;
CREATE INDEX key_ended ON key (station, ended) WHERE ended IS NOT NULL;
CREATE INDEX key_hint ON key (number) WHERE hint IS NOT NULL;
CREATE UNIQUE INDEX key_previous ON key (station, certificate_type, evse_id, root) WHERE previous = 1;
CREATE INDEX answer_by_age ON answer (delivered, running);
"""
"""`station` is empty for a single station. `ended` counts the destroyed keys of each station, and `hint` is the last
renewal hint of a key."""

MIGRATIONS: Final = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4, _VERSION_5, _VERSION_6)
"""Entry n takes a database from version n to n + 1; version 0 is empty."""
SCHEMA_VERSION: Final = len(MIGRATIONS)
"""The ``user_version`` that this code reads and writes."""


def of_types(types: Collection[str]) -> tuple[str, dict[str, str]]:
    """Return a condition for keys of some certificate types, and its named arguments; for all, that a key has one."""
    if set(types) == set(CertificateType):
        return "certificate_type > ''", {}
    named = {f"type_{number}": str(kind) for number, kind in enumerate(types)}
    return f"certificate_type IN ({', '.join(f':{name}' for name in named)})", named


LIVING: Final = "state != 'destroyed'"
"""Condition of living keys, written as in the index `key_living`, which SQLite otherwise does not use."""
