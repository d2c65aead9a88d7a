"""``stationkey attest``."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from stationkey.attestation.documents import (
    AttestationKey,
    Challenge,
    Evidence,
    read_challenge,
    write_attestation_key,
    write_evidence,
)
from stationkey.attestation.structures import read_public
from stationkey.attestation.verifier import qualifying_data
from stationkey.cli._ledger import opened_ledger
from stationkey.cli._options import Configured, Number, configured
from stationkey.cli.keys import complete_key_id
from stationkey.cli.verify_attestation import FILE, READ, nonce_option, public_pem
from stationkey.config.settings import Settings
from stationkey.errors import ConfigurationError, KeyStoreError, NotVerified
from stationkey.keystore import KeyRef, KeyStore, KeyStoreUri, Lending, keystore_opener
from stationkey.keystore.schemes import SCHEMES
from stationkey.keystore.worker import KeyStoreThread, overdue
from stationkey.system.files import read_bounded, write_text
from stationkey.system.state_dir import without_daemon

if TYPE_CHECKING:
    from stationkey.keystore.tpm2.attest import AttestationTerms

T = TypeVar("T")


@click.command("attest")
@click.argument("key_id", metavar="[KEY]", required=False, shell_complete=complete_key_id)
@click.option("--ak", "only_ak", is_flag=True, help="Instead: the attestation key itself, to be recorded or certified.")
@nonce_option
@click.option(
    "--challenge",
    "challenge_file",
    metavar="FILE",
    type=READ,
    help="The challenge of verify-attestation --make-challenge for this station.",
)
@click.option("--json", "as_json", is_flag=True, help="With --ak: print JSON, with the TPM's endorsement keys.")
@click.option("--out", metavar="FILE", type=FILE, help="Write to a file instead of printing.")
@click.option("--timeout", type=Number(min=0, min_open=True), default=60.0, help="Seconds for the TPM.")
@configured(keystore="The TPM that the keys are in.", state_dir="Where the ledger is.")
def attest(
    key_id: str | None,
    only_ak: bool,
    nonce: bytes | None,
    challenge_file: Path | None,
    as_json: bool,
    out: Path | None,
    timeout: float,
    settings: Configured,
) -> None:
    """Print evidence that a key was created in the TPM.

    KEY is a key's id, or a unique prefix of it. The evidence, one JSON document, shows that the key was created in this
    station's TPM and cannot leave it; stationkey verify-attestation verifies it on any machine. Works while the daemon
    runs, if the TPM has a resource manager (/dev/tpmrm0).
    """
    if only_ak == (key_id is not None):
        raise click.UsageError("give a KEY, or --ak")
    if only_ak and (nonce is not None or challenge_file is not None):
        raise click.UsageError("--ak excludes --nonce and --challenge")
    if nonce is not None and challenge_file is not None:
        raise click.UsageError("--challenge excludes --nonce: a challenge contains a nonce")
    station = _Station(settings(), timeout)
    if key_id is None:
        text = station.attestation_key(as_json=as_json)
    else:
        text = station.evidence(key_id, nonce, challenge_file)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_text(out, text)


class _Station:
    """Access to ledger and TPM beside the daemon, each TPM job within `timeout` seconds."""

    def __init__(self, settings: Settings, timeout: float) -> None:
        self._tpm = settings.tpm
        self._settings = settings
        self._state_dir = settings.state_dir
        self._timeout = timeout
        uris = [store.uri for store in settings.stores if KeyStoreUri.parse(store.uri).scheme.attests]
        if not uris:
            raise _not_in_a_tpm()
        self._keystore = uris[0]  # a station has one TPM

    def evidence(self, key_id: str, nonce: bytes | None, challenge_file: Path | None) -> str:
        """Return the evidence for a key, in JSON."""
        key, about = self._on_record(key_id)
        challenge = None if challenge_file is None else _read_challenge(challenge_file)
        qualifying = qualifying_data(nonce if challenge is None else challenge.nonce)

        def work(store: Lending, terms: AttestationTerms) -> Evidence:
            from stationkey.keystore.tpm2 import attest  # noqa: PLC0415 - --help needs no TPM stack

            return attest.attest(store, key, qualifying=qualifying, terms=terms, challenge=challenge)

        return write_evidence(replace(self._in_tpm(work), about=about))

    def attestation_key(self, *, as_json: bool) -> str:
        """Return the attestation key: its name and PEM, or JSON with the endorsement keys."""

        def work(store: Lending, terms: AttestationTerms) -> AttestationKey:
            from stationkey.keystore.tpm2 import attest  # noqa: PLC0415 - --help needs no TPM stack

            return attest.attestation_key(store, terms=terms, alone=not as_json)

        found = self._in_tpm(work)
        if as_json:
            return write_attestation_key(found)
        public = read_public(found.public, "the attestation key")
        return f"name {public.name.hex()}\n{public_pem(public.spki)}"

    def _on_record(self, key_id: str) -> tuple[KeyRef, dict[str, str]]:
        """Return a key with its private part, and its description for people."""
        with opened_ledger(self._settings) as ledger:
            record = ledger.keys.named(key_id)
            scheme = SCHEMES.get(record.scheme)
            if scheme is None or not scheme.attests:
                raise _not_in_a_tpm()
            key = ledger.keys.ref(record.key_id)
            answer = ledger.answers.find(record.request_ids[0], station=record.station) if record.request_ids else None
        if key is None:
            raise ConfigurationError(f"key {record.key_id} is destroyed", reason="attest_key_destroyed")
        about = {
            "key_id": record.key_id,
            "state": str(record.state),
            "certificate_type": record.certificate_type,
            "evse_id": record.evse_id,
            "algorithm": record.algorithm,
            "common_name": record.common_name,
            "organization_name": record.organization_name,
            "country_name": record.country_name,
            "csr": None if answer is None else answer.csr,
        }
        return key, {name: value for name, value in about.items() if value}

    def _terms(self) -> AttestationTerms:
        from stationkey.keystore.tpm2.attest import AttestationTerms  # noqa: PLC0415 - --help needs no TPM stack

        auth = self._tpm.endorsement_auth
        return AttestationTerms(ak_handle=self._tpm.ak_handle, endorsement_auth=b"" if auth is None else auth.read())

    def _in_tpm(self, work: Callable[[Lending, AttestationTerms], T]) -> T:
        """Return the result of `work` on the key store's thread, within the timeout."""
        terms = self._terms()
        opener = keystore_opener(self._keystore, terms=self._tpm, state_dir=self._state_dir, guest=True)

        def job(store: KeyStore) -> T:
            if not isinstance(store, Lending):
                raise _not_in_a_tpm()
            return work(store, terms)

        with self._alone() as shared:
            thread = KeyStoreThread(opener)
            try:
                return thread.submit(job, timeout=self._timeout).result(self._timeout)
            except concurrent.futures.TimeoutError:
                raise (
                    overdue() if shared else self._in_use("the TPM does not answer; another program may use it")
                ) from None
            finally:
                thread.close()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Prevent the daemon from starting on a TPM that serves one program; yield whether several can use it."""
        from stationkey.keystore.tpm2.device import is_shared  # noqa: PLC0415 - --help needs no TPM stack

        if is_shared(self._keystore.partition(":")[2]):
            yield True
            return
        with without_daemon(self._state_dir) as free:
            if not free:
                raise self._in_use("stationkey serve is running")
            yield False

    def _in_use(self, why: str) -> KeyStoreError:
        return KeyStoreError(
            f"{why}, and {self._keystore} serves one program at a time",
            reason="tpm_in_use",
            hint="use a resource manager (/dev/tpmrm0, or tpm2-abrmd), or stop the daemon meanwhile",
        )


def _not_in_a_tpm() -> KeyStoreError:
    return KeyStoreError(
        "this key is not in a TPM, so it cannot be attested",
        reason="attest_no_tpm",
        hint="keys of software: can be copied by anyone who can read the state directory",
    )


def _read_challenge(file: Path) -> Challenge:
    try:
        return read_challenge(read_bounded(file))
    except NotVerified as error:
        raise ConfigurationError(
            f"the challenge cannot be used: {error.message}", reason="challenge_unreadable"
        ) from None
