"""``stationkey verify-attestation``: needs no TPM, no tpm2-tss and no station."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

import click

from stationkey.attestation import credential, documents, trust, verifier
from stationkey.attestation.documents import read_evidence, read_secret
from stationkey.attestation.structures import spki_of
from stationkey.attestation.trust import Anchor, read_ak, read_authorities, read_key
from stationkey.attestation.verifier import Verdict, read_csr, verify
from stationkey.errors import ConfigurationError, NotVerified
from stationkey.system.files import read_bounded, write_text
from stationkey.system.pem import to_pem

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., object])

FILE: Final = click.Path(path_type=Path, dir_okay=False)
READ: Final = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


def _file_option(name: str, parameter: str, text: str) -> Callable[[Command], Command]:
    return click.option(name, parameter, metavar="FILE", type=FILE, help=text)


def _nonce(_context: click.Context, _parameter: click.Parameter, text: str | None) -> bytes | None:
    nonce = None if text is None else documents.read_nonce(text)
    if text is not None and nonce is None:
        raise click.BadParameter(f"{text[:80]!r} is not 8 to 64 bytes in hexadecimal")
    return nonce


def nonce_option(command: Command) -> Command:
    """Add the option ``--nonce``, of both sides."""
    help_ = "8 to 64 random bytes of the verifier, in hexadecimal."
    return click.option("--nonce", callback=_nonce, metavar="HEX", help=help_)(command)


def public_pem(spki: bytes) -> str:
    """Return a subjectPublicKeyInfo as a PEM PUBLIC KEY."""
    return to_pem("PUBLIC KEY", spki).decode("ascii")


@click.command("verify-attestation")
@click.argument("evidence_file", metavar="EVIDENCE", type=READ)
@_file_option("--csr", "csr_file", "The CSR (PEM) that must have this key.")
@_file_option("--certificate", "certificate_file", "The certificate (PEM) that must have this key.")
@nonce_option
@_file_option(
    "--ak",
    "ak_file",
    "Trust this attestation key: PEM public key, PEM certificate, or the JSON of attest --ak --json.",
)
@_file_option("--ak-ca", "ak_ca", "CAs (PEM), one of which must have signed the --ak certificate.")
@_file_option("--secret", "secret_file", "Trust the attestation key that answered this challenge.")
@_file_option("--ek", "ek_file", "The endorsement key: PEM public key or certificate.")
@_file_option("--ek-ca", "ek_ca", "CAs (PEM), one of which must have signed its certificate.")
@_file_option(
    "--make-challenge",
    "challenge_out",
    "Instead: make a challenge for the attestation key in EVIDENCE, by --ek or --ek-ca.",
)
@_file_option("--secret-out", "secret_out", "With --make-challenge: file for the secret.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify_attestation(
    evidence_file: Path,
    csr_file: Path | None,
    certificate_file: Path | None,
    nonce: bytes | None,
    ak_file: Path | None,
    ak_ca: Path | None,
    secret_file: Path | None,
    ek_file: Path | None,
    ek_ca: Path | None,
    challenge_out: Path | None,
    secret_out: Path | None,
    as_json: bool,
) -> None:
    """Verify evidence of stationkey attest.

    That is, that the key was created in a TPM and cannot leave it. The attestation key is trusted by --ak (and
    --ak-ca), or by --secret. If only the TPM's endorsement key is known: make a challenge, let the station answer it
    (attest KEY
    --challenge), and verify the answer with --secret.
    EVIDENCE is - for standard input. Needs no TPM.

    \b
    Exit status: 0 verified, 3 not verified, 2 wrong usage, 1 anything else.
    """  # noqa: D301 - click's mark for "do not rewrap" is a backspace, which a raw string has not
    if (challenge_out is None) != (secret_out is None):
        raise click.UsageError("--make-challenge and --secret-out need each other")
    if ak_ca is not None and ak_file is None:
        raise click.UsageError("--ak-ca needs a certificate as --ak")
    try:
        if challenge_out is not None and secret_out is not None:
            if ak_file or secret_file or csr_file or certificate_file or nonce is not None:
                raise click.UsageError("--make-challenge excludes the options of a verdict; it needs --ek or --ek-ca")
            done = _make_challenge(read_bounded(evidence_file), ek_file, ek_ca, challenge_out, secret_out)
            click.echo(json.dumps({"verified": None, "challenged": done}) if as_json else done)
            return
        if (ak_file is None) == (secret_file is None):
            raise click.UsageError(
                "give --ak, or --secret of a challenge"
                + (": with an endorsement key, make a challenge first" if ek_file or ek_ca else "")
            )
        if ek_ca is not None or (ek_file is not None and secret_file is None):
            raise click.UsageError("--ek-ca, and --ek without --secret, need --make-challenge")
        anchor = _anchor(ak_file, ak_ca, secret_file, ek_file)
        verdict = _judge(read_bounded(evidence_file), anchor, nonce, csr_file, certificate_file)
    except NotVerified as error:
        if as_json:
            click.echo(json.dumps({"verified": False, "reason": error.reason, "message": error.message}))
        raise
    _print_verdict(verdict, as_json=as_json)


def _read(path: Path, read: Callable[[bytes], T]) -> T:
    """Read a file with a key or certificates.

    Raises:
        ConfigurationError: it has none; the message names the file.
    """
    data = read_bounded(path)
    try:
        return read(data)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}", reason=error.reason, hint=error.hint) from None


def _print_verdict(verdict: Verdict, *, as_json: bool) -> None:
    if as_json:
        document = {"verified": True, "proved": verdict.proved, "not_proved": verdict.not_proved}
        click.echo(json.dumps({**document, "public_key": public_pem(verdict.spki)}, indent=2))
        return
    for heading, lines in (("proved", verdict.proved), ("not proved", verdict.not_proved)):
        for line in lines:
            click.echo(f"{heading}: {line}")
    click.echo("verified")


def _judge(
    document: bytes, anchor: Anchor, nonce: bytes | None, csr_file: Path | None, certificate_file: Path | None
) -> Verdict:
    certificate = None
    if certificate_file is not None:
        _, certificate = _read(certificate_file, read_key)
        if certificate is None:
            raise ConfigurationError(f"{certificate_file} has no certificate", reason="anchor_unreadable")
    csr = None if csr_file is None else _read(csr_file, lambda data: read_csr(data, "the CSR"))
    return verify(read_evidence(document), anchor, nonce=nonce, csr=csr, certificate=certificate)


def _anchor(ak_file: Path | None, ak_ca: Path | None, secret_file: Path | None, ek_file: Path | None) -> Anchor:
    if ak_file is not None:
        authorities = [] if ak_ca is None else _read(ak_ca, read_authorities)
        return _read(ak_file, lambda data: read_ak(data, authorities=authorities, now=datetime.now(UTC)))
    assert secret_file is not None  # one of the two is given
    try:
        secret = read_secret(read_bounded(secret_file))
    except NotVerified as error:
        raise ConfigurationError(f"{secret_file}: {error.message}", reason="anchor_unreadable") from None
    if ek_file is not None and spki_of(_read(ek_file, read_key)[0]) != secret.ek:
        raise NotVerified("the challenge was made for another endorsement key than --ek", reason="ek_differs")
    return secret


def _make_challenge(
    document: bytes, ek_file: Path | None, ek_ca: Path | None, challenge_out: Path, secret_out: Path
) -> str:
    """Make a challenge, and return its description."""
    told = documents.read_either(document)
    ak = verifier.read_ak_public(told)
    authorities = None if ek_ca is None else _read(ek_ca, read_authorities)
    if ek_file is not None:
        ek, certificate = _read(ek_file, read_key)
        believed = "the given one"
        if authorities is not None:
            if certificate is None:
                raise click.UsageError("--ek-ca needs a certificate as --ek, not a public key")
            issuer = trust.check_issued(certificate, authorities, trust.EK_CERTIFICATE, datetime.now(UTC))
            believed = f"certified by {issuer} as an endorsement key"
    elif authorities is not None:
        ek, believed = trust.choose_ek(told.endorsement_keys, authorities, datetime.now(UTC))
    else:
        raise click.UsageError("--make-challenge needs --ek or --ek-ca")
    challenge, secret = credential.make_challenge(ek, ak.name, believed=believed)
    # The secret first: a challenge without its secret is useless.
    write_text(secret_out, documents.write_secret(secret), private=True)
    write_text(challenge_out, documents.write_challenge(challenge))
    return f"challenged attestation key {ak.name.hex()} in the TPM whose endorsement key is {believed}"
