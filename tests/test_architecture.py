"""Imports run one way, and each library has one home.

A package is imported by rows below its own only; inside it, any module may use any other, without circles. What an
import costs nothing and binds nothing, under ``TYPE_CHECKING``, may also be of the same row. The package itself
imports the version alone, and nothing in it imports the package: see `test_nothing_imports_the_front_door`.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

import click
import pytest

import stationkey
from stationkey.cli import _EXTRAS

PACKAGE = Path(stationkey.__file__).parent
PROJECT = Path(__file__).parent.parent / "pyproject.toml"

ROWS: list[set[str]] = [
    {"_version", "errors"},
    # The wire with Josev as data; a judge of its own, see below; what the operating system is asked.
    {"attestation", "contract", "system"},
    {"config", "x509"},
    {"keystore", "mqtt"},
    {"ledger"},  # gives keys back as the key store knows them
    {"service"},
    {"observability", "openssl", "simulators"},
    {"daemon", "doctor"},  # the composition root is given its configuration; the doctor looks at all of it
    {"site"},  # the same daemon, with several of its parts
    {"given"},  # by command line, environment and file
    {"serving"},  # `serve`, without the library of the command line
    {"cli"},
    {"__main__"},
]
"""Packages, and the few modules that stand beside them."""
ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row}

HOMES: dict[str, set[str]] = {
    "click": {"cli"},
    "rich": {"cli"},
    "tpm2_pytss": {"keystore.tpm2", "doctor.tpm"},  # the doctor asks, and changes nothing: the key store may not
    "pkcs11": {"keystore.pkcs11", "doctor.pkcs11"},
    "sqlite3": {"ledger"},
    "psycopg": {"ledger.postgresql"},
    # A private-key object of cryptography's interface is what a key store gives and a CSR is signed with. The
    # authorities of a trial and the other side of a handshake are X.509 too. The judge of evidence has its own eyes.
    "cryptography": {"x509", "keystore", "doctor.config", "openssl", "simulators", "attestation"},
    # Values are structs, on the wire and in the program: to define one takes a fortieth of a dataclass's time at start.
    "msgspec": {
        *("contract", "config", "system", "x509", "keystore", "mqtt", "ledger", "service", "observability"),
        *("simulators", "daemon", "doctor", "site", "cli"),
    },
    # The official schemas, and the frames around payloads; the connection itself, and its two ends.
    "ocpp": {"simulators"},
    "jsonschema": {"simulators"},
    "websockets": {"simulators"},
    # Loaded only where somebody wants figures.
    "prometheus_client": {"observability"},
    # Loaded only where somebody wants a page.
    "jinja2": {"doctor", "observability"},
}
"""Where each library that is not ours is imported. sqlite3 is the standard library's, and a part like any other."""

COMES_WITH = {"jsonschema": "ocpp"}
"""A library that is imported and not named among our dependencies: the one that it belongs to makes use of it."""

FOR_TRYING = {"ocpp", "jsonschema", "websockets"}
"""What only the extra ``josev`` installs."""
FOR_TOKENS = {"pkcs11"}
"""What only the extra ``pkcs11`` installs; the library is called python-pkcs11."""
FOR_SITES = {"psycopg"}
"""What only the extra ``site`` installs."""
COMMANDS_FOR_TRYING = {"cli.csms", "cli.josev"}


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        importer: module that it stands in, without ``stationkey.``; ``""`` is the package itself.
        imported: the module that it imports, in full.
        path: what it imports, in full: the module itself, or a name in it.
        line: where it stands.
        at_start: whether it runs when the importer is imported, rather than in a function.
        for_types: whether only a type checker runs it.
    """

    importer: str
    imported: str
    path: str
    line: int
    at_start: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer or 'stationkey'}, line {self.line}: imports {self.imported}"

    @property
    def ours(self) -> str | None:
        """The module of ours that is imported, without ``stationkey.``; None where it is not ours."""
        top, _, rest = self.imported.partition(".")
        return rest if top == "stationkey" else None


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
KNOWN = {"stationkey" + (f".{name}" if name else "") for name in MODULES}


def imports_of(importer: str, source: str) -> Iterator[Import]:
    def walk(node: ast.AST, *, at_start: bool, for_types: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                targets = [(alias.name, alias.name) for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                full = [f"{module}.{alias.name}" for alias in names]
                targets = [(name if name in KNOWN else module, name) for name in full]
            case ast.ImportFrom():
                raise AssertionError(f"{importer}, line {node.lineno}: a relative import")
            case _:
                targets = []
        for target, path in targets:
            yield Import(importer, target, path, getattr(node, "lineno", 0), at_start, for_types)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = node.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else []
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_start=at_start and not in_function, for_types=for_types or child in guarded)

    yield from walk(ast.parse(source), at_start=True, for_types=False)


@cache
def all_imports() -> list[Import]:
    """Every import of ours. Not at the import of this module, since each worker does that, and one runs its tests."""
    return [found for name, path in MODULES.items() for found in imports_of(name, path.read_text())]


def wrong_way(found: Import) -> bool:
    """Whether an import of ours goes up or sideways."""
    if not found.ours or not found.importer:  # the package's own are under TYPE_CHECKING, as a test below says
        return False
    importer, imported = found.importer.partition(".")[0], found.ours.partition(".")[0]
    if importer == imported:
        return False
    above = ROW_OF[imported] <= ROW_OF[importer] if found.for_types else ROW_OF[imported] < ROW_OF[importer]
    return not above


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_every_package_has_a_row(module: str) -> None:
    assert module.partition(".")[0] in ROW_OF


def test_imports_run_one_way() -> None:
    assert [str(found) for found in all_imports() if wrong_way(found)] == []


@pytest.mark.parametrize(
    ("importer", "source", "expected"),
    [
        pytest.param("contract.profiles", "from stationkey.errors import Fault", [], id="from above"),
        pytest.param("errors", "from stationkey.contract.profiles import Algorithm", [0], id="from below"),
        pytest.param("x509.csr", "from stationkey.config import file", [0], id="sideways"),
        pytest.param("x509.csr", "def f():\n import stationkey.service", [0], id="from below, in a function"),
        pytest.param(
            "mqtt.url", "if TYPE_CHECKING:\n from stationkey.keystore import KeyRef", [], id="sideways, types"
        ),
        pytest.param("mqtt.url", "from stationkey.keystore import KeyRef", [0], id="sideways, at run time"),
        pytest.param("ledger", "if TYPE_CHECKING:\n import stationkey.service", [0], id="from below, for types"),
        pytest.param("mqtt.url", "if TYPE_CHECKING:\n pass\nelse:\n import stationkey.keystore", [0], id="else"),
        pytest.param("keystore.worker", "from stationkey.keystore import KeyRef", [], id="inside the package"),
        pytest.param("keystore.tpm2.store", "from stationkey.ledger import Ledger", [0], id="out of the package"),
        pytest.param("mqtt.url", "from stationkey._version import __version__", [], id="the version"),
        pytest.param("mqtt", "import asyncio, rich", [], id="not ours"),
    ],
)
def test_an_import_that_runs_the_wrong_way_would_be_seen(importer: str, source: str, expected: list[int]) -> None:
    found = list(imports_of(importer, source))

    assert [number for number, one in enumerate(found) if wrong_way(one)] == expected


def test_no_module_needs_itself() -> None:
    """Inside packages too; imports inside functions, and those that only a type checker reads, included."""
    needs: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in all_imports():
        if found.ours is not None and found.importer:  # the package's own are lazy, and for types; see below
            needs[found.importer].add(found.ours)

    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


MOST_LINES = 600


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long_to_read(module: str) -> None:
    lines = len(MODULES[module].read_text().splitlines())

    assert lines <= MOST_LINES


def test_what_is_private_to_a_package_is_used_by_no_other() -> None:
    """A module or a name that begins with an underscore is its own package's; the version is everybody's."""
    strays = [
        str(found)
        for found in all_imports()
        if found.ours not in {None, "_version"}
        and re.search(r"\._[a-z]", found.path)
        and found.importer.partition(".")[0] != (found.ours or "").partition(".")[0]
    ]

    assert strays == []


def test_the_package_itself_imports_its_version_alone() -> None:
    ours = {one.ours for one in all_imports() if not one.importer and one.ours and not one.for_types}

    assert ours == {"_version"}


def test_nothing_imports_the_front_door() -> None:
    assert [str(one) for one in all_imports() if one.imported == "stationkey" or one.ours == ""] == []


def home_of(found: Import) -> str | None:
    """The package of `HOMES` that a library is imported in; None where it may not be."""
    homes = HOMES.get(found.imported.partition(".")[0], set())
    return next((home for home in homes if f"{found.importer}.".startswith(f"{home}.")), None)


def test_each_library_is_imported_in_its_home() -> None:
    strays = [
        str(found)
        for found in all_imports()
        for library in [found.imported.partition(".")[0]]
        if (library in HOMES or library not in sys.stdlib_module_names | {"stationkey"}) and home_of(found) is None
    ]

    assert strays == []


def test_every_home_is_lived_in() -> None:
    used = {(found.imported.partition(".")[0], home_of(found)) for found in all_imports()}

    assert {(library, home) for library, homes in HOMES.items() for home in homes} - used == set()


def requirements_of(library: str) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in metadata.requires(library) or []}


def test_what_is_imported_is_what_the_package_depends_on() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    given = {"core": project["dependencies"], **project["optional-dependencies"]}
    found = {
        extra: {dependency.partition(">")[0].replace("-", "_") for dependency in dependencies}
        for extra, dependencies in given.items()
    }

    assert found["core"] | found["station"] | FOR_TOKENS | FOR_SITES == (
        HOMES.keys() - sys.stdlib_module_names - FOR_TRYING
    )
    assert found["pkcs11"] == {f"python_{library}" for library in FOR_TOKENS}
    assert found["site"] == FOR_SITES
    assert found["josev"] == FOR_TRYING - COMES_WITH.keys()
    josev = found["josev"] | COMES_WITH.keys()
    assert {"station": found["station"], "pkcs11": FOR_TOKENS, "site": FOR_SITES, "josev": josev} == _EXTRAS


@pytest.mark.parametrize(("library", "owner"), COMES_WITH.items())
def test_what_comes_with_a_library_is_required_by_it(library: str, owner: str) -> None:
    assert library in requirements_of(owner)


COMMANDS = [name for name in MODULES if name.startswith("cli.") and not name.startswith("cli._")]
"""Imported by name, when the command is asked for: no import statement leads to them."""


@pytest.mark.parametrize("module", COMMANDS)
def test_a_module_of_the_command_line_is_a_command_of_the_same_name(module: str) -> None:
    name = module.removeprefix("cli.")
    command = getattr(import_module(f"stationkey.{module}"), name)

    assert isinstance(command, click.Command)
    assert command.name == name.replace("_", "-")


@pytest.mark.parametrize(
    "start", ["daemon", "", "cli", *(name for name in COMMANDS if name not in COMMANDS_FOR_TRYING)]
)
def test_a_station_needs_nothing_that_is_for_trying(start: str) -> None:
    """Imports inside functions included: a station is installed without the extra."""
    reached, ahead = set[str](), {start}
    while ahead:
        reached |= ahead
        found = [one for one in all_imports() if one.importer in ahead and not one.for_types]
        ahead = {one.ours for one in found if one.ours is not None} - reached
    libraries = {
        one.imported.partition(".")[0] for one in all_imports() if one.importer in reached and not one.for_types
    }

    assert libraries & FOR_TRYING == set()


@pytest.mark.parametrize("start", ["daemon", "cli", *COMMANDS])
def test_a_station_loads_nothing_of_a_site(start: str) -> None:
    """Imports inside functions not included: those of a site are there."""
    reached, ahead = set[str](), {start}
    while ahead:
        reached |= ahead
        found = [one for one in all_imports() if one.importer in ahead and one.at_start and not one.for_types]
        ahead = {one.ours for one in found if one.ours is not None} - reached

    assert [module for module in reached if module.startswith(("ledger.postgresql", "site."))] == []


def test_the_handshake_is_a_program_that_needs_no_package() -> None:
    """It is run as a script, under a service's configuration of OpenSSL: nobody imports it, and it imports nothing."""
    imported = {one.imported.partition(".")[0] for one in all_imports() if one.importer == "openssl.handshake"}

    assert imported - sys.stdlib_module_names == set()
    assert [str(one) for one in all_imports() if one.ours == "openssl.handshake"] == []


def test_the_judge_of_evidence_needs_nothing_but_cryptography_and_the_errors() -> None:
    """Whoever has to believe a verdict must not have to read the station's code for it."""
    judge = [one for one in all_imports() if one.importer.partition(".")[0] == "attestation"]
    libraries = {one.imported.partition(".")[0] for one in judge} - sys.stdlib_module_names
    ours = {one.ours.partition(".")[0] for one in judge if one.ours is not None}

    assert (libraries, ours) == ({"cryptography", "stationkey"}, {"attestation", "errors"})


def test_the_binding_to_the_tpm_loads_no_network_library() -> None:
    """tpm2-pytss is built without FAPI, by ``scripts/without-fapi``, as ``scripts/setup`` and the README have it."""
    program = "import tpm2_pytss, pathlib; print(pathlib.Path('/proc/self/maps').read_text())"
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "libtss2-esys" in maps
    assert [name for name in ("libtss2-fapi", "libcurl", "libgnutls", "libldap", "libkrb5") if name in maps] == []
