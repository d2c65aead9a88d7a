"""The way to the TPM, whether it can be asked, and who is to judge its answers.

`stationkey.doctor.tpm.probe` asks, in a process of its own; everything that is called ``judge_…`` only reads what came.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import TpmTerms
from stationkey.doctor.host.context import Subject, path_of, unless_guessed
from stationkey.doctor.host.files import look_at
from stationkey.doctor.report import CannotLookError, Finding, failure, listed, not_checked, ok, warning
from stationkey.doctor.runner import ask, judged
from stationkey.doctor.tpm import capabilities, state
from stationkey.doctor.tpm.device import (
    Way,
    connections_to,
    group_name,
    holders_of_device,
    holders_of_port,
    is_tpm,
    judge_device,
    judge_socket,
    listeners_on,
    look_at_chip,
    simulator_lives,
)
from stationkey.doctor.tpm.facts import (
    MANAGER_ADVICE,
    Probe,
    Seen,
    may_try_keys,
)
from stationkey.errors import ConfigurationError
from stationkey.keystore import keystore_opener

PATIENCE: Final = 5.0
"""Seconds for all questions together. The slowest of them takes a chip some tens of milliseconds."""
DEADLINE: Final = PATIENCE + 2.5
_RC_TCTI: Final = frozenset({0xA000B, 0xA0015})  # bad value, unknown name
_RC_LAYER: Final = 0x00FF0000
_RC_NOT_THE_TPM: Final = frozenset(range(1, 0x0B))  # layers of tpm2-tss itself, shifted
IDS: Final = (
    *("tpm.keystore", "tpm.device", "tpm.manager", "tpm.reachable"),
    *("tpm.started", "tpm.self_test", "tpm.version", "tpm.firmware", "tpm.simulated", "tpm.algorithms"),
    *("tpm.certificate_types", "tpm.hierarchies", "tpm.srk", "tpm.authorisation", "tpm.lockout", "tpm.slots"),
    *("tpm.sessions", "tpm.pcrs", "tpm.attestation_key", "tpm.keys"),
)


def check_tpm(subject: Subject) -> Iterator[Finding]:
    """All about the key store."""
    hang_on = {
        "keystore": IDS,
        "tpm": ("tpm.srk", "tpm.authorisation", "tpm.sessions", "tpm.pcrs", "tpm.attestation_key", "tpm.keys"),
    }
    return unless_guessed(
        _check(subject), {name: ids for name, ids in hang_on.items() if name in subject.configured.lost}
    )


def _check(subject: Subject) -> Iterator[Finding]:
    keystore = subject.configured.keystore
    yield judge_keystore(keystore, allowed=subject.settings.allow_software_keys)
    scheme, _, tcti = (keystore or "").partition(":")
    if keystore == "software:":
        raise CannotLookError("the keys are in software")
    if scheme != "tpm2" or not tcti:
        raise CannotLookError("no TPM is named")
    way, user, chip = Way.parse(tcti), subject.daemon.user, look_at_chip()
    device = None if way.path is None or way.name != "device" else look_at(way.path, follow=True)
    tpm = device is None or is_tpm(device)
    yield from judge_socket(way, user) if device is None else judge_device(device, chip, user, tpm=tpm)
    yield judge_manager(way)
    if device is not None and not (tpm and device.kind == "character device"):
        raise CannotLookError("there is no TPM at the end of the way")
    if (held := _in_use(subject, way)) is not None:
        yield held
        raise CannotLookError("the TPM is in use by the running daemon, and takes one program at a time")
    keys, purposes = keys_to_try(subject, way)
    asked = {"tcti": tcti, "srk": subject.settings.tpm.srk_handle, "ak": subject.settings.tpm.ak_handle, "keys": keys}
    asked["owner_auth"] = _owner_auth(subject.settings.tpm)
    # Where keys may be tried, so may this be.
    asked["try_srk"] = may_try_keys(subject.settings.tpm, way, daemon_running=subject.daemon.running)
    # -P: no module of the directory that somebody happens to stand in.
    command = [sys.executable, "-P", "-m", "stationkey.doctor.tpm.probe", str(os.getpid())]
    probe = Probe.read(ask(command, seconds=PATIENCE, given=json.dumps(asked)))
    seen = Seen(
        probe=probe,
        way=way,
        settings=subject.settings,
        daemon_running=subject.daemon.running,
        keys=purposes,
    )
    yield judge_reachable(seen, _others(way))
    if "open" not in probe.values:
        raise CannotLookError("the TPM cannot be asked")
    yield from judged(JUDGES, seen)


def judge_keystore(keystore: str | None, *, allowed: bool) -> Finding:
    """The URI."""
    name = "tpm.keystore"
    if keystore is None:
        return failure(
            name,
            "no key store is named, and this machine has no /dev/tpmrm0",
            "is there a TPM (ls -l /dev/tpm*)? Then name it as keystore; the daemon does not start without",
        )
    try:
        keystore_opener(keystore, allow_software_keys=allowed)
    except ConfigurationError as error:
        return failure(name, error.message, error.hint or "correct keystore in the configuration")
    if keystore == "software:":
        return warning(
            name,
            "the keys are in software: whoever can read the disk has them",
            'for trying only; on a station, keystore = "tpm2:device:/dev/tpmrm0"',
        )
    return ok(name, f"the key store is {keystore}")


def judge_manager(way: Way) -> Finding:
    """Whether several programs can use the TPM at a time."""
    name = "tpm.manager"
    if way.is_managed:
        return ok(name, "a resource manager is in between: other programs can use the TPM, too")
    if way.name == "device" and way.path is None:
        return warning(
            name, "the device is not named, and tpm2-tss chooses one", 'keystore = "tpm2:device:/dev/tpmrm0"'
        )
    return warning(
        name,
        f"no resource manager is between the daemon and the TPM ({way.tcti}): no other program can use it meanwhile, "
        "so no TLS service can use an active key",
        MANAGER_ADVICE,
    )


def _in_use(subject: Subject, way: Way) -> Finding | None:
    """What is said where the running daemon has a TPM that takes one program at a time; None where it may be asked."""
    if way.is_managed or not subject.daemon.running:
        return None
    name = "tpm.reachable"
    if way.name in {"swtpm", "mssim"} and way.port:
        if not connections_to(way.port) and way.is_local:
            return None  # the daemon has lost it; so it can be asked
        if way.name == "swtpm" and simulator_lives(way) is False:
            return failure(
                name,
                f"the TPM at {way.tcti} does not answer, and the running daemon waits for it",
                "reset the TPM; the daemon opens it anew by itself, and need not be restarted",
            )
    return ok(name, "the TPM is in use by the running daemon, which is right; stop the daemon to have it looked at")


def _others(way: Way) -> list[str]:
    """Who else has the TPM."""
    if way.name == "device" and way.path is not None:
        found = holders_of_device(look_at(way.path))
    else:
        found = holders_of_port(way.port) if way.port else []
    return [f"{name} (process {pid})" for pid, name in found]


def _owner_auth(settings: TpmTerms) -> str | None:
    """The owner's authorisation value in base64, to be tried; not where it must not cross the bus in the clear."""
    if settings.owner_auth is None or settings.session != "none":
        return None
    if (path := path_of(settings.owner_auth)) is None:
        return None
    try:
        return base64.b64encode(SecretReference(str(path)).read()).decode("ascii")
    except ConfigurationError:
        return None  # the check of the secrets says why


def keys_to_try(subject: Subject, way: Way) -> tuple[dict[str, str], dict[str, str]]:
    """The active keys, wrapped, in base64, as far as they may be tried; and what each is for.

    Nothing where the ledger cannot be read.
    """
    contents = subject.ledger.soon(subject)
    if contents is None:
        return {}, {}
    wrapped = dict(list(contents.wrapped.items())[:_MAX_KEYS])
    purposes = {
        key.key_id: f"{key.certificate_type} {key.evse_id or ''}".strip()
        for key in contents.keys
        if key.key_id in wrapped
    }
    if not may_try_keys(subject.settings.tpm, way, daemon_running=subject.daemon.running):
        wrapped = {}
    return {name: base64.b64encode(key).decode("ascii") for name, key in wrapped.items()}, purposes


_MAX_KEYS: Final = 16


def judge_reachable(seen: Seen, others: list[str]) -> Finding:
    """Whether anything answers."""
    name, probe, way = "tpm.reachable", seen.probe, seen.way
    who = f"; it is held by {listed(others)}" if others else ""
    answered = "properties" in probe.values or "properties" in probe.errors
    if "open" in probe.values and (answered or not probe.hung):
        if probe.hung:
            return failure(name, f"the TPM at {way.tcti} answered some questions, and then no more", "reset it")
        code = probe.errors.get("properties", 0)
        if code & _RC_LAYER and code & _RC_LAYER >> 16 in _RC_NOT_THE_TPM:
            advice = "is it there still?"
            if way.name == "tabrmd":
                advice = "the resource manager runs, and has lost the TPM: systemctl restart tpm2-abrmd, and see dmesg"
            return failure(name, f"the TPM at {way.tcti} was lost while it was asked ({code:#x})", advice)
        return ok(name, f"the TPM at {way.tcti} answers")
    if probe.hung:
        advice = "reset the TPM (a chip: switch the station off and on); then see dmesg | grep -i tpm"
        if way.name == "tabrmd":
            advice = "is it tpm2-abrmd that hangs (systemctl restart tpm2-abrmd)? Else " + advice
        if others:
            advice = "end that program, or put a resource manager in between: " + MANAGER_ADVICE
        return failure(name, f"the TPM at {way.tcti} does not answer within {PATIENCE:g} s{who}", advice)
    if "device" in probe.errors:
        return _judge_opening(way, probe.errors["device"], who)
    if "open" in probe.errors:
        code = probe.errors["open"]
        if code in _RC_TCTI and way.tcti != "".join(way.tcti.split()):
            said = f"tpm2-tss cannot make use of the TCTI {way.tcti!r} ({code:#x}), which has a blank in it"
            return failure(name, said, "write it without")
        if code in _RC_TCTI:
            return failure(
                name,
                f"tpm2-tss cannot make use of the TCTI {way.tcti!r} ({code:#x})",
                f"is libtss2-tcti-{way.name} installed, and is what follows the name right? For example "
                "tpm2:device:/dev/tpmrm0",
            )
        return failure(name, f"the TPM at {way.tcti} cannot be reached ({code:#x}){who}", _reach_advice(way))
    return failure(
        name,
        f"the program that asks the TPM does not run: {probe.said or 'it ended without a word'}",
        "is tpm2-tss installed (libtss2-esys), and the Python package tpm2-pytss with it? See the README, Install",
    )


def _reach_advice(way: Way) -> str:
    if way.path is not None and way.is_simulator:
        return f"does the simulator listen at {way.path}, and as {way.name}?"
    if way.is_simulator and way.is_local and listeners_on(way.port):
        return (
            f"something listens at port {way.port} (ss -ltnp sport = :{way.port}), and is no {way.name} that answers: "
            "is it the right port? That of swtpm's --server, not that of its --ctrl"
        )
    if way.is_simulator:
        return f"start the simulator at {way.host}:{way.port}, or name the TPM of this machine as keystore"
    if way.name == "tabrmd":
        return "systemctl status tpm2-abrmd; its user must be able to open /dev/tpm0, and ours to ask it (group tss)"
    return "dmesg | grep -i tpm says what the driver thinks of it"


def _judge_opening(way: Way, code: int, who: str) -> Finding:
    name, words = "tpm.reachable", errno.errorcode.get(code, str(code))
    if code in {errno.EACCES, errno.EPERM}:
        path = look_at(way.path, follow=True) if way.path else None
        group = group_name(path.gid) if path is not None and path.there else "tss"
        return not_checked(
            name, f"this user may not open {way.path}", f"run it as root, as the daemon's user, or in the group {group}"
        )
    if code == errno.EBUSY:
        return failure(
            name,
            f"another program has {way.path} open{who}",
            f"end it, or have both go through a resource manager: {MANAGER_ADVICE}",
        )
    return failure(name, f"{way.path} cannot be opened ({words}){who}", _reach_advice(way))


JUDGES: Final[Mapping[str, Callable[[Seen], Iterator[Finding]]]] = MappingProxyType(
    {
        "tpm.started": state.judge_started,
        "tpm.self_test": state.judge_self_test,
        "tpm.version": capabilities.judge_version,
        "tpm.firmware": capabilities.judge_firmware,
        "tpm.simulated": capabilities.judge_simulated,
        "tpm.algorithms": capabilities.judge_algorithms,
        "tpm.certificate_types": capabilities.judge_certificate_types,
        "tpm.hierarchies": state.judge_hierarchies,
        "tpm.srk": state.judge_srk,
        "tpm.authorisation": state.judge_authorisation,
        "tpm.lockout": state.judge_lockout,
        "tpm.slots": state.judge_slots,
        "tpm.sessions": state.judge_sessions,
        "tpm.pcrs": state.judge_pcrs,
        "tpm.attestation_key": state.judge_attestation_key,
        "tpm.keys": state.judge_keys,
    }
)
