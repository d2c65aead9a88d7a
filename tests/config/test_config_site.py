"""The options of a site, and what they cannot be together."""

from __future__ import annotations

from pathlib import Path

import pytest

from stationkey.config.file import read_file, read_parts, settle
from stationkey.config.settings import Settings
from stationkey.errors import ConfigurationError

pytest_plugins = ["config_files"]

LEDGER = 'ledger = "postgresql://u@db/stations"\n'
SITE = '[site]\nstations = "depot7/+"\n'


def settings(file: Path, text: str) -> Settings:
    file.write_text(text)
    return settle(read_file(file), keystore="software:")


def refused(file: Path, text: str) -> str:
    """What a file is refused by, in words."""
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_file(file)
    assert caught.value.reason == "config_invalid"
    return caught.value.message


def test_without_a_site_there_is_one_station_with_sqlite(file: Path) -> None:
    plain = settings(file, "")

    assert (plain.site.stations, plain.site.shards, plain.ledger, plain.ledger_password) == ((), 1, "", None)
    assert plain.pool.rsa == 1


def test_a_pattern_may_be_a_text_or_a_list(file: Path) -> None:
    assert settings(file, SITE).site.stations == ("depot7/+",)
    assert settings(file, '[site]\nstations = ["a/+", "b"]\n').site.stations == ("a/+", "b")
    assert settings(file, '[site]\nstations = ""\n').site.stations == ()


@pytest.mark.parametrize(
    "stations",
    [
        *('"#"', '"a/#"', '"$SYS/+"', '"a+"', '"a//+"', '"/a"', '"a/"', r'"a\u0007"', '["a", ""]', f'"{"é" * 33}"'),
        *('["a/+", "a/+"]', '["a/+", "+/b"]', '["a/+/c", "a/b/+"]', "5"),
    ],
)
def test_patterns_that_name_no_stations_or_one_twice_are_refused(file: Path, stations: str) -> None:
    assert "site.stations" in refused(file, f"[site]\nstations = {stations}\n")


def test_patterns_of_other_depths_or_other_names_go_together(file: Path) -> None:
    patterns = ("+", "+/+", "a/+/c", "b/+/c", "a/b/d")

    assert settings(file, f"[site]\nstations = {list(patterns)}\n").site.stations == patterns


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://stationkey@db.local:5432/stations?sslmode=verify-full&sslrootcert=system",
        "postgres://u@one:5432,two:5433/stations?target_session_attrs=read-write",
        "postgresql://u@/stations?host=/run/postgresql",
        "postgresql://u@[::1]:5432/stations",
    ],
)
def test_a_ledger_is_a_database_of_postgresql(file: Path, uri: str) -> None:
    assert settings(file, f'ledger = "{uri}"\n{SITE}').ledger == uri


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///x",
        "db.local/stations",
        "postgresql://db.local/stations",
        "postgresql://u@db.local",
        "postgresql://u@db.local/stations?options=-c%20synchronous_commit%3Doff",
        "postgresql://u@[db/stations",
    ],
)
def test_a_text_that_is_no_database_is_refused(file: Path, uri: str) -> None:
    assert "ledger" in refused(file, f'ledger = "{uri}"\n{SITE}')


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://u:hunter2@db/stations",
        "postgresql://u:hunter2/@db/stations",
        "postgresql://u@db/stations?password=hunter2",
        "postgresql://u@db/stations?sslpassword=hunter2",
        "postgresql://u:hunter2@[db/stations",
        "postgresql://u:hunter2@d\u2100b/stations",
    ],
)
def test_a_password_in_the_uri_is_refused_and_shown_nowhere(file: Path, uri: str) -> None:
    assert "hunter2" not in refused(file, f'ledger = "{uri}"\n{SITE}')


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"{SITE}shards = 2\n", "site.shards"),
        (f"{LEDGER}{SITE}shards = 257\n", "site.shards"),
        (f"{LEDGER}{SITE}lease_seconds = 1\n", "site.lease_seconds"),
        ("[site]\nshards = 2\n", "[site]"),
        (LEDGER, "ledger"),
        (f'ledger_password_file = "/x"\n{SITE}', "ledger_password_file"),
        (f"{LEDGER}{SITE}[pool]\nrsa = 1\n", "pool.rsa"),
        (f"{SITE}[pool]\nec = 2\n", "pool.ec"),
        (f"{LEDGER}{SITE}shards = 4\n[lifecycle]\npending_in = {{ default = 3 }}\n", "lifecycle.pending_in"),
        (f'{LEDGER}{SITE}[tpm]\nkey_auth = "generated"\n', "tpm.key_auth"),
        (f'{SITE}[josev]\ncertificate_dir = "/josev"\n', "josev.certificate_dir"),
    ],
)
def test_options_that_contradict_each_other_are_refused(file: Path, text: str, place: str) -> None:
    assert place in refused(file, text)
    assert read_parts(file).complaints


def test_one_daemon_for_a_site_may_have_a_generated_value(file: Path) -> None:
    assert settings(file, f'{SITE}[tpm]\nkey_auth = "generated"\n').tpm.key_auth == "generated"


def test_the_shards_divide_the_room_of_a_token(file: Path) -> None:
    limits = "[lifecycle]\npending_total = 9\npending_in = { default = 30 }\n"
    site = settings(file, f"{LEDGER}{SITE}shards = 4\n{limits}").bounds_of("v2g_certificate")
    single = settings(file, limits).bounds_of("v2g_certificate")

    assert (site.pending_of_shard, site.pending_total) == (7, 7)
    assert (single.pending_of_shard, single.pending_total) == (None, 30)


def test_a_bound_on_all_stations_is_a_sites(file: Path) -> None:
    text = f"{SITE}active_keys = 600\n"

    assert settings(file, text).bounds_of("v2g_certificate").active_of_site == 600
    assert settings(file, "").bounds_of("v2g_certificate").active_of_site == 0


def test_a_site_has_shards_a_lease_and_no_keys_made_ahead(file: Path) -> None:
    text = f'{LEDGER}ledger_password_file = "credential:db"\n{SITE}shards = 8\nlease_seconds = 4\n[pool]\nrsa = 0\n'
    site = settings(file, text)

    assert (site.site.shards, site.site.lease_seconds) == (8, 4.0)
    assert site.ledger_password is not None
    assert site.ledger_password.source == "credential:db"
    assert (site.pool.ec, site.pool.rsa) == (0, 0)
