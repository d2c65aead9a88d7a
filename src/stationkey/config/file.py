"""Read the configuration file, and merge command line and environment over it.

Precedence: command line, environment, file, default. `stationkey.cli` reads command line and environment. The
annotations of `stationkey.config.settings` declare the options of the file.

Fields of a CSR can be overridden for each certificate type, for a CA that differs from the standards' profiles.
Overrides that no station's certificate may have (CA:true, a subject without C, O or CN, an uncritical keyUsage) are
refused at start.
"""

from __future__ import annotations

import codecs
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar

from msgspec import UNSET, Struct, ValidationError
from msgspec.structs import fields, replace

from stationkey.config.options import Declared, options_of
from stationkey.config.settings import DEFAULT_DEVICE, DEFAULT_STORE, CsrOverrides, Settings
from stationkey.config.site import contradictions
from stationkey.config.wording import lines_of, meant, not_toml, required
from stationkey.contract.profiles import PROFILES, CertificateType
from stationkey.errors import ConfigurationError
from stationkey.system.files import opened_regular
from stationkey.system.text import printable

SYSTEM_FILE: Final = Path("/etc/stationkey/stationkey.toml")
"""Read by every command by default, if this user may."""
MAX_FILE: Final = 256 * 1024
"""Bytes; the packaged file, with every option explained, has 15 KB."""
MAX_DOTS: Final = 250
"""Dots in one line. An option has two at most, and `tomllib` takes time by the square of the parts of a dotted key."""
MAX_SAID: Final = 200
"""Characters of a message about an invalid file."""

T = TypeVar("T", bound=Struct)
Given = Mapping[tuple[str, ...], Any]
"""Values that are set, by the fields that lead to each; see `Declared.path`."""


class Parts(NamedTuple):
    """What can be used of a file.

    Attributes:
        given: the valid values.
        complaints: the errors of the others.
        lost: top-level names with unusable values; None if all of it is unusable.
    """

    given: Given
    complaints: tuple[str, ...]
    lost: frozenset[str] | None


def read_file(path: Path | None) -> Given:
    """Read a configuration file; None sets nothing.

    Raises:
        ConfigurationError: it cannot be read, every user may write to it, or it is invalid; the message names the
            place.
    """
    if path is None:
        return {}
    content, open_to_all = _content(path)
    if open_to_all:
        raise _open_to_all(path)
    return read_table(*_table(path, content), source=str(path))


def read_table(
    table: Mapping[str, object],
    lines: Mapping[str, int] | None = None,
    *,
    source: str,
    declared: type[Struct] = Settings,
) -> Given:
    """Read options from a table.

    Args:
        table: as parsed from TOML.
        lines: the line of each place, if known.
        source: its origin, for messages.
        declared: the class that declares the options.

    Raises:
        ConfigurationError: a value is invalid; the message names the place.
    """
    reading = _Reading(source, declared, lines)
    reading.take(table)
    if reading.complaints:
        first, *more = reading.complaints
        first.hint = first.hint or ("stationkey config check lists all errors" if more else "")
        raise first
    return reading.given


def read_parts(path: Path) -> Parts:
    """Read the valid part of a file that `read_file` refuses, and the errors in the rest.

    To report every error at once; the daemon accepts the whole file or nothing. Never raises.
    """
    complaints: list[ConfigurationError] = []
    try:
        content, open_to_all = _content(path)
        if open_to_all:
            complaints.append(_open_to_all(path))
        table, lines = _table(path, content)
    except ConfigurationError as error:
        return Parts({}, tuple(one.message for one in (*complaints, error)), None)
    reading = _Reading(str(path), Settings, lines)
    reading.take(table)
    complaints += reading.complaints
    return Parts(reading.given, tuple(one.message for one in complaints), frozenset(reading.lost))


def place_of(path: Path, place: str) -> str:
    """Return file, line and name of an option, for the beginning of a message."""
    _, lines = _table(path, _content(path)[0])
    return f"{path}: line {lines[place]}: {place}" if place in lines else f"{path}: {place}"


def _open_to_all(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"every user of this machine can write to the configuration file {path}",
        reason="config_open",
        hint=f"chmod o-w {path}, and check its content",
    )


def _content(path: Path) -> tuple[bytes, bool]:
    """Return the content of a file, and whether every user may write to it."""
    try:
        with opened_regular(path, follow=True) as (opened, status):
            content = opened.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigurationError(
            f"the configuration file {path} cannot be read: {error.strerror}", reason="config_unreadable"
        ) from None
    if len(content) > MAX_FILE:
        raise ConfigurationError(f"the configuration file {path} is too large", reason="config_unreadable")
    return content, bool(status.st_mode & stat.S_IWOTH)


def _table(path: Path, content: bytes) -> tuple[dict[str, object], dict[str, int]]:
    """Return the table of a file, and the line of each place."""
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()  # a byte order mark, invisible in editors
    except UnicodeDecodeError:
        raise ConfigurationError(f"the configuration file {path} is not UTF-8", reason="config_invalid") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MAX_DOTS:
            raise ConfigurationError(f"{path}: line {number} has more than {MAX_DOTS} dots", reason="config_invalid")
    try:
        return tomllib.loads(text), lines_of(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        raise ConfigurationError(f"{path}: {_said(not_toml(str(error), text))}", reason="config_invalid") from None


def _said(words: object) -> str:
    """Return a message, which may quote the file, as one short printable line."""
    text = printable(str(words))
    return text if len(text) <= MAX_SAID else text[: MAX_SAID - 1] + "…"


_CHOICE: Final = re.compile(r"Invalid enum value (.{1,80}?)(?: - at|$)")
_CSR: Final = "csr"
_EXISTING: Final = "keystore_for.existing_keys"
_FIXED: Final = {
    **dict.fromkeys(
        ("ca", "basic_constraints", "basic_constraints_critical", "path_length"),
        "basicConstraints is always critical, with CA:false: a station's certificate signs no other",
    ),
    **dict.fromkeys(
        ("subject", "country_name", "organization_name", "common_name"),
        "the subject always has C, O and CN, and they come with each request",
    ),
    "key_usage_critical": "keyUsage is always critical [RFC 5280 4.2.1.3]",
}
"""Options that do not exist on purpose, and why."""


class _Reading:
    """The values read so far, and the errors in the rest; `root` declares the options."""

    def __init__(self, source: str, root: type[Struct], lines: Mapping[str, int] | None = None) -> None:
        self.given: dict[tuple[str, ...], Any] = {}
        self.complaints: list[ConfigurationError] = []
        self.lost: set[str] = set()
        self._source = source
        self._root = root
        self._lines = lines or {}
        self._known: dict[str, list[str]] = {}
        for option in options_of(root):
            self._known.setdefault(option.table, []).append(option.name)

    def take(self, table: Mapping[str, object]) -> None:
        """Read all tables of a file."""
        options = list(options_of(self._root))
        tables = {option.table for option in options} - {""}
        top = {name: value for name, value in table.items() if name not in tables | {_CSR}}
        self.given |= self._options("", top, options)
        for name in [name for name in table if name in tables]:
            self.given |= self._options(name, table[name], options)
        profiles = dict(PROFILES)
        for name, overrides in self._mapping(_CSR, table.get(_CSR, {})).items():
            if name not in set(CertificateType):
                self._refuse(
                    f"{_CSR}.{name}", f"unknown certificate type {name}; known are {', '.join(CertificateType)}"
                )
                continue
            place = f"{_CSR}.{name}"
            changes = {
                path[-1]: value
                for path, value in self._options(place, overrides, options_of(CsrOverrides, place)).items()
            }
            profiles[CertificateType(name)] = replace(PROFILES[CertificateType(name)], **changes)
        if profiles != PROFILES:
            self.given["profiles",] = MappingProxyType(profiles)
        self._refuse_contradictions()
        wrong = [] if "keystores" in self.lost else list(contradictory_stores(self.given))
        for place, words in wrong:
            self._refuse(place, words)
        for path in [path for path in self.given if wrong and path[0] in {"keystores", "keystore_for"}]:
            del self.given[path]
        wrong = [] if self.lost & {"site", "ledger"} else list(contradictory_site(self.given))
        for place, words in wrong:
            self._refuse(place, words)
        for path in [path for path in self.given if wrong and path[0] in {"site", "ledger", "ledger_password"}]:
            del self.given[path]

    def _options(self, table: str, values: object, options: Iterable[Declared]) -> dict[tuple[str, ...], Any]:
        """Return the values of one table."""
        known = {option.name: option for option in options if option.table == table}
        given: dict[tuple[str, ...], Any] = {}
        for name, value in self._mapping(table, values).items():
            if name not in known:
                fixed = _FIXED.get(name) if table.startswith(_CSR) else None
                place = f"{table}.{name}".removeprefix(".")
                unknown = f"unknown option {place}{meant(name, table, self._known)}"
                self._refuse(place, f"{place} cannot be configured: {fixed}" if fixed else unknown)
            elif (read := self._value(known[name], value)) is not UNSET:
                path = known[name].path
                if path in given:
                    names = " and ".join(option.name for option in known.values() if option.path == path)
                    self._refuse(f"{table}.{name}", f"{names} are both set: one of them is enough")
                given[path] = read
        return given

    def _value(self, option: Declared, value: object, place: str = "") -> Any:
        if option.is_table and isinstance(value, Mapping) and not place:  # entry by entry, for the line of each
            parts = [self._value(option, {name: one}, f"{option.place}.{name}") for name, one in value.items()]
            if UNSET in parts:
                return UNSET
        place = place or option.place
        try:
            return option.read(value)
        except ValidationError as error:
            words = f"{option.place} must be {required(option.written, value)}"
            if choice := _CHOICE.match(str(error)):
                words += f", not {choice[1]}"
            elif option.example:
                words += f", e.g. {option.example}"
            self._refuse(place, words)
        except ValueError as error:
            self._refuse(place, f"{place}: {error}")
        except ConfigurationError as error:
            self._complain(error, place)
        return UNSET

    def _mapping(self, place: str, value: object) -> Mapping[str, object]:
        if isinstance(value, Mapping):
            return value
        self._refuse(place, f"{place} must be a table: [{place}] on a line of its own, and its options below")
        return {}

    def _refuse_contradictions(self) -> None:
        for option in fields(self._root):
            if not hasattr(option.type, "contradiction"):
                continue
            name = option.name
            mine = [path for path in self.given if path[0] == name]
            if words := build(option.type, {path[1:]: self.given[path] for path in mine}).contradiction():
                self._refuse(name, f"[{name}]: {words}")
                for path in mine:
                    del self.given[path]

    def _refuse(self, place: str, words: str) -> None:
        line = f"line {self._lines[place]}: " if place in self._lines else ""
        self._complain(ConfigurationError(f"{self._source}: {line}{_said(words)}", reason="config_invalid"), place)

    def _complain(self, error: ConfigurationError, place: str) -> None:
        self.complaints.append(error)
        self.lost.add(place.partition(".")[0])


def contradictory_stores(given: Given) -> Iterator[tuple[str, str]]:
    """Yield the contradictions about key stores: the place of an option, and a message that begins with it."""
    stores: Mapping[str, str] = given.get(("keystores",), {})
    chosen = {".".join(path): name for path, name in given.items() if path[0] == "keystore_for"}
    existing: tuple[str, ...] = chosen.pop(_EXISTING, ())
    for place, name in [*chosen.items(), *((_EXISTING, name) for name in existing)]:
        if name not in {DEFAULT_STORE, *stores}:
            guess = meant(name, "keystores", {"keystores": stores})
            yield place, f"{place}: [keystores] has no {name}{guess}"
    limited: Mapping[str, int] = given.get(("lifecycle", "bounds", "pending_in"), {})
    if strange := [name for name in limited if name not in {DEFAULT_STORE, *stores}]:
        yield "lifecycle.pending_in", f"lifecycle.pending_in: [keystores] has no {strange[0]}"
    if both := [name for name in existing if name in chosen.values()]:
        yield _EXISTING, f"{_EXISTING}: {both[0]} is chosen for new keys, too"
    for name in [name for name in stores if name not in {*chosen.values(), *existing}]:
        place = f"keystores.{name}"
        yield place, f"{place} is used for nothing: name it in [keystore_for], in existing_keys if for older keys only"
    places: dict[str, str] = {}
    for place, uri in [("keystore", given.get(("keystore",), "")), *((f"keystores.{n}", u) for n, u in stores.items())]:
        if uri and places.setdefault(uri, place) != place:
            yield place, f"{place} is the same key store as {places[uri]}"


def contradictory_site(given: Given) -> Iterator[tuple[str, str]]:
    """Yield the contradictions about a site: the place of an option, and a message that begins with it."""
    stations, ledger = given.get(("site", "stations")), given.get(("ledger",))
    shards: int = given.get(("site", "shards"), 1)
    yield from contradictions(stations, ledger, shards)
    if ("ledger_password",) in given and not ledger:
        place = "ledger_password_file"
        yield place, f"{place}: there is no ledger on PostgreSQL; set ledger"
    limited: Mapping[str, int] = given.get(("lifecycle", "bounds", "pending_in"), {})
    if stations and (small := [name for name, room in limited.items() if room < shards]):
        place = "lifecycle.pending_in"
        yield place, f"{place}: {small[0]} has fewer places than the site has shards, which divide them"
    for name in ("ec", "rsa"):
        if stations and given.get(("pool", name)):
            yield f"pool.{name}", f"pool.{name}: no keys are made ahead in a site; leave it out"
    if ledger and given.get(("tpm", "key_auth")) == "generated":
        place, daemons = "tpm.key_auth", "each daemon would have a value of its own, and not those of the others"
        yield place, f"{place}: {daemons}; name a file, with the same value for every daemon"
    if stations and "{station}" not in str(given.get(("certificate_dir",), "{station}")):
        place = "josev.certificate_dir"
        yield place, f"{place}: in a site each station needs a directory of its own; put {{station}} into the path"


def build(declared: type[T], given: Given) -> T:
    """Return an instance with the given values, and defaults for the rest."""
    values: dict[str, Any] = {}
    for option in fields(declared):
        inner = {path[1:]: value for path, value in given.items() if path[0] == option.name}
        if inner:
            values[option.name] = inner[()] if () in inner else build(option.type, inner)
    return declared(**values)


def settle(given: Given, *, needs_keystore: bool = True, **options: object) -> Settings:
    """Merge command line and environment over the file, and the file over the defaults.

    Args:
        given: the values of the file.
        needs_keystore: whether a key store is required; if not, `Settings.keystore` may be empty.
        options: fields of `Settings`; None, or an empty text if that is not a value, for those not given.

    Raises:
        ConfigurationError: no key store is named, and this machine has no ``/dev/tpmrm0``.
    """
    given = dict(given)
    known = {option.path: option.option for option in options_of(Settings)}
    for name, value in options.items():
        if value is not None and (value != "" or known[name,].form is None):
            given[name,] = value
    kinds = {given.get(("keystore_for", str(kind)), DEFAULT_STORE) for kind in CertificateType}
    if needs_keystore and ("keystore",) not in given and DEFAULT_STORE in kinds:
        given["keystore",] = default_keystore()
    keystore = given.setdefault(("keystore",), "")
    if given.get(("site", "stations")):
        given["pool", "ec"] = given["pool", "rsa"] = 0  # a key made ahead has no station, so no shard
        given["lifecycle", "bounds", "shards"] = given.get(("site", "shards"), 1)
        given["lifecycle", "bounds", "active_of_site"] = given.get(("site", "active_keys"), 0)
    for uri in (keystore, *given.get(("keystores",), {}).values()):
        if uri.startswith("tpm2:"):  # a client key in a TPM is in this one
            given["mqtt", "tcti"] = uri.removeprefix("tpm2:")
    return build(Settings, given)


def default_keystore() -> str:
    """Return the URI of this machine's TPM behind the kernel's resource manager.

    Raises:
        ConfigurationError: there is none. No other key store is ever chosen.
    """
    if Path(DEFAULT_DEVICE).exists():
        return f"tpm2:device:{DEFAULT_DEVICE}"
    raise ConfigurationError(
        f"this machine has no {DEFAULT_DEVICE}, and no key store was named",
        reason="keystore_unnamed",
        hint="name one with --keystore, for example tpm2:device:/dev/tpm0 or tpm2:swtpm:host=127.0.0.1,port=2321",
    )
