"""The wire contract with Josev: typed messages, decoding, encoding.

Source: the Josev API page "Generate CSR" (v3.16.0 of that API) and, for ``certificate_installation_status``, v1.6.9;
the numbered decisions are those of ``docs/contract.md``. Topics are named sender/receiver, in lower case: MQTT topics
are case-sensitive, and the page's one ``cs/Josev`` is a typo.

A field's rule, and the message for an invalid value, are at the field in its struct, where `decode` reads them.
A new message is its struct, and its row in `_INBOUND`.

`decode` trusts nothing because it came over MQTT: it says of each payload whether it is ours, and if it is ours and
wrong, what is wrong and which id (if any) can be told so. JSON is read by the standard library rather than by msgspec
because only it can report duplicate names, and reads the id of a message that is wrong elsewhere.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import unicodedata
from collections import Counter
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec import inspect as types

from stationkey.contract.profiles import (
    COUNTRY_NAME_PATTERN,
    DEFAULT_ALGORITHM,
    EVSE_ID_PATTERN,
    NAME_MAX_LENGTH,
    PROFILES,
    Algorithm,
    CertificateType,
)
from stationkey.errors import MessageError

log = logging.getLogger(__name__)

REQUEST_TOPIC: Final = "josev/cs"
"""From Josev to the charging station."""
RESPONSE_TOPIC: Final = "cs/josev"
"""From the charging station to Josev."""

MAX_PAYLOAD: Final = 64 * 1024
"""Default of the largest payload in bytes. A real request has some 400; the limit makes a flood of large ones cheap."""

MAX_DEPTH: Final = 128
"""Most levels of arrays and objects. A real message has two; the parsers' own limits differ between Python versions."""

UUID_PATTERN: Final = r"^[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}$"
"""The 8-4-4-4-12 text form of RFC 9562, either case; no braces, no ``urn:uuid:`` (decision 4)."""

_UUID: Final = re.compile(UUID_PATTERN)
_WORDS: Final = "words"
"""In the ``extra`` of a field: the message for an invalid value, if the type does not imply it."""

_SHOWN: Final = 120
"""Characters of a value, or of a library's message, that an error shows."""

GENERATE_CSR: Final = "generate_csr"
CERTIFICATE_INSTALLATION_STATUS: Final = "certificate_installation_status"

MessageId = Annotated[
    str,
    Meta(
        pattern=UUID_PATTERN,
        description="UUID in its 8-4-4-4-12 text form (RFC 9562), either case. A response carries it as it came.",
        extra_json_schema={"format": "uuid"},
    ),
]
DirectoryName = Annotated[str, Meta(min_length=1, max_length=NAME_MAX_LENGTH)]
EvseId = Annotated[
    str,
    Meta(
        pattern=EVSE_ID_PATTERN,
        description="EVSE that the key is for. Keys, retries and activation are kept apart by it.",
        extra={_WORDS: "is not an EVSE ID (ISO 15118-2 Annex H), such as DE*ABC*E123456"},
    ),
]


class _Frozen(Struct, frozen=True, kw_only=True):
    """Immutable; unknown extra fields are ignored (decision 5), so that a newer Josev still works."""


class GenerateCsrData(_Frozen, frozen=True, kw_only=True):
    """``data`` of a ``generate_csr`` request."""

    certificate_type: CertificateType
    common_name: Annotated[
        DirectoryName,
        Meta(description="CN: the SECC ID (V2G types) or the station's serial number; 1 to 64 characters."),
    ]
    organization_name: Annotated[DirectoryName, Meta(description="O: 1 to 64 characters.")]
    country_name: Annotated[
        str,
        Meta(
            pattern=COUNTRY_NAME_PATTERN,
            description="C: two letters (ISO 3166-1 alpha-2).",
            extra={_WORDS: "must be two letters (ISO 3166-1)"},
        ),
    ]
    evse_id: EvseId | UnsetType = UNSET
    algorithm: Algorithm | UnsetType = UNSET


class GenerateCsrRequest(_Frozen, frozen=True, kw_only=True):
    """Asks the station for a key pair made in its TPM and the CSR for it. Topic ``josev/cs``."""

    id: MessageId
    name: Literal["generate_csr"]
    type: Literal["request"]
    data: GenerateCsrData

    @property
    def algorithm(self) -> Algorithm:
        """The requested algorithm, or the default (decision 2)."""
        return DEFAULT_ALGORITHM if self.data.algorithm is UNSET else self.data.algorithm

    @property
    def evse_id(self) -> str | None:
        """The EVSE of the key, or None."""
        return None if self.data.evse_id is UNSET else self.data.evse_id


class GenerateCsrResult(_Frozen, frozen=True, kw_only=True):
    """``data`` of a ``generate_csr`` response. `csr` is present exactly if the status is ``accepted``."""

    status: Literal["accepted", "rejected"]
    csr: Annotated[str, Meta(description="The CSR: PKCS#10 (RFC 2986) in PEM (RFC 7468).")] | UnsetType = UNSET


class GenerateCsrResponse(_Frozen, frozen=True, kw_only=True):
    """The station's answer. Topic ``cs/josev``; `id` is the request's own, character for character (decision 1)."""

    id: MessageId
    name: Literal["generate_csr"]
    type: Literal["response"]
    data: GenerateCsrResult


InstallationStatus = Literal["installed", "deleted", "failed_installation"]


class CertificateInstallationStatusData(_Frozen, frozen=True, kw_only=True):
    """``data`` of a ``certificate_installation_status`` update."""

    certificate_type: CertificateType
    status: InstallationStatus
    private_key_path: str | UnsetType = UNSET
    evse_id: EvseId | UnsetType = UNSET


class CertificateInstallationStatus(_Frozen, frozen=True, kw_only=True):
    """Tells the station that a certificate was installed, deleted, or failed to install. Topic ``josev/cs``."""

    id: MessageId
    name: Literal["certificate_installation_status"]
    type: Literal["update"]
    data: CertificateInstallationStatusData


Inbound = GenerateCsrRequest | CertificateInstallationStatus
"""The messages on ``josev/cs`` that are ours."""

_REQUEST: Final = "request"
_INBOUND: Final[dict[tuple[str, str], type[Inbound]]] = {
    (GENERATE_CSR, _REQUEST): GenerateCsrRequest,
    (CERTIFICATE_INSTALLATION_STATUS, "update"): CertificateInstallationStatus,
}
"""The struct of each incoming message, by its ``name`` and ``type``. One of type ``request`` is answered."""


def generate_csr(request_id: str, data: GenerateCsrData) -> GenerateCsrRequest:
    """Return a request with this id and data."""
    return GenerateCsrRequest(id=request_id, name=GENERATE_CSR, type="request", data=data)


def accepted(request: GenerateCsrRequest, csr: str) -> GenerateCsrResponse:
    """Return the answer to `request` with `csr` (PEM)."""
    return _response(request.id, GenerateCsrResult(status="accepted", csr=csr))


def rejected(request_id: str) -> GenerateCsrResponse:
    """Return the rejection of a request; the reason is only in log and ledger (decision 4)."""
    return _response(request_id, GenerateCsrResult(status="rejected"))


def _response(request_id: str, result: GenerateCsrResult) -> GenerateCsrResponse:
    return GenerateCsrResponse(id=request_id, name=GENERATE_CSR, type="response", data=result)


def is_usable_id(text: str) -> bool:
    """Return whether `text` is a UUID by which a request can be answered (decision 4)."""
    return _UUID.fullmatch(text) is not None


def encode(message: Struct) -> bytes:
    """Encode any message of this module as JSON in UTF-8.

    Raises:
        MessageError: a text has an unpaired surrogate, which Python makes of invalid UTF-8 on a command line.
    """
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError:
        raise MessageError("the message has text that is not UTF-8", reason="not_utf8") from None


def decode(payload: bytes, *, max_payload: int = MAX_PAYLOAD) -> Inbound | None:
    """Read one payload of ``josev/cs``.

    Args:
        payload: the payload.
        max_payload: largest payload in bytes. Of a larger one only so many are read, for its id.

    Returns:
        The message; or None if it is for another program (another ``name``, or a ``generate_csr`` of type
        ``response``), which is ignored silently (decision 3).

    Raises:
        MessageError: the payload is not JSON, or an invalid message for stationkey. Its `request_id` is set if a
            ``rejected`` can be sent.
    """
    document = _parse(payload, max_payload)
    name = document.get("name")
    if not isinstance(name, str):
        reason, text = document.wrong or ("not_a_message", "not a message: no text field 'name'")
        raise MessageError(text, reason=reason)
    structs = {kind: struct for (known, kind), struct in _INBOUND.items() if known == name}
    kind = document.get("type")
    if not structs or (isinstance(kind, str) and kind not in structs):
        return None
    kind, struct = next((pair for pair in structs.items() if pair[0] == kind), next(iter(structs.items())))

    request_id = document.usable_id()
    answerable = request_id if kind == _REQUEST else None
    if document.wrong is not None:
        reason, text = document.wrong
        raise MessageError(text, reason=reason, request_id=answerable)
    if request_id is None:
        raise MessageError(f"{name}: 'id' is not a UUID of the form 8-4-4-4-12", reason="id_invalid")
    try:
        known = _known(document, struct)
        message = msgspec.convert(known, struct)
        _check(message)
    except msgspec.ValidationError as error:
        reason, text = _explain(known.get("data"), _fields_of(struct), str(error))
        raise MessageError(text, reason=reason, request_id=answerable) from None
    except MessageError as error:
        error.request_id = answerable
        raise
    return message


def decode_response(payload: bytes) -> GenerateCsrResponse | None:
    """Read one payload of ``cs/josev``; None if it is not a ``generate_csr`` response."""
    try:
        text = payload.decode("utf-8")
        if _nested_too_deep(text):
            return None
        response = msgspec.json.decode(text, type=GenerateCsrResponse)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return response if is_usable_id(response.id) else None  # msgspec allows a line feed after the match of a pattern


class _Field(Struct, frozen=True):
    """A field of a message's ``data``, as declared in its struct; `words` is the message for an invalid value."""

    words: str
    pattern: re.Pattern[str] | None
    optional: bool


@functools.cache
def _fields_of(struct: type[Struct]) -> dict[str, _Field]:
    """Return the fields that the ``data`` of a message may have."""
    declared = types.type_info(struct)
    assert isinstance(declared, types.StructType)
    data = next(field.type for field in declared.fields if field.encode_name == "data")
    assert isinstance(data, types.StructType)
    return {
        field.encode_name: _Field(words=_words(field.type), pattern=_pattern(field.type), optional=not field.required)
        for field in data.fields
    }


def _words(declared: types.Type) -> str:
    match declared:
        case types.Metadata(extra={"words": str(words)}):
            return words
        case types.Metadata(type=inner) | types.UnionType(types=(inner, *_)):  # the union's other is UNSET
            return _words(inner)
        case types.EnumType(cls=values) | types.LiteralType(values=values):
            return f"is not one of {', '.join(map(str, values))}"
        case types.StrType(min_length=int(least), max_length=int(most)):
            return f"must be text of {least} to {most} characters"
        case types.StrType():
            return "must be text"
    return "is not valid"


def _pattern(declared: types.Type) -> re.Pattern[str] | None:
    match declared:
        case types.Metadata(type=inner) | types.UnionType(types=(inner, *_)):
            return _pattern(inner)
        case types.StrType(pattern=str(pattern)):
            return re.compile(pattern)
    return None


def _known(document: _Document, struct: type[Struct]) -> dict[str, object]:
    """Return the members of a message that its struct knows, without optional ones that are null (decision 10).

    msgspec ignores unknown members too, but fails for one whose name has an unpaired surrogate.

    Raises:
        MessageError: ``data`` is not an object, or has an invalid text.
    """
    known = {name: document[name] for name in struct.__struct_encode_fields__ if name in document}
    if "data" not in known:
        return known
    data = known["data"]
    if not isinstance(data, dict):
        raise MessageError("the field 'data' is not an object", reason="data_invalid")
    fields = _fields_of(struct)
    present = {name: data[name] for name in fields if name in data}
    null = [name for name, value in present.items() if value is None and fields[name].optional]
    if null:
        _say_null_is_absent()
    for name in null:
        del present[name]
    for name, value in present.items():
        _check_text(name, value)
    return known | {"data": present}


@functools.cache
def _say_null_is_absent() -> None:
    """Log, once per run, that the sender writes null for unset fields."""
    log.info("null in an optional field taken as absent")


class _Document(dict[str, object]):
    """A JSON object, with the error of its JSON, if any."""

    wrong: tuple[str, str] | None = None
    repeated: frozenset[str] = frozenset()

    def usable_id(self) -> str | None:
        value = self.get("id")
        # A repeated id is unusable: it is unknown which one the sender expects.
        return value if isinstance(value, str) and is_usable_id(value) and "id" not in self.repeated else None


def _parse(payload: bytes, max_payload: int) -> _Document:
    """Parse the JSON object of a payload strictly by RFC 8259 and I-JSON (RFC 7493: no duplicate names)."""
    if len(payload) > max_payload:
        return _outline(
            payload[:max_payload].decode("utf-8", "replace"),
            ("payload_too_large", f"the payload is {len(payload)} bytes; {max_payload} is the most that is read"),
        )
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MessageError(f"not UTF-8: byte {error.start} is not part of a character", reason="not_utf8") from None

    if _nested_too_deep(text):
        return _outline(text, ("nested_too_deep", f"the JSON is nested too deep: more than {MAX_DEPTH} levels"))

    strict = _Strict()
    try:
        document = json.loads(text, object_pairs_hook=strict.members, parse_constant=strict.constant)
    except json.JSONDecodeError as error:
        return _outline(text, ("not_json", f"not JSON (RFC 8259): invalid at character {error.pos}"))
    except ValueError:  # Python reads no integer of more than 4300 digits
        return _outline(text, ("number_too_long", "the JSON has a number of thousands of digits"))
    if not isinstance(document, _Document):
        raise MessageError("not a message: the JSON is not an object", reason="not_a_message")
    document.wrong = strict.wrong
    return document


class _Strict:
    """Hooks for `json.loads` that record violations which it would ignore."""

    wrong: tuple[str, str] | None = None

    def members(self, members: list[tuple[str, object]]) -> _Document:
        document = _Document(members)
        if len(document) != len(members):
            counts = Counter(name for name, _ in members)
            document.repeated = frozenset(name for name, count in counts.items() if count > 1)
            names = ", ".join(map(_quote, sorted(document.repeated)[:3]))
            self.wrong = ("duplicate_name", f"the JSON has more than one member named {names}")
        return document

    def constant(self, name: str) -> None:
        self.wrong = ("not_a_number", f"{name} is not JSON (RFC 8259 6)")


# Text without its closing quote is a token too, without backtracking (`*+`): each character is read once.
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}:,]')


def _nested_too_deep(text: str) -> bool:
    """Return whether arrays and objects are nested more than `MAX_DEPTH` levels. Linear in the length of `text`."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _TOKEN.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif match[0] in "]}":
            depth -= 1
    return False


def _outline(text: str, wrong: tuple[str, str]) -> _Document:
    """Return the top-level text members of a JSON object that is invalid, too large or too deep.

    Enough to recognise a message for stationkey, and to reject it by its id. Linear in the length of `text`.
    """
    document = _Document()
    document.wrong = wrong
    members: list[tuple[str, str]] = []
    depth = 0
    path: list[str] = []
    for match in _TOKEN.finditer(text):
        mark = match[0]
        if mark in "[{":
            depth += 1
            path = []
        elif mark in "]}":
            depth -= 1
            path = []
        elif depth == 1:
            path = [] if mark == "," else [*path[:3], mark]
            match path:
                case [key, ":", value]:
                    members.append((key, value))
    repeated: set[str] = set()  # changed in place: building a frozenset name by name takes quadratic time
    for raw_key, raw_value in members:
        try:
            key, value = json.loads(raw_key), json.loads(raw_value)
        except ValueError:
            continue
        if key in document:
            repeated.add(key)
        document[key] = value
    document.repeated = frozenset(repeated)
    return document


def _check(message: Inbound) -> None:
    """Check the rules that involve several fields."""
    data = message.data
    if isinstance(data, GenerateCsrData):
        required = PROFILES[data.certificate_type].required_algorithm
        if required is not None and data.algorithm is not required:
            named = "names none" if data.algorithm is UNSET else f"asks for {data.algorithm}"
            raise MessageError(
                f"{data.certificate_type} needs algorithm {required}; the request {named}",
                reason="algorithm_not_allowed",
            )
    fields = _fields_of(type(message))
    for name, field in fields.items():
        value = getattr(data, name)
        # msgspec searches with Python's re, where `$` also matches before a final line feed; JSON Schema's does not.
        if field.pattern is not None and isinstance(value, str) and field.pattern.fullmatch(value) is None:
            raise _invalid(name, value, field)


# Joiners (RFC 5892 appendix A: CONTEXTJ) belong to the spelling of words in several scripts and to emoji; tag
# characters end an emoji flag (UTS 51). Everything else of category Cf is invisible, and much of it reorders text.
_FORMAT_ALLOWED: Final = frozenset("\u200c\u200d") | {chr(code) for code in range(0xE0020, 0xE0080)}
_REFUSED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Zl", "Zp"})


def _check_text(field: str, value: object) -> None:
    """Refuse control characters and unpaired surrogates in a text."""
    if not isinstance(value, str) or value.isalnum() or (value.isascii() and value.isprintable()):
        return
    for character in value:
        category = unicodedata.category(character)
        if category == "Cs":
            what = f"a lone surrogate U+{ord(character):04X}, which is not a character"
        elif category in _REFUSED_CATEGORIES and character not in _FORMAT_ALLOWED:
            what = f"the control character U+{ord(character):04X}"
        else:
            continue
        raise MessageError(f"{field} has {what}", reason=f"{field}_invalid")


def _explain(data: object, fields: dict[str, _Field], error: str) -> tuple[str, str]:
    """Translate msgspec's error into a stable reason, and a message that shows the value."""
    missing = re.search(r"missing required field `(\w+)`", error)
    if missing:
        return f"{missing[1]}_missing", f"the field '{missing[1]}' is missing"
    found = re.search(r"\$\.data\.(\w+)", error)
    if found and isinstance(data, dict):
        error_in_field = _invalid(found[1], data.get(found[1]), fields[found[1]])
        return error_in_field.reason, error_in_field.message
    top = re.search(r"\$\.(\w+)", error)
    field = top[1] if top else "message"
    return f"{field}_invalid", f"the field '{field}' is not valid"


def _invalid(name: str, value: object, field: _Field) -> MessageError:
    return MessageError(f"{name} {_quote(value)} {field.words}", reason=f"{name}_invalid")


def _quote(value: object) -> str:
    """Return a value as shortened ASCII JSON, safe for a log line."""
    return _short(json.dumps(value, ensure_ascii=True, default=lambda _: "…"))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
