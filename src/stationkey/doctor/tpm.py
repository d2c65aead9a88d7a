"""The TPM: whether it can be asked, what it can do, and in which state it is.

`stationkey.doctor.probe` asks, in a process of its own; everything here that is called ``judge_…`` only reads what came.
"""

from __future__ import annotations

import base64
import errno
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from stationkey.config import Settings
from stationkey.doctor.device import (
    Way,
    connections_to,
    group_name,
    holders_of_device,
    holders_of_port,
    is_tpm,
    judge_device,
    judge_socket,
    look_at_chip,
    simulator_lives,
)
from stationkey.doctor.files import look_at
from stationkey.doctor.findings import CannotLookError, Finding, failure, listed, not_checked, ok, warning
from stationkey.doctor.ledger import open_for_reading
from stationkey.doctor.running import Answer, ask, judged
from stationkey.doctor.subject import Subject
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.keystore import keystore_opener
from stationkey.profiles import ALGORITHMS, PROFILES, SECP256R1, SECP521R1, Algorithm, EllipticCurve, KeyType
from stationkey.terms import TpmTerms

PATIENCE: Final = 5.0
"""Seconds for all questions together. The slowest of them takes a chip some tens of milliseconds."""
DEADLINE: Final = PATIENCE + 2.5

# TPM_PT [TPM 2.0 part 2, 6.13].
PT_FAMILY: Final = 0x100
PT_REVISION: Final = 0x102
PT_MANUFACTURER: Final = 0x105
PT_VENDOR: Final = (0x106, 0x107, 0x108, 0x109)
PT_FIRMWARE: Final = (0x10B, 0x10C)
PT_PERMANENT: Final = 0x200
PT_STARTUP_CLEAR: Final = 0x201
PT_LOADED_SESSIONS_AVAIL: Final = 0x204
PT_ACTIVE_SESSIONS_AVAIL: Final = 0x206
PT_TRANSIENT_AVAIL: Final = 0x207
PT_PERSISTENT_AVAIL: Final = 0x209
PT_LOCKOUT_COUNTER: Final = 0x20E
PT_MAX_AUTH_FAIL: Final = 0x20F
PT_LOCKOUT_INTERVAL: Final = 0x210
PT_LOCKOUT_RECOVERY: Final = 0x211

# TPMA_PERMANENT and TPMA_STARTUP_CLEAR [TPM 2.0 part 2, 8.6 and 8.7].
OWNER_AUTH_SET: Final = 1 << 0
ENDORSEMENT_AUTH_SET: Final = 1 << 1
LOCKOUT_AUTH_SET: Final = 1 << 2
DISABLE_CLEAR: Final = 1 << 8
IN_LOCKOUT: Final = 1 << 9
STORAGE_ENABLED: Final = 1 << 1
ENDORSEMENT_ENABLED: Final = 1 << 2
ORDERLY: Final = 1 << 31

# TPM_ALG_ID and TPM_ECC_CURVE [TPM 2.0 part 2, 6.3 and 6.4].
ALG_RSA: Final = 0x01
ALG_AES: Final = 0x06
ALG_RSASSA: Final = 0x14
ALG_ECDSA: Final = 0x18
ALG_ECC: Final = 0x23
ALG_CFB: Final = 0x43
HASHES: Final = MappingProxyType({"sha1": 0x04, "sha256": 0x0B, "sha384": 0x0C, "sha512": 0x0D})
CURVES: Final[Mapping[KeyType, int]] = MappingProxyType({SECP256R1: 0x03, SECP521R1: 0x05})

# TPMA_OBJECT [TPM 2.0 part 2, 8.3].
NODA: Final = 1 << 10
_RESTRICTED: Final = 1 << 16
_DECRYPT: Final = 1 << 17
_SIGN: Final = 1 << 18
SRK_NEEDED: Final = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | _RESTRICTED | _DECRYPT

RC_INITIALIZE: Final = 0x100
RC_FAILURE: Final = 0x101
RC_NEEDS_TEST: Final = 0x153
RC_TESTING: Final = 0x90A
RC_INTEGRITY: Final = 0x1DF
RC_OBJECT_MEMORY: Final = 0x902
_RC_TCTI: Final = frozenset({0xA000B, 0xA0015})  # bad value, unknown name
_RC_LAYER: Final = 0x00FF0000
_RC_NOT_THE_TPM: Final = frozenset(range(1, 0x0B))  # layers of tpm2-tss itself, shifted

_MANAGER_ADVICE: Final = 'keystore = "tpm2:device:/dev/tpmrm0", or tpm2-abrmd and "tpm2:tabrmd"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a TPM answered.

    Attributes:
        values: by part; see `stationkey.doctor.probe`.
        errors: the return code of each part that the TPM refused.
        hung: whether an answer did not come.
        said: what the program itself complained about.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    hung: bool = False
    said: str = ""

    @classmethod
    def read(cls, answer: Answer) -> Probe:
        """From what the program printed."""
        values, errors = dict[str, Any](), dict[str, int]()
        for line in answer.out.splitlines():
            try:
                part = json.loads(line)
            except ValueError:
                continue
            if "value" in part:
                values[part["part"]] = part["value"]
            elif "error" in part:
                errors[part["part"]] = part["error"]
        lines = [line for line in answer.error.splitlines() if line.strip()]
        return cls(values=values, errors=errors, hung=answer.status is None, said=lines[-1] if lines else "")

    def get(self, part: str) -> Any:
        """A part.

        Raises:
            CannotLookError: the TPM did not tell.
        """
        if part in self.values:
            return self.values[part]
        if self.errors.get("properties") == RC_INITIALIZE:
            raise CannotLookError("the TPM waits for TPM2_Startup")
        if part in self.errors:
            raise CannotLookError(f"the TPM refuses to tell ({self.errors[part]:#x})")
        raise CannotLookError("the TPM did not tell")

    def properties(self, *wanted: int) -> list[int]:
        """Properties by number.

        Raises:
            CannotLookError: one of them is not there: in failure mode a TPM tells few.
        """
        known = self.get("properties")
        if any(str(number) not in known for number in wanted):
            raise CannotLookError("the TPM does not tell")
        return [known[str(number)] for number in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A TPM that answered, the way to it, and what is wanted of it."""

    probe: Probe
    way: Way
    settings: Settings
    daemon_running: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    """What each key that was tried is for, by its name."""

    @property
    def tpm(self) -> TpmTerms:
        """How it is to be used."""
        return self.settings.tpm


IDS: Final = (
    *("tpm.keystore", "tpm.device", "tpm.manager", "tpm.reachable"),
    *("tpm.started", "tpm.self_test", "tpm.version", "tpm.firmware", "tpm.simulated", "tpm.algorithms"),
    *("tpm.certificate_types", "tpm.hierarchies", "tpm.srk", "tpm.authorisation", "tpm.lockout", "tpm.slots"),
    *("tpm.sessions", "tpm.pcrs", "tpm.attestation_key", "tpm.shutdown", "tpm.keys"),
)


def check_tpm(subject: Subject) -> Iterator[Finding]:
    """All about the key store."""
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
    # -P: no module of the directory that somebody happens to stand in.
    command = [sys.executable, "-P", "-m", "stationkey.doctor.probe"]
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
        f"no resource manager is between the daemon and the TPM ({way.tcti}): no other program can use it meanwhile, so "
        "no TLS service can use an active key",
        _MANAGER_ADVICE,
    )


def _in_use(subject: Subject, way: Way) -> Finding | None:
    """What is said where the running daemon has a TPM that takes one program at a time; None where it may be asked."""
    if way.is_managed or not subject.daemon.running:
        return None
    name = "tpm.reachable"
    if way.name in {"swtpm", "mssim"} and way.port:
        if not connections_to(way.port) and way.host in {"localhost", "127.0.0.1", "::1"}:
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


def keys_to_try(subject: Subject, way: Way) -> tuple[dict[str, str], dict[str, str]]:
    """The active keys, wrapped, in base64; and what each is for. Empty where the ledger cannot be read."""
    if not may_try_keys(subject.settings.tpm, way, daemon_running=subject.daemon.running):
        return {}, {}
    wrapped, purposes = dict[str, str](), dict[str, str]()
    try:
        with open_for_reading(subject) as ledger:
            for key in ledger.usable():
                reference = ledger.key_ref(key.key_id) if key.state == "active" else None
                if reference is not None and reference.scheme == "tpm2" and len(wrapped) < _MAX_KEYS:
                    wrapped[key.key_id] = base64.b64encode(reference.private).decode("ascii")
                    purposes[key.key_id] = f"{key.certificate_type} {key.evse_id or ''}".strip()
    except (StationKeyError, CannotLookError, OSError):
        return {}, {}  # the check of the ledger says why
    return wrapped, purposes


_MAX_KEYS: Final = 16


def may_try_keys(tpm: TpmTerms, way: Way, *, daemon_running: bool) -> bool:
    """Whether keys may be loaded, to see whether the TPM takes them.

    Not where that would send the storage root key's authorisation value over the bus in the clear; nor where it might
    take the last slot from a daemon at work.
    """
    return tpm.srk_auth is None and (way.is_managed or not daemon_running)


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
            return failure(name, f"the TPM at {way.tcti} was lost while it was asked ({code:#x})", "is it there still?")
        return ok(name, f"the TPM at {way.tcti} answers")
    if probe.hung:
        advice = "reset the TPM (a chip: switch the station off and on); then see dmesg | grep -i tpm"
        if others:
            advice = "end that program, or put a resource manager in between: " + _MANAGER_ADVICE
        return failure(name, f"the TPM at {way.tcti} does not answer within {PATIENCE:g} s{who}", advice)
    if "device" in probe.errors:
        return _judge_opening(way, probe.errors["device"], who)
    if "open" in probe.errors:
        code = probe.errors["open"]
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
            f"end it, or have both go through a resource manager: {_MANAGER_ADVICE}",
        )
    return failure(name, f"{way.path} cannot be opened ({words}){who}", _reach_advice(way))


def judge_started(seen: Seen) -> Iterator[Finding]:
    """Whether TPM2_Startup was sent."""
    name = "tpm.started"
    if seen.probe.errors.get("properties") == RC_INITIALIZE:
        yield warning(
            name,
            "the TPM waits for TPM2_Startup, which the firmware sends at power-on; the daemon sends it when it opens the TPM",
            "start the daemon. Where this comes again, the TPM is reset while the station runs: look at its supply",
        )
    else:
        seen.probe.get("properties")
        yield ok(name, "the TPM is started")


def judge_self_test(seen: Seen) -> Iterator[Finding]:
    """TPM2_GetTestResult, which works in failure mode too [TPM 2.0 part 3, 10.4]."""
    name = "tpm.self_test"
    if RC_FAILURE in {*seen.probe.errors.values(), seen.probe.values.get("test_result")}:
        yield failure(
            name,
            "the TPM is in failure mode: it failed its self-test, and does nothing any more",
            "switch the station off and on again. If it stays so, the TPM is broken: exchange it, and ask for new "
            "certificates (docs/operations.md)",
        )
        return
    code = seen.probe.get("test_result")
    if code in {0, RC_NEEDS_TEST, RC_TESTING}:
        yield ok(name, "the TPM passes its self-test" if code == 0 else "the TPM has not finished its self-test yet")
    else:
        yield failure(name, f"the TPM reports the self-test result {code:#x}", "switch the station off and on again")


def judge_version(seen: Seen) -> Iterator[Finding]:
    """Family and revision of the specification."""
    name = "tpm.version"
    family, revision = seen.probe.properties(PT_FAMILY, PT_REVISION)
    text = text_of(family)
    if text != "2.0":
        yield failure(name, f"this is a TPM {text}", "stationkey needs a TPM 2.0")
    else:
        yield ok(name, f"TPM 2.0, revision {revision // 100}.{revision % 100:02d} of the specification")


def text_of(*words: int) -> str:
    """Properties that are text, four characters each."""
    octets = b"".join(word.to_bytes(4, "big") for word in words).rstrip(b"\0")
    return "".join(chr(octet) if 0x20 <= octet < 0x7F else "?" for octet in octets).strip()  # noqa: PLR2004 - ASCII


@dataclass(frozen=True, slots=True, kw_only=True)
class Weakness:
    """Firmware that is known to be weak.

    Attributes:
        manufacturer: as the TPM gives it.
        versions: from and to, both included.
        name: of the weakness.
        means: what follows from it here.
    """

    manufacturer: str
    versions: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    name: str
    means: str


WEAKNESSES: Final = (
    Weakness(
        manufacturer="IFX",
        # Infineon and Microsoft, ADV170012; the ranges that both give.
        versions=(
            ((4, 0), (4, 33)),
            ((4, 40), (4, 42)),
            ((5, 0), (5, 61)),
            ((6, 0), (6, 42)),
            ((7, 0), (7, 61)),
            ((133, 0), (133, 32)),
        ),
        name="CVE-2017-15361, ROCA",
        means="RSA keys that it makes can be computed from the public key; elliptic-curve keys are not affected",
    ),
    Weakness(
        manufacturer="STM",
        # STMicroelectronics' own table, "TPM firmware update - ECDSA signature generation".
        versions=tuple(
            ((major, minor), (major, minor))
            for major, minors in ((71, (0, 4, 12)), (73, (0, 4, 5, 8, 9)), (74, (0, 4, 5, 8, 9, 16)))
            for minor in minors
        ),
        name="CVE-2019-16863, TPM-Fail",
        means="its ECDSA keys can be computed from the time that many signatures take",
    ),
)
"""Only what the maker itself, or an advisory that it has a part in, has published."""


def judge_firmware(seen: Seen) -> Iterator[Finding]:
    """Maker and firmware, and whether that is known to be weak."""
    name = "tpm.firmware"
    maker, *vendor, first, second = seen.probe.properties(PT_MANUFACTURER, *PT_VENDOR, *PT_FIRMWARE)
    version = (first >> 16, first & 0xFFFF)
    what = f"{text_of(maker)} {text_of(*vendor)}, firmware {version[0]}.{version[1]}.{second >> 16}.{second & 0xFFFF}"
    for weakness in WEAKNESSES:
        if text_of(maker) == weakness.manufacturer and any(low <= version <= high for low, high in weakness.versions):
            yield failure(
                name,
                f"{what}: known to be weak ({weakness.name}): {weakness.means}",
                "get the firmware update from the maker of the board; then have new keys made, and the certificates of "
                "the old ones revoked",
            )
            return
    yield ok(name, what)


def judge_simulated(seen: Seen) -> Iterator[Finding]:
    """Whether it is a program and no chip."""
    name = "tpm.simulated"
    maker, *vendor = seen.probe.properties(PT_MANUFACTURER, *PT_VENDOR)
    software = text_of(maker) == "IBM" and text_of(*vendor).startswith("SW")
    if software or seen.way.is_simulator:
        yield warning(
            name,
            "this TPM is simulated: its keys are in a file, for whoever can read that",
            'for trying only; on a station, keystore = "tpm2:device:/dev/tpmrm0"',
        )
    else:
        yield ok(name, "nothing says that this TPM is simulated")


def missing_for(algorithm: Algorithm, seen: Seen) -> str:
    """What the TPM lacks for an algorithm, in words; empty where it lacks nothing."""
    profile = ALGORITHMS[algorithm]
    algorithms, curves, sizes = (set(seen.probe.get(part)) for part in ("algorithms", "curves", "rsa"))
    if HASHES[profile.hash_name] not in algorithms:
        return profile.hash_name.upper().replace("SHA", "SHA-")
    lacking = []
    for kind in profile.key_types:
        if isinstance(kind, EllipticCurve):
            here, scheme = CURVES[kind] in curves, ALG_ECDSA
        else:
            here, scheme = kind.bits in sizes, ALG_RSASSA
        if here and scheme in algorithms:
            return ""
        lacking.append(str(kind) if not here else "ECDSA" if scheme == ALG_ECDSA else "RSASSA")
    return " and ".join(lacking)


def judge_algorithms(seen: Seen) -> Iterator[Finding]:
    """Curves, hashes and sizes."""
    name = "tpm.algorithms"
    lacking = {algorithm: missing for algorithm in Algorithm if (missing := missing_for(algorithm, seen))}
    storage = [
        words
        for words, known, number in (
            ("elliptic curves", seen.probe.get("algorithms"), ALG_ECC),
            ("AES", seen.probe.get("algorithms"), ALG_AES),
            ("CFB", seen.probe.get("algorithms"), ALG_CFB),
            ("secp256r1", seen.probe.get("curves"), CURVES[SECP256R1]),
        )
        if number not in known
    ]
    if storage:
        yield failure(
            name,
            f"this TPM has no {listed(storage)}, and so can have no storage root key of the kind that is wanted",
            "stationkey needs an ECC P-256 storage root key; another TPM is needed",
        )
    elif lacking:
        words = listed(f"{algorithm} (no {missing})" for algorithm, missing in lacking.items())
        yield ok(name, f"of the algorithms of the contract this TPM lacks {words}: requests for it are rejected")
    else:
        yield ok(name, f"this TPM has all of {listed(Algorithm)}")


def judge_certificate_types(seen: Seen) -> Iterator[Finding]:
    """Which of the certificates that are served can be had with this TPM."""
    name, policy, found, any_works = "tpm.certificate_types", seen.settings.policy, list[Finding](), False
    for certificate_type in policy.certificate_types:
        profile = PROFILES[certificate_type]
        allowed = [one for one in policy.algorithms if profile.required_algorithm in {None, one}]
        works = [algorithm for algorithm in allowed if not missing_for(algorithm, seen)]
        wanted = profile.required_algorithm or profile.preferred_algorithm
        any_works = any_works or bool(works)
        if not works:
            lacks = (
                listed(sorted({missing_for(algorithm, seen) for algorithm in allowed})) or "an algorithm to be served"
            )
            found.append(
                warning(
                    name,
                    f"{certificate_type} cannot be had: the TPM lacks {lacks}, and requests for it are rejected",
                    f"if the station needs it, it takes another TPM; else take {certificate_type} out of [policy] "
                    "certificate_types",
                )
            )
        elif wanted is not None and wanted not in works:
            found.append(
                warning(
                    name,
                    f"{certificate_type} works with {listed(works)} only, and its profile wants {wanted}",
                    f"see whether the CA takes it; for {wanted} the station takes another TPM",
                )
            )
        else:
            found.append(ok(name, f"{certificate_type} works, with {listed(works)}"))
    if not any_works:
        yield failure(
            name, "none of the certificate types that are served can be had with this TPM", "another TPM is needed"
        )
    yield from found


def judge_hierarchies(seen: Seen) -> Iterator[Finding]:
    """Whether the hierarchies are switched on."""
    name = "tpm.hierarchies"
    (flags,) = seen.probe.properties(PT_STARTUP_CLEAR)
    if not flags & STORAGE_ENABLED:
        yield failure(
            name,
            "the storage hierarchy is switched off: no key under it can be used",
            "look for it in the firmware's set-up, or at what runs tpm2_hierarchycontrol; it comes back with a reset",
        )
    elif not flags & ENDORSEMENT_ENABLED:
        yield warning(
            name,
            "the endorsement hierarchy is switched off: there can be no attestation",
            "look at what runs tpm2_hierarchycontrol",
        )
    else:
        yield ok(name, "the storage and the endorsement hierarchy are switched on")


def judge_srk(seen: Seen) -> Iterator[Finding]:
    """The storage root key, or whether one could be made."""
    name, handle = "tpm.srk", seen.tpm.srk_handle
    there = seen.probe.get("srk")
    permanent, avail = seen.probe.properties(PT_PERMANENT, PT_PERSISTENT_AVAIL)
    if there is None:
        if seen.keys:
            yield failure(
                name,
                f"there is no storage root key at {handle:#x}, and there are active keys: the TPM was cleared or exchanged",
                "nothing brings the keys back: have new certificates asked for (docs/operations.md, Another TPM)",
            )
        elif permanent & OWNER_AUTH_SET and seen.tpm.owner_auth is None:
            yield failure(
                name,
                f"there is no storage root key at {handle:#x}, and none can be made: the owner hierarchy has a password",
                "name it by [tpm] owner_auth, or make the key once: tpm2_createprimary -C o -P PASSWORD -G ecc256:aes128cfb "
                f"-c srk.ctx, tpm2_evictcontrol -C o -P PASSWORD -c srk.ctx {handle:#x}",
            )
        elif avail == 0:
            yield failure(
                name,
                f"there is no storage root key at {handle:#x}, and no room for a persistent key",
                "see tpm2_getcap handles-persistent, and remove what is not needed: tpm2_evictcontrol -C o -c HANDLE",
            )
        else:
            yield ok(name, f"there is no storage root key at {handle:#x} yet; the daemon makes it at its first start")
        return
    wrong = srk_differs(there)
    if wrong:
        yield failure(
            name,
            f"the TPM holds {wrong} at {handle:#x}, where an ECC P-256 storage root key should be",
            f"if nothing else needs it: tpm2_evictcontrol -C o -c {handle:#x}; else [tpm] srk_handle = another one",
        )
    elif not there["attributes"] & NODA:
        yield warning(
            name,
            f"the storage root key at {handle:#x} lacks noda: losses of power can lock it for a while",
            "before there are keys: remove it (tpm2_evictcontrol), and the daemon makes a better one. Afterwards it must stay",
        )
    else:
        yield ok(name, f"the storage root key at {handle:#x} is as it should be")


def srk_differs(there: Mapping[str, int]) -> str:
    """What is at the handle of the storage root key, in words, where that is none; else an empty text."""
    if there["type"] != ALG_ECC:
        return f"a key of type {'RSA' if there['type'] == ALG_RSA else hex(there['type'])}"
    if there.get("curve") != CURVES[SECP256R1]:
        return f"a key on the curve {there.get('curve', 0):#x}"
    if there["attributes"] & SRK_NEEDED != SRK_NEEDED:
        return "a signing key" if there["attributes"] & _SIGN else f"a key with the attributes {there['attributes']:#x}"
    return ""


def judge_authorisation(seen: Seen) -> Iterator[Finding]:
    """Which hierarchies have a password, and whether the settings know."""
    name, tpm = "tpm.authorisation", seen.tpm
    (flags,) = seen.probe.properties(PT_PERMANENT)
    known = (
        ("owner", OWNER_AUTH_SET, tpm.owner_auth is not None),
        ("endorsement", ENDORSEMENT_AUTH_SET, tpm.endorsement_auth is not None),
        ("lockout", LOCKOUT_AUTH_SET, None),
    )
    have = [which for which, bit, _ in known if flags & bit]
    lack = [which for which, bit, _ in known if not flags & bit]
    for which, bit, named in known[:2]:
        if named and not flags & bit:
            yield warning(
                name,
                f"[tpm] {which}_auth names a password, and the {which} hierarchy has none: the TPM was cleared, perhaps",
                f"set it (tpm2_changeauth -c {which} PASSWORD), or take {which}_auth out",
            )
    if flags & ENDORSEMENT_AUTH_SET and tpm.endorsement_auth is None:
        yield warning(
            name,
            "the endorsement hierarchy has a password, and no setting names it: stationkey attest cannot use it",
            "name it by [tpm] endorsement_auth, if attestation is wanted",
        )
    clears = "" if flags & (LOCKOUT_AUTH_SET | DISABLE_CLEAR) else "; whoever may open the TPM may clear it"
    told = [f"{listed(have)}: with a password"] if have else []
    told += [f"{listed(lack)}: with none"] if lack else []
    yield ok(name, f"{'; '.join(told)}{clears}")


def judge_lockout(seen: Seen) -> Iterator[Finding]:
    """The protection against guessing [TPM 2.0 part 1, 19.8]."""
    name = "tpm.lockout"
    flags, tries, most, interval, recovery = seen.probe.properties(
        PT_PERMANENT, PT_LOCKOUT_COUNTER, PT_MAX_AUTH_FAIL, PT_LOCKOUT_INTERVAL, PT_LOCKOUT_RECOVERY
    )
    reset = "tpm2_dictionarylockout --clear-lockout" + (" -p PASSWORD" if flags & LOCKOUT_AUTH_SET else "")
    there = seen.probe.values.get("srk")
    if flags & IN_LOCKOUT or (most and tries >= most):
        locked = there is not None and not there["attributes"] & NODA
        means = (
            "the storage root key is locked with it, so no request is served"
            if locked
            else "stationkey's own keys are exempt (noda); every other key with a password is locked"
        )
        yield failure(
            name,
            f"the TPM is in lockout after {tries} wrong authorisations or losses of power ({most} are allowed): {means}",
            f"find out who gave wrong passwords; then {reset}. By itself it ends one try each {interval} s"
            + ("" if interval else ", which here is never"),
        )
    elif most == 0:
        yield warning(
            name,
            "the TPM allows no wrong authorisation at all: keys without noda are always locked",
            "tpm2_dictionarylockout --setup-parameters --max-tries=32 --recovery-time=600 --lockout-recovery-time=86400",
        )
    elif tries:
        yield warning(
            name,
            f"{tries} of {most} wrong authorisations or losses of power are used up; at {most} the TPM locks",
            f"who gives wrong passwords? One is forgotten each {interval} s; or {reset}",
        )
    else:
        yield ok(
            name, f"not in lockout, 0 of {most} tries used (one is forgotten each {interval} s, lockout {recovery} s)"
        )


def judge_slots(seen: Seen) -> Iterator[Finding]:
    """Room for keys. Through a resource manager everybody has room, and sees none of the others."""
    name = "tpm.slots"
    (avail,) = seen.probe.properties(PT_TRANSIENT_AVAIL)
    strays = seen.probe.get("transient")
    tried = seen.probe.values.get("keys", {}).values()
    if seen.way.is_managed:
        yield ok(name, "the resource manager makes room where it is needed")
    elif seen.daemon_running:
        yield ok(name, f"{avail} slots are free beside what the running daemon has loaded")
    elif strays and (avail < 2 or RC_OBJECT_MEMORY in tried):  # noqa: PLR2004 - one key, and its parent while it is used
        yield warning(
            name,
            f"the TPM's slots are full: {len(strays)} objects of programs that are gone are loaded, {avail} slots are free",
            "the daemon unloads them when it opens the TPM. Other programs cannot use the TPM until then: tpm2_flushcontext "
            "-t, or a resource manager",
        )
    elif strays:
        yield warning(
            name,
            f"{len(strays)} objects of programs that are gone are loaded in the TPM, {avail} slots are free",
            "the daemon unloads them when it opens the TPM; tpm2_flushcontext -t does, too",
        )
    elif avail < 2:  # noqa: PLR2004 - as above
        yield failure(
            name,
            f"the TPM has {avail} free slots, and two are needed",
            "another program holds keys: a resource manager is needed, " + _MANAGER_ADVICE,
        )
    else:
        yield ok(name, f"{avail} slots are free")


def judge_sessions(seen: Seen) -> Iterator[Finding]:
    """Room for sessions, which only `[tpm] session` needs, and policies."""
    name = "tpm.sessions"
    loaded, active = seen.probe.properties(PT_LOADED_SESSIONS_AVAIL, PT_ACTIVE_SESSIONS_AVAIL)
    needed = seen.tpm.session != "none" or bool(seen.tpm.pcrs)
    if (loaded == 0 and not seen.way.is_managed) or active == 0:
        words = "no session can be begun in the TPM: programs that are gone have left theirs"
        advice = "tpm2_flushcontext -l (loaded) and -s (saved)"
        yield failure(name, words, advice) if needed else warning(name, words, advice)
    elif not seen.way.is_managed and (strays := seen.probe.get("loaded_sessions")):
        yield warning(
            name,
            f"{len(strays)} sessions of programs that are gone are in the TPM, {loaded} more can be loaded",
            "tpm2_flushcontext -l",
        )
    else:
        yield ok(name, f"{active} sessions can be begun")


def judge_pcrs(seen: Seen) -> Iterator[Finding]:
    """The registers that new keys are bound to."""
    name, tpm = "tpm.pcrs", seen.tpm
    if not tpm.pcrs:
        yield ok(name, "no key is bound to platform configuration registers")
        return
    there = seen.probe.get("banks").get(str(HASHES[tpm.pcr_bank]), [])
    missing = [number for number in tpm.pcrs if number not in there]
    if missing:
        yield failure(
            name,
            f"the TPM's {tpm.pcr_bank} bank has no register {listed(missing)}",
            "tpm2_pcrallocate, or the firmware's set-up, switches banks on; or set another [tpm] pcr_bank",
        )
    else:
        yield warning(
            name,
            f"keys are bound to the registers {listed(tpm.pcrs)} ({tpm.pcr_bank}): after an update of firmware, boot loader "
            "or kernel they may be of no use",
            "have new certificates asked for after each such update; no service can use these keys through OpenSSL",
        )


def judge_attestation_key(seen: Seen) -> Iterator[Finding]:
    """The provisioned attestation key, where one is named."""
    name, handle = "tpm.attestation_key", seen.tpm.ak_handle
    if handle is None:
        yield ok(name, "the attestation key is derived from the endorsement seed when it is used")
        return
    there = seen.probe.get("ak")
    if there is None:
        yield failure(
            name, f"there is nothing at [tpm] ak_handle {handle:#x}", "is it the right handle? Was the TPM cleared?"
        )
    elif there["attributes"] & (_RESTRICTED | _SIGN) != _RESTRICTED | _SIGN:
        yield failure(
            name,
            f"the key at [tpm] ak_handle {handle:#x} is no restricted signing key",
            "name the handle of one that is",
        )
    else:
        yield ok(name, f"there is a restricted signing key at {handle:#x}")


def judge_shutdown(seen: Seen) -> Iterator[Finding]:
    """Whether the TPM was told of the last shutdown [TPM 2.0 part 2, 8.7]."""
    name = "tpm.shutdown"
    (flags,) = seen.probe.properties(PT_STARTUP_CLEAR)
    if flags & ORDERLY:
        yield ok(name, "the TPM was told of the last shutdown")
    else:
        yield ok(
            name, "the TPM was not told of the last shutdown: power was lost, which does no harm to keys with noda"
        )


def judge_keys(seen: Seen) -> Iterator[Finding]:
    """Whether this TPM takes the active keys."""
    name = "tpm.keys"
    if seen.tpm.srk_auth is not None:
        yield not_checked(name, "the storage root key has a password, and the doctor does not send it")
        return
    if not may_try_keys(seen.tpm, seen.way, daemon_running=seen.daemon_running):
        yield not_checked(name, "the running daemon has the TPM to itself; its log names the keys that cannot be used")
        return
    if not seen.keys:
        yield ok(name, "no active key of a TPM is on record")
        return
    if seen.probe.values.get("srk", 0) is None:
        yield failure(
            name,
            f"{len(seen.keys)} active keys cannot be used: their storage root key is gone",
            "have new certificates asked for (docs/operations.md, Another TPM)",
        )
        return
    tried: dict[str, int] = seen.probe.get("keys")
    bad = {key: code for key, code in tried.items() if code}
    foreign = [key for key, code in bad.items() if code & 0xFFFF == RC_INTEGRITY]
    for key, code in bad.items():
        if key in foreign:
            yield failure(
                name,
                f"the active key {key} ({seen.keys[key]}) was made by another TPM, or before this one was cleared",
                "have a new certificate asked for (docs/operations.md, Another TPM)",
            )
        elif code & 0xFFFF == RC_OBJECT_MEMORY:
            yield not_checked(name, f"the TPM has no free slot to load {key} into")
        else:
            yield failure(
                name,
                f"the TPM does not take the active key {key} ({seen.keys[key]})"
                + (": its record is damaged" if code < 0 else f" ({code:#x})"),
                "restore a backup of the state directory, or have a new certificate asked for",
            )
    if not bad:
        yield ok(name, f"the TPM takes {'the active key' if len(tried) == 1 else f'all {len(tried)} active keys'}")


JUDGES: Final[Mapping[str, Callable[[Seen], Iterator[Finding]]]] = MappingProxyType(
    {
        "tpm.started": judge_started,
        "tpm.self_test": judge_self_test,
        "tpm.version": judge_version,
        "tpm.firmware": judge_firmware,
        "tpm.simulated": judge_simulated,
        "tpm.algorithms": judge_algorithms,
        "tpm.certificate_types": judge_certificate_types,
        "tpm.hierarchies": judge_hierarchies,
        "tpm.srk": judge_srk,
        "tpm.authorisation": judge_authorisation,
        "tpm.lockout": judge_lockout,
        "tpm.slots": judge_slots,
        "tpm.sessions": judge_sessions,
        "tpm.pcrs": judge_pcrs,
        "tpm.attestation_key": judge_attestation_key,
        "tpm.shutdown": judge_shutdown,
        "tpm.keys": judge_keys,
    }
)
