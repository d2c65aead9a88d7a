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
        self._flows = threading.Event()
        self._flows.set()
        self._whole = True
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.port = self.listen(0, peer, self._there, self._back)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exits: object) -> None:
        self._flows.set()
        super().__exit__(*exits)

    def cut(self) -> None:
        """End every connection, and let none be made until `mend`."""
        self._whole = False
        self._flows.set()
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for each in pair:
                end(each)

    def silence(self) -> None:
        """Let nothing pass, in either direction, and no side learn of it."""
        self._flows.clear()

    def mend(self) -> None:
        """Be a network again."""
        self._whole = True
        self._flows.set()

    def _there(self, program: socket.socket, peer: socket.socket) -> None:
        if not self._whole:
            return  # both are closed
        self._pairs.append((program, peer))
        self._pass(program, peer)

    def _back(self, program: socket.socket, peer: socket.socket) -> None:
        if self._whole:
            self._pass(peer, program)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            self._flows.wait()
            sink.sendall(data)
        self._flows.wait()  # nor is an end seen while it is silent
