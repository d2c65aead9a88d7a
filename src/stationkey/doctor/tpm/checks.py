"""Asks the TPM, in a process of its own, and judges whether it answers."""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
from typing import Final

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import DEFAULT_STORE, TpmTerms
from stationkey.doctor.host.context import Context, path_of
from stationkey.doctor.host.sockets import connections_to, listeners_on
from stationkey.doctor.report import Finding, failure, hidden, listed, ok, refusal, warning
from stationkey.doctor.runner import Check, ask
from stationkey.doctor.tpm import device
from stationkey.doctor.tpm.device import CHOICE, Way, holders, way_of
from stationkey.doctor.tpm.facts import MANAGER_ADVICE, Seen
from stationkey.errors import ConfigurationError
from stationkey.keystore import keystore_opener
from stationkey.keystore.stores import store_uris
from stationkey.keystore.tpm2 import return_codes as rc

PATIENCE: Final = 5.0
"""Seconds for all questions together. The slowest of them takes a chip some tens of milliseconds."""
_MAX_KEYS: Final = 16
_RC_NOT_THE_TPM: Final = frozenset(range(1, 0x0B))  # layers of tpm2-tss itself, shifted


def _look_at_keystore(context: Context) -> tuple[str | None, ConfigurationError | None]:
    """Look at the URI, and ask whether the daemon would take it."""
    keystore, settings = context.configured.keystore, context.settings
    stores = [store for store in settings.stores if keystore is not None or store.name != DEFAULT_STORE]
    try:
        store_uris(stores)
        for store in stores:
            keystore_opener(
                store.uri,
                allow_software_keys=settings.allow_software_keys,
                terms=settings.keystore_terms(store.uri),
                state_dir=settings.state_dir,
            )
    except ConfigurationError as error:
        return keystore, error
    return keystore, None


def _judge_keystore(keystore: str | None, refused: ConfigurationError | None) -> Finding:
    """Judge the URI. `refused`: why the daemon would not take it, or None."""
    if keystore is None:
        told = "no key store is named, and this machine has no /dev/tpmrm0: the daemon does not start"
        return failure("not_named", told, "is there a TPM (ls -l /dev/tpm*)? Then name it as keystore")
    if refused is not None:
        return refusal(refused, "correct keystore in the configuration")
    if keystore == "software:":
        told = "the keys are in software: who can read the disk has them"
        return warning("software", told, f"for trying only; on a station, {CHOICE}", stops=True)
    if not keystore.startswith("tpm2:"):
        return ok(f"the key store is {keystore}, which is not asked", stops=True)
    return ok(f"the key store is {keystore}")


def _judge_manager(way: Way) -> Finding:
    if way.is_managed:
        return ok("a resource manager is in between: other programs can use the TPM, too")
    if way.name == "device" and way.path is None:
        return warning("no_device", "the device is not named, and tpm2-tss chooses one", CHOICE)
    told = f"no resource manager ({way.tcti}): no other program, such as a TLS service, can use the TPM meanwhile"
    return warning("no_manager", told, MANAGER_ADVICE)


def ask_tpm(context: Context) -> Seen:
    """Ask the TPM in a process of its own, `stationkey.doctor.tpm.probe`."""
    keys, purposes = _active_keys(context)
    running, tpm = context.daemon.running, context.settings.tpm
    seen = Seen(way=way_of(context), settings=context.settings, daemon_running=running, keys=purposes)
    asked = {
        "tcti": seen.way.tcti,
        "srk": tpm.srk_handle,
        "ak": tpm.ak_handle,
        "keys": keys if seen.may_try_keys else {},
        "owner_auth": _owner_auth(tpm),
        "try_srk": seen.may_try_keys,
    }
    # -P: no module of the working directory.
    command = [sys.executable, "-P", "-m", "stationkey.doctor.tpm.probe", str(os.getpid())]
    return seen.answered(*ask(command, seconds=PATIENCE, given=json.dumps(asked)))


def _owner_auth(settings: TpmTerms) -> str | None:
    """Return the owner's authorisation value in base64, but not if it must not cross the bus in the clear."""
    path = None if settings.owner_auth is None or settings.session != "none" else path_of(settings.owner_auth)
    try:
        return None if path is None else base64.b64encode(SecretReference(str(path)).read()).decode("ascii")
    except ConfigurationError:
        return None  # config.secrets says why


def _active_keys(context: Context) -> tuple[dict[str, str], dict[str, str]]:
    """Return the active keys, wrapped, in base64, and what each is for; nothing if the ledger cannot be read."""
    contents = context.ledger_soon()
    if contents is None:
        return {}, {}
    wrapped = dict(list(contents.wrapped.items())[:_MAX_KEYS])
    purposes = {
        key.key_id: f"{key.certificate_type} {key.evse_id or ''}".strip()
        for key in contents.keys
        if key.key_id in wrapped
    }
    return {name: base64.b64encode(key).decode("ascii") for name, key in wrapped.items()}, purposes


def _look_at_tpm(context: Context) -> tuple[Seen, list[str]] | Finding:
    """Ask the TPM, unless the running daemon has it and it takes one program at a time; and see who else has it."""
    way = way_of(context)
    lost = way.is_simulator and way.is_local and way.port and not connections_to(way.port)
    if context.daemon.running and not way.is_managed and not lost:
        return ok("the TPM is in use by the running daemon; stop the daemon to examine it", stops=True)
    return context.once(ask_tpm), holders(way)


def _judge_reachable(seen: Seen, others: list[str]) -> Finding:
    """Judge whether anything answers. `others`: who else has the TPM."""
    way = seen.way
    who = f"; it is held by {listed(others)}" if others else ""
    answered = "properties" in seen.values or "properties" in seen.errors
    code = seen.errors.get("properties", 0)
    if "open" in seen.values and answered and seen.hung:
        return failure("hung", f"the TPM at {way.tcti} answered some questions, and then no more", "reset it")
    if "open" in seen.values and not seen.hung and code & rc.LAYER and code & rc.LAYER >> 16 in _RC_NOT_THE_TPM:
        told = f"the TPM at {way.tcti} was lost while it was asked ({code:#x})"
        return failure("lost", told, "is it still there? dmesg | grep -i tpm says more")
    if "open" in seen.values and not seen.hung:
        return ok(f"the TPM at {way.tcti} answers")
    if seen.hung:
        advice = "reset the TPM (a chip: switch the station off and on); then see dmesg | grep -i tpm"
        if way.name == "tabrmd":
            advice = "does tpm2-abrmd hang (systemctl status tpm2-abrmd)? Else " + advice
        if others:
            advice = "end that program, or put a resource manager in between: " + MANAGER_ADVICE
        return failure("silent", f"the TPM at {way.tcti} does not answer within {PATIENCE:g} s{who}", advice)
    if "device" in seen.errors:
        return _judge_opening(way, seen.errors["device"], who)
    code = seen.errors.get("open", 0)
    if code in {rc.TCTI_VALUE, rc.TCTI_UNKNOWN}:
        blank = " It must have no blanks." if way.tcti != "".join(way.tcti.split()) else ""
        advice = f"is libtss2-tcti-{way.name.strip()} installed? For example tpm2:device:/dev/tpmrm0.{blank}"
        return failure("tcti", f"invalid TCTI {way.tcti!r} ({code:#x})", advice)
    if code:
        return failure("unreachable", f"the TPM at {way.tcti} cannot be reached ({code:#x}){who}", _reach_advice(way))
    told = f"the program that asks the TPM does not run: {seen.said or 'it ended without a message'}"
    return failure("no_tss", told, "are tpm2-tss (Debian: libtss2-esys) and tpm2-pytss installed?")


def _reach_advice(way: Way) -> str:
    if way.is_simulator and way.path is not None:
        return f"does the simulator listen at {way.path}, and as {way.name}?"
    if way.is_simulator and way.is_local and listeners_on(way.port):
        return f"is the port {way.port} right? That of swtpm's --server is meant, not that of its --ctrl"
    if way.is_simulator:
        return f"start the simulator at {way.host}:{way.port}, or name the TPM of this machine as keystore"
    if way.name == "tabrmd":
        return "systemctl status tpm2-abrmd; its user must be able to open /dev/tpm0, and ours to ask it (group tss)"
    return "dmesg | grep -i tpm says what the driver reports"


def _judge_opening(way: Way, code: int, who: str) -> Finding:
    if code in {errno.EACCES, errno.EPERM}:
        return hidden(way.path)
    if code == errno.EBUSY:
        told, advice = f"another program has {way.path} open{who}", "end it, or have both use a resource manager: "
        return failure("busy", told, advice + MANAGER_ADVICE)
    told = f"{way.path} cannot be opened ({errno.errorcode.get(code, code)}){who}"
    return failure("not_opened", told, _reach_advice(way))


CHECKS: Final = (
    Check("tpm.keystore", _look_at_keystore, _judge_keystore, reads=("keystore",)),
    device.CHECK,
    Check("tpm.manager", lambda context: (way_of(context),), _judge_manager, ("tpm.keystore",)),
    Check("tpm.reachable", _look_at_tpm, _judge_reachable, ("tpm.device",)),
)
