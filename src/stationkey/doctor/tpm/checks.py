"""Asks the TPM, in a process of its own, and judges whether it answers."""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
from typing import Final

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import TpmTerms
from stationkey.doctor.host.context import Context, path_of
from stationkey.doctor.host.sockets import connections_to, listeners_on
from stationkey.doctor.report import Finding, failure, hidden, listed, ok, unknown, warning
from stationkey.doctor.runner import Check, ask
from stationkey.doctor.tpm import device, facts, state
from stationkey.doctor.tpm.device import CHOICE, Way, holders, way_of
from stationkey.doctor.tpm.facts import MANAGER_ADVICE, Probe, Seen, may_try_keys
from stationkey.errors import ConfigurationError
from stationkey.keystore import keystore_opener
from stationkey.keystore.tpm2 import return_codes as rc

PATIENCE: Final = 5.0
"""Seconds for all questions together. The slowest of them takes a chip some tens of milliseconds."""
_MAX_KEYS: Final = 16
_RC_NOT_THE_TPM: Final = frozenset(range(1, 0x0B))  # layers of tpm2-tss itself, shifted


def look_at_keystore(context: Context) -> tuple[str | None, ConfigurationError | None]:
    """Look at the URI, and ask whether the daemon would take it."""
    keystore = context.configured.keystore
    try:
        if keystore is not None:
            keystore_opener(keystore, allow_software_keys=context.settings.allow_software_keys)
    except ConfigurationError as error:
        return keystore, error
    return keystore, None


def judge_keystore(keystore: str | None, refused: ConfigurationError | None) -> Finding:
    """Judge the URI. `refused`: why the daemon would not take it, or None."""
    if keystore is None:
        told = "no key store is named, and this machine has no /dev/tpmrm0: the daemon does not start"
        return failure("not_named", told, "is there a TPM (ls -l /dev/tpm*)? Then name it as keystore")
    if refused is not None:
        return failure(refused.reason, refused.message, refused.hint or "correct keystore in the configuration")
    if keystore == "software:":
        told = "the keys are in software: who can read the disk has them"
        return warning("software", told, f"for trying only; on a station, {CHOICE}", stops=True)
    if not keystore.startswith("tpm2:"):
        return ok(f"the key store is {keystore}, which is not asked", stops=True)
    return ok(f"the key store is {keystore}")


def judge_manager(way: Way) -> Finding:
    """Judge whether several programs can use the TPM at a time."""
    if way.is_managed:
        return ok("a resource manager is in between: other programs can use the TPM, too")
    if way.name == "device" and way.path is None:
        return warning("no_device", "the device is not named, and tpm2-tss chooses one", CHOICE)
    told = f"no resource manager ({way.tcti}): no other program, such as a TLS service, can use the TPM meanwhile"
    return warning("no_manager", told, MANAGER_ADVICE)


class Told:
    """A look at what the TPM told.

    Args:
        parts: what must be there to be judged: parts of the probe by name, properties by number.
    """

    def __init__(self, *parts: str | int) -> None:
        self._parts = parts

    def __call__(self, context: Context) -> tuple[Seen] | Finding:
        """Ask the TPM, once for all checks."""
        return self.of(context.once(_ask))

    def of(self, seen: Seen) -> tuple[Seen] | Finding:
        """Return what is to be judged, or that it is not there."""
        why = seen.probe.lacks(*self._parts)
        return unknown(why) if why else (seen,)


def _ask(context: Context) -> Seen:
    """Ask the TPM in a process of its own, `stationkey.doctor.tpm.probe`."""
    way, tpm = way_of(context), context.settings.tpm
    # Where keys may be tried, so may the storage root key.
    may_try = may_try_keys(tpm, way, daemon_running=context.daemon.running)
    keys, purposes = _active_keys(context)
    asked = {
        "tcti": way.tcti,
        "srk": tpm.srk_handle,
        "ak": tpm.ak_handle,
        "keys": keys if may_try else {},
        "owner_auth": _owner_auth(tpm),
        "try_srk": may_try,
    }
    # -P: no module of the working directory.
    command = [sys.executable, "-P", "-m", "stationkey.doctor.tpm.probe", str(os.getpid())]
    probe = Probe.read(ask(command, seconds=PATIENCE, given=json.dumps(asked)))
    return Seen(probe=probe, way=way, settings=context.settings, daemon_running=context.daemon.running, keys=purposes)


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


def look_at_tpm(context: Context) -> tuple[Seen, list[str]] | Finding:
    """Ask the TPM, unless the running daemon has it and it takes one program at a time; and see who else has it."""
    way = way_of(context)
    lost = way.is_simulator and way.is_local and way.port and not connections_to(way.port)
    if context.daemon.running and not way.is_managed and not lost:
        return ok("the TPM is in use by the running daemon; stop the daemon to examine it", stops=True)
    return context.once(_ask), holders(way)


def judge_reachable(seen: Seen, others: list[str]) -> Finding:
    """Judge whether anything answers. `others`: who else has the TPM."""
    probe, way = seen.probe, seen.way
    who = f"; it is held by {listed(others)}" if others else ""
    answered = "properties" in probe.values or "properties" in probe.errors
    code = probe.errors.get("properties", 0)
    if "open" in probe.values and answered and probe.hung:
        return failure("hung", f"the TPM at {way.tcti} answered some questions, and then no more", "reset it")
    if "open" in probe.values and not probe.hung and code & rc.LAYER and code & rc.LAYER >> 16 in _RC_NOT_THE_TPM:
        told = f"the TPM at {way.tcti} was lost while it was asked ({code:#x})"
        return failure("lost", told, "is it still there? dmesg | grep -i tpm says more")
    if "open" in probe.values and not probe.hung:
        return ok(f"the TPM at {way.tcti} answers")
    if probe.hung:
        advice = "reset the TPM (a chip: switch the station off and on); then see dmesg | grep -i tpm"
        if way.name == "tabrmd":
            advice = "does tpm2-abrmd hang (systemctl status tpm2-abrmd)? Else " + advice
        if others:
            advice = "end that program, or put a resource manager in between: " + MANAGER_ADVICE
        return failure("silent", f"the TPM at {way.tcti} does not answer within {PATIENCE:g} s{who}", advice)
    if "device" in probe.errors:
        return _judge_opening(way, probe.errors["device"], who)
    code = probe.errors.get("open", 0)
    if code in {rc.TCTI_VALUE, rc.TCTI_UNKNOWN}:
        blank = " It must have no blanks." if way.tcti != "".join(way.tcti.split()) else ""
        advice = f"is libtss2-tcti-{way.name.strip()} installed? For example tpm2:device:/dev/tpmrm0.{blank}"
        return failure("tcti", f"invalid TCTI {way.tcti!r} ({code:#x})", advice)
    if code:
        return failure("unreachable", f"the TPM at {way.tcti} cannot be reached ({code:#x}){who}", _reach_advice(way))
    told = f"the program that asks the TPM does not run: {probe.said or 'it ended without a message'}"
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


_WAY: Final = ("tpm.keystore",)
_ANSWERS: Final = ("tpm.reachable",)
_TPM: Final = ("tpm",)
"""The section of the configuration file."""
CHECKS: Final = (
    Check("tpm.keystore", look_at_keystore, judge_keystore, reads=("keystore",)),
    Check("tpm.device", device.look_at_device, device.judge_device, _WAY),
    Check("tpm.manager", lambda context: (way_of(context),), judge_manager, _WAY),
    Check("tpm.reachable", look_at_tpm, judge_reachable, ("tpm.device",)),
    Check("tpm.started", Told(), state.judge_started, _ANSWERS),
    Check("tpm.self_test", Told(), state.judge_self_test, _ANSWERS),
    Check("tpm.version", Told(*facts.VERSION), state.judge_version, _ANSWERS),
    Check("tpm.firmware", Told(*facts.MAKER, *facts.PT_FIRMWARE), state.judge_firmware, _ANSWERS),
    Check("tpm.simulated", Told(*facts.MAKER), state.judge_simulated, _ANSWERS),
    Check("tpm.certificate_types", Told(*facts.ALGORITHMS), state.judge_certificate_types, _ANSWERS),
    Check("tpm.hierarchies", Told(facts.PT_STARTUP_CLEAR), state.judge_hierarchies, _ANSWERS),
    Check("tpm.srk", Told("srk", *facts.ROOM_FOR_SRK), state.judge_srk, _ANSWERS, _TPM),
    Check("tpm.authorisation", Told(facts.PT_PERMANENT), state.judge_authorisation, _ANSWERS, _TPM),
    Check("tpm.lockout", Told(*facts.LOCKOUT), state.judge_lockout, _ANSWERS),
    Check("tpm.slots", Told("transient", facts.PT_TRANSIENT_AVAIL), state.judge_slots, _ANSWERS),
    Check("tpm.sessions", Told("loaded_sessions", *facts.SESSIONS), state.judge_sessions, _ANSWERS, _TPM),
    Check("tpm.pcrs", Told("banks"), state.judge_pcrs, _ANSWERS, _TPM),
    Check("tpm.attestation_key", Told(), state.judge_attestation_key, _ANSWERS, _TPM),
    Check("tpm.keys", Told(), state.judge_keys, _ANSWERS, _TPM),
)
