"""``stationkey csr``: show a CSR, and check whether a CSMS would sign it. Needs no station."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import click
from msgspec import structs

from stationkey.cli._options import json_option
from stationkey.contract.profiles import PROFILES, CertificateType
from stationkey.errors import StationKeyError
from stationkey.system.files import read_bounded
from stationkey.system.text import printable
from stationkey.x509.csr import inspect_csr
from stationkey.x509.csr_check import CsrRefused, faults, profile_differences, read_csr

_FILE: Final = click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))


@click.group()
def csr() -> None:
    """Inspect and check CSRs of any station.

    FILE is PEM; - is standard input.
    """


def _read(file: Path) -> str:
    return read_bounded(file).decode("ascii", "replace")


@csr.command("inspect")
@_FILE
@json_option
def csr_inspect(file: Path, as_json: bool) -> None:
    """Show subject, key, signature and extensions.

    Also says whether the signature proves possession of the key.
    """
    pem = _read(file)
    try:
        shown = structs.asdict(inspect_csr(pem))
    except StationKeyError as error:
        raise StationKeyError(f"{file}: {error.message}", reason=error.reason, hint=error.hint) from None
    if as_json:
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    for name, value in shown.items():
        lines = value if isinstance(value, tuple) else (value,)
        for line in lines or ("-",):
            click.echo(f"{name.replace('_', ' '):<18}{printable(str(line))}")
            name = ""  # noqa: PLW2901 - the name stands before the first line only


@csr.command("check")
@_FILE
@click.option(
    "--certificate-type",
    metavar="TYPE",
    type=click.Choice([str(name) for name in PROFILES]),
    required=True,
    help=f"Certificate type: {', '.join(PROFILES)}.",
)
@click.option("--organization-name", metavar="O", help="The required O: the CSMS's OrganizationName.")
@json_option
def csr_check(file: Path, certificate_type: str, organization_name: str | None, as_json: bool) -> None:
    """Check whether a strict CSMS would sign a CSR.

    Prints each fault, and each difference from the profile. Exit status 1 if it would not be signed.
    """
    kind = CertificateType(certificate_type)
    differences: list[str] = []
    try:
        request = read_csr(_read(file))
        found = list(faults(request, certificate_type=kind, organization=organization_name))
        differences = profile_differences(request, kind)
    except CsrRefused as error:
        found = [error]
    if as_json:
        shown = {
            "certificate_type": certificate_type,
            "would_be_signed": not found,
            "faults": [{"reason": fault.reason, "words": fault.message} for fault in found],
            "differences": differences,
        }
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
    else:
        for fault in found:
            click.echo(f"fault       {fault.reason}: {printable(fault.message)}")
        for difference in differences:
            click.echo(f"difference  {printable(difference)}")
        click.echo(f"{'not fit' if found else 'fit'} for {PROFILES[kind].title} ({certificate_type})")
    if found:
        raise StationKeyError("a strict CSMS would not sign this CSR", reason="csr_unfit", hint="see the faults above")
