"""The command csms."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import reasons
from csms_parts import (
    STATION,
    V2G,
    V2G20,
    V21,
    V201,
    RawStation,
    command,
    connected,
    csr_for,
)
from csmss import Make, basic, openssl_verify
from reasons import ENDS
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from stationkey.cli import csms as cli_csms
from stationkey.simulators.pki import Misbehaviour

pytest_plugins = ["csmss"]


@pytest.mark.parametrize("number", list(ENDS))
async def test_the_command_triggers_each_certificate_in_turn_and_ends_by_a_signal(
    number: signal.Signals, tmp_path: Path
) -> None:
    kinds = [V2G, STATION]
    triggers = [word for kind in kinds for word in ("--trigger", kind.value)]
    async with command("--pki-dir", str(tmp_path / "pki"), *triggers) as csms:
        url = (await csms.until("listening on")).split()[-1].replace("STATION-ID", "CS001")
        async with connect(url, subprotocols=[Subprotocol("ocpp2.1")]) as websocket:
            station = RawStation(V21, websocket)
            listening = asyncio.create_task(station.point.start())
            await station.boot()
            for kind in kinds:
                assert (await station.next())[0] == "TriggerMessage"
                await station.sign(kind, csr_for(kind))
                chain = (await station.next())[1]["certificateChain"]
                anchors = (tmp_path / "pki" / "trust-anchors.pem").read_text()
                assert openssl_verify(tmp_path, chain, anchors) == "leaf.pem: OK"
                await csms.until(f"CertificateSigned for the {kind} answered: Accepted")
            listening.cancel()
            await asyncio.wait([listening])
            csms.process.send_signal(number)
            assert await csms.process.wait() == ENDS[number]
            assert csms.process.stdout is not None
            assert b"Traceback" not in await csms.process.stdout.read()


@pytest.mark.parametrize("options", [(), ("--tls",)], ids=["ws", "wss"])
async def test_half_open_handshakes_do_not_keep_the_command_from_ending(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    with ExitStack() as opened:
        async with command("--pki-dir", str(tmp_path), *options) as csms:
            assert csms.process.stdout is not None
            url = urlsplit((await csms.until("listening on")).split()[-1])
            for _ in range(500):
                opened.enter_context(socket.create_connection((url.hostname, url.port)))
            csms.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):  # what a service manager would wait
                assert await csms.process.wait() == 0
            assert b"Traceback" not in await csms.process.stdout.read()


async def test_the_command_goes_on_where_a_trigger_leads_to_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a version cannot carry, what the station rejects, and what never comes to an end."""
    async with make(misbehaviour=Misbehaviour.NEVER) as csms, connected(csms, V201) as station:
        await csms.connected("CS001")
        station.says = "Rejected"
        await cli_csms.ask(csms, "CS001", [V2G20, V2G], asyncio.Condition())
        station.says = "Accepted"
        monkeypatch.setattr(cli_csms, "TRIGGER_TIMEOUT", 0.01)  # so that it ends
        await cli_csms.ask(csms, "CS001", [STATION, V2G], asyncio.Condition())
        assert [(await station.next())[1]["requestedMessage"] for _ in range(3)] == [
            "SignV2GCertificate",
            "SignChargingStationCertificate",
            "SignV2GCertificate",
        ]
    told = capsys.readouterr().out
    assert {"2.0.1", "v2g20_certificate"} <= set(told.replace(":", " ").split())  # words: what by what
    assert told.count("CS001: no result for the") == 2  # words: what the command prints of each


async def test_the_command_keeps_its_authorities_and_asks_for_passwords(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text("# stations\n\nCS001:se:cret\n")
    options = ("--pki-dir", str(tmp_path / "pki"), "--password-file", str(tmp_path / "passwords"), "--tls")
    anchors = []
    for _ in range(2):
        async with command(*options) as csms:
            url = (await csms.until("listening on wss://")).split()[-1].replace("STATION-ID", "CS001")
            await csms.until("trust anchors in")
            anchors.append((tmp_path / "pki" / "trust-anchors.pem").read_text())
            context = ssl.create_default_context(cadata=anchors[0])
            version = [Subprotocol("ocpp1.6")]
            async with connect(url, subprotocols=version, ssl=context, **basic("CS001", "se:cret")):
                await csms.until("CS001: connected, OCPP 1.6")
            with pytest.raises(InvalidStatus) as refusal:
                async with connect(url, subprotocols=version, ssl=context):
                    pass
            assert refusal.value.response.status_code == 401
            await csms.until("CS001: connection refused")
        assert "se:cret" not in "".join(csms.lines)  # words: the secret is not in it
    assert anchors[0] == anchors[1]


@pytest.mark.parametrize(
    ("arguments", "reason", "words"),
    [
        pytest.param(["--listen", "9000"], "", "'9000'", id="no-host"),
        pytest.param(["--listen", "127.0.0.1:99999"], "", "'127.0.0.1:99999'", id="port-too-large"),
        pytest.param(["--listen", "192.0.2.1:9000"], "csms_cannot_listen", "192.0.2.1", id="not-an-address-of-ours"),
        pytest.param(["--password-file", "bad"], "csms_password_file", "bad, line 2", id="password-file"),
        pytest.param(["--pki-dir", "."], "pki_unreadable", "secp256r1", id="pki"),
        pytest.param(["--pki-dir", "bad/pki"], "pki_unwritable", "bad/pki", id="pki-nowhere"),
        pytest.param(
            ["--client-certificates", "--listen", "192.0.2.1:0"],
            "csms_cannot_listen",
            "192.0.2.1",
            id="profile-3-elsewhere",
        ),
        pytest.param(["--misbehave", "well"], "", "'well'", id="misbehave"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_words(
    arguments: list[str], reason: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong usage is click's, and has no reason."""
    (tmp_path / "bad").write_text("CS001:x\nCS002\n")
    (tmp_path / "secp256r1").mkdir()
    monkeypatch.chdir(tmp_path)
    done = reasons.command("csms", "--organization", "EcoG", *arguments)
    assert (done.exit_code, done.reason) == (1 if reason else 2, reason)
    assert words in " ".join(done.output.split())  # words: which value or file
