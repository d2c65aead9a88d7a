"""Between a program and its simulated TPM: somebody who listens on the bus, and may change what crosses it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final, Self

from between import Between, back, pass_on
from peers import Swtpm, free_port

HEADER: Final = 10
"""Bytes: tag, size of the whole, command or return code [TPM 2.0 part 1, 18]."""


@dataclass(frozen=True)
class Exchange:
    """A command and its response, as the program sent the one and the TPM the other."""

    command: bytes
    response: bytes

    @property
    def code(self) -> int:
        """Of the command."""
        return int.from_bytes(self.command[6:10], "big")


Change = Callable[[bytes], bytes]
_NOTHING: Final = bytes.fromhex("8001 0000000c 0000017b 0001")
"""TPM2_GetRandom of one byte: done in the place of a command that is refused."""


def untouched(message: bytes) -> bytes:
    return message


def flipped(message: bytes, at: int) -> bytes:
    changed = bytearray(message)
    changed[at] ^= 1
    return bytes(changed)


@dataclass
class Wire(Between):
    """Passes all on, records it, and lets `commands` and `responses` change it.

    swtpm is asked by a connection for each command or more, on two ports side by side: the TPM's, and its control.
    """

    tpm: Swtpm
    commands: Change = untouched
    responses: Change = untouched
    exchanges: list[Exchange] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.port = free_port(2)

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.port}"

    @property
    def codes(self) -> list[int]:
        """The commands that crossed, by their codes."""
        return [exchange.code for exchange in self.exchanges]

    @property
    def heard(self) -> bytes:
        """All that a listener has heard."""
        return b"".join(exchange.command + exchange.response for exchange in self.exchanges)

    def __enter__(self) -> Self:
        self.listen(self.port, self.tpm.port, self._exchange)
        self.listen(self.port + 1, self.tpm.port + 1, pass_on, back)
        return self

    def _exchange(self, program: socket.socket, tpm: socket.socket) -> None:
        while command := _message(program):
            tpm.sendall(self.commands(command))
            response = _message(tpm)
            self.exchanges.append(Exchange(command, response))
            program.sendall(self.responses(response))


class Meddler:
    """Flips a bit of each command with a code, or of each response to one; a negative place is from the end."""

    def __init__(self, wire: Wire, code: int, at: int, *, response: bool) -> None:
        self._code, self._at, self._response, self._current = code, at, response, 0
        wire.commands, wire.responses = self._command, self._answer

    def _command(self, message: bytes) -> bytes:
        self._current = int.from_bytes(message[6:10], "big")
        return flipped(message, self._at) if self._current == self._code and not self._response else message

    def _answer(self, message: bytes) -> bytes:
        return flipped(message, self._at) if self._current == self._code and self._response else message


class Noise:
    """Flips one bit of one message: the one of this number, at a place that a generator chooses.

    Sizes stay as they are, since tpm2-tss would wait for what never comes.
    """

    def __init__(self, wire: Wire, number: int, generator: Random) -> None:
        self._left, self._generator = number, generator
        wire.commands = wire.responses = self._pass

    def _pass(self, message: bytes) -> bytes:
        self._left -= 1
        if self._left != 0 or len(message) <= HEADER:
            return message
        return flipped(message, self._generator.randrange(6, len(message)))


class Later:
    """Refuses commands with a code: each one `times` times running, then the TPM does it once, and so on.

    Args:
        wire: where it sits.
        code: what it answers.
        times: how often; None for ever.
        of: the command code that it refuses; None for every one.
    """

    def __init__(self, wire: Wire, code: int, *, times: int | None, of: int | None = None) -> None:
        self._answer = bytes.fromhex("8001 0000000a") + code.to_bytes(4, "big")
        self._times, self._of = times, of
        self._counts: dict[int, int] = {}
        self._refusing = False
        self.refused: set[int] = set()
        self.refusals = 0
        self.began = threading.Event()
        wire.commands, wire.responses = self._command, self._response

    def _command(self, message: bytes) -> bytes:
        code = int.from_bytes(message[6:10], "big")
        count = self._counts.get(code, 0)
        self._refusing = self._of in {None, code} and (self._times is None or count < self._times)
        self._counts[code] = count + 1 if self._refusing else 0
        if not self._refusing:
            return message
        self.refused.add(code)
        self.refusals += 1
        self.began.set()
        return _NOTHING

    def _response(self, message: bytes) -> bytes:
        return self._answer if self._refusing else message


def _message(source: socket.socket) -> bytes:
    header = _exactly(source, HEADER)
    return header + _exactly(source, int.from_bytes(header[2:6], "big") - HEADER) if header else b""


def _exactly(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = source.recv(count - len(data))
        if not more:
            return b""
        data += more
    return data


class WithoutP521:
    """Has the TPM say that it lacks secp521r1, as most chips do: changes the answers of TPM2_GetCapability."""

    def __init__(self, wire: Wire) -> None:
        self.answers = 0
        wire.responses = self._response

    def _response(self, message: bytes) -> bytes:
        """Change a list of curves: moreData, TPM_CAP_ECC_CURVES, count and curves [TPM 2.0 part 2, 6.12, 10.8.3]."""
        start = HEADER + 1 + 4
        if message[HEADER + 1 : start] != bytes.fromhex("00000008"):
            return message
        count = int.from_bytes(message[start : start + 4], "big")
        if len(message) != start + 4 + 2 * count:
            return message
        curves = [message[at : at + 2] for at in range(start + 4, len(message), 2)]
        others = [curve for curve in curves if curve != bytes.fromhex("0005")]
        self.answers += 1
        body = message[6:start] + len(others).to_bytes(4, "big") + b"".join(others)
        return message[:2] + (6 + len(body)).to_bytes(4, "big") + body
