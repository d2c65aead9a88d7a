"""What sits between a program and its peer, and may change what passes: the sockets and threads of it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Self

Talk = Callable[[socket.socket, socket.socket], None]
"""Passes on what a program says to its peer, by the sockets of both; ends with either."""


class Between:
    """Sockets and threads, which end with the ``with`` block."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            end(each)
        for thread in self._threads:
            thread.join()

    def listen(self, port: int, peer: int, *talks: Talk) -> int:
        """Connect whoever comes to a port, 0 for a free one, with the peer's; each of `talks` gets a thread."""
        listener = self._remember(socket.create_server(("127.0.0.1", port)))
        self._run(self._accept, listener, peer, talks)
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, peer: int, talks: tuple[Talk, ...]) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                program = self._remember(listener.accept()[0])
                try:
                    other = self._remember(socket.create_connection(("127.0.0.1", peer)))
                except ConnectionRefusedError:  # the peer is away
                    end(program)
                    continue
                for each in (program, other):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for talk in talks:
                    self._run(self._talk, talk, program, other)

    def _talk(self, talk: Talk, program: socket.socket, peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            talk(program, peer)
        end(program)
        end(peer)

    def _remember(self, new: socket.socket) -> socket.socket:
        with self._lock:
            self._sockets.append(new)
        return new

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


def pass_on(source: socket.socket, sink: socket.socket) -> None:
    """Pass on one direction as it is."""
    while data := source.recv(65536):
        sink.sendall(data)


def back(program: socket.socket, peer: socket.socket) -> None:
    """Pass on what the peer says as it is."""
    pass_on(peer, program)


def end(one: socket.socket) -> None:
    """Close a socket, though somebody may be reading from it."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
