"""A field of a message is its struct's alone: it arrives, is validated, and may be null where it is optional."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import pytest
from msgspec import UNSET, Meta, UnsetType

from stationkey.contract import messages
from stationkey.contract.messages import CertificateInstallationStatus, GenerateCsrData, GenerateCsrRequest, decode
from stationkey.errors import MessageError

REQUEST: dict[str, Any] = {
    "certificate_type": "v2g_certificate",
    "common_name": "DE-ABC-S-1",
    "organization_name": "EcoG",
    "country_name": "DE",
}
STATUS: dict[str, Any] = {"certificate_type": "v2g_certificate", "status": "installed"}


def wire(data: dict[str, Any], name: str = "generate_csr", kind: str = "request") -> bytes:
    return json.dumps({"id": "123e4567-e89b-12d3-a456-426614174000", "name": name, "type": kind, "data": data}).encode()


def reason_of(payload: bytes) -> str:
    with pytest.raises(MessageError) as refused:
        decode(payload)
    return refused.value.reason


class NewData(GenerateCsrData, frozen=True, kw_only=True):
    """As a newer version of the API may have it."""

    site: Annotated[str, Meta(pattern="^[A-Z]{3}$", extra={"words": "must be three letters"})] | UnsetType = UNSET
    floor: int | UnsetType = UNSET


class NewRequest(GenerateCsrRequest, frozen=True, kw_only=True):
    data: NewData


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(messages._INBOUND, ("generate_csr", "request"), NewRequest)  # noqa: SLF001 - a newer contract


@pytest.mark.usefixtures("newer")
def test_a_field_that_is_added_to_a_struct_arrives() -> None:
    message = decode(wire(REQUEST | {"site": "BER", "floor": 2}))

    assert isinstance(message, NewRequest)
    assert (message.data.site, message.data.floor) == ("BER", 2)


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("site", "Berlin", id="another pattern"),
        pytest.param("site", "BER\n", id="a line feed behind the pattern"),
        pytest.param("site", "B\u202eR", id="a control character"),
        pytest.param("site", "\ud800", id="half a character"),
        pytest.param("site", 7, id="another type"),
        pytest.param("floor", "2", id="text for a number"),
    ],
)
def test_a_field_that_is_added_to_a_struct_is_validated(field: str, value: object) -> None:
    assert reason_of(wire(REQUEST | {field: value})) == f"{field}_invalid"


@pytest.mark.usefixtures("newer")
def test_the_words_of_a_field_are_those_of_its_struct() -> None:
    with pytest.raises(MessageError, match="must be three letters") as refused:  # words: those of the struct above
        decode(wire(REQUEST | {"site": "Berlin"}))
    assert refused.value.reason == "site_invalid"


def test_a_field_of_another_message_is_an_unknown_one() -> None:
    """`status` has a rule in a status, and none in a request."""
    assert decode(wire(REQUEST | {"status": 7})) == decode(wire(REQUEST))


@pytest.mark.parametrize("field", ["algorithm", "evse_id"])
def test_null_in_an_optional_field_of_a_request_means_that_it_is_absent(field: str) -> None:
    assert decode(wire(REQUEST | {field: None})) == decode(wire(REQUEST))


@pytest.mark.parametrize("field", ["private_key_path", "evse_id"])
def test_null_in_an_optional_field_of_a_status_means_that_it_is_absent(field: str) -> None:
    name = "certificate_installation_status"
    message = decode(wire(STATUS | {field: None}, name, "update"))

    assert isinstance(message, CertificateInstallationStatus)
    assert message == decode(wire(STATUS, name, "update"))


def test_null_for_an_algorithm_that_is_required_is_the_same_as_none() -> None:
    absent = REQUEST | {"certificate_type": "v2g20_certificate", "algorithm": None}

    assert reason_of(wire(absent)) == "algorithm_not_allowed"


@pytest.mark.parametrize("field", REQUEST)
def test_null_in_a_required_field_is_wrong(field: str) -> None:
    assert reason_of(wire(REQUEST | {field: None})) == f"{field}_invalid"


def test_that_null_is_taken_as_absent_is_said_once_per_run(caplog: pytest.LogCaptureFixture) -> None:
    messages._say_null_is_absent.cache_clear()  # noqa: SLF001 - a run begins
    with caplog.at_level(logging.INFO, logger=messages.__name__):
        for _ in range(3):
            decode(wire(REQUEST | {"algorithm": None, "evse_id": None}))

    assert [record.levelname for record in caplog.records] == ["INFO"]
