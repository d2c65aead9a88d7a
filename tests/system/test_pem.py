from __future__ import annotations

import pytest

from stationkey.system.pem import blocks, from_pem, to_pem

DER = bytes(range(100))


def test_what_is_encoded_is_found_and_decoded_between_other_things() -> None:
    one, two = to_pem("PUBLIC KEY", DER), to_pem("PUBLIC KEY", b"2")
    text = b"a comment \xff\n" + one + to_pem("CERTIFICATE", b"3") + two

    assert [from_pem(block) for block in blocks(text, "PUBLIC KEY")] == [DER, b"2"]


def test_its_lines_have_64_characters() -> None:
    assert [len(line) for line in to_pem("X", DER).splitlines()[1:-1]] == [64, 64, 8]


def test_a_block_without_an_end_is_not_found() -> None:
    assert blocks(to_pem("X", DER)[:-4], "X") == []


@pytest.mark.parametrize("inside", [b"!", b"QQ", b"-----BEGIN X-----\nQUJD"])
def test_what_is_not_base64_is_refused(inside: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        from_pem(b"-----BEGIN X-----\n" + inside + b"\n-----END X-----")
