"""The state of a TPM: hierarchies, storage root key, lockout, room, and whether it takes the keys on record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from stationkey.contract.profiles import SECP256R1
from stationkey.doctor.report import Verdict, failure, listed, not_checked, ok, warning
from stationkey.doctor.tpm import facts
from stationkey.doctor.tpm.facts import Seen, may_try_keys

_CURVES: Final = MappingProxyType({1: "P-192", 2: "P-224", 4: "P-384", 5: "P-521", 0x20: "SM2"})
"""That a storage root key may be on, by their numbers [TPM 2.0 part 2, 6.4]."""
_WANTED: Final = 2
"""Slots: for a key, and for its parent while that is used."""
_NEW_CERTIFICATES: Final = "request new certificates (docs/operations.md, Another TPM)"


def judge_started(seen: Seen) -> Verdict:
    """Judge whether TPM2_Startup was sent."""
    if seen.probe.errors.get("properties") == facts.RC_INITIALIZE:
        return warning(
            "the TPM waits for TPM2_Startup, which the firmware sends at power-on; the daemon sends it",
            "start the daemon. If this happens again, the TPM is reset while the station runs: check its supply",
        )
    why = seen.probe.lacks("properties")
    return not_checked(why) if why else ok("the TPM is started")


def judge_self_test(seen: Seen) -> Verdict:
    """Judge TPM2_GetTestResult, which works in failure mode too [TPM 2.0 part 3, 10.4]."""
    code = seen.probe.values.get("test_result")
    if facts.RC_FAILURE in {*seen.probe.errors.values(), code}:
        return failure(
            "the TPM is in failure mode: it failed its self-test",
            "switch the station off and on. If it stays so, the TPM is broken: replace it, and " + _NEW_CERTIFICATES,
        )
    if code is None:
        return not_checked(seen.probe.lacks("test_result"))
    if code in {0, facts.RC_NEEDS_TEST, facts.RC_TESTING}:
        return ok("the TPM passes its self-test" if code == 0 else "the TPM has not finished its self-test yet")
    return failure(f"the TPM reports the self-test result {code:#x}", "switch the station off and on")


def judge_hierarchies(seen: Seen) -> Verdict:
    """Judge whether the hierarchies are enabled."""
    (flags,) = seen.probe.numbers(facts.PT_STARTUP_CLEAR)
    advice = "look in the firmware's set-up, or at what runs tpm2_hierarchycontrol; a reset enables it"
    if not flags & facts.STORAGE_ENABLED:
        return failure("the storage hierarchy is disabled: no key under it can be used", advice)
    if not flags & facts.ENDORSEMENT_ENABLED:
        return warning("the endorsement hierarchy is disabled: attestation is not possible", advice)
    return ok("the storage and the endorsement hierarchy are enabled")


def judge_srk(seen: Seen) -> Verdict:
    """Judge the storage root key, or whether one could be made."""
    there, handle = seen.probe.values["srk"], f"{seen.tpm.srk_handle:#x}"
    permanent, available = seen.probe.numbers(*facts.ROOM_FOR_SRK)
    evict = f"tpm2_evictcontrol -C o{' -P PASSWORD' if permanent & facts.OWNER_AUTH_SET else ''} -c"
    missing = f"there is no storage root key at {handle}"
    if there is None and seen.keys:
        return failure(f"{missing}, and there are active keys: the TPM was cleared or replaced", _NEW_CERTIFICATES)
    if there is None and permanent & facts.OWNER_AUTH_SET and seen.tpm.owner_auth is None:
        return failure(
            f"{missing}, and none can be made: the owner hierarchy has a password",
            "name it by [tpm] owner_auth, or make the key once: tpm2_createprimary -C o -P PASSWORD -G "
            f"ecc256:aes128cfb -c srk.ctx, tpm2_evictcontrol -C o -P PASSWORD -c srk.ctx {handle}",
        )
    if there is None and available == 0:
        return failure(
            f"{missing}, and no room for a persistent key",
            f"remove what is not needed: tpm2_getcap handles-persistent, {evict} HANDLE",
        )
    if there is None:
        return ok(f"{missing} yet; the daemon makes it at its first start")
    if wrong := srk_differs(there):
        return failure(
            f"the TPM holds {wrong} at {handle}, not an ECC P-256 storage root key",
            f"if nothing else needs it: {evict} {handle}; else [tpm] srk_handle = another one",
        )
    if seen.probe.values.get("srk_open") is False:
        return failure(
            f"the storage root key at {handle} has a password, and no setting names it: no key can be made",
            "name it by [tpm] srk_auth; or, if nothing else needs this key, remove it, and the daemon makes one: "
            f"{evict} {handle}",
        )
    if not there["attributes"] & facts.NODA:
        return warning(
            f"the storage root key at {handle} lacks noda: losses of power can lock it for a while",
            f"before there are keys: remove it ({evict} {handle}), and the daemon makes a better one",
        )
    return ok(f"the storage root key at {handle} is as it should be")


def srk_differs(there: Mapping[str, int]) -> str:
    """Say what is in the place of the storage root key; an empty text if it is one."""
    attributes, curve = there["attributes"], there.get("curve", 0)
    if there["type"] != facts.ALG_ECC:
        return f"a key of type {'RSA' if there['type'] == facts.ALG_RSA else hex(there['type'])}"
    if curve != facts.CURVES[SECP256R1]:
        return f"a key on the curve {_CURVES.get(curve, hex(curve))}"
    if attributes & facts.SRK_NEEDED != facts.SRK_NEEDED:
        return "a signing key" if attributes & facts.SIGN else f"a key with the attributes {attributes:#x}"
    return ""


def judge_authorisation(seen: Seen) -> Iterator[Verdict]:
    """Judge which hierarchies have a password, and whether the settings know."""
    tpm, (flags,) = seen.tpm, seen.probe.numbers(facts.PT_PERMANENT)
    bits = {"owner": facts.OWNER_AUTH_SET, "endorsement": facts.ENDORSEMENT_AUTH_SET, "lockout": facts.LOCKOUT_AUTH_SET}
    for which, named in (("owner", tpm.owner_auth), ("endorsement", tpm.endorsement_auth)):
        if named and not flags & bits[which]:
            yield warning(
                f"[tpm] {which}_auth names a password, and the {which} hierarchy has none: was the TPM cleared?",
                f"set it (tpm2_changeauth -c {which} PASSWORD), or remove {which}_auth",
            )
    if flags & facts.ENDORSEMENT_AUTH_SET and tpm.endorsement_auth is None:
        yield warning(
            "the endorsement hierarchy has a password, and no setting names it: stationkey attest cannot use it",
            "name it by [tpm] endorsement_auth, if attestation is wanted",
        )
    if seen.probe.errors.get("owner_auth", 0) & 0xFFFF in {facts.RC_BAD_AUTH, facts.RC_AUTH_FAIL}:
        yield failure(
            "[tpm] owner_auth names a wrong password of the owner hierarchy: no storage root key can be made",
            "put the right one there; see who changed it (tpm2_changeauth -c owner)",
        )
    if not flags & (facts.LOCKOUT_AUTH_SET | facts.DISABLE_CLEAR):
        yield warning(
            "the lockout hierarchy has no password: whoever may open the TPM may clear it, which ends every key",
            "give it one, and keep that off the station: tpm2_changeauth -c lockout file:-",
        )
    yield ok("; ".join(f"{which}: {'with a' if flags & bit else 'no'} password" for which, bit in bits.items()))


def judge_lockout(seen: Seen) -> Verdict:
    """Judge the protection against dictionary attacks [TPM 2.0 part 1, 19.8]."""
    flags, tries, most, interval, recovery = seen.probe.numbers(*facts.LOCKOUT)
    password = " -p PASSWORD" if flags & facts.LOCKOUT_AUTH_SET else ""
    reset = f"tpm2_dictionarylockout --clear-lockout{password}"
    usual = (
        f"tpm2_dictionarylockout --setup-parameters{password} --max-tries=32 --recovery-time=600 "
        "--lockout-recovery-time=86400"
    )
    there = seen.probe.values.get("srk")
    if most and not interval:  # a recovery time of 0 disables the protection [TPM 2.0 part 3, 25.3.1]
        return warning(
            "the protection against dictionary attacks is disabled (recovery time 0): passwords of other keys can be "
            "tried without end",
            usual,
        )
    if flags & facts.IN_LOCKOUT or (most and tries >= most):
        exempt = there is None or there["attributes"] & facts.NODA
        means = (
            "stationkey's own keys are exempt (noda)" if exempt else "the storage root key too: no request is served"
        )
        return failure(
            f"the TPM is in lockout after {tries} of {most} wrong authorisations or losses of power; {means}",
            f"find out who gave wrong passwords; then {reset}. By itself it forgets one each {interval} s",
        )
    if most == 0:
        return warning("the TPM allows no wrong authorisation at all: keys without noda are always locked", usual)
    if tries:
        return warning(
            f"{tries} of {most} wrong authorisations or losses of power are used up; at {most} the TPM locks",
            f"who gives wrong passwords? One is forgotten each {interval} s; or {reset}",
        )
    return ok(f"not in lockout, 0 of {most} tries used (one is forgotten each {interval} s, lockout {recovery} s)")


def judge_slots(seen: Seen) -> Verdict:
    """Judge the room for keys. Through a resource manager everybody has room, and sees none of the others."""
    (available,) = seen.probe.numbers(facts.PT_TRANSIENT_AVAIL)
    strays = len(seen.probe.values["transient"])
    refused = facts.RC_OBJECT_MEMORY in seen.probe.values.get("keys", {}).values()
    if seen.way.is_managed:
        return ok("the resource manager makes room where it is needed")
    if seen.daemon_running:
        return ok(f"{available} slots are free beside what the running daemon has loaded")
    if strays:
        full = "the slots are full: " if available < _WANTED or refused else ""
        return warning(
            f"{full}{strays} objects of other programs are loaded in the TPM, {available} slots are free",
            "the daemon unloads only what is certainly its own; programs that run beside it need a resource manager; "
            "what is left of those that are gone: tpm2_flushcontext -t",
        )
    if available < _WANTED:
        return failure(
            f"the TPM has {available} free slots, and two are needed",
            "another program holds keys: a resource manager is needed, " + facts.MANAGER_ADVICE,
        )
    return ok(f"{available} slots are free")


def judge_sessions(seen: Seen) -> Verdict:
    """Judge the room for sessions, which only `[tpm] session` needs, and policies."""
    loaded, active = seen.probe.numbers(*facts.SESSIONS)
    strays = 0 if seen.way.is_managed else len(seen.probe.values["loaded_sessions"])
    if (loaded == 0 and not seen.way.is_managed) or active == 0:
        told = "no session can be started in the TPM: programs that are gone have left theirs"
        advice = "tpm2_flushcontext -l (loaded) and -s (saved)"
        needed = seen.tpm.session != "none" or seen.tpm.pcrs
        return failure(told, advice) if needed else warning(told, advice)
    if strays:
        told = f"{strays} sessions of programs that are gone are in the TPM, {loaded} more can be loaded"
        return warning(told, "tpm2_flushcontext -l")
    return ok(f"{active} sessions can be started")


def judge_pcrs(seen: Seen) -> Verdict:
    """Judge the registers that new keys are bound to."""
    tpm = seen.tpm
    if not tpm.pcrs:
        return ok("no key is bound to platform configuration registers")
    there = seen.probe.values["banks"].get(str(facts.HASHES[tpm.pcr_bank]), [])
    if missing := [number for number in tpm.pcrs if number not in there]:
        return failure(
            f"the TPM's {tpm.pcr_bank} bank has no register {listed(missing)}",
            "tpm2_pcrallocate, or the firmware's set-up, enables banks; or set another [tpm] pcr_bank",
        )
    return warning(
        f"keys are bound to the registers {listed(tpm.pcrs)} ({tpm.pcr_bank}): an update of firmware, boot loader or "
        "kernel may make them useless",
        "request new certificates after each such update; no service can use these keys through OpenSSL",
    )


def judge_attestation_key(seen: Seen) -> Verdict:
    """Judge the provisioned attestation key, if one is named."""
    handle = seen.tpm.ak_handle
    if handle is None:
        return ok("the attestation key is derived from the endorsement seed when it is used")
    if why := seen.probe.lacks("ak"):
        return not_checked(why)
    there, wanted = seen.probe.values["ak"], facts.RESTRICTED | facts.SIGN
    if there is None or there["attributes"] & wanted != wanted:
        return failure(
            f"there is {'nothing' if there is None else 'no restricted signing key'} at [tpm] ak_handle {handle:#x}",
            "is it the right handle? Was the TPM cleared?",
        )
    return ok(f"there is a restricted signing key at {handle:#x}")


def judge_keys(seen: Seen) -> Iterator[Verdict]:
    """Judge whether this TPM takes the active keys."""
    if not seen.keys:
        yield ok("no active key of a TPM is on record")
    elif seen.probe.values.get("srk", 0) is None:
        told = f"{len(seen.keys)} active keys cannot be used: their storage root key is gone"
        yield failure(told, _NEW_CERTIFICATES)
    elif seen.tpm.srk_auth is not None or seen.probe.values.get("srk_open") is False:
        yield not_checked("the storage root key has a password, and the doctor does not send it")
    elif not may_try_keys(seen.tpm, seen.way, daemon_running=seen.daemon_running):
        yield not_checked("the running daemon has the TPM to itself; its log names the keys that cannot be used")
    elif why := seen.probe.lacks("keys"):
        yield not_checked(why)
    else:
        tried: dict[str, int] = seen.probe.values["keys"]
        yield from (_judge_key(f"{key} ({seen.keys[key]})", code) for key, code in tried.items() if code)
        if not any(tried.values()):
            yield ok(f"the TPM takes {'the active key' if len(tried) == 1 else f'all {len(tried)} active keys'}")


def _judge_key(key: str, code: int) -> Verdict:
    if code & 0xFFFF == facts.RC_INTEGRITY:
        told = f"the active key {key} was made by another TPM, or before this one was cleared"
        return failure(told, _NEW_CERTIFICATES)
    if code & 0xFFFF == facts.RC_OBJECT_MEMORY:
        return not_checked(f"the TPM has no free slot to load {key} into")
    why = ": its record is damaged" if code < 0 else f" ({code:#x})"
    return failure(
        f"the TPM does not take the active key {key}{why}",
        "restore a backup of the state directory, or request a new certificate",
    )
