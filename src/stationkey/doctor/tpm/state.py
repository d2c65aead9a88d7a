"""What a TPM is, what it can do and how it is, by its own answers; and whether it takes the keys on record."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sized
from typing import Any, Final

from stationkey.contract.profiles import Algorithm
from stationkey.doctor.abilities import judge_types
from stationkey.doctor.host.context import Context
from stationkey.doctor.report import Finding, failure, listed, ok, unknown, warning
from stationkey.doctor.runner import Check
from stationkey.doctor.tpm import facts
from stationkey.doctor.tpm.facts import HASHES, Seen, ask_tpm, text_of
from stationkey.keystore.tpm2 import return_codes as rc

_WANTED: Final = 2
"""Slots: for a key, and for its parent while that is used."""
_NEW_CERTIFICATES: Final = "request new certificates (/usr/share/doc/stationkey/docs/operations.md, Another TPM)"


WAY_OUT: Final = (
    'have its keys in a secure element: [keystores] se = "pkcs11:…" and [keystore_for] TYPE = "se" '
    "(/usr/share/doc/stationkey/docs/pkcs11.md)"
)
_WEAKNESSES: Final = {
    "IFX": (
        "CVE-2017-15361, ROCA",
        "RSA keys that it makes can be computed from the public key; elliptic-curve keys are not affected",
        # Infineon and Microsoft, ADV170012; the ranges that both give.
        "4.0-4.33 4.40-4.42 5.0-5.61 6.0-6.42 7.0-7.61 133.0-133.32",
    ),
    "STM": (
        "CVE-2019-16863, TPM-Fail",
        "its ECDSA keys can be computed from the time that many signatures take",
        # STMicroelectronics' own table, "TPM firmware update - ECDSA signature generation".
        "71.0 71.4 71.12 73.0 73.4-73.5 73.8-73.9 74.0 74.4-74.5 74.8-74.9 74.16",
    ),
}
"""Of each maker: a weakness of its firmware, what follows from it here, and the versions that have it.

Only what the maker itself, or an advisory that it has a part in, has published.
"""


_NOT_READ: Final = "P-256; its data sheet was not read for more"
_MODELS: Final = {
    ("SLB9670", "SLM9670"): "P-256; no P-384, no P-521, no SHA-512",
    ("SLB9672", "SLB9673"): "P-256 and P-384; no P-521, no SHA-512",
    ("ST33TPHF20",): "P-256; no P-384, no P-521; SHA-512 not found",
    ("ST33GTPMI",): "P-256; P-384 not named; P-521 and SHA-512 not found",
    ("ST33HTPHAHD4",): "P-256 and P-384; P-521 and SHA-512 not found",
    ("NPCT7", "ST33KTPM2X"): _NOT_READ,
    ("SW",): "P-256, P-384 and SHA-512; P-521 by an option of its build",
}
"""What is in the data sheets, by the beginning of the vendor strings; SW is that of simulators."""
_TIMES: Final = "a P-256 key 136 ms, a signature 25 to 190 ms, an RSA-2048 key 1.6 to 7.5 s"
"""Of chips, published with wolfTPM."""


def _judge_model(_: Seen, maker: int, *vendor: int) -> Finding:
    """Tell what is known of its model; what counts is what the TPM itself tells, which other checks ask."""
    model = text_of(*vendor).replace(" ", "")
    known = next((has for names, has in _MODELS.items() if model.startswith(names)), "no data sheet is known here")
    return ok(f"{text_of(maker)} {model}, from data sheets, not measured: {known}. Chips take, as published: {_TIMES}")


def _judge_started(seen: Seen) -> Finding:
    if seen.errors.get("properties") == rc.INITIALIZE:
        told = "the TPM waits for TPM2_Startup, which the firmware sends at power-on; the daemon sends it"
        advice = "start the daemon. If this happens again, the TPM is reset while the station runs: check its supply"
        return warning("not_started", told, advice)
    why = seen.lacks("properties")
    return unknown(why) if why else ok("the TPM is started")


def _judge_self_test(seen: Seen) -> Finding:
    """Judge TPM2_GetTestResult, which works in failure mode too [TPM 2.0 part 3, 10.4]."""
    code = seen.values.get("test_result")
    if facts.FAILURE_MODE in {*seen.errors.values(), code}:
        advice = "switch the station off and on. If it stays so, replace the TPM, and " + _NEW_CERTIFICATES
        return failure("failure_mode", "the TPM is in failure mode: it failed its self-test", advice)
    if code is None:
        return unknown(seen.lacks("test_result"))
    if code in {0, facts.NEEDS_TEST, rc.TESTING}:
        return ok("the TPM passes its self-test" if code == 0 else "the TPM has not finished its self-test yet")
    return failure("test_result", f"the TPM reports the self-test result {code:#x}", "switch the station off and on")


def _judge_version(_: Seen, family: int, revision: int) -> Finding:
    if (text := text_of(family)) != "2.0":
        return failure("not_tpm_2", f"this is a TPM {text}", "stationkey needs a TPM 2.0")
    return ok(f"TPM 2.0, revision {revision // 100}.{revision % 100:02d} of the specification")


def _judge_firmware(_: Seen, maker: int, *numbers: int) -> Finding:
    *vendor, first, second = numbers
    version = (first >> 16, first & 0xFFFF)
    what = f"{text_of(maker)} {text_of(*vendor)}, firmware {version[0]}.{version[1]}.{second >> 16}.{second & 0xFFFF}"
    name, means, versions = _WEAKNESSES.get(text_of(maker), ("", "", ""))
    if _in_ranges(version, versions):
        told = f"{what}: known to be weak ({name}): {means}"
        advice = "get the update from the maker of the board; then make new keys, and revoke the old certificates"
        return failure("weak", told, advice)
    return ok(what)


def _in_ranges(version: tuple[int, ...], ranges: str) -> bool:
    for low, _, high in (one.partition("-") for one in ranges.split()):
        begin, end = (tuple(map(int, bound.split("."))) for bound in (low, high or low))
        if begin <= version <= end:
            return True
    return False


def _judge_simulated(seen: Seen, maker: int, *vendor: int) -> Finding:
    if seen.way.is_simulator or (text_of(maker) == "IBM" and text_of(*vendor).startswith("SW")):
        told = "this TPM is simulated: anyone who can read its file has its keys"
        return warning("simulated", told, 'for trying only; on a station, keystore = "tpm2:device:/dev/tpmrm0"')
    return ok("nothing says that this TPM is simulated")


def _judge_certificate_types(
    seen: Seen, algorithms: Collection[int], curves: Collection[int], missing: Mapping[Algorithm, str]
) -> Iterator[Finding]:
    needed = {"elliptic curves": facts.ALG_ECC, "AES": facts.ALG_AES, "CFB": facts.ALG_CFB}
    storage = [words for words, number in needed.items() if number not in algorithms]
    storage += [] if facts.P256 in curves else ["secp256r1"]
    if storage:
        told = f"this TPM lacks {listed(storage)}, and so cannot have the storage root key"
        yield failure("no_storage", told, "another TPM is needed")
    yield from judge_types(seen.types, seen.settings.policy, missing, WAY_OUT)


def _judge_hierarchies(_: Seen, flags: int) -> Finding:
    advice = "look in the firmware's set-up, or at what runs tpm2_hierarchycontrol; a reset enables it"
    if not flags & facts.STORAGE_ENABLED:
        return failure("no_storage", "the storage hierarchy is disabled: no key under it can be used", advice)
    if not flags & facts.ENDORSEMENT_ENABLED:
        return warning("no_endorsement", "the endorsement hierarchy is disabled: no attestation", advice)
    return ok("the storage and the endorsement hierarchy are enabled")


def _judge_srk(seen: Seen, there: Mapping[str, Any] | None, permanent: int, available: int) -> Finding:
    """Judge the storage root key, or whether one could be made. To remove one ends the keys below it."""
    handle = f"{seen.tpm.srk_handle:#x}"
    password = " -P PASSWORD" if permanent & facts.OWNER_AUTH_SET else ""
    evict = f"tpm2_evictcontrol -C o{password} -c"
    missing = f"there is no storage root key at {handle}"
    if there is None and seen.keys:
        told = f"{missing}, and there are active keys: the TPM was cleared or replaced"
        return failure("cleared", told, _NEW_CERTIFICATES)
    if there is None and password and seen.tpm.owner_auth is None:
        create = f"tpm2_createprimary -C o{password} -G ecc256:aes128cfb -c srk.ctx, {evict} srk.ctx {handle}"
        told = f"{missing}, and none can be made: the owner hierarchy has a password"
        return failure("owner_auth", told, f"name it by [tpm] owner_auth, or make the key once: {create}")
    if there is None and available == 0:
        advice = f"remove what nothing needs: tpm2_getcap handles-persistent, {evict} HANDLE"
        return failure("no_room", f"{missing}, and no room for a persistent key", advice)
    if there is None:
        return ok(f"{missing} yet; the daemon makes it at its first start")
    if wrong := there["unlike_srk"]:
        told = f"the TPM holds {wrong} at {handle}, not an ECC P-256 storage root key"
        advice = f"[tpm] srk_handle = another one; or, if nothing needs it: {evict} {handle}"
        return failure("another_key", told, advice)
    remove = "; or, if nothing else needs this key, remove it, and the daemon makes one: "
    remove = "" if seen.keys else f"{remove}{evict} {handle}"
    if seen.values.get("srk_open") is False:
        told = f"the storage root key at {handle} has a password, and no option names it: no key can be made"
        return failure("srk_auth", told, f"name it by [tpm] srk_auth{remove}")
    if not there["attributes"] & facts.NODA:
        told = f"the storage root key at {handle} lacks noda: losses of power can lock it for a while"
        return warning("no_noda", told, f"shut the station down in order{remove}")
    return ok(f"the storage root key at {handle} is as it should be")


def _judge_authorisation(seen: Seen, flags: int) -> Iterator[Finding]:
    tpm = seen.tpm
    bits = {"owner": facts.OWNER_AUTH_SET, "endorsement": facts.ENDORSEMENT_AUTH_SET, "lockout": facts.LOCKOUT_AUTH_SET}
    for which, named in (("owner", tpm.owner_auth), ("endorsement", tpm.endorsement_auth)):
        if named and not flags & bits[which]:
            told = f"[tpm] {which}_auth names a password, and the {which} hierarchy has none: was the TPM cleared?"
            yield warning("not_set", told, f"tpm2_changeauth -c {which} PASSWORD, or remove {which}_auth")
    if flags & facts.ENDORSEMENT_AUTH_SET and tpm.endorsement_auth is None:
        told = "the endorsement hierarchy has a password that no option names: stationkey attest cannot use it"
        yield warning("not_named", told, "name it by [tpm] endorsement_auth, if attestation is wanted")
    if seen.errors.get("owner_auth", 0) & 0xFFFF in rc.WRONG_AUTH:
        told = "[tpm] owner_auth names a wrong password: no storage root key can be made"
        yield failure("wrong", told, "put the right one there; who changed it?")
    if not flags & (facts.LOCKOUT_AUTH_SET | facts.DISABLE_CLEAR):
        told = "the lockout hierarchy has no password: any user of the TPM can clear it, which ends every key"
        yield warning("clear_open", told, "give it one, kept off the station: tpm2_changeauth -c lockout file:-")
    yield ok("; ".join(f"{which}: {'with a' if flags & bit else 'no'} password" for which, bit in bits.items()))


def _judge_lockout(seen: Seen, flags: int, tries: int, most: int, interval: int, recovery: int) -> Finding:
    """Judge the protection against dictionary attacks [TPM 2.0 part 1, 19.8]."""
    command = f"tpm2_dictionarylockout{' -p PASSWORD' if flags & facts.LOCKOUT_AUTH_SET else ''}"
    usual = f"{command} --setup-parameters --max-tries=32 --recovery-time=600 --lockout-recovery-time=86400"
    advice = f"find out who gives wrong passwords. One is forgotten each {interval} s; or {command} --clear-lockout"
    there = seen.values.get("srk")
    if most and not interval:  # a recovery time of 0 disables the protection [TPM 2.0 part 3, 25.3.1]
        return warning("disabled", "no protection against dictionary attacks (recovery time 0)", usual)
    if flags & facts.IN_LOCKOUT or (most and tries >= most):
        exempt = there is None or there["attributes"] & facts.NODA
        means = "stationkey's own keys are exempt" if exempt else "the storage root key too: no request is served"
        told = f"the TPM is in lockout after {tries} of {most} wrong authorisations or losses of power; {means}"
        return failure("locked" if exempt else "locked_srk", told, advice)
    if most == 0:
        return warning("no_try", "the TPM allows no wrong authorisation: keys without noda are always locked", usual)
    if tries:
        told = f"{tries} of {most} wrong authorisations or losses of power are used up; at {most} the TPM locks"
        return warning("tries", told, advice)
    return ok(f"not in lockout, 0 of {most} tries used (one is forgotten each {interval} s, lockout {recovery} s)")


def _judge_slots(seen: Seen, transient: Sized, available: int) -> Finding:
    """Judge the room for keys. Through a resource manager everybody has room, and sees none of the others."""
    strays = len(transient)
    refused = rc.OBJECT_MEMORY in seen.values.get("keys", {}).values()
    if seen.way.is_managed:
        return ok("the resource manager makes room where it is needed")
    if seen.daemon_running:
        return ok(f"{available} slots are free beside what the running daemon has loaded")
    if strays:
        told = f"{strays} objects of other programs are loaded in the TPM, {available} slots are free"
        advice = "a program that runs needs a resource manager; what those that are gone left: tpm2_flushcontext -t"
        return warning("full" if available < _WANTED or refused else "strays", told, advice)
    if available < _WANTED:
        told = f"the TPM has {available} free slots, and two are needed: another program holds keys"
        return failure("no_room", told, "a resource manager is needed: " + facts.MANAGER_ADVICE)
    return ok(f"{available} slots are free")


def _judge_sessions(seen: Seen, there: Sized, loaded: int, active: int) -> Finding:
    """Judge the room for sessions, which only `[tpm] session` needs, and policies."""
    strays = 0 if seen.way.is_managed else len(there)
    advice = "if no program uses the TPM: tpm2_flushcontext -l (loaded) and -s (saved)"
    if (loaded == 0 and not seen.way.is_managed) or active == 0:
        told = "no session can be started in the TPM: programs that are gone have left theirs"
        needed = seen.tpm.session != "none" or seen.tpm.pcrs
        return failure("no_room", told, advice) if needed else warning("no_room", told, advice)
    if strays:
        told = f"{strays} sessions of programs that are gone are in the TPM, {loaded} more can be loaded"
        return warning("strays", told, advice)
    return ok(f"{active} sessions can be started")


def _judge_pcrs(seen: Seen, banks: Mapping[str, Collection[int]]) -> Finding:
    tpm = seen.tpm
    if not tpm.pcrs:
        return ok("no key is bound to platform configuration registers")
    there = banks.get(str(HASHES[tpm.pcr_bank]), [])
    if missing := [number for number in tpm.pcrs if number not in there]:
        told = f"the TPM's {tpm.pcr_bank} bank has no register {listed(missing)}"
        return failure("no_register", told, "set another [tpm] pcr_bank, or enable this one in the firmware's set-up")
    told = f"keys are bound to {tpm.pcr_bank} {listed(tpm.pcrs)}: an update of firmware or kernel can end them"
    return warning("bound", told, "request new certificates after each such update")


def _judge_attestation_key(seen: Seen) -> Finding:
    handle = seen.tpm.ak_handle
    if handle is None:
        return ok("the attestation key is derived from the endorsement seed when it is used")
    if why := seen.lacks("ak"):
        return unknown(why)
    there, wanted = seen.values["ak"], facts.RESTRICTED | facts.SIGN
    if there is None or there["attributes"] & wanted != wanted:
        what = "nothing" if there is None else "no restricted signing key"
        told = f"there is {what} at [tpm] ak_handle {handle:#x}"
        return failure("missing", told, "is it the right handle? Was the TPM cleared?")
    return ok(f"there is a restricted signing key at {handle:#x}")


def _judge_keys(seen: Seen) -> Iterator[Finding]:
    if not seen.keys:
        yield ok("no active key of a TPM is on record")
    elif seen.values.get("srk", 0) is None:
        told = f"{len(seen.keys)} active keys cannot be used: their storage root key is gone"
        yield failure("no_srk", told, _NEW_CERTIFICATES)
    elif seen.tpm.srk_auth is not None or seen.values.get("srk_open") is False:
        yield unknown("the storage root key has a password, and the doctor does not send it")
    elif not seen.may_try_keys:
        yield unknown("the running daemon has the TPM to itself; its log names the keys that cannot be used")
    elif why := seen.lacks("keys"):
        yield unknown(why)
    else:
        tried: dict[str, int] = seen.values["keys"]
        yield from (_judge_key(f"{key} ({seen.keys[key]})", code) for key, code in tried.items() if code)
        if not any(tried.values()):
            yield ok(f"the TPM takes {'the active key' if len(tried) == 1 else f'all {len(tried)} active keys'}")


def _judge_key(key: str, code: int) -> Finding:
    if code & 0xFFFF == rc.INTEGRITY:
        told = f"the active key {key} was made by another TPM, or before this one was cleared"
        return failure("another_tpm", told, _NEW_CERTIFICATES)
    if code & 0xFFFF == rc.OBJECT_MEMORY:
        return unknown(f"the TPM has no free slot to load {key} into")
    if code < 0:
        told = f"the record of the active key {key} is damaged"
        return failure("damaged", told, "restore a backup of the state directory, or request a new certificate")
    told = f"the TPM does not take the active key {key} ({code:#x})"
    return failure("refused", told, "request a new certificate")


class _Told:
    """A look at what the TPM told: parts of the probe by name, properties by number."""

    def __init__(self, *wanted: str | int) -> None:
        self.wanted = wanted

    def __call__(self, context: Context) -> tuple[Any, ...] | Finding:
        """Ask the TPM, once for all checks."""
        return context.once(ask_tpm).told(*self.wanted)


_ANSWERS: Final = ("tpm.reachable",)
_TPM: Final = ("tpm",)
"""The section of the configuration file."""
CHECKS: Final = (
    Check("tpm.certificate_types", _Told("algorithms", "curves", "supported"), _judge_certificate_types, _ANSWERS),
    Check("tpm.model", _Told(*facts.PT_MAKER), _judge_model, _ANSWERS),
    Check("tpm.started", _Told(), _judge_started, _ANSWERS),
    Check("tpm.self_test", _Told(), _judge_self_test, _ANSWERS),
    Check("tpm.version", _Told(facts.PT_FAMILY, facts.PT_REVISION), _judge_version, _ANSWERS),
    Check("tpm.firmware", _Told(*facts.PT_MAKER, *facts.PT_FIRMWARE), _judge_firmware, _ANSWERS),
    Check("tpm.simulated", _Told(*facts.PT_MAKER), _judge_simulated, _ANSWERS),
    Check("tpm.hierarchies", _Told(facts.PT_STARTUP_CLEAR), _judge_hierarchies, _ANSWERS),
    Check("tpm.srk", _Told("srk", facts.PT_PERMANENT, facts.PT_PERSISTENT_AVAIL), _judge_srk, _ANSWERS, _TPM),
    Check("tpm.authorisation", _Told(facts.PT_PERMANENT), _judge_authorisation, _ANSWERS, _TPM),
    Check("tpm.lockout", _Told(facts.PT_PERMANENT, *facts.PT_LOCKOUT), _judge_lockout, _ANSWERS),
    Check("tpm.slots", _Told("transient", facts.PT_TRANSIENT_AVAIL), _judge_slots, _ANSWERS),
    Check("tpm.sessions", _Told("loaded_sessions", *facts.PT_SESSIONS_AVAIL), _judge_sessions, _ANSWERS, _TPM),
    Check("tpm.pcrs", _Told("banks"), _judge_pcrs, _ANSWERS, _TPM),
    Check("tpm.attestation_key", _Told(), _judge_attestation_key, _ANSWERS, _TPM),
    Check("tpm.keys", _Told(), _judge_keys, _ANSWERS, _TPM),
)
