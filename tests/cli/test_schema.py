"""The schemas say what `decode` does, and judges that are not ours read them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from a_message import PAGE_REQUEST, REQUEST_ID
from hypothesis import given
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # it ships no types
from test_any_message import requests, unhurried
from test_messages import PAGE_RESPONSE, a_request, a_status

from stationkey import __version__
from stationkey.cli import schema as schema_documents
from stationkey.contract import messages
from stationkey.contract.messages import GenerateCsrRequest, decode, encode
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateType
from stationkey.contract.renewal import MAX_DUE, DueState, renewal_update

Json = dict[str, Any]
VALIDATORS = {name: Draft202012Validator(schema_documents.json_schema(name)) for name in schema_documents.MESSAGES}
REQUEST, RESPONSE, STATUS, RENEWAL = VALIDATORS.values()
CHECK = Path(__file__).parents[1] / "asyncapi" / "check.mjs"


def a_response(**data: object) -> Json:
    return {"id": REQUEST_ID, "name": "generate_csr", "type": "response", "data": data}


@pytest.mark.parametrize("name", schema_documents.MESSAGES)
def test_a_schema_is_json_schema_2020_12(name: str) -> None:
    document = schema_documents.json_schema(name)

    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(document)


@pytest.mark.parametrize(
    ("validator", "document"),
    [
        pytest.param(REQUEST, json.loads(PAGE_REQUEST), id="the page's request"),
        pytest.param(RESPONSE, json.loads(PAGE_RESPONSE), id="the page's response"),
        pytest.param(REQUEST, a_request(), id="no algorithm and no evse_id"),
        pytest.param(REQUEST, a_request() | {"priority": 3}, id="an unknown extra field"),
        pytest.param(REQUEST, a_request(priority=3), id="an unknown extra field in data"),
        pytest.param(
            REQUEST, a_request(certificate_type="v2g20_certificate", algorithm="ECDSA_SHA512"), id="v2g20, as required"
        ),
        pytest.param(REQUEST, a_request(common_name="国" * 64), id="64 characters, not bytes"),
        pytest.param(RESPONSE, a_response(status="rejected"), id="a rejection"),
        pytest.param(STATUS, a_status(), id="a status"),
        pytest.param(STATUS, a_status(certificate_type="v2g20_certificate", evse_id="DE*ABC*E1"), id="a full status"),
    ],
)
def test_what_is_right_validates(validator: Draft202012Validator, document: Json) -> None:
    validator.validate(document)


@pytest.mark.parametrize(
    ("validator", "document"),
    [
        *(
            pytest.param(REQUEST, {k: v for k, v in a_request().items() if k != member}, id=f"no {member}")
            for member in a_request()
        ),
        *(pytest.param(REQUEST, a_request(**{field: ...}), id=f"no {field}") for field in a_request()["data"]),
        pytest.param(REQUEST, a_request() | {"id": "7"}, id="id no UUID"),
        pytest.param(REQUEST, a_request() | {"id": f"{{{REQUEST_ID}}}"}, id="id in braces"),
        pytest.param(REQUEST, a_request() | {"name": "slac"}, id="another name"),
        pytest.param(REQUEST, a_request() | {"type": "response"}, id="another type"),
        pytest.param(REQUEST, a_request(certificate_type="mo_certificate"), id="unknown certificate type"),
        pytest.param(REQUEST, a_request(algorithm="MD5"), id="unknown algorithm"),
        pytest.param(REQUEST, a_request(algorithm=None), id="algorithm null"),
        pytest.param(REQUEST, a_request(certificate_type="v2g20_certificate"), id="v2g20 without algorithm"),
        pytest.param(
            REQUEST, a_request(certificate_type="v2g20_certificate", algorithm="RSA_SHA256"), id="v2g20 with another"
        ),
        pytest.param(REQUEST, a_request(country_name="GER"), id="country of three letters"),
        pytest.param(REQUEST, a_request(common_name=""), id="common name empty"),
        pytest.param(REQUEST, a_request(common_name="a" * 65), id="common name of 65 characters"),
        pytest.param(REQUEST, a_request(organization_name=7), id="organization a number"),
        pytest.param(REQUEST, a_request(evse_id="E1"), id="no EVSE ID"),
        pytest.param(RESPONSE, a_response(status="accepted"), id="accepted without a CSR"),
        pytest.param(RESPONSE, a_response(status="rejected", csr="PEM"), id="rejected with a CSR"),
        pytest.param(RESPONSE, a_response(status="rejected") | {"id": ""}, id="response without an id"),
        pytest.param(STATUS, a_status(status="active"), id="unknown status"),
        pytest.param(STATUS, a_status(evse_id="E1"), id="status with no EVSE ID"),
    ],
)
def test_what_is_wrong_does_not_validate(validator: Draft202012Validator, document: Json) -> None:
    assert not validator.is_valid(document)


@unhurried
@given(requests)
def test_what_decode_accepts_the_schema_accepts(request: GenerateCsrRequest) -> None:
    REQUEST.validate(json.loads(encode(request)))


@pytest.mark.parametrize("algorithm", [*Algorithm, None])
@pytest.mark.parametrize("certificate_type", CertificateType)
def test_decode_and_the_schema_agree_on_type_and_algorithm(
    certificate_type: CertificateType, algorithm: Algorithm | None
) -> None:
    chosen = {} if algorithm is None else {"algorithm": algorithm}
    document = a_request(certificate_type=certificate_type, **chosen)
    accepted = PROFILES[certificate_type].required_algorithm in {None, algorithm}

    assert REQUEST.is_valid(document) is accepted
    if accepted:
        assert decode(json.dumps(document).encode()) is not None


def test_what_the_station_answers_validates() -> None:
    request = decode(PAGE_REQUEST)
    assert isinstance(request, GenerateCsrRequest)

    RESPONSE.validate(json.loads(encode(messages.accepted(request, "PEM"))))
    RESPONSE.validate(json.loads(encode(messages.rejected(REQUEST_ID.upper()))))


@pytest.mark.parametrize("count", [0, 1, MAX_DUE, 10_000])
@pytest.mark.parametrize("station", ["", "depot7/" + 57 * "1"])
def test_what_the_renewal_topic_says_validates_and_is_bounded(count: int, station: str) -> None:
    longest = "DE*ABC*E" + 30 * "1"
    state: DueState = "expired"
    due = (CertificateType.CHARGING_STATION_CERTIFICATE, longest, "2026-05-30T12:00:00Z", state, station)
    update = renewal_update((due,) * count)
    RENEWAL.validate(json.loads(update))
    assert json.loads(update)["data"]["more"] == max(0, count - MAX_DUE)
    assert (b"station" in update.replace(b"charging_station_certificate", b"")) is (station != "" and count > 0)
    assert len(update) < 8192
    assert decode(update) is None  # somebody else's, if it comes back on josev/cs


@pytest.mark.parametrize("site", [False, True])
def test_the_asyncapi_projects_own_parser_has_nothing_against_the_document(*, site: bool) -> None:
    """Severity 0 is an error and 1 a warning; 2 and 3 are hints of taste."""
    environment = Path(sys.executable).parent
    judged = subprocess.run(
        [environment / "node", CHECK, environment.parent / "asyncapi"],
        input=json.dumps(schema_documents.asyncapi(site=site)),
        capture_output=True,
        text=True,
        check=True,
    )
    verdict = json.loads(judged.stdout)

    assert verdict["valid"]
    assert [complaint for complaint in verdict["complaints"] if complaint["severity"] < 2] == []


@pytest.mark.parametrize(("site", "before"), [(False, ""), (True, "{station}/")])
def test_the_asyncapi_document_has_every_message_on_its_topic(*, site: bool, before: str) -> None:
    document = schema_documents.document("asyncapi.site" if site else "asyncapi")
    topics = {
        channel["address"]: {reference["$ref"].rpartition("/")[2] for reference in channel["messages"].values()}
        for channel in document["channels"].values()
    }

    assert document["asyncapi"] == "3.0.0"
    assert document["info"]["version"] == __version__
    assert topics == {
        f"{before}josev/cs": {"GenerateCsrRequest", "CertificateInstallationStatus"},
        f"{before}cs/josev": {"GenerateCsrResponse"},
        "cs/stationkey/renewal": {"RenewalUpdate"},
    }
    assert set(document["components"]["messages"]) == set().union(*topics.values())


def test_the_asyncapi_document_and_the_schemas_say_the_same() -> None:
    schemas = schema_documents.asyncapi()["components"]["schemas"]
    of_document = json.dumps(schemas).replace("#/components/schemas/", "#/$defs/")
    of_schemas: Json = {}
    for name in schema_documents.MESSAGES:
        of_schemas |= schema_documents.json_schema(name)["$defs"]

    assert json.loads(of_document) == of_schemas
