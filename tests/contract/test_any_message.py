"""Whatever comes: no bytes raise anything but `MessageError`, and what is encoded is decoded as it was."""

from __future__ import annotations

import string

from a_message import NAMES, PAGE_REQUEST, REQUEST_ID, Json, wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from stationkey.contract import messages
from stationkey.contract.messages import (
    GenerateCsrData,
    GenerateCsrRequest,
    decode,
    decode_response,
    encode,
)
from stationkey.contract.profiles import ALGORITHMS, PROFILES, Algorithm, CertificateType
from stationkey.errors import MessageError

# Whatever comes.

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How fast it is on a busy machine is no part of what these state."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner),
    max_leaves=8,
)
nearly = st.fixed_dictionaries(
    {
        "id": st.just(REQUEST_ID) | json_values,
        "name": st.sampled_from(["generate_csr", "certificate_installation_status"]) | json_values,
        "type": st.sampled_from(["request", "update"]) | json_values,
        "data": st.dictionaries(
            st.sampled_from(["certificate_type", *NAMES, "country_name", "algorithm", "evse_id", "status"]) | st.text(),
            st.sampled_from([*CertificateType, *Algorithm, "DE", "installed"]) | json_values,
        )
        | json_values,
    }
)


def check(payload: bytes) -> None:
    refused, message = None, None
    try:
        message = decode(payload)
    except MessageError as error:
        refused = error
    if refused is not None:
        assert refused.reason.replace("_", "").isalnum()
        assert refused.message.isprintable()
        assert refused.request_id in {None, REQUEST_ID}
    if message is not None:
        assert decode(encode(message)) == message
    decode_response(payload)


@unhurried
@given(st.binary())
def test_no_bytes_raise_anything_but_message_error(payload: bytes) -> None:
    check(payload)


@unhurried
@given(json_values)
def test_no_json_raises_anything_but_message_error(document: object) -> None:
    check(wire(document))


@unhurried
@given(nearly)
def test_nothing_like_a_message_of_ours_raises_anything_but_message_error(document: Json) -> None:
    check(wire(document))


@unhurried
@given(st.integers(0, len(PAGE_REQUEST)), st.integers(0, 8), st.binary(max_size=8))
def test_no_damage_to_a_request_raises_anything_but_message_error(start: int, cut: int, put: bytes) -> None:
    check(PAGE_REQUEST[:start] + put + PAGE_REQUEST[start + cut :])


plain_names = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=64)
requests = st.builds(
    messages.generate_csr,
    st.uuids().map(str) | st.uuids().map(lambda value: str(value).upper()),
    st.builds(
        GenerateCsrData,
        certificate_type=st.sampled_from(
            [name for name, profile in PROFILES.items() if profile.required_algorithm is None]
        ),
        common_name=plain_names,
        organization_name=plain_names,
        country_name=st.text(string.ascii_letters, min_size=2, max_size=2),
        evse_id=st.just(UNSET) | st.from_regex(r"\A[A-Z]{2}\*?[A-Z0-9]{3}\*?E[A-Z0-9*]{1,30}\Z"),
        algorithm=st.just(UNSET) | st.sampled_from(list(ALGORITHMS)),
    ),
)


@unhurried
@given(requests)
def test_a_request_that_is_encoded_is_decoded_as_it_was(request: GenerateCsrRequest) -> None:
    assert decode(encode(request)) == request
