"""In which state a TPM is: hierarchies, storage root key, lockout, room, and whether it takes the keys on record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from stationkey.contract.profiles import SECP256R1
from stationkey.doctor.report import Finding, failure, listed, not_checked, ok, warning
from stationkey.doctor.tpm.facts import (
    ALG_ECC,
    ALG_RSA,
    CURVES,
    DISABLE_CLEAR,
    ENDORSEMENT_AUTH_SET,
    ENDORSEMENT_ENABLED,
    HASHES,
    IN_LOCKOUT,
    LOCKOUT_AUTH_SET,
    MANAGER_ADVICE,
    NODA,
    OWNER_AUTH_SET,
    PT_ACTIVE_SESSIONS_AVAIL,
    PT_LOADED_SESSIONS_AVAIL,
    PT_LOCKOUT_COUNTER,
    PT_LOCKOUT_INTERVAL,
    PT_LOCKOUT_RECOVERY,
    PT_MAX_AUTH_FAIL,
    PT_PERMANENT,
    PT_PERSISTENT_AVAIL,
    PT_STARTUP_CLEAR,
    PT_TRANSIENT_AVAIL,
    RC_AUTH_FAIL,
    RC_BAD_AUTH,
    RC_FAILURE,
    RC_INITIALIZE,
    RC_INTEGRITY,
    RC_NEEDS_TEST,
    RC_OBJECT_MEMORY,
    RC_TESTING,
    RESTRICTED,
    SIGN,
    SRK_NEEDED,
    STORAGE_ENABLED,
    Seen,
    may_try_keys,
)

_CURVES: Final = MappingProxyType({1: "P-192", 2: "P-224", 4: "P-384", 5: "P-521", 0x20: "SM2"})
"""That a storage root key may be on, by their numbers [TPM 2.0 part 2, 6.4]."""
_WANTED: Final = 2
"""Slots: for a key, and for its parent while that is used."""


def judge_started(seen: Seen) -> Iterator[Finding]:
    """Whether TPM2_Startup was sent."""
    name = "tpm.started"
    if seen.probe.errors.get("properties") == RC_INITIALIZE:
        yield warning(
            name,
            "the TPM waits for TPM2_Startup, which the firmware sends at power-on; the daemon sends it when it opens "
            "the TPM",
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
    owner = " -P PASSWORD" if permanent & OWNER_AUTH_SET else ""
    remove = f"tpm2_evictcontrol -C o{owner} -c {handle:#x}"
    if there is None:
        if seen.keys:
            yield failure(
                name,
                f"there is no storage root key at {handle:#x}, and there are active keys: the TPM was cleared or "
                "exchanged",
                "nothing brings the keys back: have new certificates asked for (docs/operations.md, Another TPM)",
            )
        elif permanent & OWNER_AUTH_SET and seen.tpm.owner_auth is None:
            yield failure(
                name,
                f"there is no storage root key at {handle:#x}, and none can be made: the owner hierarchy has a "
                "password",
                "name it by [tpm] owner_auth, or make the key once: tpm2_createprimary -C o -P PASSWORD -G "
                f"ecc256:aes128cfb -c srk.ctx, tpm2_evictcontrol -C o -P PASSWORD -c srk.ctx {handle:#x}",
            )
        elif avail == 0:
            yield failure(
                name,
                f"there is no storage root key at {handle:#x}, and no room for a persistent key",
                "see tpm2_getcap handles-persistent, and remove what is not needed: "
                f"tpm2_evictcontrol -C o{owner} -c HANDLE",
            )
        else:
            yield ok(name, f"there is no storage root key at {handle:#x} yet; the daemon makes it at its first start")
        return
    wrong = srk_differs(there)
    if wrong:
        yield failure(
            name,
            f"the TPM holds {wrong} at {handle:#x}, where an ECC P-256 storage root key should be",
            f"if nothing else needs it: {remove}; else [tpm] srk_handle = another one",
        )
    elif seen.probe.values.get("srk_open") is False:
        yield failure(
            name,
            f"the storage root key at {handle:#x} has a password, and no setting names it: no key can be made",
            "name it by [tpm] srk_auth; or, if nothing else needs this key, remove it, and the daemon makes one: "
            + remove,
        )
    elif not there["attributes"] & NODA:
        yield warning(
            name,
            f"the storage root key at {handle:#x} lacks noda: losses of power can lock it for a while",
            f"before there are keys: remove it ({remove}), and the daemon makes a better one. Afterwards it must stay",
        )
    else:
        yield ok(name, f"the storage root key at {handle:#x} is as it should be")


def srk_differs(there: Mapping[str, int]) -> str:
    """What is at the handle of the storage root key, in words, where that is none; else an empty text."""
    if there["type"] != ALG_ECC:
        return f"a key of type {'RSA' if there['type'] == ALG_RSA else hex(there['type'])}"
    if there.get("curve") != CURVES[SECP256R1]:
        curve = there.get("curve", 0)
        return f"a key on the curve {_CURVES.get(curve, hex(curve))}"
    if there["attributes"] & SRK_NEEDED != SRK_NEEDED:
        return "a signing key" if there["attributes"] & SIGN else f"a key with the attributes {there['attributes']:#x}"
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
                f"[tpm] {which}_auth names a password, and the {which} hierarchy has none: the TPM was cleared, "
                "perhaps",
                f"set it (tpm2_changeauth -c {which} PASSWORD), or take {which}_auth out",
            )
    if flags & ENDORSEMENT_AUTH_SET and tpm.endorsement_auth is None:
        yield warning(
            name,
            "the endorsement hierarchy has a password, and no setting names it: stationkey attest cannot use it",
            "name it by [tpm] endorsement_auth, if attestation is wanted",
        )
    if seen.probe.errors.get("owner_auth", 0) & 0xFFFF in {RC_BAD_AUTH, RC_AUTH_FAIL}:
        yield failure(
            name,
            "what [tpm] owner_auth names is not the password of the owner hierarchy: no storage root key can be made",
            "put the right one there; see who changed it (tpm2_changeauth -c owner)",
        )
    if not flags & (LOCKOUT_AUTH_SET | DISABLE_CLEAR):
        yield warning(
            name,
            "the lockout hierarchy has no password: whoever may open the TPM may clear it, which ends every key",
            "give it one, and keep that off the station: tpm2_changeauth -c lockout file:-",
        )
    told = [f"{listed(have)}: with a password"] if have else []
    told += [f"{listed(lack)}: with none"] if lack else []
    yield ok(name, "; ".join(told))


def judge_lockout(seen: Seen) -> Iterator[Finding]:
    """The protection against guessing [TPM 2.0 part 1, 19.8]."""
    name = "tpm.lockout"
    flags, tries, most, interval, recovery = seen.probe.properties(
        PT_PERMANENT, PT_LOCKOUT_COUNTER, PT_MAX_AUTH_FAIL, PT_LOCKOUT_INTERVAL, PT_LOCKOUT_RECOVERY
    )
    password = " -p PASSWORD" if flags & LOCKOUT_AUTH_SET else ""
    reset = f"tpm2_dictionarylockout --clear-lockout{password}"
    usual = (
        f"tpm2_dictionarylockout --setup-parameters{password} --max-tries=32 --recovery-time=600 "
        "--lockout-recovery-time=86400"
    )
    there = seen.probe.values.get("srk")
    if most and not interval:
        # A recovery time of 0 switches the protection off [TPM 2.0 part 3, 25.3.1].
        yield warning(
            name,
            "the protection against guessing is switched off (recovery time 0): the passwords of other keys can be "
            "tried without end",
            usual,
        )
    elif flags & IN_LOCKOUT or (most and tries >= most):
        locked = there is not None and not there["attributes"] & NODA
        means = (
            "the storage root key is locked with it, so no request is served"
            if locked
            else "stationkey's own keys are exempt (noda); every other key with a password is locked"
        )
        yield failure(
            name,
            f"the TPM is in lockout after {tries} wrong authorisations or losses of power ({most} are allowed): "
            f"{means}",
            f"find out who gave wrong passwords; then {reset}. By itself it ends one try each {interval} s",
        )
    elif most == 0:
        yield warning(
            name,
            "the TPM allows no wrong authorisation at all: keys without noda are always locked",
            usual,
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
    elif strays and (avail < _WANTED or RC_OBJECT_MEMORY in tried):
        yield warning(
            name,
            f"the TPM's slots are full: {len(strays)} objects of programs that are gone are loaded, {avail} slots are "
            "free",
            "the daemon unloads them when it opens the TPM. Other programs cannot use the TPM until then: "
            "tpm2_flushcontext -t, or a resource manager",
        )
    elif strays:
        yield warning(
            name,
            f"{len(strays)} objects of programs that are gone are loaded in the TPM, {avail} slots are free",
            "the daemon unloads them when it opens the TPM; tpm2_flushcontext -t does, too",
        )
    elif avail < _WANTED:
        yield failure(
            name,
            f"the TPM has {avail} free slots, and two are needed",
            "another program holds keys: a resource manager is needed, " + MANAGER_ADVICE,
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
            f"keys are bound to the registers {listed(tpm.pcrs)} ({tpm.pcr_bank}): after an update of firmware, boot "
            "loader or kernel they may be of no use",
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
    elif there["attributes"] & (RESTRICTED | SIGN) != RESTRICTED | SIGN:
        yield failure(
            name,
            f"the key at [tpm] ak_handle {handle:#x} is no restricted signing key",
            "name the handle of one that is",
        )
    else:
        yield ok(name, f"there is a restricted signing key at {handle:#x}")


def judge_keys(seen: Seen) -> Iterator[Finding]:
    """Whether this TPM takes the active keys."""
    name = "tpm.keys"
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
    if seen.tpm.srk_auth is not None:
        yield not_checked(name, "the storage root key has a password, and the doctor does not send it")
        return
    if seen.probe.values.get("srk_open") is False:
        yield not_checked(name, "their storage root key has a password, and no setting names it")
        return
    if not may_try_keys(seen.tpm, seen.way, daemon_running=seen.daemon_running):
        yield not_checked(name, "the running daemon has the TPM to itself; its log names the keys that cannot be used")
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
