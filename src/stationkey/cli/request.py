"""``stationkey request``. The MQTT client is imported when needed, not for ``--help``."""

from __future__ import annotations

import asyncio
import sys
import uuid
from typing import Final

import click
from msgspec import UNSET

from stationkey.cli._options import BROKER, CLIENT_TEXT, Configured, Number, configured, json_option
from stationkey.contract import messages
from stationkey.contract.profiles import Algorithm, CertificateType
from stationkey.errors import StationKeyError
from stationkey.mqtt.url import Broker

EXIT_REJECTED: Final = 3
EXIT_NO_ANSWER: Final = 4


@click.command()
@click.argument(
    "certificate_type", metavar="CERTIFICATE_TYPE", type=click.Choice([str(name) for name in CertificateType])
)
@click.option("--common-name", required=True, help="CN: SECC ID, or serial number of the station.")
@click.option("--organization-name", required=True, help="O: the operator, as the CSMS knows it.")
@click.option("--country-name", required=True, help="C: two letters.")
@click.option("--algorithm", type=click.Choice([str(name) for name in Algorithm]), help="Key and signature.")
@click.option("--evse-id", help="EVSE that the key is for.")
@click.option("--id", "request_id", metavar="UUID", help="Id of the request.  [default: a new one]")
@click.option("--timeout", type=Number(min=0, min_open=True), default=30.0, help="Seconds to wait.")
@click.option("--station", metavar="NAME", default="", help="Station of a site, such as depot7/s1.")
@configured(*BROKER, file=CLIENT_TEXT, client=True, needs_keystore=False)
@json_option
def request(
    certificate_type: str,
    common_name: str,
    organization_name: str,
    country_name: str,
    algorithm: str | None,
    evse_id: str | None,
    request_id: str | None,
    timeout: float,
    station: str,
    as_json: bool,
    settings: Configured,
) -> None:
    """Request a CSR, as Josev does, and print it.

    The request is sent unchecked: the charging station validates it.

    \b
    CERTIFICATE_TYPE is one of
      charging_station_certificate
      v2g_certificate
      v2g20_certificate

    \b
    Exit status: 0 accepted, 3 rejected, 4 no answer in time, 2 wrong usage,
    1 anything else.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    from stationkey.mqtt.client import ask  # noqa: PLC0415 - see the module's docstring

    if request_id is not None and not messages.is_usable_id(request_id):
        raise click.BadParameter("not a UUID of the form 8-4-4-4-12", param_hint="--id")
    asked = messages.generate_csr(
        request_id or str(uuid.uuid4()),
        messages.GenerateCsrData(
            certificate_type=CertificateType(certificate_type),
            common_name=common_name,
            organization_name=organization_name,
            country_name=country_name,
            evse_id=UNSET if evse_id is None else evse_id,
            algorithm=UNSET if algorithm is None else Algorithm(algorithm),
        ),
    )
    settled = settings()
    broker, prefix = Broker.parse(settled.broker), settled.topic_prefix
    asking = ask(broker, asked, topic_prefix=prefix, station=station, timeout=timeout, terms=settled.mqtt)
    response = asyncio.run(asking)
    if response is None:
        click.echo(f"stationkey: no answer to {asked.id} within {timeout:g} s", err=True)
        click.echo("  is stationkey serve running, on this broker and with this topic prefix?", err=True)
        sys.exit(EXIT_NO_ANSWER)
    if as_json:
        click.echo(messages.encode(response).decode())
    elif response.data.csr is not UNSET:
        click.echo(response.data.csr, nl=False)
    if response.data.status == "accepted" and response.data.csr is UNSET:
        raise StationKeyError(f"{asked.id} was accepted, but the answer contains no CSR", reason="csr_missing")
    if response.data.status == "rejected":
        click.echo(f"stationkey: {asked.id} was rejected; the log of the charging station says why", err=True)
        click.echo(f"  on the station itself: stationkey requests {asked.id}", err=True)
        sys.exit(EXIT_REJECTED)
