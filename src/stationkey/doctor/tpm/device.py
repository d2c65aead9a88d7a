"""The way to the TPM, as far as it can be seen from outside, and whether it answers."""

from __future__ import annotations

import errno
import grp
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from stationkey.config.settings import DEFAULT_DEVICE, NamedStore
from stationkey.contract.profiles import CertificateType
from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import READ, WRITE, Facts, User, look_at, octal, permits
from stationkey.doctor.host.sockets import connections_to, listeners_on
from stationkey.doctor.report import Finding, failure, hidden, listed, ok, refusal, warning
from stationkey.doctor.runner import Check
from stationkey.doctor.tpm.facts import BARE, MANAGED, MANAGER_ADVICE, PATIENCE, Seen, Way, ask_tpm, way_of
from stationkey.errors import ConfigurationError
from stationkey.keystore import KeyStoreUri, keystore_opener
from stationkey.keystore.stores import store_uris
from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.system.addresses import is_loopback

_SYS: Final = Path("/sys/class/tpm")
_CLASSES: Final = frozenset({"tpm", "tpmrm"})
CHOICE: Final = 'keystore = "tpm2:device:/dev/tpmrm0"'
"""The usual key store, for advice."""
_RC_NOT_THE_TPM: Final = frozenset(range(1, 0x0B))  # layers of tpm2-tss itself, shifted


def _look_at_keystores(context: Context) -> tuple[list[NamedStore], list[str], list[ConfigurationError]]:
    """Ask the daemon's own rules whether it would take the key stores, and find the types without one."""
    settings, stores = context.settings, list(context.settings.stores)
    homeless = [str(kind) for kind in CertificateType if not any(kind in store.types for store in stores)]
    refused = []
    try:
        store_uris(stores)
    except ConfigurationError as error:
        return stores, homeless, [error]
    for store in stores:
        try:
            keystore_opener(
                store.uri,
                allow_software_keys=settings.allow_software_keys,
                terms=settings.keystore_terms(store.uri),
                state_dir=settings.state_dir,
            )
        except ConfigurationError as error:
            refused.append(error)
    return stores, homeless, refused


def _judge_keystores(
    stores: list[NamedStore], homeless: list[str], refused: list[ConfigurationError]
) -> Iterator[Finding]:
    if homeless:
        told = f"no key store is named for {listed(homeless)}, and this machine has no {DEFAULT_DEVICE}"
        advice = "the daemon does not start: is there a TPM (ls -l /dev/tpm*)? Then name it as keystore"
        yield failure("not_named", told, advice)
    yield from (refusal(error, "correct keystore in the configuration") for error in refused)
    for store in () if refused else stores:
        what = f"the key store of {listed(sorted(store.types)) or 'older keys'} is {KeyStoreUri.parse(store.uri)}"
        if store.uri == "software:":
            advice = f"for trying only; on a station, {CHOICE}"
            yield warning("software", f"{what}: anyone who can read the disk can copy the keys", advice)
        else:
            yield ok(what)


class Chip(NamedTuple):
    """What the kernel says of the first TPM.

    Attributes:
        major: version of TPM, ``2`` or ``1``; empty where an old kernel does not say.
        is_tpm: whether the device file that is named stands for a TPM.
    """

    known: bool
    major: str = ""
    devices: tuple[str, ...] = ()
    is_tpm: bool = True


def _chip(facts: Facts | None) -> Chip:
    found = sorted(_SYS.glob("*"))
    major = ""
    with suppress(IndexError, OSError, ValueError):
        major = (found[0] / "tpm_version_major").read_text(encoding="ascii").strip()
    devices = tuple(sorted(map(str, Path("/dev").glob("tpm*"))))
    return Chip(bool(found), major, devices, facts is None or _is_tpm(facts))


def _is_tpm(facts: Facts) -> bool:
    """Whether a device file stands for a TPM: by what the kernel calls its kind, or else by its name."""
    if facts.kind != "character device":
        return False
    try:
        numbers = f"{os.major(facts.special)}:{os.minor(facts.special)}"
        kind = Path("/sys/dev/char", numbers, "subsystem").readlink().name
    except OSError:
        kind = "misc"  # not said; the first driver of a TPM was one of these
    name = str(facts.path)
    return kind in _CLASSES or (kind == "misc" and bool(BARE.fullmatch(name) or MANAGED.fullmatch(name)))


def _look_at_device(context: Context) -> tuple[Way, Facts | None, Chip, User] | Finding:
    if not context.stores("tpm2"):
        return ok("no key store is a TPM", stops=True)
    way, user = way_of(context), context.daemon.user
    facts = None if way.path is None else look_at(way.path, follow=True, user=user)
    return way, facts, _chip(facts), user


def _judge_device(way: Way, facts: Facts | None, chip: Chip, user: User) -> Finding:
    """Judge what is on the way: there, a TPM, and open to the daemon's user. `facts`: of its path, or None."""
    if facts is None and way.host and not is_loopback(way.host):
        told = f"the TPM is asked over the network, at {way.host}: nothing protects what goes there"
        return warning("network", told, "use the TPM of this machine")
    if facts is None:
        return ok("tpm2-tss chooses the device" if way.name == "device" else f"the TPM is reached by {way.name}")
    path, mode = facts.path, octal(facts.mode)
    if facts.closed is not None:
        advice = f"let it: setfacl -m u:{user.name}:x {facts.closed}"
        return failure("closed", f"the daemon's user {user.name} may not enter {facts.closed}", advice, stops=False)
    if facts.kind == "unseen":
        return hidden(path)
    if way.name != "device":
        if facts.kind in {"missing", "file", "directory"}:
            what = "is missing" if facts.kind == "missing" else f"is a {facts.kind}, not a socket"
            return failure("no_socket", f"{path} {what}", "start what makes it, or correct the path")
        return ok(f"the TPM is reached by {way.name}")
    if chip.major == "1":
        advice = "stationkey needs a TPM 2.0; some chips can be converted in the firmware's set-up"
        return failure("tpm_1", "the TPM of this machine is a TPM 1.2, which has no elliptic curves", advice)
    if facts.kind == "missing":
        return _judge_missing(path, chip)
    if not chip.is_tpm:
        return failure("not_a_tpm", f"{path} is a {facts.kind}, not a TPM", f"name the TPM as keystore: {CHOICE}")
    if not permits(facts, user, READ | WRITE):
        group = _group_name(facts.gid)
        told = f"the daemon's user {user.name} may not open {path} (mode {mode}, group {group})"
        if facts.gid == 0 or not permits(facts, User(-1, facts.gid), READ | WRITE):
            advice = "install tpm-udev (Debian), which gives the device to the group tss, and restart the machine"
            return failure("no_udev", told, advice, stops=False)
        return failure("no_rights", told, f"usermod -a -G {group} {user.name}, then restart the daemon", stops=False)
    if facts.mode & 0o006:
        told = f"every user may use the TPM: {path} has mode {mode}"
        return warning("open", told, f"chmod o= {path}, and find the udev rule that opens it")
    return ok(f"{path} is a device that {user.name} may open (mode {mode})")


def _judge_missing(path: Path, chip: Chip) -> Finding:
    if path.is_symlink():
        return failure("dangling", f"{path} is a link that leads nowhere", f"name the TPM itself: {CHOICE}")
    if chip.known or chip.devices:
        there = ", ".join(chip.devices) or "none under /dev"
        return failure("missing", f"{path} is missing, and the kernel has found a TPM ({there})", f"name it: {CHOICE}")
    advice = "is it enabled in the firmware's set-up or the device tree, its driver loaded? dmesg | grep -i tpm"
    return failure("no_tpm", f"{path} is missing, and the kernel has found no TPM", advice)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return f"number {gid}"


def holders(way: Way) -> list[str]:
    """Return who has the device open, or a connection to the simulator, as far as this user may see them."""
    if way.name == "device" and way.path is not None:
        wanted = {str(way.path)}
    else:
        wanted = {f"socket:[{inode}]" for inode in connections_to(way.port)} if way.port else set()
    found = []
    for process in Path("/proc").iterdir() if wanted else ():
        if not process.name.isdigit() or process.name == str(os.getpid()):
            continue
        try:
            targets = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
            name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:  # it ended, or is another user's
            continue
        if not wanted.isdisjoint(targets):
            found.append(f"{name} (process {process.name})")
    return found


def _judge_manager(way: Way) -> Finding:
    if way.is_managed:
        return ok("a resource manager is in between: other programs can use the TPM, too")
    if way.name == "device" and way.path is None:
        return warning("no_device", "the device is not named, and tpm2-tss chooses one", CHOICE)
    told = f"no resource manager ({way.tcti}): no other program, such as a TLS service, can use the TPM meanwhile"
    return warning("no_manager", told, MANAGER_ADVICE)


def _look_at_tpm(context: Context) -> tuple[Seen, list[str]] | Finding:
    """Ask the TPM, unless the running daemon has it and it takes one program at a time; and see who else has it."""
    way = way_of(context)
    lost = way.is_simulator and is_loopback(way.host) and way.port and not connections_to(way.port)
    if context.daemon.running and not way.is_managed and not lost:
        return ok("the TPM is in use by the running daemon; stop the daemon to examine it", stops=True)
    return context.once(ask_tpm), holders(way)


def _judge_reachable(seen: Seen, others: list[str]) -> Finding:
    way = seen.way
    who = f"; it is held by {listed(others)}" if others else ""
    code = seen.errors.get("properties", 0)
    if "open" in seen.values and not seen.answers.hung:
        if code & rc.LAYER and code & rc.LAYER >> 16 in _RC_NOT_THE_TPM:
            told = f"the TPM at {way.tcti} was lost while it was asked ({code:#x})"
            return failure("lost", told, "is it still there? dmesg | grep -i tpm says more")
        return ok(f"the TPM at {way.tcti} answers")
    if seen.answers.hung and ("properties" in seen.values or code):
        return failure("hung", f"the TPM at {way.tcti} answered some questions, and then no more", "reset it")
    if seen.answers.hung:
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
    told = f"the program that asks the TPM does not run: {seen.answers.said or 'it ended without a message'}"
    return failure("no_tss", told, "are tpm2-tss (Debian: libtss2-esys) and tpm2-pytss installed?")


def _reach_advice(way: Way) -> str:
    if way.is_simulator and way.path is not None:
        return f"does the simulator listen at {way.path}, and as {way.name}?"
    if way.is_simulator and is_loopback(way.host) and listeners_on(way.port):
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
    Check("tpm.keystore", _look_at_keystores, _judge_keystores, reads=("keystore", "keystores", "keystore_for")),
    Check("tpm.device", _look_at_device, _judge_device, ("tpm.keystore",)),
    Check("tpm.manager", lambda context: (way_of(context),), _judge_manager, ("tpm.device",)),
    Check("tpm.reachable", _look_at_tpm, _judge_reachable, ("tpm.device",)),
)
