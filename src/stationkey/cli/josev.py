"""The command ``stationkey josev``."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import uuid
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from stationkey.cli._options import BROKER, CLIENT_TEXT, Configured, Number, configured
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.mqtt.connection import connect
from stationkey.mqtt.url import Broker
from stationkey.simulators.client_certificate import ClientCertificate
from stationkey.simulators.josev import Station
from stationkey.simulators.ocpp import OcppVersion
from stationkey.simulators.station_settings import StationSettings
from stationkey.system.files import read_bounded_text

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_VERSIONS = {version.removeprefix("ocpp"): version for version in OcppVersion}


@click.command()
@click.option("--csms", required=True, metavar="URL", help="CSMS, ws:// or wss://, without the station's identity.")
@click.option("--identity", required=True, help="Identity of the charging station at the CSMS.")
@click.option(
    "--ocpp",
    "versions",
    multiple=True,
    type=click.Choice(list(_VERSIONS)),
    help="Versions to offer, best first.  [default: 2.1, 2.0.1, 1.6]",
)
@configured(*BROKER, file=CLIENT_TEXT, client=True, needs_keystore=False)
@click.option("--common-name", required=True, help="CN of the CSRs: SECC ID, or serial number of the station.")
@click.option("--organization-name", required=True, help="O: the operator, as the CSMS knows it.")
@click.option("--country-name", required=True, help="C: two letters.")
@click.option("--evse-id", help="EVSE of the V2G keys.")
@click.option("--station", metavar="NAME", default="", help="Station of a site, such as depot7/s1.")
@click.option("--state-dir", type=_DIRECTORY, default="josev-state", help="Directory of pending CSRs.")
@click.option("--certificate-dir", type=_DIRECTORY, required=True, help="Directory to install certificates in.")
@click.option("--trust-anchors", type=_FILE, required=True, help="Roots (PEM) that chains must lead to.")
@click.option("--password-file", type=_FILE, help="Password for basic authentication.")
@click.option("--ca-file", type=_FILE, help="Authorities (PEM) to trust for the CSMS (wss://).")
@click.option(
    "--client-certificate",
    type=_FILE,
    help="Key and certificate (PEM) for security profile 3, such as active/charging_station_certificate.pem; read "
    "again at each connection.",
)
@click.option(
    "--renewed-attempts",
    type=click.IntRange(min=1, max=100),
    default=3,
    help="Attempts with a renewed client certificate before both are tried in turn.",
)
@click.option(
    "--renew-before",
    type=Number(min=0, max=36_500),
    default=30.0,
    help="Days before its end when a certificate is renewed; 0 for never.",
)
@click.option(
    "--wait-minimum", type=Number(min=0, min_open=True), default=30.0, help="CertSigningWaitMinimum, seconds."
)
@click.option("--repeat-times", type=click.IntRange(min=0, max=100), default=3, help="CertSigningRepeatTimes.")
@click.option(
    "--algorithm",
    type=click.Choice([str(name) for name in Algorithm]),
    help="Algorithm of --renew.  [default: by the profile]",
)
@click.option(
    "--renew",
    multiple=True,
    type=click.Choice([str(name) for name in CertificateType]),
    help="Renew this certificate type at once; can be repeated.",
)
@click.option("--once", is_flag=True, help="End after --renew.")
def josev(
    csms: str,
    versions: tuple[str, ...],
    password_file: Path | None,
    ca_file: Path | None,
    client_certificate: Path | None,
    renewed_attempts: int,
    renew_before: float,
    algorithm: str | None,
    renew: tuple[str, ...],
    once: bool,
    settings: Configured,
    **others: Any,  # fields of the settings
) -> None:
    """Play Josev, between a charging station and a CSMS.

    For trials. Connects to the CSMS over OCPP, and to stationkey over MQTT. On a trigger of the CSMS, by --renew, or
    when a certificate is due, it requests a CSR, has it signed, verifies and installs the certificate, and reports the
    status. If the CSMS refuses a renewed client certificate, it restores the previous one.
    """
    if not csms.startswith(("ws://", "wss://")):
        raise click.BadParameter(f"{csms!r} does not begin with ws:// or wss://", param_hint="--csms")
    settled = settings()
    station_settings = StationSettings(
        csms=csms,
        versions=tuple(_VERSIONS[name] for name in versions) or (OcppVersion.V21, OcppVersion.V201, OcppVersion.V16),
        broker=Broker.parse(settled.broker),
        mqtt=settled.mqtt,
        topic_prefix=settled.topic_prefix,
        password=None if password_file is None else read_bounded_text(password_file).strip(),
        tls=_tls(csms, ca_file),
        client=_client(csms, ca_file, client_certificate, renewed_attempts),
        renew_before=0.0 if once else renew_before,
        **others,
    )
    station = Station(station_settings, _tell)
    wanted = [CertificateType(name) for name in renew]
    asked = None if algorithm is None else Algorithm(algorithm)
    asyncio.run(_play(station, station_settings, wanted, asked, once=once))


async def _play(
    station: Station,
    settings: StationSettings,
    wanted: list[CertificateType],
    algorithm: Algorithm | None,
    *,
    once: bool,
) -> None:
    # A broker that is missing is reported now and not at the first renewal.
    client_id = f"stationkey-josev-{uuid.uuid4().hex[:12]}"
    async with await connect(settings.broker, client_id=client_id, persistent=False, terms=settings.mqtt):
        pass
    running = asyncio.create_task(station.run(), name="josev")
    try:
        failures: list[StationKeyError] = []
        for certificate_type in wanted:
            try:
                await station.renew(certificate_type, algorithm)
            except StationKeyError as error:
                failures.append(error)
        await station.settled()
        if once:
            if failures:
                raise failures[0]
            return
        await running
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def _client(csms: str, ca_file: Path | None, certificate: Path | None, attempts: int) -> ClientCertificate | None:
    if certificate is None or not csms.startswith("wss:"):
        return None
    return ClientCertificate(certificate, partial(_context, ca_file), attempts=attempts)


def _tls(csms: str, ca_file: Path | None) -> ssl.SSLContext | None:
    if not csms.startswith("wss:"):
        return None
    try:
        return _context(ca_file)
    except OSError as error:
        why = "no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigurationError(f"--ca-file {ca_file} cannot be used: {why}", reason="tls_invalid") from None


def _context(ca_file: Path | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))


def _tell(words: str, certificate_type: CertificateType | None) -> None:
    about = f"{certificate_type}: " if certificate_type else ""
    click.echo(f"{datetime.now(UTC):%H:%M:%S} {about}{words}")
