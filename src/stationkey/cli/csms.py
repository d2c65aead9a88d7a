"""``stationkey csms``: a small CSMS, to try a station."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from stationkey.contract.profiles import SECP256R1, SECP521R1, CertificateType, EllipticCurve
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.simulators.csms.events import Event, EventKind
from stationkey.simulators.csms.server import Csms, SecurityProfile
from stationkey.simulators.pki import Hierarchy, Misbehaviour
from stationkey.system.files import read_bounded_text, write_text

TRIGGER_TIMEOUT: Final = 60.0
"""Seconds to wait for one certificate before the next is triggered."""


@click.command()
@click.option(
    "--listen", metavar="HOST:PORT", default="127.0.0.1:9000", help="Where to listen; port 0 takes a free port."
)
@click.option("--organization", metavar="NAME", required=True, help="The required O of every CSR.")
@click.option(
    "--pki-dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the authorities and their keys; filled if empty. Without it they are made for one run.",
)
@click.option(
    "--password-file",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The stations' passwords, one line each: STATION-ID:PASSWORD.",
)
@click.option("--tls", is_flag=True, help="Use wss, with a certificate of the CSMS's own authority.")
@click.option("--client-certificates", is_flag=True, help="Use wss with client certificates (security profile 3).")
@click.option(
    "--misbehave",
    "misbehaviour",
    metavar="MODE",
    type=click.Choice([mode.value for mode in Misbehaviour]),
    help=f"Do something wrong, to test a station: {', '.join(Misbehaviour)}.",
)
@click.option(
    "--trigger",
    "triggers",
    type=click.Choice([kind.value for kind in CertificateType]),
    multiple=True,
    metavar="CERTIFICATE_TYPE",
    help=f"Trigger a CSR of this type from each station that boots; can be repeated: {', '.join(CertificateType)}.",
)
def csms(
    listen: str,
    organization: str,
    pki_dir: Path | None,
    password_file: Path | None,
    tls: bool,
    client_certificates: bool,
    misbehaviour: str | None,
    triggers: tuple[str, ...],
) -> None:
    """Play a CSMS, to try a station.

    For trials only: its authorities' keys are not protected. It speaks OCPP 1.6, 2.0.1 and 2.1, checks every CSR
    strictly, signs it with its own V2G root and CPO Sub-CAs, and prints what happens, until Ctrl-C.

    \b
    A station connects to ws://HOST:PORT/STATION-ID, and authenticates
      not at all                            by default
      by password (profile 1)               with --password-file
      by password, over wss (profile 2)     with --password-file and --tls
      by certificate, over wss (profile 3)  with --client-certificates
    """  # noqa: D301 - click's mark for "do not rewrap" is a backspace, which a raw string has not
    host, port = _address(listen)
    if client_certificates:
        profile = SecurityProfile.MUTUAL_TLS
    elif tls:
        profile = SecurityProfile.TLS
    else:
        profile = SecurityProfile.NONE if password_file is None else SecurityProfile.BASIC
    with ExitStack() as stack:
        directory = pki_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stationkey-csms-")))
        server = Csms(
            organization=organization,
            hierarchy=_hierarchy(directory, SECP256R1, organization),
            hierarchy_20=_hierarchy(directory, SECP521R1, organization),
            host=host,
            port=port,
            security_profile=profile,
            passwords=None if password_file is None else _passwords(password_file),
            misbehaviour=None if misbehaviour is None else Misbehaviour(misbehaviour),
        )
        anchors = directory / "trust-anchors.pem"
        write_text(anchors, server.trust_anchors_pem())
        asyncio.run(_run(server, listen, anchors, [CertificateType(kind) for kind in triggers]))


async def _run(server: Csms, listen: str, anchors: Path, triggers: list[CertificateType]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)  # Ctrl-C cancels this
    try:
        await server.__aenter__()
    except OSError as error:
        # asyncio writes its own text into strerror, and gives no errno after trying several addresses.
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigurationError(f"cannot listen at {listen}: {why}", reason="csms_cannot_listen") from None
    try:
        _say(f"listening on {server.url}/STATION-ID")
        _say(f"trust anchors in {anchors}")
        telling = asyncio.create_task(_tell(server, triggers), name="csms-tell")
        await stop.wait()
        telling.cancel()
        await asyncio.wait([telling])
    finally:
        await server.__aexit__()


async def _tell(server: Csms, triggers: list[CertificateType]) -> None:
    """Print what happens, and trigger CSRs."""
    settled = asyncio.Condition()
    async with asyncio.TaskGroup() as tasks:
        async for event in server.stream():
            _say(str(event))
            if event.kind is EventKind.BOOTED and triggers:
                tasks.create_task(ask(server, event.station_id, triggers, settled), name=f"csms-ask-{event.station_id}")
            async with settled:
                settled.notify_all()


async def ask(server: Csms, station_id: str, triggers: list[CertificateType], settled: asyncio.Condition) -> None:
    """Trigger one certificate after the other at a station."""
    for kind in triggers:
        begin = len(server.events)

        def is_settled(begin: int = begin, kind: CertificateType = kind) -> bool:
            return any(_settles(event, station_id, kind) for event in server.events[begin:])

        try:
            if await server.trigger(station_id, kind) == "Accepted":
                async with settled, asyncio.timeout(TRIGGER_TIMEOUT):
                    await settled.wait_for(is_settled)
        except TimeoutError:
            _say(f"{station_id}: no result for the {kind} within {TRIGGER_TIMEOUT:g} s")
        except StationKeyError as error:
            _say(f"{station_id}: {error}")


def _settles(event: Event, station_id: str, kind: CertificateType) -> bool:
    ends = event.kind in {EventKind.CERTIFICATE_ANSWERED, EventKind.CSR_REJECTED} and event.certificate_type is kind
    return ends and event.station_id == station_id


def _say(words: str) -> None:
    click.echo(f"{datetime.now(UTC):%H:%M:%SZ} {words}")


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004 - the largest port
        raise click.BadParameter(f"{listen!r} is not HOST:PORT", param_hint="--listen")
    return host.strip("[]"), int(port)


def _hierarchy(directory: Path, curve: EllipticCurve, organization: str) -> Hierarchy:
    """Return the authorities of one curve, read from `directory` or created there."""
    place = directory / curve.name
    try:
        if not place.exists():
            Hierarchy.make(curve, organization=organization, now=datetime.now(UTC)).save(place)
    except OSError as error:
        raise ConfigurationError(
            f"--pki-dir {directory} cannot be used: {error.strerror}", reason="pki_unwritable"
        ) from None
    return Hierarchy.load(place)


def _passwords(file: Path) -> dict[str, str]:
    passwords = {}
    for number, line in enumerate(read_bounded_text(file).splitlines(), 1):
        station_id, colon, password = line.partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not colon or not station_id or not password:
            raise ConfigurationError(f"{file}, line {number} is not STATION-ID:PASSWORD", reason="csms_password_file")
        passwords[station_id] = password
    return passwords
