"""TLS servers as ``tls-config --for`` configures them, and a car that greets them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from authority import write
from outside import BOUND
from peers import free_port

from stationkey.openssl.servers import PLAIN_PORT, PORT

HANDSHAKES, AT_A_TIME = 60, 6
_END = 5.0
"""Seconds for a server to end; nothing is measured by it."""
MODULES = subprocess.check_output(["openssl", "version", "-m"], text=True).split('"')[1]
NODE = Path(sys.executable).with_name("node")
CREDENTIALS = re.compile(r"/run/credentials/[a-z0-9]+\.service")
"""Where systemd puts them [systemd.exec(5), LoadCredential=]."""


def nginx(directory: Path, text: str) -> list[str]:
    paths = "".join(f"{name}_temp_path {directory};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    write(directory / "server.conf", text.replace("http {", f"http {{\naccess_log off;\n{paths}"))
    more = f"daemon off; pid {directory / 'pid'}; error_log stderr;"
    return ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "server.conf"), "-g", more]


def haproxy(directory: Path, text: str) -> list[str]:
    write(directory / "server.conf", text)
    return ["haproxy", "-db", "-f", str(directory / "server.conf")]


def apache(directory: Path, text: str) -> list[str]:
    write(directory / "server.conf", text.replace("/run/apache2", str(directory)))
    return ["apache2", "-D", "FOREGROUND", "-d", str(directory), "-f", str(directory / "server.conf")]


def stunnel(directory: Path, text: str) -> list[str]:
    return ["stunnel", str(write(directory / "server.conf", text))]


def python(directory: Path, text: str) -> list[str]:
    return [sys.executable, "-I", str(write(directory / "server.py", text))]


def node(directory: Path, text: str) -> list[str]:
    return [str(NODE), "--openssl-shared-config", str(write(directory / "server.js", text))]


PROGRAMS = {
    "nginx": nginx,
    "haproxy": haproxy,
    "haproxy-tcp": haproxy,
    "apache": apache,
    "stunnel": stunnel,
    "python": python,
    "node": node,
}


def handshake(port: int, root: Path, version: ssl.TLSVersion) -> str:
    """One new session; "ok", or what went wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = context.maximum_version = version
    context.load_verify_locations(root)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), BOUND) as connection,
            context.wrap_socket(connection) as session,
        ):
            session.sendall(b"GET / HTTP/1.1\r\nHost: secc\r\nConnection: close\r\n\r\n")
            return "ok" if session.recv(64).startswith(b"HTTP/1.") else "no answer"
    except OSError as error:
        return str(error)


def listens(port: int, server: subprocess.Popen[bytes]) -> bool:
    for _ in range(int(BOUND * 10)):
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) == 0:
                return True
        if server.poll() is not None:
            return False
        time.sleep(0.1)
    return False


class Plain(BaseHTTPRequestHandler):
    """The service behind haproxy or stunnel."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def plain_server() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever)
        try:
            yield server.server_port
        finally:
            server.shutdown()


def sixty(port: int, root: Path, version: ssl.TLSVersion) -> Counter[str]:
    """What comes of so many handshakes, six at a time."""
    with ThreadPoolExecutor(AT_A_TIME) as cars:
        return Counter(cars.map(lambda _: handshake(port, root, version), range(HANDSHAKES)))


@contextmanager
def serving(server: str, text: str, file: Path, directory: Path, environment: dict[str, str]) -> Iterator[int]:
    """A server as printed, with key and chain of `file`, on a port of its own."""
    port = free_port()
    shutil.copy(file, directory / "secc.pem")
    text = CREDENTIALS.sub(str(directory), text.replace(str(PORT), str(port)))
    with plain_server() as plain:
        command = PROGRAMS[server](directory, text.replace(str(PLAIN_PORT), str(plain)))
        variables = {**environment, "CREDENTIALS_DIRECTORY": str(directory), "OPENSSL_MODULES": MODULES}
        with running(command, port, directory, variables):
            yield port


@contextmanager
def running(command: list[str], port: int, directory: Path, environment: dict[str, str]) -> Iterator[None]:
    """A server that listens; its log is told where a test in the block fails."""
    log = directory / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            process_group=0,  # Apache ends the whole group
        ) as process,
    ):
        try:
            assert listens(port, process)
            yield
        except AssertionError as error:
            error.add_note(log.read_text())
            raise
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server with its group: node stands behind a wrapper.

    It is told twice. With tpm2-abrmd a process has threads of GLib; one of them may take the SIGCHLD of nginx's worker,
    and the master goes on waiting for a signal.
    """
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
            return
