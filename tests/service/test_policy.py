"""What may be served now: by the operator's rules, and by an allowance that time refills."""

from __future__ import annotations

from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from parts import STATION, V2G, V2G20, new_id
from stationkey.config.file import settle
from stationkey.config.settings import PolicyTerms, Severity
from stationkey.contract.messages import GenerateCsrData, GenerateCsrRequest, generate_csr
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateType
from stationkey.errors import Fault, RequestRefused
from stationkey.service.policy import Policy, _compile
from stationkey.service.rate_limit import MINUTE, TokenBucket

SECC, EVSE = "DE-ABC-S-1", "DE*ABC*E1"
RSA = Algorithm.RSA_SHA256


def asked(certificate_type: CertificateType = V2G, **data: Any) -> GenerateCsrRequest:
    """A request that the default policy serves without a remark, but for what `data` has."""
    usual = {"common_name": SECC, "organization_name": "Über Strom GmbH", "country_name": "DE"}
    if certificate_type is V2G20:
        usual["algorithm"] = Algorithm.ECDSA_SHA512
    return generate_csr(new_id(), GenerateCsrData(certificate_type=certificate_type, **{**usual, **data}))


class Clock:
    """Nanoseconds that a test lets go by."""

    def __init__(self) -> None:
        self.now = 10 * 365 * 86_400 * 10**9

    def __call__(self) -> int:
        return self.now


def admit(policy: Policy, request: GenerateCsrRequest) -> list[str]:
    """Serve a request, as far as the policy is concerned; its remarks."""
    with policy.admitted(request) as remarks:
        return list(remarks)


def refusal(policy: Policy, request: GenerateCsrRequest) -> RequestRefused:
    with pytest.raises(RequestRefused) as refused:
        admit(policy, request)
    return refused.value


def refused_as(policy: Policy, request: GenerateCsrRequest) -> str:
    return refusal(policy, request).reason


# The rules.


@pytest.mark.parametrize("certificate_type", CertificateType)
def test_by_default_every_certificate_type_is_served(certificate_type: CertificateType) -> None:
    assert admit(Policy(PolicyTerms()), asked(certificate_type, evse_id=EVSE)) == []


def test_the_defaults_of_the_configuration_are_those_of_the_policy() -> None:
    assert settle({}, keystore="software:").policy == PolicyTerms()


RULES = {
    "certificate_types": (asked(STATION), {"certificate_types": (V2G, V2G20)}, "policy_certificate_type"),
    "algorithms": (asked(algorithm=RSA), {"algorithms": (Algorithm.ECDSA_SHA256,)}, "policy_algorithm"),
    "algorithms, by default": (asked(), {"algorithms": (Algorithm.ECDSA_SHA512,)}, "policy_algorithm"),
    "organization_names": (asked(), {"organization_names": ("Uber Strom GmbH", "EcoG")}, "policy_organization"),
    "organization_names, case": (asked(), {"organization_names": ("über strom gmbh",)}, "policy_organization"),
    "country_names": (asked(), {"country_names": ("NL", "AT")}, "policy_country"),
    "common_names": (asked(), {"common_names": ("NL-*", "DE-ABC-S-")}, "policy_common_name"),
    "common_names, case": (asked(), {"common_names": ("de-abc-s-1",)}, "policy_common_name"),
    "evse_ids": (asked(evse_id=EVSE), {"evse_ids": ("DE*ABC*E2",)}, "policy_evse_id"),
    "evse_ids, case": (asked(evse_id=EVSE.lower()), {"evse_ids": (EVSE,)}, "policy_evse_id"),
    "evse_ids, none": (asked(), {"evse_ids": ("*",)}, "policy_evse_id"),
    "secc_id": (asked(common_name="STATION42"), {"secc_id": "refuse"}, "policy_secc_id"),
    "off_profile": (asked(algorithm=RSA), {"off_profile": "refuse"}, "policy_off_profile"),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_forbids_is_refused_with_the_reason_and_the_option_of_that_rule(rule: str) -> None:
    request, terms, reason = RULES[rule]
    error = refusal(Policy(PolicyTerms(**terms)), request)  # type: ignore[arg-type] # names and types are those of PolicyTerms

    assert error.reason == reason
    assert error.fault is Fault.REQUEST
    assert error.hint == f"see [policy] {rule.partition(',')[0]}"
    assert error.message.isascii()


ALLOWED = {
    "organization_names": (asked(), {"organization_names": ("EcoG", "Über Strom GmbH")}),
    "country_names, lower case asked": (asked(country_name="de"), {"country_names": ("DE",)}),
    "country_names, lower case allowed": (asked(), {"country_names": ("de",)}),
    "common_names": (asked(), {"common_names": ("NL-*", "DE-???-S-*")}),
    "evse_ids": (asked(evse_id=EVSE), {"evse_ids": (r"DE\*ABC\*E?",)}),
    "secc_id, where the type wants none": (asked(STATION, common_name="42"), {"secc_id": "refuse"}),
    "off_profile, where the type wants none": (asked(STATION, algorithm=RSA), {"off_profile": "refuse"}),
    "off_profile, as the profile wants": (asked(), {"off_profile": "refuse"}),
}


@pytest.mark.parametrize("rule", ALLOWED)
def test_what_a_rule_allows_is_served(rule: str) -> None:
    request, terms = ALLOWED[rule]

    assert admit(Policy(PolicyTerms(**terms)), request) == []  # type: ignore[arg-type] # as above


@pytest.mark.parametrize(("severity", "remarked"), [("off", False), ("warn", True)])
def test_what_the_profile_would_have_otherwise_is_served_and_remarked_upon_where_that_is_wanted(
    severity: Severity, remarked: bool
) -> None:
    policy = Policy(PolicyTerms(secc_id=severity, off_profile=severity))
    remarks = admit(policy, asked(common_name="STATION42", algorithm=RSA))

    assert remarks == (
        ["the common name is not a SECC ID", "the profile of this certificate type wants ECDSA_SHA256"]
        if remarked
        else []
    )


def test_an_exact_evse_id_needs_its_asterisks_escaped() -> None:
    """Unescaped they are wildcards, and the EVSEs of others may be spelt so that they match."""
    other = asked(evse_id="DE*XYZ*E7ABC*E1")

    assert admit(Policy(PolicyTerms(evse_ids=("DE*ABC*E1",))), other) == []
    assert refused_as(Policy(PolicyTerms(evse_ids=(r"DE\*ABC\*E1",))), other) == "policy_evse_id"


# Patterns.

LETTERS = st.text(alphabet="ab*?\\\n", max_size=8)


def matches(pattern: str, text: str) -> bool:
    """The same by the book: one piece of the pattern after the other, every way tried."""
    match pattern[:1], pattern[1:]:
        case "", _:
            return not text
        case "*", rest:
            return any(matches(rest, text[skipped:]) for skipped in range(len(text) + 1))
        case "?", rest:
            return bool(text) and matches(rest, text[1:])
        case "\\", rest if rest[:1] in {"*", "?", "\\"} and rest:
            return text[:1] == rest[0] and matches(rest[1:], text[1:])
        case first, rest:
            return text[:1] == first and matches(rest, text[1:])
    raise AssertionError(pattern)


@given(pattern=LETTERS, text=LETTERS)
def test_a_pattern_matches_what_it_says_and_nothing_else(pattern: str, text: str) -> None:
    assert bool(_compile(pattern).fullmatch(text)) == matches(pattern, text)


@given(text=st.text(alphabet="ab*?\\.[](){}+^$|-", min_size=1, max_size=20))
def test_a_text_with_everything_escaped_matches_itself_alone(text: str) -> None:
    pattern = _compile("".join(f"\\{character}" if character in "*?\\" else character for character in text))

    assert pattern.fullmatch(text)
    assert not pattern.fullmatch(text + "a")
    assert not pattern.fullmatch("a" + text)


@pytest.mark.parametrize("pattern", ["*a" * 60 + "b", "*?" * 60 + "b", "?*a" * 40 + "b", "*" * 120 + "b"])
def test_no_text_makes_a_pattern_try_one_combination_after_the_other(pattern: str) -> None:
    """It would never come to an end; and it comes to one where the text is a thousand times what a name may be."""
    assert not _compile(pattern).fullmatch("a" * 64_000)


# The allowance.


def taken(bucket: TokenBucket, times: list[int]) -> list[int]:
    """Those of the times at which there was a token."""
    return [now for now in times if bucket.take(now)]


RATES = st.floats(min_value=0.01, max_value=60_000)
STEPS = st.lists(st.integers(min_value=0, max_value=20 * 10**9), max_size=60)


@given(per_minute=RATES, burst=st.integers(min_value=1, max_value=5), steps=STEPS)
def test_in_no_span_of_time_are_more_tokens_given_than_the_burst_and_what_grows_in_it(
    per_minute: float, burst: int, steps: list[int]
) -> None:
    times = [sum(steps[: number + 1]) for number in range(len(steps))]
    given_at = taken(TokenBucket(per_minute=per_minute, burst=burst), times)

    for first, begin in enumerate(given_at):
        for number, end in enumerate(given_at[first:], start=1):
            assert number <= burst + Fraction(per_minute) * (end - begin) / MINUTE


@given(per_second=st.integers(min_value=1, max_value=1000), burst=st.integers(min_value=1, max_value=5), steps=STEPS)
def test_a_token_is_given_whenever_one_has_grown(per_second: int, burst: int, steps: list[int]) -> None:
    """Held against a bucket that is filled bit by bit, in exact fractions."""
    bucket = TokenBucket(per_minute=60 * per_second, burst=burst)
    one = -(-(10**9) // per_second)
    level, now = Fraction(burst), 0
    for step in steps:
        now += step
        level = min(Fraction(burst), level + Fraction(step, one))
        assert bucket.take(now) == (level >= 1)
        level -= level >= 1
        assert level >= 0


def test_after_ten_years_of_use_to_the_last_token_not_one_is_missing_and_none_too_many() -> None:
    start, one = 10 * 365 * 86_400 * 10**9, -(-MINUTE // 7)
    bucket = TokenBucket(per_minute=7, burst=3)
    assert taken(bucket, [start] * 5) == [start] * 3
    for number in range(1, 20_001):
        now = start + number * one
        assert not bucket.take(now - 1)
        assert bucket.take(now)
    later = 2 * start
    assert taken(bucket, [later] * 5) == [later] * 3


def test_a_clock_that_goes_back_gives_no_token_and_takes_none() -> None:
    bucket = TokenBucket(per_minute=60, burst=2)
    assert taken(bucket, [10**12] * 3) == [10**12] * 2
    assert taken(bucket, [0, 10**11, 10**12]) == []
    assert bucket.take(10**12 + 10**9)


def test_the_smallest_rate_there_is_gives_the_burst_and_then_as_good_as_nothing() -> None:
    bucket = TokenBucket(per_minute=5e-324, burst=2)
    assert taken(bucket, [0, 0, 0, 10**30]) == [0, 0]


def test_a_flood_of_one_certificate_type_takes_nothing_from_another() -> None:
    clock = Clock()
    policy = Policy(PolicyTerms(requests_per_minute=60, burst=3), clock=clock)
    for _ in range(3):
        admit(policy, asked(STATION))
    for _ in range(100):
        assert refused_as(policy, asked(STATION, evse_id=EVSE)) == "rate_limited"

    for certificate_type in (V2G, V2G20):
        for _ in range(3):
            admit(policy, asked(certificate_type))
    clock.now += 10**9
    admit(policy, asked(STATION))
    assert refused_as(policy, asked(STATION)) == "rate_limited"


def test_statuses_have_an_allowance_of_their_own() -> None:
    policy = Policy(PolicyTerms(requests_per_minute=60, burst=3), clock=Clock())
    for _ in range(3):
        policy.admit_status(V2G)
    with pytest.raises(RequestRefused, match="statuses for v2g_certificate come more often") as refused:
        policy.admit_status(V2G)
    assert refused.value.reason == "rate_limited"

    policy.admit_status(V2G20)
    admit(policy, asked(V2G))


def test_the_refusal_says_how_often_is_allowed_and_where_that_is_set() -> None:
    policy = Policy(PolicyTerms(requests_per_minute=0.5, burst=1), clock=Clock())
    admit(policy, asked())
    error = refusal(policy, asked())

    assert "v2g_certificate come more often than 0.5 times a minute, and the 1" in error.message
    assert "[policy] requests_per_minute and burst" in error.hint


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_forbids_costs_nothing(rule: str) -> None:
    request, terms, reason = RULES[rule]
    policy = Policy(PolicyTerms(burst=1, **terms), PROFILES, clock=Clock())  # type: ignore[arg-type] # as above
    for _ in range(5):
        assert refused_as(policy, request) == reason

    left = policy._requests  # noqa: SLF001 - what no request can tell
    everything: list[Any] = [left is not None and left.take(("", kind), 0) for kind in CertificateType]
    assert everything == [True] * 3


def test_without_a_limit_nothing_is_counted() -> None:
    policy = Policy(PolicyTerms(requests_per_minute=0, burst=1), clock=Clock())

    assert [admit(policy, asked()) for _ in range(1000)] == [[]] * 1000


# Places.


def test_requests_for_rsa_keys_take_a_quarter_of_the_places_of_each_type_and_cost_nothing_beyond() -> None:
    policy = Policy(PolicyTerms(queue=8, off_profile="off", burst=4), clock=Clock())
    with ExitStack() as in_hand:
        for _ in range(2):
            in_hand.enter_context(policy.admitted(asked(STATION, algorithm=RSA)))
        error = refusal(policy, asked(STATION, algorithm=Algorithm.RSA_SHA384))
        assert error.reason == "rsa_places_taken"
        assert "queue" in error.hint
        in_hand.enter_context(policy.admitted(asked(V2G, algorithm=RSA)))
        in_hand.enter_context(policy.admitted(asked(STATION)))
    admit(policy, asked(STATION, algorithm=RSA))  # there are places again, and this was the fourth token
    assert refused_as(policy, asked(STATION)) == "rate_limited"


def test_a_place_is_given_back_whatever_becomes_of_the_request() -> None:
    policy = Policy(PolicyTerms(queue=1, requests_per_minute=0), clock=Clock())
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), policy.admitted(asked(STATION, algorithm=RSA)):
            raise ZeroDivisionError
    limited = Policy(PolicyTerms(queue=1, burst=1), clock=Clock())
    admit(limited, asked(STATION))
    for _ in range(3):
        assert refused_as(limited, asked(STATION, algorithm=RSA)) == "rate_limited"


def test_a_request_without_an_evse_id_is_told_so() -> None:
    assert UNSET is asked().data.evse_id
    assert "without an EVSE ID" in refusal(Policy(PolicyTerms(evse_ids=("*",))), asked()).message
