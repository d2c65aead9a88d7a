"""What the doctor says of a token, as tables."""

from __future__ import annotations

import pytest
from judging import FAILURE, OK, WARNING, judge, reasons, settings, worst

from stationkey.contract.profiles import Algorithm
from stationkey.doctor.report import Level

STORE = settings(keystore="pkcs11:token=se?module-path=/m.so").stores[0]
ALL = dict.fromkeys(Algorithm, "")
LOGIN, SET = 1 << 2, 1 << 3


@pytest.mark.parametrize(
    ("flags", "source", "refused", "level", "expected"),
    [
        pytest.param(LOGIN | SET, "file:/p", False, OK, set(), id="as it should be"),
        pytest.param(LOGIN | SET, "%7C/p", None, OK, set(), id="from a program, which is not run"),
        pytest.param(0, "", None, OK, set(), id="none is wanted"),
        pytest.param(LOGIN, "file:/p", False, FAILURE, {"not_set"}, id="none is set"),
        pytest.param(LOGIN | SET, "", None, FAILURE, {"not_named"}, id="none is named"),
        pytest.param(LOGIN | SET, "file:/p", True, FAILURE, {"refused"}, id="refused before"),
        pytest.param(LOGIN | SET | 1 << 16, "file:/p", False, WARNING, {"count_low"}, id="one was wrong"),
        pytest.param(LOGIN | SET | 3 << 16, "file:/p", False, FAILURE, {"final_try"}, id="the last try"),
        pytest.param(LOGIN | SET | 7 << 16, "file:/p", False, FAILURE, {"locked"}, id="locked"),
        pytest.param(LOGIN | SET | 1 << 19, "file:/p", False, WARNING, {"to_be_changed"}, id="to be changed"),
    ],
)
def test_the_pin_is_told_by_flags(
    flags: int, source: str, refused: bool | None, level: Level, expected: set[str]
) -> None:
    uri = STORE.uri + (f"&pin-source={source}" if source else "")
    found = judge("token.pin", settings(keystore=uri).stores[0], settings(), flags, refused)
    assert worst(found) is level
    assert reasons(found) == expected


@pytest.mark.parametrize(
    ("missing", "level", "expected"),
    [
        ({}, OK, set()),
        ({Algorithm.ECDSA_SHA512: "P-521"}, WARNING, {"not_possible"}),
        ({Algorithm.ECDSA_SHA256: "P-256"}, WARNING, {"not_preferred"}),
        (dict.fromkeys(Algorithm, "everything"), FAILURE, {"not_possible", "none_possible"}),
    ],
)
def test_certificate_types(missing: dict[Algorithm, str], level: Level, expected: set[str]) -> None:
    found = judge("token.certificate_types", STORE, settings(), ALL | missing)
    assert worst(found) is level
    assert reasons(found) == expected


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ([2**64 - 1] * 4, set()),
        ([], set()),
        ([0, 0, 0, 0], set()),
        ([65536, 32768, 65536, 32768], set()),
        ([65536, 32768, 65536, 100], {"little"}),
    ],
)
def test_room(memory: list[int], expected: set[str]) -> None:
    assert reasons(judge("token.room", STORE, settings(), 3, memory)) == expected


@pytest.mark.parametrize(
    ("ours", "recorded", "kept", "running", "expected"),
    [
        (["a", "b"], ["a", "b"], {"a", "b"}, False, set()),
        (["a", "b"], ["a", "b"], {"a"}, False, {"strays"}),
        (["a", "b"], ["a", "b"], {"a"}, True, set()),
        (["a", "b"], ["a"], {"a"}, True, {"not_recorded"}),
        (["a", "b"], ["a"], {"a", "b"}, False, set()),
    ],
)
def test_strays(ours: list[str], recorded: list[str], kept: set[str], running: bool, expected: set[str]) -> None:
    assert reasons(judge("token.strays", STORE, settings(), ours, recorded, kept, running)) == expected


def test_what_a_token_promises_and_does_not_do_is_a_failure() -> None:
    tried = ALL | {Algorithm.ECDSA_SHA512: "FunctionFailed"}
    found = judge("token.trial", STORE, settings(), ALL, tried)
    assert [one.level for one in found].count(FAILURE) == 1
    assert reasons(found) == {"broken"}
    assert reasons(judge("token.trial", STORE, settings(), tried, tried)) == set()
