"""The library's face: what `from stationkey import …` gives."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import stationkey


@pytest.mark.parametrize("name", stationkey.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(import_module("stationkey"), name) is not None


def test_the_public_names_are_those_that_have_a_home() -> None:
    at_home = [name for names in stationkey._HOME.values() for name in names]  # noqa: SLF001 - the two lists are compared

    assert sorted(at_home) == sorted(set(at_home))
    assert {*at_home, "__version__"} == set(stationkey.__all__)


def test_the_type_checker_is_told_of_the_same_homes() -> None:
    """The lazy imports are a second copy of those under ``TYPE_CHECKING``; here the two are compared."""
    tree = ast.parse(Path(stationkey.__file__).read_text())
    told = {
        node.module.removeprefix("stationkey."): tuple(alias.name for alias in node.names)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stationkey.")
        if node.module != "stationkey._version"  # not lazy
    }

    assert told == stationkey._HOME  # noqa: SLF001 - as above


@pytest.mark.parametrize("module", stationkey._HOME)  # noqa: SLF001 - as above
def test_a_public_name_is_the_homes_own_object(module: str) -> None:
    home = import_module(f"stationkey.{module}")

    for name in stationkey._HOME[module]:  # noqa: SLF001 - as above
        assert getattr(stationkey, name) is getattr(home, name)


def test_the_docstring_names_each() -> None:
    """`help(stationkey)` shows it first."""
    assert set(re.findall(r"`(\w+)`", str(stationkey.__doc__))) == {*stationkey.__all__} - {"__version__"}


def test_dir_lists_the_public_names() -> None:
    assert dir(stationkey) == sorted(stationkey.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):  # words: which name
        _ = stationkey.no_such_name


def test_reading_a_request_loads_no_tpm_x509_or_mqtt_library() -> None:
    program = (
        "import sys\n"
        "from stationkey import MessageError, decode\n"
        "print(*sorted({'cryptography', 'stationkey.mqtt', 'tpm2_pytss', 'click'} & set(sys.modules)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ended.stdout == "\n"
