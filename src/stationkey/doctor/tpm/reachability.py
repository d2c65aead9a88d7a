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
from stationkey.doctor.host.files import look_at
from stationkey.doctor.host.sockets import connections_to, listeners_on
from stationkey.doctor.report import Verdict, failure, listed, not_checked, ok, warning
from stationkey.doctor.runner import ask
from stationkey.doctor.tpm.device import CHOICE, Way, group_name, holders, simulator_lives, way_of
from stationkey.doctor.tpm.facts import MANAGER_ADVICE, Probe, Seen, may_try_keys
from stationkey.errors import ConfigurationError
from stationkey.keystore import keystore_opener

PATIENCE: Final = 5.0
"""Seconds for all questions together. The slowest of them takes a chip some tens of milliseconds."""
_MAX_KEYS: Final = 16
_RC_TCTI: Final = frozenset({0xA000B, 0xA0015})  # bad value, unknown name
_RC_LAYER: Final = 0x00FF0000
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


def judge_keystore(keystore: str | None, refused: ConfigurationError | None) -> Verdict:
    """Judge the URI. `refused`: why the daemon would not take it, or None."""
    if keystore is None:
        return failure(
            "no key store is named, and this machine has no /dev/tpmrm0",
            "is there a TPM (ls -l /dev/tpm*)? Then name it as keystore; the daemon does not start without",
        )
    if refused is not None:
        return failure(refused.message, refused.hint or "correct keystore in the configuration")
    if keystore == "software:":
        return warning(
            "the keys are in software: whoever can read the disk has them",
            f"for trying only; on a station, {CHOICE}",
            stops=True,
        )
    scheme, _, tcti = keystore.partition(":")
    if scheme != "tpm2" or not tcti:
        return ok(f"the key store is {keystore}, which is not asked", stops=True)
    return ok(f"the key store is {keystore}")


def look_at_way(context: Context) -> tuple[Way]:
    """Take the way to the TPM apart."""
    return (way_of(context),)


def judge_manager(way: Way) -> Verdict:
    """Judge whether several programs can use the TPM at a time."""
    if way.is_managed:
        return ok("a resource manager is in between: other programs can use the TPM, too")
    if way.name == "device" and way.path is None:
        return warning("the device is not named, and tpm2-tss chooses one", CHOICE)
    return warning(
        f"no resource manager is between the daemon and the TPM ({way.tcti}): no other program can use it meanwhile, "
        "so no TLS service can use an active key",
        MANAGER_ADVICE,
    )


class Told:
    """A look at what the TPM told.

    Args:
        parts: what must be there to be judged: parts of the probe by name, properties by number.
    """

    def __init__(self, *parts: str | int) -> None:
        self._parts = parts

    def __call__(self, context: Context) -> tuple[Seen] | Verdict:
        """Ask the TPM, once for all checks."""
        return self.of(context.once(_ask))

    def of(self, seen: Seen) -> tuple[Seen] | Verdict:
        """Return what is to be judged, or that it is not there."""
        why = seen.probe.lacks(*self._parts)
        return not_checked(why) if why else (seen,)


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


def look_at_tpm(context: Context) -> tuple[Seen, list[str]] | Verdict:
    """Ask the TPM, unless the running daemon has it and it takes one program at a time; and see who else has it."""
    way = way_of(context)
    if context.daemon.running and not way.is_managed and (held := _judge_held(way)) is not None:
        return held
    seen = context.once(_ask)
    return seen, holders(way)


def _judge_held(way: Way) -> Verdict | None:
    if way.name in {"swtpm", "mssim"} and way.port:
        if not connections_to(way.port) and way.is_local:
            return None  # the daemon has lost it; so it can be asked
        if way.name == "swtpm" and simulator_lives(way) is False:
            return failure(
                f"the TPM at {way.tcti} does not answer, and the running daemon waits for it",
                "reset the TPM; the daemon reopens it by itself, and need not be restarted",
            )
    return ok("the TPM is in use by the running daemon, which is right; stop the daemon to examine it", stops=True)


def judge_reachable(seen: Seen, others: list[str]) -> Verdict:
    """Judge whether anything answers. `others`: who else has the TPM."""
    probe, way = seen.probe, seen.way
    who = f"; it is held by {listed(others)}" if others else ""
    answered = "properties" in probe.values or "properties" in probe.errors
    tabrmd = way.name == "tabrmd"
    if "open" in probe.values and (answered or not probe.hung):
        code = probe.errors.get("properties", 0)
        if probe.hung:
            return failure(f"the TPM at {way.tcti} answered some questions, and then no more", "reset it")
        if code & _RC_LAYER and code & _RC_LAYER >> 16 in _RC_NOT_THE_TPM:
            advice = "systemctl restart tpm2-abrmd, and see dmesg" if tabrmd else "is it still there?"
            return failure(f"the TPM at {way.tcti} was lost while it was asked ({code:#x})", advice)
        return ok(f"the TPM at {way.tcti} answers")
    if probe.hung:
        advice = "reset the TPM (a chip: switch the station off and on); then see dmesg | grep -i tpm"
        if tabrmd:
            advice = "does tpm2-abrmd hang (systemctl restart tpm2-abrmd)? Else " + advice
        if others:
            advice = "end that program, or put a resource manager in between: " + MANAGER_ADVICE
        return failure(f"the TPM at {way.tcti} does not answer within {PATIENCE:g} s{who}", advice)
    if "device" in probe.errors:
        return _judge_opening(way, probe.errors["device"], who)
    if "open" in probe.errors:
        code = probe.errors["open"]
        if code in _RC_TCTI:
            blank = " It must have no blanks." if way.tcti != "".join(way.tcti.split()) else ""
            return failure(
                f"invalid TCTI {way.tcti!r} ({code:#x})",
                f"is libtss2-tcti-{way.name.strip()} installed? For example tpm2:device:/dev/tpmrm0.{blank}",
            )
        return failure(f"the TPM at {way.tcti} cannot be reached ({code:#x}){who}", _reach_advice(way))
    return failure(
        f"the program that asks the TPM does not run: {probe.said or 'it ended without a message'}",
        "are tpm2-tss (libtss2-esys) and the Python package tpm2-pytss installed? See the README, Install",
    )


def _reach_advice(way: Way) -> str:
    if way.is_simulator and way.path is not None:
        return f"does the simulator listen at {way.path}, and as {way.name}?"
    if way.is_simulator and way.is_local and listeners_on(way.port):
        return (
            f"something else than {way.name} listens there (ss -ltnp sport = :{way.port}): is the port right? That of "
            "swtpm's --server, not that of its --ctrl"
        )
    if way.is_simulator:
        return f"start the simulator at {way.host}:{way.port}, or name the TPM of this machine as keystore"
    if way.name == "tabrmd":
        return "systemctl status tpm2-abrmd; its user must be able to open /dev/tpm0, and ours to ask it (group tss)"
    return "dmesg | grep -i tpm says what the driver reports"


def _judge_opening(way: Way, code: int, who: str) -> Verdict:
    if code in {errno.EACCES, errno.EPERM}:
        facts = look_at(way.path, follow=True) if way.path else None
        group = group_name(facts.gid) if facts is not None and facts.there else "tss"
        return not_checked(f"this user may not open {way.path}", f"run it as root, as the daemon's user, or in {group}")
    if code == errno.EBUSY:
        return failure(
            f"another program has {way.path} open{who}",
            f"end it, or have both use a resource manager: {MANAGER_ADVICE}",
        )
    return failure(f"{way.path} cannot be opened ({errno.errorcode.get(code, code)}){who}", _reach_advice(way))
