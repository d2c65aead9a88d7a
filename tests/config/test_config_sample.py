"""The sample of a configuration file names every option, and changes nothing."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from config_files import OVERRIDES
from msgspec import Meta
from msgspec.structs import fields

from stationkey.config.file import read_file, settle
from stationkey.config.options import options_of
from stationkey.config.settings import (
    DEFAULT_DEVICE,
    Bounds,
    Deadlines,
    MqttTerms,
    PolicyTerms,
    PoolTerms,
    Settings,
    Terms,
    TpmTerms,
)
from stationkey.config.site import SiteTerms
from stationkey.contract.profiles import CertificateType

pytest_plugins = ["config_files"]


SAMPLE = Path(__file__).parents[2] / "packaging" / "stationkey.toml"


OPTIONS = {option.place: option for option in options_of(Settings)}


@pytest.mark.parametrize("place", OPTIONS)
def test_an_option_says_what_it_does_and_has_a_type(place: str) -> None:
    declared = OPTIONS[place]

    assert declared.option.help.endswith(".")
    with pytest.raises(ValueError, match="Expected"):  # words: what a person is told
        declared.read(dt.date(2026, 1, 1))


@pytest.mark.parametrize(
    "kind", [Settings, Deadlines, Bounds, Terms, PoolTerms, PolicyTerms, TpmTerms, MqttTerms, SiteTerms]
)
def test_every_field_is_an_option_or_is_known_to_be_none(kind: type) -> None:
    declared = {option.path[-1] for option in options_of(kind)} | {option.path[0] for option in options_of(kind)}
    others = {field.name for field in fields(kind)} - declared

    assert others <= {"active_of_site", "pending_of_shard", "profiles", "shards", "tcti", "types"}


def without_comment_marks(text: str) -> str:
    """An option or a table has its mark at once before it; prose has a space behind the mark."""
    return re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE)


def test_the_sample_changes_nothing_as_it_is_shipped() -> None:
    assert read_file(SAMPLE) == {}


def test_the_sample_names_every_option_with_its_default(file: Path) -> None:
    file.write_text(without_comment_marks(SAMPLE.read_text()))
    table = tomllib.loads(file.read_text())

    profiles = table.pop("csr")
    flat = {
        f"{name}.{inner}" if name not in OPTIONS else name: value
        for name, value in table.items()
        for inner in (value if name not in OPTIONS else [""])
    }
    assert set(flat) == set(OPTIONS)
    assert list(profiles) == list(CertificateType)
    for overrides in profiles.values():
        assert list(overrides) == list(OVERRIDES)
    device = f"tpm2:device:{DEFAULT_DEVICE}"
    assert table["keystore"] == device
    assert settle(read_file(file)) == settle({}, keystore=device)


def explained(place: str) -> str:
    """What the sample says of an option: the comment above it, and the one above its table."""
    table, _, name = place.rpartition(".")
    texts, said, at = dict[str, str](), "", ""
    for line in SAMPLE.read_text().splitlines():
        if line.startswith("# "):
            said += line[1:]
        elif found := re.match(r"#\[(.*)\]|#(\w+) = ", line):
            at = found[1] or at
            texts[at if found[1] else f"{at}.{found[2]}".removeprefix(".")] = said
        else:
            said = ""
    return texts.get(table, "") + texts[place] if name else texts[place]


def bounds_in(written: object) -> Iterator[str]:
    """The bounds of a type, and the texts that it is a choice of, as people write them."""
    if get_origin(written) is Literal:
        yield from (f'"{choice}"' for choice in get_args(written))
    for part in get_args(written):
        if isinstance(part, Meta):
            if isinstance(part.le, int | float) and part.le < 0x80000000:  # a handle
                yield f"{part.le:g}" if isinstance(part.le, float) else str(part.le)
        elif not isinstance(part, str):
            yield from bounds_in(part)


@pytest.mark.parametrize("place", OPTIONS)
def test_the_sample_says_the_bounds_and_the_choices_of_an_option(place: str) -> None:
    assert [bound for bound in bounds_in(OPTIONS[place].written) if bound not in explained(place)] == []


def test_the_sample_says_something_about_every_option() -> None:
    lines = SAMPLE.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if re.match(r"#(\w|\[)", line)]

    assert options
    assert all(lines[number - 1].startswith("# ") for number in options)
