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
CREATE FUNCTION token_key_of(private bytea, OUT id text, OUT token text) LANGUAGE sql IMMUTABLE AS $$
    SELECT replace(found[2], '%', ''), found[1]
    FROM regexp_match(encode(private, 'escape'), '(pkcs11:.*);id=((?:%[0-9a-f][0-9a-f])+);type=private') AS found
$$;
CREATE FUNCTION token_key_recorded() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    made text := (token_key_of(NEW.private)).id;
BEGIN
    DELETE FROM token_key WHERE id = made AND ended IS NULL;
    IF made IS NOT NULL AND NOT FOUND THEN
        RAISE EXCEPTION 'key % was given up before it was recorded', made USING ERRCODE = 'SK001';
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION token_key_ended() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO token_key (id, token, ended, look)
        SELECT id, token, clock_timestamp(), clock_timestamp() + interval '1 minute'
        FROM token_key_of(OLD.private) WHERE id IS NOT NULL;
    RETURN NULL;
END $$;
CREATE TRIGGER token_key_recorded AFTER INSERT ON secret FOR EACH ROW EXECUTE FUNCTION token_key_recorded();
CREATE TRIGGER token_key_ended AFTER DELETE ON secret FOR EACH ROW EXECUTE FUNCTION token_key_ended();
"""
"""A row of `token_key` is a key in doubt: reserved for a daemon (`maker`) that may make and record it, or `ended`.

`id` is its CKA_ID, `token` the URI of its token. A living key has no row: the transaction that records it deletes it,
and the one that destroys it makes one again. An ended key can never be recorded, so it may be destroyed in the token;
`look` is when it is looked for there next. To record it raises SK001. All of it is found without reading every key.

A row of `keystore` says that a daemon (`instance`) uses, or used, a device.
"""
