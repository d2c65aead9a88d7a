"""What `josev/cs` may carry, and what becomes of it."""

from __future__ import annotations

import json

import msgspec
import pytest
from a_message import NAMES, PAGE_REQUEST, REQUEST_ID, Json, wire
from msgspec import UNSET

from stationkey.contract import messages
from stationkey.contract.messages import (
    MAX_DEPTH,
    CertificateInstallationStatus,
    GenerateCsrData,
    GenerateCsrRequest,
    decode,
    decode_response,
    encode,
)
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateType
from stationkey.errors import Fault, MessageError

PAGE_RESPONSE = b"""{"id": "57828133-8cfe-477d-b829-0b60aff90c2a", "name": "generate_csr", "type": "response",
 "data": {"status": "accepted", "csr": "-----BEGIN CERTIFICATE REQUEST..."}}"""


def a_request(**data: object) -> Json:
    """A right request, with some of its data set otherwise, or left out (...)."""
    members = {
        "certificate_type": "v2g_certificate",
        "common_name": "DE-ABC-S-1",
        "organization_name": "Über Strom GmbH",
        "country_name": "DE",
    } | data
    return {
        "id": REQUEST_ID,
        "name": "generate_csr",
        "type": "request",
        "data": {name: value for name, value in members.items() if value is not ...},
    }


def a_status(**data: object) -> Json:
    members = {"certificate_type": "v2g_certificate", "status": "installed"} | data
    return {"id": REQUEST_ID, "name": "certificate_installation_status", "type": "update", "data": members}


def with_member(document: Json, member: str) -> bytes:
    """JSON text of `document` with one more member, as text: one that `json.dumps` would not write."""
    return wire(document)[:-1] + f", {member}}}".encode()


def decoded(document: Json) -> GenerateCsrRequest:
    message = decode(wire(document))
    assert isinstance(message, GenerateCsrRequest)
    return message


def refusal(payload: bytes) -> MessageError:
    with pytest.raises(MessageError) as caught:
        decode(payload)
    return caught.value


# What is right.


def test_the_pages_own_request_is_read() -> None:
    request = decode(PAGE_REQUEST)

    assert isinstance(request, GenerateCsrRequest)
    assert request.id == REQUEST_ID
    assert request.data == GenerateCsrData(
        certificate_type=CertificateType.CHARGING_STATION_CERTIFICATE,
        common_name="9783161484100",
        organization_name="EcoG",
        country_name="DE",
        evse_id="DE*SEV*E123456789",
        algorithm=Algorithm.ECDSA_SHA256,
    )


def test_the_pages_own_response_is_read() -> None:
    response = decode_response(PAGE_RESPONSE)

    assert response is not None
    assert response.id == "57828133-8cfe-477d-b829-0b60aff90c2a"
    assert (response.data.status, response.data.csr) == ("accepted", "-----BEGIN CERTIFICATE REQUEST...")


def test_algorithm_and_evse_id_are_optional() -> None:
    request = decoded(a_request())

    assert (request.data.algorithm, request.data.evse_id) == (UNSET, UNSET)
    assert (request.algorithm, request.evse_id) == (Algorithm.ECDSA_SHA256, None)


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("certificate_type", CertificateType)
def test_an_algorithm_is_taken_unless_the_certificate_type_requires_another(
    certificate_type: CertificateType, algorithm: Algorithm
) -> None:
    document = a_request(certificate_type=certificate_type, algorithm=algorithm)

    if PROFILES[certificate_type].required_algorithm in {None, algorithm}:
        assert decoded(document).algorithm is algorithm
    else:
        assert refusal(wire(document)).reason == "algorithm_not_allowed"


@pytest.mark.parametrize(
    "request_id",
    [
        pytest.param("123E4567-E89B-12D3-A456-426614174000", id="upper case"),
        pytest.param("123e4567-E89B-12d3-A456-426614174000", id="mixed case"),
        pytest.param("00000000-0000-0000-0000-000000000000", id="nil UUID"),
        pytest.param("ffffffff-ffff-ffff-ffff-ffffffffffff", id="max UUID"),
    ],
)
def test_an_id_is_kept_character_for_character(request_id: str) -> None:
    request = decoded(a_request() | {"id": request_id})

    assert request.id == request_id
    assert json.loads(encode(messages.accepted(request, "PEM")))["id"] == request_id
    assert json.loads(encode(messages.rejected(request_id)))["id"] == request_id


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Über Strom GmbH", id="umlaut"),
        pytest.param("Ελληνική Ηλεκτροκίνηση", id="Greek"),
        pytest.param("国家电网有限公司", id="Chinese"),
        pytest.param("شركة الكهرباء", id="Arabic"),
        pytest.param("می‌خواهم", id="Persian, with a zero-width non-joiner"),
        pytest.param("\N{HIGH VOLTAGE SIGN}\N{VARIATION SELECTOR-16} Strom", id="emoji with a variation selector"),
        pytest.param("\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ELECTRIC PLUG}", id="emoji with a zero-width joiner"),
        pytest.param(
            "\N{WAVING BLACK FLAG}" + "".join(chr(0xE0000 + ord(letter)) for letter in "gbsct") + "\N{CANCEL TAG}",
            id="flag of Scotland, spelled with tags",
        ),
        pytest.param("U\N{COMBINING DIAERESIS}ber", id="decomposed umlaut, not composed"),
        pytest.param("  EcoG  ", id="spaces at both ends"),
        pytest.param("Eco\N{NO-BREAK SPACE}G", id="no-break space"),
        pytest.param("[bold]\\n$(id)'\"<a>", id="markup and quotes"),
        pytest.param("国" * 64, id="64 characters of 192 bytes"),
        pytest.param("\U0001f50c" * 64, id="64 characters outside the basic plane"),
    ],
)
def test_a_name_is_kept_byte_for_byte(name: str) -> None:
    request = decoded(a_request(common_name=name, organization_name=name))

    assert request.data.common_name.encode() == name.encode()
    assert request.data.organization_name.encode() == name.encode()
    assert decode(encode(request)) == request


@pytest.mark.parametrize(
    "evse_id",
    ["DE*SEV*E123456789", "DESEVE1", "de*sev*e1", "DE*ABCE1*2*3", "DE*ABC*E" + "1" * 30],
)
def test_an_evse_id_is_read_in_every_form_of_the_standard(evse_id: str) -> None:
    assert decoded(a_request(evse_id=evse_id)).evse_id == evse_id


# What is none of our business.


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(
            wire({"id": REQUEST_ID, "name": "cs_status_and_limits", "type": "update", "data": {}}), id="other"
        ),
        pytest.param(wire({"name": "cs_status_and_limits"}), id="other, with nothing else"),
        pytest.param(wire({"name": "cs_status_and_limits", "id": 7, "type": []}), id="other, wrong by our rules"),
        pytest.param(b'{"name": "slac", "x": 1, "x": NaN}', id="other, with duplicate names and NaN"),
        pytest.param(wire({"name": "slac", "data": "x" * 70_000}), id="other, over 64 KiB"),
        pytest.param(b'{"name": "slac", "data": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", id="other, 10,000 deep"),
        pytest.param(b'{"name": "slac", "data": ' + b"9" * 5_000 + b"}", id="other, with an integer of 5,000 digits"),
        pytest.param(wire({"name": "\ud800"}), id="other, its name half a character"),
        pytest.param(wire(a_request() | {"name": "generate_csr "}), id="a name like ours"),
        pytest.param(wire(a_request() | {"name": "Generate_CSR"}), id="our name in other letters"),
        pytest.param(PAGE_RESPONSE, id="our response, on the wrong topic"),
        pytest.param(wire(a_request() | {"type": "response"}), id="generate_csr of type response"),
        pytest.param(wire(a_request() | {"type": "update"}), id="generate_csr of another type"),
        pytest.param(wire(a_status() | {"type": "response"}), id="installation status of another type"),
    ],
)
def test_a_message_that_is_not_ours_is_passed_over_in_silence(payload: bytes) -> None:
    assert decode(payload) is None


@pytest.mark.parametrize(
    "member",
    [
        pytest.param('"priority": 3', id="a number"),
        pytest.param('"priority": {"a": [null, true, 1e999]}', id="a tree"),
        pytest.param('"x": "\\u0000\\u202e"', id="control characters"),
        pytest.param('"x": "\\ud800"', id="half a character"),
        pytest.param('"\\ud800": 1', id="half a character in its name"),
        pytest.param('"x": ["\\udfff", {"\\ud800": "\\ud800"}]', id="half characters inside"),
        pytest.param('"x": ' + "[" * 100 + "]" * 100, id="nested 100 deep"),
    ],
)
@pytest.mark.parametrize("document", [a_request(), a_status()], ids=["request", "status"])
def test_an_unknown_extra_field_is_ignored_wherever_it_stands(document: Json, member: str) -> None:
    known = decode(wire(document))
    data = with_member(document["data"], member).decode()

    assert decode(with_member(document, member)) == known
    assert decode(wire(document | {"data": "DATA"}).replace(b'"DATA"', data.encode())) == known


# What is wrong.

DEEP = "[" * 10_000 + "]" * 10_000
DIGITS = "9" * 5_000
CONTROLS = {
    "NUL": "\0",
    "line feed": "\n",
    "delete": "\x7f",
    "C1 control": "\x85",
    "U+202E, which turns the text around": "\u202e",
    "U+2028, which is a line end": "\u2028",
    "U+2029, which is a line end": "\u2029",
    "U+200B, which cannot be seen": "\u200b",
    "U+FEFF, which cannot be seen": "\ufeff",
}
NO_TEXT: list[object] = [None, 7, True, [], {"a": 1}]

ANSWERABLE = [
    # The JSON.
    pytest.param(wire(a_request() | {"x": "x" * 65_536}), "payload_too_large", "65536", id="over 64 KiB"),
    pytest.param(with_member(a_request(), f'"x": {DEEP}'), "nested_too_deep", "", id="10,000 deep"),
    pytest.param(with_member(a_request(), f'"x": {DEEP[:10_000]}'), "nested_too_deep", "", id="10,000 deep, open"),
    pytest.param(
        wire(a_request(country_name="X")).replace(b'"X"', DEEP.encode()), "nested_too_deep", "", id="deep data"
    ),
    pytest.param(
        with_member(a_request(), '"type": "request"'), "duplicate_name", '"type"', id="a name twice at the top"
    ),
    pytest.param(
        wire(a_request()).replace(b'"country_name"', b'"common_name": "a", "country_name"'),
        "duplicate_name",
        '"common_name"',
        id="a name twice in data",
    ),
    pytest.param(
        with_member(a_request(), '"x": [{"\\ud800": 1, "\\ud800": 2}]'),
        "duplicate_name",
        "ud800",
        id="a name twice below",
    ),
    pytest.param(with_member(a_request(), '"x": NaN'), "not_a_number", "NaN", id="NaN"),
    pytest.param(with_member(a_request(), '"x": [-Infinity]'), "not_a_number", "-Infinity", id="-Infinity"),
    pytest.param(with_member(a_request(), f'"x": {DIGITS}'), "number_too_long", "", id="5,000 digits"),
    # The shape.
    pytest.param(wire({k: v for k, v in a_request().items() if k != "type"}), "type_missing", "'type'", id="no type"),
    pytest.param(wire(a_request() | {"type": 1}), "type_invalid", "'type'", id="type a number"),
    pytest.param(wire(a_request() | {"type": None}), "type_invalid", "'type'", id="type null"),
    pytest.param(wire({k: v for k, v in a_request().items() if k != "data"}), "data_missing", "'data'", id="no data"),
    *(
        pytest.param(wire(a_request() | {"data": data}), "data_invalid", "'data'", id=f"data {data!a}")
        for data in (*NO_TEXT[:-1], "text", "\ud800")
    ),
    *(
        pytest.param(wire(a_request(**{field: ...})), f"{field}_missing", f"'{field}'", id=f"no {field}")
        for field in ("certificate_type", "common_name", "organization_name", "country_name")
    ),
    *(
        pytest.param(wire(a_request(**{field: value})), f"{field}_invalid", field, id=f"{field} {value!r}")
        for field in (*NAMES, "country_name", "certificate_type", "algorithm", "evse_id")
        for value in NO_TEXT[field in {"algorithm", "evse_id"} :]  # null means that it is absent
    ),
    # The values.
    pytest.param(wire(a_request(certificate_type="mo_certificate")), "certificate_type_invalid", "v2g20", id="type"),
    pytest.param(wire(a_request(certificate_type="V2G_CERTIFICATE")), "certificate_type_invalid", "v2g20", id="TYPE"),
    pytest.param(wire(a_request(algorithm="ECDSA_SHA384")), "algorithm_invalid", "ECDSA_SHA256", id="algorithm"),
    pytest.param(wire(a_request(algorithm="")), "algorithm_invalid", '""', id="algorithm empty"),
    pytest.param(
        wire(a_request(certificate_type="v2g20_certificate")),
        "algorithm_not_allowed",
        "ECDSA_SHA512; the request names none",
        id="v2g20 without algorithm",
    ),
    pytest.param(
        wire(a_request(certificate_type="v2g20_certificate", algorithm="ECDSA_SHA256")),
        "algorithm_not_allowed",
        "ECDSA_SHA512; the request asks for ECDSA_SHA256",
        id="v2g20 with another algorithm",
    ),
    *(
        pytest.param(
            wire(a_request(country_name=value)), "country_name_invalid", "two letters", id=f"country {value!a}"
        )
        for value in ("", "D", "GER", "D1", "DE ", "ÄÖ", "D\N{CYRILLIC CAPITAL LETTER IE}")
    ),
    *(
        pytest.param(wire(a_request(**{field: value})), f"{field}_invalid", "64", id=f"{field} {words}")
        for field in NAMES
        for words, value in (("empty", ""), ("of 65 characters", "a" * 65), ("of 65 wide characters", "国" * 65))
    ),
    *(
        pytest.param(
            wire(a_request(**{field: f"Eco{character}G"})),
            f"{field}_invalid",
            f"U+{ord(character):04X}",
            id=f"{field} with {words}",
        )
        for field in (*NAMES, "country_name", "evse_id", "algorithm")
        for words, character in CONTROLS.items()
    ),
    *(
        pytest.param(wire(a_request(**{field: "a\ud800"})), f"{field}_invalid", "U+D800", id=f"{field} half")
        for field in (*NAMES, "country_name", "evse_id", "algorithm", "certificate_type")
    ),
    *(
        pytest.param(wire(a_request(evse_id=value)), "evse_id_invalid", "EVSE ID", id=f"evse_id {value!a}")
        for value in ("", "1", "DE*AB*E1", "DE*ABC*S1", "D3*ABC*E1", "DE*ABC*E", "DE*ABC*E" + "1" * 31, "DE-ABC-E1")
    ),
]


@pytest.mark.parametrize(("payload", "reason", "words"), ANSWERABLE)
def test_a_wrong_request_is_refused_by_its_id_and_says_why(payload: bytes, reason: str, words: str) -> None:
    error = refusal(payload)

    assert error.request_id == REQUEST_ID
    assert error.reason == reason
    assert words in error.message  # words: which field or value, what it may be; empty where the reason says it all
    assert error.fault is Fault.REQUEST


UNUSABLE = [
    pytest.param("", id="empty"),
    pytest.param("1", id="short"),
    pytest.param("123e4567e89b12d3a456426614174000", id="no hyphens"),
    pytest.param(f"{{{REQUEST_ID}}}", id="braces"),
    pytest.param(f"urn:uuid:{REQUEST_ID}", id="URN"),
    pytest.param(f"{REQUEST_ID}\n", id="line feed behind it"),
    pytest.param(f" {REQUEST_ID}", id="space before it"),
    pytest.param(REQUEST_ID.replace("e", "g"), id="no hexadecimal digit"),
    pytest.param(REQUEST_ID.replace("1", "\N{FULLWIDTH DIGIT ONE}"), id="digits of another script"),
    pytest.param("\ud800" + REQUEST_ID[1:], id="half a character"),
    pytest.param(None, id="null"),
    pytest.param(7, id="number"),
    pytest.param([REQUEST_ID], id="array"),
]


@pytest.mark.parametrize("request_id", UNUSABLE)
@pytest.mark.parametrize("document", [a_request(), a_status()], ids=["request", "status"])
def test_an_id_that_is_no_uuid_is_refused_and_cannot_be_answered(document: Json, request_id: object) -> None:
    error = refusal(wire(document | {"id": request_id}))

    assert (error.reason, error.request_id) == ("id_invalid", None)
    assert "8-4-4-4-12" in error.message  # words: what it must be


@pytest.mark.parametrize(
    ("payload", "reason", "words"),
    [
        pytest.param(b"\xff\xfe", "not_utf8", "byte 0", id="not UTF-8"),
        pytest.param(wire(a_request()).replace(b"DE-", b"\xed\xa0\x80"), "not_utf8", "", id="CESU surrogate"),
        pytest.param(json.dumps(a_request()).encode("utf-16"), "not_utf8", "", id="UTF-16"),
        pytest.param(b"", "not_json", "", id="nothing"),
        pytest.param(b"generate_csr", "not_json", "", id="no JSON"),
        pytest.param(b"{'name': 'generate_csr'}", "not_json", "", id="single quotes"),
        pytest.param(b"[]", "not_a_message", "object", id="array"),
        pytest.param(b"null", "not_a_message", "object", id="null"),
        pytest.param(b"NaN", "not_a_message", "object", id="NaN alone"),
        pytest.param(b"[" + PAGE_REQUEST + b"]", "not_a_message", "object", id="a request in an array"),
        pytest.param(b"{}", "not_a_message", "'name'", id="empty object"),
        pytest.param(wire(a_request() | {"name": 7}), "not_a_message", "'name'", id="name a number"),
        pytest.param(b"[" * 10_000, "nested_too_deep", "", id="10,000 arrays"),
        pytest.param(DIGITS.encode(), "number_too_long", "", id="5,000 digits alone"),
        pytest.param(b" " * 65_537, "payload_too_large", "65537 bytes", id="over 64 KiB of nothing"),
        pytest.param(
            wire({"x": "x" * 65_536} | a_request()), "payload_too_large", "65536", id="over 64 KiB, its id at the end"
        ),
        pytest.param(with_member(a_request(), f'"id": "{REQUEST_ID}"'), "duplicate_name", '"id"', id="an id twice"),
        pytest.param(
            with_member(a_request(), f'"i\\u0064": "{REQUEST_ID}", "x": {DEEP}'),
            "nested_too_deep",
            "",
            id="an id twice, and 10,000 deep",
        ),
        pytest.param(
            with_member(a_request() | {"id": "7"}, '"x": NaN'), "not_a_number", "NaN", id="NaN, and no usable id"
        ),
        # These took seconds each while the outline of a large message was not linear in its length.
        pytest.param(b'{"' + b'\\"' * 40_000, "payload_too_large", "65536", id="a text that never ends"),
        pytest.param(b"{" + b":" * 70_000, "payload_too_large", "65536", id="colons"),
        pytest.param(b"{" + b'"" ' * 30_000, "payload_too_large", "65536", id="texts without commas"),
    ],
)
def test_what_is_no_message_is_refused_and_cannot_be_answered(payload: bytes, reason: str, words: str) -> None:
    error = refusal(payload)

    assert (error.reason, error.request_id) == (reason, None)
    assert words in error.message  # words: which field, size or value; empty where the reason says it all


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(wire(a_request()) + b"\0", id="NUL behind it"),
        pytest.param(wire(a_request()) + b"\0" * 60_000, id="many NUL behind it"),
        pytest.param(wire(a_request()) + b"{}", id="an object behind it"),
        pytest.param(wire(a_request()) + b"]", id="a bracket behind it"),
        pytest.param(b"\xef\xbb\xbf" + wire(a_request()), id="byte order mark"),
        pytest.param(wire(a_request())[:-1], id="cut off"),
        pytest.param(wire(a_request()).replace(b'"DE"', b'"D\nE"'), id="bare line feed"),
        pytest.param(wire(a_request()).replace(b',"data"', b',,"data"').replace(b', "data"', b',,"data"'), id="commas"),
    ],
)
def test_a_request_that_is_not_json_is_rejected_by_the_id_that_can_be_read(payload: bytes) -> None:
    """Decision 4: it is wrong, and carries a usable id."""
    error = refusal(payload)

    assert (error.reason, error.request_id) == ("not_json", REQUEST_ID)


def test_two_requests_in_one_payload_cannot_be_answered() -> None:
    """Nobody can know which id the sender waits for."""
    two = wire(a_request()) + wire(a_request() | {"id": REQUEST_ID.replace("1", "2")})

    assert (refusal(two).reason, refusal(two).request_id) == ("not_json", None)


def test_a_payload_of_64_kib_is_read() -> None:
    document = a_request() | {"x": ""}
    full = document | {"x": "x" * (messages.MAX_PAYLOAD - len(wire(document)))}

    assert len(wire(full)) == 64 * 1024
    assert decoded(full) == decoded(a_request())


def test_how_much_is_read_is_for_the_caller_to_say() -> None:
    payload = wire(a_request())

    assert messages.decode(payload, max_payload=len(payload)) == decoded(a_request())
    with pytest.raises(MessageError) as refused:
        messages.decode(payload, max_payload=len(payload) - 1)
    assert (refused.value.reason, refused.value.request_id) == ("payload_too_large", REQUEST_ID)
    assert messages.decode(wire(a_request() | {"x": "x" * 70_000}), max_payload=1024 * 1024) == decoded(a_request())


def test_a_great_many_repeated_names_are_looked_at_once_each() -> None:
    """Were the names seen so far gone through for each that follows, this would take minutes."""
    members = ", ".join(f'"{number // 2}": ""' for number in range(400_000))
    payload = wire(a_request())[:-1] + f", {members}}}".encode()
    with pytest.raises(MessageError) as refused:
        messages.decode(payload, max_payload=len(payload) - 1)

    assert (refused.value.reason, refused.value.request_id) == ("payload_too_large", REQUEST_ID)


@pytest.mark.parametrize("levels", [100, *range(MAX_DEPTH - 2, MAX_DEPTH + 3), 500, *range(950, 1010, 3), 3000])
def test_a_value_of_ours_is_refused_at_every_depth(levels: int) -> None:
    """Also around the depth at which the JSON parser of one version of Python or another gives up."""
    within = levels - 2  # the message and its data
    nested = "[" * within + "]" * within
    error = refusal(wire(a_request(country_name="X")).replace(b'"X"', nested.encode()))

    assert error.reason == ("nested_too_deep" if levels > MAX_DEPTH else "country_name_invalid")
    assert error.request_id == REQUEST_ID


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), id="as deep as may be"),
        pytest.param('{"a":' * (MAX_DEPTH - 1) + "0" + "}" * (MAX_DEPTH - 1), id="objects as deep as may be"),
        pytest.param("[" + ", ".join(["[{}]"] * 1000) + "]", id="many, side by side"),
        pytest.param('"' + "[{" * 1000 + '"', id="brackets in a text"),
        pytest.param('"' + '\\"[{' * 1000 + '"', id="brackets in a text, behind escaped quotes"),
        pytest.param('["\\\\", "' + "{[" * 1000 + '\\\\"]', id="brackets in a text, behind escaped backslashes"),
        pytest.param('{"' + "[" * 1000 + '": 1}', id="brackets in a name"),
    ],
)
def test_only_what_stands_inside_one_another_counts_as_deep(value: str) -> None:
    assert decode(with_member(a_request(), f'"x": {value}')) == decoded(a_request())
    assert decode_response(PAGE_RESPONSE.rstrip()[:-1] + f', "x": {value}}}'.encode()) == decode_response(PAGE_RESPONSE)


@pytest.mark.parametrize(("payload", "reason", "words"), ANSWERABLE)
def test_what_is_said_of_a_wrong_request_is_one_short_line_and_escaped(payload: bytes, reason: str, words: str) -> None:
    del reason, words
    message = refusal(payload).message

    assert message.isprintable()
    assert message.replace("…", "").isascii()
    assert len(message) < 320


def test_a_rejection_carries_the_id_and_the_status_and_nothing_else() -> None:
    assert json.loads(encode(messages.rejected(REQUEST_ID))) == {
        "id": REQUEST_ID,
        "name": "generate_csr",
        "type": "response",
        "data": {"status": "rejected"},
    }


# certificate_installation_status.


@pytest.mark.parametrize("status", ["installed", "deleted", "failed_installation"])
@pytest.mark.parametrize("certificate_type", CertificateType)
def test_an_installation_status_is_read_for_every_certificate_type(
    certificate_type: CertificateType, status: str
) -> None:
    message = decode(wire(a_status(certificate_type=certificate_type, status=status)))

    assert isinstance(message, CertificateInstallationStatus)
    assert (message.data.certificate_type, message.data.status) == (certificate_type, status)
    assert (message.data.evse_id, message.data.private_key_path) == (UNSET, UNSET)


def test_an_installation_status_may_say_which_evse_and_which_file() -> None:
    message = decode(wire(a_status(evse_id="DE*ABC*E1", private_key_path="/run/stationkey/ключ.pem")))

    assert isinstance(message, CertificateInstallationStatus)
    assert (message.data.evse_id, message.data.private_key_path) == ("DE*ABC*E1", "/run/stationkey/ключ.pem")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        pytest.param(wire(a_status(status="active")), "status_invalid", id="status"),
        pytest.param(wire(a_status(status=None)), "status_invalid", id="status null"),
        pytest.param(wire(a_status(certificate_type="x")), "certificate_type_invalid", id="certificate type"),
        pytest.param(wire(a_status(evse_id="x")), "evse_id_invalid", id="evse_id"),
        pytest.param(wire(a_status(evse_id="DE*ABC*E1\n")), "evse_id_invalid", id="evse_id with a line feed"),
        pytest.param(wire(a_status(private_key_path=7)), "private_key_path_invalid", id="path"),
        pytest.param(wire(a_status(private_key_path="\ud800")), "private_key_path_invalid", id="path half a character"),
        pytest.param(wire(a_status(private_key_path="/a\n/b")), "private_key_path_invalid", id="path with a line feed"),
        pytest.param(wire(a_status() | {"data": {}}), "certificate_type_missing", id="no data"),
        pytest.param(with_member(a_status(), f'"x": {DEEP}'), "nested_too_deep", id="10,000 deep"),
        pytest.param(with_member(a_status(), '"x": NaN'), "not_a_number", id="NaN"),
    ],
)
def test_a_wrong_installation_status_is_refused_and_is_never_answered(payload: bytes, reason: str) -> None:
    """It has an id, but there is no response to it that anybody waits for."""
    error = refusal(payload)

    assert (error.reason, error.request_id) == (reason, None)


# The asking side.


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xff", id="not UTF-8"),
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(
            PAGE_RESPONSE.rstrip()[:-1] + b', "x": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", id="too deep by one"
        ),
        pytest.param(PAGE_REQUEST, id="a request"),
        pytest.param(PAGE_RESPONSE.replace(b"generate_csr", b"slac"), id="another's response"),
        pytest.param(PAGE_RESPONSE.replace(b"accepted", b"perhaps"), id="another status"),
        pytest.param(PAGE_RESPONSE.replace(b"-----BEGIN", b"\\ud800"), id="half a character"),
    ],
)
def test_what_is_no_response_is_none_to_the_asking_side(payload: bytes) -> None:
    assert decode_response(payload) is None


def test_a_message_with_half_a_character_cannot_be_sent_and_says_so() -> None:
    """Python makes such text of bytes on a command line that are no UTF-8."""
    request = decoded(a_request())
    half = messages.generate_csr(request.id, msgspec.structs.replace(request.data, common_name="\udcff"))

    with pytest.raises(MessageError) as refused:
        encode(half)
    assert refused.value.reason == "not_utf8"


def test_a_message_cannot_be_changed() -> None:
    request = decoded(a_request())

    with pytest.raises(AttributeError):
        request.id = "another"  # type: ignore[misc] # what is shown is that the type checker is right
