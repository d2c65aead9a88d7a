"""The tables of what a site's daemons have in tokens, and of the devices that the site's keys are in."""

from __future__ import annotations

from typing import Final

SCHEMA: Final = """
CREATE TABLE token_key (
    id    text PRIMARY KEY,
    token text NOT NULL,
    maker text,
    ended timestamptz,
    look  timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX token_key_ended ON token_key (token, ended) WHERE ended IS NOT NULL;
CREATE TABLE keystore (
    identity text,
    instance text,
    noted    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (identity, instance)
);
CREATE FUNCTION token_key_uri(private bytea) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN position('pkcs11:'::bytea IN private) > 0
        THEN encode(substring(private FROM position('pkcs11:'::bytea IN private)), 'escape') END
$$;
CREATE FUNCTION token_of(private bytea) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT split_part(stationkey.token_key_uri(private), ';id=', 1)
$$;
CREATE FUNCTION token_key_id(private bytea) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT replace(split_part(split_part(stationkey.token_key_uri(private), ';id=', 2), ';', 1), '%', '')
$$;
CREATE FUNCTION token_key_recorded() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM stationkey.token_key WHERE id = stationkey.token_key_id(NEW.private) AND ended IS NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'a key in a token was given up before it was recorded' USING ERRCODE = 'SK001';
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION token_key_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO stationkey.token_key (id, token, ended, look)
        VALUES (stationkey.token_key_id(OLD.private), stationkey.token_of(OLD.private),
            clock_timestamp(), clock_timestamp() + interval '1 minute');
    RETURN NULL;
END $$;
CREATE TRIGGER token_key_recorded AFTER INSERT ON secret
    FOR EACH ROW WHEN (token_of(NEW.private) IS NOT NULL) EXECUTE FUNCTION token_key_recorded();
CREATE TRIGGER token_key_ended AFTER DELETE ON secret
    FOR EACH ROW WHEN (token_of(OLD.private) IS NOT NULL) EXECUTE FUNCTION token_key_ended();
"""
"""A row of `token_key` is a key in doubt: reserved for a daemon (`maker`) that may make and record it, or `ended`.

`id` is its CKA_ID, `token` the URI of its token. A living key has no row: the transaction that records it deletes it,
and the one that destroys it makes one again. An ended key can never be recorded, so it may be destroyed in the token;
`look` is when it is looked for there next. To record it raises SK001. All of it is found without reading every key.

A row of `keystore` says that a daemon (`instance`) uses, or used, a device.
"""
