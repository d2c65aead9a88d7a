"""What is fuzzed: for each reader of what others write, what must hold of any bytes, and bytes that may break it.

`test_fuzz` replays the corpus and tries some hundred new ones with each ``make test``; `fuzz` goes on for as long as it
is told to, and keeps what it finds.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives import serialization
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # it ships no types
from mqtt_target import check_mqtt, packet_streams

from parts import STATION, Authority, pem, software_key
from stationkey.cli import schema as schema_documents
from stationkey.config.file import read_file, settle
from stationkey.config.options import options_of
from stationkey.config.settings import CsrOverrides, Settings
from stationkey.contract.active_names import Owner, file_name, read_name
from stationkey.contract.messages import (
    MAX_DEPTH,
    MAX_PAYLOAD,
    CertificateInstallationStatus,
    CertificateInstallationStatusData,
    GenerateCsrRequest,
    decode,
    decode_response,
    encode,
)
from stationkey.contract.profiles import PROFILES, CertificateType
from stationkey.errors import ConfigurationError, MessageError, StationKeyError
from stationkey.keystore import keystore_opener
from stationkey.ledger import Ledger
from stationkey.mqtt.url import Broker
from stationkey.service.josev_files import JosevFiles
from stationkey.service.matching import KeyFinder, StatusUnfit
from stationkey.x509.certificate import Expected, differences, read_chain
from stationkey.x509.csr import sign_csr, to_pem

Json = dict[str, Any]

CORPUS: Final = Path(__file__).parent / "corpus"
ROOT: Final = Path(__file__).parent.parent.parent
SECRET: Final = "correct-horse-battery"
"""In the configuration files of the corpus, in the place of secrets that somebody wrote there by mistake."""


@dataclass(frozen=True)
class Target:
    """Something that reads bytes of others.

    Attributes:
        name: of its folder in the corpus.
        check: raises AssertionError, or anything else, where a property does not hold.
        likely: bytes that come close to what is right.
    """

    name: str
    check: Callable[[bytes], None]
    likely: st.SearchStrategy[bytes]

    @property
    def corpus(self) -> list[Path]:
        """The files of its corpus."""
        return sorted((CORPUS / self.name).iterdir())


# Messages, held against the published schemas.

REQUEST, STATUS, RESPONSE = (
    Draft202012Validator(schema_documents.json_schema(name))
    for name in ("generate_csr.request", "certificate_installation_status.update", "generate_csr.response")
)
TEXTS: Final = (
    "certificate_type",
    "algorithm",
    "common_name",
    "organization_name",
    "country_name",
    "evse_id",
    "status",
    "private_key_path",
)


class _Members(dict[str, Any]):
    """A JSON object, and whether it or one in it had two members of one name."""


def _parsed(payload: bytes) -> tuple[Any, set[str]]:
    """What the standard library reads, and what RFC 8259 and RFC 7493 have against it.

    Raises:
        ValueError: nothing.
    """
    against: set[str] = set()

    def members(pairs: list[tuple[str, Any]]) -> Json:
        if len({name for name, _ in pairs}) != len(pairs):
            against.add("a name twice")
        return _Members(pairs)

    def constant(_: str) -> None:
        against.add("no number")

    document = json.loads(payload.decode("utf-8"), object_pairs_hook=members, parse_constant=constant)
    return document, against


def _is_invisible(character: str) -> bool:
    joiner_or_tag = character in "\u200c\u200d" or 0xE0020 <= ord(character) < 0xE0080
    return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and not joiner_or_tag


def _levels(document: object) -> int:
    """How many arrays and objects stand inside one another."""
    levels = 0
    inside = [document]
    while inside := [each for each in inside if isinstance(each, (dict, list))]:
        levels += 1
        inside = [member for each in inside for member in (each.values() if isinstance(each, dict) else each)]
    return levels


KNOWN_DIFFERENCES: Final[dict[str, Callable[[bytes, Json, set[str]], bool]]] = {
    "a name twice: a schema sees one of the two": lambda _, __, against: "a name twice" in against,
    "NaN and Infinity: they are no JSON": lambda _, __, against: "no number" in against,
    "more than 64 KiB: it is not read": lambda payload, _, __: len(payload) > MAX_PAYLOAD,
    "nested too deep: it is not read": lambda _, document, __: _levels(document) > MAX_DEPTH,
    "a control character, or half a character, in a text of ours: no pattern can say that": lambda _, document, __: any(
        _is_invisible(character)
        for name in TEXTS
        if isinstance(value := document["data"].get(name), str)
        for character in value
    ),
}
"""What the schemas let through and `decode` does not. The other way round there is none."""


def check_message(payload: bytes) -> None:
    """`decode`, and the schemas of what it reads."""
    message, refused = None, None
    try:
        message = decode(payload)
    except MessageError as error:
        refused = error
    if refused is not None:
        check_words(refused)
    try:
        document, against = _parsed(payload)
    except (ValueError, RecursionError):
        assert message is None
        if refused is not None and refused.request_id is not None:
            assert refused.request_id in set(_strings_in(payload))
        return
    wrong = document if isinstance(document, dict) else {}
    if refused is not None and refused.request_id is not None:
        assert refused.request_id == wrong.get("id") or len(payload) > MAX_PAYLOAD
    if message is None:
        if REQUEST.is_valid(document) or STATUS.is_valid(document):
            # Of one that is too large, the name that counts may be the one that is not read.
            assert refused is not None or len(payload) > MAX_PAYLOAD
            assert [what for what, holds in KNOWN_DIFFERENCES.items() if holds(payload, document, against)], refused
        return
    assert message.id == wrong["id"]
    # null in an optional field means that it is absent, which the schema does not know (decision 10).
    present = {field: value for field, value in wrong["data"].items() if value is not None}
    assert (REQUEST if isinstance(message, GenerateCsrRequest) else STATUS).is_valid(wrong | {"data": present})
    assert against == set()
    assert decode(encode(message)) == message


def check_response(payload: bytes) -> None:
    """`decode_response`, and the schema of a response. That ``accepted`` has a CSR is for the asker to see."""
    message = decode_response(payload)
    try:
        document, against = _parsed(payload)
    except (ValueError, RecursionError):
        # msgspec passes over what it has no use for, a number of thousands of digits included.
        assert message is None or len(payload) > 4000
        return
    if message is None:
        assert not RESPONSE.is_valid(document) or [
            what for what, holds in RESPONSE_DIFFERENCES.items() if holds(payload, document, against)
        ]
        return
    assert message.id == document["id"] or "a name twice" in against
    if (message.data.status == "accepted") is isinstance(message.data.csr, str) and not against:
        assert RESPONSE.is_valid(document)
    assert decode_response(encode(message)) == message


RESPONSE_DIFFERENCES: Final[dict[str, Callable[[bytes, Json, set[str]], bool]]] = {
    "a name twice: a schema sees one of the two": lambda _, __, against: "a name twice" in against,
    "NaN and Infinity: they are no JSON": lambda _, __, against: "no number" in against,
    "nested too deep: it is not read": lambda _, document, __: _levels(document) > MAX_DEPTH,
    "half a character: it is no text": lambda _, document, __: _has_half_a_character(document),
    "a line feed behind the id: Python's $, which this judge of schemas uses, lets it pass, and ECMA 262's does not": (
        lambda _, document, __: document["id"].endswith("\n")
    ),
}
"""What the schema of a response lets through and `decode_response` does not."""


def _has_half_a_character(document: object) -> bool:
    return any(unicodedata.category(character) == "Cs" for character in json.dumps(document, ensure_ascii=False))


def _strings_in(payload: bytes) -> Iterator[str]:
    """Every JSON string in a text that is no JSON as a whole."""
    text = payload.decode("utf-8", "replace")
    for start in (match.start() for match in re.finditer('"', text)):
        try:
            yield json.JSONDecoder().raw_decode(text, start)[0]
        except ValueError:
            continue


def check_words(error: StationKeyError) -> None:
    """What is said of something wrong: one line that any terminal can show, short, with a stable reason."""
    assert re.fullmatch(r"[a-z0-9_]+", error.reason)
    assert error.message.isprintable()
    assert error.hint.isprintable()
    assert 0 < len(error.message) < 600


# Configuration.


_KNOWN_AS_SECRET: Final = re.compile(rb'^password = "%s"$|://\w*:%s@' % ((SECRET.encode(),) * 2), re.MULTILINE)
"""Where a secret can be told from a path, which is what is shown."""


def check_config(content: bytes) -> None:
    """`read_file` and `settle`, and what else of it is looked at before anything is opened."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "stationkey.toml")
        file.write_bytes(content)
        try:
            settings = settle(read_file(file), keystore="software:")
            Broker.parse(settings.broker)
            keystore_opener(settings.keystore, allow_software_keys=settings.allow_software_keys)
        except ConfigurationError as error:
            check_words(error)
            said = str(error)
        else:
            said = repr(settings)
            assert "\0" not in str(settings)
    if _KNOWN_AS_SECRET.sub(b"", content).find(SECRET.encode()) < 0:
        assert SECRET not in said


# Certificates.


@cache
def _expected() -> Expected:
    return Expected(
        profile=PROFILES[STATION], common_name="station 1", organization_name="EcoG", country_name="DE", public=b""
    )


def check_certificate(content: bytes) -> None:
    """`read_chain`, and all that is asked of a chain that it gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # cryptography's, of what RFC 5280 does not allow and it reads
        _check_certificate(content)


def _check_certificate(content: bytes) -> None:
    chain = read_chain(content)
    if chain is None:
        return
    assert chain.certificates
    for seen in chain.seen_from_each():
        assert isinstance(seen.not_before, int)
        assert isinstance(seen.not_after, int)
        assert all(line for line in differences(seen, _expected(), now=0.0))
        again = read_chain(seen.pem().encode())
        assert again is not None
        assert again.public == seen.public
        assert len(again.certificates) == len(seen.certificates)


# Names of files.


def check_file_name(content: bytes) -> None:
    """`read_name`, for any name that a directory can hold; and `file_name`, for any EVSE ID whatever."""
    name = content.decode("utf-8", "surrogateescape")
    read = read_name(name)
    assert read is None or file_name(*read) == name
    text = content.decode("utf-8", "replace")
    made = file_name(Owner("", "v2g_certificate", text))
    assert made.isascii()
    assert made == Path(made).name
    assert not made.startswith((".", "-"))
    assert made.endswith(".pem")
    assert read_name(made) == (Owner("", "v2g_certificate", text), "", False)


# private_key_path.


@dataclass
class _World:
    """A ledger without keys, and a finder of keys that may look at paths, and open nothing."""

    folder: Path
    ledger: Ledger
    finder: KeyFinder
    files: JosevFiles


@cache
def _world() -> _World:
    folder = Path(tempfile.mkdtemp(prefix="stationkey-fuzz-"))
    (folder / "active").mkdir()
    return _World(
        folder,
        Ledger(folder / "ledger.sqlite3"),
        KeyFinder(folder / "active", roots=False),
        JosevFiles(folder / "active", None),
    )


def close_world() -> None:
    """Take the ledger of `check_private_key_path` away."""
    if _world.cache_info().currsize:
        world = _world()
        world.ledger.close()
        for path in sorted(world.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        world.folder.rmdir()
        _world.cache_clear()


def check_private_key_path(content: bytes) -> None:
    """`KeyFinder` on a ledger without keys: whatever the path is, no key fits, and nothing is opened."""
    world = _world()
    text = content.decode("utf-8", "surrogateescape").replace("ACTIVE", str(world.folder / "active"))
    for verb in ("installed", "deleted", "failed_installation"):
        status = CertificateInstallationStatus(
            id="123e4567-e89b-12d3-a456-426614174000",
            name="certificate_installation_status",
            type="update",
            data=CertificateInstallationStatusData(
                certificate_type=CertificateType.V2G_CERTIFICATE,
                status=verb,
                private_key_path=text,
            ),
        )
        find = {"installed": world.finder.installed, "deleted": world.finder.deleted}.get(verb, world.finder.failed)
        with nothing_opened():
            try:
                found = find(world.ledger, status, world.files.read(status))
            except StatusUnfit as error:
                check_words(error)
            else:
                raise AssertionError(f"{text!r} means {found}")


_watching: list[list[object]] = []


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _watching:
        _watching[-1].append(arguments[0])


@cache
def _hook() -> None:
    import sys  # noqa: PLC0415 - a hook cannot be taken away again: only who fuzzes gets one

    sys.addaudithook(_hear)


@contextmanager
def nothing_opened() -> Iterator[None]:
    """No file is opened within, by Python's own account of it."""
    _hook()
    _watching.append([])
    try:
        yield
    finally:
        opened = _watching.pop()
    assert opened == []


# Bytes that are likely to break something.

HOSTILE: Final = st.sampled_from(
    [
        *("..", "../../etc/passwd", "/", "/dev/zero", "a\0b", "%2f", "%00", "x" * 300, "\u202egpj", "\x1b[31m", "\r\n"),
        *(".lock", ".new", "con", "DE*ABC*E1", "de*abc*e1", "DE", "D\n", "DE\n", "'; DROP TABLE key; --", "\ud800", ""),
        *("\u2028", "Ä" * 64, "x" * 65, "123e4567-e89b-12d3-a456-426614174000", "installed", "ECDSA_SHA512"),
        *(str(name) for name in CertificateType),
    ]
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE | st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=6,
)


def _wire(document: Json) -> bytes:
    return json.dumps(document).encode()


def _changed(document: Json, changes: Json) -> Json:
    data = {**document["data"], **{name: value for name, value in changes.items() if name in TEXTS}}
    return {**document, "data": data, **{name: value for name, value in changes.items() if name not in TEXTS}}


_ID: Final = "123E4567-e89b-12d3-a456-426614174000"
_RIGHT_REQUEST: Final[Json] = {
    "id": _ID,
    "name": "generate_csr",
    "type": "request",
    "data": {
        "certificate_type": "v2g_certificate",
        "common_name": "DE-ABC-S-1",
        "organization_name": "Über Strom GmbH",
        "country_name": "DE",
        "algorithm": "ECDSA_SHA256",
        "evse_id": "DE*ABC*E1",
    },
}
_RIGHT_STATUS: Final[Json] = {
    "id": _ID,
    "name": "certificate_installation_status",
    "type": "update",
    "data": {
        "certificate_type": "v2g_certificate",
        "status": "installed",
        "private_key_path": "/var/lib/stationkey/active/v2g_certificate.pem",
    },
}
_RIGHT_RESPONSE: Final[Json] = {
    "id": _ID,
    "name": "generate_csr",
    "type": "response",
    "data": {"status": "accepted", "csr": "-----BEGIN CERTIFICATE REQUEST-----"},
}
_changes = st.dictionaries(
    st.sampled_from(["id", "name", "type", "data", *TEXTS]), HOSTILE | _values, max_size=3
) | st.dictionaries(HOSTILE, _values, max_size=2)


def _like(document: Json) -> st.SearchStrategy[bytes]:
    return (
        _changes.map(lambda changes: _wire(_changed(document, changes)))
        | st.tuples(_changes, damage).map(lambda both: both[1](_wire(_changed(document, both[0]))))
        | st.binary(max_size=64)
    )


def _cut(start: float, length: int, put: bytes) -> Callable[[bytes], bytes]:
    def cut(payload: bytes) -> bytes:
        at = int(start * len(payload))
        return payload[:at] + put + payload[at + length :]

    return cut


damage: Final = st.builds(_cut, st.floats(0, 1), st.integers(0, 12), st.binary(max_size=8) | HOSTILE.map(
    lambda text: text.encode("utf-8", "surrogatepass")
))  # fmt: skip
"""A piece cut out of bytes, and another put in its place."""


@cache
def _certificates() -> tuple[bytes, ...]:
    """One right chain, as PEM and as DER, of an authority that is made anew each time."""
    authority = Authority()
    request = msgspec.convert(_RIGHT_REQUEST, GenerateCsrRequest)
    leaf = authority.sign(to_pem(sign_csr(request, software_key(), PROFILES[CertificateType.V2G_CERTIFICATE])))
    der = leaf.public_bytes(serialization.Encoding.DER)
    return pem(leaf, authority.sub), der


_SECTIONS: Final = {
    table: [option.name for option in options_of(Settings) if option.table == table]
    for table in {option.table for option in options_of(Settings)}
} | {f"csr.{CertificateType.V2G_CERTIFICATE}": [option.name for option in options_of(CsrOverrides)]}
_toml_values = (
    HOSTILE.filter(lambda text: "\ud800" not in text).map(json.dumps)
    | st.sampled_from(["true", "0", "-1", "1e400", "nan", "[]", "[[1]]", "{}", "1979-05-27", '"credential:x"'])
    | st.integers().map(str)
)


@st.composite
def _toml(draw: st.DrawFn) -> bytes:
    lines: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        section = draw(st.sampled_from([*sorted(_SECTIONS), "csr"]))
        names = _SECTIONS.get(section, list(CertificateType))
        # A secret in the place of the path of one cannot be told from a path, and a path is what is shown.
        named = draw(st.sampled_from([*names, "password", "ca", "subject", '"\\u001b[31m"', "a.b.c"]))
        value = draw(_toml_values | st.just(f'"{SECRET}"') if named == "password" else _toml_values)
        lines += [f"[{section}]", f"{named} = {value}"] if section else [f"{named} = {value}"]
    return "\n".join(lines).encode()


def _damaged_certificate(number: int, change: Callable[[bytes], bytes]) -> bytes:
    return change(_certificates()[number])


TARGETS: Final = {
    target.name: target
    for target in (
        Target("message", check_message, _like(_RIGHT_REQUEST) | _like(_RIGHT_STATUS)),
        Target("response", check_response, _like(_RIGHT_RESPONSE)),
        Target("config", check_config, _toml() | st.tuples(_toml(), damage).map(lambda both: both[1](both[0]))),
        Target(
            "certificate",
            check_certificate,
            st.builds(_damaged_certificate, st.integers(0, 1), damage) | st.binary(max_size=64),
        ),
        Target(
            "file_name",
            check_file_name,
            st.lists(HOSTILE | st.sampled_from(["v2g_certificate", ".", "%2A", "%ff", ".pem"]), max_size=4).map(
                lambda texts: "".join(texts).encode("utf-8", "replace")
            )
            | st.binary(max_size=32),
        ),
        Target(
            "mqtt",
            check_mqtt,
            packet_streams() | st.tuples(packet_streams(), damage).map(lambda both: both[1](both[0])),
        ),
        Target(
            "private_key_path",
            check_private_key_path,
            st.lists(
                HOSTILE | st.sampled_from(["ACTIVE", "/", "/proc/self/fd/0", "v2g_certificate.pem"]), max_size=4
            ).map(lambda texts: "/".join(texts).encode("utf-8", "replace")),
        ),
    )
}
