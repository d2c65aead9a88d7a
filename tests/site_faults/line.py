"""The network between one program and its server: whole, cut, or silent as where a router has forgotten it."""

from __future__ import annotations

import socket
import threading
from typing import Self

from between import Between, end


class Line(Between):
    """Passes on what both sides say, unless it is cut or silent.

    Cut, every connection ends and no new one is made. Silent, nothing passes and nothing ends: each side has a
    connection that is half open. What was said meanwhile passes once it speaks again, as TCP would send it again.

    Args:
        peer: port of the server.
    """

    def __init__(self, peer: int) -> None:
        super().__init__()
        self._asks, self._answers = threading.Event(), threading.Event()
        self._flow()
        self._whole = True
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.port = self.listen(0, peer, self._there, self._back)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exits: object) -> None:
        self._flow()
        super().__exit__(*exits)

    def cut(self) -> None:
        """End every connection, and let none be made until `mend`."""
        self._whole = False
        self._flow()
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for each in pair:
                end(each)

    def silence(self) -> None:
        """Let nothing pass, in either direction, and no side learn of it."""
        self._asks.clear()
        self._answers.clear()

    def silence_answers(self) -> None:
        """Let what the program says pass, and nothing of what its peer says."""
        self._answers.clear()

    def mend(self) -> None:
        """Be a network again."""
        self._whole = True
        self._flow()

    def _flow(self) -> None:
        self._asks.set()
        self._answers.set()

    def _there(self, program: socket.socket, peer: socket.socket) -> None:
        if not self._whole:
            return  # both are closed
        self._pairs.append((program, peer))
        self._pass(program, peer, self._asks)

    def _back(self, program: socket.socket, peer: socket.socket) -> None:
        if self._whole:
            self._pass(peer, program, self._answers)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, flows: threading.Event) -> None:
        while data := source.recv(65536):
            flows.wait()
            sink.sendall(data)
        flows.wait()  # nor is an end seen while it is silent
