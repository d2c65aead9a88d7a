"""``python -m bench.profile [P-256|P-521|RSA-3072]``: where the time of a request goes, step by step.

The daemon is run as it is, but for a note of the time at eleven points, which costs a microsecond each. The asker's
clock is the same one (CLOCK_MONOTONIC), so a request can be followed through both processes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click

from bench import ROOT

STEPS: Final = (
    ("received", "publication, broker, the daemon's loop wakes"),
    ("decoded", "packet and JSON are read"),
    ("begun", "the id is new; the key store's thread wakes"),
    ("created", "**TPM2_CreateLoaded**"),
    ("made", "public part and wrapped private part to DER"),
    ("digest", "the CSR is built, up to its signature"),
    ("signed", "**TPM2_Sign**"),
    ("csr", "the signature enters the CSR"),
    ("writing", "two threads wake: the loop's, the ledger's"),
    ("written", "**durable commit**; the loop verifies the CSR meanwhile"),
    ("publishing", "the loop wakes, the answer is encoded"),
    ("answered", "publication, broker, the asker wakes"),
)
"""Where each step ends, and what it is."""
REQUESTS: Final = 300
_MARKS: Final = "STATIONKEY_BENCH_MARKS"


def main(kind: str) -> None:
    """Follow some requests through the daemon; print the medians."""
    from peers import Daemon, Swtpm  # noqa: PLC0415 - the daemon that is followed must not load what it does not use

    from bench.sides import KIND, LIFECYCLE, Asker, StockMosquitto, serve_arguments  # noqa: PLC0415 - same

    class Followed(Daemon):
        def command(self) -> list[str]:
            return ["-m", "bench.profile", "serve", "--log-format", "json", *self.arguments]

    base = ROOT / ".bench"
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        os.environ[_MARKS] = str(folder / "marks.json")
        with Swtpm(folder / "tpm") as tpm, StockMosquitto(folder / "broker") as broker:
            arguments = serve_arguments(folder / "plain", broker, tpm, "plain", configuration=LIFECYCLE)
            daemon = Followed(folder / "plain/daemon", *arguments)
            daemon.start()
            asker = Asker(broker, "plain")
            once, spans = asker.act(KIND[kind]), []
            for _ in range(REQUESTS if not kind.startswith("RSA") else 10):
                took = once() / 1000
                spans.append((time.perf_counter() - took, time.perf_counter()))
            asker.close()
            daemon.terminate()
        marks = [(point, at) for point, at in json.loads((folder / "marks.json").read_text())]
    show(spans[len(spans) // 10 :], marks)


def show(spans: list[tuple[float, float]], marks: list[tuple[str, float]]) -> None:
    """Print the median of each step as a table."""
    ends: dict[str, list[float]] = {point: [] for point, _ in STEPS}
    for begun, ended in spans:
        for point, at in marks:
            if begun <= at <= ended:
                ends[point].append((at - begun) * 1e6)
        ends["answered"].append((ended - begun) * 1e6)
    click.echo("| step | ends at, us | takes, us |\n| --- | ---: | ---: |")
    before = 0.0
    for point, what in STEPS:
        at = statistics.median(ends[point])
        click.echo(f"| {what} | {at:,.0f} | {at - before:,.0f} |")
        before = at


def serve() -> None:
    """Run the daemon, and note the time at each point."""
    from stationkey import cli  # noqa: PLC0415 - see `main`
    from stationkey.keystore.tpm2 import commands, store  # noqa: PLC0415 - same
    from stationkey.ledger.answers import Answers  # noqa: PLC0415 - same
    from stationkey.mqtt import connection, gateway  # noqa: PLC0415 - same
    from stationkey.service import requests  # noqa: PLC0415 - same

    marks: list[tuple[str, float]] = []

    def note(home: Any, name: str, *, before: str = "", after: str = "") -> None:
        function: Callable[..., Any] = getattr(home, name)

        @wraps(function)
        def noting(*arguments: Any, **named: Any) -> Any:
            if before:
                marks.append((before, time.perf_counter()))
            try:
                return function(*arguments, **named)
            finally:
                if after:
                    marks.append((after, time.perf_counter()))

        setattr(home, name, noting)

    note(connection.MqttConnection, "_take_message", before="received")
    note(gateway, "decode", after="decoded")
    note(store.Tpm2KeyStore, "generate", before="begun", after="made")
    note(commands.Commands, "create_loaded", after="created")
    note(commands.Commands, "sign", before="digest", after="signed")
    note(requests, "sign_csr", after="csr")
    note(Answers, "record", before="writing", after="written")
    note(connection.MqttConnection, "publish", before="publishing")
    try:
        cli.main()
    finally:
        Path(os.environ[_MARKS]).write_text(json.dumps(marks))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve()
    else:
        main(*sys.argv[1:2] or ["P-256"])
