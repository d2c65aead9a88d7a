"""What reading a message costs, in instructions of Python and bytes of memory: in proportion to its size, no more.

Counted, not timed: the figures are the same on every machine. What C code does is not counted, so what it is given is
bounded: 64 KiB.
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from a_message import REQUEST_ID, wire
from test_messages import a_request

from stationkey.contract.active_names import read_name
from stationkey.contract.messages import MAX_PAYLOAD, decode, decode_response
from stationkey.errors import MessageError
from stationkey.x509.certificate import read_chain

SMALL, LARGE = 12_000, 48_000
"""Bytes."""

HEAD = f'{{"id": "{REQUEST_ID}", "name": "generate_csr", "type": "request", '.encode()

NEST = b"[" * 2000 + b"]" * 2000
FAMILIES: dict[str, Callable[[int], bytes]] = {
    "one long name": lambda size: wire(a_request(common_name="x" * size)),
    "one long name of control characters": lambda size: wire(a_request(common_name="x" * size + "\x01")),
    "members of one name": lambda size: HEAD + b'"a": 1, ' * (size // 8) + b'"data": {}}',
    "members of many names": lambda size: (
        HEAD + b", ".join(f'"{number}": 0'.encode() for number in range(size // 10)) + b"}"
    ),
    "members of many names, each twice": lambda size: (
        HEAD + b", ".join(f'"{number // 2}": 0'.encode() for number in range(size // 10)) + b"}"
    ),
    "nested arrays": lambda size: HEAD + b'"data": ' + b"[" * size,
    "nested objects": lambda size: HEAD + b'"data": ' + b'{"a":' * (size // 5),
    "nested deep, and then many texts": lambda size: HEAD + b'"data": ' + NEST + b', "a"' * (size // 5),
    "nested deep, and then colons": lambda size: HEAD + b'"data": ' + NEST + b':"' * (size // 2),
    "a text that never ends": lambda size: HEAD + b'"data": "' + b"\\" * size,
    "quotes": lambda size: b"[" * 2000 + b'"' * size,
    "digits": lambda size: HEAD + b'"data": ' + b"9" * size + b"}",
    "many numbers of thousands of digits": lambda size: (
        HEAD + b'"data": [' + b"9" * 4000 + b"," * (size // 4000) + b"]}"
    ),
    "white space": lambda size: HEAD + b" " * size + b'"data": {}}',
    "no UTF-8": lambda size: HEAD + b"\xff" * size,
    "an evse_id of asterisks": lambda size: wire(a_request(evse_id="DE*ABC*E" + "*" * size)),
    "an id of hexadecimal digits": lambda size: wire({**a_request(), "id": "0" * size}),
    "a name of half characters": lambda size: json.dumps({**a_request(), "\ud800" * (size // 6): 1}).encode(),
}


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which would run what other tests have left to be finalized."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def instructions(call: Callable[[], object]) -> int:
    """How many instructions of Python's own machine a call takes."""
    count = 0

    def each(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
        return each

    before = sys.gettrace()
    with uncollected():
        sys.settrace(each)
        try:
            with suppress(MessageError):
                call()
        finally:
            sys.settrace(before)
    return count


def memory(call: Callable[[], object]) -> int:
    """How many bytes a call has at most at a time, and other threads meanwhile."""
    with uncollected():
        tracemalloc.start()
        try:
            with suppress(MessageError):
                call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def needs_no_more(call: Callable[[], object], most: int) -> bool:
    """Whether a call makes do with so many bytes; what other threads have, they do not have each time."""
    return any(memory(call) <= most for _ in range(3))


@pytest.mark.parametrize("reader", [decode, decode_response], ids=["decode", "decode_response"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_message_costs_no_more_than_in_proportion_to_its_size(
    reader: Callable[[bytes], object], family: Callable[[int], bytes]
) -> None:
    small, large = family(SMALL), family(LARGE)
    assert len(large) < MAX_PAYLOAD
    instructions(lambda: reader(small))  # what is imported at the first time

    counted = instructions(lambda: reader(small)), instructions(lambda: reader(large))

    assert counted[1] <= 1.5 * len(large) / len(small) * counted[0] + 100
    assert needs_no_more(lambda: reader(large), 150 * len(large) + 100_000)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_of_a_message_that_is_too_large_no_more_than_64_kib_is_looked_at(family: Callable[[int], bytes]) -> None:
    large, larger = family(8 * SMALL), family(20 * MAX_PAYLOAD)

    # Of one that is a byte too large just as much is looked at.
    most = min(150 * MAX_PAYLOAD + 100_000, memory(lambda: decode(larger[: MAX_PAYLOAD + 1])) + 10_000)
    if b"\xff" not in larger:  # which is looked for before
        most = min(most, 4 * memory(lambda: decode(large)) + 150 * MAX_PAYLOAD)
    assert needs_no_more(lambda: decode(larger), most)


def test_a_file_of_certificates_costs_in_proportion_to_its_size() -> None:
    armour = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

    assert needs_no_more(lambda: read_chain(armour * 1000), 100 * len(armour * 1000))
    assert read_name("%" * 65_536) is None
